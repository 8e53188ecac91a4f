"""Recipes that turn raw files, or a seed, into a vault and requests; see README.md."""

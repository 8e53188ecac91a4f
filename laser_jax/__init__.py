"""laser_jax: ranking with lifelong user histories (LASER, arXiv 2602.11562) in JAX."""

__version__ = "0.1.0"

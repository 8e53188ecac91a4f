"""Hashes of keys; both are part of the format."""

import hashlib

import numpy as np


def splitmix64(keys: np.ndarray) -> np.ndarray:
    """The 64-bit hash of int64 keys, uint64 [N]; one to one."""
    z = keys.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_string(key: str) -> int:
    """The 64-bit hash under which a string user is found."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def hash_strings(keys: list[str]) -> np.ndarray:
    """Hashes of strings as int64 [N]."""
    return np.fromiter((hash_string(key) for key in keys), np.uint64, len(keys)).view(np.int64)

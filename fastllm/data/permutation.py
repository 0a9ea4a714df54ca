"""Pseudo-random permutations that need no memory: where one takes an index is computed from the index alone."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 4  # of a Feistel network, with a strong mixer: Luby and Rackoff 1988
_STEP = np.uint64(0x9E3779B97F4A7C15)


def mixed(x: np.ndarray) -> np.ndarray:
    """A hash of each uint64: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = x + _STEP
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*numbers: int) -> int:
    """A key that depends on all of ``numbers``, each of which is from 0 to 2**64 - 1, and on their order."""
    content = b"".join(number.to_bytes(8, "little") for number in numbers)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def permuted(index: np.ndarray, n: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Where the permutation of ``range(n)`` that ``key`` selects takes each ``index``, int64.

    ``n`` and ``key`` may be arrays: one for each index. A Feistel network permutes the numbers of as many bits as n
    has; those that it takes out of the range are taken further until they are inside (Black and Rogaway 2002).
    """
    x = index.astype(np.uint64)
    n, key = (np.broadcast_to(np.asarray(values, np.uint64), x.shape) for values in (n, key))
    bits = np.frexp(np.maximum(n, 2).astype(np.float64) - 1)[1].astype(np.uint64)  # exact below 2**53
    low = bits - bits // np.uint64(2)
    x = _network(x, low, bits, key)
    while (outside := np.flatnonzero(x >= n)).size:
        x[outside] = _network(x[outside], low[outside], bits[outside], key[outside])
    return x.astype(np.int64)


def _network(x: np.ndarray, low: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    one = np.uint64(1)
    low_mask, high_mask = (one << low) - one, (one << (bits - low)) - one
    left, right = x >> low, x & low_mask
    for number in range(ROUNDS):
        key = mixed(key)  # of the round
        if number % 2:
            right = right ^ (mixed(left ^ key) & low_mask)
        else:
            left = left ^ (mixed(right ^ key) & high_mask)
    return (left << low) | right

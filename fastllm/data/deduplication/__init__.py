"""Deduplication: exact duplicates by key, near duplicates by MinHash-LSH, and overlap with evaluation data."""

from .decontamination import DecontaminationSettings, Decontaminator
from .exact import KEY_BYTES, exact_duplicates, exact_key
from .minhash import MinHash, MinHashSettings, detection
from .near import (
    Signatures,
    kept_documents,
    near_duplicates,
    read_clusters,
    write_buckets,
    write_clusters,
    write_signatures,
)

__all__ = [
    "KEY_BYTES",
    "DecontaminationSettings",
    "Decontaminator",
    "MinHash",
    "MinHashSettings",
    "Signatures",
    "detection",
    "exact_duplicates",
    "exact_key",
    "kept_documents",
    "near_duplicates",
    "read_clusters",
    "write_buckets",
    "write_clusters",
    "write_signatures",
]

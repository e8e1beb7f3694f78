"""The difference between two tensors."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping
from typing import TypedDict

import numpy as np

from qat.core.errors import NotFiniteError, UserError

# Reported for equal tensors, whose ratio is infinite: JSON has no infinity. Above what float32 can reach (2^-24 → 150).
EQUAL_DB = 200.0


class TensorDifference(TypedDict):
    """max_abs: largest |difference|. cosine: of the flattened tensors. sqnr_db: 10·log10(Σ ref² / Σ (ref − cand)²)."""

    max_abs: float
    cosine: float
    sqnr_db: float


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays with their names and shapes, in hexadecimal."""
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        hashed.update(f"{name}{list(arrays[name].shape)}".encode())
        hashed.update(np.ascontiguousarray(arrays[name]).tobytes())
    return hashed.hexdigest()


def in_float64(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays in double precision; those of integers (indices) as they are."""
    floats = {name for name, array in arrays.items() if np.issubdtype(array.dtype, np.floating)}
    return {name: array.astype(np.float64) if name in floats else array for name, array in arrays.items()}


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise) of two energies, at most EQUAL_DB, which also stands for no noise."""
    if noise == 0:
        return EQUAL_DB
    return min(EQUAL_DB, 10 * math.log10(max(signal, sys.float_info.min) / noise))


def compare_tensors(reference: np.ndarray, candidate: np.ndarray, what: str = "compare") -> TensorDifference:
    """Compares a candidate with its reference, in double precision.

    Args:
        what: name of the compared tensor, for messages.

    Raises:
        UserError: different shapes. NotFiniteError: a value that is not finite.
    """
    if reference.shape != candidate.shape:
        raise UserError(f"{what}: found shape {list(candidate.shape)}, expected {list(reference.shape)}")
    a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    difference = a - b
    if not np.isfinite(difference).all():
        bad = int((~np.isfinite(difference)).sum())
        whose = "the reference" if not np.isfinite(a).all() else "the compared tensor"
        raise NotFiniteError(
            f"{what}: found NaN or infinite values in {bad} of {a.size} values of {whose}, expected finite tensors"
        )
    signal, noise = float(a @ a), float(difference @ difference)
    norms = math.sqrt(signal * float(b @ b))
    cosine = 1.0 if noise == 0 else float(a @ b) / norms if norms else 0.0
    return {
        "max_abs": float(np.abs(difference).max(initial=0.0)),
        "cosine": cosine,
        "sqnr_db": decibels(signal, noise),
    }

"""Comparison figures against closed forms."""

import numpy as np
import pytest

from qat.core.errors import UserError
from qat.core.tensors import EQUAL_DB, compare_tensors


def test_a_hundredth_of_noise_is_forty_decibels():
    reference = np.ones(1000, np.float32)
    figures = compare_tensors(reference, reference + np.float32(0.01))
    assert figures["sqnr_db"] == pytest.approx(40.0, abs=0.01)
    assert figures["max_abs"] == pytest.approx(0.01, rel=1e-4)
    assert figures["cosine"] == pytest.approx(1.0)


def test_equal_tensors_have_a_finite_ceiling():
    x = np.arange(5.0)
    assert compare_tensors(x, x) == {"max_abs": 0.0, "cosine": pytest.approx(1.0), "sqnr_db": EQUAL_DB}


def test_opposite_tensors():
    x = np.array([1.0, -2.0])
    figures = compare_tensors(x, -x)
    assert figures["cosine"] == pytest.approx(-1.0)
    assert figures["sqnr_db"] == pytest.approx(-10 * np.log10(4))


def test_a_reference_of_zeros():
    figures = compare_tensors(np.zeros(3), np.ones(3))
    assert figures["sqnr_db"] < -1000 and figures["cosine"] == 0.0


def test_shapes_must_agree():
    with pytest.raises(UserError, match="shape"):
        compare_tensors(np.zeros(3), np.zeros((3, 1)))

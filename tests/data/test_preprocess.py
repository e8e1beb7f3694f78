"""Preprocessing against PIL and closed forms."""

import numpy as np
import pytest
from PIL import Image

from qat.core.errors import UserError
from qat.core.preprocess import ResizeCrop, load_image, normalize


def test_resize_and_crop_keep_the_bottom_rows_and_the_middle_columns():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (225, 400, 3), np.uint8)
    out = ResizeCrop((128, 340), 0.88).apply(image)
    resized = np.asarray(Image.fromarray(image).resize((352, 198)))  # PIL's default for pictures is bicubic
    assert np.array_equal(out, resized[70:, 6:346])


def test_the_matrix_says_where_a_pixel_went():
    image = np.zeros((200, 400, 3), np.uint8)
    image[150:154, 100:104] = 255
    spec = ResizeCrop((64, 180), 0.5)
    v, u = np.argwhere(spec.apply(image)[..., 0] > 200).mean(0)
    expected = spec.matrix(400, 200) @ [101.5, 151.5, 0, 1]
    assert np.allclose([u, v], expected[:2], atol=0.75)  # BEVFusion's matrix has no half-pixel shift


def test_a_crop_beyond_the_image_is_black():
    out = ResizeCrop((64, 96), 0.5).apply(np.full((100, 200, 3), 255, np.uint8))
    assert (out[:14] == 0).all() and (out[16:] > 200).all()


def test_normalize_is_the_formula():
    image = np.array([[[255, 0, 51]]], np.uint8)
    out = normalize(image, [0.5, 0.25, 0.2], [0.5, 0.25, 0.1])
    assert np.allclose(out[:, 0, 0], [1.0, -1.0, 0.0], atol=1e-6)


def test_unreadable_pictures_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_image(tmp_path / "none.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"bad\.jpg: not a readable picture"):
        load_image(tmp_path / "bad.jpg")

"""Preprocessing against PIL and closed forms."""

import struct

import numpy as np
import pytest
from PIL import Image

from qat.core.errors import PictureSizeError, UserError
from qat.core.preprocess import ResizeCrop, load_image, normalize
from tests.messages import refused


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


def test_pictures_of_another_size_take_the_native_ones_place():
    """Where a pixel goes: of a picture twice as large, pixel 2u, 2v goes where u, v of the native one does."""
    spec = ResizeCrop((128, 352), 0.88, native=(225, 400))
    small, large = spec.matrix(400, 225), spec.matrix(1600, 900)
    assert np.allclose(small, ResizeCrop((128, 352), 0.88).matrix(400, 225))
    assert np.allclose(large @ [4 * 130.0, 4 * 70.0, 0, 1], small @ [130.0, 70.0, 0, 1], atol=1e-3)
    rows = np.linspace(0, 255, 900)[:, None] * np.ones((1, 1600))
    picture = np.repeat(rows.astype(np.uint8)[..., None], 3, 2)
    native = np.asarray(Image.fromarray(picture).resize((400, 225), Image.Resampling.BOX))
    assert np.abs(spec.apply(picture).astype(int) - spec.apply(native)).max() <= 2


@pytest.mark.parametrize(
    ("native", "size"), [(None, (1600, 900)), (None, (100, 56)), ((225, 400), (100, 300)), ((900, 1600), (1600, 900))]
)
def test_pictures_that_the_model_was_not_made_for_are_refused(native, size):
    """Four times as large or as small; of another shape and size; and a native size that the resize is not for."""
    spec = ResizeCrop((128, 352), 0.88, native=native)
    expected = "1600×900" if native == (900, 1600) else "400×225" if native else "about 400×145"
    for use in (spec.matrix, spec.placed, lambda w, h: spec.apply(np.zeros((h, w, 3), np.uint8))):
        with refused(
            f"found a picture of {size[0]}×{size[1]} pixels",
            f"expected {expected};",
            "resize_lim",
            error=PictureSizeError,
        ):
            use(*size)


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


RAMP = np.linspace(0, 65535, 64 * 96).round().astype(np.uint16).reshape(64, 96)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_grey_is_scaled_by_its_depth(tmp_path, suffix):
    path = tmp_path / f"grey.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 96 64 65535\n" + RAMP.astype(">u2").tobytes())
    else:
        Image.fromarray(RAMP).save(path)
    read = load_image(path)
    assert read.shape == (64, 96, 3) and read.dtype == np.uint8
    assert np.abs(read.astype(float) - RAMP[..., None] / 257).max() <= 0.51
    assert not (read == 255).mean() > 0.01


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_grey_is_scaled_and_turned_as_the_tiff_says(tmp_path, bits, photometric):
    """Pillow gives 12 bits in mode I;16, as if there were 16, and leaves 0 for white as it is. The file is made by hand."""
    values = np.array([[0, 4095], [2048, 1024]]) if bits == 12 else np.array([[0, 65535], [32768, 1000]])
    packed = values.astype("<u2").tobytes()
    if bits == 12:
        packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.tolist())
    tags = [
        (256, 2),
        (257, 2),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, 2),
        (279, len(packed)),
    ]
    head = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(tags))
    body = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    (tmp_path / "grey.tiff").write_bytes(head + body + bytes(4))
    expected = np.rint(values * 255 / (2**bits - 1))
    expected = expected if photometric == 1 else 255 - expected
    assert load_image(tmp_path / "grey.tiff")[..., 0].tolist() == expected.tolist()


def test_a_picture_whose_depth_nothing_says_is_refused_by_its_mode(tmp_path):
    for mode, values in (("I", RAMP.astype(np.int32)), ("F", RAMP.astype(np.float32))):
        Image.fromarray(values).save(tmp_path / "deep.tiff")
        with refused("deep.tiff", f"found mode {mode},", "expected a picture of 8 or 16 bits"):
            load_image(tmp_path / "deep.tiff")


def test_a_camera_of_fewer_bits_in_a_16_bit_picture_is_refused(tmp_path):
    """12 bits in 16: scaled by the file's depth it would be black."""
    Image.fromarray(RAMP >> 4).save(tmp_path / "dark.png")
    with pytest.raises(UserError, match=r"dark\.png: found 16-bit values up to 4095"):
        load_image(tmp_path / "dark.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_8_bit_modes_are_read_as_pillow_means_them(tmp_path, mode):
    picture = Image.fromarray((RAMP >> 8).astype(np.uint8)).convert("RGB").convert(mode)
    path = tmp_path / f"picture.{'tiff' if mode == 'CMYK' else 'png'}"
    picture.save(path)
    assert np.array_equal(load_image(path), np.asarray(picture.convert("RGB")))

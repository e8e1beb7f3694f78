"""From a camera's JPEG to the network's input, as BEVFusion's ImageAug3D and ImageNormalize do at test time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from qat.core.errors import PictureSizeError, UserError
from qat.core.kinds import kind_of_file

MOST_PIXELS = 1 << 27
# Pillow's modes of 8 bits or fewer a channel, which it converts to RGB correctly; alpha is dropped.
EIGHT_BIT = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags
FEWEST_BITS = 12  # largest values of 16-bit pictures from cameras with fewer bits that wrote them without scaling


LEAST = 1 / 3  # least share of a picture's width that a crop keeps, and of the network's image that a picture fills
SAME_SHAPE = 0.02


@dataclass(frozen=True)
class ResizeCrop:
    """Resize by `resize`, then keep `final_dim` (H, W), lowered from the bottom by `bottom` (a share of the height).

    native: (H, W) of the pictures that `resize` is for, if known: pictures with another size and the same aspect ratio are
    resized to the same place. Other pictures are resized by `resize`, as in BEVFusion.
    """

    final_dim: tuple[int, int]
    resize: float
    bottom: float = 0.0
    native: tuple[int, int] | None = None

    def factor(self, width: int, height: int) -> float:
        """The factor by which a picture of width × height is resized.

        Raises:
            PictureSizeError: the crop would keep less than `LEAST` of its width, or it would fill less than `LEAST` of the
                network's image: the model was made for another size.
        """
        factor = self.resize
        if self._like_native(width, height):
            factor *= self.native[1] / width if width != self.native[1] else 1.0  # type: ignore[index]
        fh, fw = self.final_dim
        new_width, new_height = width * factor, height * factor
        if new_width * LEAST > fw or new_width < fw * LEAST or new_height < fh * LEAST:
            size = self.native or (round(self.final_dim[0] / self.resize), round(self.final_dim[1] / self.resize))
            about = "" if self.native else "about "
            raise PictureSizeError(
                f"found a picture of {width}×{height} pixels, resized by {factor:.3g} to {new_width:.0f}×{new_height:.0f} for "
                f"an input of {fw}×{fh}, expected {about}{size[1]}×{size[0]}; use pictures of that size, or "
                "fix resize_lim (or native_size: [height, width]) in the config"
            )
        return factor

    def _like_native(self, width: int, height: int) -> bool:
        """Whether a picture has the native size or its aspect ratio."""
        if self.native is None:
            return False
        native_height, native_width = self.native
        return abs(width * native_height / (height * native_width) - 1) <= SAME_SHAPE

    def placed(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Size after the resize (W, H) and the crop's corner (left, top) for a native image of width × height. Raises as
        `factor`."""
        factor = self.factor(width, height)
        new_width, new_height = int(width * factor), int(height * factor)
        if self.native is not None and self._like_native(
            width, height
        ):  # the same to the pixel, whatever the picture's size
            new_width, new_height = (int(n * self.resize) for n in reversed(self.native))
        fh, fw = self.final_dim
        return (new_width, new_height), (int(max(0, new_width - fw) / 2), int((1 - self.bottom) * new_height) - fh)

    def matrix(self, width: int, height: int) -> np.ndarray:
        """Native pixels to network pixels, float32[4,4]: BEVFusion's img_aug_matrix. Raises as `factor`."""
        _, (left, top) = self.placed(width, height)
        matrix = np.eye(4, dtype=np.float32)
        matrix[0, 0] = matrix[1, 1] = self.factor(width, height)
        matrix[:2, 3] = -left, -top
        return matrix

    def apply(self, image: np.ndarray) -> np.ndarray:
        """uint8[h,w,3] → uint8[H,W,3]; PIL's bicubic resize, black where the crop leaves the image. Raises as `factor`."""
        fh, fw = self.final_dim
        size, (left, top) = self.placed(image.shape[1], image.shape[0])
        resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((left, top, left + fw, top + fh)))


def _to_rgb(picture: Image.Image) -> np.ndarray:
    """uint8[h,w,3] from any mode whose largest value is known. Pillow's conversion clips 16-bit grey at 255.

    Raises:
        UserError: 32-bit integers or floats, whose white level is unknown.
    """
    mode, tags = picture.mode, getattr(picture, "tag_v2", {})
    if mode in EIGHT_BIT:
        return np.asarray(picture.convert("RGB"))
    # Pillow reads PGM of more than 8 bits, and some 16-bit PNG, as I and scales them to 16 bits.
    if mode not in SIXTEEN_BIT and not (mode == "I" and picture.format in ("PPM", "PNG")):
        raise UserError(
            f"found mode {mode}, whose values have no stated range, expected a picture of 8 or 16 bits a channel; convert it, "
            "with white at the highest value"
        )
    bits = int(tags.get(BITS_PER_SAMPLE, (16,))[0])
    values = np.asarray(picture).astype(np.float32)
    largest = float(values.max(initial=0))
    if bits == 16 and 0 < largest < 1 << FEWEST_BITS:
        raise UserError(
            f"found 16-bit values up to {largest:.0f} only, nearly black, expected 0 to 65535; scale pictures of cameras with "
            "fewer bits to 16 bits, or save them with 8"
        )
    grey = np.rint(np.clip(values, 0, None) * np.float32(255 / ((1 << bits) - 1))).astype(np.uint8)
    if tags.get(PHOTOMETRIC, 1) == WHITE_IS_ZERO:
        grey = 255 - grey
    return np.repeat(grey[..., None], 3, axis=2)


def load_image(path: str | Path) -> np.ndarray:
    """Reads a picture as uint8[h,w,3] RGB. 16-bit grey is scaled by its depth.

    Raises:
        UserError: missing, truncated, not a picture, or a mode of unknown depth.
    """
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MOST_PIXELS:  # the devkit switches Pillow's limit off
                raise ValueError(f"{picture.width}×{picture.height} pixels, more than any camera's")
            return _to_rgb(picture)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the data set is incomplete, fetch the rest of it") from None
    except IsADirectoryError:
        raise UserError(f"{path}: found a folder, expected a picture; fetch it again") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = str(error)
        if isinstance(error, UnidentifiedImageError):
            why = kind_of_file(path) or "none of the formats that Pillow reads"
        raise UserError(f"{path}: not a readable picture ({why}); fetch it again") from None


def normalize(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8[H,W,3] → float32[3,H,W]: scaled to [0, 1], minus mean, over std."""
    scaled = image.astype(np.float32) / np.float32(255)
    scaled = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))

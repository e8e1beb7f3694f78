"""What an export and a later `bevqat verify` share: frames, tolerances, the figures, and verification.npz.

qat.export compares each graph with PyTorch and keeps, in verification.npz, what repeats the comparison without PyTorch:
the inputs, exactly, and of each reference output

- SUMS sums over the whole tensor, each value with a random sign in one random sum of them (a count sketch: Charikar,
  Chen and Farach-Colton, ICALP 2002). For a difference d of two tensors, the squared differences of their sums add up to
  |d|² on average, with a standard deviation of at most √(2/SUMS)·|d|² = 2.2 % whatever d looks like. (A sample of n
  values has √((κ−1)/n), where κ is the kurtosis of d: it misses an error that sits in few places. A single wrong value
  anywhere changes a sum.) Five standard deviations are 0.46 dB, SUMS_DB, and that much less than the tolerance passes.
- VALUES of its values, one from each of as many equal stretches, for the largest difference.
- its energy |ref|².

Tensors of at most SUMS values are kept whole, and their figures are exact.

Everything random comes from PCG64's raw words, whose stream numpy guarantees; its distributions may change from one
version to the next.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qat.core.errors import NotFiniteError, UserError
from qat.core.files import sha256
from qat.core.frame import FrameArrays
from qat.core.geometry import camera_ring
from qat.core.preprocess import normalize
from qat.core.tensors import TensorDifference, compare_tensors, decibels

FILE = "verification.npz"
FP32_DB, INT8_MARGIN_DB = 80.0, -3.0
SUMS, VALUES = 4096, 4096
SUMS_DB = 10 * math.log10(1 + 5 * math.sqrt(2 / SUMS))
SIGNIFICANT = 5  # bits of an inner part's input; see `round_input`
_SPARSE = 0.125  # share of values other than zero up to which they are kept with their places
_SIGNS, _PLACES, _IMAGES, _DEPTH = range(4)  # streams


def tolerance_db(quantization_db: float | None = None) -> float:
    """The least SQNR of a graph's output beside PyTorch's.

    Derived in docs/verify.md: 80 dB for FP32; for a graph that rounds, 3 dB below the SQNR of the fake-quantized module
    against the float one on the same inputs, `quantization_db`.
    """
    return FP32_DB if quantization_db is None else min(FP32_DB, quantization_db + INT8_MARGIN_DB)


def judge(difference: TensorDifference, quantization_db: float | None = None) -> dict[str, Any]:
    """max_abs, cosine, sqnr_db, with tolerance_db, quantization_db (where there is one) and passed."""
    entry: dict[str, Any] = {**difference, "tolerance_db": tolerance_db(quantization_db)}
    if quantization_db is not None:
        entry["quantization_db"] = quantization_db
    entry["passed"] = bool(difference["sqnr_db"] >= entry["tolerance_db"])
    return entry


def _words(stream: int, count: int, seed: int = 0) -> np.ndarray:
    """uint64[count], the same on every machine."""
    return np.random.PCG64([seed, stream]).random_raw(count).astype("<u8")


def random_frame(settings: Mapping[str, Any], seed: int) -> FrameArrays:
    """A made-up keyframe: noise for images, one pixel in twenty with a depth, the cameras in a ring.

    img and depth have the same bits on every machine; the noise is the sum of four 16-bit numbers, made to mean 0 and
    variance 1.

    Args:
        settings: a manifest's `pipeline` section.
    """
    count = len(settings["cameras"])
    height, width = settings["image"]["size"]
    low, high, _ = settings["vtransform"]["dbound"]
    quarters = _words(_IMAGES, count * 3 * height * width, seed).view("<u2").reshape(-1, 4)
    noise = (quarters.sum(axis=1, dtype=np.int64) - 2 * 65535) / math.sqrt((65536**2 - 1) / 3)
    places = _words(_DEPTH, count * height * width, seed)
    metres = low + (high - low) * ((places >> np.uint64(32)) / 2.0**32)
    depth = np.where((places & np.uint64(0xFFFFFFFF)) < 2**32 // 20, metres, 0.0)
    intrinsics, camera2lidar = camera_ring(count, (height, width))
    unmoved = np.tile(np.eye(4), (count, 1, 1))
    arrays = (
        noise.reshape(count, 3, height, width),
        depth.reshape(count, 1, height, width),
        intrinsics,
        camera2lidar,
        unmoved,
        np.eye(4),
    )
    return FrameArrays(f"random:{seed}", *(array.astype(np.float32) for array in arrays))


def check_frame(settings: Mapping[str, Any], frame: Any, token: str) -> None:
    """Raises `UserError` where a frame's arrays are not what the parts take: number of cameras, image size, dtype."""
    cameras = settings["cameras"]
    count, size = len(cameras), list(settings["image"]["size"])
    if len(frame.img) != count:
        raise UserError(
            f"frame {token}: found {len(frame.img)} cameras, expected {count} ({', '.join(cameras)}); verify on frames "
            "of the cameras that the model was made for"
        )
    shapes = {
        "img": [count, 3, *size],
        "depth": [count, 1, *size],
        "camera_intrinsics": [count, 4, 4],
        "camera2lidar": [count, 4, 4],
        "img_aug_matrix": [count, 4, 4],
        "lidar_aug_matrix": [4, 4],
    }
    for name, shape in shapes.items():
        array = getattr(frame, name)
        if list(array.shape) != shape or array.dtype != np.float32:
            raise UserError(
                f"frame {token}: {name}: found {array.dtype}{list(array.shape)}, expected float32{shape}; preprocess the "
                "frame with this model's config"
            )
        if not np.isfinite(array).all():
            raise UserError(f"frame {token}: {name}: found NaN or infinite values, expected finite ones")


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays with their names and shapes, in hexadecimal."""
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        hashed.update(f"{name}{list(arrays[name].shape)}".encode())
        hashed.update(np.ascontiguousarray(arrays[name]).tobytes())
    return hashed.hexdigest()


def round_input(array: np.ndarray) -> np.ndarray:
    """float32 rounded to SIGNIFICANT significant bits, half to even.

    What is between the parts is made so before either side computes with it: it is kept exactly in half of its size or
    less, and what the file lacks is nothing. The input moves by at most 2^-SIGNIFICANT, 3.1 %, of each value.
    """
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    drop = 24 - SIGNIFICANT
    half = (np.uint32(1) << np.uint32(drop - 1)) - np.uint32(1) + ((bits >> np.uint32(drop)) & np.uint32(1))
    return ((bits + half) >> np.uint32(drop) << np.uint32(drop)).view(np.float32)


def _pixels(array: np.ndarray, image: Mapping[str, Any]) -> np.ndarray | None:
    """The uint8[…,3,H,W] that normalises to this array, bit for bit; None where there is none."""
    if array.ndim < 3 or array.shape[-3] != 3:
        return None
    mean, std = (np.asarray(image[name], np.float64)[:, None, None] for name in ("mean", "std"))
    pixels = np.clip(np.rint((array * std + mean) * 255), 0, 255).astype(np.uint8)
    return pixels if np.array_equal(_normalized(pixels, image), array) else None


def _normalized(pixels: np.ndarray, image: Mapping[str, Any]) -> np.ndarray:
    flat = pixels.reshape(-1, *pixels.shape[-3:]).transpose(0, 2, 3, 1)
    return np.stack([normalize(one, image["mean"], image["std"]) for one in flat]).reshape(pixels.shape)


def pack(array: np.ndarray, image: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A float32 tensor in the smallest of four exact forms.

    - `pixels`: uint8, each less its left neighbour; for what `image`'s mean and std make of pixels.
    - `cells`, `high`, `low`: for a [1,C,X,Y] with at most 16 bits a value, which cells have anything, and the two bytes
      of their values.
    - `steps`, `values`: for what is mostly zero, how far it is from one value to the next, and the values.
    - `raw`.
    """
    if (pixels := _pixels(array, image)) is not None:
        return {"pixels": np.diff(pixels, axis=-1, prepend=np.uint8(0))}
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    if array.ndim == 4 and array.shape[0] == 1 and not (bits & np.uint32(0xFFFF)).any():
        cells = bits[0].any(axis=0)
        halves = bits[0][:, cells] >> np.uint32(16)
        return {
            "cells": np.packbits(cells),
            "high": (halves >> np.uint32(8)).astype(np.uint8),
            "low": (halves & np.uint32(0xFF)).astype(np.uint8),
        }
    places = np.flatnonzero(bits)
    if len(places) <= _SPARSE * bits.size and bits.size < 2**32:
        return {"steps": np.diff(places, prepend=0).astype(np.uint32), "values": array.ravel()[places]}
    return {"raw": array}


def unpack(packed: Mapping[str, np.ndarray], shape: Sequence[int], image: Mapping[str, Any]) -> np.ndarray:
    """The float32 tensor that `pack` took."""
    if "pixels" in packed:
        pixels = np.cumsum(packed["pixels"], axis=-1, dtype=np.uint8)
        return _normalized(pixels, image).reshape(shape)
    if "cells" in packed:
        cells = np.unpackbits(packed["cells"], count=math.prod(shape[2:])).astype(bool).reshape(shape[2:])
        bits = np.zeros(shape[1:], np.uint32)
        bits[:, cells] = (packed["high"].astype(np.uint32) << 24) | (packed["low"].astype(np.uint32) << 16)
        return bits.view(np.float32).reshape(shape)
    if "steps" in packed:
        flat = np.zeros(math.prod(shape), np.float32)
        flat[np.cumsum(packed["steps"], dtype=np.int64)] = packed["values"]
        return flat.reshape(shape)
    return packed["raw"].reshape(shape)


def _sums(flat: np.ndarray) -> np.ndarray:
    words = _words(_SIGNS, flat.size)
    signed = np.where(words & np.uint64(1), flat, -flat)
    which = ((words >> np.uint64(1)) % np.uint64(SUMS)).astype(np.int64)
    return np.bincount(which, weights=signed, minlength=SUMS).astype(np.float32)


def _places(size: int) -> np.ndarray:
    edges = np.arange(VALUES + 1, dtype=np.int64) * size // VALUES
    widths = np.diff(edges)
    return edges[:-1] + (_words(_PLACES, VALUES) % widths.astype(np.uint64)).astype(np.int64)


def summarize(reference: np.ndarray) -> dict[str, np.ndarray]:
    """What is kept of a reference output: `whole`, or `sums`, `values` and `energy`."""
    flat = reference.astype(np.float64).ravel()
    if flat.size <= SUMS:
        return {"whole": reference.astype(np.float32)}
    return {"sums": _sums(flat), "values": flat[_places(flat.size)].astype(np.float32), "energy": np.array(flat @ flat)}


def compare_summary(summary: Mapping[str, np.ndarray], candidate: np.ndarray) -> tuple[TensorDifference, float]:
    """Compares a tensor with the summary of its reference.

    Returns:
        the figures (max_abs over the kept values alone), and by how many dB sqnr_db may be too low: 0 or SUMS_DB.

    Raises:
        UserError: a value that is not finite.
    """
    if "whole" in summary:
        return compare_tensors(summary["whole"].reshape(candidate.shape), candidate), 0.0
    flat = candidate.astype(np.float64).ravel()
    if not np.isfinite(flat).all():
        raise NotFiniteError("compare: found NaN or infinite values, expected finite tensors")
    difference = _sums(flat).astype(np.float64) - summary["sums"]
    noise, signal, energy = float(difference @ difference), float(summary["energy"]), float(flat @ flat)
    norms = math.sqrt(signal * energy)
    cosine = 1.0 if noise == 0 else (signal + energy - noise) / (2 * norms) if norms else 0.0
    largest = np.abs(flat[_places(flat.size)] - summary["values"].astype(np.float64)).max()
    return {"max_abs": float(largest), "cosine": cosine, "sqnr_db": decibels(signal, noise)}, SUMS_DB


def write_summary(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed .npz whose bytes depend on the arrays alone (and on the zlib that compresses them)."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(arrays):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(arrays[name]), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            entry.create_system = 3
            archive.writestr(entry, buffer.getvalue(), compresslevel=6)


class Summary:
    """verification.npz: the stored arrays of one export, read as they are asked for."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Opens it.

        Raises:
            UserError: the export wrote none, it is missing, or it was changed.
        """
        self.settings: Mapping[str, Any] = manifest["pipeline"]
        self.parts: Mapping[str, Any] = manifest["parts"]
        self.about: Mapping[str, Any] = manifest["verification"]
        if "file" not in self.about:
            raise UserError(f"{folder}: its export kept nothing to verify with, expected {FILE}; export again")
        path = folder / self.about["file"]
        if not path.is_file():
            raise UserError(f"{path}: no such file, expected what the export wrote; copy it with the parts")
        if (found := sha256(path)) != self.about["sha256"]:
            raise UserError(
                f"{path}: found sha256 {found[:12]}…, expected {self.about['sha256'][:12]}… as in the manifest: the file "
                "was changed after its export; export again"
            )
        self._path = path
        with np.load(path, allow_pickle=False) as archive:
            self._names = list(archive.files)

    def _group(self, prefix: str) -> dict[str, np.ndarray]:
        with np.load(self._path, allow_pickle=False) as archive:
            return {name[len(prefix) :]: archive[name] for name in self._names if name.startswith(prefix)}

    def frames(self, part: str) -> list[int]:
        """Indices, in the manifest's list of frames, of those that this part can be verified on."""
        return list(self.about["stored"][part])

    def inputs(self, part: str, frame: int) -> dict[str, np.ndarray]:
        """What the part took in.

        Raises:
            UserError: the random frame comes out otherwise here than at the export.
        """
        specs = self.parts[part]["inputs"]
        names = list(specs)
        if frame == 0 and part == "camera.backbone":
            made = [random_frame(self.settings, self.about["seed"] + n) for n in range(self.about["batch"])]
            arrays = {name: np.stack([getattr(one, name) for one in made]) for name in names}
            if digest(arrays) != self.about["random_sha256"]:
                raise UserError(
                    f"{self._path}: the random frame of seed {self.about['seed']} comes out otherwise here than at the "
                    "export; numpy's PCG64 or its float32 arithmetic differs: please report it"
                )
            return arrays
        packed = self._group(f"{frame}/{part}/in/")
        result = {}
        for name in names:
            own = {key.removeprefix(f"{name}/"): value for key, value in packed.items() if key.startswith(f"{name}/")}
            shape = [self.about["batch"] if n == "batch" else n for n in specs[name]["shape"]]
            result[name] = unpack(own, shape, self.settings["image"])
        return result

    def reference(self, part: str, frame: int, output: str) -> dict[str, np.ndarray]:
        """The summary of what PyTorch gave, for `compare_summary`."""
        return self._group(f"{frame}/{part}/out/{output}/")

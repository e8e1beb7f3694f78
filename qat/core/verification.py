"""Shared by an export and a later `bevqat verify`: frames, tolerances, the figures, and verification.npz.

qat.export compares each graph with PyTorch and keeps, in verification.npz, what repeats the comparison without PyTorch: the
inputs, exactly; the outputs, in half precision where that is enough (`store`); for INT8 graphs also the outputs without
rounding, and the reference of each site (`qat.core.sites`).

Everything random comes from PCG64's raw words, whose stream numpy guarantees; its distributions may change from one
version to the next.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qat.core.errors import NotFiniteError, UserError
from qat.core.files import sha256
from qat.core.noise import words
from qat.core.preprocess import normalize
from qat.core.sites import Site, cut_patch, tile
from qat.core.tensors import TensorDifference, compare_tensors, digest

FILE = "verification.npz"
FP32_DB = 80.0
FLOAT_MARGIN_DB = -3.0  # an INT8 graph may have twice the noise of its simulation
INT8_MARGIN_DB = -20 * math.log10(1 + math.sqrt(2))  # the two noises added, at worst: -7.66 dB
NOISIER_DB = -20 * math.log10(2)  # a graph may be twice as far from float64 as PyTorch is: -6.02 dB
VALUES, LEAST_VALUES = 1 << 17, 4096  # kept of a part's outputs together, and of each at least
SAMPLE_DB = 1.0  # the SQNR of kept values may be this much below that of all
ENOUGH_DB = 20.0  # values kept in half precision must be this much closer than the tolerance
INPUT_MOST, INPUT_SIDE = 1 << 20, 64  # values of an inner part's input beyond which a patch is repeated, and its sides
SIGNIFICANT = 5  # bits of an inner part's input; see `round_input`
_SPARSE = 0.125  # share of values other than zero up to which they are kept with their places
_PLACES = 1  # a stream


def tolerance_db(quantization_db: float | None = None, pytorch_db: float | None = None) -> float:
    """The least SQNR of a graph's output against its reference; docs/verify.md derives it.

    Args:
        quantization_db: for a graph that rounds, the SQNR of its simulation in PyTorch against the float module.
        pytorch_db: where the reference is in float64, the SQNR of PyTorch's own float32 against it.
    """
    if quantization_db is not None:
        return min(FP32_DB, quantization_db + INT8_MARGIN_DB)
    return FP32_DB if pytorch_db is None else min(FP32_DB, pytorch_db + NOISIER_DB)


def judge(
    difference: TensorDifference,
    quantization_db: float | None = None,
    float_db: float | None = None,
    pytorch_db: float | None = None,
) -> dict[str, Any]:
    """max_abs, cosine, sqnr_db, with tolerance_db and passed, and where they are given quantization_db, float_db (the graph against the float module) with float_tolerance_db, and pytorch_db (see
    `tolerance_db`)."""
    entry: dict[str, Any] = {**difference, "tolerance_db": tolerance_db(quantization_db, pytorch_db)}
    entry["passed"] = bool(difference["sqnr_db"] >= entry["tolerance_db"])
    if pytorch_db is not None:
        entry["pytorch_db"] = pytorch_db
    if quantization_db is not None:
        entry["quantization_db"] = quantization_db
        if float_db is not None:
            entry["float_db"] = float_db
            entry["float_tolerance_db"] = min(FP32_DB, quantization_db + FLOAT_MARGIN_DB)
            entry["passed"] &= bool(float_db >= entry["float_tolerance_db"])
    return entry


def what_is_wrong(row: Mapping[str, Any]) -> str:
    """A failed output in words. row: its figures on a frame."""
    if row["sqnr_db"] is None:
        return "found NaN or infinite values"
    if row["sqnr_db"] >= row["tolerance_db"]:
        if row.get("float_db", 0) is None or row.get("float_db", 0) < row.get("float_tolerance_db", 0):
            return (
                f"found {row['float_db']:.1f} dB SQNR against the float module, expected "
                f"{row['float_tolerance_db']:.1f} dB or more"
            )
        found = row.get("optimized_db")
        what = "NaN or infinite values" if found is None else f"{found:.1f} dB SQNR"
        return f"found {what} with ONNX Runtime's optimizer on, expected {row['tolerance_db']:.1f} dB or more"
    return f"found {row['sqnr_db']:.1f} dB SQNR, expected {row['tolerance_db']:.1f} dB or more"


def made_feeds(flow: Any, seed: int, batch: int) -> dict[str, np.ndarray]:
    """The parts' inputs from the plan for a batch of generated frames at the beginning of a scene."""
    feeds = flow.first_feeds([flow.made_frame(seed + n) for n in range(batch)])
    return {name: array for name, array in feeds.items() if name in flow.plan.part_inputs}


def round_input(array: np.ndarray) -> np.ndarray:
    """float32 rounded to SIGNIFICANT significant bits, half to even.

    Tensors between the parts are rounded before either side computes with them, so the file stores them exactly in half the
    size or less. The input moves by at most 2^-SIGNIFICANT, 3.1 %, of each value. Integers (indices) do not change.
    """
    if not np.issubdtype(array.dtype, np.floating):
        return array
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    drop = 24 - SIGNIFICANT
    half = (np.uint32(1) << np.uint32(drop - 1)) - np.uint32(1) + ((bits >> np.uint32(drop)) & np.uint32(1))
    return ((bits + half) >> np.uint32(drop) << np.uint32(drop)).view(np.float32)


def input_patch(array: np.ndarray) -> np.ndarray | None:
    """A patch of a large tensor [N,C,H,W] that replaces it, repeated; None for a tensor that is small enough to be kept.

    Like `round_input`, it is applied before either side computes.
    """
    if array.ndim != 4 or array.size <= INPUT_MOST:
        return None
    return cut_patch(array, 1, INPUT_SIDE, INPUT_MOST // 2)


def _pixels(array: np.ndarray, image: Mapping[str, Any]) -> np.ndarray | None:
    """The uint8[…,3,H,W] that normalises to this array, bit for bit; None if there is none."""
    if array.ndim < 3 or array.shape[-3] != 3:
        return None
    mean, std = (np.asarray(image[name], np.float64)[:, None, None] for name in ("mean", "std"))
    pixels = np.clip(np.rint((array * std + mean) * 255), 0, 255).astype(np.uint8)
    return pixels if np.array_equal(_normalized(pixels, image), array) else None


def _normalized(pixels: np.ndarray, image: Mapping[str, Any]) -> np.ndarray:
    flat = pixels.reshape(-1, *pixels.shape[-3:]).transpose(0, 2, 3, 1)
    return np.stack([normalize(one, image["mean"], image["std"]) for one in flat]).reshape(pixels.shape)


def pack(array: np.ndarray, image: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """A tensor in the smallest of four exact forms; integers in the last one.

    - `pixels`: uint8, each less its left neighbour; for what `image`'s mean and std make of pixels.
    - `cells`, `high`, `low`: for a [1,C,X,Y] with at most 16 bits a value, which cells have anything, and the two bytes
      of their values.
    - `steps`, `values`: for what is mostly zero, how far it is from one value to the next, and the values.
    - `raw`.
    """
    if not np.issubdtype(array.dtype, np.floating):
        return {"raw": array}
    if image is not None and (pixels := _pixels(array, image)) is not None:
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


def unpack(packed: Mapping[str, np.ndarray], shape: Sequence[int], image: Mapping[str, Any] | None) -> np.ndarray:
    """The tensor that was given to `pack`; with `patch_shape`, its patch, repeated to `shape`."""
    if "patch_shape" in packed:
        rest = {key: value for key, value in packed.items() if key != "patch_shape"}
        return tile(unpack(rest, [int(n) for n in packed["patch_shape"]], image), shape)
    if "pixels" in packed and image is not None:
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


def _value_places(size: int, count: int) -> np.ndarray:
    """int64[count]: one place in each of `count` equal stretches of a tensor."""
    edges = np.arange(count + 1, dtype=np.int64) * size // count
    drawn = words(_PLACES, count)
    return edges[:-1] + (drawn % np.diff(edges).astype(np.uint64)).astype(np.int64)


def store(reference: np.ndarray, tolerance: float, outputs: int = 1) -> dict[str, np.ndarray]:
    """The stored form of one of a part's `outputs`: `whole`, or `some` of its values, at places that depend on its size.

    In half precision if that is closer to the reference than `tolerance` (dB) by ENOUGH_DB, so that it costs 0.05 dB of the
    tolerance; otherwise in float32.
    """
    most = max(LEAST_VALUES, VALUES // outputs)
    whole = reference.size <= most
    kept = reference.astype(np.float32)
    if not whole:
        kept = kept.ravel()[_value_places(reference.size, most)]
    with np.errstate(over="ignore"):
        half = kept.astype(np.float16)
    finite = bool(np.isfinite(half).all()) and bool(np.isfinite(kept).all())
    enough = finite and compare_tensors(kept, half.astype(np.float32))["sqnr_db"] >= tolerance + ENOUGH_DB
    return {"whole" if whole else "some": half if enough else kept}


def compare_stored(stored: Mapping[str, np.ndarray], candidate: np.ndarray) -> tuple[TensorDifference, float]:
    """Compares a tensor with the reference kept by `store`.

    Returns:
        the figures, over the kept values, and by how many dB sqnr_db may be too low: 0, or SAMPLE_DB where some are kept.

    Raises:
        UserError: a value that is not finite, other shapes.
    """
    if "whole" in stored:
        return compare_tensors(stored["whole"].astype(np.float32).reshape(candidate.shape), candidate), 0.0
    if not np.isfinite(candidate).all():
        raise NotFiniteError("compare: found NaN or infinite values, expected finite tensors")
    kept = stored["some"]
    values = candidate.ravel()[_value_places(candidate.size, kept.size)]
    return compare_tensors(kept.astype(np.float32), values.astype(np.float32)), SAMPLE_DB


def write_summary(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed .npz whose bytes depend only on the arrays (and on the zlib that compresses them)."""
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
    """verification.npz: the stored arrays of one export, read on demand."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], flow: Any) -> None:
        """Opens it. flow: that of the manifest's `pipeline` section.

        Raises:
            UserError: the export wrote no such file, or it is missing or was changed.
        """
        self.flow = flow
        self.parts: Mapping[str, Any] = manifest["parts"]
        self.about: Mapping[str, Any] = manifest["verification"]
        if "file" not in self.about:
            raise UserError(f"{folder}: found no reference outputs, expected {FILE}; export again")
        path = folder / self.about["file"]
        if not path.is_file():
            raise UserError(f"{path}: no such file, expected the one from the export; copy it with the parts")
        if (found := sha256(path)) != self.about["sha256"]:
            raise UserError(
                f"{path}: found sha256 {found[:12]}…, expected {self.about['sha256'][:12]}… as in the manifest: the file "
                "changed after its export; export again"
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
        """The part's inputs.

        Raises:
            UserError: the generated frame differs from the export's.
        """
        specs = self.parts[part]["inputs"]
        names = list(specs)
        own = self.flow.plan.parts[part]
        if frame == 0 and self.flow.plan.is_raw(own):
            tensors = made_feeds(self.flow, self.about["seed"], self.about["batch"])
            arrays = {name: tensors[own.inputs[name]] for name in names}
            if digest(tensors) != self.about["made_sha256"]:
                raise UserError(
                    f"{self._path}: the generated frame of seed {self.about['seed']} differs from the one at the "
                    "export; numpy's PCG64 or its float32 arithmetic differs: please report it"
                )
            return arrays
        packed = self._group(f"{frame}/{part}/in/")
        result = {}
        for name in names:
            stored = {k.removeprefix(f"{name}/"): value for k, value in packed.items() if k.startswith(f"{name}/")}
            varying = stored.pop("shape", None)  # for a tensor with an axis that varies from frame to frame
            said = [self.about["batch"] if n == "batch" else n for n in specs[name]["shape"]]
            shape = said if varying is None else [int(n) for n in varying]
            result[name] = unpack(stored, shape, self.flow.image)
        return result

    def reference(self, part: str, frame: int, output: str) -> dict[str, np.ndarray]:
        """The stored part of PyTorch's output, for `compare_stored`."""
        return self._group(f"{frame}/{part}/out/{output}/")

    def unquantized(self, part: str, frame: int, output: str) -> dict[str, np.ndarray]:
        """The same for the float module's output; empty for a graph that does not round."""
        return self._group(f"{frame}/{part}/float/{output}/")

    def sites(self, part: str) -> dict[str, Site]:
        """The reference of an INT8 part's sites.

        Raises:
            UserError: the stored data do not fit the manifest.
        """
        about = self.parts[part]["sites"]
        names = [entry["tensor"] for entry in about["pairs"]] + list(about["outputs"])
        packed = self._group(f"sites/{part}/")
        found = {}
        for index, name in enumerate(names):
            own = {key.removeprefix(f"{index}/"): value for key, value in packed.items() if key.startswith(f"{index}/")}
            try:
                found[name] = Site.unpack(name, own)
            except KeyError as error:
                raise UserError(f"{self._path}: {part}: {name}: {error} is missing: damaged; export again") from None
        return found

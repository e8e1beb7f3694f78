"""KITTI's average precision on the CPU: AP11 and AP40 of image boxes (2D), boxes from above (BEV), 3D boxes and orientation (AOS).

The protocol is Geiger et al., "Are we ready for Autonomous Driving?", CVPR 2012, with the 40 recall points of Simonelli et al.,
"Disentangling Monocular 3D Object Detection", ICCV 2019. Keys, thresholds and roundings are those of mmdet3d 1.4 (kitti_eval),
which needs numba.cuda for it. One difference: a box that equals its object to the last bit overlaps it by 1 here, while mmdet3d's
CUDA kernel may find 0 or 1/3 (corners that meet are lost); no detector gives such a box.

An anno is a frame's boxes in the form of KITTI's label files, in the camera's frame: name str[N], truncated, occluded, alpha,
rotation_y float[N], bbox float[N,4] (left, top, right, bottom in pixels), location float[N,3] (x, y, z of the bottom's middle),
dimensions float[N,3] (length, height, width), and score float[N] of detections. `kitti_annos` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qat.boxes.overlap import box_iou_rotated, common_areas
from qat.core.errors import UserError

Anno = Mapping[str, np.ndarray]

CLASSES = ("Car", "Pedestrian", "Cyclist")
DIFFICULTIES = ("easy", "moderate", "hard")
# An object is of a difficulty if its image box is higher, and it is occluded and truncated at most so.
ABOVE_HEIGHT = (40, 25, 25)  # pixels
MOST_OCCLUDED = (0, 1, 2)
MOST_TRUNCATED = (0.15, 0.3, 0.5)
NEIGHBOURS = {"car": "van", "pedestrian": "person_sitting"}  # finding one of these is neither right nor wrong
DONT_CARE = "DontCare"
NO_ALPHA = -10  # of annos that say nothing of orientation

TYPES = {"3d": "3D", "bev": "BEV", "bbox": "2D"}  # a type of evaluation, and its name in a key
ORDER = ("bbox", "bev", "3d", "aos")  # of the text's lines
STRICTNESS = ("strict", "loose")
# Overlap that a true positive has more than: by class, of a type's strict and loose evaluation.
LEAST = {
    "Car": {"bbox": (0.7, 0.7), "bev": (0.7, 0.5), "3d": (0.7, 0.5)},
    "Pedestrian": {"bbox": (0.5, 0.5), "bev": (0.5, 0.25), "3d": (0.5, 0.25)},
    "Cyclist": {"bbox": (0.5, 0.5), "bev": (0.5, 0.25), "3d": (0.5, 0.25)},
}
POINTS = 41  # recalls 0, 1/40, …, 1 at which precision is read


def image_overlaps(found: np.ndarray, other: np.ndarray, of_found: bool = False) -> np.ndarray:
    """Intersection over union of image boxes [D,4] and [G,4], [D,G]; `of_found`: over the area of `found` alone. Of found's dtype."""
    a, b = found.astype(np.float64)[:, None], other.astype(np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = sides.clip(0).prod(-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b))
    whole = area_a + 0 * area_b if of_found else area_a + area_b - common
    return np.divide(common, whole, out=np.zeros_like(common), where=common > 0).astype(found.dtype)


def bev_overlaps(found: Anno, truth: Anno) -> np.ndarray:
    """Intersection over union seen from above of two annos' boxes, float32[D,G]."""
    return box_iou_rotated(_from_above(found), _from_above(truth)).astype(np.float32)


def box_overlaps(found: Anno, truth: Anno) -> np.ndarray:
    """Intersection over union of two annos' 3D boxes, float32[D,G]."""
    common = common_areas(_from_above(found), _from_above(truth))
    bottoms, tops = [], []
    for anno, axis in ((found, 1), (truth, 0)):  # y points down: the top is at y − height
        y, height = anno["location"][:, 1].astype(np.float64), anno["dimensions"][:, 1].astype(np.float64)
        bottoms.append(np.expand_dims(y, axis))
        tops.append(np.expand_dims(y - height, axis))
    common = common * (np.minimum(*bottoms) - np.maximum(*tops)).clip(0)
    volumes = [anno["dimensions"].astype(np.float64).prod(-1) for anno in (found, truth)]
    whole = volumes[0][:, None] + volumes[1][None] - common
    return np.divide(common, whole, out=np.zeros_like(common), where=common > 0).astype(np.float32)


def _from_above(anno: Anno) -> np.ndarray:
    """x, z, length, width, and the angle from x to z, float64[N,5]: rotation_y turns x away from z."""
    columns = anno["location"][:, [0, 2]], anno["dimensions"][:, [0, 2]], -anno["rotation_y"][:, None]
    return np.concatenate(columns, 1, dtype=np.float64)


def overlaps_of(kind: str, found: Anno, truth: Anno) -> np.ndarray:
    if not len(found["name"]) or not len(truth["name"]):
        return np.zeros((len(found["name"]), len(truth["name"])))
    if kind == "bbox":
        return image_overlaps(found["bbox"], truth["bbox"])
    return (bev_overlaps if kind == "bev" else box_overlaps)(found, truth)


def truth_states(anno: Anno, name: str, difficulty: int) -> np.ndarray:
    """States (`_kitti_kernel`) of a frame's objects for the evaluation of one class at one difficulty, int64[N]."""
    names = np.char.lower(np.asarray(anno["name"], str))
    height = anno["bbox"][:, 3] - anno["bbox"][:, 1]
    hard = (
        (anno["occluded"] > MOST_OCCLUDED[difficulty])
        | (anno["truncated"] > MOST_TRUNCATED[difficulty])
        | (height <= ABOVE_HEIGHT[difficulty])
    )
    own, near = names == name.lower(), names == NEIGHBOURS.get(name.lower(), "")
    return np.select([own & ~hard, own | near], [0, 1], -1)


def detection_states(anno: Anno, name: str, difficulty: int) -> np.ndarray:
    """States of a frame's detections. One too small for the difficulty is ignored whatever its class, as in KITTI's own code."""
    height = np.abs(anno["bbox"][:, 3] - anno["bbox"][:, 1])
    own = np.char.lower(np.asarray(anno["name"], str)) == name.lower()
    return np.select([height < ABOVE_HEIGHT[difficulty], own], [1, 0], -1)


def score_thresholds(scores: np.ndarray, objects: int) -> np.ndarray:
    """The scores of true positives at which recall comes nearest to 0, 1/40, 2/40, … of `objects`, highest first."""
    kept, recall = [], 0.0
    ordered = np.sort(scores)[::-1]
    for i, score in enumerate(ordered):
        last = i == len(ordered) - 1
        here = (i + 1) / objects
        after = here if last else (i + 2) / objects
        if after - recall < recall - here and not last:
            continue
        kept.append(score)
        recall += 1 / (POINTS - 1.0)
    return np.array(kept)


def _starts(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(array.ravel() for array in arrays)]).astype(dtype)


class _Frames:
    """Both sides' annos of all frames, one behind another, as the kernels take them."""

    def __init__(self, truth: Sequence[Anno], found: Sequence[Anno]) -> None:
        self.truth, self.found = truth, found
        self.objects = _starts([len(anno["name"]) for anno in truth])
        self.detections = _starts([len(anno["name"]) for anno in found])
        self.areas = _starts((np.diff(self.objects) * np.diff(self.detections)).tolist())
        self.scores = _joined([anno["score"] for anno in found], np.float64)
        self.turns = _joined([anno["alpha"] for anno in truth], np.float64)
        self.headings = _joined([anno["alpha"] for anno in found], np.float64)
        self.covered = _joined([self._covered(*annos) for annos in zip(truth, found, strict=True)], np.float64)

    @staticmethod
    def _covered(truth: Anno, found: Anno) -> np.ndarray:
        regions = truth["bbox"][np.asarray(truth["name"], str) == DONT_CARE]
        if not len(regions):
            return np.zeros(len(found["name"]))
        return image_overlaps(found["bbox"], regions, of_found=True).max(1)

    def curves(self, kind: str, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Precision and orientation similarity at each recall, float64[classes,difficulties,strict and loose,POINTS]."""
        from qat.families.mmdet3d.metrics._kitti_kernel import count, true_scores

        overlaps = _joined(
            [overlaps_of(kind, *annos) for annos in zip(self.found, self.truth, strict=True)], np.float64
        )
        covered = self.covered if kind == "bbox" else np.zeros_like(self.covered)  # DontCare regions have no 3D boxes
        precision, similarity = np.zeros((2, len(names), len(DIFFICULTIES), len(STRICTNESS), POINTS))
        for c, name in enumerate(names):
            for k in range(len(DIFFICULTIES)):
                truth = _joined([truth_states(anno, name, k) for anno in self.truth], np.int64)
                found = _joined([detection_states(anno, name, k) for anno in self.found], np.int64)
                boxes = overlaps, self.areas, truth, self.objects, found, self.detections, self.scores
                for j, least in enumerate(LEAST[name][kind]):
                    at = score_thresholds(true_scores(*boxes, least), int((truth == 0).sum()))
                    right, wrong, alike = count(*boxes, covered, self.turns, self.headings, least, at).T
                    with np.errstate(invalid="ignore"):  # nothing at all at a threshold: NaN, as mmdet3d has it
                        for curve, part in ((precision, right), (similarity, alike)):
                            best = np.maximum.accumulate((part / (right + wrong))[::-1])[
                                ::-1
                            ]  # at this recall or a higher one
                            curve[c, k, j, : len(at)] = best
        return precision, similarity


@dataclass(frozen=True)
class AveragePrecision:
    """In percent: ap11 and ap40 float64[classes,3,2], by difficulty and by `STRICTNESS`."""

    ap11: np.ndarray
    ap40: np.ndarray

    @staticmethod
    def of(curves: np.ndarray) -> AveragePrecision:
        """From values at each recall: every fourth of them, and all but recall 0."""
        return AveragePrecision(curves[..., ::4].sum(-1) / 11 * 100, curves[..., 1:].sum(-1) / 40 * 100)


def average_precision(
    truth: Sequence[Anno], found: Sequence[Anno], classes: Sequence[str], types: Sequence[str] = tuple(TYPES)
) -> dict[str, AveragePrecision]:
    """AP of each of `types`, and of "aos" where "bbox" is among them and both sides have orientations.

    Args:
        truth, found: an anno for each frame, in the same order.
        classes: of `CLASSES`, in the order of the results.
        types: of `TYPES`.

    Raises:
        UserError: no frames or not as many on both sides; classes or types that there are not; an anno without one of its arrays,
            of another length, or with NaN or infinity in a detection.
    """
    _check(truth, found, classes, types)
    frames = _Frames(truth, found)
    result = {}
    for kind in types:
        precision, similarity = frames.curves(kind, classes)
        result[kind] = AveragePrecision.of(precision)
        if kind == "bbox" and _with_orientation(truth, found):
            result["aos"] = AveragePrecision.of(similarity)
    return result


def _with_orientation(truth: Sequence[Anno], found: Sequence[Anno]) -> bool:
    given = any((anno["alpha"] != NO_ALPHA).any() for anno in found)
    return given and any(len(anno["alpha"]) and anno["alpha"][0] != NO_ALPHA for anno in truth)


def _check(truth: Sequence[Anno], found: Sequence[Anno], classes: Sequence[str], types: Sequence[str]) -> None:
    if not truth or len(truth) != len(found):
        raise UserError(
            f"KITTI AP: found {len(found)} frames of detections for {len(truth)} of ground truth, expected one for each; give an "
            "empty anno for a frame without detections"
        )
    for what, given, known in (("classes", classes, CLASSES), ("types", types, tuple(TYPES))):
        if not given or not set(given) <= set(known):
            raise UserError(
                f"KITTI AP: {what}: found {', '.join(map(str, given)) or 'none'}, expected some of {', '.join(known)}, for which "
                "alone KITTI has thresholds"
            )
    shapes: dict[str, tuple[int, ...]] = {"truncated": (), "occluded": (), "alpha": (), "bbox": (4,)}
    shapes |= {"location": (3,), "dimensions": (3,), "rotation_y": ()}
    for side, annos, own in (
        ("ground truth", truth, shapes),
        ("detections", found, {k: v for k, v in shapes.items() if k not in ("truncated", "occluded")} | {"score": ()}),
    ):
        for i, anno in enumerate(annos):
            where = f"KITTI AP: {side} of frame {i}"
            if missing := [key for key in ("name", *own) if key not in anno]:
                raise UserError(f"{where}: found no {', '.join(missing)}; expected the arrays of KITTI's label files")
            for key, shape in own.items():
                value = np.asarray(anno[key])
                if value.shape != (len(anno["name"]), *shape):
                    expected = [len(anno["name"]), *shape]
                    raise UserError(
                        f"{where}: {key}: found shape {list(value.shape)}, expected {expected}: one for each name"
                    )
                if side == "detections" and not np.isfinite(value).all():
                    raise UserError(
                        f"{where}: {key}: found NaN or infinity, expected finite numbers; look at the detector's outputs"
                    )


def kitti_eval(
    gt_annos: Sequence[Anno],
    dt_annos: Sequence[Anno],
    current_classes: Sequence[str] | str,
    eval_types: Sequence[str] = tuple(TYPES),
) -> tuple[str, dict[str, float]]:
    """mmdet3d's `kitti_eval`: its table as text, and its values by its keys (`KITTI/Car_3D_AP40_moderate_strict`, percent).

    Of several classes there is a mean, of the strict evaluation. AOS is in the text alone, as there; `average_precision` returns it.

    Args and errors: as `average_precision`.
    """
    classes = [current_classes] if isinstance(current_classes, str) else list(current_classes)
    found = average_precision(gt_annos, dt_annos, classes, eval_types)
    text, values = "", {}
    for points in ("AP11", "AP40"):
        text += f"\n----------- {points} Results ------------\n\n"
        tables = {kind: getattr(found[kind], points.lower()) for kind in ORDER if kind in found}
        for c, name in enumerate(classes):
            for j, strictness in enumerate(STRICTNESS):
                least = [LEAST[name][kind][j] for kind in ORDER[:3]]
                text += f"{name} {points}@{least[0]:.2f}, {least[1]:.2f}, {least[2]:.2f}:\n"
                text += "".join(_line(kind, points, table[c, :, j]) for kind, table in tables.items())
                for k, difficulty in enumerate(DIFFICULTIES):
                    for kind, key in TYPES.items():
                        if kind in tables:
                            values[f"KITTI/{name}_{key}_{points}_{difficulty}_{strictness}"] = float(
                                tables[kind][c, k, j]
                            )
        if len(classes) > 1:
            text += f"\nOverall {points}@{', '.join(DIFFICULTIES)}:\n"
            means = {kind: table.mean(0)[:, 0] for kind, table in tables.items()}
            text += "".join(_line(kind, points, mean) for kind, mean in means.items())
            for k, difficulty in enumerate(DIFFICULTIES):
                for kind, key in TYPES.items():
                    if kind in means:
                        values[f"KITTI/Overall_{key}_{points}_{difficulty}"] = float(means[kind][k])
    return text, values


def _line(kind: str, points: str, row: Any) -> str:
    digits = 2 if kind == "aos" else 4
    return f"{kind:<4} {points}:" + ", ".join(f"{value:.{digits}f}" for value in row) + "\n"

"""The interval of a difference in mAP or NDS: a paired bootstrap over scenes.

Keyframes of one scene show the same objects, so scenes are drawn, not keyframes (Koehn, "Statistical Significance Tests
for Machine Translation Evaluation", EMNLP 2004, has the paired bootstrap). A resample's metrics are the devkit's: which
box matches which object is settled within a keyframe, so it is settled once, and a resample only orders and counts again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nuscenes.eval.common.utils import attr_acc, center_distance, cummean, scale_iou, velocity_l2, yaw_diff
from nuscenes.eval.detection.constants import TP_METRICS

from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.evaluate.detection import SampleEval, sample_eval

RECALLS = np.linspace(0, 1, 101)
# Errors that are undefined for a class, as in the devkit's DetectionEval.evaluate.
WITHOUT = {"traffic_cone": ("attr_err", "vel_err", "orient_err"), "barrier": ("attr_err", "vel_err")}
METRICS = ("map", "nds")
MIN_SCENES = 2  # with one scene every draw is that scene, so the bounds would claim certainty


@dataclass(frozen=True)
class Interval:
    """A difference to the reference, and the bounds between which `confidence` of its resamples lie."""

    difference: float
    low: float
    high: float
    confidence: float = 0.95

    def to_json(self) -> dict[str, float]:
        """Rounded to a millionth."""
        return {key: round(getattr(self, key), 6) for key in ("difference", "low", "high", "confidence")}


@dataclass
class ClassMatches:
    """One class's predictions, best score first.

    scene: int[n], index of the scene. score: float[n]. hit: bool[distances, n], whether it matches an object within
    each distance. errors: {TP metric: float[n]} at the distance that the devkit takes for them, NaN where there is no
    match (and where the devkit returns NaN). objects: int[scenes], the annotated ones.
    """

    scene: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    errors: dict[str, np.ndarray]
    objects: np.ndarray


@dataclass
class Matches:
    """Everything that mAP and NDS of any draw of the scenes depend on."""

    classes: dict[str, ClassMatches]
    scenes: int
    tp_distance: int
    min_recall: float
    min_precision: float
    map_weight: int


def _hits(predicted: np.ndarray, objects: np.ndarray, distances: Sequence[float]) -> np.ndarray:
    """Index of the object that each prediction matches at each distance, −1 for none: int[distances, n].

    predicted: float[n,2], best score first; each takes the nearest object that is left, if that is near enough
    (nuscenes.eval.detection.algo.accumulate).
    """
    taken = np.full((len(distances), len(predicted)), -1)
    if not len(objects) or not len(predicted):
        return taken
    between = np.linalg.norm(predicted[:, None] - objects[None], axis=-1)
    for d, limit in enumerate(distances):
        left = between.copy()
        for n in np.flatnonzero(between.min(1) < limit):
            nearest = int(left[n].argmin())
            if left[n, nearest] < limit:
                taken[d, n] = nearest
                left[:, nearest] = np.inf
    return taken


def _errors(name: str, truth: Any, found: Any) -> dict[str, float]:
    period = np.pi if name == "barrier" else 2 * np.pi
    return {
        "trans_err": center_distance(truth, found),
        "vel_err": velocity_l2(truth, found),
        "scale_err": 1 - scale_iou(truth, found),
        "orient_err": yaw_diff(truth, found, period=period),
        "attr_err": 1 - attr_acc(truth, found),
    }


def _as_the_devkit_sorts(scores: Sequence[float]) -> list[int]:
    """Indices of the scores, best first; for equal scores the last first."""
    return [i for _, i in sorted(((score, i) for i, score in enumerate(scores)), reverse=True)]


def match(evaluation: SampleEval, scene_of: Mapping[str, int]) -> Matches:
    """Matches predictions with objects, for every class and distance.

    Args:
        evaluation: the devkit's, with its boxes loaded and filtered.
        scene_of: index of each sample token's scene, from 0.
    """
    config = evaluation.cfg
    scenes = max(scene_of.values()) + 1
    distances = list(config.dist_ths)
    tp_distance = distances.index(config.dist_th_tp)
    classes = {}
    for name in config.class_names:
        scores: list[float] = []
        rows: list[tuple[int, np.ndarray, dict[str, float]]] = []  # scene, hit at each distance, errors
        objects = np.zeros(scenes, dtype=np.int64)
        for token in evaluation.sample_tokens:
            truth = [box for box in evaluation.gt_boxes[token] if box.detection_name == name]
            found = [box for box in evaluation.pred_boxes[token] if box.detection_name == name]
            objects[scene_of[token]] += len(truth)
            best = _as_the_devkit_sorts([box.detection_score for box in found])
            places = [np.array([box.translation[:2] for box in boxes]).reshape(-1, 2) for boxes in (found, truth)]
            taken = np.empty((len(distances), len(found)), dtype=np.int64)
            taken[:, best] = _hits(places[0][best], places[1], distances)
            scores += [box.detection_score for box in found]
            for box, own in zip(found, taken.T, strict=True):
                which = own[tp_distance]
                rows.append((scene_of[token], own >= 0, _errors(name, truth[which], box) if which >= 0 else {}))
        by_score = _as_the_devkit_sorts(scores)
        classes[name] = ClassMatches(
            scene=np.array([rows[i][0] for i in by_score], dtype=np.int64),
            score=np.array([scores[i] for i in by_score]),
            hit=np.array([rows[i][1] for i in by_score], dtype=bool).reshape(-1, len(distances)).T.copy(),
            errors={key: np.array([rows[i][2].get(key, np.nan) for i in by_score]) for key in TP_METRICS},
            objects=objects,
        )
    return Matches(classes, scenes, tp_distance, config.min_recall, config.min_precision, config.mean_ap_weight)


def _class_metrics(own: ClassMatches, times: np.ndarray, matches: Matches, skip: Sequence[str]) -> tuple[float, dict]:
    """AP over the distances, and the TP errors, of one class with each scene taken `times` times."""
    first = round(100 * matches.min_recall) + 1
    objects = int(own.objects @ times)
    drawn = np.repeat(np.arange(len(own.scene)), times[own.scene])
    precisions = []
    errors = {key: np.nan if key in skip else 1.0 for key in TP_METRICS}
    for d, hits in enumerate(own.hit):
        hit = hits[drawn]
        if objects == 0 or not hit.any():
            precisions.append(0.0)
            continue
        right = np.cumsum(hit).astype(float)
        recall = right / objects
        precision = np.interp(RECALLS, recall, right / np.arange(1, len(hit) + 1), right=0)
        clipped = np.maximum(precision[first:] - matches.min_precision, 0)
        precisions.append(float(clipped.mean()) / (1 - matches.min_precision))
        if d == matches.tp_distance:
            score = np.interp(RECALLS, recall, own.score[drawn], right=0)
            reached = np.flatnonzero(score)
            last = int(reached[-1]) if len(reached) else 0
            matched = drawn[hit]
            for key in errors:
                if key not in skip and last >= first:
                    mean = cummean(own.errors[key][matched])
                    along = np.interp(score[::-1], own.score[matched][::-1], mean[::-1])[::-1]
                    errors[key] = float(along[first : last + 1].mean())
    return float(np.mean(precisions)), errors


def metrics_of(matches: Matches, times: np.ndarray) -> tuple[float, float]:
    """mAP and NDS with each scene taken times[scene] times, like the devkit's for a data set with these copies."""
    results = [_class_metrics(own, times, matches, WITHOUT.get(name, ())) for name, own in matches.classes.items()]
    mean_ap = float(np.mean([ap for ap, _ in results]))
    scores = [1 - min(1.0, float(np.nanmean([errors[key] for _, errors in results]))) for key in TP_METRICS]
    return mean_ap, (matches.map_weight * mean_ap + sum(scores)) / (matches.map_weight + len(scores))


def resample(
    dataset: Any,
    detectors: Mapping[str, Mapping[str, Detections]],
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, np.ndarray]:
    """mAP and NDS of each detector on the whole set, then on each draw, with replacement, of as many scenes as there
    are; the same draws for all: {detector: float[1 + resamples, 2]}.

    Args:
        dataset: a `qat.data.NuScenesDataset`.
        detectors: each one's boxes by sample token, over the same samples.
        progress: called with the number of detectors done.

    Raises:
        ValueError: a detector's samples differ from the first's. UserError: fewer than two scenes, or no resamples.
    """
    if resamples < 1:
        raise UserError(f"--resamples: found {resamples}, expected at least 1")
    tokens = list(next(iter(detectors.values())))
    scenes: dict[str, int] = {}
    scene_of = {t: scenes.setdefault(dataset.nusc.get("sample", t)["scene_token"], len(scenes)) for t in tokens}
    if len(scenes) < MIN_SCENES:
        raise UserError(
            f"found {len(scenes)} scene, expected at least {MIN_SCENES} to resample; take more of the data set"
        )
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(scenes), np.full(len(scenes), 1 / len(scenes)), size=resamples)
    draws = np.concatenate([np.ones((1, len(scenes)), dtype=draws.dtype), draws])
    result = {}
    for n, (name, detections) in enumerate(detectors.items()):
        if set(detections) != set(tokens):
            raise ValueError(f"{name}: other samples than the first detector's")
        matches = match(sample_eval(dataset, {token: detections[token] for token in tokens}), scene_of)
        result[name] = np.array([metrics_of(matches, times) for times in draws])
        progress(n + 1)
    return result


def difference(candidate: np.ndarray, reference: np.ndarray, confidence: float = 0.95) -> dict[str, Interval]:
    """Intervals of mAP and NDS of one detector of `resample` minus another's: percentiles of the differences."""
    tail = 100 * (1 - confidence) / 2
    change = candidate - reference
    low, high = np.percentile(change[1:], [tail, 100 - tail], axis=0)
    return {
        name: Interval(float(change[0, k]), float(low[k]), float(high[k]), confidence) for k, name in enumerate(METRICS)
    }


def paired_bootstrap(
    dataset: Any,
    reference: Mapping[str, Detections],
    candidates: Mapping[str, Mapping[str, Detections]],
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, Interval]]:
    """{candidate: {"map": interval, "nds": interval}} of each candidate's metrics minus the reference's.

    Arguments and errors as in `resample`; `progress` counts the reference too.
    """
    tables = resample(dataset, {"": reference, **candidates}, resamples, seed, progress)
    return {name: difference(tables[name], tables[""], confidence) for name in candidates}

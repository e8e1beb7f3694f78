"""Scores detections of a model config's test set with mmdet3d's keys and values: KITTI AP on the CPU, nuScenes metrics by the devkit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.core.console import note
from qat.core.errors import UserError
from qat.data.dataset import open_nuscenes
from qat.deploy.mmdeploy.frames import TestFrames
from qat.deploy.mmdeploy.results import FIELD, write_annos, write_kitti_labels, write_submission
from qat.evaluate.detection import global_boxes, sample_eval
from qat.families.mmdet3d.metrics.kitti import CLASSES, TYPES
from qat.families.mmdet3d.metrics.kitti_annos import CAMERA, LIMITS, detection_anno, kitti_metric

# Of nuScenes' errors, mmdet3d's names of their means.
ERRORS = {
    "trans_err": "mATE",
    "scale_err": "mASE",
    "orient_err": "mAOE",
    "vel_err": "mAVE",
    "attr_err": "mAAE",
}


class Scorer(ABC):
    """The metric of a data set.

    names: what --metrics takes. options: what --metric-options takes, and the config's test_evaluator besides.
    """

    names: tuple[str, ...] = ("bbox",)
    options: tuple[str, ...] = ()

    def __init__(self, frames: TestFrames, metrics: Sequence[str], options: Mapping[str, Any]) -> None:
        self.frames, self.metrics, self._options = frames, list(metrics), dict(options)

    @property
    def formats(self) -> bool:
        """Whether the options name where results in the data set's form go."""
        return any(self._options.get(key) for key in self.options if key.endswith("_prefix"))

    @abstractmethod
    def write(self, found: Sequence[Detections], default: Path) -> list[Path]:
        """Writes the detections in the data set's form where the options say, or below `default`; returns what was written."""

    @abstractmethod
    def score(self, found: Sequence[Detections]) -> tuple[str, dict[str, float]]:
        """A table as text, and values by mmdet3d's keys.

        Raises:
            UserError: the annotations are not there.
        """


class KittiScorer(Scorer):
    """KITTI's, as KittiMetric has it. img_bbox: of image boxes alone."""

    names = ("bbox", "img_bbox", "mAP")
    options = ("pcd_limit_range", "default_cam_key", "pklfile_prefix", "submission_prefix")

    def __init__(self, frames: TestFrames, metrics: Sequence[str], options: Mapping[str, Any]) -> None:
        super().__init__(frames, metrics, options)
        limits = self._options.get("pcd_limit_range") or LIMITS
        self.limits = list(limits) if isinstance(limits, list | tuple) else []
        if len(self.limits) != 6 or not all(isinstance(value, int | float) for value in self.limits):
            raise UserError(f"pcd_limit_range: found {limits!r}, expected six numbers: lowest and highest x, y, z")
        self.camera = str(self._options.get("default_cam_key") or CAMERA)
        if others := [name for name in frames.classes if name not in CLASSES]:
            raise UserError(
                f"{frames.source}: metainfo.classes: found {', '.join(others)}, expected some of {', '.join(CLASSES)}, which KITTI scores"
            )

    def write(self, found: Sequence[Detections], default: Path) -> list[Path]:
        annos = [
            detection_anno(own, record, self.frames.classes, self.camera, self.limits)
            for own, record in zip(found, self.frames.records, strict=True)
        ]
        written = []
        pickled, folder = self._options.get("pklfile_prefix"), self._options.get("submission_prefix")
        if pickled:
            written.append(Path(pickled) / f"{FIELD}.pkl")
            for record, anno in zip(self.frames.records, annos, strict=True):
                anno["sample_idx"] = np.full(len(anno["score"]), record.get("sample_idx", -1))
            write_annos(written[-1], annos)
        if folder or not pickled:
            written.append(Path(folder or default) / FIELD)
            write_kitti_labels(written[-1], self.frames.names, annos)
        return written

    def score(self, found: Sequence[Detections]) -> tuple[str, dict[str, float]]:
        texts, values = [], {}
        # bbox and mAP are the same to KittiMetric.
        for types in dict.fromkeys(("bbox",) if name == "img_bbox" else tuple(TYPES) for name in self.metrics):
            text, own = kitti_metric(self.frames.infos, found, self.frames.classes, types, self.camera, self.limits)
            texts.append(text)
            values.update(own)
        return "".join(texts), values


class NuScenesScorer(Scorer):
    """nuScenes', as NuScenesMetric has it, over the frames that are tested, by the tables beside them."""

    options = ("jsonfile_prefix",)

    def __init__(self, frames: TestFrames, metrics: Sequence[str], options: Mapping[str, Any]) -> None:
        super().__init__(frames, metrics, options)
        version = dict(frames.infos.get("metainfo") or {}).get("version")
        nusc = open_nuscenes(frames.root, None if version is None else str(version))
        if lost := [name for name, record in zip(frames.names, frames.records, strict=True) if "token" not in record]:
            raise UserError(f"{frames.file}: frame {lost[0]}: found no token, expected that of a nuScenes sample")
        self.tokens = [str(record["token"]) for record in frames.records]
        known = {record["token"] for record in nusc.sample}
        if unknown := [token for token in self.tokens if token not in known]:
            raise UserError(
                f"{frames.file}: found the token {unknown[0]!r}, expected one of {frames.root / nusc.version}; take the infos of these tables"
            )
        self._dataset = SimpleNamespace(nusc=nusc, classes=frames.classes)

    def _by_token(self, found: Sequence[Detections]) -> dict[str, Detections]:
        return dict(zip(self.tokens, found, strict=True))

    def write(self, found: Sequence[Detections], default: Path) -> list[Path]:
        path = Path(self._options.get("jsonfile_prefix") or default) / FIELD / "results_nusc.json"
        write_submission(path, global_boxes(self._dataset, self._by_token(found)).boxes)
        return [path]

    def score(self, found: Sequence[Detections]) -> tuple[str, dict[str, float]]:
        metrics = sample_eval(self._dataset, self._by_token(found)).evaluate()[0].serialize()
        prefix = f"{FIELD}_NuScenes"
        values = {}
        for name in self.frames.classes:
            for distance, ap in metrics["label_aps"][name].items():
                values[f"{prefix}/{name}_AP_dist_{distance}"] = round(float(ap), 4)
            for error, value in metrics["label_tp_errors"][name].items():
                values[f"{prefix}/{name}_{error}"] = round(float(value), 4)
            for error, mean in ERRORS.items():  # behind the first class, where mmdet3d has them
                values[f"{prefix}/{mean}"] = round(float(metrics["tp_errors"][error]), 4)
        values[f"{prefix}/NDS"], values[f"{prefix}/mAP"] = float(metrics["nd_score"]), float(metrics["mean_ap"])
        lines = [f"{'class':<22}AP      ATE     ASE     AOE     AVE     AAE"]
        for name in self.frames.classes:
            errors = [metrics["label_tp_errors"][name][error] for error in ERRORS]
            row = [metrics["mean_dist_aps"][name], *errors]
            lines.append(f"{name:<22}" + "  ".join(f"{value:.4f}" if np.isfinite(value) else "–     " for value in row))
        lines.append(f"mAP {metrics['mean_ap']:.4f}, NDS {metrics['nd_score']:.4f}")
        return "\n".join(lines) + "\n", values


SCORERS: dict[str, type[Scorer]] = {
    "KittiMetric": KittiScorer,
    "NuScenesMetric": NuScenesScorer,
}
OF_DATA = {"KittiDataset": "KittiMetric", "NuScenesDataset": "NuScenesMetric"}  # of a config without test_evaluator


def scorer_of(
    frames: TestFrames, evaluator: Any, metrics: Sequence[str] | None, options: Mapping[str, Any]
) -> tuple[Scorer, bool]:
    """The metric of a config's test_evaluator, or else of its data set; and whether the config asks for files alone (format_only).

    Args:
        evaluator: a config's test_evaluator: a dict or a list of them; None where it has none.
        metrics: of --metrics; None for the config's. options: of --metric-options.

    Raises:
        UserError: no metric of ours; names or options that it does not have.
    """
    given = [] if evaluator is None else [evaluator] if isinstance(evaluator, Mapping) else list(evaluator)
    known = [one for one in given if _kind(one) in SCORERS]
    kind = _kind(known[0]) if known else OF_DATA.get(frames.kind) if not given else None
    if kind is None:
        found = ", ".join(map(_kind, given)) or f"none, and the data set {frames.kind or 'none'}"
        raise UserError(f"{frames.source}: test_evaluator: found {found}, expected {' or '.join(SCORERS)}")
    scorer, own = SCORERS[kind], dict(known[0]) if known else {}
    if unknown := [key for key in options if key not in scorer.options]:
        raise UserError(f"--metric-options: found {unknown[0]}, expected some of {', '.join(scorer.options)} of {kind}")
    default = own.get("metric") or scorer.names[0]
    chosen = list(metrics) if metrics else [default] if isinstance(default, str) else list(default)
    if unknown := [name for name in chosen if name not in scorer.names]:
        where = "--metrics" if metrics else f"{frames.source}: test_evaluator: metric"
        raise UserError(f"{where}: found {unknown[0]}, expected some of {', '.join(scorer.names)} of {kind}")
    for key, ours in (("ann_file", frames.file), ("data_root", frames.root)):
        if own.get(key) and Path(str(own[key])).resolve() != ours.resolve():
            note(f"test_evaluator: {key}: {own[key]} is not read: frames are scored by {ours}, of test_dataloader")
            break
    return scorer(frames, chosen, {**own, **options}), bool(own.get("format_only"))


def _kind(evaluator: Mapping[str, Any]) -> str:
    return str(evaluator.get("type", "")).split(".")[-1]

"""Boxes by mmdet3d's own post-processing, of outputs that anything computed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from qat.families.mmdet3d.tracing import runnable
from qat.families.mmdet3d.tree import Leaf, cloned, rebuild

CLOSE = 0.01  # metres, or radians
CLOSE_SCORE = 1e-3


def head_of(model: nn.Module) -> nn.Module | None:
    """The head whose forward gives what `mode="tensor"` returns."""
    return next(
        (getattr(model, name) for name in ("pts_bbox_head", "bbox_head") if getattr(model, name, None) is not None),
        None,
    )


class Boxes:
    """The boxes of one sample, by mmdet3d's own `mode="predict"`, for whatever gave the head's outputs.

    The network runs once; afterwards its features and the head's outputs stand in for it.
    """

    def __init__(self, model: nn.Module, sample: Any, reference: Sequence[Leaf], tree: Any) -> None:
        """tree: what `mode="tensor"` returned for the sample, in its nesting; reference: its leaves."""
        self._model: nn.Module | None = model
        self._sample, self._tree, self._paths = sample, tree, [leaf.path for leaf in reference]
        self._device = reference[0].value.device if reference else torch.device("cpu")
        self._features: Any = None
        self.expected: dict[str, np.ndarray] | None = None
        self.why = "the model predicts no 3D boxes"  # there is nothing to compare, where `expected` is None
        try:
            self.expected = self.of([leaf.value.cpu() for leaf in reference])
        except Exception as error:  # whatever post-processing raises that wants more than what mode="tensor" gives
            self._model = None
            self.why = f"mmdet3d's post-processing raised {type(error).__name__}: {str(error)[:160]}"

    def of(self, values: Sequence[Any]) -> dict[str, np.ndarray] | None:
        """{"boxes", "scores", "labels"} of outputs; None of a model that predicts no 3D boxes."""
        model: Any = self._model
        head: Any = None if model is None else head_of(model)
        if model is None or head is None:
            return None
        given = {
            path: torch.from_numpy(np.array(value)).to(self._device)
            for path, value in zip(self._paths, values, strict=True)
        }
        outputs = rebuild(self._tree, "outputs", given)
        extract = model.extract_feat

        def features(*args: Any, **more: Any) -> Any:
            if self._features is None:
                self._features = extract(*args, **more)
            return copy.copy(self._features)  # VoteNet's head adds to it

        head.forward, model.extract_feat = (lambda *_, **__: outputs), features
        try:
            with torch.no_grad(), runnable(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = model(cloned(self._sample.inputs), copy.deepcopy(self._sample.samples), mode="predict")[0]
        finally:
            del head.forward, model.extract_feat
        instances = getattr(found, "pred_instances_3d", None)
        if instances is None or "bboxes_3d" not in instances:
            return None
        return {
            "boxes": instances.bboxes_3d.tensor.cpu().numpy(),
            "scores": instances.scores_3d.cpu().numpy(),
            "labels": instances.labels_3d.cpu().numpy(),
        }

    def compared(self, values: Sequence[np.ndarray]) -> tuple[dict[str, Any] | None, str]:
        """(count and largest differences of a candidate's boxes beside PyTorch's, what is wrong or ""); None where the model
        gives no boxes, or its post-processing takes more than these tensors."""
        expected = self.expected
        if expected is None:
            return None, ""
        got = self.of(values)
        assert got is not None
        result: dict[str, Any] = {"count": len(expected["scores"]), "found": len(got["scores"])}
        if result["count"] != result["found"]:
            return result, f"boxes: found {result['found']}, expected PyTorch's {result['count']}"
        if result["count"] == 0:
            return result, ""
        order = np.array([_paired(got, expected, n) for n in range(result["count"])])
        if alone := int((order < 0).sum()):
            return result, f"boxes: found {alone} of {len(order)} without a partner within {CLOSE} m, expected none"
        result["max_box"] = float(np.abs(got["boxes"][order] - expected["boxes"]).max())
        result["max_score"] = float(np.abs(got["scores"][order] - expected["scores"]).max())
        return result, ""


def _paired(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], n: int) -> int:
    """The candidate's box that is PyTorch's nth; −1 where there is none."""
    far = np.abs(got["boxes"] - expected["boxes"][n]).max(1)
    fits = (
        (far < CLOSE)
        & (got["labels"] == expected["labels"][n])
        & (np.abs(got["scores"] - expected["scores"][n]) < CLOSE_SCORE)
    )
    places = np.flatnonzero(fits)
    return int(places[far[places].argmin()]) if len(places) else -1

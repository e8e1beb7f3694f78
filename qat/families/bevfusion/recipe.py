"""Default quantization of BEVFusion's networks, with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qat.families.bevfusion.config import is_camera_branch, needs_depth
from qat.families.family import Recipe
from qat.lean.flavours import FLAVOURS
from qat.lean.placement import FloatRule

TENSORRT = ("tensorrt", "tensorrt-strong")
KEEP_FLOAT = (
    FloatRule("encoders.camera.vtransform.dtransform.0", "its input is raw metres: a step would be half a metre"),
    FloatRule(
        "encoders.camera.vtransform.dtransform.*",
        "computed from the depth map alone: on a GPU a few per cent of the time, and s8 there costs mAP",
        TENSORRT,
    ),
)
# A BEV cell near the car sums the features of hundreds of pixels, a far one those of a few: the decoder's tensors have long
# tails. Methods that clip them (mse, entropy) raise the SQNR at the head maps, which empty far cells dominate, but lose the
# objects near the car: mAP falls. In the camera part mse does no harm. Tensors computed only from the depth map have long tails
# too: their large values are the near points.
BY_LAYER = (("decoder.*", "max"), ("head.*", "max"), ("camera.*_dtransform_*", "max"))
# CUDA-BEVFusion builds the view transform with --fp16 alone, so it has no QDQ by default.
PARTS_OFF = {"vtransform": tuple(FLAVOURS)}


def recipe_of(config: Mapping[str, Any]) -> Recipe:
    """The recipe of a detector of this config, without the patterns of parts that it lacks."""
    absent = []
    if is_camera_branch(config):
        absent += ["decoder.*", "head.*"]
    if not needs_depth(config):
        absent.append("camera.*_dtransform_*")
    by_layer = tuple(pair for pair in BY_LAYER if pair[0] not in absent)
    return Recipe(KEEP_FLOAT, PARTS_OFF, "CUDA-BEVFusion builds this part in FP16, without QDQ", "mse", by_layer)

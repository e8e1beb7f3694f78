"""Configs of AWML (tier4/AWML, projects/CenterPoint) without its packages: what its modules change is for training, but for one encoder."""

from __future__ import annotations

import functools
from typing import Any

from qat.core.errors import UserError

PREFIXES = ("projects.CenterPoint", "autoware_ml")  # of the modules that its configs import
RENAMED = {
    "CustomSeparateHead": "SeparateHead",
    "mmdet.AmpGaussianFocalLoss": "mmdet.GaussianFocalLoss",
    "CenterPointONNX": "CenterPoint",
    "CenterHeadONNX": "CenterHead",
    "SeparateHeadONNX": "SeparateHead",
    "PillarFeatureNetONNX": "PillarFeatureNet",
    "BackwardPillarFeatureNetONNX": "BackwardPillarFeatureNet",
}
# What its classes take besides mmdet3d's: layers that are not trained, and how its own ONNX classes write their files.
DROPPED = ("frozen_stages", "freeze_shared_conv", "freeze_task_heads", "point_channels", "device", "y_axis_reference")


def is_own(module: str) -> bool:
    """Whether a name of `custom_imports` is AWML's."""
    return module.split(".")[0] == "autoware_ml" or module.startswith(PREFIXES[0])


def translate(node: Any, source: str, path: str = "model") -> None:
    """Changes a model's description in place, so that mmdet3d builds it.

    Raises:
        UserError: boxes are decoded in another convention than mmdet3d's.
    """
    if isinstance(node, dict):
        if node.get("y_axis_reference"):
            raise UserError(
                f"{source}: {path}: y_axis_reference: found True, expected mmdet3d's boxes; set it to False"
            )
        for key in DROPPED:
            node.pop(key, None)
        kind = node.get("type")
        if isinstance(kind, str) and kind in RENAMED:
            node["type"] = RENAMED[kind]
            if kind == "mmdet.AmpGaussianFocalLoss":
                node["reduction"] = "mean"
        for key, value in node.items():
            translate(value, source, f"{path}: {key}")
    elif isinstance(node, list | tuple):
        for value in node:
            translate(value, source, path)


@functools.cache
def register() -> None:
    """`BackwardPillarFeatureNet` among mmdet3d's models: of the offset to the pillar's centre it takes x and y alone."""
    from mmdet3d.models.voxel_encoders.pillar_encoder import PillarFeatureNet
    from mmdet3d.registry import MODELS

    if "BackwardPillarFeatureNet" in MODELS:
        return

    class BackwardPillarFeatureNet(PillarFeatureNet):
        """As mmdet3d's `PillarFeatureNet` before it had the offset in z."""

        def __init__(self, in_channels: int = 4, with_voxel_center: bool = True, **kwargs: Any) -> None:
            super().__init__(in_channels=in_channels - with_voxel_center, with_voxel_center=with_voxel_center, **kwargs)
            self.in_channels = in_channels

        def forward(self, features: Any, num_points: Any, coors: Any, *args: Any, **kwargs: Any) -> Any:
            """As `PillarFeatureNet.forward`."""
            from qat.families.mmdet3d.tracing import pillar_features

            return pillar_features(self, features, num_points, coors, axes=2)

    MODELS.register_module(module=BackwardPillarFeatureNet)

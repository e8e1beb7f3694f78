"""The parts of a detector, with the tensor names and shapes that CUDA-BEVFusion's runtime loads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qat.families.bevfusion.networks.vtransform import split
from qat.families.family import Core, PartModule


class CameraBackbone(PartModule):
    """camera.backbone: images (and depth) → context and depth distribution of every feature pixel.

    Changed for tracing: samples and cameras are merged by a reshape that fixes all sizes but theirs (a flatten would leave
    shape arithmetic in the graph), and the context comes out channels-last, as the pooling kernels read it.
    """

    inputs: tuple[str, ...] = ("img", "depth")
    outputs = ("camera_feature", "camera_depth_weights")
    direct = whole = False

    def __init__(self, core: Core, bins: int, channels: int) -> None:
        super().__init__(core)
        self.bins, self.channels = bins, channels

    def forward(self, img: torch.Tensor, depth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """img [B,N,3,H,W], depth [B,N,1,H,W] → camera_feature [B·N,fH,fW,C], camera_depth_weights [B·N,D,fH,fW]."""
        return self._lift(img, depth)

    def _lift(self, img: torch.Tensor, depth: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        flat = None if depth is None else depth.reshape(-1, *map(int, depth.shape[2:]))
        logits = self.core(img.reshape(-1, *map(int, img.shape[2:])), flat)
        weights, context = split(logits, self.bins, self.channels)
        return context.permute(0, 2, 3, 1), weights


class CameraBackboneWithoutDepth(CameraBackbone):
    """camera.backbone of an LSSTransform, which uses no lidar: as above, without the `depth` input.

    Changed for tracing: a traced signature has no optional inputs, hence a separate class.
    """

    inputs = ("img",)

    def forward(self, img: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """img [B,N,3,H,W] → camera_feature [B·N,fH,fW,C], camera_depth_weights [B·N,D,fH,fW]."""
        return self._lift(img, None)


class CameraVTransform(PartModule):
    """camera.vtransform: the view transform's convolutions after pooling.

    Changed for tracing: nothing but the split, which leaves BEV pooling outside the graph.
    """

    inputs = ("feat_in",)
    outputs = ("feat_out",)

    def forward(self, feat_in: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """feat_in [B,C·nz,nx,ny] → feat_out [B,C·nz,nx/2,ny/2]."""
        return self.core(feat_in)


class Fuser(PartModule):
    """fuser: BEV decoder, backbone and neck. (With one sensor there is nothing to fuse; the name is the runtime's.)

    Changed for tracing: returns one tensor; BEVFusion's necks return a list.
    """

    inputs = ("camera",)
    outputs = ("middle",)

    def forward(self, camera: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """camera [B,C,h,w] → middle [B,C',h',w']."""
        return self.core(camera)


class HeadBBox(PartModule):
    """head.bbox: CenterHead.

    Changed for tracing: the list of dicts becomes flat outputs `{map}_{task}`; heatmaps stay logits, and decoding and
    suppression stay outside.
    """

    inputs = ("middle",)
    whole = False

    def __init__(self, core: Core, outputs: Sequence[str]) -> None:
        super().__init__(core, outputs=outputs)

    def forward(self, middle: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """middle [B,C,h,w] → one map [B,channels,h,w] for each of `outputs`."""
        maps = {f"{name}_{i}": value for i, task in enumerate(self.core(middle)) for name, value in task.items()}
        return tuple(maps[name] for name in self.outputs)

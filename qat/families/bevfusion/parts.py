"""The parts of a detector as modules with fixed tensor names and shapes, for tracing alone.

Nothing else should call them: for inference in PyTorch use the detector, or `qat.export.torch_parts`. The tensor names
and shapes are those that CUDA-BEVFusion's runtime loads. A wrapper serves the float detector and the quantized one,
which offer the same methods.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class CameraBackbone(nn.Module):
    """camera.backbone: images (and depth) → context and depth distribution of every feature pixel.

    Changed for tracing: samples and cameras are merged by a reshape that fixes all sizes but theirs (a flatten would leave
    shape arithmetic in the graph), and the context comes out channels-last, as the pooling kernels read it.
    """

    inputs: tuple[str, ...] = ("img", "depth")
    outputs = ("camera_feature", "camera_depth_weights")

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, img: torch.Tensor, depth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """img [B,N,3,H,W], depth [B,N,1,H,W] → camera_feature [B·N,fH,fW,C], camera_depth_weights [B·N,D,fH,fW]."""
        return self._lift(img, depth)

    def _lift(self, img: torch.Tensor, depth: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        flat = None if depth is None else depth.reshape(-1, *map(int, depth.shape[2:]))
        weights, context = self.detector.lift(img.reshape(-1, *map(int, img.shape[2:])), flat)
        return context.permute(0, 2, 3, 1), weights


class CameraBackboneWithoutDepth(CameraBackbone):
    """camera.backbone of an LSSTransform, which sees no lidar: as above, without the `depth` input.

    Changed for tracing: a traced signature has no optional inputs, hence a class of its own.
    """

    inputs = ("img",)

    def forward(self, img: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """img [B,N,3,H,W] → camera_feature [B·N,fH,fW,C], camera_depth_weights [B·N,D,fH,fW]."""
        return self._lift(img, None)


class CameraVTransform(nn.Module):
    """camera.vtransform: the view transform's convolutions after pooling.

    Changed for tracing: nothing but the split, which leaves BEV pooling outside the graph.
    """

    inputs = ("feat_in",)
    outputs = ("feat_out",)

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, feat_in: torch.Tensor) -> torch.Tensor:
        """feat_in [B,C·nz,nx,ny] → feat_out [B,C·nz,nx/2,ny/2]."""
        return self.detector.downsample(feat_in)


class Fuser(nn.Module):
    """fuser: BEV decoder, backbone and neck. (With one sensor there is nothing to fuse; the name is the runtime's.)

    Changed for tracing: one tensor comes out, where BEVFusion's necks return a list.
    """

    inputs = ("camera",)
    outputs = ("middle",)

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, camera: torch.Tensor) -> torch.Tensor:
        """camera [B,C,h,w] → middle [B,C',h',w']."""
        return self.detector.decode_bev(camera)


class HeadBBox(nn.Module):
    """head.bbox: CenterHead.

    Changed for tracing: the list of dicts is laid out flat as `{map}_{task}`; heatmaps stay logits, and decoding and
    suppression stay outside.
    """

    inputs = ("middle",)

    def __init__(self, detector: Any, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.detector = detector
        self.outputs = outputs

    def forward(self, middle: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """middle [B,C,h,w] → one map [B,channels,h,w] for each of `outputs`."""
        maps = {
            f"{name}_{i}": value for i, task in enumerate(self.detector.head(middle)) for name, value in task.items()
        }
        return tuple(maps[name] for name in self.outputs)

"""Lets torchvision (and so timm) import beside a CPU build of torch.

torchvision's wheel on the package registry is built for CUDA; beside CPU torch its own library does not load and
its import fails on `operator torchvision::nms does not exist`. Declaring those operators first is enough: nothing
here calls them.
"""

import torch

_LIBRARY = None


def declare_operators() -> None:
    """Declares torchvision's operators where torch has no CUDA and torchvision did not declare them."""
    global _LIBRARY
    if _LIBRARY is not None or torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


declare_operators()

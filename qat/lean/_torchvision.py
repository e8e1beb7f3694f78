"""Makes torchvision (and so timm) importable with a CPU build of torch.

torchvision's wheel on the package registry is built for CUDA; with CPU torch its library does not load and its import
fails with `operator torchvision::nms does not exist`. Declaring those operators first is enough, because nothing here
calls them.
"""

import torch

_LIBRARY = None


def declare_operators() -> None:
    """Declares torchvision's operators if torch has no CUDA and torchvision did not declare them."""
    global _LIBRARY
    if _LIBRARY is not None or torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


declare_operators()

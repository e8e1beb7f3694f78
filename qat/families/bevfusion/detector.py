"""The whole camera detector, BEVFusion without its lidar, or only the camera branch of a camera+lidar model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from qat.core.errors import UserError
from qat.families.bevfusion.config import check_config, is_camera_branch, need_boxes, read_config
from qat.families.bevfusion.grid import bevfusion_cells, cells
from qat.families.bevfusion.networks.backbone import build_backbone
from qat.families.bevfusion.networks.bev_pool import bev_pool
from qat.families.bevfusion.networks.centerhead import CenterHead
from qat.families.bevfusion.networks.decoder import LSSFPN, GeneralizedResNet
from qat.families.bevfusion.networks.generalized_lssfpn import GeneralizedLSSFPN
from qat.families.bevfusion.networks.second import SECOND, SECONDFPN
from qat.families.bevfusion.networks.vtransform import DepthLSSTransform, LSSTransform
from qat.families.bevfusion.pooling.geometry import PoolPattern
from qat.families.bevfusion.sizes import check_features

# Exceptions of a network's constructor for invalid values, apart from torch's RuntimeError.
UNBUILDABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError)
MOST_PARAMETERS = 4_000_000_000

NETWORKS: dict[str, type[nn.Module]] = {
    "GeneralizedLSSFPN": GeneralizedLSSFPN,
    "SECONDFPN": SECONDFPN,
    "LSSTransform": LSSTransform,
    "DepthLSSTransform": DepthLSSTransform,
    "GeneralizedResNet": GeneralizedResNet,
    "SECOND": SECOND,
    "LSSFPN": LSSFPN,
    "CenterHead": CenterHead,
}


def _build(config: Mapping[str, Any], path: str) -> nn.Module:
    arguments = {key: value for key, value in config.items() if key != "type"}
    try:
        return NETWORKS[config["type"]](**arguments)
    except (*UNBUILDABLE, RuntimeError) as error:  # RuntimeError: from torch, for sizes below 0 or beyond the memory
        raise UserError(f"config: {path}: cannot build {config['type']} from these values: {error}") from None


def _check_maps(backbone: nn.Module, config: Mapping[str, Any]) -> None:
    """Checks that the maps of timm's backbone, whose sizes are not in the config, fit the neck."""
    maps: Any = getattr(backbone, "feature_info", None)
    if config["model"]["encoders"]["camera"]["backbone"]["type"] == "timm" and maps is not None:
        read_config(config, "config", "camera", lambda typed: check_features(typed, maps.channels(), maps.reduction()))


def first(x: Any) -> torch.Tensor:
    """A neck's map: BEVFusion's necks return the map, or a list whose first item is used."""
    return x[0] if isinstance(x, list | tuple) else x


class CameraBEVDetector(nn.Module):
    """From images (and sparse depth) to CenterHead's maps, or for a camera branch to BEV features.

    State-dict names are BEVFusion's: encoders.camera.{backbone,neck,vtransform}, decoder.{backbone,neck},
    heads.object. A camera branch (`qat.families.bevfusion.config.is_camera_branch`) has the first three; its decode_bev, head and
    bev_head raise `UserError`.
    """

    family = "bevfusion"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        model = config["model"]
        camera = model["encoders"]["camera"]
        where = "model.encoders.camera"
        self.config = dict(config)
        backbone = build_backbone(camera["backbone"], config["image_size"])
        _check_maps(backbone, config)
        self.encoders = nn.ModuleDict(
            {
                "camera": nn.ModuleDict(
                    {
                        "backbone": backbone,
                        "neck": _build(camera["neck"], f"{where}.neck"),
                        "vtransform": _build(camera["vtransform"], f"{where}.vtransform"),
                    }
                )
            }
        )
        if is_camera_branch(config):
            return
        self.decoder = nn.ModuleDict(
            {name: _build(model["decoder"][name], f"model.decoder.{name}") for name in ("backbone", "neck")}
        )
        self.heads = nn.ModuleDict({"object": _build(model["heads"]["object"], "model.heads.object")})

    def keep_cells(self, counts: Sequence[int]) -> bool:
        """Uses the BEV grid of a checkpoint with BEVFusion's count of cells (`qat.families.bevfusion.grid.bevfusion_cells`):
        the upper ends of the bounds move in, in `config` too, so that everything made from it has the same grid.

        Args:
            counts: the checkpoint's `nx`, `ny`, `nz`.

        Returns:
            whether it was changed: False if the grid has these counts already, or they are not BEVFusion's.

        Raises:
            UserError: that grid does not fit the decoder or the head.
        """
        names = ("xbound", "ybound", "zbound")
        section = self.config["model"]["encoders"]["camera"]["vtransform"]
        bounds = [list(section[name]) for name in names]
        found = list(counts)
        if found == [cells(bound) for bound in bounds] or found != [bevfusion_cells(bound) for bound in bounds]:
            return False
        moved = [[low, low + n * step, step] for n, (low, _, step) in zip(found, bounds, strict=True)]
        self.config = copy.deepcopy(self.config)
        section = self.config["model"]["encoders"]["camera"]["vtransform"]
        section.update(dict(zip(names, moved, strict=True)), bevfusion_count=True)
        check_config(self.config, f"config with BEVFusion's count of {'×'.join(map(str, found))} cells")
        self.vtransform.set_bounds(*moved)
        return True

    @property
    def vtransform(self) -> LSSTransform:
        """The view transform."""
        return self.encoders["camera"]["vtransform"]  # type: ignore[index]

    def camera_logits(self, img: torch.Tensor, depth: torch.Tensor | None) -> torch.Tensor:
        """img [B·N,3,H,W], depth [B·N,1,H,W] in metres → depth logits and context, [B·N,D+C,fH,fW]."""
        camera = self.encoders["camera"]
        return self.vtransform.depth_and_context(first(camera["neck"](camera["backbone"](img))), depth)  # type: ignore[index]

    def lift(self, img: torch.Tensor, depth: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """img [B,N,3,H,W], depth [B,N,1,H,W] in metres → depth weights [B·N,D,fH,fW], context [B·N,C,fH,fW]."""
        flat = None if depth is None else depth.flatten(0, -4)
        return self.vtransform.split(self.camera_logits(img.flatten(0, -4), flat))

    def pool(self, depth_weights: torch.Tensor, context: torch.Tensor, patterns: Sequence[PoolPattern]) -> torch.Tensor:
        """[B·N,D,fH,fW], [B·N,C,fH,fW] and a pattern for each of the B samples → [B,C·nz,nx,ny]."""
        count = len(context) // len(patterns)
        pairs = zip(depth_weights.split(count), context.split(count), patterns, strict=True)
        return torch.stack([bev_pool(d, c, pattern) for d, c, pattern in pairs])

    def downsample(self, bev: torch.Tensor) -> torch.Tensor:
        """The view transform's convolutions on pooled BEV: [B,C·nz,nx,ny] → [B,C·nz,nx/downsample,ny/downsample]."""
        return self.vtransform.downsample(bev)

    def decode_bev(self, x: torch.Tensor) -> torch.Tensor:
        """The BEV decoder: backbone, then neck."""
        self._need_boxes("decode_bev")
        return first(self.decoder["neck"](self.decoder["backbone"](x)))

    def head(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """The head's maps for each task from the decoder's map."""
        self._need_boxes("head")
        return self.heads["object"](x)

    def _need_boxes(self, method: str) -> None:
        need_boxes(self.config, f"CameraBEVDetector.{method}", "forward gives the features")

    def bev_head(self, bev: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Pooled BEV [B,C·nz,nx,ny] → downsample → decoder → the head's maps for each task."""
        return self.head(self.decode_bev(self.downsample(bev)))

    def patterns(
        self,
        camera_intrinsics: np.ndarray,
        camera2lidar: np.ndarray,
        img_aug_matrix: np.ndarray,
        lidar_aug_matrix: np.ndarray,
    ) -> list[PoolPattern]:
        """One pooling pattern for each sample of a batch; matrices float32[B,N,4,4] and [B,4,4]."""
        matrices = zip(camera_intrinsics, camera2lidar, img_aug_matrix, lidar_aug_matrix, strict=True)
        return [self.vtransform.pattern(*sample) for sample in matrices]

    def forward(
        self, img: torch.Tensor, depth: torch.Tensor | None, patterns: Sequence[PoolPattern]
    ) -> list[dict[str, torch.Tensor]]:
        """img [B,N,3,H,W], depth [B,N,1,H,W] → for each task {map: [B,channels,nx,ny]}; heatmaps are logits.

        For a camera branch: one entry with one map, {"feat_out": the result of `downsample`}.
        """
        bev = self.pool(*self.lift(img, depth), patterns)
        return [{"feat_out": self.downsample(bev)}] if is_camera_branch(self.config) else self.bev_head(bev)


def build_model(config: Mapping[str, Any]) -> CameraBEVDetector:
    """Builds the detector that `config` (BEVFusion's schema) describes, randomly initialised; for a `camera_branch`'s config,
    the camera branch.

    Raises:
        UserError: the config has an option that is not supported, by name.
    """
    check_config(config)
    with torch.device("meta"):  # sizes only: invalid sizes are found before memory is allocated for them
        count = sum(parameter.numel() for parameter in CameraBEVDetector(config).parameters())
    if count > MOST_PARAMETERS:
        raise UserError(
            f"config: model: found {count:,} weights, expected at most {MOST_PARAMETERS:,}; check its channels"
        )
    return CameraBEVDetector(config)

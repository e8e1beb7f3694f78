"""BEVFusion's camera detector for the stages that run PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from qat.core.errors import UserError
from qat.data.reading import Reading
from qat.families.bevfusion.config import (
    camera_branch,
    check_config,
    is_camera_branch,
    load_config,
    need_training,
    needs_depth,
)
from qat.families.bevfusion.detector import CameraBEVDetector, build_model
from qat.families.bevfusion.distill import WEIGHTS, distillation_losses
from qat.families.bevfusion.parts import (
    CameraBackbone,
    CameraBackboneWithoutDepth,
    CameraVTransform,
    Fuser,
    HeadBBox,
)
from qat.families.bevfusion.random_init import random_model
from qat.families.bevfusion.reading import reading_of
from qat.families.bevfusion.recipe import recipe_of
from qat.families.bevfusion.settings import head_maps, pipeline_settings
from qat.families.bevfusion.state import load_state, take_branch, under_prefix
from qat.families.family import Core, Family, PartModule, Recipe

METHODS = {
    "camera.backbone": "camera_logits",
    "camera.vtransform": "downsample",
    "fuser": "decode_bev",
    "head.bbox": "head",
}
"""Part → the detector's method that is traced."""


class BEVFusionFamily(Family):
    """Camera detectors with BEVFusion's config schema and state-dict names, and camera branches alone."""

    name = "bevfusion"
    loss_weights = WEIGHTS

    def load_config(self, path: str | Path, prefix: str | None = None) -> dict[str, Any]:
        """As `Family.load_config`; a prefix takes the camera branch."""
        return load_config(path, None if prefix is None else "camera")

    def check_config(self, config: object, source: str, prefix: str | None = None) -> dict[str, Any]:
        """As `Family.check_config`."""
        if not isinstance(config, Mapping):
            raise UserError(f"{source}: found {type(config).__name__}, expected a mapping with BEVFusion's keys")
        check_config(config, source, None if prefix is None else "camera")
        return dict(config) if prefix is None else camera_branch(config)

    def build(self, config: Mapping[str, Any]) -> CameraBEVDetector:
        """As `Family.build`."""
        return build_model(config)

    def random(self, config: Mapping[str, Any], seed: int) -> CameraBEVDetector:
        """As `Family.random`."""
        return random_model(config, seed)

    def load_state(
        self, network: Any, state: Mapping[str, Any], source: str, prefix: str | None = None, finite: bool = True
    ) -> int:
        """As `Family.load_state`."""
        return load_state(network, state, source, prefix, finite)

    def take_piece(self, checkpoint: Mapping[str, Any], prefix: str, source: str) -> tuple[dict[str, Any], int]:
        """As `Family.take_piece`, of the camera branch."""
        state, left_out = take_branch(checkpoint["state_dict"], prefix, source)
        return {"state_dict": state, "quantizers": under_prefix(checkpoint["quantizers"], prefix)}, left_out

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """As `Family.settings`."""
        return pipeline_settings(config)

    def traced(self, network: CameraBEVDetector) -> dict[str, str]:
        """As `Family.traced`."""
        config = network.config
        absent = (
            set()
            if config["model"]["encoders"]["camera"]["vtransform"].get("downsample", 1) > 1
            else {"camera.vtransform"}
        )
        if is_camera_branch(config):
            absent |= {"fuser", "head.bbox"}
        return {name: method for name, method in METHODS.items() if name not in absent}

    def parts(self, network: CameraBEVDetector, cores: Mapping[str, Core]) -> dict[str, PartModule]:
        """As `Family.parts`."""
        view = network.vtransform
        camera = CameraBackbone if needs_depth(network.config) else CameraBackboneWithoutDepth
        found: dict[str, PartModule] = {}
        for name, core in cores.items():
            if name == "camera.backbone":
                found[name] = camera(core, view.D, view.C)
            elif name == "camera.vtransform":
                found[name] = CameraVTransform(core)
            elif name == "fuser":
                found[name] = Fuser(core)
            else:
                found[name] = HeadBBox(core, head_maps(network.config))
        return found

    def ops(self, network: CameraBEVDetector) -> Mapping[str, Any]:
        """Patterns of the samples' cameras, and pooling in torch."""

        def pattern(given: Mapping[str, Any]) -> dict[str, Any]:
            return {"pattern": network.patterns(*given.values())}

        def pooling(given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
            context = given["camera_feature"].permute(0, 3, 1, 2)
            return {"feat_in": network.pool(given["camera_depth_weights"], context, given["pattern"])}

        return {"pattern": pattern, "pooling": pooling}

    def recipe(self, config: Mapping[str, Any]) -> Recipe:
        """As `Family.recipe`."""
        return recipe_of(config)

    def reading(self, config: Mapping[str, Any]) -> Reading:
        """As `Family.reading`."""
        return reading_of(config)

    def dataset(
        self,
        root: Path,
        split: str,
        config: Mapping[str, Any],
        version: str | None = None,
        frames: int | None = None,
    ) -> Any:
        """The keyframes of a nuScenes-format split."""
        from qat.data import NuScenesDataset

        return NuScenesDataset(root, split, reading_of(config), version, frames)

    def frame(self, folder: Path, config: Mapping[str, Any]) -> Any:
        """As `Family.frame`."""
        from qat.data.frame import load_frame

        return load_frame(folder, reading_of(config))

    def note_pictures(self, config: Mapping[str, Any], size: tuple[int, int]) -> Mapping[str, Any]:
        """As `Family.note_pictures`: `native_size`."""
        return config if config.get("native_size") is not None else {**config, "native_size": list(size)}

    def augmented(self, dataset: Any, config: Mapping[str, Any]) -> Any:
        """Frames augmented by the config's augment2d and augment3d."""
        from qat.families.bevfusion.augment import AugmentedSet

        return AugmentedSet(dataset, config)

    def check_training(self, config: Mapping[str, Any], source: str) -> None:
        """As `Family.check_training`; a camera branch's image part is trained alone."""
        if not is_camera_branch(config):
            need_training(config, source)

    def train(
        self,
        config: Mapping[str, Any],
        datasets: Sequence[Any],
        out: Path,
        options: Mapping[str, Any],
        held_out: Any,
        checkpoint: Path | None,
        log: Callable[[str], None],
        ema: bool,
    ) -> dict[str, Any] | None:
        """As `Family.train` (`qat.families.bevfusion.training`)."""
        from qat.families.bevfusion.training import TrainOptions, train

        names = {field.name for field in fields(TrainOptions)}
        own = TrainOptions(**{name: value for name, value in options.items() if name in names})
        return train(config, list(datasets), out, own, held_out, checkpoint, log, ema)

    def losses(
        self, student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], frames: int
    ) -> dict[str, torch.Tensor]:
        """As `qat.families.bevfusion.distill.distillation_losses`."""
        return distillation_losses(student, teacher, frames)


FAMILY = BEVFusionFamily()

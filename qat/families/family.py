"""The interface of a family for stages that run PyTorch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat.core.errors import UserError
from qat.families import flow_class
from qat.families.flow import Flow
from qat.lean.equalize import INPUTS

if TYPE_CHECKING:
    from qat.data.reading import Reading
    from qat.lean.placement import FloatRule


Core = nn.Module | Callable[..., Any]  # a graph, or a method of the network


class PartModule(nn.Module):
    """A part as a module with fixed tensor names, for tracing and as a runner; subclasses say what they change for tracing.

    core: the piece that is traced and quantized: the float network's method, or its quantized graph. inputs, outputs: names.
    direct: core's inputs are the part's. whole: its outputs are too, so forward is only core.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    direct = True
    whole = True

    def __init__(self, core: Core, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None) -> None:
        super().__init__()
        # The names of an ONNX graph's nodes start with that of the called module; for a graph, with its scope.
        self._method = None if isinstance(core, nn.Module) else str(core.__name__)
        self._own = "detector" if self._method is not None else str(getattr(core, "scope", "graph"))
        self.add_module(self._own, core if isinstance(core, nn.Module) else core.__self__)  # type: ignore[attr-defined]
        self.inputs = tuple(inputs) if inputs is not None else type(self).inputs
        self.outputs = tuple(outputs) if outputs is not None else type(self).outputs

    @property
    def core(self) -> Any:
        """See the class; called with the part's inputs, or with what forward computes from them."""
        found = self._modules[self._own]
        return found if self._method is None else getattr(found, self._method)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Computes the outputs from the inputs, both in order."""
        return self.core(*inputs)


def outputs_of(module: Any, result: Any) -> dict[str, Any]:
    """The results of a part's forward, by output name."""
    values = result if isinstance(result, tuple) else (result,)
    return dict(zip(module.outputs, values, strict=True))


def kept_flow(model: Any, family: Family) -> Flow:
    """The flow (host side) of a model, rebuilt only if its config changed."""
    kept = model.__dict__.get("_flow")
    if kept is None or kept[0] is not model.config:
        kept = model.__dict__["_flow"] = (model.config, family.flow(model.config))
    flow: Flow = kept[1]
    return flow


def own_path(path: str) -> str:
    """The path in the network, or in its graph, of a module of a part."""
    return path.partition(".")[2]


def relative_error(
    student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], names: Sequence[str]
) -> torch.Tensor:
    """The mean over these tensors of the student's squared error divided by the teacher's mean square."""
    lost = [
        (student[name] - teacher[name]).square().mean() / teacher[name].square().mean().clamp(min=1e-6)
        for name in names
    ]
    return torch.stack(lost).mean()


@dataclass(frozen=True)
class Recipe:
    """A family's default quantization.

    keep_float: layers that stay float, with reasons. parts_off: scopes of parts that are float as a whole → their flavours;
    off_reason: why. method, by_layer: how ranges are chosen: a method of `qat.lean.METHODS`, and (pattern, method) pairs that
    override it. equalize: where channels may be divided by their magnitudes (`qat.lean.equalize`): at parts' inputs, or inside
    parts. round_outputs: whether a
    part's outputs may be rounded if that lets the preceding layer run in integers (`qat.lean.rules.integer_chain`).
    """

    keep_float: tuple[FloatRule, ...] = ()
    parts_off: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    off_reason: str = ""
    method: str = "mse"
    by_layer: tuple[tuple[str, str], ...] = ()
    equalize: str = INPUTS
    round_outputs: bool = False


class Family(ABC):
    """Everything about one kind of model. Networks that it builds have `config` and `family`, this family's name."""

    name: str
    loss_weights: Mapping[str, float] = {}

    def flow(self, config: Mapping[str, Any], threads: int = 0, source: str = "pipeline") -> Flow:
        """The flow (host side) of a model of this config."""
        return flow_class(self.name)(self.settings(config), threads, source)

    @abstractmethod
    def load_config(self, path: str | Path, prefix: str | None = None) -> dict[str, Any]:
        """Reads and checks a config. prefix: not None for the part of a larger model under this prefix in a checkpoint.

        Raises:
            UserError: it cannot be read, or describes something that cannot be built, by name.
        """

    @abstractmethod
    def check_config(self, config: object, source: str, prefix: str | None = None) -> dict[str, Any]:
        """The same for a config inside a checkpoint; returns the config, or its part for `prefix`."""

    def trained_with(self, config: Mapping[str, Any], meta: Mapping[str, Any], source: str) -> Mapping[str, Any]:
        """The config with what only a float checkpoint's `meta` tells."""
        return config

    def in_layout(self, config: Mapping[str, Any], options: Any) -> Mapping[str, Any]:
        """The config with which a network's parts are in the form of another runtime. options: `ExportOptions` with its `layout`.

        Raises:
            UserError: the family has no such layout, or the runtime cannot load such a model.
        """
        raise UserError(
            f"layout: found {options.layout!r}, expected none: the family {self.name} has one form; omit it"
        )

    def companions(self, manifest: Mapping[str, Any]) -> Mapping[str, str]:
        """Text files that the runtime of a layout reads beside the parts, by name. manifest: of these parts."""
        return {}

    @abstractmethod
    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """The float network, randomly initialised; raises `UserError` like `load_config`."""

    @abstractmethod
    def random(self, config: Mapping[str, Any], seed: int) -> nn.Module:
        """The float network with random weights whose activations neither explode nor vanish, in eval mode."""

    @abstractmethod
    def load_state(
        self, network: Any, state: Mapping[str, Any], source: str, prefix: str | None = None, finite: bool = True
    ) -> int:
        """Loads a checkpoint's weights into a network; returns the number of names that were left out.

        Args:
            prefix: the network's place in the checkpoint. finite: False accepts NaN and infinity, to examine their effect.

        Raises:
            UserError: they do not fit.
        """

    def take_piece(self, checkpoint: Mapping[str, Any], prefix: str, source: str) -> tuple[dict[str, Any], int]:
        """ "state_dict" and "quantizers" under a checkpoint's prefix, by the network's names, and the number of other names."""
        raise UserError(f"{source}: --prefix: the family {self.name} does not support it; omit it")

    @abstractmethod
    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The manifest's `pipeline` section: plain JSON values from which `Flow` is made; `family` is this family's name."""

    @abstractmethod
    def traced(self, network: Any) -> dict[str, str]:
        """For each part, in the plan's order, the network's method that is traced and quantized."""

    @abstractmethod
    def parts(self, network: Any, cores: Mapping[str, Core]) -> dict[str, PartModule]:
        """The parts in the plan's order, around these cores."""

    @abstractmethod
    def ops(self, network: Any) -> Mapping[str, Any]:
        """A differentiable runner for each of the plan's ops on batches of torch tensors. Inputs of ops alone are numpy."""

    @abstractmethod
    def recipe(self, config: Mapping[str, Any]) -> Recipe:
        """The default quantization of its networks."""

    def reading(self, config: Mapping[str, Any]) -> Reading:
        """How keyframes of nuScenes-format data are read, for a family that reads them."""
        raise UserError(f"config: the family {self.name} reads no nuScenes-format data; expected a family that does")

    @abstractmethod
    def dataset(
        self,
        root: Path,
        split: str,
        config: Mapping[str, Any],
        version: str | None = None,
        frames: int | None = None,
    ) -> Any:
        """The preprocessed frames of a split (`qat.data.NuScenesDataset` or the like)."""

    def frame(self, folder: Path, config: Mapping[str, Any]) -> Any:
        """The preprocessed frame of a folder with one keyframe and its info.json."""
        raise UserError(
            f"{folder}: found one keyframe, expected a data set: the family {self.name} reads only data sets"
        )

    def note_pictures(self, config: Mapping[str, Any], size: tuple[int, int]) -> Mapping[str, Any]:
        """The config with the (height, width) of the pictures that it was calibrated on, if the family needs it."""
        return config

    def augmented(self, dataset: Any, config: Mapping[str, Any]) -> Any:
        """The same with `draw(index, rng)`, which returns frames as in training."""
        raise UserError("--augment: this family has no augmentation, expected --no-augment")

    def _no_training(self, source: str) -> UserError:
        return UserError(f"{source}: the family {self.name} cannot be trained here; use its own tools")

    def check_training(self, config: Mapping[str, Any], source: str) -> None:
        """Raises `UserError` if a config lacks keys that training reads."""
        raise self._no_training(source)

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
        """Trains the float network: writes out/model.pth, returns the metrics on `held_out`. options: `bevqat train`'s flags."""
        raise self._no_training("config")

    def losses(
        self, student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], frames: int
    ) -> dict[str, torch.Tensor]:
        """The losses of a quantized network against the float one, each a mean over frames (`relative_error`, say). Names are those of
        `loss_weights`."""
        raise UserError(f"finetune: the family {self.name} has no losses, expected some")

"""PyTorch runners of a plan: float, fake-quantized or recording, depending on the model's quantizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from qat.boxes.detections import Detections
from qat.families import family_named
from qat.families.family import Core, Family, PartModule, kept_flow, outputs_of
from qat.families.flow import Flow, Session
from qat.model.quantized import QuantizedModel
from qat.plan import Runner, run

Model = Any  # a family's float network, or a `QuantizedModel` of one


def whose(model: Model) -> tuple[Family, Any]:
    """A model's family and its float network."""
    if isinstance(model, QuantizedModel):
        return model.family, model.network
    return family_named(model.family), model


def flow_for(model: Model) -> Flow:
    """The flow (host side) of a model, made once for its config."""
    return kept_flow(model, whose(model)[0])


def torch_ops(model: Model) -> dict[str, Runner]:
    """A runner for each op of a model's plan on torch tensors."""
    family, network = whose(model)
    return dict(family.ops(network))


def part_modules(model: Model) -> dict[str, PartModule]:
    """The parts in their order, in eval mode."""
    family, network = whose(model)
    cores: dict[str, Core]
    if isinstance(model, QuantizedModel):
        cores = {name: model.parts[part.scope] for name, part in model.plan.parts.items()}
    else:
        cores = {name: getattr(network, method) for name, method in family.traced(network).items()}
    return {name: part.eval() for name, part in family.parts(network, cores).items()}


def torch_runners(
    model: Model, precision: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> dict[str, Runner]:
    """A runner for each step of a model's plan on torch tensors, differentiable.

    precision: a context for the parts, such as autocast; their outputs are float32, and so are the ops.
    """
    plain = precision is nullcontext

    def runner(module: PartModule) -> Runner:
        def compute(given: dict[str, Any]) -> dict[str, Any]:
            with precision():
                found = outputs_of(module, module(*(given[name] for name in module.inputs)))
            return found if plain else {name: value.float() for name, value in found.items()}

        return compute

    return {**{name: runner(module) for name, module in part_modules(model).items()}, **torch_ops(model)}


def torch_feeds(model: Model, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A plan's inputs as torch tensors on the model's device; inputs that only ops read stay numpy arrays."""
    device = next(model.parameters()).device
    taken = flow_for(model).plan.part_inputs
    return {
        name: torch.from_numpy(np.ascontiguousarray(array)).to(device) if name in taken else array
        for name, array in feeds.items()
    }


def run_frame(model: Model, frame: Any) -> dict[str, Any]:
    """Runs the first frame of a scene through a model's whole plan; returns every tensor, in torch."""
    flow = flow_for(model)
    return run(flow.plan, torch_runners(model), torch_feeds(model, flow.first_feeds([frame])))


def detect(model: Model, frames: Any, progress: Callable[[int], None] | None = None) -> dict[str, Detections]:
    """Boxes of every frame by its token; state is carried through each scene."""
    flow, runners = flow_for(model), torch_runners(model)
    session, found = Session(flow), {}
    with torch.inference_mode():
        for n, frame in enumerate(frames):
            feeds, _ = session.begin(frame)
            tensors = to_numpy(run(flow.plan, runners, torch_feeds(model, feeds)))
            session.end(tensors)
            found[frame.token] = flow.decode(tensors).converted()
            if progress:
                progress(n + 1)
    return found


def to_numpy(tensors: Mapping[str, Any], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Tensors as float32 arrays; `names` None for all that are tensors."""
    chosen = [n for n, x in tensors.items() if isinstance(x, torch.Tensor)] if names is None else names
    return {name: np.ascontiguousarray(tensors[name].detach().float().cpu().numpy()) for name in chosen}


class TorchPart:
    """Runs one part on numpy arrays: a `qat.runtime.PartRunner`."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the part on arrays by input name; returns arrays by output name."""
        device = next(self.wrapper.parameters()).device
        with torch.inference_mode():
            result = self.wrapper(*(torch.from_numpy(feeds[name]).to(device) for name in self.wrapper.inputs))
        found = outputs_of(self.wrapper, result)
        return {name: np.ascontiguousarray(value.cpu().numpy()) for name, value in found.items()}


def torch_parts(model: Model) -> dict[str, TorchPart]:
    """Runners of a model's parts on numpy arrays, for `qat.runtime.Pipeline` and for verification. Puts it into eval mode."""
    model.eval()
    return {name: TorchPart(module) for name, module in part_modules(model).items()}

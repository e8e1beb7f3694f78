"""The toy for the stages that run PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from qat.core.errors import UserError
from qat.core.preprocess import ResizeCrop
from qat.families.family import Family, PartModule, Recipe
from qat.lean.placement import FloatRule
from toy.flow import centres_of, places

CLASSES = ("car", "pedestrian")


class ToyNet(nn.Module):
    family = "toy"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        width = config["width"]
        sizes = (3, 8, 12, width)
        self.stem = nn.Sequential(
            *(
                layer
                for a, b in pairwise(sizes)
                for layer in (nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            )
        )
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU())
        self.heat, self.box = nn.Linear(width, len(CLASSES)), nn.Linear(width, 7)

    def encode(self, img: torch.Tensor) -> torch.Tensor:
        return self.stem(img)

    def mix(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self.hidden(tokens)
        return self.heat(hidden), self.box(hidden), hidden


class ToyFamily(Family):
    name = "toy"
    loss_weights = {"tokens": 1.0, "outputs": 2.0}  # noqa: RUF012

    def load_config(self, path: str | Path, prefix: str | None = None) -> dict[str, Any]:
        return self.check_config(yaml.safe_load(Path(path).read_text()), str(path), prefix)

    def check_config(self, config: object, source: str, prefix: str | None = None) -> dict[str, Any]:
        if not isinstance(config, Mapping) or set(config) != {"family", "size", "width"}:
            raise UserError(f"{source}: found {config!r}, expected family, size and width; fix them")
        return dict(config)

    def build(self, config: Mapping[str, Any]) -> ToyNet:
        return ToyNet(config)

    def random(self, config: Mapping[str, Any], seed: int) -> ToyNet:
        torch.manual_seed(seed)
        return ToyNet(config).eval()

    def load_state(self, network: Any, state: Any, source: str, prefix: Any = None, finite: bool = True) -> int:
        network.load_state_dict(dict(state))
        return 0

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        image = {"size": config["size"], "resize": 0.5, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
        return {"family": "toy", "classes": list(CLASSES), "width": config["width"], "image": image}

    def traced(self, network: Any) -> dict[str, str]:
        return {"image": "encode", "mixer": "mix"}

    def parts(self, network: Any, cores: Mapping[str, Any]) -> dict[str, PartModule]:
        names = {"image": (("img",), ("feat",)), "mixer": (("tokens",), ("heat", "box", "hidden"))}
        return {name: PartModule(core, *names[name]) for name, core in cores.items()}

    def ops(self, network: Any) -> Mapping[str, Any]:
        def gather(given: Mapping[str, Any]) -> dict[str, Any]:
            feat, cells, memory = (
                given["feat"],
                given["cells"],
                torch.as_tensor(given["memory"]).to(given["feat"].device),
            )
            sample, at = (torch.from_numpy(x).to(feat.device) for x in places(cells, feat.shape))
            tokens = feat.flatten(2)[sample, :, at] + memory[sample]
            return {"tokens": tokens, "centres": torch.from_numpy(centres_of(cells))}

        def remember(given: Mapping[str, Any]) -> dict[str, Any]:
            memory = torch.as_tensor(given["memory"]).to(given["hidden"].device)
            own = [given["hidden"][torch.from_numpy(given["cells"][:, 0] == n)].mean(0) for n in range(len(memory))]
            return {"next_memory": 0.5 * memory + 0.5 * torch.stack(own)}

        return {"gather": gather, "remember": remember}

    def recipe(self, config: Mapping[str, Any]) -> Recipe:
        return Recipe(
            (FloatRule("heat", "its logits are compared across cells"),), {}, "", "mse", (("mixer.*", "max"),)
        )

    def dataset(self, root: Path, split: str, config: Any, version: Any = None, frames: Any = None) -> Any:
        from qat.data import NuScenesDataset
        from qat.data.reading import Pipeline, Reading

        image = self.settings(config)["image"]
        crop = ResizeCrop(tuple(image["size"]), image["resize"], 0.0, None)
        reading = Reading(Pipeline(crop, image["mean"], image["std"]), list(CLASSES), ("CAM_FRONT",))
        return NuScenesDataset(root, split, reading, version, frames, whole_scenes=True)

    def losses(self, student: Any, teacher: Any, frames: int) -> dict[str, torch.Tensor]:
        def lost(name: str) -> torch.Tensor:
            return (student[name] - teacher[name]).square().mean() / teacher[name].square().mean().clamp(min=1e-6)

        return {"tokens": lost("tokens"), "outputs": lost("heat") + lost("box")}


FAMILY = ToyFamily()

"""What the families of mmdet3d's models share with the stages that run PyTorch: configs, checkpoints, random weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.families.family import Family
from qat.families.mmdet3d.description import KEYS, check_keys, read_description
from qat.families.mmdet3d.network import settle_norms

MADE_UP = 2  # clouds that random networks take their batch norms' statistics from


class Mmdet3dFamily(Family):
    """A family whose configs are mmdet3d's. own_keys: what its description has besides `KEYS`."""

    own_keys: frozenset[str]

    @abstractmethod
    def own_description(self, steps: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The values of `own_keys`, of the test pipeline's steps by type; raises `UserError` for steps that do not do."""

    @abstractmethod
    def pass_through(self, network: Any, flow: Any, frames: list[Any]) -> None:
        """Runs a batch of frames through every layer of a network, for the statistics of its batch norms."""

    def load_config(self, path: str | Path, prefix: str | None = None) -> dict[str, Any]:
        """An mmdet3d config, which is Python, and is run."""
        if prefix is not None:
            raise UserError(f"{path}: --prefix: found one, expected none: {self.name} has no branches; leave it out")
        described, steps = read_description(path, self.name)
        return self.check_config({**described, **self.own_description(steps, str(path))}, str(path))

    def check_config(self, config: object, source: str, prefix: str | None = None) -> dict[str, Any]:
        """As `Family.check_config`."""
        config = check_keys(config, KEYS | self.own_keys, self.name, source)
        self.settings(config)
        return dict(config)

    def trained_with(self, config: Mapping[str, Any], meta: Mapping[str, Any], source: str) -> Mapping[str, Any]:
        """As `Family.trained_with`: warns of boxes from before mmdet3d 1.0."""
        from qat.families.mmdet3d.model import note_older

        note_older(meta, source)
        return config

    def random(self, config: Mapping[str, Any], seed: int) -> Any:
        """mmdet3d's own initial values, class biases that let boxes through, and batch norms with the statistics of made-up clouds."""
        from qat.families.mmdet3d.model import draw

        network = self.build(config)
        draw(network, seed)
        flow = self.flow(config)
        with settle_norms(network):
            self.pass_through(network, flow, [flow.made_frame(n) for n in range(MADE_UP)])
        return network.eval()

    def load_state(
        self, network: Any, state: Mapping[str, Any], source: str, prefix: str | None = None, finite: bool = True
    ) -> int:
        """As `Family.load_state`."""
        from qat.families.mmdet3d.model import fitted

        return fitted(network, state, source, finite)

"""A nested input or output as a flat list of tensors, each with its path: `inputs.voxels.coors`, `outputs[0][1]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Leaf:
    """One value of a tree. value: a tensor, or whatever else stood there."""

    path: str
    value: Any

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, torch.Tensor)


def leaves(tree: Any, path: str) -> list[Leaf]:
    """Every leaf in the order in which it stands; dicts, lists and tuples are opened, nothing else is."""
    if isinstance(tree, Mapping):
        return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}")]
    if isinstance(tree, list | tuple):
        return [leaf for n, value in enumerate(tree) for leaf in leaves(value, f"{path}[{n}]")]
    return [Leaf(path, tree)]


def rebuild(tree: Any, path: str, values: Mapping[str, Any]) -> Any:
    """The tree with the leaves whose paths `values` has in the place of its own."""
    if isinstance(tree, Mapping):
        return {key: rebuild(value, f"{path}.{key}", values) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(rebuild(value, f"{path}[{n}]", values) for n, value in enumerate(tree))
    return values.get(path, tree)


def cloned(tree: Any) -> Any:
    """The tree with a copy of each tensor: some modules of mmdet3d write into their inputs."""
    return (
        {key: cloned(value) for key, value in tree.items()}
        if isinstance(tree, Mapping)
        else (
            type(tree)(cloned(value) for value in tree)
            if isinstance(tree, list | tuple)
            else tree.clone()
            if isinstance(tree, torch.Tensor)
            else tree
        )
    )


def drawn(rows: Sequence[tuple[str, str]], root: str) -> list[str]:
    """Lines of text of a tree. rows: (path, what to say of it)."""
    width = max((len(path) for path, _ in rows), default=0)
    lines = [root]
    for n, (path, words) in enumerate(rows):
        branch = "└─ " if n == len(rows) - 1 else "├─ "
        lines.append(f"{branch}{path.ljust(width)}  {words}")
    return lines

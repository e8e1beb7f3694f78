"""The axes of a part's inputs that vary within known sizes, as its manifest notes them.

    "inputs": {"tokens": {"dtype": "float32", "shape": ["N", 16], "axes": {"N": {"min": 1, "opt": 64, "max": 256}}}}

They come from the plan (`qat.plan.Axis`). TensorRT's default optimization profiles follow from them, and engines refuse an
input of another size. An axis that is not listed (a batch of any size) has no bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qat.core.checks import either, fail, holds, mapped, null, number, section
from qat.core.errors import UserError
from qat.engine import Engine, Options
from qat.engine.tensorrt_options import Profile
from qat.plan import Axis, Plan

AGAIN = "export again"
_SIZE = number(0, 1 << 31, whole=True)
_AXES = mapped(section(min=_SIZE, opt=_SIZE, max=either(null, _SIZE)))

Axes = dict[str, dict[int, tuple[str, Axis]]]


def note_axes(inputs: Mapping[str, dict[str, Any]], plan: Plan) -> None:
    """Adds the plan's sizes to the inputs in a part's manifest entry."""
    for spec in inputs.values():
        if named := {name: plan.axes[name] for name in spec["shape"] if name in plan.axes}:
            spec["axes"] = {
                name: {"min": axis.least, "opt": axis.usual, "max": axis.most} for name, axis in named.items()
            }


def axes_of(part: Mapping[str, Any], path: str | Path) -> Axes:
    """For each input with such axes: each axis's place in the shape, its name and its sizes.

    Args:
        part: its entry in a manifest. path: the manifest, for messages.

    Raises:
        UserError: the manifest's entries for the axes are damaged.
    """
    found: Axes = {}
    inputs = part.get("inputs")
    for name, spec in inputs.items() if isinstance(inputs, dict) else ():
        if isinstance(spec, dict) and "axes" in spec:
            holds(path, partial(_check, spec["axes"], spec.get("shape"), f"{name}: axes"), AGAIN)
            found[name] = {
                spec["shape"].index(axis): (axis, Axis(sizes["min"], sizes["opt"], sizes.get("max")))
                for axis, sizes in spec["axes"].items()
            }
    return found


def _check(axes: Any, shape: Any, where: str) -> None:
    _AXES(axes, where)
    for axis, sizes in axes.items():
        if not isinstance(shape, list) or axis not in shape:
            fail(f"{where}: {axis}", shape, "a shape with this axis")
        most = sizes.get("max")
        if not sizes["min"] <= sizes["opt"] <= (sizes["opt"] if most is None else most):
            fail(f"{where}: {axis}", sizes, "min ≤ opt ≤ max")


def default_profiles(part: Mapping[str, Any], axes: Axes) -> dict[str, Profile]:
    """TensorRT's profile of each input whose every axis that varies has bounds."""
    found = {}
    for name, places in axes.items():
        shape = part["inputs"][name]["shape"]
        if any(axis.most is None for _, axis in places.values()) or any(
            not isinstance(size, int) and place not in places for place, size in enumerate(shape)
        ):
            continue
        sizes = [
            tuple(
                max(1, getattr(places[place][1], kind)) if place in places else size for place, size in enumerate(shape)
            )
            for kind in ("least", "usual", "most")
        ]
        found[name] = Profile(name, *sizes)
    return found


def options_of_part(part: Mapping[str, Any], options: Options, path: str | Path) -> Options:
    """The options with the profiles of this part's inputs: those that were given, and by default those of its axes.

    Raises:
        UserError: like `axes_of`.
    """
    inputs = part.get("inputs")
    given = {p.input: p for p in options.tensorrt.profiles if not isinstance(inputs, dict) or p.input in inputs}
    profiles = {**default_profiles(part, axes_of(part, path)), **given}
    return replace(options, tensorrt=replace(options.tensorrt, profiles=tuple(profiles.values())))


def check_profiles(manifest: Mapping[str, Any], options: Options, folder: Path) -> None:
    """Raises `UserError` for a profile of a tensor that is not an input of any part of a folder."""
    known = [name for part in manifest["parts"].values() for name in part.get("inputs") or ()]
    for profile in options.tensorrt.profiles:
        if profile.input not in known:
            raise UserError(f"{folder}: profile of {profile.input}: no such input, expected of {', '.join(known)}")


def limited(engine: Engine, part: Mapping[str, Any], path: str | Path) -> Engine:
    """Returns the engine, which now refuses inputs outside its axes' sizes; raises like `axes_of`."""
    engine.limits = axes_of(part, path)
    return engine

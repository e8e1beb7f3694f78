"""Reference values around each quantizer, to check an INT8 graph site by site without PyTorch.

A site is an activation's QuantizeLinear, or an output of the graph. Its segment (`qat.core.onnx_cut`) is run on given codes,
and the result is compared with PyTorch's result from the same codes, in float64:

- codes c must lie within half a step, and a slack, of PyTorch's unrounded r = value / scale + zero point, clipped to the
  range of the codes: |c − clip(r)| ≤ 1/2 + slack.
- values of an output within the slack.

The slack is what the graph's arithmetic may do to r, as PyTorch itself shows it: NOISE times the largest difference between
PyTorch in the graph's own arithmetic (float32; or rounded to FP16 wherever a strongly typed graph rounds) and in float64, on
these same codes, and one part in 2^20 of the largest value, for a difference that comes out as nothing. So an error shows
as soon as it moves a tensor by the slack: about a hundredth of a step in float32.

In FP16 the slack may be 0.4 steps, and smaller damage would hide in it: so the average noise is checked too. The share of
codes that are another than r's own may be NOISE times what that noise makes, and five standard deviations of a count more;
of an output the root mean square, NOISE times that of the noise.

A segment's input codes are a patch of the real tensor's, a few thousand with all of its channels, repeated over
the whole tensor: real values at a few kilobytes. Of the results, PLACES values are kept, one from each of as many equal
stretches of the tensor, and of CANDIDATES in a stretch the first that is not clipped: a clipped one says little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.core.onnx_cut import Cut, Pair

PLACES, CANDIDATES = 4096, 4
NOISE = 4.0
LEAST = 2.0**-20
STEP = 250.0  # 1/STEP is the resolution of a stored r, in u16 from one below the smallest code
PATCH = 1 << 15  # codes
SIDE = 8  # sides of a patch, along axes other than channels
BUDGET = 256 << 20  # bytes of codes in one session
_STREAM = 4  # in addition to those of `qat.core.verification`


def places(size: int) -> np.ndarray:
    """int64[CANDIDATES, n]: some places in each of n equal stretches of a tensor, the same on every machine."""
    count = min(size, PLACES)
    edges = np.arange(count + 1, dtype=np.int64) * size // max(count, 1)
    widths = np.diff(edges).astype(np.uint64)
    words = np.random.PCG64([size, _STREAM]).random_raw(CANDIDATES * count).reshape(CANDIDATES, count)
    return edges[:-1] + (words % widths).astype(np.int64)


def tile(patch: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The patch, repeated over a tensor of this shape."""
    counts = [-(-size // part) for size, part in zip(shape, patch.shape, strict=True)]
    return np.ascontiguousarray(np.tile(patch, counts)[tuple(slice(size) for size in shape)])


def cut_patch(codes: np.ndarray, channels: int, side: int = SIDE, most: int = PATCH) -> np.ndarray:
    """A patch of a tensor's codes (or values) with all of its channels (their axis), `side` long along other axes if it then has
    `most` values or fewer. Of 16 places, takes the one whose codes vary most."""
    size = [n if axis == channels else min(n, side) for axis, n in enumerate(codes.shape)]
    size[0] = size[0] if channels == 0 else 1
    while np.prod(size) > most:
        axis = max((a for a in range(len(size)) if a != channels), key=lambda a: size[a], default=channels)
        if size[axis] == 1:
            axis = channels
        size[axis] = -(-size[axis] // 2)
    words = np.random.PCG64([codes.size, _STREAM + 1]).random_raw(16 * codes.ndim).reshape(16, -1)
    best, widest = None, -1.0
    for row in words:
        at = [int(word % np.uint64(n - s + 1)) for word, n, s in zip(row, codes.shape, size, strict=True)]
        found = codes[tuple(slice(a, a + s) for a, s in zip(at, size, strict=True))]
        if (varies := float(found.astype(np.float32).std())) > widest:
            best, widest = found, varies
    assert best is not None
    return np.ascontiguousarray(best)


def choose(r: np.ndarray, pair: Pair | None) -> np.ndarray:
    """uint8[n]: the kept candidate of `places` in each stretch. r: float64[CANDIDATES, n], PyTorch's values there."""
    if pair is None:
        return np.zeros(r.shape[1], np.uint8)
    low, high = pair.limits
    return ((r > low) & (r < high)).argmax(axis=0).astype(np.uint8)


@dataclass
class Site:
    """One site's reference. patch: of its codes, None for an output. choice: uint8[n]. values: PyTorch's values at the n
    places, u16 (codes) or float32 (an output). slack: in steps, or in an output's unit."""

    name: str
    shape: tuple[int, ...]
    patch: np.ndarray | None
    choice: np.ndarray
    values: np.ndarray
    slack: float
    noise: float = 0.0  # on average: of codes the mean magnitude in steps, of an output the root mean square

    @classmethod
    def of(
        cls,
        name: str,
        shape: Sequence[int],
        pair: Pair | None,
        patch: np.ndarray | None,
        exact: np.ndarray,
        noisy: np.ndarray,
    ) -> Site:
        """exact, noisy: float64[CANDIDATES, n], r of codes or values of an output at `places`, in float64 and in the
        graph's arithmetic."""
        choice = choose(exact, pair)
        if pair is not None:
            low, high = pair.limits
            exact, noisy = (np.clip(r, low - 1, high + 1) for r in (exact, noisy))
        slack = NOISE * float(np.abs(exact - noisy).max(initial=0.0)) + LEAST * float(np.abs(exact).max(initial=0.0))
        kept = np.take_along_axis(exact, choice[None].astype(np.int64), 0)[0]
        apart = np.abs(exact - noisy)
        if pair is None:
            noise = float(np.sqrt(np.square(apart).mean())) if apart.size else 0.0
            return cls(name, tuple(shape), patch, choice, kept.astype(np.float32), slack, noise)
        values = np.rint((kept - pair.limits[0] + 1) * STEP).astype(np.uint16)
        return cls(name, tuple(shape), patch, choice, values, slack, float(apart.mean()) if apart.size else 0.0)

    def compare(self, found: np.ndarray, pair: Pair | None) -> dict[str, Any]:
        """off: the largest distance from PyTorch's value beyond rounding, in steps (of an output: in its unit); slack: what is
        allowed; share: of the places that are beyond it; passed: none is, and on average they are no further than the noise."""
        at = np.take_along_axis(places(found.size), self.choice[None].astype(np.int64), 0)[0]
        values = found.ravel()[at].astype(np.float64)
        if pair is None:
            beyond = np.abs(values - self.values.astype(np.float64))
            least = LEAST * float(np.abs(self.values).max(initial=0.0))
            slack = self.slack + least
            typical = not values.size or float(np.sqrt(np.square(beyond).mean())) <= NOISE * self.noise + least
        else:
            low, high = pair.limits
            r = np.clip(self.values / STEP + low - 1, low, high)
            beyond = np.abs(values - r) - 0.5
            slack = self.slack + 0.5 / STEP
            # A value that moves by d crosses a rounding boundary with probability d.
            expected = NOISE * self.noise * values.size
            typical = int((beyond > 0.5 / STEP).sum()) <= expected + 5 * np.sqrt(expected) + 5
        bad = ~(beyond <= slack)  # NaN is not within any tolerance
        largest = float(np.where(np.isfinite(beyond), beyond, np.inf).max(initial=0.0))
        return {
            "off": min(max(largest, 0.0), 1e30),
            "slack": slack,
            "share": float(bad.mean()) if bad.size else 0.0,
            "passed": not bad.any() and bool(typical),
        }

    def pack(self) -> dict[str, np.ndarray]:
        """Arrays for verification.npz."""
        arrays = {
            "shape": np.array(self.shape, np.int64),
            "choice": self.choice,
            "values": self.values,
            "slack": np.array([self.slack, self.noise], np.float64),
        }
        return arrays if self.patch is None else {**arrays, "patch": self.patch}

    @classmethod
    def unpack(cls, name: str, arrays: Mapping[str, np.ndarray]) -> Site:
        """Raises `KeyError` if something is missing."""
        shape = tuple(int(n) for n in arrays["shape"])
        return cls(name, shape, arrays.get("patch"), arrays["choice"], arrays["values"], *map(float, arrays["slack"]))


def groups(cut: Cut, sizes: Mapping[str, int], budget: int = BUDGET) -> Iterator[list[str]]:
    """The sites in an order and in groups whose codes take `budget` bytes at most (one site's may take more)."""
    group: list[str] = []
    held: set[str] = set()
    for site in cut.sites:
        needs = {*cut.takes(site), f"{site} itself"}
        if group and sum(sizes.get(name.removesuffix(" itself"), 0) for name in held | needs) > budget:
            yield group
            group, held = [], set()
        group.append(site)
        held |= needs
    if group:
        yield group


class Runner:
    """Runs a graph's segments in ONNX Runtime. optimized: with its optimizer's rewrites of float operators."""

    def __init__(self, cut: Cut, sizes: Mapping[str, int], threads: int = 0, optimized: bool = False) -> None:
        from qat.engine.onnxruntime_backend import PlainGraph

        self._pieces: list[tuple[Any, dict[str, str]]] = []
        for group in groups(cut, sizes):
            graph, _, names = cut.segments(group)
            self._pieces.append((PlainGraph(graph, threads, optimized), names))

    def run(self, codes: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Arrays by name (codes; inputs of the graph in its types) → each site with its codes or values."""
        for graph, names in self._pieces:
            found = graph.run({name: codes[name].astype(spec.dtype, copy=False) for name, spec in graph.inputs.items()})
            for site, name in names.items():
                yield site, found.pop(name)


def check_sites(
    cut: Cut,
    sites: Mapping[str, Site],
    feeds: Mapping[str, np.ndarray],
    codes: Mapping[str, np.ndarray] | None = None,
    runner: Runner | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs every site's segment and compares.

    Args:
        cut: the graph.
        sites: the reference of each of its sites.
        feeds: the graph's inputs.
        codes: inputs of the segments; None for the sites' patches, repeated.
        runner: `runner_of` these; None for one with the optimizer off.

    Returns:
        for each site what `Site.compare` says, in the graph's order.

    Raises:
        UserError: the graph's sites differ from the reference's.
    """
    if strange := sorted(set(cut.sites) ^ set(sites)):
        raise UserError(f"found {len(strange)} sites in the graph or in the reference only: {', '.join(strange[:3])}")
    if codes is None:
        codes = {name: tile(site.patch, site.shape) for name, site in sites.items() if site.patch is not None}
    runner = runner or runner_of(cut, sites)
    return {name: sites[name].compare(found, cut.pairs.get(name)) for name, found in runner.run({**feeds, **codes})}


def runner_of(cut: Cut, sites: Mapping[str, Site], threads: int = 0, optimized: bool = False) -> Runner:
    """A `Runner` of a graph with these sites, for `check_sites`."""
    sizes = {name: int(np.prod(site.shape)) * (1 if name in cut.pairs else 4) for name, site in sites.items()}
    return Runner(cut, sizes, threads, optimized)


def grid_problems(cut: Cut, expected: Sequence[Mapping[str, Any]]) -> list[str]:
    """Differences between a graph's activation scales and zero points and those in a manifest's sites."""
    problems = []
    known = {entry["tensor"]: entry for entry in expected}
    for name in sorted(set(known) ^ set(cut.pairs)):
        problems.append(f"{name}: a quantizer that only {'the manifest' if name in known else 'the graph'} has")
    for name, pair in cut.pairs.items():
        if name not in known:
            continue
        grids = [("QuantizeLinear", pair.scale, pair.zero)]
        grids += [("DequantizeLinear", scale, zero) for codes, scale, zero in cut.back if codes == name]
        for operator, scale, zero in grids:
            found = {"scale": scale.ravel().tolist(), "zero_point": zero.ravel().tolist()}
            for key, values in found.items():
                wanted = known[name][key]
                if values != list(wanted):
                    problems.append(
                        f"{known[name]['module']}: {operator}: found {key.replace('_', ' ')} {_short(values)}, the "
                        f"manifest has {_short(wanted)}"
                    )
        if pair.dtype != known[name]["dtype"]:
            problems.append(
                f"{known[name]['module']}: found codes in {pair.dtype}, the manifest has {known[name]['dtype']}"
            )
    return problems


def _short(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.9g}" for value in values[:3]) + (", …" if len(values) > 3 else "")


def site_line(entry: Mapping[str, Any], module: str) -> str:
    """A site's failure in words."""
    unit = "steps" if entry["codes"] else "(absolute)"
    if entry["share"] == 0:
        return f"{module}: on the same inputs found values further from PyTorch's, on average, than rounding explains"
    return (
        f"{module}: on the same inputs found values up to {entry['off']:.3g} {unit} from PyTorch's beyond rounding at "
        f"{entry['share']:.1%} of the places, at most {entry['slack']:.2g} expected"
    )

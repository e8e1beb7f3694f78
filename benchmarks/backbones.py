"""Sixty timm backbones, drawn by a seed: quantized, exported in every flavour, verified.

    python benchmarks/backbones.py --seed 15 --count 60 --out runs/backbones

One network from each of timm's architecture files, in a random order, and then a second from each, until there are enough: of those
that give feature maps and have at most 60 million parameters. Each runs in a process of its own, with random weights whose
batch norms have seen noise. Writes backbones.json as it goes (a run that was stopped goes on) and prints a table.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

SIZE = (224, 224)  # that a network is drawn for
SIZES = ((96, 96), SIZE)  # the first that it runs at is used, else its own: every site of the graph is checked
MOST_PARAMETERS = 60e6
SECONDS = 900


def drawn(seed: int, count: int) -> list[str]:
    """Names of timm models."""
    from qat.families.bevfusion.networks.backbone import build_backbone  # before timm: it prepares torchvision

    import timm  # isort: skip
    import torch  # isort: skip

    rng = random.Random(seed)  # noqa: S311  # a draw of names
    by_module: dict[str, list[str]] = {}
    for name in sorted(timm.list_models()):
        if not name.startswith("test_"):
            by_module.setdefault(timm.models.model_entrypoint(name).__module__, []).append(name)
    order = sorted(by_module)
    rng.shuffle(order)
    for names in by_module.values():
        rng.shuffle(names)
    found: list[str] = []
    while len(found) < count:
        for module in order:
            while by_module[module] and len(found) < count:
                name = by_module[module].pop()
                try:
                    with torch.device("meta"), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        network = build_backbone(config_of(name), SIZE)
                except Exception:  # noqa: S112  # no feature maps, not at this size, no NCHW: not a backbone of ours
                    continue
                if sum(p.numel() for p in network.parameters()) <= MOST_PARAMETERS:
                    found.append(name)
                    break
        if not any(by_module.values()):
            break
    return found


def config_of(name: str) -> dict[str, Any]:
    """A backbone's config: its last two stages."""
    import qat.families.bevfusion.networks  # noqa: F401  # before timm: it prepares torchvision

    import timm  # isort: skip
    import torch  # isort: skip

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stages = len(timm.create_model(name, pretrained=False, features_only=True).feature_info)
    return {
        "type": "timm",
        "model_name": name,
        "out_indices": [max(stages - 3, 0), max(stages - 2, 0)] if stages > 2 else [stages - 1],
    }


def runs_at(name: str) -> tuple[Any, tuple[int, int]]:
    """A network in eval mode, and the first of `SIZES` that it takes."""
    import torch

    from qat.families.bevfusion.networks.backbone import build_backbone  # before timm: it prepares torchvision

    import timm  # isort: skip

    native = timm.get_pretrained_cfg_value(name, "input_size") or (3, *SIZE)
    sizes = (*SIZES, (int(native[1]), int(native[2])))
    for size in sizes:
        try:
            network = build_backbone(config_of(name), size).eval()
            with torch.no_grad():
                network(torch.zeros(2, 3, *size))
            return network, size
        except Exception:
            if size == sizes[-1]:
                raise
    raise AssertionError


def float_errors(network: Any, image: Any, expected: Any, found: Any) -> tuple[float, float]:
    """Largest relative error of our float form, and of the network itself, beside it in float64 (a network with random weights may be
    all noise in float32); where it does not run in float64, beside itself."""
    import torch

    def largest(outputs: Any, exact: Any) -> float:
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs, exact, strict=True))

    try:
        with torch.no_grad():
            exact = copy.deepcopy(network).double()(image.double())
    except RuntimeError:
        exact = expected
    return largest(found, exact), largest(expected, exact)


def one(name: str) -> dict[str, Any]:
    """What became of a network."""
    import torch
    from torch import nn

    from qat.core.errors import UserError
    from qat.export import export_module
    from qat.lean import quantize
    from qat.lean.flavours import FLAVOURS

    torch.manual_seed(0)
    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name}
    begun = time.monotonic()
    try:
        network, size = runs_at(name)
        row["size"] = size[0]
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        coarse = torch.randn(3, 2, 3, 12, 12)
        images = [nn.functional.interpolate(c, size=size, mode="bilinear") for c in coarse]
        quantized = quantize(network, (images[0],), data=images[:2])
        with torch.no_grad():
            quantized.example_inputs = (images[2][:1],)
            found, expected = quantized.in_flavour("tensorrt"), network(images[2][:1])
        from qat.lean.modes import quantizers_off

        with torch.no_grad(), found, quantizers_off(quantized):
            floats = quantized(images[2][:1])
        row["float_error"], row["own_error"] = float_errors(network, images[2][:1], expected, floats)
        row["flavours"] = {}
        for flavour in FLAVOURS:
            quantized.use(flavour)
            with tempfile.TemporaryDirectory() as folder:
                report = export_module(quantized, Path(folder) / "network.onnx")
            worst = min(report.outputs.values(), key=lambda entry: entry["sqnr_db"] - entry["tolerance_db"])
            summary = quantized.summary()
            row["flavours"][flavour] = {
                "passed": report.passed,
                "sites": report.sites,
                "failures": report.failures[:3],
                "sqnr_db": worst["sqnr_db"],
                "quantization_db": worst["quantization_db"],
                "int8_layers": len(summary.int8),
                "float": len(summary.floats),
                "int8_share": summary.int8_share,
            }
        good = row["float_error"] < max(1e-3, 2 * row["own_error"]) and all(
            entry["passed"] for entry in row["flavours"].values()
        )
        row["outcome"] = "works" if good else "out of tolerance"
    except UserError as error:
        row["outcome"] = "refused"
        row["error"] = str(error)
    except Exception as error:
        import traceback

        row["outcome"] = "traceback"
        row["error"] = f"{type(error).__name__}: {error}"[:500]
        row["traceback"] = traceback.format_exc()[-2000:]
    row["seconds"] = round(time.monotonic() - begun, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/backbones"))
    parser.add_argument("--only", nargs="*", help="names of timm models, instead of drawing them")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one)))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "backbones.json"
    rows: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    names = given.only or drawn(given.seed, given.count)
    for n, name in enumerate(names):
        if name not in rows:
            command = [sys.executable, __file__, "--one", name]
            try:
                run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
                lines = run.stdout.strip().splitlines()
                rows[name] = (
                    json.loads(lines[-1])
                    if run.returncode == 0 and lines
                    else {"name": name, "outcome": "died", "error": run.stderr[-500:]}
                )
            except subprocess.TimeoutExpired:
                rows[name] = {"name": name, "outcome": "too slow", "error": f"over {SECONDS} s"}
            file.write_text(json.dumps(rows, indent=1))
        row = rows[name]
        print(f"{n + 1:3} {name:40} {row['outcome']:18} {row.get('error', '')[:150]}", flush=True)
    chosen = [rows[name] for name in names]
    print(
        "\n| network | INT8 layers | float | INT8 share | quantization, dB | file beside simulation, dB |\n|---|---|---|---|---|---|"
    )
    for row in chosen:
        if row["outcome"] == "works":
            own = row["flavours"]["tensorrt"]
            beside = ", ".join(f"{entry['sqnr_db']:.0f}" for entry in row["flavours"].values())
            print(
                f"| {row['name']} | {own['int8_layers']} | {own['float']} | {own['int8_share']:.1%} | "
                f"{own['quantization_db']:.0f} | {beside} |"
            )
    print()
    for row in chosen:
        if row["outcome"] != "works":
            failed = [
                f"{name}: {entry['failures'][:1]}"
                for name, entry in row.get("flavours", {}).items()
                if not entry["passed"]
            ]
            print(f"- {row['name']}: {row['outcome']}; {row.get('error') or ', '.join(failed)}")
    print(f"\n{sum(row['outcome'] == 'works' for row in chosen)} of {len(chosen)} work")


if __name__ == "__main__":
    main()

"""Makes tests/calibrate/schema2.json: PTQ checkpoints of schema 2, of small seeded networks, as bevqat wrote them before it traced
with torch.export (commit 91f3d17), with the maps that it computed.

    git worktree add ../before 91f3d17 && PYTHONPATH=../before python tests/make_schema2.py tests/calibrate/schema2.json

`tests/calibrate/test_old_checkpoints.py` makes the networks again from the seed, and reads the rest from the file.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qat.families.bevfusion.detector import CameraBEVDetector, build_model

# Backbones whose quantizers were named by the numbers of functions (quant_matmul_3, quant_mul_1, quant_add), and their channels.
CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "resnet": ({"type": "ResNet", "depth": 18, "out_indices": [1, 2]}, [128, 256]),
    "swin": (
        {
            "type": "SwinTransformer",
            "embed_dims": 8,
            "depths": [1, 1, 2],
            "num_heads": [1, 2, 2],
            "out_indices": [1, 2],
        },
        [16, 32],
    ),
    "mobilenet": ({"type": "timm", "model_name": "mobilenetv3_small_050", "out_indices": [2, 3]}, [16, 24]),
}
TRAINED, GROWTH = "swin", 1.01


def config_of(name: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """`base`, tests/conftest.py's small config, with another backbone."""
    config = copy.deepcopy(dict(base))
    backbone, channels = CASES[name]
    camera = config["model"]["encoders"]["camera"]
    camera["backbone"] = copy.deepcopy(backbone)
    camera["neck"].update(in_channels=list(channels), num_outs=1)
    return config


def detector_of(config: Mapping[str, Any]) -> CameraBEVDetector:
    """With seeded weights that keep a signal's size, and batch norms that do something; nothing is computed for it."""
    torch.manual_seed(0)
    model = build_model(copy.deepcopy(dict(config)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.7, 1.4)
            nn.init.uniform_(module.weight, 0.7, 1.3)
    return model.eval()


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of names and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


MAPS = ("reg", "height", "dim", "rot", "vel", "heatmap")


def flat(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Head maps by `task.name`."""
    split = [(name.rpartition("_"), value) for name, value in tensors.items()]
    return {f"{task}.{name}": value for (name, _, task), value in split if name in MAPS}


def packed(value: torch.Tensor) -> dict[str, Any]:
    """A float32 tensor in JSON."""
    array = value.detach().contiguous().numpy()
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode()}


def unpacked(value: Mapping[str, Any]) -> torch.Tensor:
    """`packed`'s tensor."""
    array = np.frombuffer(base64.b64decode(value["float32"]), np.float32).reshape(value["shape"])
    return torch.from_numpy(array.copy())


def _trained(quantized: Any, model: CameraBEVDetector, frame: Any) -> dict[str, Any]:
    """What a checkpoint of trained weights holds beside, all of them grown by a hundredth for training: the names of the weights,
    and those biases that the corrections went into."""
    from qat.calibrate.checkpoint import save_ptq
    from qat.model.runners import run_frame

    before = set(quantized.weights())
    shifts = {
        path for path, layer in quantized.parts.named_modules() if getattr(layer, "background_shift", None) is not None
    }
    quantized.absorb_background()
    with torch.no_grad():
        for parameter in quantized.parts.parameters():
            parameter.mul_(GROWTH)
        rounded = flat(run_frame(quantized, frame))
    with tempfile.TemporaryDirectory() as folder:
        save_ptq(Path(folder) / "qat.pth", quantized, model, {"method": "mse", "frames": 2}, trained=True)
        checkpoint = torch.load(Path(folder) / "qat.pth", weights_only=True)
    assert shifts and before <= set(checkpoint["weights"])
    return {
        "trained": {
            "names": list(checkpoint["weights"]),
            "recipe": checkpoint["recipe"],
            "biases": {f"{path}.bias": packed(checkpoint["weights"][f"{path}.bias"]) for path in sorted(shifts)},
            "int8_sha256": digest(rounded),
        }
    }


def main(out: str) -> None:
    """Writes the file."""
    import importlib.util

    from qat.calibrate import calibrate
    from qat.calibrate.checkpoint import save_ptq
    from qat.families.bevfusion.frames import random_frame
    from qat.families.bevfusion.settings import pipeline_settings
    from qat.model.runners import run_frame

    spec = importlib.util.spec_from_file_location("small", Path(__file__).parent / "conftest.py")
    assert spec is not None and spec.loader is not None
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    torch.set_num_threads(1)
    cases = {}
    for name in CASES:
        config = config_of(name, small._config())
        model = detector_of(config)
        settings = pipeline_settings(config)
        frames = [random_frame(settings, seed) for seed in (1, 2, 3)]
        for seed, frame in enumerate(frames):
            frame.token = f"frame{seed}"
        quantized, _ = calibrate(model, frames[:2], "mse", by_layer=[("decoder.*", "max"), ("head.*", "max")])
        with tempfile.TemporaryDirectory() as folder:
            save_ptq(Path(folder) / "ptq.pth", quantized, model, {"method": "mse", "frames": 2})
            checkpoint = torch.load(Path(folder) / "ptq.pth", weights_only=True)
        with torch.inference_mode():
            exact, rounded = (flat(run_frame(network, frames[2])) for network in (model, quantized))
        state = checkpoint.pop("state_dict")
        checkpoint.pop("config")
        for section in ("amax", "equalized"):
            checkpoint[section] = {
                path: value.item() if value.ndim == 0 else packed(value.float())
                for path, value in checkpoint[section].items()
            }
        trained = {} if name != TRAINED else _trained(quantized, model, frames[2])
        cases[name] = {
            **trained,
            "checkpoint": checkpoint,
            "weights_sha256": digest(state),
            "float_sha256": digest(exact),
            "int8_sha256": digest(rounded),
            "int8": {path: packed(value) for path, value in rounded.items() if path == "0.heatmap"},
        }
    Path(out).write_text(json.dumps(cases, indent=0) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

"""Random detectors that compute something."""

import copy

import pytest
import torch
from torch import nn

from qat.families.bevfusion.random_init import random_model
from qat.model.runners import flow_for, run_frame

BACKBONES = {
    "resnet": ({"type": "timm", "model_name": "resnet18", "out_indices": [2, 3]}, [128, 256]),
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
    # layer scales that timm starts at 1e-6
    "convnext": ({"type": "timm", "model_name": "test_convnext", "out_indices": [1, 2]}, [32, 48]),
}


@pytest.fixture(params=list(BACKBONES))
def config(request, tiny_config):
    backbone, channels = BACKBONES[request.param]
    made = copy.deepcopy(tiny_config)
    made["model"]["encoders"]["camera"]["backbone"] = backbone
    made["model"]["encoders"]["camera"]["neck"]["in_channels"] = channels
    return made


def test_activations_neither_explode_nor_die(config, tiny_frames):
    model = random_model(config)
    outputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.LayerNorm):
            module.register_forward_hook(lambda *a, name=name: outputs.__setitem__(name, a[2].detach()))
    with torch.inference_mode():
        first, second = (run_frame(model, frame) for frame in tiny_frames[:2])
    assert not model.training and len(outputs) > 20
    for name, x in outputs.items():
        assert 0.01 < float(x.std()) < 30, name
    for name in flow_for(model).plan.outputs:  # what is seen decides what comes out
        assert float((first[name] - second[name]).std()) > 0.02 * float(first[name].std()), name


def test_no_residual_branch_is_dead(config):
    for name, parameter in random_model(config).named_parameters():
        if parameter.dim() == 1 and parameter.requires_grad and not name.endswith("bias"):
            assert float(parameter.detach().abs().max()) > 0.1, name


def test_a_seed_gives_its_weights_and_leaves_torchs_generator_alone(tiny_config):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    a, b, other = random_model(tiny_config, 1), random_model(tiny_config, 1), random_model(tiny_config, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.decoder["neck"].fuse[0].weight, other.decoder["neck"].fuse[0].weight)


def test_batch_norms_have_the_statistics_of_the_frames(tiny_config, tiny_frames):
    model = random_model(tiny_config, frames=tiny_frames)
    norm = model.encoders["camera"]["backbone"].bn1
    assert norm.momentum == 0.1 and int(norm.num_batches_tracked) == len(tiny_frames)
    seen = torch.stack([torch.from_numpy(frame.img) for frame in tiny_frames])
    with torch.inference_mode():
        maps = torch.stack([model.encoders["camera"]["backbone"].conv1(images) for images in seen])
    expected = torch.stack([x.mean((0, 2, 3)) for x in maps]).mean(0)
    assert torch.allclose(norm.running_mean, expected, atol=1e-5)

"""Makes tests/models/modelopt.pth with NVIDIA ModelOpt itself (0.47.0), which the tests do without: pip install
nvidia-modelopt torch, then python tests/make_modelopt.py tests/models/modelopt.pth"""

import sys

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from torch import nn

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
frames = [torch.randn(1, 3, 8, 8) for _ in range(2)]
mtq.quantize(network, mtq.INT8_DEFAULT_CFG, lambda model: [model(frame) for frame in frames])
mtq.disable_quantizer(network, "4.*")
mto.save(network, sys.argv[1])

"""Folds batch norm into the convolution before it.

    before  x ─► conv ─► bn ─► y          after  x ─► conv' ─► y

w' = w·γ/√(σ² + ε), b' = (b − μ)·γ/√(σ² + ε) + β for each output channel (Jacob et al., CVPR 2018, §3.2). It comes
before calibration: a quantizer must see the weights that the engine will round.
"""

from __future__ import annotations

import copy

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qat.lean.trace import replace_module, submodule

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold_batch_norm(graph: fx.GraphModule) -> int:
    """Folds every batch norm whose only input is a convolution that feeds nothing else. Returns how many.

    The modules that it changes are copies: the network that was traced keeps its own.
    """
    folded = 0
    for node in list(graph.graph.nodes):
        norm = submodule(graph, node)
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        source = node.args[0]
        conv = submodule(graph, source)
        if not isinstance(conv, CONVOLUTIONS) or len(source.users) != 1:
            continue
        transpose = isinstance(conv, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        replace_module(graph, source.target, fuse_conv_bn_eval(conv, norm, transpose=transpose))
        activation = getattr(norm, "act", None)  # timm's BatchNormAct2d carries one
        if activation is None or isinstance(activation, nn.Identity):
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
        else:
            replace_module(graph, node.target, copy.deepcopy(activation))
        folded += 1
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return folded

"""Ways to damage an INT8 graph at a site: an activation's QuantizeLinear, or an output. For the controls of verification.

Each function takes an `Opened` graph and a site, changes what is between the codes above the site and the site's own, and
returns whether there was anything to change: a pooling has no weights.
"""

from collections import defaultdict

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qat.core.onnx_cut import Cut

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Opened:
    """A graph that is changed in place; constants are copied before they change, so that nothing else changes with them."""

    def __init__(self, data):
        self.cut = Cut(data)
        self.model = onnx.load_from_string(data)
        self.graph = self.model.graph
        self.initializers = {value.name: value for value in self.graph.initializer}
        for node in [n for n in self.graph.node if n.op_type == "Constant"]:
            value = onnx.TensorProto()
            value.CopyFrom(node.attribute[0].t)
            value.name = node.output[0]
            self.initializers[value.name] = value
            self.graph.node.remove(node)
            self.graph.initializer.append(value)
        self.initializers = {value.name: value for value in self.graph.initializer}
        self.producer = {name: node for node in self.graph.node for name in node.output}
        self.readers = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)

    def bytes(self):
        return self.model.SerializeToString()

    def value(self, name):
        return numpy_helper.to_array(self.initializers[name])

    def change(self, node, index, array):
        """A node's constant input becomes another, for this node alone."""
        name = f"{node.input[index]}/changed/{len(self.initializers)}"
        value = numpy_helper.from_array(np.asarray(array), name)
        self.graph.initializer.append(value)
        self.initializers[name] = self.graph.initializer[-1]
        node.input[index] = name

    def segment(self, site):
        """The nodes of a site's segment, its QuantizeLinear among them."""
        pairs = self.cut.pairs
        stack = list(self.producer[site].input) if site in pairs else [site]
        nodes = [self.producer[site]] if site in pairs else []
        seen = set()
        while stack:
            name = stack.pop()
            if name in seen or name not in self.producer or name in pairs:
                continue
            seen.add(name)
            nodes.append(self.producer[name])
            stack += self.producer[name].input
        return nodes

    def weighted(self, site):
        """(node, input index, axis of output channels) of each stored weight of the segment: the node that holds it."""
        found = []
        for node in self.segment(site):
            if node.op_type not in WEIGHTED:
                continue
            index, holder = 1, node
            axis = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}.get(node.op_type)
            if axis is None:
                axis = 0 if next((a.i for a in node.attribute if a.name == "transB"), 0) else 1
            while holder.input[index] in self.producer:
                holder, index = self.producer[holder.input[index]], 0
                if holder.op_type == "Transpose":
                    axis = 1 - axis if axis in (0, 1) else 0
            if holder.input[index] in self.initializers:
                found.append((node, holder, index, axis))
        return found


def _steps(opened, node, holder, values, axis):
    """The scale of a weight's codes, to divide by; 1 for a weight that is stored as codes."""
    if values.dtype.kind == "i":
        return np.float32(1)
    quantize = holder if holder.op_type == "QuantizeLinear" else None
    if quantize is None:  # a float layer: five bits of its own range
        other = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
        return np.maximum(np.abs(values).max(other, keepdims=True), 1e-9) / np.float32(127)
    scale = opened.value(quantize.input[1]).astype(np.float32)
    shape = [1] * values.ndim
    shape[next((a.i for a in quantize.attribute if a.name == "axis"), 1)] = -1
    return scale.reshape(shape) if scale.size > 1 else scale


def weights_to_five_bits(opened, site):
    changed = False
    for node, holder, index, axis in opened.weighted(site):
        values = opened.value(holder.input[index])
        step = _steps(opened, node, holder, values, axis)
        codes = np.rint(values / step)
        coarse = np.clip(np.rint(codes / 8) * 8, -128, 120) * step
        opened.change(holder, index, coarse.astype(values.dtype))
        changed = True
    return changed


def scale_doubled(opened, site):
    """Of the site's QuantizeLinear and of what reads its codes."""
    if site not in opened.cut.pairs:
        return False
    for node in [opened.producer[site], *opened.readers[site]]:
        if node.op_type.endswith("Linear"):
            scale = opened.value(node.input[1])
            opened.change(node, 1, (scale * 2).astype(scale.dtype))
    return True


def bias_lost(opened, site):
    changed = False
    for node, _, _, _ in opened.weighted(site):
        holder, index = node, 2
        if node.op_type == "MatMul":  # a convolution as a matrix product, or a linear layer
            added = [n for n in opened.readers[node.output[0]] if n.op_type == "Add"]
            if not added:
                continue
            holder = added[0]
            index = 1 - list(holder.input).index(node.output[0])
        elif len(node.input) < 3:
            continue
        while holder.input[index] in opened.producer:
            holder, index = opened.producer[holder.input[index]], 0
        if holder.input[index] not in opened.initializers:
            continue
        values = opened.value(holder.input[index])
        opened.change(holder, index, np.zeros_like(values))
        changed = True
    return changed


def channels_swapped(opened, site):
    """The first two output channels of each weight; where there is one, its first two input channels."""
    changed = False
    for _, holder, index, axis in opened.weighted(site):
        values = opened.value(holder.input[index])
        moved = np.moveaxis(values, axis, 0).copy()
        if len(moved) > 1:
            moved[[0, 1]] = moved[[1, 0]]
        elif moved.ndim > 1 and moved.shape[1] > 1:
            moved[:, [0, 1]] = moved[:, [1, 0]]
        else:
            continue
        opened.change(holder, index, np.ascontiguousarray(np.moveaxis(moved, 0, axis)))
        changed = True
    return changed


def zero_points_off_by_one(opened, site):
    if site not in opened.cut.pairs:
        return False
    for node in [opened.producer[site], *opened.readers[site]]:
        if node.op_type.endswith("Linear"):
            zero = opened.value(node.input[2])
            opened.change(node, 2, (zero + zero.dtype.type(1)).astype(zero.dtype))
    return True


def noise_of_six_steps(opened, site, shape):
    """±6 steps of what the site rounds; of an output, ±6/127 of a value of one."""
    random = np.random.default_rng(0)
    sign = random.integers(0, 2, shape).astype(np.float32) * 2 - 1
    if site in opened.cut.pairs:
        quantize = opened.producer[site]
        scale = opened.value(quantize.input[1])
        noise = (sign * 6 * np.float32(scale.max())).astype(scale.dtype)
        name = f"{site}/noise"
        opened.graph.initializer.append(numpy_helper.from_array(noise, name))
        add = helper.make_node("Add", [quantize.input[0], name], [f"{site}/noisy"])
        quantize.input[0] = f"{site}/noisy"
        opened.graph.node.insert(list(opened.graph.node).index(quantize), add)
        return True
    return False


KINDS = {
    "weights to 5 bits": weights_to_five_bits,
    "scale x2": scale_doubled,
    "bias lost": bias_lost,
    "channels swapped": channels_swapped,
    "zero point off by one": zero_points_off_by_one,
    "noise of 6 steps": noise_of_six_steps,
}


def damage(data, kind, sites, shapes):
    """The graph with this damage at each of these sites, and those of them that there was something to damage at.

    Sites share nodes (a convolution that two of them look at): a node is damaged once.
    """
    opened, done = Opened(data), []
    touched = set()
    for site in sites:
        weights = {node.output[0] for node, *_ in opened.weighted(site)}
        if kind in ("weights to 5 bits", "bias lost", "channels swapped") and weights & touched:
            done.append(site)  # by the site before it
            continue
        touched |= weights
        more = (shapes[site],) if kind == "noise of 6 steps" else ()
        if KINDS[kind](opened, site, *more):
            done.append(site)
    return opened.bytes(), done

"""Checks that the networks of a config fit each other: channels, strides and cells from the backbone to the head.

Each check raises `qat.core.validation.wrong` with the key and the expected value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qat.core.validation import wrong
from qat.families.bevfusion.grid import cells, depth_count
from qat.families.bevfusion.schema import MOST_CELLS, CameraConfig, CenterHead, DetectorConfig, ResNet, SwinTransformer

CAMERA, DECODER, HEAD = "model.encoders.camera", "model.decoder", "model.heads.object"
MOST_POINTS = 1 << 28


def check_sizes(config: CameraConfig) -> None:
    """Checks the camera branch and, for a whole detector, the decoder and head."""
    camera = config.model.encoders.camera
    neck, transform, where = camera.neck, camera.vtransform, f"{CAMERA}.vtransform"
    height, width = config.image_size
    if transform.image_size != [height, width]:
        raise wrong(f"{where}.image_size", f"the same as image_size, {[height, width]}")
    fh, fw = transform.feature_size
    if height % fh or width % fw or height // fh != width // fw:
        raise wrong(f"{where}.feature_size", f"image_size {[height, width]} divided by one whole stride")
    if transform.type == "DepthLSSTransform" and height // fh != 8:
        raise wrong(f"{where}.feature_size", f"stride 8, {[height // 8, width // 8]}: the stride of dtransform")
    grid = math.prod(cells(bound) for bound in (transform.xbound, transform.ybound, transform.zbound))
    for key, count in (("xbound", grid), ("dbound", depth_count(transform.dbound) * fh * fw)):
        if count > MOST_POINTS:
            raise wrong(f"{where}.{key}", f"at most {MOST_POINTS:,} grid cells, and as many frustum points")
    if neck.type == "SECONDFPN":
        _check_lengths(neck, ("in_channels", "out_channels", "upsample_strides"), f"{CAMERA}.neck")
    if isinstance(camera.backbone, ResNet):
        check_features(config, *_stages(camera.backbone, 64 if camera.backbone.depth < 50 else 256))
    elif isinstance(camera.backbone, SwinTransformer):
        check_features(config, *_stages(camera.backbone, camera.backbone.embed_dims))
    if transform.in_channels != _width(neck):
        raise wrong(f"{where}.in_channels", f"the neck's {_width(neck)} channels")
    for key, of in (("xbound", cells), ("ybound", cells), ("zbound", cells), ("dbound", depth_count)):
        if of(getattr(transform, key)) > MOST_CELLS:
            raise wrong(f"{where}.{key}", f"at most {MOST_CELLS:,} steps")
    if transform.dbound[0] <= 0:
        raise wrong(f"{where}.dbound", "depths above 0, in front of the camera")
    downsample, layers = transform.downsample, cells(transform.zbound)
    for key in ("xbound", "ybound"):
        if cells(getattr(transform, key)) % downsample and not transform.bevfusion_count:
            raise wrong(f"{where}.{key}", f"a number of steps divisible by downsample, {downsample}")
    if downsample > 1 and layers > 1:
        raise wrong(f"{where}.zbound", f"one step: downsample accepts {transform.out_channels} channels")
    if isinstance(config, DetectorConfig):
        size = [-(-cells(bound) // downsample) for bound in (transform.xbound, transform.ybound)]
        _check_decoder(config, transform.out_channels * layers, size, downsample)


def _stages(backbone: ResNet | SwinTransformer, width: int) -> tuple[list[int], list[int]]:
    """Channels and strides of a backbone's maps."""
    return [width * 2**stage for stage in backbone.out_indices], [4 * 2**stage for stage in backbone.out_indices]


def check_features(config: CameraConfig, channels: Sequence[int], strides: Sequence[int]) -> None:
    """Checks that a backbone's maps, with these channels and strides, fit the neck, and the neck's map the view transform."""
    neck, where = config.model.encoders.camera.neck, f"{CAMERA}.neck"
    if neck.in_channels != list(channels):
        raise wrong(f"{where}.in_channels", f"the channels of the backbone's maps, {list(channels)}")
    if neck.type == "GeneralizedLSSFPN":
        if neck.start_level > len(channels) - 2:
            raise wrong(f"{where}.start_level", f"below {len(channels) - 1}: the neck joins two maps")
        stride: float = strides[neck.start_level]
    else:
        outcomes = {s / up for s, up in zip(strides, neck.upsample_strides, strict=False)}
        if len(outcomes) != 1 or len(neck.upsample_strides) != len(strides):
            raise wrong(
                f"{where}.upsample_strides", f"one for each map, so that strides {list(strides)} become one stride"
            )
        stride = outcomes.pop()
    transform = config.model.encoders.camera.vtransform
    if [size * stride for size in transform.feature_size] != transform.image_size:
        expected = f"image_size {transform.image_size} at the neck's stride {stride:g}"
        raise wrong(f"{CAMERA}.vtransform.feature_size", expected)


def _width(neck: Any) -> int:
    """Channels of a neck's map."""
    return sum(neck.out_channels) if neck.type == "SECONDFPN" else neck.out_channels


def _check_lengths(network: Any, keys: Sequence[str], path: str) -> None:
    count = len(getattr(network, keys[0]))
    for key in keys[1:]:
        if len(getattr(network, key)) != count:
            raise wrong(f"{path}.{key}", f"as many as {keys[0]}, {count}")


def _check_decoder(config: DetectorConfig, channels: int, grid: Sequence[int], downsample: int) -> None:
    """Checks the sizes from the BEV grid to the head. channels, grid: of the BEV map after `downsample`."""
    backbone, neck = config.model.decoder.backbone, config.model.decoder.neck
    if backbone.in_channels != channels:
        raise wrong(f"{DECODER}.backbone.in_channels", f"the view transform's {channels} channels")
    if backbone.type == "SECOND":
        _check_lengths(backbone, ("out_channels", "layer_nums", "layer_strides"), f"{DECODER}.backbone")
        stages = list(zip(backbone.out_channels, backbone.layer_strides, strict=True))
    else:
        stages = [(width, stride) for _, width, stride in backbone.blocks]
    widths, sizes, size, total = [], [], list(grid), downsample
    totals: list[float] = []  # cells of the view transform for one of the stage's cells, along an axis
    for width, stride in stages:
        size = [-(-n // stride) for n in size]  # a 3×3 convolution with a stride rounds up
        total *= stride
        widths.append(width)
        sizes.append(size)
        totals.append(total)
    if neck.type == "LSSFPN":
        for index in neck.in_indices:
            if not -len(stages) <= index < len(stages):
                raise wrong(f"{DECODER}.neck.in_indices", f"indices of the backbone's {len(stages)} stages")
        wanted = [widths[index] for index in neck.in_indices]
        stride_out = totals[neck.in_indices[1]] / neck.scale_factor
    else:
        _check_lengths(neck, ("in_channels", "out_channels", "upsample_strides"), f"{DECODER}.neck")
        wanted = widths
        if len(neck.in_channels) == len(widths):
            brought = [
                [round(n * up) if up >= 1 else n // round(1 / up) for n in size]
                for size, up in zip(sizes, neck.upsample_strides, strict=True)
            ]
            if any(size != brought[0] for size in brought):
                expected = f"strides that resize {sizes} to one size; these give {brought}"
                raise wrong(f"{DECODER}.neck.upsample_strides", expected)
            stride_out = totals[0] / neck.upsample_strides[0]
    if neck.in_channels != wanted:
        raise wrong(f"{DECODER}.neck.in_channels", f"the channels of the backbone's maps, {wanted}")
    if config.model.heads.object.in_channels != _width(neck):
        raise wrong(f"{HEAD}.in_channels", f"the decoder's {_width(neck)} channels")
    _check_head(config, stride_out)


def _check_head(config: DetectorConfig, stride: float) -> None:
    """Checks that the tasks match the classes and have the options of their NMS, and that decoding places the cells of the
    head's map (`stride` cells of the view transform each, along an axis) where the BEV grid has them."""
    head, transform = config.model.heads.object, config.model.encoders.camera.vtransform
    if [name for task in head.tasks for name in task] != config.object_classes:
        raise wrong(f"{HEAD}.tasks", f"object_classes in their order, {config.object_classes}")
    _check_suppression(head)
    coder = head.bbox_coder
    for axis, (key, (low, _, step)) in enumerate((("x", transform.xbound), ("y", transform.ybound))):
        cell, voxel = step * stride, coder.voxel_size[axis]
        if not math.isclose(cell, coder.out_size_factor * voxel, rel_tol=1e-3):
            raise wrong(
                f"{HEAD}.bbox_coder.out_size_factor",
                f"{cell / voxel:g}: the head's cells are {cell:g} m along {key}, voxel_size is {voxel:g} m",
            )
        if not math.isclose(coder.pc_range[axis], low, abs_tol=1e-3):
            raise wrong(f"{HEAD}.bbox_coder.pc_range", f"to start where {key}bound starts, at {low:g}")


def _check_suppression(head: CenterHead) -> None:
    test, count = head.test_cfg, len(head.tasks)
    kinds = test.nms_type if isinstance(test.nms_type, list) else [test.nms_type]
    for kind in kinds:
        for key in ("min_radius",) if kind == "circle" else ("nms_thr", "pre_max_size"):
            if getattr(test, key) is None:
                raise wrong(f"{HEAD}.test_cfg.{key}", f"a value: nms_type {kind} needs it")
    for key in ("nms_type", "nms_scale", *(["min_radius"] if "circle" in kinds else [])):
        value = getattr(test, key)
        if isinstance(value, list) and len(value) != count:
            raise wrong(f"{HEAD}.test_cfg.{key}", f"a list of {count}, one for each task")
    for task, scales in zip(head.tasks, test.nms_scale if isinstance(test.nms_scale, list) else (), strict=False):
        if not isinstance(scales, list) or len(scales) != len(task):
            raise wrong(f"{HEAD}.test_cfg.nms_scale", f"a factor for each of {task}")

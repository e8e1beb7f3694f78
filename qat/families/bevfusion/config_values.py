"""What a config's values may be, and whether the networks that they describe fit each other.

`check_values` looks at each value by itself: its kind and its range. `check_sizes` follows channels, strides and cells from
the backbone to the head. Both name the key, what was found and what was expected.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qat.families.bevfusion.grid import cells, depth_count
from qat.families.bevfusion.schema import NULL

Fail = Callable[[str, object, str], Exception]  # key, what was found, what was expected → the error to raise
Rule = tuple[Callable[[Any], bool], str]

CAMERA = "model.encoders.camera"
HEAD = "model.heads.object"
# Set in the view transform's section of a model whose checkpoint has BEVFusion's count (`CameraBEVDetector.keep_cells`).
BEVFUSION_COUNT = "bevfusion_count"
# Far above any network's: beyond them a frustum or a grid fills the memory before anything else is noticed.
LARGEST = 1e6
MOST_PIXELS, MOST_CELLS, MOST_CHANNELS, MOST_LAYERS = 16_384, 4_096, 65_536, 1_000


def _is_whole(value: Any, low: int = 1, high: int = MOST_CHANNELS) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float = -math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST and value >= low


def whole(low: int = 1, high: int = MOST_CHANNELS) -> Rule:
    """A whole number from low to high."""
    return lambda value: _is_whole(value, low, high), f"a whole number from {low:,} to {high:,}"


def number(low: float = -math.inf, above: float | None = None) -> Rule:
    """A finite number."""
    words = "a number"
    if above is not None:
        return lambda value: _is_number(value) and value > above, f"{words} above {above:g}"
    return lambda value: _is_number(value, low), words + ("" if low == -math.inf else f", {low:g} or more")


def several(one: Rule, count: int | None = None, least: int = 1, most: int = MOST_LAYERS) -> Rule:
    """A list of what `one` accepts: of `count`, or from `least` to `most` of them."""

    def accepts(value: Any) -> bool:
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        fits = len(value) == count if count is not None else least <= len(value) <= most
        return fits and all(one[0](item) for item in value)

    how_many = f"{count}" if count is not None else f"a list of {least} or more"
    if one[1].startswith(("a number", "a whole number")):
        return accepts, f"{how_many} {one[1].removeprefix('a ').replace('number', 'numbers', 1)}"
    return accepts, f"{how_many} values, each {one[1]}"


def worded(rule: Rule, words: str) -> Rule:
    """The same rule in the words of what it is for."""
    return rule[0], words


def one_of(*values: object) -> Rule:
    """One of these values."""
    return lambda value: not isinstance(value, Mapping | list) and value in values, "one of " + ", ".join(
        map(str, values)
    )


def _increasing(value: Any) -> bool:
    good = several(whole(0, MOST_LAYERS))[0](value)
    return good and all(a < b for a, b in itertools.pairwise(value))


SECTION: Rule = (lambda value: isinstance(value, Mapping), "a section of keys and values")
TEXT: Rule = (lambda value: isinstance(value, str) and bool(value), "a name")
STAGES: Rule = (_increasing, "numbers of stages, from 0, the lowest first")
CHANNELS, WIDTHS = whole(), several(whole())
SIZE = several(whole(high=MOST_PIXELS), 2)
BOUND = several(number(), 3)
RANGE: Rule = (
    lambda value: several(number(), 6)[0](value) and all(value[i] < value[i + 3] for i in range(3)),
    "6 numbers, the lowest x, y, z and then the highest",
)
FEW = whole(high=MOST_LAYERS)
UPSAMPLE: Rule = (
    lambda value: (
        isinstance(value, Mapping)
        and set(value) <= {"mode", "align_corners"}
        and value.get("mode") in ("nearest", "bilinear")
        and value.get("align_corners") in ((None, False) if value["mode"] == "nearest" else (None, False, True))
    ),
    "mode nearest or bilinear, and align_corners true with bilinear alone",
)
BLOCKS: Rule = (
    lambda value: (
        several(several(CHANNELS, 3))[0](value) and all(max(block[0], block[2]) <= MOST_LAYERS for block in value)
    ),
    f"a list of [layers up to {MOST_LAYERS:,}, channels up to {MOST_CHANNELS:,}, stride]",
)

_TRANSFORM: dict[str, Rule] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "image_size": SIZE,
    "feature_size": SIZE,
    **dict.fromkeys(("xbound", "ybound", "zbound", "dbound"), BOUND),
}
# Of each type of network: the options that it needs, then those that it may have.
NEEDED: dict[str, dict[str, Rule]] = {
    "ResNet": {"depth": one_of(18, 34, 50, 101, 152), "out_indices": STAGES},
    "timm": {"model_name": TEXT, "out_indices": STAGES},
    "SwinTransformer": {},
    "GeneralizedLSSFPN": {"in_channels": several(whole(), least=2), "out_channels": CHANNELS},
    "SECONDFPN": {"in_channels": WIDTHS, "out_channels": WIDTHS, "upsample_strides": several(number(above=0))},
    "LSSTransform": _TRANSFORM,
    "DepthLSSTransform": _TRANSFORM,
    "GeneralizedResNet": {"in_channels": CHANNELS, "blocks": BLOCKS},
    "SECOND": {
        "in_channels": CHANNELS,
        "out_channels": WIDTHS,
        "layer_nums": several(whole(0, MOST_LAYERS)),
        "layer_strides": several(FEW),
    },
    "LSSFPN": {
        "in_indices": several(whole(-MOST_LAYERS, MOST_LAYERS), 2),
        "in_channels": several(whole(), 2),
        "out_channels": CHANNELS,
    },
    "CenterHead": {
        "in_channels": CHANNELS,
        "tasks": worded(several(several(TEXT)), "a list of the classes' names for each task"),
        "common_heads": SECTION,
        "bbox_coder": SECTION,
        "test_cfg": SECTION,
    },
}
ALLOWED: dict[str, dict[str, Rule]] = {
    "SwinTransformer": {
        "embed_dims": CHANNELS,
        "depths": several(FEW),
        "num_heads": several(FEW),
        "window_size": FEW,
        "mlp_ratio": number(above=0),
        "out_indices": STAGES,
    },
    "GeneralizedLSSFPN": {"start_level": whole(0, MOST_LAYERS), "num_outs": FEW, "upsample_cfg": UPSAMPLE},
    "LSSFPN": {"scale_factor": FEW},
    "CenterHead": {"share_conv_channel": CHANNELS, "num_heatmap_convs": FEW, "separate_head": SECTION},
}
PLAIN: dict[str, Rule] = {
    "model": SECTION,
    "model.encoders": SECTION,
    CAMERA: SECTION,
    "image_size": SIZE,
    "load_dim": whole(5, 100),
    "native_size": SIZE,
}
PLAIN_HEAD: dict[str, Rule] = {
    "model.decoder": SECTION,
    "model.heads": SECTION,
    "point_cloud_range": RANGE,
    "object_classes": (
        lambda value: several(TEXT)[0](value) and len(set(value)) == len(value),
        "a list of classes, each once",
    ),
    f"{HEAD}.separate_head.head_conv": CHANNELS,
    f"{HEAD}.separate_head.final_kernel": (lambda value: _is_whole(value, high=31) and value % 2 == 1, "an odd number"),
    f"{HEAD}.separate_head.init_bias": number(),
    f"{HEAD}.bbox_coder.pc_range": (
        lambda value: several(number(), least=2)[0](value),
        "2 or more numbers, the lowest x and y first",
    ),
    f"{HEAD}.bbox_coder.post_center_range": RANGE,
    f"{HEAD}.bbox_coder.voxel_size": several(number(above=0), least=2),
    f"{HEAD}.bbox_coder.out_size_factor": number(above=0),
    f"{HEAD}.bbox_coder.score_threshold": number(),
    f"{HEAD}.bbox_coder.max_num": whole(high=1_000_000),
    f"{HEAD}.test_cfg.post_max_size": whole(high=1_000_000),
    f"{HEAD}.test_cfg.pre_max_size": whole(high=1_000_000),
    f"{HEAD}.test_cfg.nms_thr": number(0),
    f"{HEAD}.test_cfg.min_radius": several(number(0)),
}
_LIMITS: Rule = (
    lambda value: number(above=0)[0](value) or several(number(above=0), 2)[0](value),
    "one or two numbers above 0",
)
_SHARES: Rule = (lambda value: several(number(0), 2)[0](value) and max(value) < 1, "two shares from 0 to below 1")
ANY: Rule = (lambda value: True, "anything")
FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
FALSE: Rule = (lambda value: value is False or value is None, "false: points and pictures are read without it")
AS_IT_IS = worded(FALSE, "false: test data is not augmented")
NOTHING: Rule = (lambda value: value is None, "null")
BEAMS: Rule = (lambda value: value is None or (_is_number(value) and value >= 32), "32 or null: all beams are read")
_XYZ: Rule = (
    lambda value: _is_whole(value, 3) or (isinstance(value, list | tuple) and list(value[:3]) == [0, 1, 2]),
    "3 or more, or a list that begins with 0, 1, 2: x, y and z",
)


def _only(wanted: float) -> Rule:
    """This number, by itself or throughout a list: what an augmentation that changes nothing has."""

    def accepts(value: Any) -> bool:
        return all(_is_number(v) and v == wanted for v in (value if isinstance(value, list | tuple) else [value]))

    return accepts, f"{wanted:g}: test data is not augmented"


_POINTS: dict[str, Rule] = {
    "load_dim": whole(3, 100),
    "use_dim": _XYZ,
    "reduce_beams": BEAMS,
    "load_augmented": NOTHING,
}
# Every key of a step that is known here: what is followed has a rule; ANY is for what a camera detector's input does not depend
# on (annotations, formats of tensors, keys that are collected). NEEDED_OF: those that must be there.
STEPS: dict[str, dict[str, Rule]] = {
    "LoadMultiViewImageFromFiles": {"to_float32": ANY, "color_type": one_of("unchanged", "color")},
    "LoadPointsFromFile": {**_POINTS, "coord_type": one_of("LIDAR"), "shift_height": FALSE, "use_color": FALSE},
    "LoadPointsFromMultiSweeps": {
        **_POINTS,
        "sweeps_num": whole(0, 1_000),
        "time_dim": one_of(4),
        "pad_empty_sweeps": FLAG,
        "remove_close": FLAG,
        "test_mode": FLAG,
    },
    "ImageAug3D": {
        "final_dim": SIZE,
        "resize_lim": (
            lambda value: _LIMITS[0](value) and max(value if isinstance(value, Sequence) else [value]) <= 16,
            "one or two numbers above 0 and at most 16",
        ),
        "bot_pct_lim": _SHARES,
        "rot_lim": _only(0),
        "rand_flip": FLAG,  # of training alone: is_train
        "is_train": AS_IT_IS,
    },
    "GlobalRotScaleTrans": {
        "resize_lim": _only(1),
        "rot_lim": _only(0),
        "trans_lim": _only(0),
        "is_train": AS_IT_IS,
    },
    "PointsRangeFilter": {"point_cloud_range": RANGE},
    "ImageNormalize": {"mean": several(number(), 3), "std": several(number(above=0), 3)},
    "LoadAnnotations3D": {
        f"with_{name}": ANY
        for name in (
            "bbox_3d",
            "label_3d",
            "attr_label",
            "mask_3d",
            "seg_3d",
            "bbox",
            "label",
            "mask",
            "seg",
            "bbox_depth",
        )
    },
    "LoadBEVSegmentation": dict.fromkeys(("dataset_root", "xbound", "ybound", "classes", "object_classes"), ANY),
    "LoadRadarPointsMultiSweeps": dict.fromkeys(
        (
            "load_dim",
            "use_dim",
            "sweeps_num",
            "pad_empty_sweeps",
            "remove_close",
            "test_mode",
            "file_client_args",
            "max_num",
            "compensate_velocity",
            "normalize",
            "filtering",
        ),
        ANY,
    ),
    "DefaultFormatBundle3D": dict.fromkeys(("classes", "class_names", "with_gt", "with_label"), ANY),
    "Collect3D": dict.fromkeys(("keys", "meta_keys", "meta_lis_keys"), ANY),
    "GTDepth": {"keyframe_only": ANY},
}
NEEDED_OF = {
    "ImageAug3D": ("final_dim", "resize_lim", "bot_pct_lim"),
    "ImageNormalize": ("mean", "std"),
    "LoadPointsFromMultiSweeps": ("sweeps_num",),
    "PointsRangeFilter": ("point_cloud_range",),
}


TRAINING: dict[str, Rule] = {
    "train_cfg.point_cloud_range": RANGE,
    "train_cfg.grid_size": several(whole(high=MOST_CELLS * 64), least=2),
    "train_cfg.voxel_size": several(number(above=0), least=2),
    "train_cfg.out_size_factor": whole(),
    "train_cfg.gaussian_overlap": number(0),
    "train_cfg.max_objs": whole(high=1_000_000),
    "train_cfg.min_radius": whole(0),
    "train_cfg.code_weights": several(number(0), least=8),
    "loss_bbox": SECTION,
}


def check_training(config: Mapping[str, Any], fail: Fail) -> None:
    """Raises what `fail` makes where the head lacks what training reads, or has something else there."""
    for key, (accepts, expected) in TRAINING.items():
        value = _at(config, f"{HEAD}.{key}", fail)
        if not accepts(value):
            raise fail(f"{HEAD}.{key}", value, expected)


def _at(config: Mapping[str, Any], path: str, fail: Fail) -> Any:
    """The value there, None where there is none; a key on the way that is no section is told."""
    value: Any = config
    keys = path.split(".")
    for n, key in enumerate(keys):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise fail(".".join(keys[:n]), value, SECTION[1])
        value = value.get(key)
    return value


def _check(config: Mapping[str, Any], rules: Mapping[str, Rule], fail: Fail) -> None:
    for path, (accepts, expected) in rules.items():
        value = _at(config, path, fail)
        if value is not None and not accepts(value):
            raise fail(path, value, expected)


def _check_network(config: Mapping[str, Any], path: str, fail: Fail) -> None:
    network = _at(config, path, fail)
    if network is None:
        return  # told as a missing key
    if not isinstance(network, Mapping):
        raise fail(path, network, SECTION[1])
    kind = network.get("type")
    if not isinstance(kind, str):
        return  # told as an unknown type
    needed, allowed = NEEDED.get(kind, {}), ALLOWED.get(kind, {})
    for key, (_, expected) in {**needed, **allowed}.items():
        if key in network and network[key] is None:  # only an absent key has its default
            raise fail(f"{path}.{key}", NULL, expected)
        if key in needed and key not in network:
            raise fail(f"{path}.{key}", None, expected)
    _check(config, {f"{path}.{key}": rule for key, rule in {**needed, **ALLOWED.get(kind, {})}.items()}, fail)


def check_steps(steps: Any, path: str, fail: Fail) -> None:
    """The test pipeline's steps: a list of sections, each with a type, and the values of those that are followed."""
    if not isinstance(steps, list | tuple) or not all(isinstance(step, Mapping) for step in steps):
        raise fail(path, steps, "a list of steps, each with a type")
    for n, step in enumerate(steps):
        if not isinstance(step.get("type"), str):
            raise fail(f"{path}.{n}.type", step.get("type"), "a step's name, such as ImageAug3D")
        known = STEPS.get(step["type"])
        if known is None:
            raise fail(f"{path}.{n}.type", step["type"], f"one of {', '.join(STEPS)}: other steps are not known here")
        for key in NEEDED_OF.get(step["type"], ()):
            if not known[key][0](step.get(key)):
                raise fail(f"{path}.{n}.{key}", step.get(key), known[key][1])
        for key, value in step.items():
            if key == "type":
                continue
            if key not in known:
                options = ", ".join(known) or "none"
                raise fail(
                    f"{path}.{n}.{key}", NULL if value is None else value, f"an option of {step['type']}: {options}"
                )
            accepts, expected = known[key]
            if not accepts(value):
                raise fail(f"{path}.{n}.{key}", NULL if value is None else value, expected)


def check_sections(config: Mapping[str, Any], fail: Fail, camera_alone: bool) -> None:
    """Raises what `fail` makes where something else stands for a section. camera_alone: as for `check_values`."""
    rules = PLAIN if camera_alone else {**PLAIN, **PLAIN_HEAD}
    _check(config, {path: rule for path, rule in rules.items() if rule is SECTION}, fail)


def check_values(config: Mapping[str, Any], fail: Fail, camera_alone: bool) -> None:
    """Raises what `fail` makes for a value of another kind, or out of range. camera_alone: looks at nothing but the camera
    branch and what its data is read with. After `check_sections`."""
    networks = [f"{CAMERA}.{name}" for name in ("backbone", "neck", "vtransform")]
    rules = dict(PLAIN)
    if not camera_alone:
        networks += ["model.decoder.backbone", "model.decoder.neck", HEAD]
        rules |= PLAIN_HEAD
    for path in networks:
        _check_network(config, path, fail)
    _check(config, rules, fail)
    if "load_dim" in config and config["load_dim"] is None:
        raise fail("load_dim", NULL, PLAIN["load_dim"][1])
    if camera_alone:
        return
    maps = _at(config, f"{HEAD}.common_heads", fail) or {}
    for name, shape in maps.items():
        if not several(FEW, 2)[0](shape):
            raise fail(f"{HEAD}.common_heads.{name}", shape, "[channels, convolutions]")
    test = _at(config, f"{HEAD}.test_cfg", fail) or {}
    if "nms_scale" in test and test["nms_scale"] is None:
        raise fail(f"{HEAD}.test_cfg.nms_scale", NULL, "numbers above 0")
    for scales in _listed(test.get("nms_scale")):
        if not (number(above=0)[0](scales) or several(number(above=0))[0](scales)):
            raise fail(f"{HEAD}.test_cfg.nms_scale", scales, "numbers above 0")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else () if value is None else (value,)


def backbone_maps(backbone: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
    """Channels and strides of a backbone's maps; None of timm's, which timm alone knows."""
    if backbone["type"] == "ResNet":
        stages = backbone["out_indices"]
        width = 64 if backbone["depth"] < 50 else 256
    elif backbone["type"] == "SwinTransformer":
        stages = backbone.get("out_indices", (0, 1, 2, 3))
        width = backbone.get("embed_dims", 96)
    else:
        return None
    return [width * 2**stage for stage in stages], [4 * 2**stage for stage in stages]


def check_features(camera: Mapping[str, Any], channels: Sequence[int], strides: Sequence[int], fail: Fail) -> None:
    """Whether a backbone's maps, of these channels and strides, fit the neck, and what that gives the view transform."""
    neck, where = camera["neck"], f"{CAMERA}.neck"
    if list(neck["in_channels"]) != list(channels):
        raise fail(
            f"{where}.in_channels", neck["in_channels"], f"the channels of the backbone's maps, {list(channels)}"
        )
    if neck["type"] == "GeneralizedLSSFPN":
        start = neck.get("start_level", 0) or 0
        if start > len(channels) - 2:
            raise fail(f"{where}.start_level", start, f"below {len(channels) - 1}: two maps are joined")
        stride: float = strides[start]
    else:
        outcomes = {s / up for s, up in zip(strides, neck["upsample_strides"], strict=False)}
        if len(outcomes) != 1 or len(neck["upsample_strides"]) != len(strides):
            raise fail(
                f"{where}.upsample_strides",
                neck["upsample_strides"],
                f"one for each map, that bring strides {list(strides)} to one",
            )
        stride = outcomes.pop()
    image, feature = camera["vtransform"]["image_size"], camera["vtransform"]["feature_size"]
    if [size * stride for size in feature] != list(image):
        expected = f"image_size {list(image)} at the neck's stride {stride:g}"
        raise fail(f"{CAMERA}.vtransform.feature_size", list(feature), expected)


def _width(neck: Mapping[str, Any]) -> int:
    """Channels of a neck's map."""
    out = neck["out_channels"]
    return sum(out) if neck["type"] == "SECONDFPN" else out


def check_sizes(config: Mapping[str, Any], fail: Fail, camera_alone: bool) -> None:
    """Raises what `fail` makes where the output of one network does not fit the next. After `check_values`."""
    camera = config["model"]["encoders"]["camera"]
    neck, transform = camera["neck"], camera["vtransform"]
    where = f"{CAMERA}.vtransform"
    if neck["type"] == "SECONDFPN":
        _check_lengths(neck, ("in_channels", "out_channels", "upsample_strides"), f"{CAMERA}.neck", fail)
    if (maps := backbone_maps(camera["backbone"])) is not None:
        check_features(camera, *maps, fail)
    if transform["in_channels"] != _width(neck):
        raise fail(f"{where}.in_channels", transform["in_channels"], f"the neck's {_width(neck)} channels")
    for key, count in (("xbound", cells), ("ybound", cells), ("zbound", cells), ("dbound", depth_count)):
        if count(transform[key]) > MOST_CELLS:
            raise fail(f"{where}.{key}", transform[key], f"at most {MOST_CELLS:,} steps")
    if transform["dbound"][0] <= 0:
        raise fail(f"{where}.dbound", transform["dbound"], "depths above 0, in front of the camera")
    downsample, layers = transform.get("downsample", 1), cells(transform["zbound"])
    for key in ("xbound", "ybound"):
        if cells(transform[key]) % downsample and not transform.get(BEVFUSION_COUNT):
            raise fail(f"{where}.{key}", transform[key], f"a number of steps that downsample, {downsample}, divides")
    if downsample > 1 and layers > 1:
        raise fail(
            f"{where}.zbound", transform["zbound"], f"one step: downsample takes {transform['out_channels']} channels"
        )
    if not camera_alone:
        grid = [-(-cells(transform[key]) // downsample) for key in ("xbound", "ybound")]
        _check_decoder(config, transform["out_channels"] * layers, grid, downsample, fail)


def _check_lengths(network: Mapping[str, Any], keys: Sequence[str], path: str, fail: Fail) -> None:
    for key in keys[1:]:
        if len(network[key]) != len(network[keys[0]]):
            raise fail(f"{path}.{key}", network[key], f"as many as {keys[0]}, {len(network[keys[0]])}")


def _check_decoder(config: Mapping[str, Any], channels: int, grid: Sequence[int], downsample: int, fail: Fail) -> None:
    """From the BEV grid, of so many channels and cells after `downsample`, to the head's boxes."""
    backbone, neck = (config["model"]["decoder"][name] for name in ("backbone", "neck"))
    where = "model.decoder"
    if backbone["in_channels"] != channels:
        raise fail(
            f"{where}.backbone.in_channels", backbone["in_channels"], f"the view transform's {channels} channels"
        )
    if backbone["type"] == "SECOND":
        _check_lengths(backbone, ("out_channels", "layer_nums", "layer_strides"), f"{where}.backbone", fail)
        stages = list(zip(backbone["out_channels"], backbone["layer_strides"], strict=True))
    else:
        stages = [(width, stride) for _, width, stride in backbone["blocks"]]
    widths, sizes, size, total = [], [], list(grid), downsample
    totals: list[float] = []  # cells of the view transform to one of the stage's, along an axis
    for width, stride in stages:
        size = [-(-n // stride) for n in size]  # a 3×3 convolution with a stride rounds up
        total *= stride
        widths.append(width)
        sizes.append(size)
        totals.append(total)
    if neck["type"] == "LSSFPN":
        for index in neck["in_indices"]:
            if not -len(stages) <= index < len(stages):
                raise fail(
                    f"{where}.neck.in_indices", neck["in_indices"], f"stages of the backbone, which has {len(stages)}"
                )
        wanted = [widths[index] for index in neck["in_indices"]]
        stride_out = totals[neck["in_indices"][1]] / (neck.get("scale_factor") or 1)
    else:
        _check_lengths(neck, ("in_channels", "out_channels", "upsample_strides"), f"{where}.neck", fail)
        wanted = widths
        if len(neck["in_channels"]) == len(widths):
            brought = [
                [round(n * up) if up >= 1 else n // round(1 / up) for n in size]
                for size, up in zip(sizes, neck["upsample_strides"], strict=True)
            ]
            if any(size != brought[0] for size in brought):
                expected = f"strides that bring {sizes} to one size; they give {brought}"
                raise fail(f"{where}.neck.upsample_strides", neck["upsample_strides"], expected)
            stride_out = totals[0] / neck["upsample_strides"][0]
    if list(neck["in_channels"]) != wanted:
        raise fail(f"{where}.neck.in_channels", neck["in_channels"], f"the channels of the backbone's maps, {wanted}")
    head = config["model"]["heads"]["object"]
    if head["in_channels"] != _width(neck):
        raise fail(f"{HEAD}.in_channels", head["in_channels"], f"the decoder's {_width(neck)} channels")
    _check_coder(config, stride_out, fail)


def _check_coder(config: Mapping[str, Any], stride: float, fail: Fail) -> None:
    """Whether decoding puts the cells of the head's map, each `stride` of the view transform's along an axis, where the BEV
    grid has them."""
    coder = config["model"]["heads"]["object"]["bbox_coder"]
    transform = config["model"]["encoders"]["camera"]["vtransform"]
    for axis, key in enumerate(("xbound", "ybound")):
        low, _, step = transform[key]
        cell, found = step * stride, coder["out_size_factor"] * coder["voxel_size"][axis]
        if not math.isclose(cell, found, rel_tol=1e-3):
            raise fail(
                f"{HEAD}.bbox_coder.out_size_factor",
                coder["out_size_factor"],
                f"{cell / coder['voxel_size'][axis]:g}: the head's cells are {cell:g} m along {key[0]}, voxel_size is "
                f"{coder['voxel_size'][axis]:g} m",
            )
        if not math.isclose(coder["pc_range"][axis], low, abs_tol=1e-3):
            raise fail(f"{HEAD}.bbox_coder.pc_range", list(coder["pc_range"]), f"to begin where {key} does, at {low:g}")

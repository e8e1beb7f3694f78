"""BEVFusion's config schema: one class for each section, network and step of the test pipeline.

A key has a type and a default, or is required. BEVFusion, mmdet and mmcv accept more keys and values for networks and steps.
Those that would change the result are refused by name: a `Literal` with one value marks the only value supported.
`FREE` lists keys that have no effect here (sources of weights, options of training). Other sections may hold any other
key. `qat.families.bevfusion.sizes` checks whether the networks fit each other.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from qat.core.validation import Expected, Options, Section, number, only, whole, wrong
from qat.families.bevfusion.grid import CLOSE

# Far above any real network: with larger numbers, a frustum or a grid fills the memory before any other check fails.
LARGEST = 1e6
MOST_PIXELS, MOST_CELLS, MOST_CHANNELS, MOST_LAYERS, MOST_BOXES = 16_384, 4_096, 65_536, 1_000, 1_000_000

# ---- kinds of values ----
Text = Annotated[str, Field(min_length=1), Expected("a name")]
Flag = Literal[True, False]
Channels = Annotated[int, whole(1, MOST_CHANNELS)]
Few = Annotated[int, whole(1, MOST_LAYERS)]
FromZero = Annotated[int, whole(0, MOST_LAYERS)]
Boxes = Annotated[int, whole(1, MOST_BOXES)]
Number = Annotated[float, number("a number", -LARGEST, LARGEST)]
Positive = Annotated[float, number("a number above 0", 0, LARGEST, above=0)]
NotNegative = Annotated[float, number("a number, 0 or more", 0, LARGEST)]
Pixels = Annotated[int, whole(1, MOST_PIXELS)]

WIDTHS = f"whole numbers from 1 to {MOST_CHANNELS:,}"
Size = Annotated[list[Pixels], Expected(f"2 whole numbers from 1 to {MOST_PIXELS:,}", count=2)]
Widths = Annotated[list[Channels], Expected(f"a list of 1 or more {WIDTHS}", least=1)]
Fews = Annotated[list[Few], Expected(f"a list of 1 or more whole numbers from 1 to {MOST_LAYERS:,}", least=1)]
Numbers = Annotated[list[Number], Expected("3 numbers", count=3)]
Positives = Annotated[list[Positive], Expected("a list of 2 or more numbers above 0", least=2)]


def _steps(bound: list[float]) -> list[float]:
    low, high, step = bound
    steps = (high - low) / step if step > 0 else 0
    if not 1 - CLOSE <= steps <= LARGEST or abs(steps - round(steps)) > CLOSE:
        raise wrong("", "[lower, upper, step] with a whole number of steps between")
    return bound


def _once(names: list[str]) -> bool:
    return len(set(names)) == len(names)


def _rises(stages: list[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(stages))


Bound = Annotated[Numbers, AfterValidator(_steps)]
Stages = Annotated[list[FromZero], Expected("indices of stages, from 0, in ascending order", least=1, test=_rises)]
Range = Annotated[
    list[Number],
    Expected(
        "6 numbers: lowest x, y, z, then highest x, y, z",
        count=6,
        test=lambda v: all(v[i] < v[i + 3] for i in range(3)),
    ),
]


class BatchNorm(Section):
    type: Literal["BN", "BN1d", "BN2d", "SyncBN", "naiveSyncBN2d"] = "BN"
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.1


Norm = Annotated[BatchNorm, Expected("batch norm with eps and momentum between 0 and 1")]
TorchNorm = Annotated[BatchNorm, Expected("batch norm with eps 1e-5", test=lambda norm: norm.eps == 1e-5)]
# null means no norm, as in mmcv's ConvModule
TorchNormOrNone = Annotated[
    BatchNorm | None,
    Expected("batch norm with eps 1e-5, or null for none", test=lambda norm: norm is None or norm.eps == 1e-5),
]
PlainConv = Annotated[Any, only(None, {"type": "Conv2d"})]
BiaslessConv = Annotated[Any, only({"type": "Conv2d", "bias": False}, {"bias": False})]  # null would add a bias
Relu = Annotated[
    Any, only(None, {"type": "ReLU"}, {"type": "ReLU", "inplace": True}, {"type": "ReLU", "inplace": False})
]


# ---- backbones of the images ----
class ResNet(Options):
    FREE = "zero_init_residual norm_eval frozen_stages with_cp init_cfg pretrained"
    type: Literal["ResNet"]
    depth: Literal[18, 34, 50, 101, 152]
    out_indices: Stages
    norm_cfg: TorchNorm = BatchNorm()
    num_stages: Literal[4] = 4
    in_channels: Literal[3] = 3
    stem_channels: Literal[None, 64] = None
    base_channels: Literal[64] = 64
    strides: Annotated[Any, only([1, 2, 2, 2])] = None
    dilations: Annotated[Any, only([1, 1, 1, 1])] = None
    style: Literal["pytorch"] = "pytorch"
    deep_stem: Literal[False] = False
    avg_down: Literal[False] = False
    conv_cfg: PlainConv = None
    dcn: None = None
    stage_with_dcn: Annotated[Any, only([False] * 4)] = None
    plugins: None = None


class SwinTransformer(Options):
    FREE = "attn_drop_rate drop_path_rate with_cp frozen_stages convert_weights pretrain_img_size init_cfg pretrained"
    type: Literal["SwinTransformer"]
    embed_dims: Channels = 96
    depths: Fews = [2, 2, 6, 2]
    num_heads: Fews = [3, 6, 12, 24]
    window_size: Few = 7
    mlp_ratio: Positive = 4
    out_indices: Stages = [0, 1, 2, 3]
    qkv_bias: Flag = True
    qk_scale: None = None
    patch_norm: Literal[True] = True
    patch_size: Literal[4] = 4
    strides: Annotated[Any, only([4, 2, 2, 2])] = None
    in_channels: Literal[3] = 3
    use_abs_pos_embed: Literal[False] = False
    act_cfg: Annotated[Any, only({"type": "GELU"})] = None
    norm_cfg: Annotated[Any, only({"type": "LN"})] = None
    drop_rate: Literal[0] = 0


class Timm(Options):
    FREE = "pretrained"
    type: Literal["timm"]
    model_name: Text
    out_indices: Stages


# ---- necks ----
class Nearest(Options):
    mode: Literal["nearest"]
    align_corners: Literal[None, False] = None


class Bilinear(Options):
    mode: Literal["bilinear"]
    align_corners: Literal[None, False, True] = None


class GeneralizedLSSFPN(Options):
    type: Literal["GeneralizedLSSFPN"]
    in_channels: Annotated[list[Channels], Expected(f"a list of 2 or more {WIDTHS}", least=2)]
    out_channels: Channels
    start_level: FromZero = 0
    end_level: Literal[-1] = -1
    num_outs: Few = Field(default=None)  # type: ignore[assignment]  # may be absent, but not null
    no_norm_on_lateral: Flag = False
    upsample_cfg: Annotated[
        Nearest | Bilinear, Expected("mode nearest or bilinear, with align_corners true only for bilinear")
    ] = Bilinear(mode="bilinear", align_corners=True)
    norm_cfg: TorchNormOrNone = BatchNorm()
    act_cfg: Relu = {"type": "ReLU"}
    conv_cfg: PlainConv = None


class SECONDFPN(Options):
    FREE = "init_cfg"
    type: Literal["SECONDFPN"]
    in_channels: Widths
    out_channels: Widths
    upsample_strides: Annotated[list[Positive], Expected("a list of 1 or more numbers above 0", least=1)]
    use_conv_for_no_stride: Flag = False
    norm_cfg: Norm = BatchNorm(eps=1e-3, momentum=0.01)
    upsample_cfg: Annotated[Any, only({"type": "deconv", "bias": False})] = None
    conv_cfg: BiaslessConv = None


# ---- view transforms ----
class _Transform(Options):
    in_channels: Channels
    out_channels: Channels
    image_size: Size
    feature_size: Size
    xbound: Bound
    ybound: Bound
    zbound: Bound
    dbound: Bound
    downsample: Literal[1, 2] = 1
    bevfusion_count: Literal[None, True, False] = (
        None  # this project's key: count cells as BEVFusion does, for its checkpoints
    )


class LSSTransform(_Transform):
    """Uses no points, so CUDA-BEVFusion's options for the depth map have no effect."""

    type: Literal["LSSTransform"]
    depth_input: Literal["scalar", "one-hot"] = "scalar"
    height_expand: Flag = False
    add_depth_features: Flag = False
    use_points: Literal["lidar", "radar"] = "lidar"


class DepthLSSTransform(_Transform):
    type: Literal["DepthLSSTransform"]
    depth_input: Literal["scalar"] = "scalar"
    height_expand: Literal[False] = False
    add_depth_features: Literal[False] = False
    use_points: Literal["lidar"] = "lidar"


# ---- decoder ----
Blocks = Annotated[
    list[Annotated[list[Channels], Expected("3 numbers", count=3)]],
    Expected(
        f"a list of [layers up to {MOST_LAYERS:,}, channels up to {MOST_CHANNELS:,}, stride]",
        least=1,
        test=lambda blocks: all(max(layers, stride) <= MOST_LAYERS for layers, _, stride in blocks),
    ),
]


class GeneralizedResNet(Options):
    type: Literal["GeneralizedResNet"]
    in_channels: Channels
    blocks: Blocks


class SECOND(Options):
    FREE = "init_cfg pretrained"
    type: Literal["SECOND"]
    in_channels: Channels
    out_channels: Widths
    layer_nums: Annotated[list[FromZero], Expected("a list of 1 or more whole numbers from 0 to 1,000", least=1)]
    layer_strides: Fews
    norm_cfg: Norm = BatchNorm(eps=1e-3, momentum=0.01)
    conv_cfg: BiaslessConv = None


class LSSFPN(Options):
    type: Literal["LSSFPN"]
    in_indices: Annotated[list[Annotated[int, whole(-MOST_LAYERS, MOST_LAYERS)]], Expected("2 whole numbers", count=2)]
    in_channels: Annotated[list[Channels], Expected(f"2 {WIDTHS}", count=2)]
    out_channels: Channels
    scale_factor: Few = 1


# ---- head ----
MAPS = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}  # common_heads: channels of each
HeadMap = Annotated[list[Few], Expected("[channels, convolutions]", count=2)]
Nms = Annotated[Literal["circle", "rotate"], Expected("circle or rotate")]
Factors = Annotated[list[Positive], Expected("numbers above 0", least=1)]
Names = Annotated[list[Text], Expected("names", least=1)]


OddNumber = Annotated[int, Expected("an odd number", test=lambda n: n in range(1, 32, 2))]


class SeparateHead(Options):
    type: Literal["SeparateHead"] = "SeparateHead"
    head_conv: Channels | None = 64
    final_kernel: OddNumber | None = 1
    init_bias: Number | None = -2.19
    norm_cfg: TorchNormOrNone = BatchNorm()
    conv_cfg: PlainConv = None
    bias: Literal["auto"] = "auto"
    init_cfg: None = None


class CenterPointBBoxCoder(Options):
    FREE = "code_size"
    type: Literal["CenterPointBBoxCoder"] = "CenterPointBBoxCoder"
    pc_range: Annotated[list[Number], Expected("2 or more numbers that start with the lowest x and y", least=2)]
    post_center_range: Range
    voxel_size: Positives
    out_size_factor: Positive
    max_num: Boxes
    score_threshold: Number | None = None


class TestCfg(Section):
    nms_type: Annotated[Nms | list[Nms], Expected("circle or rotate")]
    post_max_size: Boxes
    pre_max_size: Boxes | None = None
    nms_thr: NotNegative | None = None
    nms_scale: Annotated[Positive | list[Positive | Factors], Expected("numbers above 0")] = 1
    min_radius: Annotated[list[NotNegative], Expected("a list of 1 or more numbers, 0 or more", least=1)] | None = None


class CenterHead(Options):
    FREE = "train_cfg loss_cls loss_bbox"
    type: Literal["CenterHead"]
    in_channels: Channels
    tasks: Annotated[list[Names], Expected("a list of class names for each task", least=1)]
    common_heads: dict[Any, HeadMap]
    bbox_coder: CenterPointBBoxCoder
    test_cfg: TestCfg
    separate_head: SeparateHead = SeparateHead()
    share_conv_channel: Channels = 64
    num_heatmap_convs: Few = 2
    norm_bbox: Flag = True
    norm_cfg: TorchNormOrNone = BatchNorm()
    conv_cfg: PlainConv = None
    bias: Literal["auto"] = "auto"
    init_cfg: None = None

    @model_validator(mode="after")
    def _maps(self) -> CenterHead:
        for name, (channels, _) in self.common_heads.items():
            if MAPS.get(name) != channels:
                wanted = ", ".join(f"{known} ({width})" for known, width in MAPS.items())
                raise wrong(f"common_heads.{name}", f"one of {wanted} channels")
        for name in ("height", "dim", "rot"):
            if name not in self.common_heads:
                raise wrong("common_heads", f"a map {name}: decoding needs it")
        return self


GRID_CELLS = f"whole numbers from 1 to {MOST_CELLS * 64:,}"
GridCells = Annotated[int, whole(1, MOST_CELLS * 64)]


class TrainCfg(Section):
    point_cloud_range: Range
    grid_size: Annotated[list[GridCells], Expected(f"a list of 2 or more {GRID_CELLS}", least=2)]
    voxel_size: Positives
    out_size_factor: Channels
    gaussian_overlap: NotNegative
    max_objs: Boxes
    min_radius: Annotated[int, whole(0, MOST_CHANNELS)]
    code_weights: Annotated[list[NotNegative], Expected("a list of 8 or more numbers, 0 or more", least=8)]


class Training(Section):
    """Keys of a head that training reads. If train_cfg is missing, the error names its first key."""

    train_cfg: TrainCfg = Field(default_factory=dict, validate_default=True)
    loss_bbox: dict[Any, Any]


# ---- configs ----
Cameras = Annotated[list[Text], Expected("a list of the cameras' channels, each once", least=1, test=_once)]
Classes = Annotated[list[Text], Expected("a list of classes, each once", least=1, test=_once)]


class Camera(Section):
    backbone: Annotated[ResNet | SwinTransformer | Timm, Field(discriminator="type")]
    neck: Annotated[GeneralizedLSSFPN | SECONDFPN, Field(discriminator="type")]
    vtransform: Annotated[LSSTransform | DepthLSSTransform, Field(discriminator="type")]


class Encoders(Section):
    camera: Camera


class Model(Section):
    encoders: Encoders


class CameraConfig(Section):
    """The keys that a camera branch reads, from its own config or from a whole model's."""

    model: Model
    image_size: Size
    load_dim: Annotated[int, whole(5, 100)] = 5
    native_size: Size | None = None  # this project's key: height and width of the pictures, if not nuScenes'
    cameras: Cameras | None = None  # this project's key: the channels in the order of every [N, …] input


class Decoder(Section):
    backbone: Annotated[GeneralizedResNet | SECOND, Field(discriminator="type")]
    neck: Annotated[LSSFPN | SECONDFPN, Field(discriminator="type")]


TAKE_OUT = "--prefix encoders.camera (calibrate, export-camera) takes the camera branch out of a camera+lidar model"


class OnlyCamera(Encoders):
    OTHERS = f"only the camera branch is supported; {TAKE_OUT}"


class Heads(Section):
    OTHERS = "only object detection is supported"
    object: CenterHead


class DetectorModel(Model):
    encoders: OnlyCamera
    decoder: Decoder
    heads: Heads
    fuser: Annotated[None, Expected(f"null: a camera-only detector has none; {TAKE_OUT}")] = None


class DetectorConfig(CameraConfig):
    model: DetectorModel
    point_cloud_range: Range
    object_classes: Classes


# ---- data.test.pipeline ----
_NOT_AUGMENTED = "test data is not augmented"
NotAugmented = Annotated[bool | None, Expected(f"false: {_NOT_AUGMENTED}", test=lambda value: not value)]
NotUsed = Annotated[bool | None, Expected("false: this option is not supported", test=lambda value: not value)]
Columns = Annotated[
    Any,
    Expected(
        "3 or more, or a list that starts with 0, 1, 2 (x, y, z)",
        most=100,
        test=lambda v: v[:3] == [0, 1, 2] if isinstance(v, list) else type(v) is int and 3 <= v <= MOST_CHANNELS,
    ),
]


def _throughout(wanted: int) -> Expected:
    """This number, or a list of only this number: the value of an augmentation that changes nothing."""

    def test(value: Any) -> bool:
        return all(type(v) in (int, float) and v == wanted for v in (value if isinstance(value, list) else [value]))

    return Expected(f"{wanted}: {_NOT_AUGMENTED}", test=test)


Zero = Annotated[Any, _throughout(0)]
One = Annotated[Any, _throughout(1)]
Limit = Annotated[float, number("a number above 0 and at most 16", 0, 16, above=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class LoadMultiViewImageFromFiles(Options):
    FREE = "to_float32"
    type: Literal["LoadMultiViewImageFromFiles"]
    color_type: Literal["unchanged", "color"] = "unchanged"


class _Points(Options):
    load_dim: Annotated[int, whole(3, 100)] = 5
    use_dim: Columns = 5
    reduce_beams: Annotated[float, number("32 or null: dropping beams is not supported", 32, LARGEST)] | None = None
    load_augmented: None = None


class LoadPointsFromFile(_Points):
    type: Literal["LoadPointsFromFile"]
    coord_type: Literal["LIDAR"] = "LIDAR"
    shift_height: NotUsed = False
    use_color: NotUsed = False


class LoadPointsFromMultiSweeps(_Points):
    type: Literal["LoadPointsFromMultiSweeps"]
    sweeps_num: FromZero
    time_dim: Literal[4] = 4
    pad_empty_sweeps: bool = False
    remove_close: bool = False
    test_mode: bool = False


class ImageAug3D(Options):
    type: Literal["ImageAug3D"]
    final_dim: Size
    resize_lim: Annotated[
        Limit | Annotated[list[Limit], Expected("2", count=2)], Expected("one or two numbers above 0 and at most 16")
    ]
    bot_pct_lim: Annotated[list[Share], Expected("two shares from 0 to below 1", count=2)]
    rot_lim: Zero = 0
    rand_flip: bool = False  # applies only with is_train
    is_train: NotAugmented = False


class GlobalRotScaleTrans(Options):
    type: Literal["GlobalRotScaleTrans"]
    resize_lim: One = 1
    rot_lim: Zero = 0
    trans_lim: Zero = 0
    is_train: NotAugmented = False


class PointsRangeFilter(Options):
    type: Literal["PointsRangeFilter"]
    point_cloud_range: Range


class ImageNormalize(Options):
    type: Literal["ImageNormalize"]
    mean: Numbers
    std: Annotated[list[Positive], Expected("3 numbers above 0", count=3)]


# Steps that do not change a camera detector's input: annotations, tensor formats, collected keys.
class LoadAnnotations3D(Options):
    FREE = (
        "with_bbox_3d with_label_3d with_attr_label with_mask_3d with_seg_3d "
        "with_bbox with_label with_mask with_seg with_bbox_depth"
    )
    type: Literal["LoadAnnotations3D"]


class LoadBEVSegmentation(Options):
    FREE = "dataset_root xbound ybound classes object_classes"
    type: Literal["LoadBEVSegmentation"]


class LoadRadarPointsMultiSweeps(Options):
    FREE = (
        "load_dim use_dim sweeps_num pad_empty_sweeps remove_close "
        "test_mode file_client_args max_num compensate_velocity normalize filtering"
    )
    type: Literal["LoadRadarPointsMultiSweeps"]


class DefaultFormatBundle3D(Options):
    FREE = "classes class_names with_gt with_label"
    type: Literal["DefaultFormatBundle3D"]


class Collect3D(Options):
    FREE = "keys meta_keys meta_lis_keys"
    type: Literal["Collect3D"]


class GTDepth(Options):
    FREE = "keyframe_only"
    type: Literal["GTDepth"]


Step = Annotated[
    LoadMultiViewImageFromFiles
    | LoadPointsFromFile
    | LoadPointsFromMultiSweeps
    | ImageAug3D
    | GlobalRotScaleTrans
    | PointsRangeFilter
    | ImageNormalize
    | LoadAnnotations3D
    | LoadBEVSegmentation
    | LoadRadarPointsMultiSweeps
    | DefaultFormatBundle3D
    | Collect3D
    | GTDepth,
    Field(discriminator="type"),
]


def _sections(steps: Any) -> Any:
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise wrong("", "a list of steps, each with a type")
    return steps


Steps = Annotated[list[Step], BeforeValidator(_sections)]

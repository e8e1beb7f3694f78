"""A deploy config's run: `end2end.onnx` and the backend's files, compared with PyTorch, and boxes of real clouds on both."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qat.boxes.detections import Detections
from qat.compare.agreement import MARGIN, BoxFigures, Figures
from qat.core.errors import UserError
from qat.core.files import atomic_set
from qat.deploy.mmdeploy.checks import EXACT, GPU_EXACT, BoxCheck, TensorCheck, compare, compare_boxes
from qat.deploy.mmdeploy.clouds import Cloud, calibration_frames, points_prefix, read_cloud
from qat.deploy.mmdeploy.compose import GRID, at_opset, compose
from qat.deploy.mmdeploy.config import FILES, VoxelConfig
from qat.deploy.mmdeploy.detector import (
    Detector,
    backend_on,
    check_torch,
    engine_detector,
    need_pillars,
    path_of,
    source_of,
    torch_detector,
    voxels_in,
)
from qat.deploy.mmdeploy.maps import split
from qat.export.lookups import opset_of

DENSE = "pts_backbone_neck_head"
LOGGER = logging.getLogger("bevqat.deploy")


@dataclass(frozen=True)
class Request:
    """What the command names besides the deploy config.

    model_cfg: a path, or a name that mmdet3d ships. checkpoint: as `qat.deploy.mmdeploy.detector.source_of` has it. images: clouds; the first
    traces and verifies the file, boxes are computed of all. tested: of those, None for all. calib, calib_frames: as
    `qat.deploy.mmdeploy.clouds.calibration_frames` has them.
    """

    model_cfg: Any
    checkpoint: str | Path | None
    image: str | Path
    tested: Sequence[str | Path] = ()
    work_dir: Path = Path()
    device: str = "cpu"
    calib: str | Path | None = None
    calib_frames: int | None = None


@dataclass
class Deployed:
    """What came of it.

    files: what a runtime loads, the ONNX file first. checks: of the ONNX file and of the backend's own, by what was compared. boxes: of FP32,
    each cloud's beside PyTorch's. rounded, rounded_boxes: of other precisions, the maps and the boxes beside float PyTorch's, all clouds
    together. trained: False for random weights, whose rounded boxes are not judged. found: by cloud, then backend and "pytorch".
    """

    files: list[Path]
    clouds: list[Cloud] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    checks: dict[str, list[TensorCheck]] = field(default_factory=dict)
    boxes: list[BoxCheck] = field(default_factory=list)
    rounded: dict[str, Figures] = field(default_factory=dict)
    rounded_boxes: BoxFigures = field(default_factory=lambda: BoxFigures(False))
    trained: bool = True
    found: list[dict[str, Detections]] = field(default_factory=list)
    stages_ms: dict[str, float] = field(default_factory=dict)

    @property
    def summary(self) -> list[str]:
        """What was compared, a line each."""
        lines = [
            f"{what}: largest difference {max(check.relative for check in checks):.1g} of the tensor's largest value"
            for what, checks in self.checks.items()
        ]
        for cloud, check, found in zip(self.clouds, self.boxes, self.found, strict=False):
            backend = next(iter(found))
            lines.append(
                f"{cloud.name}: {check.found} boxes on {backend}, {check.expected} in PyTorch, {check.alone} without a partner"
            )
        if self.rounded:
            lines.append(
                f"beside float: {min(figures.sqnr_db for figures in self.rounded.values()):.0f} dB in the worst map"
            )
            share = self.rounded_boxes
            if not share.judged:
                lines.append("beside float: no boxes well above the score threshold to compare")
            else:
                lines.append(
                    f"beside float: {share.found} of {share.judged} boxes well above the score threshold in both"
                )
        times = ", ".join(f"{stage} {milliseconds:.0f} ms" for stage, milliseconds in self.stages_ms.items())
        return [*lines, f"the last cloud: {times}"]

    def described(self) -> dict[str, Any]:
        """For --json."""
        return {
            "files": self.files,
            "checks": {what: [asdict(check) for check in checks] for what, checks in self.checks.items()},
            "boxes": [check.described() for check in self.boxes],
            "beside_float": {name: figures.described() for name, figures in self.rounded.items()},
            "boxes_beside_float": self.rounded_boxes.described() if self.rounded else None,
            "stages_ms": self.stages_ms,
            "passed": not self.problems,
        }

    @property
    def problems(self) -> list[str]:
        """What failed, a line each."""
        lines = [
            f"{what}: {check.name}: differs by {check.relative:.2g} of its largest value"
            + ("" if check.sqnr_db is None else f", {check.sqnr_db:.0f} dB")
            for what, checks in self.checks.items()
            for check in checks
            if not check.passed
        ]
        lines += [
            f"{cloud.name}: {check.alone} of {check.found} and {check.expected} boxes have no partner"
            for cloud, check in zip(self.clouds, self.boxes, strict=False)
            if not check.same
        ]
        lines += [f"{name}, beside float: {figures.wrong}" for name, figures in self.rounded.items() if figures.wrong]
        if self.trained and self.rounded_boxes.judged and self.rounded_boxes.wrong:
            lines.append(f"boxes, beside float: {self.rounded_boxes.wrong}")
        return lines


def deploy(config: VoxelConfig, request: Request) -> Deployed:
    """Writes a model's files into the work folder, and tries them.

    Written are the ONNX file of the deploy config; `.xml` and `.bin`, or `.engine`; in INT8 also ptq.pth. An earlier file of the same name
    is replaced, once all of them are there.

    Raises:
        UserError: the backend is not on this machine; files do not load, or do not fit each other.
    """
    from qat.engine import identify

    check_torch(request.device)
    try:
        identify(backend_on(config, request.device))
    except UserError as error:
        raise UserError(f"{config.source}: {config.backend}: {error}") from None
    model, clouds = opened(config, request)
    work = request.work_dir
    work.mkdir(parents=True, exist_ok=True)
    targets = [work / config.save_file]
    if config.backend != "onnxruntime":
        targets.append(targets[0].with_suffix(FILES[config.backend]))
    if config.backend == "openvino":
        targets.append(targets[0].with_suffix(".bin"))
    flow = model.family.flow(model.config)
    tested = clouds[1:] if request.tested else clouds
    result = Deployed(targets, tested, flow.classes, trained=model.path is not None)
    graph = composed(config, request, model, clouds, result)
    file = targets[0] if len(targets) == 1 else targets[1]
    with atomic_set(*targets) as stage:
        onnx.save(graph, stage / targets[0].name)
        LOGGER.info("%s: %s", config.backend, file)
        write_backend(config, stage / targets[0].name)
    try_out(config, engine_detector(config, flow, file, request.device), torch_detector(model, request.device), result)
    return result


def opened(config: VoxelConfig, request: Request) -> tuple[Any, list[Cloud]]:
    """The float model (`qat.model.opening.Model`), and the clouds.

    Raises:
        UserError: one of them does not load, or the deploy config is of another model.
    """
    from qat.families.mmdet3d.config import read as read_config
    from qat.model.opening import open_float

    source = source_of(request.model_cfg, request.checkpoint)
    model = open_float(source)
    flow = model.family.flow(model.config)
    need_pillars(flow, str(source.config))
    prefix = points_prefix(read_config(path_of(request.model_cfg)))
    clouds = [read_cloud(path, dict(model.config), prefix) for path in (request.image, *request.tested)]
    check_profiles(config, flow)
    return model, clouds


def composed(
    config: VoxelConfig, request: Request, model: Any, clouds: Sequence[Cloud], result: Deployed
) -> onnx.ModelProto:
    """The ONNX file's graph, compared with PyTorch on every cloud, which is appended to `result`. In INT8 ptq.pth is written.

    Raises:
        UserError: there is nothing to calibrate on; the exported part is out of tolerance.
    """
    quantized = None
    if config.precision == "int8":
        quantized = calibrated(model, request, request.work_dir / "ptq.pth")
    LOGGER.info("export: %s, opset %d", config.precision, config.opset)
    with tempfile.TemporaryDirectory() as folder:
        graph, part = exported(config, model, quantized, clouds[0], Path(folder) / "parts")
    verify(config, graph, part, model, clouds, result)
    return graph


def check_profiles(config: VoxelConfig, flow: Any) -> None:
    """Notes a profile that takes fewer voxels than the model.

    Raises:
        UserError: its shapes are of another model.
    """
    voxel, columns = flow.settings["voxel"], flow.settings["decoration"]["columns"]
    shapes = {"voxels": (voxel["max_points"], columns), "num_points": (), "coors": (4,)}
    for profile in config.profiles:
        for sizes in (profile.min, profile.opt, profile.max):
            if tuple(sizes[1:]) != shapes[profile.input]:
                expected = " × ".join(map(str, ("voxels", *shapes[profile.input])))
                raise UserError(
                    f"{config.source}: input_shapes: {profile.input}: found {' × '.join(map(str, sizes))}, expected {expected}, as the "
                    "model config has it"
                )
    most = config.voxels[1]
    if most is not None and most < voxel["max_voxels"]:
        LOGGER.warning(
            "%s: the engine takes %s voxels, the model config's max_voxels is %s: a cloud with more is refused, not cut",
            config.source, f"{most:,}", f"{voxel['max_voxels']:,}",
        )  # fmt: skip


def calibrated(model: Any, request: Request, out: Path) -> Any:
    """The model with calibrated quantizers; written to `out`."""
    from qat.calibrate.job import calibrate_checkpoint
    from qat.calibrate.options import CalibrateOptions

    source = source_of(request.model_cfg, request.checkpoint)
    frames = calibration_frames(request.calib, path_of(request.model_cfg), dict(model.config), request.calib_frames)
    LOGGER.info("INT8: calibration on %d frames", len(frames))
    name = Path(str(request.calib or source.config))
    return calibrate_checkpoint(source, CalibrateOptions(name, "val"), out, frames).model


def exported(
    config: VoxelConfig, model: Any, quantized: Any, cloud: Cloud, folder: Path
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The composed file, and the part that it has from `bevqat export`, verified by it.

    Raises:
        UserError: the part is out of tolerance.
    """
    from qat.deploy.mmdeploy.front import front_graph
    from qat.export.options import OPSETS, ExportOptions, Origin
    from qat.export.parts import export_parts
    from qat.families.mmdet3d.lidar import LidarFrame

    flow = model.family.flow(model.config)
    options = ExportOptions(config.precision, config.flavour, max(config.opset, OPSETS[0]), parts=[DENSE])
    network = model.network if quantized is None else quantized
    manifest = export_parts(network, folder, options, [LidarFrame(cloud.name, cloud.points)], Origin(model.path))
    if not manifest["verification"]["passed"]:
        raise UserError(
            f"{DENSE}: the part and PyTorch differ by more than the tolerance; `bevqat export` of the same model shows where"
        )
    part = at_opset(onnx.load(folder / f"{DENSE}.onnx"), config.opset)
    front = front_graph(model.network, flow, voxels_in(cloud.points, flow), opset_of(part))
    notes = {"precision": config.precision, "flavour": config.flavour, "release": config.release}
    if "boxes" in model.config:
        notes["boxes"] = model.config["boxes"]
    return compose(front, part, flow, config.release, notes), part


def verify(
    config: VoxelConfig,
    graph: onnx.ModelProto,
    part: onnx.ModelProto,
    model: Any,
    clouds: Sequence[Cloud],
    result: Deployed,
) -> None:
    """Compares the composed graph, as it is in the file, with PyTorch on every cloud. Appends to `result`.

    In FP32 its maps are compared with those of mmdet3d's own modules. A graph that rounds may turn the last digits of its inputs into other
    steps, so there its grid is compared, and its maps with those of the part on this grid; the part was compared with PyTorch by itself.
    """
    from qat.engine.onnxruntime_backend import PlainGraph

    flow = model.family.flow(model.config)
    if config.precision != "fp32":
        graph = with_grid(graph)
    whole = PlainGraph(graph.SerializeToString())
    dense = None if config.precision == "fp32" else PlainGraph(part.SerializeToString())
    torch_maps = torch_detector(model).maps
    for cloud in clouds:
        feeds = voxels_in(flow.prepare(cloud.points).points, flow)
        outputs = whole.run(feeds)
        if dense is None:
            expected = torch_maps(cloud.points)
            found = split(flow, outputs, config.save_file)
        else:
            grid = outputs.pop(GRID)
            found = {**split(flow, outputs, config.save_file), GRID: grid}
            expected = {**dense.run({GRID: grid}), GRID: torch_grid(model, flow, feeds)}
        checks = compare(found, expected)
        result.checks[f"{config.save_file}, {Path(cloud.name).name}"] = checks
        _log(f"{config.save_file} beside PyTorch", checks)


def with_grid(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose outputs have the grid as well."""
    found = onnx.ModelProto()
    found.CopyFrom(graph)
    found.graph.output.append(onnx.helper.make_tensor_value_info(GRID, onnx.TensorProto.FLOAT, None))
    return found


def torch_grid(model: Any, flow: Any, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """The bird's-eye grid by mmdet3d's own encoder and scatter."""
    from qat.deploy.mmdeploy.front import mmdet3d_grid

    found: np.ndarray = mmdet3d_grid(model.network, flow)(feeds).numpy()
    return found


def write_backend(config: VoxelConfig, file: Path) -> None:
    """Writes the backend's files beside the ONNX file.

    Raises:
        UserError: the backend cannot build it.
    """
    if config.backend == "openvino":
        write_openvino(file)
    elif config.backend == "tensorrt":
        from qat.engine import Options, TensorRtOptions, build

        common = config.values.get("backend_config", {}).get("common_config") or {}
        options = TensorRtOptions(
            fp16=bool(common.get("fp16_mode")), workspace=config.workspace, profiles=tuple(config.profiles)
        )
        build(file, "tensorrt", config.precision, Options(cache=None, tensorrt=options)).save(
            file.with_suffix(".engine")
        )


def write_openvino(file: Path) -> None:
    """`.xml` and `.bin` beside an ONNX file, weights as they are in it.

    Raises:
        UserError: OpenVINO is not installed, or cannot read the file.
    """
    try:
        import openvino as ov
    except ModuleNotFoundError:
        raise UserError(
            "backend openvino: the package openvino is not installed; fix by: pip install openvino"
        ) from None
    from qat.engine.openvino_backend import only_core
    from qat.engine.openvino_shift import shift_concatenated

    try:
        model = only_core().read_model(file)
        shift_concatenated(model)
        ov.save_model(model, file.with_suffix(".xml"), compress_to_fp16=False)
    except RuntimeError as error:
        raise UserError(f"{file}: OpenVINO cannot convert it: {str(error).strip().splitlines()[-1]}") from None


def try_out(config: VoxelConfig, backend: Detector, pytorch: Detector, result: Deployed) -> None:
    """Boxes of every cloud by the backend's file and by PyTorch, and how the maps differ. Appends to `result`.

    FP32 must be equal but for the order of sums. Other precisions are judged as `bevqat agree` judges them: maps in their own units, boxes
    well above the score threshold.
    """
    for cloud in result.clouds:
        expected, found = pytorch.maps(cloud.points), backend.maps(cloud.points)
        boxes = {config.backend: backend(cloud.points), "pytorch": pytorch(cloud.points)}
        result.stages_ms = dict(backend.stages_ms)
        result.found.append(boxes)
        if config.precision == "fp32":
            checks = compare(found, expected, GPU_EXACT if config.backend == "tensorrt" else EXACT)
            result.checks[f"{config.backend}, {Path(cloud.name).name}"] = checks
            _log(f"{config.backend} beside PyTorch", checks)
            result.boxes.append(compare_boxes(*boxes.values()))
            continue
        theirs = backend.flow.in_units(found)
        for name, own in pytorch.flow.in_units(expected).items():
            figures = result.rounded.setdefault(name, Figures(own.unit, own.rounded, False))
            figures.add(own, theirs[name], np.ones(own.values.shape, bool))
        least = min((float(one.scores.min()) for one in boxes.values() if len(one)), default=0.0) + MARGIN
        result.rounded_boxes.add(boxes["pytorch"].converted(), boxes[config.backend].converted(), least)
    for name, figures in result.rounded.items():
        LOGGER.debug("%s beside float PyTorch: %s: %.1f dB", config.backend, name, figures.sqnr_db)


def draw_pictures(config: VoxelConfig, done: Deployed, work_dir: Path, show: bool = False) -> list[Path]:
    """Writes output_{backend}.png and output_pytorch.png, with a number behind the name from the second cloud on: the boxes of each, the
    backend's beside PyTorch's. Returns the files.

    show: opens them in windows where there is a display.
    """
    from qat.deploy.mmdeploy import picture

    files = []
    for n, (cloud, found) in enumerate(zip(done.clouds, done.found, strict=True)):
        end = f"_{n}" if n else ""
        for name, boxes in ((config.backend, found), ("pytorch", {"pytorch": found["pytorch"]})):
            path = work_dir / f"output_{name}{end}.png"
            files.append(picture.draw(cloud.points, boxes, path, cloud.image, cloud.lidar2img, done.classes))
            if show and not picture.show(path):
                LOGGER.warning("--show: found no display; the picture is %s", path)
    return files


def dump_info(config: VoxelConfig, request: Request) -> list[Path]:
    """Writes deploy.json, pipeline.json and detail.json into the work folder; returns the files."""
    from qat.core.files import write_json
    from qat.deploy.mmdeploy.info import written
    from qat.families.mmdet3d.config import read
    from qat.families.mmdet3d.description import plain
    from qat.families.mmdet3d.inputs import pipeline_of
    from qat.model.opening import read_config

    path = path_of(request.model_cfg)
    family, described = read_config(path)
    steps = [dict(plain(step)) for step in pipeline_of(read(path))]
    content = written(config, family.flow(described), steps, path, str(request.checkpoint))
    for name, value in content.items():
        write_json(request.work_dir / name, value)
    return [request.work_dir / name for name in content]


def _log(what: str, checks: Sequence[TensorCheck]) -> None:
    for check in checks:
        db = "equal" if check.sqnr_db is None else f"{check.sqnr_db:.1f} dB"
        LOGGER.debug("%s: %s: relative %.2g, %s", what, check.name, check.relative, db)

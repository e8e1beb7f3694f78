"""A detector behind MMDeploy's files, or in PyTorch: points to boxes, by the same voxelization and the same decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.deploy.mmdeploy.config import FILES, VoxelConfig, read
from qat.deploy.mmdeploy.maps import INPUTS, split
from qat.engine import Engine, Options, TensorRtOptions
from qat.families.flow import Flow
from qat.families.mmdet3d.lidar import PillarFlow
from qat.families.mmdet3d.pillars import voxels_of

Network = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
RANDOM = "random"
CHECKPOINTS = (".pth", ".pt", ".ckpt")


def voxels_in(points: np.ndarray, flow: Flow, fewest: int = 1) -> dict[str, np.ndarray]:
    """The inputs of `end2end.onnx` for one cloud.

    Args:
        points: float32[M,C]. fewest: voxels; as many as are missing are appended, without points, which change nothing.

    Returns:
        voxels float32[N,max_points,C]; num_points int32[N]; coors int32[N,4] of 0 (the cloud's number), z, y, x.
    """
    voxels, cells, counts, left_out = voxels_of(points, flow.settings)
    assert isinstance(flow, PillarFlow)
    flow.note_left_out(left_out)
    more = max(fewest - len(voxels), 0)
    coors = np.concatenate([np.zeros((len(cells), 1), np.int32), cells], 1)
    return {
        "voxels": np.pad(voxels, ((0, more), (0, 0), (0, 0))),
        "num_points": np.pad(counts, (0, more)),
        "coors": np.pad(coors, ((0, more), (0, 0))),
    }


class Detector:
    """A model that takes points.

    flow: its host side. classes: names, in the order of `Detections.labels`. stages_ms: milliseconds of voxelize, network and post in
    the latest call. voxels: the fewest and the most that the network takes; None for any number.
    """

    def __init__(self, flow: Flow, network: Network, source: str, voxels: tuple[int, int | None] = (1, None)) -> None:
        """network: from the inputs that `voxels_in` makes to the flow's maps. source: where it came from, for messages."""
        self.flow, self.classes, self.voxels = flow, flow.classes, voxels
        self.stages_ms: dict[str, float] = {}
        self._network, self._source = network, source

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.stages_ms[stage] = (time.perf_counter() - begin) * 1e3

    def maps(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """The flow's maps of one cloud, float32[M,C]; raises as a call does."""
        with self._timed("voxelize"):
            frame = self.flow.prepare(points)
            feeds = voxels_in(frame.points, self.flow, self.voxels[0])
        count, most = len(feeds["voxels"]), self.voxels[1]
        if most is not None and count > most:
            raise UserError(
                f"{self._source}: voxels: found {count:,} in a cloud, expected at most {most:,}, the max_shape of the deploy config's "
                "input_shapes; raise it and deploy again"
            )
        with self._timed("network"):
            return dict(self._network(feeds))

    def __call__(self, points: np.ndarray) -> Detections:
        """Boxes of one cloud.

        Args:
            points: float32[M,C]: x, y, z in metres and what else the model takes.

        Raises:
            UserError: points of another form; more voxels than the engine takes; outputs that are not finite.
        """
        self.stages_ms = {}
        maps = self.maps(points)
        with self._timed("post"):
            for name, values in maps.items():
                if not np.isfinite(values).all():
                    raise UserError(
                        f"{self._source}: {name}: found NaN or infinity, expected finite values; run `bevqat health` on the checkpoint"
                    )
            return self.flow.decode(maps)

    def batch(self, clouds: Sequence[np.ndarray]) -> list[Detections]:
        """Boxes of several clouds, each computed alone: the file is for one cloud, and two are never merged. stages_ms: their sums."""
        total: dict[str, float] = {}
        found = []
        for points in clouds:
            found.append(self(points))
            for stage, milliseconds in self.stages_ms.items():
                total[stage] = total.get(stage, 0.0) + milliseconds
        self.stages_ms = total
        return found


def is_checkpoint(name: str | Path) -> bool:
    """Whether a model is named that PyTorch runs: a checkpoint's file, "random" or "random:SEED"."""
    return Path(name).suffix in CHECKPOINTS or str(name).partition(":")[0] == RANDOM


def source_of(model_cfg: Any, checkpoint: str | Path | None) -> Any:
    """What to open: a checkpoint's file, or "random" or "random:SEED" (also None) for seeded random weights.

    Raises:
        UserError: a seed that is no number.
    """
    from qat.model.opening import Source

    path = path_of(model_cfg)
    name = RANDOM if checkpoint is None else str(checkpoint)
    word, colon, seed = name.partition(":")
    if word != RANDOM or Path(name).is_file():
        return Source(Path(name), path)
    if colon and not seed.isdecimal():
        raise UserError(f"CKPT: found {name!r}, expected a file, {RANDOM} or {RANDOM}:SEED, with a number")
    return Source(None, path, seed=int(seed or 0))


def path_of(model_cfg: Any) -> Path:
    """The file of a model config: its path or a name that mmdet3d ships, or the file that mmengine's `Config` was read from.

    Raises:
        UserError: a `Config` without a file.
    """
    from qat.families.mmdet3d.config import find

    if isinstance(model_cfg, str | Path):
        return find(model_cfg)
    name = getattr(model_cfg, "filename", None)
    if name is None:
        raise UserError("model_cfg: found a Config without a file, expected a path, or Config.fromfile's result")
    return Path(name)


def pytorch_detector(model_cfg: Any, checkpoint: str | Path | None = None, device: str = "cpu") -> Detector:
    """The detector in PyTorch, by mmdet3d's own modules.

    Args:
        model_cfg: an mmdet3d config: a path, or a name that it ships. checkpoint: as for `source_of`. device: cpu or cuda.

    Raises:
        UserError: the config or the checkpoint does not load.
    """
    from qat.model.opening import open_float

    check_torch(device)
    return torch_detector(open_float(source_of(model_cfg, checkpoint)), device)


def torch_detector(model: Any, device: str = "cpu") -> Detector:
    """The same of an opened model (`qat.model.opening.Model`)."""
    from qat.deploy.mmdeploy.front import mmdet3d_network

    flow = model.family.flow(model.config)
    need_pillars(flow, str(model.config["source"]))
    return Detector(flow, mmdet3d_network(model.network, flow, device), "PyTorch")


def check_torch(device: str) -> None:
    """Raises `UserError` for a device that this torch does not have."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device: found {device!r}, expected a device that this torch has ({str(error).splitlines()[0]})"
        ) from None


def need_pillars(flow: Flow, source: str) -> None:
    """Raises `UserError` for a model that has no voxels."""
    if not isinstance(flow, PillarFlow):
        family = flow.settings["family"]
        raise UserError(f"{source}: found a model of the family {family}, expected pointpillars or centerpoint")


def open_detector(
    deploy_cfg: Any, model_cfg: Any, files: str | Path | Sequence[str | Path], device: str = "cpu"
) -> Detector:
    """The detector behind a deploy config's files, ours or MMDeploy's.

    Args:
        deploy_cfg, model_cfg: configs, by their path or as mmengine's `Config`. files: `end2end.onnx`; `.xml` and `.bin`; `.engine`.
        device: cpu or cuda; TensorRT's is cuda.

    Raises:
        UserError: a config or a file does not load; they do not belong together.
    """
    from qat.model.opening import read_config

    config = deploy_cfg if isinstance(deploy_cfg, VoxelConfig) else read(deploy_cfg)
    family, described = read_config(path_of(model_cfg))
    file = file_of(config, files)
    flow = family.flow(with_boxes(described, file))
    need_pillars(flow, config.source)
    return engine_detector(config, flow, file, device)


def engine_detector(config: VoxelConfig, flow: Flow, file: Path, device: str = "cpu", threads: int = 0) -> Detector:
    """The detector of a model's flow behind one file; raises as `open_detector`."""
    engine = open_engine(config, file, device, threads)
    if set(engine.inputs) != set(INPUTS):
        raise UserError(
            f"{file}: found the inputs {', '.join(engine.inputs)}, expected {', '.join(INPUTS)}: MMDeploy's file of a voxel detector"
        )

    def network(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        given = {name: feeds[name].astype(engine.inputs[name].dtype, copy=False) for name in INPUTS}
        return split(flow, engine.run(given), str(file))

    return Detector(flow, network, str(file), config.voxels if config.backend == "tensorrt" else (1, None))


def with_boxes(described: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """A model's description with the convention of the boxes that the file's weights were trained with, where a file of ours says it."""
    from qat.deploy.mmdeploy.compose import notes_of

    notes = notes_of(file.with_suffix(".onnx"))
    return {**described, "boxes": notes["boxes"]} if "boxes" in notes else described


def file_of(config: VoxelConfig, files: str | Path | Sequence[str | Path]) -> Path:
    """The one of the backend's files that is opened.

    Raises:
        UserError: it is not among them, or does not exist.
    """
    given = [files] if isinstance(files, str | Path) else list(files)
    ending = FILES[config.backend]
    found = [Path(file) for file in given if Path(file).suffix == ending]
    if len(found) != 1:
        raise UserError(
            f"{config.source}: found the files {', '.join(map(str, given)) or 'none'}, expected one {ending} for {config.backend}"
        )
    if not found[0].is_file():
        raise UserError(f"{found[0]}: found no such file, expected what bevqat deploy wrote")
    return found[0]


def open_engine(config: VoxelConfig, file: Path, device: str, threads: int = 0) -> Engine:
    """A file in the backend of its deploy config.

    Raises:
        UserError: the backend is not there, does not run on the device or does not load the file.
    """
    from qat.engine import build, load

    backend = backend_on(config, device)
    options = Options(threads=threads, cache=None, tensorrt=TensorRtOptions(profiles=tuple(config.profiles)))
    if config.backend == "tensorrt":
        return load(file, backend, config.precision, options)
    precision = "fp32" if config.precision == "fp16" else config.precision  # FP16 is in the graph's own types
    return build(file, backend, precision, options)


def backend_on(config: VoxelConfig, device: str) -> str:
    """A deploy config's backend on a device, a key of `qat.engine.BACKENDS`.

    Raises:
        UserError: another device.
    """
    kind = device.partition(":")[0]
    allowed = {"onnxruntime": ("cpu", "cuda"), "openvino": ("cpu",), "tensorrt": ("cpu", "cuda")}[config.backend]
    if kind not in allowed:
        raise UserError(f"--device: found {device!r}, expected {' or '.join(allowed)} for {config.backend}")
    return "onnxruntime-cuda" if (config.backend, kind) == ("onnxruntime", "cuda") else config.backend

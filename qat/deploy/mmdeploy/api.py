"""MMDeploy's Python functions for mmdet3d's lidar detectors, with its signatures.

Configs are paths, or mmengine's `Config` objects that were read from files. A cloud ("img") is a .bin file, infos (.pkl), or float32[M,C].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.core.files import atomic_path
from qat.deploy.mmdeploy.clouds import CalibrationFrames, Cloud, points_prefix, read_cloud
from qat.deploy.mmdeploy.config import VoxelConfig, read
from qat.deploy.mmdeploy.detector import (
    Detector,
    check_torch,
    is_checkpoint,
    open_detector,
    path_of,
    pytorch_detector,
    voxels_in,
)
from qat.deploy.mmdeploy.maps import INPUTS


def inference_model(
    model_cfg: Any,
    deploy_cfg: Any,
    backend_files: str | Path | Sequence[str | Path],
    img: str | Path | np.ndarray,
    device: str = "cpu",
    legacy: bool = False,
) -> list[Any]:
    """Boxes of one cloud by a deployed model's files.

    Args:
        backend_files: what `bevqat deploy` or MMDeploy wrote. legacy: the form of 0.x.

    Returns:
        [Det3DDataSample], whose `pred_instances_3d` has bboxes_3d, scores_3d and labels_3d; or [[{"boxes_3d", "scores_3d", "labels_3d"}]].

    Raises:
        UserError: a config, a file or the cloud does not load, or they do not belong together.
    """
    processor = build_task_processor(model_cfg, deploy_cfg, device)
    model = processor.build_backend_model(backend_files)
    found = model.detector(processor.cloud(img).points)
    return [[legacy_dict(found)]] if legacy else [data_sample(found)]


def torch2onnx(
    img: str | Path,
    work_dir: str | Path,
    save_file: str,
    deploy_cfg: Any,
    model_cfg: Any,
    model_checkpoint: str | Path | None = None,
    device: str = "cuda:0",
) -> None:
    """Writes work_dir/save_file, compared with PyTorch on `img`.

    Args:
        img: a .bin or .pkl file. model_checkpoint: None, "random" or "random:SEED" for random weights. device: checked alone: graphs are
            traced on the CPU.

    Raises:
        UserError: files do not load, or do not fit each other; the graph computes something else than PyTorch.
    """
    import onnx

    from qat.deploy.mmdeploy.deploy import Deployed, Request, composed, opened

    check_torch(device)
    config, work = read(deploy_cfg), Path(work_dir)
    request = Request(model_cfg, model_checkpoint, img, work_dir=work)
    model, clouds = opened(config, request)
    work.mkdir(parents=True, exist_ok=True)
    result = Deployed([work / save_file])
    graph = composed(config, request, model, clouds, result)
    if result.problems:
        raise UserError(f"{work / save_file}: {result.problems[0]}, expected PyTorch's result; please report it")
    with atomic_path(work / save_file) as temporary:
        onnx.save(graph, temporary)


def visualize_model(
    model_cfg: Any,
    deploy_cfg: Any,
    model: str | Path | Sequence[str | Path],
    img: str | Path | np.ndarray | Sequence[Any],
    device: str,
    backend: Any = None,
    output_file: str | Path | None = None,
    show_result: bool = False,
) -> None:
    """Draws the boxes of a cloud, or of several beside each other's names.

    Args:
        model: a checkpoint for PyTorch, or the backend's files. backend: None for the deploy config's; it must be that one. output_file: a PNG;
            of several clouds the later ones have a number behind the name. None with show_result alone.
        show_result: opens it in a window; where there is no display, it is only written.

    Raises:
        UserError: as `inference_model`; there is neither a file nor a window to draw in.
    """
    from qat.deploy.mmdeploy import picture

    processor = build_task_processor(model_cfg, deploy_cfg, device)
    own, asked = processor.config.backend, getattr(backend, "value", backend)
    if asked not in (None, own, "pytorch"):
        raise UserError(f"backend: found {asked!r}, expected {own!r}, the deploy config's, or None")
    if output_file is None:
        raise UserError("output_file: found None, expected the name of a PNG file")
    files = [model] if isinstance(model, str | Path) else list(model)
    in_torch = is_checkpoint(files[0])
    built = processor.build_pytorch_model(files[0]) if in_torch else processor.build_backend_model(files)
    clouds: list[Any] = list(img) if isinstance(img, list | tuple) else [img]
    target = Path(output_file)
    for n, one in enumerate(clouds):
        cloud = processor.cloud(one)
        path = target.with_stem(f"{target.stem}_{n}") if n else target
        found = built.detector(cloud.points)
        picture.draw(cloud.points, found, path, cloud.image, cloud.lidar2img, built.detector.classes)
        if show_result:
            picture.show(path)


def create_calib_input_data(
    calib_file: str | Path,
    deploy_cfg: Any,
    model_cfg: Any,
    model_checkpoint: str | Path | None = None,
    dataset_cfg: Any = None,
    dataset_type: str = "val",
    device: str = "cpu",
) -> None:
    """Writes the network's inputs for the frames that INT8 is calibrated on, for calibrators elsewhere; `bevqat deploy` needs no such file.

    Args:
        calib_file: an .npz file, with `voxels/N`, `num_points/N` and `coors/N` of each frame N. dataset_cfg: an mmdet3d config whose
            {dataset_type}_dataloader names the data; None for `model_cfg`.
        model_checkpoint, device: must be there; the inputs depend on neither.

    Raises:
        UserError: there is no such data, or another kind of file is asked for.
    """
    path = Path(calib_file)
    if path.suffix != ".npz":
        raise UserError(f"{path}: found the ending {path.suffix!r}, expected .npz, which numpy reads")
    if model_checkpoint is not None and not Path(model_checkpoint).is_file():
        raise UserError(f"{model_checkpoint}: found no such file, expected a checkpoint, or None")
    flow = build_task_processor(model_cfg, deploy_cfg, device).flow
    frames = CalibrationFrames(path_of(dataset_cfg or model_cfg), dataset_type)
    arrays: dict[str, np.ndarray] = {}
    for n, token in enumerate(frames.tokens):
        feeds = voxels_in(flow.prepare(frames.load(token).points).points, flow)
        arrays.update({f"{name}/{n}": feeds[name] for name in INPUTS})
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, **arrays)


def build_task_processor(model_cfg: Any, deploy_cfg: Any, device: str) -> TaskProcessor:
    """What MMDeploy's other steps begin with.

    Raises:
        UserError: a config does not load; the device is not there.
    """
    from qat.model.opening import read_config

    check_torch(device)
    config = read(deploy_cfg)
    family, described = read_config(path_of(model_cfg))
    return TaskProcessor(model_cfg, deploy_cfg, device, config, family.flow(described), dict(described))


@dataclass
class DeployedModel:
    """A model as MMDeploy's steps take it. files: of a backend, or a checkpoint."""

    detector: Detector
    files: list[str]

    def test_step(self, data: dict[str, Any]) -> list[Any]:
        """Det3DDataSample of each cloud in what `TaskProcessor.create_input` returned."""
        found = self.detector.batch([points.cpu().numpy() for points in data["inputs"]["points"]])
        return [data_sample(one, sample) for one, sample in zip(found, data["data_samples"], strict=True)]


@dataclass
class TaskProcessor:
    """MMDeploy's `VoxelDetection`. flow: the model's host side. described: what its config describes."""

    model_cfg: Any
    deploy_cfg: Any
    device: str
    config: VoxelConfig
    flow: Any
    described: dict[str, Any]

    def cloud(self, img: str | Path | np.ndarray) -> Cloud:
        """A cloud with the picture that shows it, where there is one."""
        if isinstance(img, np.ndarray):
            return Cloud("points", img)
        from qat.families.mmdet3d.config import read as read_config

        return read_cloud(img, self.described, points_prefix(read_config(path_of(self.model_cfg))))

    def build_pytorch_model(self, model_checkpoint: str | Path | None = None) -> DeployedModel:
        """The model in PyTorch. model_checkpoint: None for random weights."""
        detector = pytorch_detector(self.model_cfg, model_checkpoint, self.device)
        return DeployedModel(detector, [str(model_checkpoint or "random")])

    def build_backend_model(self, model_files: str | Path | Sequence[str | Path]) -> DeployedModel:
        """The model behind the backend's files."""
        files = [model_files] if isinstance(model_files, str | Path) else list(model_files)
        return DeployedModel(open_detector(self.config, self.model_cfg, files, self.device), list(map(str, files)))

    def create_input(self, pcd: Any, input_shape: None = None) -> tuple[dict[str, Any], list[Any]]:
        """(what `test_step` takes, the network's three inputs as tensors), of one cloud or of the first of several.

        Raises:
            UserError: a shape is asked for: a voxel detector's follow from its config.
        """
        import torch
        from mmdet3d.structures import Det3DDataSample

        if input_shape is not None:
            raise UserError(f"input_shape: found {input_shape}, expected None: voxels have the model config's shape")
        first = pcd[0] if isinstance(pcd, list | tuple) else pcd
        points = self.flow.prepare(self.cloud(first).points).points
        feeds = voxels_in(points, self.flow)
        data = {"inputs": {"points": [torch.from_numpy(points.copy())]}, "data_samples": [Det3DDataSample()]}
        return data, [torch.from_numpy(feeds[name]) for name in INPUTS]

    def visualize(
        self,
        image: str | Path | np.ndarray,
        model: DeployedModel,
        result: Any,
        output_file: str | Path,
        show_result: bool = False,
    ) -> None:
        """Draws a result of `test_step` or `inference_model` on its cloud."""
        from qat.deploy.mmdeploy import picture

        cloud, found = self.cloud(image), detections(result)
        picture.draw(cloud.points, found, output_file, cloud.image, cloud.lidar2img, model.detector.classes)
        if show_result:
            picture.show(output_file)

    def build_test_runner(
        self, model: DeployedModel, work_dir: str | Path, show_dir: str | Path | None = None
    ) -> TestRunner:
        """What tests the model on its config's test set, as `bevqat test` does."""
        return TestRunner(self, model, Path(work_dir), None if show_dir is None else Path(show_dir))

    def get_model_name(self) -> str:
        """The name in deploy.json."""
        return str(self.flow.settings["family"])


@dataclass
class TestRunner:
    """`test()` returns the metrics by mmdet3d's keys."""

    __test__ = False  # it is no test, whatever pytest makes of its name

    processor: TaskProcessor
    model: DeployedModel
    work_dir: Path
    show_dir: Path | None

    def test(self) -> dict[str, float]:
        """Runs the model over the test set; raises as `qat.deploy.mmdeploy.testing.test`."""
        from qat.deploy.mmdeploy.testing import Asked, test

        deploy_cfg, model_cfg = (
            str(getattr(config, "filename", None) or config)
            for config in (self.processor.deploy_cfg, self.processor.model_cfg)
        )
        asked = Asked(
            deploy_cfg,
            model_cfg,
            self.model.files,
            self.processor.device,
            work_dir=self.work_dir,
            show_dir=self.show_dir,
        )
        return dict(test(asked).values)


def data_sample(found: Detections, sample: Any = None) -> Any:
    """Boxes as mmdet3d's Det3DDataSample; those of `sample`, where there is one, are replaced."""
    from mmdet3d.structures import Det3DDataSample
    from mmengine.structures import InstanceData

    sample = Det3DDataSample() if sample is None else sample
    sample.pred_instances_3d = InstanceData(**{f"{name}_3d": value for name, value in _values(found, "bboxes").items()})
    sample.pred_instances = InstanceData()
    return sample


def legacy_dict(found: Detections) -> dict[str, Any]:
    """Boxes as mmdet3d 0.x returned them."""
    return {f"{name}_3d": value for name, value in _values(found, "boxes").items()}


def _values(found: Detections, boxes: str) -> dict[str, Any]:
    import torch
    from mmdet3d.structures import LiDARInstance3DBoxes

    own = found if found.convention == "mmdet3d" else found.converted("mmdet3d")
    return {
        boxes: LiDARInstance3DBoxes(torch.from_numpy(own.boxes.copy()), box_dim=own.boxes.shape[1]),
        "scores": torch.from_numpy(own.scores.copy()),
        "labels": torch.from_numpy(own.labels.copy()),
    }


def detections(result: Any) -> Detections:
    """Boxes of a Det3DDataSample, or of 0.x's dict."""
    if isinstance(result, dict):
        boxes, scores, labels = (result[f"{name}_3d"] for name in ("boxes", "scores", "labels"))
    else:
        found = result.pred_instances_3d
        boxes, scores, labels = found.bboxes_3d, found.scores_3d, found.labels_3d
    return Detections(boxes.tensor.cpu().numpy(), scores.cpu().numpy(), labels.cpu().numpy(), "mmdet3d")

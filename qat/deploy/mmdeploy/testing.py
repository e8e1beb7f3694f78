"""What MMDeploy's tools/test.py does: runs a detector over a model config's test set, and scores, times, writes and draws its boxes."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.core.files import write_json
from qat.core.progress import progress_bar
from qat.deploy.mmdeploy.frames import TestFrames
from qat.deploy.mmdeploy.picture import draw, show
from qat.deploy.mmdeploy.results import ENDINGS, read_results, write_results
from qat.deploy.mmdeploy.scoring import Scorer, scorer_of

if TYPE_CHECKING:
    from mmengine.config import Config

    from qat.deploy.mmdeploy.detector import Detector

STAGES = ("voxelize", "network", "post")
SCORE_THR = 0.3  # of boxes that are drawn, as in mmdet3d
WARMUP, LOG_INTERVAL = 10, 100


@dataclass(frozen=True)
class Asked:
    """What a test is asked for; see `bevqat test --help`.

    model: the backend's files, a checkpoint of PyTorch's, or results that `out` wrote. cfg_options, metric_options: key=value, as
    mmengine's DictAction takes them. warmup, log_interval, score_thr, interval: None where the flag is not given.
    """

    deploy_cfg: str
    model_cfg: str
    model: Sequence[str]
    device: str = "cpu"
    batch_size: int = 1
    cfg_options: Sequence[str] = ()
    out: Path | None = None
    work_dir: Path | None = None
    format_only: bool = False
    metrics: Sequence[str] | None = None
    metric_options: Sequence[str] = ()
    show: bool = False
    show_dir: Path | None = None
    score_thr: float | None = None
    interval: int | None = None
    log2file: Path | None = None
    json_file: Path | None = None
    speed_test: bool = False
    warmup: int | None = None
    log_interval: int | None = None

    @property
    def folder(self) -> Path:
        """Where things go that no other flag places."""
        return self.work_dir or Path("runs/test") / Path(self.model_cfg).stem

    def check(self) -> None:
        """Raises `UserError` for flags that contradict each other."""
        draws, of_results = self.show or self.show_dir is not None, self.results is not None
        for value, flag, needs, there in (
            (self.score_thr, "--show-score-thr", "--show or --show-dir", draws),
            (self.interval, "--interval", "--show or --show-dir", draws),
            (self.warmup, "--warmup", "--speed-test", self.speed_test),
            (self.log_interval, "--log-interval", "--speed-test", self.speed_test),
        ):
            if value is not None and not there:
                raise UserError(f"{flag} only applies with {needs}; add it, or leave {flag} out")
        if self.warmup is not None and self.warmup < 0:
            raise UserError(f"--warmup: found {self.warmup}, expected 0 or more frames")
        if self.format_only and self.metrics:
            raise UserError("--metrics: found with --format-only, which does not score; leave one of them out")
        if self.format_only and self.json_file:
            raise UserError(
                "--json-file: found with --format-only, which has no metrics to write; leave one of them out"
            )
        if of_results and (self.speed_test or self.batch_size != 1 or self.device != "cpu"):
            raise UserError(f"{self.results}: found results with a flag of a detector, expected --model FILES that run")
        if self.out is not None and self.out.suffix not in ENDINGS:
            raise UserError(f"--out: found {self.out}, expected a file that ends in {' or '.join(ENDINGS)}")

    @property
    def results(self) -> str | None:
        """The results file among the models, None for a detector's files."""
        return self.model[0] if len(self.model) == 1 and Path(self.model[0]).suffix in ENDINGS else None


@dataclass
class Tested:
    """What came of it. values: by mmdet3d's keys, empty with format_only. speed: medians in milliseconds a frame, by stage and in all."""

    frames: int
    boxes: int
    values: dict[str, float] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)


class Log:
    """Lines on stdout, and in --log2file as they come."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("")
            except OSError as error:
                raise UserError(f"--log2file: {path}: {error.strerror}, expected a file that can be written") from error

    def __call__(self, text: str) -> None:
        print(text)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write(f"{text}\n")


def key_values(flag: str, items: Sequence[str]) -> dict[str, Any]:
    """key=value words as mmengine's DictAction reads them.

    Raises:
        UserError: a word without `=`, or a value that DictAction refuses.
    """
    from mmengine.config import DictAction

    if wrong := [item for item in items if not item.partition("=")[1] or item.startswith("=")]:
        raise UserError(f"{flag}: found {wrong[0]!r}, expected key=value")
    parser = argparse.ArgumentParser()
    parser.add_argument("--of", nargs="+", action=DictAction)
    try:
        found: dict[str, Any] = parser.parse_args(["--of", *items]).of or {} if items else {}
    except AssertionError as error:
        raise UserError(f"{flag}: found {' '.join(items)}, expected values with balanced brackets") from error
    return found


@contextmanager
def model_config(name: str, options: Mapping[str, Any]) -> Iterator[tuple[Config, Path]]:
    """A model config with --cfg-options, and a file that has the same.

    Raises:
        UserError: it does not load, or the options do not fit it.
    """
    from qat.families.mmdet3d.config import find, read

    path = find(name)
    config = read(path)
    if not options:
        yield config, path
        return
    try:
        config.merge_from_dict(dict(options))
    except (AssertionError, KeyError, TypeError, ValueError, IndexError) as error:
        what = str(error).strip().splitlines()
        raise UserError(f"--cfg-options: {path}: {what[0][:200] if what else type(error).__name__}") from error
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / path.name
        # Not mmengine's own dump, which sorts keys: the order of a head's maps is the order of its modules and outputs.
        values = {key: value for key, value in config.to_dict().items() if key != "source"}
        merged.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()), encoding="utf-8")
        yield config, merged


def open_model(asked: Asked, config: Path) -> Detector:
    """The detector of --model: the backend's, or with a checkpoint PyTorch's. Raises `UserError` as these do."""
    from qat.deploy.mmdeploy.detector import is_checkpoint, open_detector, pytorch_detector

    if len(asked.model) == 1 and is_checkpoint(asked.model[0]):
        return pytorch_detector(str(config), asked.model[0], asked.device)
    return open_detector(asked.deploy_cfg, str(config), list(asked.model), asked.device)


def check_labels(settings: Mapping[str, Any], frames: TestFrames) -> None:
    """Raises `UserError` where a test set has other classes than the model. settings: of its flow."""
    head = settings.get("head", {})
    tasks = [name for task in head.get("tasks", ()) for name in task]
    count = len(tasks) or head.get("classes")
    if (tasks and tasks != frames.classes) or count != len(frames.classes):
        raise UserError(
            f"{frames.source}: metainfo.classes: found {', '.join(frames.classes)}, expected the model's {count}"
            f"{': ' if tasks else ''}{', '.join(tasks)}"
        )


def test(asked: Asked) -> Tested:
    """Tests a detector, or results that were written before.

    Raises:
        UserError: flags that contradict each other; configs, files or a data set that do not load; no such metric. All but what is
            wrong with a frame's own files is found before the detector runs.
    """
    from qat.deploy.mmdeploy.config import read as read_deploy_config

    asked.check()
    read_deploy_config(asked.deploy_cfg)  # also where a checkpoint or results need none of it
    with ExitStack() as stack:
        options = key_values("--cfg-options", asked.cfg_options)
        config, path = stack.enter_context(model_config(asked.model_cfg, options))
        frames = TestFrames(config)
        scorer, format_only = scorer_of(
            frames,
            config.get("test_evaluator"),
            asked.metrics,
            key_values("--metric-options", asked.metric_options),
        )
        format_only = (format_only and not asked.metrics) or asked.format_only
        log = Log(asked.log2file)
        done = Tested(len(frames), 0)
        if asked.results is not None:
            found = read_results(asked.results, frames.names, frames.classes)
        else:
            detector = open_model(asked, path)
            check_labels(detector.flow.settings, frames)
            found = _run(asked, detector, frames, done, log)
    done.boxes = sum(map(len, found))
    log(f"{done.frames} frames of {frames.file}, {done.boxes} boxes")
    _finish(asked, frames, scorer, found, done, log, format_only, config.get("point_cloud_range"))
    return done


def _run(asked: Asked, detector: Detector, frames: TestFrames, done: Tested, log: Log) -> list[Detections]:
    size = asked.batch_size
    times: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "total")}
    warmup = (WARMUP if asked.warmup is None else asked.warmup) if asked.speed_test else 0
    every = LOG_INTERVAL if asked.log_interval is None else asked.log_interval
    for n in range(warmup):
        detector.batch([frames.points(n % len(frames))])
    found: list[Detections] = []
    with progress_bar("test", len(frames)) as shown:
        for first in range(0, len(frames), size):
            clouds = [frames.points(n) for n in range(first, min(first + size, len(frames)))]
            found += detector.batch(clouds)
            stages = {stage: detector.stages_ms[stage] / len(clouds) for stage in STAGES}
            for stage, milliseconds in {**stages, "total": sum(stages.values())}.items():
                times[stage] += [milliseconds] * len(clouds)
            shown(len(found))
            if asked.speed_test and len(found) // every > (len(found) - len(clouds)) // every:
                log(f"{len(found)} of {len(frames)} frames: {_speed(times)}")
    if asked.speed_test:
        done.speed = {stage: round(median(own), 4) for stage, own in times.items()}
        log(f"speed, medians of {len(frames)} frames after {warmup} to warm up, batch size {size}: {_speed(times)}")
    return found


def _speed(times: Mapping[str, Sequence[float]]) -> str:
    medians = {stage: median(own) for stage, own in times.items()}
    words = ", ".join(f"{stage} {value:.2f} ms" for stage, value in medians.items())
    return f"{words}, {1e3 / max(medians['total'], 1e-6):.1f} frames a second"


def _finish(
    asked: Asked,
    frames: TestFrames,
    scorer: Scorer,
    found: Sequence[Detections],
    done: Tested,
    log: Log,
    format_only: bool,
    limits: Sequence[float] | None,
) -> None:
    """Files first: a score that cannot be had does not lose what was found."""
    if asked.out is not None:
        write_results(asked.out, frames.names, found)
        done.written.append(asked.out)
    if format_only or scorer.formats:
        done.written += scorer.write(found, asked.folder / "results")
    for path in done.written:
        log(f"written: {path}")
    if asked.show or asked.show_dir is not None:
        _draw(asked, frames, found, done, limits)
        log(f"{len(done.pictures)} pictures in {asked.show_dir or asked.folder / 'pictures'}")
    if format_only:
        return
    text, done.values = scorer.score(found)
    log(text.rstrip("\n"))
    if asked.json_file is not None:
        write_json(asked.json_file, finite(done.values))
    if asked.work_dir is not None:
        write_json(asked.work_dir / "metrics.json", finite(done.values))


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Values for JSON, which has no NaN."""
    return {key: value if np.isfinite(value) else None for key, value in values.items()}


def _draw(
    asked: Asked,
    frames: TestFrames,
    found: Sequence[Detections],
    done: Tested,
    limits: Sequence[float] | None,
) -> None:
    folder = asked.show_dir or asked.folder / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = range(0, len(frames), asked.interval or 1)
    threshold = SCORE_THR if asked.score_thr is None else asked.score_thr
    with progress_bar("pictures", len(chosen)) as shown:
        for count, n in enumerate(chosen):
            view = frames.view(n)
            image, matrix = (None, None) if view is None else (view.image, view.lidar2img)
            path = folder / f"{frames.names[n]}.png"
            draw(frames.points(n), found[n], path, image, matrix, frames.classes, threshold, limits)
            done.pictures.append(path)
            if asked.show and not show(path):
                print(path)
            shown(count + 1)

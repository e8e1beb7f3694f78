"""Writes generated scenes: the loop over scenes, keyframes and sensors."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from qat import __version__
from qat.core.errors import UserError
from qat.core.files import atomic_path, flush, read_json, write_json
from qat.core.locks import one_writer
from qat.core.processes import die_with_parent, leaving_interrupts_to_us
from qat.core.progress import progress_bar
from qat.data.synth.cast import Caster
from qat.data.synth.catalogue import GROUND, LAMP
from qat.data.synth.rig import LIDAR_MAX_RANGE, MOUNTINGS, Camera, Rig, lidar_rays
from qat.data.synth.shade import Light, shade
from qat.data.synth.world import World, sample_world
from qat.data.tables import LIDAR, Record, SceneTables, token, write_tables

KEYFRAME_PERIOD = 0.5  # seconds: nuScenes annotates at 2 Hz
START_MICROSECONDS = 1_700_000_000_000_000
ANNOTATION_RANGE = 80.0  # metres from the ego car
MAP_METRES, MAP_PIXELS_PER_METRE = 300, 10
VERSION = "v1.0-synth"
# The part of a class's projected box that its mesh covers when nothing hides it (rounded, over views from all sides).
FILL = {"bicycle": 0.35, "motorcycle": 0.5, "pedestrian": 0.5, "traffic_cone": 0.5, "construction_vehicle": 0.5}


@dataclass(frozen=True)
class SynthOptions:
    """Options of `generate`.

    width, height: native image size in pixels. azimuths: lidar columns a revolution (of 32 beams, KITTI's
    64). sweeps: lidar revolutions between two keyframes that are not annotated. splits: split name → number of scenes, in order. rig: of
    `MOUNTINGS`.
    """

    scenes: int
    seed: int = 0
    keyframes: int = 20
    width: int = 400
    height: int = 225
    azimuths: int = 360
    sweeps: int = 4
    jpeg_quality: int = 75
    splits: dict[str, int] = field(default_factory=dict)
    rig: str = "nuscenes"

    def recipe(self) -> dict[str, Any]:
        """As recipe.json has them: the rig only where it is not nuScenes'."""
        options = asdict(self)
        return {name: value for name, value in options.items() if (name, value) != ("rig", "nuscenes")}

    def checked(self) -> SynthOptions:
        """Raises `UserError` for invalid values; fills in the default splits."""
        for name, low in (
            ("scenes", 1),
            ("keyframes", 1),
            ("width", 64),
            ("height", 36),
            ("azimuths", 16),
            ("sweeps", 0),
        ):
            if getattr(self, name) < low:
                raise UserError(f"--{name}: found {getattr(self, name)}, expected at least {low}")
        if not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"--jpeg-quality: found {self.jpeg_quality}, expected 1 to 100")
        splits = self.splits
        if not splits:
            held_out = max(1, self.scenes // 5) if self.scenes > 1 else 0
            prefix = "" if self.rig == "kitti" else "synth_"
            splits = {f"{prefix}train": self.scenes - held_out, f"{prefix}val": held_out}
        from nuscenes.utils.splits import is_predefined_split

        for name in splits:
            if self.rig == "nuscenes" and is_predefined_split(name):
                raise UserError(
                    f"--splits: {name!r} is one of nuScenes' splits, which the devkit ties to its scenes; choose another name"
                )
        if sum(splits.values()) != self.scenes:
            raise UserError(f"--splits: counts add up to {sum(splits.values())}, expected --scenes {self.scenes}")
        return SynthOptions(**{**asdict(self), "splits": splits})


@one_writer("out", inside=True)
def generate(out: str | Path, options: SynthOptions, workers: int = 1, quiet: bool = False) -> Path:
    """Writes a data set in the nuScenes v1.0 format and returns its root.

    The same options write the same bytes, whatever `workers` is. Scenes finished before an interruption are kept; the
    tables appear only when every scene is finished.

    Raises:
        UserError: the options are invalid, or `out` holds another data set.
    """
    options = options.checked()
    out = Path(out)
    recipe = options.recipe()
    done = out / VERSION / "recipe.json"
    parts = out / ".parts"
    begun = {**recipe, "bevqat": __version__}  # another version may generate other scenes
    for earlier, expected in ((done, recipe), (parts / "recipe.json", begun)):
        if earlier.exists() and read_json(earlier) != expected:
            raise UserError(
                f"{out}: found a data set made with other options or by another version ({earlier}); choose another --out or "
                "remove it"
            )
    if done.exists():
        shutil.rmtree(parts, ignore_errors=True)
        return out
    write_json(parts / "recipe.json", begun)
    waiting = [i for i in range(options.scenes) if not (parts / f"{i:05d}.json").exists()]
    before = options.scenes - len(waiting)
    with progress_bar("scenes", options.scenes, before, show=not quiet) as done_with:
        for count, _ in enumerate(_work(out, options, waiting, workers), before + 1):
            done_with(count)
    _assemble(out, options, recipe)
    shutil.rmtree(parts)
    return out


def _work(out: Path, options: SynthOptions, waiting: list[int], workers: int) -> Iterator[None]:
    if workers <= 1:
        for index in waiting:
            write_scene(out, options, index)
            yield
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent) as pool:
        with leaving_interrupts_to_us():
            futures = [pool.submit(write_scene, out, options, index) for index in waiting]
        try:
            for future in as_completed(futures):
                future.result()
                yield
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _assemble(out: Path, options: SynthOptions, recipe: dict[str, Any]) -> None:
    parts = [read_json(out / ".parts" / f"{index:05d}.json") for index in range(options.scenes)]
    names = [scene["name"] for part in parts for scene in part["scene"]]
    splits, start = {}, 0
    for name, count in options.splits.items():
        splits[name] = names[start : start + count]
        start += count
    write_tables(out / VERSION, MOUNTINGS[options.rig].cameras, parts, splits, recipe)


class Moment:
    """The world at one time, ready to cast rays at."""

    def __init__(self, world: World, time: float) -> None:
        self.ego2street = world.ego2street(time)
        meshes = [world.fixed, *(thing.mesh for thing in world.things)]
        triangles = [world.fixed.triangles, *(thing.triangles(time) for thing in world.things)]
        self.caster = Caster(np.concatenate(triangles))
        self.colours = np.concatenate([mesh.colours for mesh in meshes])
        self.materials = np.concatenate([mesh.materials for mesh in meshes])
        self.owner = np.repeat(np.arange(-1, len(world.things)), [len(part) for part in triangles])

    def owners(self, hit: np.ndarray) -> np.ndarray:
        """Index of the thing that each ray hit, -1 for the street and the sky."""
        return np.where(hit >= 0, self.owner[hit], -1)


def write_scene(out: Path, options: SynthOptions, index: int) -> None:
    """Renders one scene into `out` and leaves its table records in `out/.parts`."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng(np.random.SeedSequence([options.seed, index]))
    times = np.arange(options.keyframes) * KEYFRAME_PERIOD
    world = sample_world(rng, times)
    rig = Rig.sample(rng, options.width, options.height, MOUNTINGS[options.rig])
    light = Light.sample(rng)
    scene = _Scene(out, options, index, world, rig, light, rng)
    for frame, time in enumerate(times):
        scene.keyframe(frame, float(time))
        if frame + 1 < len(times):
            for k in range(options.sweeps):
                step = KEYFRAME_PERIOD * (k + 1) / (options.sweeps + 1)
                scene.lidar(float(time + step), frame, key=False)
    records = scene.finish()
    flush(scene.files)  # synced all at once: one by one, each would wait for the disk
    flush({file.parent for file in scene.files})
    write_json_compact(out / ".parts" / f"{index:05d}.json", records)


def write_json_compact(path: Path, value: Any) -> None:
    """Writes one line of JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, separators=(",", ":")))


class _Scene:
    """Collects one scene's records while its sensors are rendered."""

    def __init__(
        self,
        out: Path,
        options: SynthOptions,
        index: int,
        world: World,
        rig: Rig,
        light: Light,
        rng: np.random.Generator,
    ) -> None:
        self.out, self.options, self.index = out, options, index
        self.world, self.rig, self.light, self.rng = world, rig, light, rng
        self.name = f"synth-{options.seed:04d}-{index:05d}"
        self.key = (options.seed, index, options.width, options.azimuths)
        self.files: list[Path] = []
        self.tables = SceneTables(self.key, self.name, MOUNTINGS[options.rig].cameras)
        rgb = light.white_balance
        self.description = (
            f"{light.weather}, {world.street.lanes} lanes a side, white balance {rgb[0]:.2f}/{rgb[2]:.2f}"
        )

    def _timestamp(self, time: float) -> int:
        return START_MICROSECONDS + self.index * 60_000_000 + round(time * 1e6)

    def _file(self, channel: str, time: float, key: bool, suffix: str) -> str:
        folder = "samples" if key else "sweeps"
        return f"{folder}/{channel}/{self.name}__{channel}__{self._timestamp(time)}{suffix}"

    def _sample_data(
        self,
        channel: str,
        time: float,
        frame: int,
        key: bool,
        name: str,
        ego2street: np.ndarray,
        shape: tuple[int, int],
    ) -> None:
        ego2global = self.world.street2global @ ego2street
        self.tables.add_data(channel, self._timestamp(time), frame, name, ego2global, shape, key)

    def keyframe(self, frame: int, time: float) -> None:
        """Renders all sensors of one keyframe and annotates the objects that they see."""
        self.tables.add_sample(frame, self._timestamp(time))
        lidar_points = self.lidar(time, frame, key=True)
        pixels = np.zeros(len(self.world.things))
        expected = np.zeros(len(self.world.things))
        for camera in self.rig.cameras:
            seen, possible = self._image(camera, time - camera.delay, frame)
            pixels += seen
            expected += possible
        self._annotate(frame, time, lidar_points, pixels, expected)

    def lidar(self, time: float, frame: int, key: bool) -> np.ndarray:
        """Casts one revolution, writes its points; returns the number of points on each thing."""
        moment = Moment(self.world, time)
        lidar2street = moment.ego2street @ self.rig.lidar2ego
        directions, rings = lidar_rays(self.options.azimuths, float(self.rng.random()), MOUNTINGS[self.options.rig])
        cast = (directions @ lidar2street[:3, :3].T.astype(np.float32)).astype(np.float32)
        origins = np.ascontiguousarray(np.broadcast_to(lidar2street[:3, 3].astype(np.float32), cast.shape))
        hit, distance = moment.caster.nearest(origins, cast)
        kept = (hit >= 0) & (distance < LIDAR_MAX_RANGE) & (self.rng.random(len(hit)) > 0.02)
        grazing = np.abs((moment.caster.normals[hit] * cast).sum(1))
        kept &= ~((moment.materials[hit] == GROUND) & (distance > 45) & (self.rng.random(len(hit)) < 0.7))
        reach = distance + self.rng.normal(0, 0.015, len(hit)).astype(np.float32)
        intensity = np.clip(moment.colours[hit].mean(1) * 120 * grazing + self.rng.normal(0, 3, len(hit)), 0, 255)
        intensity[moment.materials[hit] == LAMP] = 200
        points = np.concatenate([directions * reach[:, None], np.round(intensity)[:, None], rings[:, None]], 1).astype(
            np.float32
        )[kept]
        name = self._file(LIDAR, time, key, ".pcd.bin")
        with self._writing(name) as temporary:
            temporary.write_bytes(points.tobytes())  # tofile's error on a full disk lacks the system's message
        self._sample_data(LIDAR, time, frame if key else frame + 1, key, name, moment.ego2street, (0, 0))
        owners = moment.owners(hit)[kept]
        return np.bincount(owners[owners >= 0], minlength=len(self.world.things))

    def _image(self, camera: Camera, time: float, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Renders one image; returns the visible pixels of each thing, and those expected if nothing hid it."""
        width, height = self.options.width, self.options.height
        moment = Moment(self.world, time)
        camera2street = moment.ego2street @ camera.sensor2ego
        directions = np.ascontiguousarray(camera.rays(width, height) @ camera2street[:3, :3].T.astype(np.float32))
        origin = camera2street[:3, 3].astype(np.float32)
        hit, distance = moment.caster.nearest(
            np.ascontiguousarray(np.broadcast_to(origin, directions.shape)), directions
        )
        image = shade(
            moment.caster,
            moment.colours,
            moment.materials,
            self.world.street,
            self.light,
            origin,
            moment.ego2street[:3, 0],
            directions,
            hit,
            distance,
            (height, width),
            self.rng,
        )
        name = self._file(camera.name, time, True, ".jpg")
        with self._writing(name) as temporary:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=self.options.jpeg_quality)
            temporary.write_bytes(buffer.getvalue())
        self._sample_data(camera.name, time, frame, True, name, moment.ego2street, (height, width))
        owners = moment.owners(hit)
        seen = np.bincount(owners[owners >= 0], minlength=len(self.world.things)).astype(float)
        return seen, self._expected_pixels(camera, camera2street, time)

    def _expected_pixels(self, camera: Camera, camera2street: np.ndarray, time: float) -> np.ndarray:
        street2camera = np.linalg.inv(camera2street)
        frame = np.array(
            [[0, 0], [self.options.width, 0], [self.options.width, self.options.height], [0, self.options.height]],
            np.float32,
        )
        areas = np.zeros(len(self.world.things))
        unit = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (0, 1)])
        for i, thing in enumerate(self.world.things):
            c, s = np.cos(thing.yaw), np.sin(thing.yaw)
            corners = unit * thing.size @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + thing.at(time)
            corners = corners @ street2camera[:3, :3].T + street2camera[:3, 3]
            if (corners[:, 2] < 0.3).any():
                continue
            uv = corners @ camera.intrinsic.T
            hull = cv2.convexHull((uv[:, :2] / uv[:, 2:]).astype(np.float32))
            area, _ = cv2.intersectConvexConvex(hull, frame)
            areas[i] = area * FILL.get(thing.name, 0.8)
        return areas

    def _annotate(
        self, frame: int, time: float, lidar_points: np.ndarray, pixels: np.ndarray, expected: np.ndarray
    ) -> None:
        ego = self.world.ego2street(time)[:3, 3]
        for i, thing in enumerate(self.world.things):
            # Radar sees vehicles that are not hidden, a few returns each; nothing else.
            radar = (
                int(self.rng.poisson(2))
                if thing.name in ("car", "truck", "bus", "trailer", "construction_vehicle")
                else 0
            )
            radar = radar if pixels[i] > 40 else 0
            centre = thing.at(time) + [0, 0, thing.size[2] / 2]
            if np.linalg.norm(centre - ego) > ANNOTATION_RANGE or not (lidar_points[i] or radar):
                continue  # nuScenes' annotators boxed what had at least one lidar or radar point
            ratio = pixels[i] / max(expected[i], 1.0)
            rotation = self.world.street2global[:3, :3]
            yaw = thing.yaw + np.arctan2(rotation[1, 0], rotation[0, 0])
            self.tables.add_annotation(
                i,
                frame,
                (self.world.street2global @ [*centre, 1.0])[:3],
                thing.size,
                yaw,
                1 + int(np.digitize(ratio, [0.4, 0.6, 0.8])),
                thing.attribute,
                int(lidar_points[i]),
                radar,
            )

    def _writing(self, name: str) -> AbstractContextManager[Path]:
        """`atomic_path` of a file of the data set. It is synced to disk with the scene's others, before the scene counts
        as done."""
        self.files.append(self.out / name)
        return atomic_path(self.files[-1], durable=False)

    def _map_mask(self) -> str:
        """Where cars and people may go, as nuScenes' semantic prior: 255 on road and pavement."""
        size = MAP_METRES * MAP_PIXELS_PER_METRE
        mask = np.zeros((size, size), np.uint8)
        street = self.world.street
        strips = [(-130.0, 130.0, -street.frontage, street.frontage)]
        if street.cross_x is not None:
            strips.append((street.cross_x - 4.5, street.cross_x + 4.5, -130.0, 130.0))
        for x0, x1, y0, y1 in strips:
            corners = (
                np.array([[x0, y0, 0, 1], [x1, y0, 0, 1], [x1, y1, 0, 1], [x0, y1, 0, 1]]) @ self.world.street2global.T
            )
            pixels = np.stack([corners[:, 0], MAP_METRES - corners[:, 1]], 1) * MAP_PIXELS_PER_METRE
            cv2.fillPoly(mask, [np.round(pixels).astype(np.int32)], (255,))
        name = f"maps/{token('map', *self.key)}.png"
        with self._writing(name) as temporary:
            buffer = io.BytesIO()
            Image.fromarray(mask).convert("1").save(buffer, "PNG", optimize=True)
            temporary.write_bytes(buffer.getvalue())
        return name

    def finish(self) -> dict[str, list[Record]]:
        """The scene's records, linked."""
        return self.tables.finish(
            self.description,
            {"vehicle": "synth", "date_captured": "2026-01-01", "location": "synthetic-street"},
            self._map_mask(),
            {i: thing.name for i, thing in enumerate(self.world.things)},
            [
                (LIDAR, self.rig.lidar2ego, []),
                *((camera.name, camera.sensor2ego, camera.intrinsic.tolist()) for camera in self.rig.cameras),
            ],
        )

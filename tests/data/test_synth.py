"""The generator: what it writes is what the nuScenes devkit expects, and what it annotates is what it drew."""

import dataclasses
import hashlib

import numpy as np
import pytest
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.splits import get_scenes_of_split

from qat.core.errors import UserError
from qat.data.synth import SynthOptions, generate
from qat.data.synth.catalogue import CLASSES, build, draw_size
from qat.data.synth.generate import VERSION, _Scene
from qat.data.synth.rig import CAMERAS, lidar_rays
from qat.data.synth.world import _separated, sample_world


@pytest.fixture(scope="module")
def nusc(synth_root):
    return NuScenes(VERSION, str(synth_root), verbose=False)


def tree_hash(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_the_devkit_finds_every_file_and_both_splits(nusc, synth_root):
    assert len(nusc.scene) == 2 and len(nusc.sample) == 6
    for record in nusc.sample_data:
        assert (synth_root / record["filename"]).is_file()
    assert get_scenes_of_split("calib", nusc) == [nusc.scene[0]["name"]]
    assert get_scenes_of_split("held", nusc) == [nusc.scene[1]["name"]]
    assert all(set(sample["data"]) == {"LIDAR_TOP", *CAMERAS} for sample in nusc.sample)


def test_the_devkit_draws_it(nusc, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    sample = nusc.sample[0]
    nusc.render_sample_data(sample["data"]["CAM_FRONT"], out_path=str(tmp_path / "front.png"), verbose=False)
    nusc.render_sample_data(
        sample["data"]["LIDAR_TOP"], out_path=str(tmp_path / "top.png"), verbose=False, underlay_map=False
    )
    assert (tmp_path / "front.png").stat().st_size > 1000 and (tmp_path / "top.png").stat().st_size > 1000


def test_sweeps_lie_between_keyframes(nusc):
    sweeps = [r for r in nusc.sample_data if r["channel"] == "LIDAR_TOP" and not r["is_key_frame"]]
    assert len(sweeps) == 4  # two intervals a scene
    for sweep in sweeps:
        before, after = nusc.get("sample_data", sweep["prev"]), nusc.get("sample_data", sweep["next"])
        assert before["timestamp"] < sweep["timestamp"] < after["timestamp"]


def test_velocity_is_displacement_over_time(nusc):
    checked = 0
    for annotation in nusc.sample_annotation:
        if annotation["next"] and annotation["prev"]:
            moved = np.subtract(
                nusc.get("sample_annotation", annotation["next"])["translation"],
                nusc.get("sample_annotation", annotation["prev"])["translation"],
            )
            attributes = [nusc.get("attribute", t)["name"] for t in annotation["attribute_tokens"]]
            speed = np.linalg.norm(moved[:2]) / 1.0
            assert (speed > 0.1) == any(
                a in ("vehicle.moving", "pedestrian.moving", "cycle.with_rider") and speed > 0.1 for a in attributes
            )
            assert np.allclose(nusc.box_velocity(annotation["token"]), moved / 1.0, atol=1e-3)
            checked += 1
    assert checked > 5


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("active", [False, True])
def test_a_mesh_fills_its_box_exactly(name, active):
    rng = np.random.default_rng(5)
    size = draw_size(name, rng)
    mesh = build(name, size, rng, active)
    low, high = mesh.triangles.min((0, 1)), mesh.triangles.max((0, 1))
    assert np.allclose(high - low, size, atol=1e-4)
    assert np.allclose(low, [-size[0] / 2, -size[1] / 2, 0], atol=1e-4)
    assert len(mesh.triangles) == len(mesh.colours) == len(mesh.materials)


def test_every_class_appears_and_nothing_overlaps():
    seen = set()
    for seed in range(6):
        world = sample_world(np.random.default_rng(seed), np.arange(3) * 0.5)
        seen |= {thing.name for thing in world.things}
        for time in (0.0, 1.0):
            boxes = [_rectangle(thing, time) for thing in world.things]
            for i in range(len(boxes)):
                for j in range(i):
                    if np.linalg.norm(boxes[i].mean(0) - boxes[j].mean(0)) < 12:
                        assert _separated(boxes[i], boxes[j]), (world.things[i].name, world.things[j].name)
    assert seen == set(CLASSES)


def _rectangle(thing, time):
    c, s = np.cos(thing.yaw), np.sin(thing.yaw)
    half = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * np.array(thing.size[:2]) / 2
    return half @ np.array([[c, s], [-s, c]]) + thing.at(time)[:2]


def test_the_lidar_has_32_beams_between_its_limits():
    directions, rings = lidar_rays(10, 0.0)
    assert len(directions) == 320 and set(rings) == set(range(32))
    elevation = np.rad2deg(np.arcsin(directions[:, 2]))
    assert np.isclose(elevation.min(), -30.67, atol=1e-3) and np.isclose(elevation.max(), 10.67, atol=1e-3)
    assert np.allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-6)


SMALLEST = SynthOptions(
    scenes=2, seed=1, keyframes=1, width=64, height=36, azimuths=32, sweeps=0, splits={"a": 1, "b": 1}
)


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    one = generate(tmp_path / "one", SMALLEST, workers=1, quiet=True)
    two = generate(tmp_path / "two", SMALLEST, workers=2, quiet=True)
    assert tree_hash(one) == tree_hash(two)


def test_another_seed_gives_other_scenes(tmp_path):
    one = generate(tmp_path / "one", SMALLEST, quiet=True)
    two = generate(tmp_path / "two", dataclasses.replace(SMALLEST, seed=2), quiet=True)
    images = [sorted((root / "samples/CAM_FRONT").iterdir())[0].read_bytes() for root in (one, two)]
    assert images[0] != images[1]


def test_an_interrupted_run_keeps_finished_scenes_and_ends_the_same(tmp_path, monkeypatch):
    whole = generate(tmp_path / "whole", SMALLEST, quiet=True)
    real = _Scene.finish
    calls = []

    def interrupted(self):
        calls.append(self.index)
        if self.index == 1:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(_Scene, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "cut", SMALLEST, quiet=True)
    assert not (tmp_path / "cut" / VERSION).exists()
    monkeypatch.setattr(_Scene, "finish", lambda self: calls.append(self.index) or real(self))
    cut = generate(tmp_path / "cut", SMALLEST, quiet=True)
    assert calls == [0, 1, 1]  # the first scene was not rendered again
    assert tree_hash(cut) == tree_hash(whole)


def test_options_that_make_no_data_set_are_refused(tmp_path):
    for changes, message in (
        ({"scenes": 0}, "--scenes"),
        ({"splits": {"val": 1, "a": 1}}, "nuScenes' splits"),
        ({"splits": {"a": 1}}, "add up to 1"),
        ({"jpeg_quality": 0}, "--jpeg-quality"),
    ):
        with pytest.raises(UserError, match=message):
            generate(tmp_path / "bad", dataclasses.replace(SMALLEST, **changes), quiet=True)
    assert not (tmp_path / "bad").exists()


def test_a_folder_with_another_data_set_is_left_alone(tmp_path):
    root = generate(tmp_path / "set", SMALLEST, quiet=True)
    before = tree_hash(root)
    with pytest.raises(UserError, match="other options"):
        generate(root, dataclasses.replace(SMALLEST, seed=9), quiet=True)
    assert tree_hash(root) == before

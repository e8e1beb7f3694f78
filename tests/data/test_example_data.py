"""The committed data set is what its README and the demo say it is."""

from pathlib import Path

import numpy as np

from qat.core.files import read_json
from qat.data import NuScenesDataset
from qat.data.synth import SynthOptions
from qat.data.synth.generate import VERSION, write_scene
from qat.families.bevfusion.config import load_config

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "example-data"


def test_it_is_small_and_holds_enough_keyframes_in_scenes_apart():
    config = load_config(ROOT / "model/camera-tiny/config.yaml")
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 10_000_000
    calib, evaluation = (NuScenesDataset(DATA, split, config) for split in ("calib", "eval"))
    assert len(calib) >= 16 and len(evaluation) >= 40
    scenes = [{d.nusc.get("sample", t)["scene_token"] for t in d.tokens} for d in (calib, evaluation)]
    assert not scenes[0] & scenes[1]


def test_every_class_is_annotated_for_evaluation():
    config = load_config(ROOT / "model/camera-tiny/config.yaml")
    dataset = NuScenesDataset(DATA, "eval", config)
    labels = {label for token in dataset.tokens for label in dataset.load(token).gt_labels.tolist()}
    assert labels == set(range(10))


def test_the_generator_in_this_commit_makes_its_first_scene(tmp_path):
    """Points and tables to the letter; pixels to within what another libm may round differently."""
    from qat.core.preprocess import load_image

    options = SynthOptions(**read_json(DATA / VERSION / "recipe.json"))
    write_scene(tmp_path, options, 0)
    made = sorted((tmp_path / "samples/LIDAR_TOP").iterdir())
    assert len(made) == 4
    for path in made:
        ours, theirs = np.fromfile(path, np.float32), np.fromfile(DATA / path.relative_to(tmp_path), np.float32)
        assert ours.shape == theirs.shape and np.allclose(ours, theirs, atol=1e-3)
    for path in sorted((tmp_path / "samples/CAM_FRONT").iterdir()):
        difference = load_image(path).astype(int) - load_image(DATA / path.relative_to(tmp_path))
        assert np.abs(difference).mean() < 1.0

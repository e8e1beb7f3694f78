"""A folder of built engines: written whole, loaded without its graphs, and only where it was built for."""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qat.cli import main
from qat.cli.build import add_arguments
from qat.cli.engine_flags import tensorrt_options
from qat.core.errors import UserError
from qat.engine import CPU_BACKENDS, Options, TensorRtOptions, described
from qat.engine.tensorrt_options import Profile
from qat.runtime import Calibration, Pipeline, build_engines
from qat.runtime.engines import _run_notes, run_options
from qat.runtime.verify import verify_folder
from tests.messages import refused

BACKENDS = sorted(CPU_BACKENDS)
PARTS = ["camera.backbone", "camera.vtransform", "fuser", "head.bbox"]


@pytest.fixture(scope="module")
def built(tmp_path_factory, exported_fp32):
    """A folder of engines by backend; copy it before changing anything in it."""
    root = tmp_path_factory.mktemp("built")
    options = Options(threads=1, cache=None)
    return {name: build_engines(exported_fp32, name, out=root / name, options=options)[0] for name in BACKENDS}


@pytest.fixture
def engines(tmp_path, built):
    return Path(shutil.copytree(built["openvino"], tmp_path / "engines"))


def detect(pipeline, scene):
    calibration = Calibration(scene["camera_intrinsics"], scene["camera2lidar"])
    return pipeline(scene["images"], scene["points"], calibration)


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["engine"].update(changes)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_engines_give_the_boxes_of_the_graphs_that_they_were_built_from(exported_fp32, built, small_scene, backend):
    expected = detect(Pipeline.load(exported_fp32, backend, options=Options(1, None)), small_scene)
    pipeline = Pipeline.load(built[backend])
    found = detect(pipeline, small_scene)
    assert len(expected) > 5
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-5, atol=1e-5)
    assert set(PARTS) < set(pipeline.timing_ms) and {"pooling", "decode"} < set(pipeline.timing_ms)


def test_the_build_command_writes_a_file_for_each_part_and_says_what_for(tmp_path, exported_fp32, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported_fp32, "onnx_fp32")
    assert main(["build", "--onnx", "onnx_fp32", "--backend", "onnxruntime", "--threads", "2", "--no-spinning"]) == 0
    folder = tmp_path / "engines_fp32_onnxruntime"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(["manifest.json", *(f"{name}.optimized.onnx" for name in PARTS)])
    assert list(manifest["parts"]) == PARTS
    for part in manifest["parts"].values():
        assert part["bytes"] == (folder / part["file"]).stat().st_size
        assert part["onnx"]["sha256"] != part["sha256"]
    printed = capsys.readouterr()
    assert "fuser.optimized.onnx: fp32" in printed.out and printed.err == ""  # the bar is for terminals
    shutil.rmtree("onnx_fp32")
    settings = Pipeline.load(folder).parts["fuser"].settings  # those that the session itself tells
    assert settings.intra_op_num_threads == 2
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    own = Pipeline.load(folder, options=Options(threads=1)).parts["fuser"].settings
    assert own.intra_op_num_threads == 1
    assert own.get_session_config_entry("session.intra_op.allow_spinning") == "0"  # not asked for: as noted


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_robots_process_needs_neither_torch_nor_the_graphs(tmp_path, built, small_scene, backend):
    np.savez(tmp_path / "scene.npz", **{**small_scene, "images": np.stack(small_scene["images"])})
    code = f"""
import sys
for name in ("torch", "torchvision", "timm", "onnx", "yaml", "nuscenes", "pytorch_quantization"):
    sys.modules[name] = None
import numpy as np
from qat.runtime import Calibration, Pipeline
scene = np.load({str(tmp_path / "scene.npz")!r})
pipeline = Pipeline.load({str(built[backend])!r})
calibration = Calibration(scene["camera_intrinsics"], scene["camera2lidar"])
print(len(pipeline(list(scene["images"]), scene["points"], calibration)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5


def test_another_backend_or_precision_than_it_was_built_for_is_refused(engines):
    with refused("found engines of openvino", "expected onnxruntime", "build with --backend"):
        Pipeline.load(engines, "onnxruntime")
    with refused("found engines in fp32", "expected int8", "export it with --int8 and build"):
        Pipeline.load(engines, precision="int8")
    assert Pipeline.load(engines, "openvino", "fp32").parts


def test_graphs_need_a_backend(exported_fp32):
    with refused("found ONNX parts", "expected a backend for them too: one of openvino"):
        Pipeline.load(exported_fp32)


def test_a_changed_or_missing_engine_file_is_refused(engines):
    file = engines / "fuser.openvino"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with refused("fuser.openvino", "found sha256", "run `bevqat build` again"):
        Pipeline.load(engines)
    file.unlink()
    with refused("fuser.openvino: no such file", "expected part fuser", "run `bevqat build`"):
        Pipeline.load(engines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2023.1.0"}, r"built by openvino 2023\.1\.0, found .* here; run `bevqat build` again"),
        (
            {"device": "Other CPU", "device_fingerprint": "0" * 16},
            "built for Other CPU, found .* here; run `bevqat build` again",
        ),
        ({"device_fingerprint": "0" * 16}, "found .* with other instruction sets here; run `bevqat build` again"),
        ({"backend": "tpu"}, "backend: found 'tpu', expected one of"),
    ],
)
def test_engines_of_another_version_or_processor_are_refused_before_they_are_opened(engines, changes, message):
    change_manifest(engines, **changes)
    with pytest.raises(UserError, match=message) as error:
        Pipeline.load(engines)
    assert "\n" not in str(error.value)


NOTED = {"backend": "openvino", "precision": "int8", "options": {"threads": 3, "pinning": True, "bfloat16": True}}


def test_options_of_built_engines_are_changed_field_by_field(tmp_path):
    noted = Options(threads=3, pinning=True, bfloat16=True)
    for asked, expected in (
        (None, noted),
        (Options(), noted),
        (Options(threads=2), replace(noted, threads=2)),
        (Options(spinning=False), replace(noted, spinning=False)),
        (Options(bfloat16=True), noted),
        (Options(cache=None), replace(noted, cache=None)),
    ):
        assert run_options(NOTED, asked, tmp_path) == expected


def test_bfloat16_is_as_it_was_built_with(tmp_path):
    without = NOTED | {"options": {"threads": 3}}
    with refused("found engines built without bfloat16", "expected it", "build with --bfloat16"):
        run_options(without, Options(bfloat16=True), tmp_path)
    # An FP32 row beside an INT8 one that is meant: it says nothing to this one.
    assert run_options(without | {"precision": "fp32"}, Options(bfloat16=True), tmp_path) == Options(threads=3)


def test_bfloat16_is_refused_where_it_says_nothing(tmp_path, exported_fp32, capsys):
    for backend, found in (("onnxruntime", "found onnxruntime, expected openvino"), ("openvino", "found fp32 parts")):
        flags = ["--onnx", str(exported_fp32), "--backend", backend, "--bfloat16", "--out", str(tmp_path / "out")]
        assert main(["build", *flags]) == 2
        printed = capsys.readouterr().err
        assert found in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bfloat16_is_noted_of_int8_on_openvino_alone():
    asked = Options(bfloat16=True)
    assert described(asked, ["openvino", "onnxruntime"])["bfloat16"] is True
    assert "bfloat16" not in described(asked, ["onnxruntime", "tensorrt"])
    assert "bfloat16" not in described(asked, ["openvino"], ["fp32"])


def test_plugins_are_loaded_again_from_where_they_were(tmp_path):
    plugin, moved = tmp_path / "plugins.so", tmp_path / "moved.so"
    plugin.write_bytes(b"one")
    options = TensorRtOptions(plugins=(plugin,), workspace=64, cuda_graph=False)
    noted = {"backend": "tensorrt", "precision": "int8", "options": described(Options(tensorrt=options), ["tensorrt"])}
    noted["run"] = json.loads(json.dumps(_run_notes(options)))
    expected = TensorRtOptions(plugins=(plugin,), cuda_graph=False)  # the rest is in the plan
    assert run_options(noted, None, tmp_path).tensorrt == expected
    assert run_options(noted, Options(threads=2), tmp_path) == Options(threads=2, tensorrt=expected)
    plugin.rename(moved)
    with refused("built with plugins of ", "plugins.so", "found no such file", "--plugins"):
        run_options(noted, None, tmp_path)
    found = run_options(noted, Options(tensorrt=TensorRtOptions(plugins=(moved,))), tmp_path)
    assert found.tensorrt == TensorRtOptions(plugins=(moved,), cuda_graph=False)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("parts",), None, "parts: found none, expected a section: damaged; run `bevqat build` again"),
        (("parts", "fuser"), [], "parts: fuser: found '[]', expected a section"),
        (("parts", "fuser", "file"), None, "found file None, expected the name of a file"),
        (("parts", "fuser", "sha256"), 3, "fuser: sha256: found '3', expected a text"),
        (("parts", "fuser", "built_for"), None, "fuser: built_for: found none, expected a text"),
        (("parts", "fuser", "onnx"), {}, "fuser: onnx: sha256: found none, expected a text"),
        (("engine", "options"), None, "engine: options: found none, expected a section"),
        (("engine", "options"), {"tensorrt": 1}, "engine: tensorrt: found '1', expected a section"),
        (("engine", "version"), 2023, "engine: version: found '2023', expected a text"),
        (("verification",), None, "verification: found none, expected a section"),
        (("pipeline",), "x", "pipeline: found 'x', expected a section"),
        (("precision",), None, "precision: found none, expected a text"),
        (("flavour",), None, "flavour: found none, expected a text"),
    ],
)
def test_a_damaged_manifest_is_told_in_one_line(engines, where, value, message):
    path = engines / "manifest.json"
    manifest = section = json.loads(path.read_text())
    for key in where[:-1]:
        section = section[key]
    section[where[-1]] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        Pipeline.load(engines)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


def test_graphs_without_their_pipeline_are_refused(tmp_path, exported_fp32):
    folder = Path(shutil.copytree(exported_fp32, tmp_path / "onnx_fp32"))
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["pipeline"]
    path.write_text(json.dumps(manifest))
    with refused("pipeline", "found none", "expected a section: damaged", "export again"):
        Pipeline.load(folder, "openvino")


def test_a_manifest_without_the_engines_section_is_refused(engines):
    path = engines / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["engine"]["version"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="found no section engine with backend, version"):
        Pipeline.load(engines)


def test_an_interrupted_build_leaves_the_earlier_engines(engines, exported_fp32):
    before = {path.name: path.read_bytes() for path in engines.iterdir()}

    def interrupt(part: str) -> None:
        if part == "fuser":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(exported_fp32, "onnxruntime", out=engines, options=Options(1, None), progress=interrupt)
    assert {path.name: path.read_bytes() for path in engines.iterdir()} == before
    assert [path.name for path in engines.parent.iterdir()] == ["engines"]
    build_engines(exported_fp32, "onnxruntime", out=engines, options=Options(1, None))
    assert sorted(path.suffix for path in engines.iterdir()) == [".json", *[".onnx"] * 4]


def test_a_build_replaces_nothing_but_engines(tmp_path, exported_fp32):
    with pytest.raises(UserError, match="found the folder of the ONNX parts itself"):
        build_engines(exported_fp32, "openvino", out=exported_fp32)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("kept")
    with pytest.raises(UserError, match="found something other than built engines"):
        build_engines(exported_fp32, "openvino", out=tmp_path / "notes")
    assert (tmp_path / "notes" / "a.txt").read_text() == "kept"


def test_an_fp16_folders_graphs_are_built_in_fp32_when_asked(tmp_path, exported_fp32):
    folder = Path(shutil.copytree(exported_fp32, tmp_path / "onnx_fp16"))
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["precision"] = "fp16"
    for part in manifest["parts"].values():
        part["precision"] = "fp16"  # as export-camera --fp16 writes it: the types stay FP32
    path.write_text(json.dumps(manifest))
    with refused("precision fp16: ONNX Runtime's CPU provider takes no precision flag"):
        build_engines(folder, "onnxruntime", options=Options(1, None))
    assert not (tmp_path / "engines_fp16_onnxruntime").exists()
    out, _ = build_engines(folder, "onnxruntime", "fp32", options=Options(1, None))
    assert out == tmp_path / "engines_fp32_onnxruntime"
    assert Pipeline.load(out, precision="fp32").parts["fuser"].precision == "fp32"


def test_engines_are_not_taken_for_graphs(engines):
    with refused("found parts of format engine", "expected onnx: those are built"):
        verify_folder(engines)
    with refused("found parts of format engine", "expected onnx: those are built"):
        build_engines(engines, "openvino")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--backend", "openvino", "--workspace", "64", "--tf32"], "expected tensorrt for --tf32, --workspace"),
        (["--backend", "tensorrt", "--profile", "img"], "expected NAME=MIN:OPT:MAX"),
        (["--backend", "tensorrt", "--input-formats", "fp16"], "expected TYPE:LAYOUT"),
    ],
)
def test_flags_of_another_backend_or_form_are_refused_in_one_line(exported_fp32, capsys, flags, problem):
    assert main(["build", "--onnx", str(exported_fp32), *flags]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


def test_tensorrt_flags_become_its_options():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = [
        "--workspace",
        "64",
        "--tf32",
        "--profile",
        "img=1x3:2x3:4x3",
        "--timing-cache",
        "t",
        "--plugins",
        __file__,
    ]
    options = tensorrt_options(parser.parse_args(["--onnx", "d", "--backend", "tensorrt", *given]), ["tensorrt"])
    assert options == TensorRtOptions(
        workspace=64 * 2**20,
        tf32=True,
        profiles=(Profile("img", (1, 3), (2, 3), (4, 3)),),
        timing_cache=Path("t"),
        plugins=(Path(__file__),),
    )

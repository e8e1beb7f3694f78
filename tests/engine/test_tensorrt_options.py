"""Options of the TensorRT backend, and what of them enters the key of a cached engine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qat.core.errors import UserError
from qat.engine import Options, TensorRtOptions, cuda, tensorrt_backend
from qat.engine.base import cached
from qat.engine.tensorrt_backend import plan_path
from qat.engine.tensorrt_options import Profile, split_format, spread_formats


def test_a_profile_is_read_from_text():
    assert Profile.parse("img=1x3x4x4:2x3x4x4:8x3x4x4") == Profile("img", (1, 3, 4, 4), (2, 3, 4, 4), (8, 3, 4, 4))
    assert Profile.parse("img=2x3") == Profile("img", (2, 3), (2, 3), (2, 3))
    assert Profile.parse("a=b:0=1x2").input == "a=b:0"


@pytest.mark.parametrize(
    "text", ["img", "img=", "=1x3", "img=1x3:2x3", "img=1xa", "img=1x3:2x3:1x3", "img=0x3", "img=1:1x2:1x2"]
)
def test_a_profile_of_another_form_is_one_line(text):
    with pytest.raises(UserError, match="profile") as caught:
        Profile.parse(text)
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"workspace": 0}, "workspace: found 0"),
        ({"tactic_sources": ("CUBLAS", "MAGIC")}, "tactic source: found 'MAGIC'"),
        ({"optimization_level": 6}, "optimization level: found 6, expected 0 to 5"),
        ({"profiles": (Profile("x", (1,), (1,), (1,)),) * 2}, "profile of x: found twice"),
        ({"input_formats": ("fp16",)}, "format: found 'fp16'"),
        ({"output_formats": ("half:chw",)}, "format: found 'half:chw'"),
        ({"plugins": (Path("/nowhere/plugin.so"),)}, "/nowhere/plugin.so: no such file"),
        ({"timing_cache": Path("/")}, "found a folder"),
    ],
)
def test_a_bad_value_is_one_line(values, said):
    with pytest.raises(UserError) as caught:
        TensorRtOptions(**values)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_formats_are_tensorrts_members():
    assert split_format("fp16:chw") == ("HALF", "LINEAR")
    assert split_format("int8:chw32") == ("INT8", "CHW32")
    assert spread_formats(("fp16:chw",), ["img", "depth"], "input") == {"img": "fp16:chw", "depth": "fp16:chw"}
    with pytest.raises(UserError, match="input formats: found 3, expected 1 or 2: img, depth"):
        spread_formats(("fp16:chw",) * 3, ["img", "depth"], "input")


def test_what_a_plan_depends_on_is_json_and_leaves_out_how_it_is_run(tmp_path):
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(b"one")
    options = TensorRtOptions(plugins=(plugin,), profiles=(Profile.parse("x=1x2"),), timing_cache=tmp_path / "cache")
    described = options.described()
    assert json.loads(json.dumps(described))["profiles"][0]["max"] == [1, 2]
    assert described == TensorRtOptions(plugins=(plugin,), profiles=options.profiles, cuda_graph=False).described()
    assert described != TensorRtOptions(plugins=(plugin,), profiles=options.profiles, tf32=True).described()
    plugin.write_bytes(b"two")
    assert described != options.described()


def kept(folder: Path, backend: str, **options) -> Path:
    """Where an engine of a CPU backend is cached."""
    graph = folder / "g.onnx"
    graph.write_bytes(b"graph")
    return cached(graph, ".built", Options(cache=folder, **options), {"backend": backend}, lambda path: path.touch())


OPENVINO = {"threads": 2, "pinning": True, "bfloat16": True}
ANYONES = OPENVINO | {"spinning": False, "tensorrt": TensorRtOptions(tf32=True, workspace=1)}


def test_a_cached_engine_is_found_again_by_the_options_that_enter_it(tmp_path):
    for backend, entering in (("openvino", OPENVINO), ("onnxruntime", {})):
        plain = kept(tmp_path, backend)
        for name, value in ANYONES.items():
            assert (kept(tmp_path, backend, **{name: value}) == plain) == (name not in entering), (backend, name)


def test_a_cached_plan_is_found_again_by_the_graph_tensorrt_the_gpu_and_what_enters_it(tmp_path, monkeypatch):
    graph = tmp_path / "g.onnx"
    graph.write_bytes(b"graph")
    gpu = cuda.Device(0, "NVIDIA H200", "9.0", "12.9")

    def path(precision="int8", device=gpu, version="10.0.1", **options) -> Path:
        return plan_path(graph, precision, Options(cache=tmp_path, **options), device, version)

    plain = path()
    for name, value in OPENVINO.items() | {("spinning", False)}:
        assert path(**{name: value}) == plain, name
    assert path(tensorrt=TensorRtOptions(cuda_graph=False, timing_cache=tmp_path / "cache")) == plain
    others = {
        path("fp16"),
        path(device=replace(gpu, name="NVIDIA H100")),
        path(version="10.16.1.11"),
        path(tensorrt=TensorRtOptions(tf32=True)),
    }
    monkeypatch.setattr(tensorrt_backend, "BUILD_VERSION", "another")
    assert len({plain, path(), *others}) == 6


def test_fp32_is_fp32_unless_tf32_is_asked_for():
    assert not TensorRtOptions().tf32

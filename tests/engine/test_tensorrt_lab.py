"""The builder against TensorRT's real Python modules: 8.5.3.1 whole, 8.6, 10 and 11 as bindings, up to the driver's call.

They are in a lab of their own, with Python 3.10: `make tensorrt-lab` makes it in .trt, BEVQAT_TENSORRT_PYTHON names its
interpreter elsewhere. Without it these tests skip.
"""

import json
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHOLE = "8.5.3.1"
VERSIONS = (WHOLE, "8.6.1", "10.0.1", "10.16.1.11", "11.4.0.106")
WEAK, STRONG_ONLY = ("8.5.3.1", "8.6.1"), ("11.4.0.106",)
LAB = Path(os.environ.get("BEVQAT_TENSORRT_PYTHON", ROOT / ".trt" / "python"))


@pytest.fixture(scope="session")
def checks(graphs, releases):
    """version → what tensorrt_checks.py found with it."""

    @cache
    def run(version: str) -> dict:
        python = LAB if version == WHOLE else LAB.with_name(f"{LAB.name}-{version}")
        if not python.is_file():
            pytest.skip(f"{python}: no TensorRT {version}; make tensorrt-lab, or name one in BEVQAT_TENSORRT_PYTHON")
        arguments = [json.dumps({name: str(path) for name, path in graphs.items()}), json.dumps(releases[1])]
        done = subprocess.run(
            [str(python), str(Path(__file__).with_name("tensorrt_checks.py")), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture
def found(checks, version):
    return checks(version)


def test_the_engines_code_needs_neither_torch_nor_rich(found, version):
    assert found["version"] == version
    assert not found["torch"] and not found["rich"]


def test_the_table_of_releases_is_what_the_modules_have(found, version, releases):
    table, listing = releases[0][version], found["listing"]
    watched = {"FP16", "INT8", "TF32", "VERSION_COMPATIBLE"}
    assert sorted(watched & set(listing["BuilderFlag"])) == sorted(table["flags"])
    assert listing["NetworkDefinitionCreationFlag"] == sorted(table["network"])
    assert listing["TacticSource"] == sorted(table["sources"])
    for name, attributes in listing["has"].items():
        assert tuple(attributes) == tuple(table["has"].get(name, ())), name
    assert listing["monitor"] == ("IProgressMonitor" in table["has"])


def test_every_call_and_property_is_one_that_the_release_has(found):
    assert found["attributes"]["wrong"] == []
    asked = {name.partition(".")[2] for name in found["attributes"]["used"] if name.startswith("IExecutionContext.")}
    assert asked == {
        "set_optimization_profile_async", "set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3",
        "profiler",
    }  # fmt: skip
    assert found["unknown_cuda_calls"] == []
    assert found["cache_calls"]


def test_a_run_waits_for_the_one_before_it_on_another_stream(found):
    assert found["running"]["orders"] == {
        "own": [],
        "A": ["own records own's end", "A waits for own's end", "A records end"],
        "B": ["B waits for end", "own records own's end", "B waits for own's end", "B records end"],
        "own after B": ["own waits for end"],
        "own again": [],
        "A captured": [],
    }
    assert found["running"]["default"] == 1  # the interface has no 0


def test_layers_are_timed_without_a_second_context(found):
    running = found["running"]
    assert running["layers"] == "" and running["renewed"] == [3, [[2, 4]]]


def test_what_tensorrt_refuses_of_a_run_is_one_line(found):
    refused = found["running"]["refused"]
    assert refused["set_tensor_address"] == "g.plan: x: TensorRT rejects its memory: no cause given"
    assert refused["execute_async_v3"].startswith("g.plan: TensorRT cannot run the plan")
    assert refused["set_input_shape"].startswith("g.plan: input x: TensorRT refuses shape [2, 4]")
    assert refused["set_optimization_profile_async"].startswith("g.plan: TensorRT cannot select the plan's shapes")
    assert "expected an address that is a multiple of 256" in refused["alignment"]


def test_a_cached_plan_is_built_anew_only_where_tensorrt_does_not_take_it(found):
    assert found["cached_plans"] == {"memory": ["no memory", "kept"], "damaged": ["", "new"]}


def test_exported_graphs_are_typed_as_the_release_can(found, version):
    typings = found["typings"]
    if version in STRONG_ONLY:
        assert typings["int8 int8"].endswith("export with --flavour tensorrt-strong")
        assert typings["fp32 fp32"] == [True, []]
    else:
        assert typings["int8 int8"] == [False, ["INT8", "FP16"]]
        assert typings["fp32 fp16"] == [False, ["FP16"]]
        assert typings["fp32 fp32"] == [False, []]
    if version in WEAK:
        assert typings["int8-strong int8"].endswith("export with --flavour tensorrt")
    else:
        assert typings["int8-strong int8"] == typings["fp16-strong fp16"] == [True, []]
    assert "u8 Q/DQ" in typings["cpu int8"]


def test_options_become_the_builders_configuration(found, version):
    config = found["configuration"]
    precision = [] if version in STRONG_ONLY else ["FP16", "INT8"]
    assert config["set"] == [*precision, *([] if version == WHOLE else ["VERSION_COMPATIBLE"])]
    assert config["cleared"] == ["TF32"]
    assert config["workspace"] == [["WORKSPACE", 1 << 28]]
    assert config["sources"] == config["sources_expected"]
    assert config["detailed"]
    assert config["profile"] == [["img", "(1, 3, 8, 8)", "(2, 3, 8, 8)", "(4, 3, 8, 8)"]] and config["added"]
    assert config["level"] == (None if version == WHOLE else 3)


def test_options_that_a_release_has_not_are_refused_by_name(found, version):
    refused = found["configuration"]["refused"]
    for name in ("version_compatible", "level"):
        assert (f"TensorRT {version}" in refused[name]) == (version == WHOLE)
    assert (f"tactic source CUDNN: TensorRT {version} has none" in refused["cudnn"]) == (version in STRONG_ONLY)
    assert "profile of nobody: no such input, expected one of img, depth" in refused["stranger"]
    assert "profile of img: found 1x4x8x8, expected 1x3x8x8" in refused["shape"]
    assert "input img: found ?x3x8x8, expected a profile for it" in refused["no profile"]


def test_networks_are_told_of_explicit_batches_only_where_there_are_others(found, version):
    flags = found["network_flags"]
    assert flags["weak"] == (flags["EXPLICIT_BATCH"] if version in WEAK else 0)
    if version not in WEAK:
        assert flags["strong"] == flags["STRONGLY_TYPED"]


def test_inputs_and_outputs_take_the_reference_scripts_formats(found):
    formats = found["formats"]
    assert formats["types"] == ["HALF"] * 3 and formats["layouts"] == [formats["linear"]] * 3
    assert formats["strong"].endswith("export with --io fp16")
    assert "found 3, expected 1 or 2: img, depth" in formats["count"]


def test_a_parsers_error_names_file_node_and_cause(found, graphs, version):
    assert found["parser_error"].startswith(f"{graphs['int8']}: TensorRT {version} cannot read it: node ")
    assert found["parser_error"].endswith(" (Constant): no importer")


def test_callbacks_are_tensorrts_own_interfaces(found, version):
    seen = found["callbacks"]
    assert (seen["errors"], seen["warnings"]) == (["ERROR"], ["WARNING"])
    if version not in WEAK:
        assert seen["goes_on"] and seen["stops"] and seen["notes"][0] == "build 1/4"


def test_without_a_gpu_one_line_says_so(found):
    if found["no_gpu"] == "":
        pytest.skip("this machine has a GPU")
    assert found["no_gpu"].startswith("cuda:0: ") and found["no_gpu"].endswith(
        "this needs an NVIDIA GPU with its driver"
    )
    assert "cannot start" in found["no_builder"] and "\n" not in found["no_builder"]

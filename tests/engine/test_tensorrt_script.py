"""The GPU lab's script, up to where it needs the GPU."""

import json

import numpy as np
import pytest

from qat.core.errors import UserError
from qat.engine import Options, cuda, tensorrt_backend
from qat.engine.__main__ import Lab, main, plan_jobs, random_feeds, ratios, reference_outputs, result_table, summary
from qat.engine.base import TensorSpec


def test_folders_give_the_rows_of_their_precision(forms):
    jobs = plan_jobs([forms["fp32"], forms["int8"], forms["int8-strong"], forms["fp16-strong"]], None, None)
    rows = {job.name: (job.precision, job.tf32, job.folder) for job in jobs}
    assert rows == {
        "FP32": ("fp32", False, forms["fp32"]),
        "FP32 TF32": ("fp32", True, forms["fp32"]),
        "FP16": ("fp16", False, forms["fp32"]),
        "INT8+FP16": ("int8", False, forms["int8"]),
        "INT8+FP16 strong": ("int8", False, forms["int8-strong"]),
        "FP16 strong": ("fp16", False, forms["fp16-strong"]),
    }
    assert {job.reference for job in jobs} == {forms["fp32"] / "fuser.onnx"}
    assert [job.name for job in plan_jobs([forms["fp32"]], ["fuser"], ["FP16"])] == ["FP16"]


class Refusing:
    """Stands for an engine whose GPU gives up."""

    graph_refused = ""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def enqueue(self, graph: bool | None = None) -> None:
        raise self.error


def test_a_row_that_the_gpu_gives_up_on_says_why_and_the_others_go_on(forms, monkeypatch):
    jobs = plan_jobs([forms["fp32"], forms["int8"]], None, None)
    error = cuda.CudaError("cudaStreamSynchronize", "cudaErrorIllegalAddress", "an illegal memory access")
    said = []

    def build(self, job):
        if job.name == "FP32":
            raise error
        return Refusing(UserError("no kernel") if job.name == "FP16" else error)

    monkeypatch.setattr(Lab, "build", build)
    Lab("cuda:0", Options(), 0, 2, 2, 0.01, 1, {}).run(jobs, said.append)
    errors = {job.name: job.row["error"] for job in jobs}
    assert errors["FP16"] == "no kernel"
    assert errors["FP32"] == errors["INT8+FP16"]
    assert errors["FP32"] == "cudaStreamSynchronize: an illegal memory access (cudaErrorIllegalAddress)"
    assert len(said) == 2 * len(jobs)


def test_what_was_measured_is_written_whatever_ends_the_lab(forms, tmp_path, monkeypatch, capsys):
    def interrupted(self, jobs, say):
        jobs[0].row |= {"part": "fuser", "row": "FP32"}
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt_backend, "describe_device", lambda device: "a GPU")
    monkeypatch.setattr(Lab, "run", interrupted)
    path = tmp_path / "lab.json"
    assert main([str(forms["fp32"]), "--json", str(path)]) == 130
    written = json.loads(path.read_text())
    assert written["machine"] == "a GPU" and written["rows"] == [{"part": "fuser", "row": "FP32"}]


def test_a_part_or_row_that_is_not_there_is_one_line(forms, tmp_path):
    with pytest.raises(UserError, match="part: found 'head', expected of fuser"):
        plan_jobs([forms["fp32"]], ["head"], None)
    with pytest.raises(UserError, match="nothing to build"):
        plan_jobs([forms["fp32"]], None, ["INT8+FP16"])
    with pytest.raises(UserError, match="no such file"):
        plan_jobs([tmp_path], None, None)


def test_inputs_are_random_never_zero_and_the_same_everywhere():
    specs = {"img": TensorSpec("float32", (1, 3, 4)), "depth": TensorSpec("float16", (None, 2))}
    feeds = random_feeds(specs, 3, {"depth": (5, 2)})
    assert feeds["img"].shape == (1, 3, 4) and feeds["depth"].shape == (5, 2)
    assert all(array.dtype == np.float32 and np.all(array != 0) for array in feeds.values())
    assert np.array_equal(feeds["img"], random_feeds(specs, 3, {})["img"])
    assert not np.array_equal(feeds["img"], random_feeds(specs, 4, {})["img"])


def test_reference_outputs_are_written_and_found_again(forms, tmp_path, capsys):
    path = tmp_path / "reference.npz"
    assert main([str(forms["fp32"]), str(forms["int8"]), "--write-reference", str(path)]) == 0
    with np.load(path) as arrays:
        saved = dict(arrays)
    (job, *_) = plan_jobs([forms["fp32"]], None, None)
    specs = {"camera": TensorSpec("float32", (1, 10, 16, 12))}
    feeds = random_feeds(specs, 0, {})
    source, fresh = reference_outputs(job, {}, feeds, 0)
    assert source == "ONNX Runtime"
    source, kept = reference_outputs(job, saved, feeds, 0)
    assert source == "saved" and np.array_equal(kept["middle"], fresh["middle"])


def test_without_tensorrt_or_a_gpu_it_leaves_with_status_2(forms, capsys):
    try:
        cuda.use_device(0)
    except UserError:
        pass
    else:
        pytest.skip("this machine has a GPU: tests/gpu runs the script")
    assert main([str(forms["fp32"])]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--rounds", "0"],
        ["--profile", "x"],
        ["--tactic-sources", "MAGIC"],
        ["--workspace", "0"],
        ["--optimization-level", "9"],
    ],
)
def test_a_bad_flag_leaves_with_status_2(forms, capsys, flags):
    assert main([str(forms["fp32"]), *flags]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_table_has_a_line_a_row_and_the_ratios():
    findings = {"layers": 3, "reformats": ["r"], "int8": ["c"], "fallbacks": [["d", "fp16"]], "hidden": []}

    def row(name: str, precision: str, ms: float, graph: bool = True) -> dict:
        timed = summary([ms] * 99 + [9 * ms])
        return {
            "part": "fuser", "row": name, "precision": precision, "build_s": 1.25, "engine_bytes": 2**20, "eager": timed,
            "transfer": timed, "findings": findings, "difference": {"middle": {"sqnr_db": 31.26}},
            **({"graph": timed} if graph else {}),
        }  # fmt: skip

    rows = [
        row("FP32", "fp32", 4.0),
        row("FP16", "fp16", 2.0),
        {
            "part": "fuser",
            "row": "FP32 TF32",
            "precision": "fp32",
            "error": "g.onnx: TensorRT cannot build it: no tactic",
        },
        row("INT8+FP16", "int8", 1.0, graph=False),
    ]
    lines = result_table(rows)
    assert len(lines) == 5 and lines[0].split()[:3] == ["part", "row", "build"]
    assert "no tactic" in lines[3] and "refused" in lines[4] and "1/2" in lines[4] and "31.3" in lines[4]
    assert ratios(rows) == ["fuser INT8+FP16: FP32 / it 4.00, FP16 / it 2.00"]

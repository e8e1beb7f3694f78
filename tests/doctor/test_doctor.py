"""bevqat doctor: it answers on a machine that has everything needed and on one where much is missing or broken."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qat.cli import main
from qat.doctor import MISSING, OK, PROBLEM, Finding, describe, packages, probes, system

ROOT = Path(__file__).resolve().parents[2]


def test_a_machine_that_runs_these_tests_can_do_the_main_job(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("BEVQAT_CACHE", str(tmp_path / "cache"))
    assert main(["doctor", "--out", str(tmp_path / "runs"), "--json", "-"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["passed"] and "compare work here" in told.err and "\x1b" not in told.err
    states = {(each["group"], each["name"]): each["state"] for each in found["findings"]}
    assert states["imports", "torch"] == states["backends", "openvino"] == states["backends", "onnxruntime"] == OK
    assert set(states.values()) <= {OK, MISSING, PROBLEM}
    assert all(each["found"] for each in found["findings"])
    assert all(each["fix"] for each in found["findings"] if each["needed"] and each["state"] != OK)
    assert found["machine"]["cores_physical"] >= 1 and found["machine"]["memory"] > 2**28
    from qat.engine import BACKENDS

    assert set(found["backends"]) == set(BACKENDS)
    for name, backend in found["backends"].items():
        assert backend["version"] == (BACKENDS[name].version or None)
        assert backend["available"] != bool(backend["why_not"])
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


def distribution(folder, package, version, code):
    """A package in `folder`, as pip would have installed it."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(code)
    (folder / f"{package}-{version}.dist-info").mkdir()
    text = f"Metadata-Version: 2.1\nName: {package}\n" + (f"Version: {version}\n" if version != "0" else "")
    (folder / f"{package}-{version}.dist-info" / "METADATA").write_text(text)


def test_broken_packages_are_told_with_what_mends_them_and_nothing_crashes(tmp_path):
    """torch kills its process, numpy's libraries are not there, numba's metadata were cut off, rich is blocked."""
    distribution(tmp_path, "torch", "1.9.0", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    distribution(tmp_path, "numpy", "2.1.0", "raise ImportError('libopenblas.so.0: cannot open shared object file')")
    distribution(tmp_path, "numba", "0", "")
    script = (
        "import sys; sys.modules['rich'] = None; sys.modules['shtab'] = None\n"
        "from qat.cli import main; sys.exit(main(['doctor', '--json', sys.argv[1], '--out', sys.argv[2]]))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-c", script, str(out), str(tmp_path / "runs")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "do not work here until these are fixed: " in done.stdout
    found = json.loads(out.read_text())
    by_name = {(each["group"], each["name"]): each for each in found["findings"]}
    assert not found["passed"]
    torch = by_name["packages", "torch"]
    assert torch["state"] == PROBLEM and torch["found"].startswith("1.9.0, expected >=") and "torch>=" in torch["fix"]
    assert by_name["packages", "numpy"]["found"] == "2.1.0, expected <2"
    assert (
        by_name["packages", "numba"]["state"] == PROBLEM and "--force-reinstall" in by_name["packages", "numba"]["fix"]
    )
    assert "SIGSEGV" in by_name["imports", "torch"]["found"]
    assert "libopenblas.so.0" in by_name["imports", "numpy"]["found"]
    assert by_name["backends", "all"]["state"] == PROBLEM
    assert by_name["imports", "yaml"]["state"] == OK, "what is whole is still told"


@pytest.mark.parametrize("name", ["torch", "onnx", "numba"])
def test_a_package_that_is_not_there_is_missing(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert probes.answer(f"import:{name}") == {"state": MISSING, "found": "not installed"}


def test_a_package_whose_own_dependency_is_not_there_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "outer_package.py").write_text("import inner_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    found = probes.answer("import:outer_package")
    assert found["state"] == PROBLEM and "inner_package_that_is_not_there" in found["found"]


def test_a_question_that_kills_or_hangs_its_process_is_blamed_and_the_others_are_answered(tmp_path, monkeypatch):
    (tmp_path / "kills.py").write_text("import os; os.abort()")
    (tmp_path / "hangs.py").write_text("import time; print('on stdout', flush=True); time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = probes.ask(["import:json", "import:kills", "import:hangs", "import:csv", "no such kind"], timeout=2)
    states = {question: each["state"] for question, each in found.items()}
    assert states == {
        "import:json": OK,
        "import:kills": PROBLEM,
        "import:hangs": PROBLEM,
        "import:csv": OK,
        "no such kind": PROBLEM,
    }
    assert "SIGABRT" in found["import:kills"]["found"] and "timed out after 2 s" in found["import:hangs"]["found"]


def test_gpus_are_what_the_drivers_tool_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probes.answer("nvidia-smi")["state"] == MISSING
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 570.1, 9.0, 81559'\n")
    tool.chmod(0o755)
    found = probes.answer("nvidia-smi")
    assert found["state"] == OK
    assert found["gpus"] == [{"name": "NVIDIA H100", "driver": "570.1", "capability": "9.0", "memory_mib": "81559"}]
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML: version mismatch' >&2; exit 18\n")
    found = probes.answer("nvidia-smi")
    assert found["state"] == PROBLEM and "version mismatch" in found["found"]


STAND_IN = """
import enum
__version__ = "{version}"
class BuilderFlag(enum.Enum): {builder}
class NetworkDefinitionCreationFlag(enum.Enum): {network}
class Builder: pass
class IBuilderConfig: pass
class ParserError: pass
class ICudaEngine: pass
"""


@pytest.mark.parametrize(
    ("code", "state", "told"),
    [
        (
            STAND_IN.format(version="8.5.3", builder="FP16, INT8 = 1, 2", network="EXPLICIT_BATCH = 1"),
            OK,
            "8.5.3 accepts the flavours tensorrt",
        ),
        (
            STAND_IN.format(version="11.0", builder="TF32 = 1", network="STRONGLY_TYPED = 1"),
            OK,
            "11.0 accepts the flavours tensorrt-strong",
        ),
        ("raise ImportError('libnvinfer.so.10: cannot open shared object file')", PROBLEM, "libnvinfer.so.10"),
    ],
    ids=["8.5", "11", "without libraries"],
)
def test_a_tensorrt_is_told_with_the_flavours_that_it_takes(code, state, told, tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = probes.ask(["tensorrt"])["tensorrt"]
    assert found["state"] == state and told in found["found"], found


def test_what_is_wanted_is_what_setup_py_says(tmp_path):
    want = packages.wanted()
    text = (ROOT / "setup.py").read_text()
    assert all(f'"{requirement}"' in text for requirement in want.core) and "numpy<2" in want.core
    assert set(want.extras) >= {"tensorrt", "gpu", "dev"}
    ast.parse(text)
    installed = packages.wanted(tmp_path)  # no setup.py there: from what pip installed
    assert "numpy<2" in installed.core and "pytest" in installed.extras["dev"]


@pytest.mark.parametrize(
    ("requirement", "version", "fits"),
    [
        ("numpy<2", "1.26.4", True),
        ("numpy<2", "2.0.0", False),
        ("torch>=2.4", "2.13.0+cpu", True),
        ("torch>=2.4", "2.3.1", False),
        ("a>=2.0.0,<2.2.0", "2.1.0", True),
        ("tensorrt", "11.0", True),
        ("numba>=0.60", "not a version", None),
    ],
)
def test_versions_are_compared_as_pip_does(requirement, version, fits):
    assert packages.fits(requirement, version) in ((fits,) if fits is not None else (None, False))


def test_the_command_that_mends_is_for_this_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert packages.pip_line("numpy<2") == "pip install -c constraints.txt 'numpy<2'"
    assert packages.pip_line(extra="tensorrt") == "pip install -c constraints.txt -e '.[tensorrt]'"
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    assert packages.pip_line(extra="tensorrt") == "pip install 'bevqat[tensorrt]'"


def test_limits_of_control_groups_of_both_versions(tmp_path):
    two = tmp_path / "two"
    (two / "a" / "b").mkdir(parents=True)
    (two / "a" / "cpu.max").write_text("150000 100000\n")
    (two / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (two / "a" / "b" / "memory.max").write_text("1073741824\n")
    assert system.limits(two, "0::/a/b\n") == (1.5, 2**30)
    one = tmp_path / "one"
    (one / "cpu").mkdir(parents=True)
    (one / "memory").mkdir()
    (one / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (one / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (one / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert system.limits(one, "5:cpu,cpuacct:/x\n4:memory:/x\n") == (0.5, None)
    assert system.limits(tmp_path / "none", "") == (None, None)


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    (tmp_path / "file").touch()
    assert system.disk_finding("runs", tmp_path / "new" / "runs").state == OK
    found = system.disk_finding("runs", tmp_path / "file" / "runs")
    assert found.state == PROBLEM and found.needed and "--out" in found.fix
    system.disk_finding(
        "runs", tmp_path / ("x" * 300)
    )  # which pathlib cannot look at, as a folder that is somebody else's


def test_a_processor_without_dot_products_is_told_what_that_means():
    facts = {**system.system_facts(), "architecture": "x86_64", "int8_instructions": ["avx2"]}
    found = next(each for each in system.system_findings(facts) if each.name == "INT8")
    assert found.state == MISSING and "--reduce-range" in found.fix
    facts["int8_instructions"] = ["avx2", "avx_vnni"]
    assert next(each for each in system.system_findings(facts) if each.name == "INT8").state == OK


def test_lines_keep_to_the_width_and_commands_stay_whole():
    fix = "pip install " + "x" * 90
    lines = list(describe([Finding("g", "name", OK, "word " * 40), Finding("g", "n", MISSING, "not there", fix)], 60))
    assert lines[0] == "g" and lines[-1].endswith(fix)
    assert all(len(line) <= 60 for line in lines[:-1])

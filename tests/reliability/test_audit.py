"""`make audit` finds a licence that is not permissive and a version with a known vulnerability, and passes what is neither."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "tools" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit"] = module
    spec.loader.exec_module(module)
    return module


audit = _load()


def put(site: Path, name: str, version: str, *lines: str) -> None:
    """A package's metadata in a site-packages."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
    (folder / "METADATA").write_text(text + "\n\n")


@pytest.fixture
def site(tmp_path):
    """bevqat with three packages, of which it needs two directly; one more is for an extra."""
    folder = tmp_path / "site-packages"
    needs = ("Requires-Dist: torch>=2.4", "Requires-Dist: onnx", "Requires-Dist: pytest; extra == 'dev'")
    put(folder, "bevqat", "0.1.0", *needs, "License-Expression: Apache-2.0")
    put(folder, "torch", "2.13.0", "Classifier: License :: OSI Approved :: BSD License", "Requires-Dist: Deep-Dep")
    put(folder, "onnx", "1.23.2", "License-Expression: Apache-2.0")
    put(folder, "deep-dep", "1.0", "License: MIT")
    put(folder, "unrelated", "1.0", "License-Expression: GPL-3.0-only")
    return folder


def run(site: Path, capsys, *more: str):
    status = audit.main(["--path", str(site), "--offline", "--extra", *more])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_permissive_licences_and_current_versions_pass_and_are_listed(site, capsys):
    status, out, err = run(site, capsys)
    assert (status, err) == (0, "")
    assert "torch 2.13.0  BSD-3-Clause" in out and "deep-dep 1.0  MIT" in out
    assert "unrelated" not in out and "3 packages; " in out
    assert f"advisories, reviewed {json.loads(audit.ADVISORIES.read_text())['reviewed']}" in out


def test_a_gpl_package_that_another_one_needs_is_found(site, capsys):
    put(site, "copyleft", "1.0", "Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)")
    put(site, "silent", "2.0")
    (site / "deep_dep-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: deep-dep\nVersion: 1.0\nLicense: MIT\nRequires-Dist: copyleft\nRequires-Dist: silent\n"
    )
    status, _, err = run(site, capsys)
    assert status == 1
    assert "error: copyleft 1.0 (needed by deep-dep): licence GPL-3.0-only is not permissive" in err
    assert "error: silent 2.0 (needed by deep-dep): licence unknown" in err


def test_a_version_with_a_known_vulnerability_is_found(site, capsys):
    (site / "onnx-1.23.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: onnx\nVersion: 1.15.0\nLicense-Expression: Apache-2.0\n"
    )
    status, _, err = run(site, capsys)
    assert status == 1
    assert "error: onnx 1.15.0 (needed by bevqat): CVE-2024-27318" in err and "CVE-2026-27489" in err
    assert "CVE-2022-25882" not in err  # fixed in 1.13


def test_extras_are_followed_and_what_is_not_installed_is_said(site, capsys):
    status, out, _ = run(site, capsys, "dev")
    assert status == 0 and "note: pytest (of bevqat): needed and not installed" in out
    assert audit.main(["--package", "nothing", "--path", str(site), "--offline"]) == 2


@pytest.mark.parametrize(
    ("expression", "permissive"),
    [
        ("MIT", True),
        ("MIT AND (Apache-2.0 OR BSD-2-Clause)", True),
        ("Apache-2.0 WITH LLVM-exception AND MIT", True),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only AND MIT", False),
        ("MIT AND (GPL-2.0-only OR LGPL-3.0-only)", False),
        ("LicenseRef-Proprietary", False),
        ("", False),
    ],
)
def test_an_expression_is_permissive_if_permissive_licences_alone_suffice(expression, permissive):
    assert audit.is_permissive(expression) is permissive


def test_packages_that_pip_audit_could_not_ask_about_are_no_clean_bill():
    skipped = json.dumps({"dependencies": [{"name": "onnx", "skip_reason": "not found"}]})
    assert audit.understood(skipped)[0] is None and audit.understood("")[0] is None
    clean = {"name": "onnx", "version": "1", "vulns": []}
    assert audit.understood(json.dumps({"dependencies": [clean]}))[0] is True
    bad = {"name": "onnx", "version": "1", "vulns": [{"id": "CVE-1"}]}
    assert audit.understood(json.dumps({"dependencies": [clean, bad]})) == (False, "pip-audit found onnx 1: CVE-1")


def test_every_advisory_is_of_a_package_that_is_installed_here_and_none_of_them_applies():
    reviewed, advisories = audit.read_advisories()
    there = audit.installed()
    for advisory in advisories:
        assert set(advisory) == {"id", "package", "affected", "what"}
        assert audit.canonicalize_name(advisory["package"]) in there
    assert len(reviewed) == len("2026-11-22")


def test_this_environment_passes():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "audit.py", "--offline"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr

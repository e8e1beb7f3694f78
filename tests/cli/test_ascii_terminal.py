"""Output where the terminal or the pipe has no Unicode: LANG=C, PYTHONIOENCODING=ascii, a Windows code page."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qat.cli import VERBS, main
from qat.core.plain_output import allow_any_text

ROOT = Path(__file__).resolve().parents[2]


def run(arguments, cwd, encoding="ascii", locale="C"):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "LC_ALL": locale}
    command = [sys.executable, "-m", "qat.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_config, make_detector):
    """A config and a float checkpoint."""
    path = tmp_path_factory.mktemp("ascii")
    (path / "config.yaml").write_text(yaml.safe_dump(make_config()))
    torch.save({"state_dict": make_detector(make_config()).state_dict()}, path / "float.pth")
    return path


def test_inspect_prints_its_tables_on_an_ascii_terminal(folder, make_config, make_detector, monkeypatch, capsys):
    from qat.calibrate.checkpoint import save_ptq
    from qat.lean.modes import quantizers
    from qat.model.quantized import QuantizedModel

    model = make_detector(make_config())
    quantized = QuantizedModel(model)
    for quantizer in quantizers(quantized.parts).values():
        if quantizer.amax is None:
            quantizer.set_range(torch.tensor(1.0))
    save_ptq(folder / "ptq.pth", quantized, model, {"method": "max", "frames": 1})
    done = run(["inspect", "ptq.pth"], folder)
    assert done.returncode == 0, done.stderr.decode()
    plain = done.stdout.decode("ascii")
    monkeypatch.chdir(folder)
    assert main(["inspect", "ptq.pth"]) == 0  # to pytest, which takes any character
    full = capsys.readouterr().out
    assert "…" in full and "..." in plain
    for word in ("layers with INT8 weights", "what stays float", "weights stay"):
        assert (word in full) == (word in plain)


def test_every_verbs_help_is_printed_on_an_ascii_terminal(folder):
    """One process: what is printed is what counts."""
    code = (
        "import sys\nfrom qat.cli import main\n"
        "for verb in sys.argv[1:]:\n"
        "    try:\n        main([verb, '--help'])\n"
        "    except SystemExit as end:\n        assert end.code == 0, verb\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code, *VERBS], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode("ascii").count("usage: bevqat ") >= len(VERBS)


def test_an_error_that_quotes_what_ascii_lacks_is_one_line(folder):
    done = run(["calibrate", "--config", "config.yaml", "--ckpt", "größe→.pth"], folder, locale="C.UTF-8")
    said = done.stderr.decode("ascii")
    assert done.returncode == 2 and said.startswith("error: gro?e->.pth: no such file") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("ascii", "3×4 … a→b ≥ é ☃", "3x4 ... a->b >= e ?"),
        ("cp1252", "3×4 … a→b é ☃", "3×4 … a->b é ?"),
        ("utf-8", "3×4 … ☃", "3×4 … ☃"),
    ],
)
def test_a_character_becomes_the_nearest_that_there_is(encoding, text, expected, monkeypatch):
    import io

    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    allow_any_text()
    stream.write(text)
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == expected

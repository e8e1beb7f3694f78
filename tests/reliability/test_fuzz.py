"""10,000 damaged and hostile manifests, configs, checkpoints and ONNX files: one clear line or a right result, every time.

`python -m tests.reliability.fuzz --cases 200000 --seed 1` goes on from here.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EACH = 2500


@pytest.mark.nightly
@pytest.mark.parametrize("kinds", [("manifest", "onnx"), ("config", "checkpoint")], ids="-".join)
def test_damaged_files_end_in_one_clear_line_or_a_right_result(tmp_path, kinds):
    command = [sys.executable, "-W", "ignore", "-m", "tests.reliability.fuzz", "--cases", str(EACH * len(kinds))]
    command += [argument for kind in kinds for argument in ("--kind", kind)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "failing")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    for kind in kinds:
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"{kind}: "))
        assert line.startswith(f"{kind}: {EACH:,} cases ")
        counts = {word: int(count.replace(",", "")) for count, word in (p.split() for p in _tally(line))}
        assert set(counts) == {"read", "refused"} and sum(counts.values()) == EACH
        assert min(counts.values()) > EACH / 25  # neither is all bytes so damaged that nothing gets far, nor all spared


def _tally(line: str) -> list[str]:
    return line.split(" s: ")[1].split(";")[0].split(", ")

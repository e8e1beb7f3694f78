"""What several processes agree on, without a network to calibrate: `agree`, `total`, `only_writers`, merged histograms."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from qat.lean.calibrators import HistogramCalibrator

ROOT = Path(__file__).resolve().parents[2]
# Each process collects its own share, and the second one finds bad input in the end.
SCRIPT = """
import sys
from pathlib import Path
import torch
from qat.calibrate.distributed import agree, merge_calibrators, only_writers, process_group, total
from qat.core.errors import UserError
from qat.lean.calibrators import HistogramCalibrator

out = Path(sys.argv[1])
with process_group() as (rank, size), only_writers(out / "ptq.pth"):
    own = HistogramCalibrator("x")
    own.collect(torch.load(out / "values.pth")[rank::size])
    merge_calibrators({"x": own})
    torch.save((own.counts, own.values, own.largest, total(rank + 1)), out / f"{rank}.pth")
    agree(None)
    try:
        agree(UserError("b.jpg: found no picture") if rank == 1 else None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
"""


def test_processes_share_what_they_counted_and_end_together_with_one_line(tmp_path):
    values = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    torch.save(values, tmp_path / "values.pth")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path)]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0
    assert result.stderr.count("error: b.jpg: found no picture") == 1
    alone = HistogramCalibrator("x")
    alone.collect(values)
    for rank in (0, 1):
        counts, number, largest, total = torch.load(tmp_path / f"{rank}.pth")
        assert torch.equal(counts, alone.counts) and number == alone.values and largest == alone.largest
        assert total == 3

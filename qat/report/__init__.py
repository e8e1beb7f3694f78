"""results.json → report.html, one self-contained page; depends on results only.

verdict = write_report("runs/demo/results.json", "runs/demo/report.html")
print(verdict.headline)
"""

from qat.report.comparison import write_comparison
from qat.report.page import write_report
from qat.report.runs import RunsVerdict, compare_runs
from qat.report.schema import SCHEMA, check_results, check_sensitivity, load_results
from qat.report.verdict import Verdict, baseline_of, compared_row, decide, is_simulated, reference_of, row_name

__all__ = [
    "SCHEMA",
    "RunsVerdict",
    "Verdict",
    "baseline_of",
    "check_results",
    "check_sensitivity",
    "compare_runs",
    "compared_row",
    "decide",
    "is_simulated",
    "load_results",
    "reference_of",
    "row_name",
    "write_comparison",
    "write_report",
]

"""results.json → report.html, one self-contained page; knows results and nothing else.

verdict = write_report("runs/demo/results.json", "runs/demo/report.html")
print(verdict.headline)
"""

from qat.report.page import write_report
from qat.report.schema import SCHEMA, check_results, load_results
from qat.report.verdict import Verdict, decide, row_name

__all__ = ["SCHEMA", "Verdict", "check_results", "decide", "load_results", "row_name", "write_report"]

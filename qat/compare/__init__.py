"""The last step's driver: every backend and precision over the same keyframes, and results.json.

It may use every stage before it (calibrate's checkpoints, export's PyTorch parts, engine and runtime, data, evaluate)
and hands results to report; nothing imports it but the commands.

rows         the rows to compare, each a whole detector behind `qat.runtime.Pipeline`
accuracy     boxes and SQNR on every keyframe, resumable
latency      interleaved timing
frames       the keyframes in which two rows agree least, with their pictures
sensitivity  which layers lose accuracy in INT8, for the compared checkpoint
machine      facts about the machine
run          all of it, from files to results.json and report.html
"""

from qat.compare.rows import Sources
from qat.compare.run import CompareOptions, Comparison, compare, print_summary

__all__ = ["CompareOptions", "Comparison", "Sources", "compare", "print_summary"]

"""The last step: runs every backend and precision over the same keyframes, and writes results.json.

It may use every earlier stage (calibrate's checkpoints, export's PyTorch parts, engine and runtime, data, evaluate)
and passes results to report; only the commands import it.

rows         the rows to compare, each a whole detector behind `qat.runtime.Pipeline`
accuracy     boxes and SQNR on every keyframe, resumable
latency      interleaved timing
frames       the keyframes in which two rows agree least, with their pictures
sensitivity  which layers lose accuracy in INT8, for the compared checkpoint
machine      facts about the machine
run          the whole comparison, from files to results.json and report.html
"""

from qat.compare.rows import Sources
from qat.compare.run import CompareOptions, Comparison, compare, print_summary

__all__ = ["CompareOptions", "Comparison", "Sources", "compare", "print_summary"]

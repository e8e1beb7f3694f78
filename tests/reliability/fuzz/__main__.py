"""Fuzzing at any length: python -m tests.reliability.fuzz --cases 200000

Prints what came of each kind and, for whatever went wrong, the case; `--case CASE` repeats one, its bytes in --out. Exit status 1
where anything went wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.reliability.fuzz import campaign
from tests.reliability.fuzz.targets import READ, REFUSED, TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="of all kinds together (default 10000)")
    parser.add_argument("--kind", choices=[*TARGETS], action="append", help="one kind alone; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="another number draws other cases (default 0)")
    parser.add_argument("--seeds", type=Path, help="folder of valid files, made where it is not there yet")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/fuzz"), help="where failing files go (default runs/fuzz)"
    )
    parser.add_argument("--case", help="repeat this one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        seeds = (args.seeds or Path(scratch) / "seeds").resolve()
        if not seeds.is_dir():
            campaign.make_seeds(seeds, [args.case.split("/")[0]] if args.case else args.kind or list(TARGETS))
        out = args.out.resolve()
        if args.case:
            out.mkdir(parents=True, exist_ok=True)
            outcome, account, seconds = campaign.one(args.case, seeds, out / "case.bin")
            print(f"{outcome} in {seconds:.2f} s; {out / 'case.bin'}\n{account}")
            return int(outcome not in (READ, REFUSED))
        kinds = args.kind or list(TARGETS)
        wrong = 0
        for kind in kinds:
            result = campaign.run(kind, seeds, -(-args.cases // len(kinds)), args.seed)
            tally = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(result.outcomes.items()))
            print(
                f"{kind}: {result.cases:,} cases in {result.seconds:.0f} s: {tally}; slowest {result.slowest[0]:.2f} s "
                f"({result.slowest[1]})",
                flush=True,
            )
            for outcome, finding in result.findings.items():
                print(f"  {outcome}\n    --case '{finding['case']}'", flush=True)
            if result.findings:
                campaign.keep(result, seeds, out)
            wrong += len(result.findings)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

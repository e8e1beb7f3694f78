"""model.pt2 handed to the IREE compiler, where its packages are installed (`pip install iree-turbine`).

Compiler and runtime are C++ that may abort: both run in a process of their own (`python -m qat.families.mmdet3d.iree`).
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

PACKAGES = ("iree-turbine", "iree-base-compiler", "iree-base-runtime")
INSTALL = "pip install iree-turbine"
SECONDS = 1800  # of compilation


class Failed(Exception):
    """IREE does not take the program, or does not run it; the message is IREE's own."""


def versions() -> dict[str, str]:
    """Versions of `PACKAGES`; empty unless all are installed."""
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError:
        return {}


def compile_and_run(
    pt2: Path, vmfb: Path, samples: Sequence[Mapping[str, np.ndarray]], outputs: int
) -> list[list[np.ndarray]]:
    """Compiles a program for this machine's CPU into `vmfb` and runs it; returns each sample's outputs.

    samples: the program's inputs, in its order. outputs: how many it has.

    Raises:
        Failed: IREE does not take the program, or does not run it.
    """
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{n}.npz" for n in range(len(samples))]
        for file, sample in zip(files, samples, strict=True):
            np.savez(file, *sample.values())
        command = [sys.executable, "-m", __name__, str(pt2), str(vmfb), *map(str, files)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise Failed(f"no result within {SECONDS} s") from None
        if done.returncode:
            vmfb.unlink(missing_ok=True)
            raise Failed(_reason(done.stderr, done.returncode))
        found = []
        for file in files:
            with np.load(file.with_suffix(".out.npz")) as arrays:
                found.append([arrays[f"arr_{n}"] for n in range(outputs)])
        return found


def _reason(text: str, status: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if "error:" in line or line.split(":")[0].endswith("Error")]
    return (said[0] if said else lines[-1] if lines else f"exit status {status}")[:240]


def main(arguments: Sequence[str]) -> None:
    """MODEL.pt2 MODEL.vmfb INPUTS.npz …: compiles, runs, and writes INPUTS.out.npz beside each."""
    import iree.runtime as runtime
    import iree.turbine.aot as aot
    import torch
    from torch._decomp import get_decompositions

    import qat.lean._torchvision  # noqa: F401  # its operators are in programs that use them

    pt2, vmfb, *inputs = map(Path, arguments)
    norms = [torch.ops.aten._native_batch_norm_legit_no_training, torch.ops.aten._native_batch_norm_legit]
    # In-place operators and batch norms of inference are none that its importer knows.
    program = torch.export.load(str(pt2)).run_decompositions(get_decompositions(norms))
    exported = aot.export(program)
    exported.session.set_flags("--iree-llvmcpu-target-cpu=host")
    exported.compile(save_to=str(vmfb), target_backends="llvm-cpu")
    config = runtime.Config("local-task")
    module = runtime.load_vm_module(runtime.VmModule.mmap(config.vm_instance, str(vmfb)), config)
    for file in inputs:
        with np.load(file) as arrays:
            found = module.main(*(arrays[f"arr_{n}"] for n in range(len(arrays.files))))
        found = found if isinstance(found, tuple | list) else (found,)
        np.savez(file.with_suffix(".out.npz"), *(np.asarray(value) for value in found))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Makes the TensorRT lab that tests/engine/test_tensorrt_lab.py runs in: `make tensorrt-lab`, or this file with Python 3.10.

    python3.10 tests/engine/make_tensorrt_lab.py .trt

OUT/python           Python 3.10 with TensorRT 8.5.3.1, whole: the newest release whose libraries are on the package registry
OUT/python-VERSION   the Python bindings alone of a later release: its real classes and enumerations, nothing that computes

TensorRT 8.5's plugin library wants cuBLAS and cuDNN when it is loaded, the bindings want TensorRT's own libraries. Empty
libraries with the wanted names and symbols satisfy the loader; nothing calls them, as without a GPU no builder is made, and
with one the tactic sources CUBLAS, CUBLAS_LT and CUDNN have to be left out. Needs gcc and binutils.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

WHOLE = "tensorrt==8.5.3.1"
BINDINGS = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.0.1": "tensorrt-cu12-bindings==10.0.1",
    "10.16.1.11": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4.0.106": "tensorrt-cu12-bindings==11.4.0.106",
}
PACKAGES = ("numpy<2", "cuda-bindings<13")


def run(*command: str | Path) -> str:
    """Standard output of a command that has to succeed."""
    return subprocess.run([str(word) for word in command], check=True, text=True, stdout=subprocess.PIPE).stdout


def library(target: Path, symbols: list[str], version: str = "") -> None:
    """An empty shared library of this name with these symbols, under a symbol version where one is wanted."""
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder) / "empty.c", Path(folder) / "empty.map"
        source.write_text(
            "".join(
                f'int f{i}(void) __asm__("{name}");\nint f{i}(void) {{ return 0; }}\n' for i, name in enumerate(symbols)
            )
        )
        script.write_text(f"{version} {{ global: *; }};\n")
        versioned = [f"-Wl,--version-script,{script}"] if version else []
        run("gcc", "-shared", "-fPIC", "-o", target, source, f"-Wl,-soname,{target.name}", *versioned)


def undefined(path: Path) -> list[str]:
    """Symbols that a library takes from others: name, or name@version."""
    return re.findall(r"^\s*U (\S+)$", run("nm", "-D", "--undefined-only", path), re.MULTILINE)


def empty_math_libraries(plugin: Path, out: Path) -> None:
    """What TensorRT 8.5's plugin library takes from cuBLAS 11 and cuDNN 8."""
    wanted = defaultdict(list)
    for symbol in undefined(plugin):
        if found := re.fullmatch(r"(cu(?:blas|dnn)\w+)@(\S+)", symbol):
            wanted[found[2]].append(found[1])
    for name, symbols in wanted.items():
        library(out / name, symbols, name)


def empty_tensorrt_libraries(bindings: Path, out: Path) -> None:
    """What a release's bindings take from TensorRT's libraries: all in the first, the others only have the name."""
    needed = re.findall(r"NEEDED.*\[(libnv\S+)\]", run("readelf", "-d", bindings))
    symbols = [name for name in undefined(bindings) if "@" not in name and not name.startswith(("Py", "_Py"))]
    for index, name in enumerate(needed):
        library(out / name, [] if index else symbols)


def launcher(path: Path, python: Path, libraries: list[Path], packages: list[Path]) -> None:
    """A script that starts the interpreter with these folders on the loader's and the module path."""
    path.write_text(
        "#!/usr/bin/env bash\n"
        f'export LD_LIBRARY_PATH="{":".join(map(str, libraries))}:$LD_LIBRARY_PATH"\n'
        f'export PYTHONPATH="{":".join(map(str, packages))}:$PYTHONPATH"\n'
        f'exec "{python}" "$@"\n'
    )
    path.chmod(0o755)


def download(python: Path, requirement: str, into: Path) -> Path:
    """A release's wheel from the package registry, unpacked."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, requirement)
        (wheel,) = Path(folder).glob("*.whl")
        run(python, "-m", "zipfile", "-e", wheel, into)
    return into


def main(out: Path) -> None:
    """Writes the lab, in place of an earlier one. Stops with a line where the interpreter is not Python 3.10."""
    if sys.version_info[:2] != (3, 10):
        sys.exit(f"error: found Python {sys.version.split()[0]}, expected 3.10: {WHOLE} has wheels for no other")
    out = out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    run(sys.executable, "-m", "venv", out / "venv")
    python = out / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES)
    whole = download(python, WHOLE, out / "whole")
    (out / "empty").mkdir()
    empty_math_libraries(whole / "tensorrt" / "libnvinfer_plugin.so.8", out / "empty")
    launcher(out / "python", python, [out / "empty", whole / "tensorrt"], [whole])
    for version, requirement in BINDINGS.items():
        folder = download(python, requirement, out / version)
        (folder / "empty").mkdir()
        empty_tensorrt_libraries(folder / "tensorrt_bindings" / "tensorrt.so", folder / "empty")
        (folder / "tensorrt").mkdir()
        (folder / "tensorrt" / "__init__.py").write_text(
            "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
        )
        launcher(out / f"python-{version}", python, [folder / "empty"], [folder])
    for script in sorted(out.glob("python*")):
        print(script, run(script, "-c", "import tensorrt; print(tensorrt.__version__)").strip())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".trt"))

"""One-line errors for failures of the operating system: a full disk, a folder that cannot be written, too little memory."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex

from qat.core.errors import NotFiniteError, UserError
from qat.core.locks import meant

_FIX = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some of the quota, or write to another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or write to another disk",
    errno.EROFS: "write to another folder",
    errno.EACCES: "fix its permissions, or name another",
    errno.EPERM: "fix its permissions, or name another",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has no more open files",
    errno.EISDIR: "name a file in it",
    errno.ENOTDIR: "name another folder: a part of the path is a file",
    errno.EEXIST: "name another, or remove it",
    errno.ENOTEMPTY: "name another, or remove it",
    errno.ENOENT: "name a file that exists",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EIO: "check the disk",
    errno.EXDEV: "write to one file system",
    errno.ENOMEM: "close other programs, or use a machine with more memory",
}
# The messages of torch and numpy for a failed allocation; torch raises a plain RuntimeError.
_NO_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory|std::bad_alloc", re.IGNORECASE)


def _cause(error: BaseException) -> OSError | None:
    """The OSError behind an error: torch.save raises a RuntimeError from it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FIX:
            return seen
        if not isinstance(error, OSError | RuntimeError):
            return None
        seen = seen.__cause__ or seen.__context__
    return None


def _name(file: object) -> str:
    return str(meant(os.fsdecode(file))) if isinstance(file, str | bytes | os.PathLike) else str(file)


def one_line_of(error: BaseException) -> str | None:
    """The line for an error that is the machine's refusal; None for any other, which is a mistake of ours and keeps its
    traceback."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        wanted = " ".join(str(error).split())[:120]
        return (
            f"memory: found too little{f' ({wanted})' if wanted else ''}, expected more; close other programs, take fewer "
            "frames or a smaller --batch, or check the config for a size that is too large"
        )
    if isinstance(error, BrokenPipeError):
        return None
    refusal = _cause(error)
    if refusal is None or refusal.errno is None:
        return None
    file = next((_name(name) for name in (refusal.filename2, refusal.filename) if name is not None), "the output")
    return f"{file}: found {os.strerror(refusal.errno).lower()}, expected to read or write it; {_FIX[refusal.errno]}"


def health_of(error: UserError, args: argparse.Namespace) -> str:
    """The end of a `NotFiniteError`'s line: the command that finds the layer, ready to paste. "" for other errors, and for
    verbs without a checkpoint."""
    source = next((found for name in ("source", "ckpt") if (found := getattr(args, name, None)) is not None), None)
    if not isinstance(error, NotFiniteError) or source is None:
        return ""
    words = ["bevqat", "health", str(source)]
    data, split = getattr(args, "data", None), getattr(args, "split", None)
    if isinstance(data, list):  # of training: ROOT or ROOT:SPLIT, each
        first = str(data[0]) if data else ""
        root, colon, named = first.rpartition(":")
        data, split = (root, named) if colon and not os.path.isdir(first) else (first, split)
    given = {
        "--config": getattr(args, "config", None), "--prefix": getattr(args, "prefix", None), "--data": data,
        "--version": getattr(args, "version", None), "--split": split or (data and "all"),
    }  # fmt: skip
    for flag, value in given.items():
        if value:
            words += [flag, str(value)]
    return f"; {shlex.join(words)} finds the layer"

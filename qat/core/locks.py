"""Ensures one writer for each output, and removes files that killed writers left.

Both use locks of the `filelock` package, which the kernel releases when their process ends, however it ends: a lock is
held exactly as long as its process runs. Some network file systems refuse locks: there nothing is locked, and left files are
not removed, nor on Windows, which cannot rename open files.
"""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qat.core.command import command_line
from qat.core.errors import UserError

# filelock is imported only for writing: a robot, which only reads, needs only numpy.

INSIDE = ".bevqat.lock"
# A lock may be held a moment longer than its process runs, by a forked child that has not closed it yet.
PASSING_SECONDS = 3.0
# `tempfile` draws eight of these characters; an earlier folder that is moved aside has none.
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.bevqat\.tmp")
_ASIDE = re.compile(r"\.(.+)\.bevqat\.old")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)

_swept: set[tuple[int, str]] = set()


def _try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder until the descriptor is closed; False if another process holds it, None if there are no
    locks."""
    from filelock import lock_descriptor

    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError:
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still names the opened file: another process may have removed it between opening and locking."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _open_any(path: Path) -> int:
    """Opens a folder for reading, a file for reading and writing: over NFS only a writable descriptor can be locked."""
    return os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)


def make_temporary(target: Path, folder: bool = False) -> tuple[Path, int]:
    """A new empty file, or folder, next to `target`, and a descriptor that marks it as in use until it is closed.

    Raises:
        OSError: it cannot be made there.
    """
    name = target.name if len(os.fsencode(target.name)) < 230 else target.name[:50]  # names end at 255 bytes
    start, end = f".{name}.", ".bevqat.tmp"
    while True:
        if folder:
            path = Path(tempfile.mkdtemp(end, start, target.parent))
        else:
            descriptor, made = tempfile.mkstemp(end, start, target.parent)
            os.close(descriptor)
            path = Path(made)
        if os.name == "nt":
            return path, os.open(os.devnull, os.O_RDONLY)
        try:
            descriptor = _open_any(path)
        except FileNotFoundError:
            continue
        if _try_lock(descriptor) is not False and _is_at(descriptor, path):
            return path, descriptor
        os.close(descriptor)  # another process removed it as a leftover


def meant(path: str | os.PathLike[str]) -> Path:
    """The output that a path of `make_temporary`, of a folder moved aside, or inside such a folder, was made for."""
    path = Path(path)
    for place in reversed((path, *path.parents)):
        if left := _TEMPORARY.fullmatch(place.name) or _ASIDE.fullmatch(place.name):
            return place.with_name(left[1])
    return path


def clear_leftovers(folder: Path, again: bool = False) -> None:
    """Removes the temporary files and folders that killed processes left in `folder`, and no others: those of living ones are
    locked.

    again: look even if this process has looked before.
    """
    place = os.getpid(), os.path.abspath(folder)
    if os.name == "nt" or (place in _swept and not again):
        return
    _swept.add(place)
    with suppress(OSError):
        for name in os.listdir(folder):
            if _TEMPORARY.fullmatch(name):
                with suppress(OSError):
                    _clear(folder / name)


def _clear(path: Path) -> None:
    descriptor = _open_any(path)
    try:
        if _try_lock(descriptor) and _is_at(descriptor, path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _command() -> str:
    text = command_line() or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else ["python"])
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:159]}…"


def _sign(path: Path) -> None:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    named = {"pid": os.getpid(), "host": platform.node(), "command": _command(), "since": since}
    path.write_text(json.dumps(named))


def _holder(path: Path) -> str:
    """The holder of a lock, from its file."""
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on {found['host']} ({found['command']}, since {found['since']})"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"


@contextmanager
def only_writer(target: str | os.PathLike[str], inside: bool = False) -> Iterator[None]:
    """Inside the block no other process or thread can enter for the same output. The same thread may enter again.

    The lock is a hidden file that is removed at the end, with the folders that were made for it and are still empty. Files that
    killed processes left there are removed at the beginning.

    Args:
        target: the file or folder that is written.
        inside: `target` is a folder in which files are written one by one: the hidden file is in it, not next to it.

    Raises:
        UserError: another process, which the message names, is writing; or nothing can be written there.
    """
    from filelock import FileLock, Timeout

    whole = Path(os.path.abspath(target))
    path = whole / INSIDE if inside else whole.with_name(f".{whole.name}{INSIDE}")
    made: list[Path] = []
    lock = FileLock(Path(os.path.realpath(path.parent)) / path.name, is_singleton=True, fallback_to_soft=False)
    try:
        made = [folder for folder in path.parents if not folder.exists()]  # innermost first
        try:
            lock.acquire(timeout=PASSING_SECONDS)
        except FileNotFoundError:  # another process that is ending removed the folder
            lock.acquire(timeout=PASSING_SECONDS)
        if lock.lock_counter == 1:
            _sign(path)
    except Timeout:
        raise UserError(f"{target}: {_holder(path)} is writing here; wait until it ends, or write elsewhere") from None
    except OSError as error:
        if lock.lock_counter == 1:  # the holder's name could not be written
            path.unlink(missing_ok=True)
        lock.release()
        if error.errno not in _NO_LOCKS:
            _remove_empty(made)
            raise UserError(f"{target}: cannot write here: {error.strerror or error}") from None
        path.unlink(missing_ok=True)
    try:
        if lock.lock_counter < 2:
            clear_leftovers(path.parent, again=True)
        yield
    finally:
        if lock.lock_counter == 1:  # not in a forked child: the lock belongs to its parent
            with suppress(OSError):  # Windows cannot remove open files
                path.unlink()
            lock.release()
            _remove_empty(made)
        else:
            lock.release()


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


class _Lock(Protocol):
    def __call__(self, target: Path, inside: bool = False) -> AbstractContextManager[None]: ...


Function = TypeVar("Function", bound=Callable[..., Any])


def one_writer(where: str, inside: bool = False, lock: _Lock = only_writer) -> Callable[[Function], Function]:
    """Decorates a function that writes an output: it runs inside `only_writer`.

    Args:
        where: the parameter, or its attribute, that names the output: "out", "options.out".
        inside: as for `only_writer`.
        lock: another one, for processes that work together.
    """
    name, _, attribute = where.partition(".")

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def alone(*args: Any, **kwargs: Any) -> Any:
            value = signature.bind(*args, **kwargs).arguments[name]
            with lock(Path(getattr(value, attribute) if attribute else value), inside=inside):
                return function(*args, **kwargs)

        return alone  # type: ignore[return-value]

    return decorate

"""One writer for an output, and what killed writers leave behind.

Both stand on `flock`: the kernel gives a lock back when its process ends, however it ends, so a lock is held exactly as long as
somebody is at work. Windows has no such locks and some network file systems refuse them: there nothing is locked, and nothing
that was left behind is removed.
"""

from __future__ import annotations

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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qat.core.command import command_line
from qat.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

INSIDE = ".bevqat.lock"
PASSING_SECONDS = 10.0
# What `tempfile` draws is eight of these characters.
_LEFT = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.bevqat\.(?P<kind>tmp|old)")

_held: dict[tuple[str, int], int] = {}  # how often each thread has taken each lock
_descriptors: set[int] = set()
_swept: set[tuple[int, str]] = set()


def _try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder until the descriptor is closed; False where another one has it, None where this system
    or file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: str | Path) -> bool:
    """Whether the path still names what was opened: between opening and locking its last holder may have removed it."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), found)


def _open_any(path: Path) -> int:
    """Folders open for reading only. A file opens for both: over NFS only a descriptor that may write can be locked."""
    return os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Inside the block `clear_leftovers` lets the folder be, whatever its name becomes."""
    if fcntl is None:
        yield
        return
    descriptor = _open_any(folder)
    try:
        _try_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def make_temporary(target: Path, folder: bool = False) -> tuple[Path, int]:
    """A new empty file, or folder, beside `target`, and a descriptor that marks it as in use until it is closed.

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
        if fcntl is None:  # Windows renames nothing that is open
            return path, os.open(os.devnull, os.O_RDONLY)
        try:
            descriptor = _open_any(path)
        except FileNotFoundError:
            continue
        if _try_lock(descriptor) is not False and _is_at(descriptor, path):
            return path, descriptor
        os.close(descriptor)  # another process took it for one that was left behind


def meant(path: str | os.PathLike[str]) -> Path:
    """What a path stands for that is `make_temporary`'s, or lies in such a folder: the output that it is made for."""
    path = Path(path)
    for place in reversed((path, *path.parents)):
        if left := _LEFT.fullmatch(place.name):
            return place.with_name(left["name"])
    return path


def clear_leftovers(folder: Path, again: bool = False) -> None:
    """Removes the temporary files and folders that killed processes left in `folder`, and no others: those of living ones are
    locked. A folder that was moved aside and never replaced comes back under its name.

    again: look even if this process has looked before.
    """
    place = os.getpid(), os.path.abspath(folder)
    if fcntl is None or (place in _swept and not again):
        return
    _swept.add(place)
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        if left := _LEFT.fullmatch(name):
            _clear(folder / name, folder / left["name"] if left["kind"] == "old" else None)


def _clear(path: Path, earlier: Path | None) -> None:
    try:
        descriptor = _open_any(path)
    except OSError:
        return
    try:
        if not (_try_lock(descriptor) and _is_at(descriptor, path)):
            return
        if earlier is not None and not os.path.lexists(earlier):
            os.rename(path, earlier)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that were missing, innermost first."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _is_running(found: dict[str, Any]) -> bool:
    """Whether the process that signed a lock file runs; of another host's nothing is known, and it is taken to run."""
    if found["host"] != platform.node():
        return True
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _wait_or_name_holder(descriptor: int) -> str | None:
    """None as soon as the lock is ours; else who holds it, as the lock file says.

    A file that is not signed, or signed by a process that ended, has a lock in passing: its next holder has not signed yet, or a
    child that the process forked just before it ended has not run `_forget` yet (flock's locks last until every copy of the
    descriptor is closed). There the lock is asked for again, for a few seconds at most.
    """
    end = time.monotonic() + PASSING_SECONDS
    while time.monotonic() < end:
        time.sleep(0.05)
        if _try_lock(descriptor):
            return None
        try:
            found = json.loads(os.pread(descriptor, 4096, 0))
            if _is_running(found):
                return f"process {found['pid']} on {found['host']} ({found['command']}, since {found['since']})"
        except (ValueError, KeyError, TypeError, OSError):
            continue
    return "another process"


def _command() -> str:
    text = command_line() or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else ["python"])
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:159]}…"


def _sign(descriptor: int) -> None:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    named = {"pid": os.getpid(), "host": platform.node(), "command": _command(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(named).encode(), 0)


def _take(target: Path, path: Path) -> tuple[int, list[Path]]:
    """The lock file's descriptor, and the folders that were made for it."""
    made: list[Path] = []
    try:
        while True:
            made = _make_folders(path.parent) or made
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            except FileNotFoundError:  # another process, which ends, removed the folder again
                continue
            locked = _try_lock(descriptor)
            if locked is False and (who := _wait_or_name_holder(descriptor)) is not None:
                os.close(descriptor)
                raise UserError(f"{target}: {who} is writing here; wait until it ends, or write elsewhere")
            if locked is None or _is_at(descriptor, path):
                _sign(descriptor)
                return descriptor, made
            os.close(descriptor)  # the one before removed the file just now
    except OSError as error:
        _remove_empty(made)
        raise UserError(f"{target}: cannot write here: {error.strerror or error}") from None


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def only_writer(target: str | os.PathLike[str], inside: bool = False) -> Iterator[None]:
    """Inside the block no other process that asks for the same output gets it. The same thread may ask again.

    The lock is on a hidden file that is removed at the end, with folders that were made for it and are still empty. What killed
    processes left there is removed at the beginning.

    Args:
        target: the file or folder that is written.
        inside: `target` is a folder in which files are written one by one: the hidden file is in it, not beside it.

    Raises:
        UserError: another process, which the message names, is at it; or nothing can be written there.
    """
    if fcntl is None:
        yield
        return
    target = Path(target)
    whole = Path(os.path.abspath(target))
    path = whole / INSIDE if inside else whole.with_name(f".{whole.name}{INSIDE}")
    key = os.path.join(os.path.realpath(path.parent), path.name), threading.get_ident()
    if key in _held:
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    descriptor, made = _take(target, path)
    _held[key] = 1
    _descriptors.add(descriptor)
    try:
        clear_leftovers(path.parent, again=True)
        yield
    finally:
        if _held.pop(key, None) is not None:  # a forked child that comes here has no lock
            path.unlink(missing_ok=True)
            _descriptors.discard(descriptor)
            os.close(descriptor)
            _remove_empty(made)


def _forget() -> None:
    """In a forked child: the lock is the parent's. (It would last as long as any process has the descriptor open.)"""
    for descriptor in _descriptors:
        with suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class _Lock(Protocol):
    def __call__(self, target: Path, inside: bool = False) -> AbstractContextManager[None]: ...


Function = TypeVar("Function", bound=Callable[..., Any])


def one_writer(where: str, inside: bool = False, lock: _Lock = only_writer) -> Callable[[Function], Function]:
    """Decorates a function that writes an output: it runs inside `only_writer`.

    Args:
        where: the parameter that names the output, or its attribute: "out", "options.out".
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

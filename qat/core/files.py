"""Whole-file writes, hashes and JSON.

Content is written to a temporary name next to the target, synced to disk, and renamed. If the process is killed at any
moment, or the machine loses power, the target has the earlier content or the new one, never a part. The next process that
writes there removes the temporary file (`qat.core.locks`).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from qat.core.errors import UserError
from qat.core.locks import clear_leftovers, make_temporary, meant, only_writer

if TYPE_CHECKING:
    import numpy as np

# Errors of the place that is written to; other errors from a block have other causes.
_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_ALMOST_FULL = 1 << 20


def _mode(full: int) -> int:
    umask = os.umask(0)
    os.umask(umask)
    return full & ~umask


def flush(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Syncs files and folders to disk, so that they survive a power failure."""
    for path in paths:
        if os.name == "nt" and os.path.isdir(path):
            continue
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (
                errno.EINVAL,
                errno.ENOTSUP,
            ):  # a file system that cannot sync, such as that of pipes
                raise
        finally:
            os.close(descriptor)


def _refusal(target: Path, error: OSError) -> UserError:
    return UserError(f"{meant(target)}: cannot write here: {error.strerror or error}")


def leads_down(name: object) -> bool:
    """Whether a name from an untrusted file is relative and without `..`, in POSIX's and in Windows' notation."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    parts = PurePosixPath(name.replace("\\", "/"))
    return not (parts.is_absolute() or ".." in parts.parts or PureWindowsPath(name).drive)


def data_path(root: str | os.PathLike[str], name: object, table: str) -> Path:
    """The file that a data set's table names, with slashes or backslashes. Links are followed: a data set's folders are often
    on another disk.

    Raises:
        UserError: the name leads out of the data set.
    """
    if not leads_down(name):
        raise UserError(
            f"{Path(root) / table}: found file {name!r}, expected the name of a file in the data set's folder"
        )
    path = Path(root) / str(name)
    return path if os.path.lexists(path) else Path(root) / str(name).replace("\\", "/")  # in Windows' notation


def is_inside(folder: str | os.PathLike[str], name: object) -> bool:
    """Whether a name `leads_down` and its file, with all links followed, is in this folder."""
    if not leads_down(name):
        return False
    try:
        return (Path(folder) / str(name)).resolve().is_relative_to(Path(folder).resolve())
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # a name that is too long or has an invalid encoding, or a cycle of links
        return False


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """Turns errors of the target's disk, which the user can fix, into `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _PLACE:
            raise
        raise _refusal(target, error) from None
    except (
        RuntimeError
    ):  # native code that opens the file; torch writes through Python's files (qat.checkpoints.reading)
        try:
            full = shutil.disk_usage(target.parent).free < _ALMOST_FULL
        except OSError:
            full = False
        if not full:
            raise
        raise UserError(f"{meant(target)}: cannot write here: {os.strerror(errno.ENOSPC)}") from None


@contextmanager
def _temporary(target: Path, folder: bool = False) -> Iterator[Path]:
    """A new empty file, or folder, next to `target`. After the block, what remains of it is removed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target.parent)
        path, descriptor = make_temporary(target, folder)
    except OSError as error:
        raise _refusal(target, error) from None
    try:
        yield path
    finally:
        if folder:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def atomic_path(target: str | os.PathLike[str], durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path next to `target`; renames it to `target` when the block succeeds.

    A process killed inside the block leaves the earlier `target` whole. If several processes write, the last one wins, whole.

    Args:
        durable: survive a power failure. False for files that are checked when read and can be made again.

    Raises:
        UserError: nothing can be written there, or the disk is full.
    """
    target = Path(target)
    with _temporary(target) as temporary:
        with _told(target):
            yield temporary
            temporary.chmod(_mode(0o666))
            if durable:
                flush([temporary])
        try:
            os.replace(temporary, target)
        except OSError as error:
            raise _refusal(target, error) from None
        if durable:
            flush([target.parent])


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.bevqat.old")


def _put_back(target: Path) -> None:
    """Restores a folder that a killed process had moved aside, or removes it if the new folder is in its place."""
    if target.exists():
        shutil.rmtree(_aside(target), ignore_errors=True)
    else:
        os.rename(_aside(target), target)


def restore(folder: str | os.PathLike[str]) -> None:
    """Restores a folder that a killed process had moved aside and not replaced."""
    with suppress(UserError, OSError, ValueError):  # the place cannot be written, or the folder is being replaced
        target = Path(os.path.realpath(folder))
        if not target.exists() and _aside(target).exists():
            with only_writer(target):
                _put_back(target)


@contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder next to `target`; replaces `target` with it when the block succeeds.

    `target` is always a whole folder, the earlier or the new one, except between two renames: a process killed there leaves
    the earlier folder aside, and the next process that writes or reads there restores it (`restore`). Inside the block this
    process is the only writer (`only_writer`). If `target` is a link, the folder it leads to is replaced.

    Raises:
        UserError: another process is writing there, or nothing can be written there, or `target` is a file.
    """
    named, target = Path(target), Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise UserError(f"{named}: found a file, expected a folder or nothing; choose another --out")
    with only_writer(target), _temporary(target, folder=True) as temporary:
        if _aside(target).exists():
            _put_back(target)
        with _told(named):
            yield temporary
            temporary.chmod(_mode(0o777))
            flush(Path(folder) / name for folder, _, names in os.walk(temporary) for name in names)
            flush(folder for folder, _, _ in os.walk(temporary))
        try:
            if replaced := target.exists():
                os.rename(target, _aside(target))
            try:
                os.rename(temporary, target)
                flush([target.parent])
            finally:
                if replaced:
                    _put_back(target)
        except OSError as error:
            raise _refusal(named, error) from None


@contextmanager
def atomic_set(*targets: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder for files with the targets' names, as one group: the first is the result, the others are
    made from it. When the block succeeds, they replace the targets.

    The earlier versions of the others are removed before the first is replaced, and the new ones follow: whenever the process
    is killed, no file is next to a result that it was not made from. Earlier files that are not written again are removed.

    Args:
        targets: files of one folder.

    Raises:
        UserError: nothing can be written there, or the disk is full.
    """
    first, *others = (Path(target) for target in targets)
    with _temporary(first, folder=True) as stage:
        with _told(first):
            yield stage
            written = [path for path in (first, *others) if (stage / path.name).exists()]
            flush(stage / path.name for path in written)
        try:
            for path in others:
                path.unlink(missing_ok=True)
            for path in written:
                os.replace(stage / path.name, path)
        except OSError as error:
            raise _refusal(first, error) from None
        flush([first.parent])


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file; a missing or damaged one is a `UserError`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows' editors put a byte order mark first
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz, whole or not at all; if a power failure truncates it, `read_arrays` treats it as missing."""
    import numpy as np  # not above: `bevqat doctor` writes JSON where numpy is missing or broken

    with atomic_path(path, durable=False) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads an .npz of a cache; None if it is missing or damaged. A damaged file is removed."""
    import numpy as np

    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        with suppress(OSError):  # the folder cannot be written
            path.unlink(missing_ok=True)
        return {}


def check_same_run(path: str | os.PathLike[str], found: Mapping[str, Any], run: Mapping[str, Any], fix: str) -> None:
    """Raises `UserError` if the files left by a killed run belong to another run.

    Args:
        path: the file left. found: settings of the run that left it, by name. run: those of this run. fix: end of the message.
    """
    for name, value in run.items():
        if found.get(name) != value:
            raise UserError(
                f"{path}: left by a run with another {name}: found {found.get(name)}, expected {value}; {fix}"
            )


@contextmanager
def reading_left(path: str | os.PathLike[str], what: str, fix: str) -> Iterator[None]:
    """Turns any failure while a killed run's files are read into a `UserError`: `path: what (reason); fix`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch.load of a damaged file raises almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: {what} ({reason}); {fix}") from None


def write_figure(path: str | os.PathLike[str], figure: Any) -> None:
    """Writes a matplotlib figure as a PNG, whole or not at all; the same figure has the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Whole-file writes, hashes and JSON.

Content is written under another name beside the target, synced to disk, and renamed: a process that is killed at
any moment, or a machine that loses power, leaves the earlier content or the new one under the name, never a part of it. What
it leaves under the other name is removed by the next process that writes there (`qat.core.locks`).
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

# Of the place that is written to; others that come out of a block are about something else.
_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_ALMOST_FULL = 1 << 20


def _mode(full: int) -> int:
    umask = os.umask(0)
    os.umask(umask)
    return full & ~umask


def flush(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Brings files and folders to the disk, so that a power failure does not undo them."""
    for path in paths:
        if os.name == "nt" and os.path.isdir(path):
            continue
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot, such as of pipes
                raise
        finally:
            os.close(descriptor)


def _refusal(target: Path, error: OSError) -> UserError:
    return UserError(f"{meant(target)}: cannot write here: {error.strerror or error}")


def leads_down(name: object) -> bool:
    """Whether a name that stands in a file from elsewhere is a relative one without `..`, as POSIX or Windows writes them."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    parts = PurePosixPath(name.replace("\\", "/"))
    return not (parts.is_absolute() or ".." in parts.parts or PureWindowsPath(name).drive)


def data_path(root: str | os.PathLike[str], name: object, table: str) -> Path:
    """The file of a data set that one of its tables names, with slashes or backslashes. Links are followed: a data set's folders
    often lie on another disk.

    Raises:
        UserError: the name leads out of the data set.
    """
    if not leads_down(name):
        raise UserError(
            f"{Path(root) / table}: found file {name!r}, expected the name of a file in the data set's folder"
        )
    path = Path(root) / str(name)
    return path if os.path.lexists(path) else Path(root) / str(name).replace("\\", "/")  # as Windows writes them


def is_inside(folder: str | os.PathLike[str], name: object) -> bool:
    """Whether a name `leads_down` and is that of a file in this folder through whatever links there are."""
    if not leads_down(name):
        return False
    try:
        return (Path(folder) / str(name)).resolve().is_relative_to(Path(folder).resolve())
    except (OSError, ValueError, RuntimeError):  # a name too long or of no encoding, a circle of links
        return False


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """Errors of the disk that is written to are the user's to fix."""
    try:
        yield
    except OSError as error:
        if error.errno not in _PLACE:
            raise
        raise _refusal(target, error) from None
    except RuntimeError:  # native code that opens the file itself; torch writes through files of Python's instead (qat.checkpoints.reading)
        try:
            full = shutil.disk_usage(target.parent).free < _ALMOST_FULL
        except OSError:
            full = False
        if not full:
            raise
        raise UserError(f"{meant(target)}: cannot write here: {os.strerror(errno.ENOSPC)}") from None


@contextmanager
def _temporary(target: Path, folder: bool = False) -> Iterator[Path]:
    """A new empty file, or folder, beside `target`; what of it is still there after the block is removed."""
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
    """Yields a temporary path beside `target`; renames it onto `target` when the block succeeds.

    A process killed inside the block leaves the earlier `target` whole. Of several processes the last one wins, whole.

    Args:
        durable: not to be lost or empty after a power failure. False for what is checked when it is read and made again.

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
    """Of a folder that a killed process had moved aside: brings it back, or removes it where the new one is in its place."""
    if target.exists():
        shutil.rmtree(_aside(target), ignore_errors=True)
    else:
        os.rename(_aside(target), target)


def restore(folder: str | os.PathLike[str]) -> None:
    """Brings back a folder that a killed process had moved aside and not replaced."""
    with suppress(UserError, OSError, ValueError):  # of a place that cannot be written; or it is being replaced
        target = Path(os.path.realpath(folder))
        if not target.exists() and _aside(target).exists():
            with only_writer(target):
                _put_back(target)


@contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `target`; puts it in `target`'s place when the block succeeds.

    The name is a whole folder, the earlier or the new one, except between two renames: a process that is
    killed there leaves the earlier one aside, and the next one that writes or reads there brings it back (`restore`). Inside the
    block this process is the only writer (`only_writer`). A link is followed: what it leads to is replaced.

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
    """Yields a temporary folder in which to write files of the targets' names, as one group: the first is the result,
    the others are made from it. When the block succeeds they take the targets' places.

    The others' earlier versions go before the first is replaced, and their new ones come after: whenever the process is killed,
    no file lies beside a result that it was not made from. An earlier one that is not written again is gone at the end.

    Args:
        targets: of one folder.

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
    """Writes an .npz, whole or not at all; one that a power failure cut short `read_arrays` takes for none."""
    import numpy as np  # not above: `bevqat doctor` writes JSON where numpy is missing or broken

    with atomic_path(path, durable=False) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads an .npz of a cache: none for a missing file, and none for a damaged one, which is removed."""
    import numpy as np

    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        with suppress(OSError):  # of a folder that cannot be written
            path.unlink(missing_ok=True)
        return {}


def check_same_run(path: str | os.PathLike[str], found: Mapping[str, Any], run: Mapping[str, Any], fix: str) -> None:
    """Raises `UserError` where what a killed run left is of another run.

    Args:
        path: what it left. found: of which run, by name. run: what goes on. fix: what the message ends with.
    """
    for name, value in run.items():
        if found.get(name) != value:
            raise UserError(
                f"{path}: left by a run with another {name}: found {found.get(name)}, expected {value}; {fix}"
            )


@contextmanager
def reading_left(path: str | os.PathLike[str], what: str, fix: str) -> Iterator[None]:
    """Any failure inside, while a killed run's files are read, is a `UserError`: `path: what (reason); fix`."""
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

"""Files that are written whole or not at all, and locks for files that several processes write."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diffsparse.errors import DiffsparseError, InputFileError, OutputFileError

if TYPE_CHECKING:
    from PIL.Image import Image

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PATIENCE = 60.0  # seconds that a lock is waited for; it is held while one file is written


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling of `path` to write to; it takes the place of `path` only if the block succeeds.

    Either file is whole at any moment, also if the process is killed or the machine stops. A link stays a link.

    Raises:
        OutputFileError: the file or its folder can't be written.
    """
    target = writable(path)
    temporary = _name_beside(target)
    try:
        _create(temporary)
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # some writers put a file of their own in its place (safetensors)
            temporary.chmod(stat.S_IMODE(mode))
        _to_disk(temporary)
        os.replace(temporary, target)
        with contextlib.suppress(OSError):  # not every system can wait for a folder
            _to_disk(target.parent)
    except DiffsparseError:
        raise
    except OSError as error:
        if error.filename is not None and str(error.filename) not in (str(temporary), str(target)):
            raise  # of some other file, which the block has touched
        raise OutputFileError(f"can't write {path}: {reason(error)}; what was there before is kept") from error
    finally:
        temporary.unlink(missing_ok=True)


def writable(path: str | Path) -> Path:
    """The file that `path` leads to, after a trial that it can be written, so that no long work is lost.

    Raises:
        OutputFileError: a folder or a device has its name, the name is too long, or its folder takes no files.
    """
    target = Path(os.path.realpath(path))
    folder(target.parent)
    try:
        with contextlib.suppress(FileNotFoundError):
            mode = target.stat().st_mode
            if not stat.S_ISREG(mode):
                kind = "a folder" if stat.S_ISDIR(mode) else "a device"
                raise OutputFileError(f"can't write {path}: {kind} has that name; choose another")
        probe = _name_beside(target)
        _create(probe)
        probe.unlink()
    except DiffsparseError:
        raise
    except OSError as error:
        raise OutputFileError(f"can't write {path}: {reason(error)}; choose another") from error
    return target


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None] | None = None) -> None:
    """Check, before any work, that all of a command's outputs can be written and none replaces another or an input.

    Args:
        outputs: files by the name of their option, such as "--out"; None: not wanted.
        inputs: the same of files that are read.

    Raises:
        OutputFileError: one can't be written, or two are one file.
    """
    known = {os.path.realpath(path): name for name, path in (inputs or {}).items() if path is not None}
    for name, path in outputs.items():
        if path is None:
            continue
        target = str(writable(path))
        if target in known:
            raise OutputFileError(f"{known[target]} and {name} are one file, {path}; choose another for one of them")
        known[target] = name


def folder(path: str | Path) -> Path:
    """The folder `path`, made if it is missing, after a trial that it takes files.

    Raises:
        OutputFileError: it can't be made or written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise OutputFileError(f"can't write to the folder {path}: {reason(error)}; choose another") from error


@contextmanager
def locked(path: str | Path, wait: bool = True) -> Iterator[None]:
    """Within: no other process is in such a block for `path`. The lock, a file beside it, ends with its process.

    Args:
        path: of the file that is written.
        wait: for the other process to leave its block; if not, it is an error that there is one.

    Raises:
        OutputFileError: another process has the lock.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    file = path.with_name(f".{path.name}.lock")
    try:
        lock = FileLock(file, timeout=_PATIENCE if wait else 0)
        lock.acquire()
    except (Timeout, OSError, NotImplementedError) as error:
        why = "another process is writing it; wait for it," if isinstance(error, Timeout) else f"{reason(error)};"
        raise OutputFileError(f"can't lock {path}: {why} or choose another") from error
    try:
        yield
    finally:
        if not wait:  # no other process waits for this very file
            with contextlib.suppress(OSError):
                file.unlink()
        lock.release()


@contextmanager
def if_stopped(kept: Callable[[], str]) -> Iterator[None]:
    """Within: Ctrl-C carries a note, `kept()`: what is kept, and how to go on; the command line shows it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(kept())
        raise


def read_bytes(path: str | Path, remedy: str, what: str = "", most: int = 64 * 2**20) -> bytes:
    """The content of a file of at most `most` bytes: no memory is spent on files of another kind.

    Args:
        path: of the file.
        remedy: what to do where it can't be read.
        what: the name of such a file in messages, such as "the preset".
        most: bytes.

    Raises:
        InputFileError: it can't be read, or is larger.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise _unread(path, reason(error), remedy, what) from error
    if len(data) > most:
        raise _unread(path, f"it is larger than {most >> 20} MiB", remedy, what)
    return data


def read_image(path: str | Path, what: str, remedy: str) -> Image:
    """An RGB image from a file; the arguments are as in `read_bytes`.

    Raises:
        InputFileError: no such file, or not an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises all of them
        unknown = isinstance(error, UnidentifiedImageError)  # it says so with the whole path
        raise _unread(path, "it is no image" if unknown else reason(error), remedy, what) from error


def _unread(path: str | Path, why: str, remedy: str, what: str = "") -> InputFileError:
    return InputFileError(f"can't read {what}{what and ' '}{path}: {why}; {remedy}")


def write_text(text: str, path: str | Path) -> None:
    """Write a UTF-8 text, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def json_text(value: object) -> str:
    """Plain values as JSON; what is not plain becomes its `str`, and NaN is an error."""
    return json.dumps(value, indent=1, default=str, allow_nan=False) + "\n"


def write_json(value: object, path: str | Path) -> None:
    """Write `json_text`, whole or not at all."""
    write_text(json_text(value), path)


def write_csv(rows: Sequence[Mapping[str, object]], path: str | Path) -> None:
    """Write rows of equal keys, whole or not at all."""
    with whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _name_beside(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(6)}{path.suffix}")


def _create(path: Path) -> None:
    """An empty file with the mode that the umask leaves to any new one."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def _to_disk(path: Path) -> None:
    """Wait until what was written lies on the disk; some systems find only now that it is full."""
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def reason(error: Exception) -> str:
    """What an error says of a file, in one line and without its name, for messages that name it themselves."""
    if isinstance(error, KeyError):
        return f"it has no entry {error}"
    line = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    return f"{line}, make room" if isinstance(error, OSError) and error.errno in _FULL else line


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its class if that is nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

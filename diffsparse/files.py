"""Files that are written whole or not at all."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffsparse.errors import OutputFileError


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling of `path` to write to; it takes the place of `path` only if the block succeeds.

    Raises:
        OutputFileError: the file or its folder can't be written.
    """
    path = Path(path)
    folder(path.parent)
    number, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(number)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputFileError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def folder(path: str | Path) -> Path:
    """The folder `path`, made if it is missing and proven to take files, so that no long run ends in vain.

    Raises:
        OutputFileError: it can't be made or written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise OutputFileError(f"can't write to the folder {path}: {error.strerror or error}; choose another") from error


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows of equal keys, whole or not at all."""
    with whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

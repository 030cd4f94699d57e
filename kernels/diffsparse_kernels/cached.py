"""Tables measured on this machine, kept in the user's cache folder as JSON lists of rows."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """DIFFSPARSE_CACHE if set, else `diffsparse` in the place that the system has for caches."""
    named = os.environ.get("DIFFSPARSE_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "diffsparse" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/diffsparse"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffsparse"


def read_rows(name: str | Path) -> list[dict[str, Any]]:
    """The rows of a table in the cache folder, or at an absolute path; none if it isn't there.

    A table that can't be read is as good as none: a broken cache must not stop a run. It is told in a warning.
    """
    path = cache_folder() / name
    try:
        rows = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is ignored ({error}); delete it, or measure anew", stacklevel=2)
        return []
    return rows if isinstance(rows, list) else []

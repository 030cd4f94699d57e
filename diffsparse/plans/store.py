"""Work in progress on disk: a search or hunt that was stopped goes on after the last part that it finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffsparse.errors import ConfigError, InputFileError, PlanError
from diffsparse.files import if_stopped, locked, read_bytes, reason, writable, write_json
from diffsparse.plans import sealed

Restore = Callable[[sealed.Values, dict[str, Tensor]], None]
_REMEDY = "delete it to start again"


def partial_path(out: str | Path) -> Path:
    """Where the work so far is kept until `out` is written."""
    out = Path(out)
    return out.with_name(f"{out.name}.partial")


@dataclass(frozen=True)
class Store:
    """The file that keeps the work so far, beside the one in which the work ends.

    Attributes:
        path: of the file.
        what: the work's name in messages, such as "search".
        key: a digest of the settings; work with others is not continued.
        tensors: whether tensors are kept beside plain values: a safetensors file instead of JSON.
    """

    path: Path
    what: str
    key: str
    tensors: bool = False

    @classmethod
    def beside(cls, out: str | Path, what: str, settings: Sequence[object], *, tensors: bool = False) -> Store:
        """The store of work that ends in `out`; `settings` are plain values.

        Raises:
            OutputFileError: `out` can't be written.
        """
        writable(out)
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        return cls(partial_path(out), what, key, tensors)

    @contextmanager
    def resumed(self, restore: Restore, done: Callable[[], str]) -> Iterator[None]:
        """Within: the work goes on where the file stopped, if there is one. The file is deleted when the work is done.

        Args:
            restore: takes over the values and tensors that were kept; not called if there are none.
            done: what is done so far, such as "3 of 8 runs", for the note when the work is stopped.

        Raises:
            OutputFileError: another process is at the same work.
            InputFileError: the file can't be read.
            ConfigError: it is of work with other settings.
        """
        kept = f"are kept in {self.path}; the same command goes on with the next"
        with locked(self.path, wait=False), if_stopped(lambda: f"{done()} {kept}"):
            self._load(restore)
            yield
            self.path.unlink(missing_ok=True)

    def save(self, values: Mapping[str, object], tensors: dict[str, Tensor] | None = None) -> None:
        """Keep the work so far, whole or not at all."""
        values = {"key": self.key, **values}
        if self.tensors:
            sealed.write(self.path, values, tensors or {})
        else:
            write_json(values, self.path)

    def _load(self, restore: Restore) -> None:
        if not self.path.exists():
            return
        try:
            values, tensors = self._read()
            key = values.pop("key")
            restore(values, tensors)
        except PlanError as error:  # names the file and the remedy itself
            raise InputFileError(str(error)) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputFileError(f"can't read {self.path}: {reason(error)}; {_REMEDY}") from error
        if key != self.key:
            raise ConfigError(
                f"{self.path} is of a {self.what} with other settings; delete it, or choose another --out, to start "
                "again"
            )

    def _read(self) -> tuple[sealed.Values, dict[str, Tensor]]:
        if self.tensors:
            return sealed.read(self.path, self.what, _REMEDY)
        return sealed.plain(read_bytes(self.path, _REMEDY)), {}

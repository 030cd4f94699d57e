"""Work that was stopped: it goes on with the same settings only, and its file goes when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffsparse.errors import ConfigError, InputFileError, OutputFileError
from diffsparse.plans.store import Store, partial_path


class Work:
    """Counts to three; what is done is kept."""

    def __init__(self, out: Path, settings: str = "a", tensors: bool = False) -> None:
        self.store = Store.beside(out, "count", [settings], tensors=tensors)
        self.done, self.total = 0, torch.zeros(1)

    def restore(self, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.done, self.total = values["done"], tensors.get("total", self.total)

    def run(self, stop_at: int | None = None) -> int:
        with self.store.resumed(self.restore, lambda: f"{self.done} of 3 numbers"):
            for number in range(self.done, 3):
                if number == stop_at:
                    raise KeyboardInterrupt
                self.done = number + 1
                self.total = self.total + self.done
                self.store.save({"done": self.done}, {"total": self.total})
        return self.done


@pytest.mark.parametrize("tensors", [False, True])
def test_stopped_work_goes_on(tensors: bool, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    with pytest.raises(KeyboardInterrupt) as stop:
        Work(out, tensors=tensors).run(stop_at=2)
    assert stop.value.__notes__ == [
        f"2 of 3 numbers are kept in {partial_path(out)}; the same command goes on with the next"
    ]
    work = Work(out, tensors=tensors)
    work.run()
    assert not tensors or work.total.tolist() == [6.0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensors", [False, True])
def test_other_settings(tensors: bool, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Work(tmp_path / "out.bin", tensors=tensors).run(stop_at=1)
    with pytest.raises(ConfigError, match="is of a count with other settings; delete it, or choose another --out"):
        Work(tmp_path / "out.bin", "b", tensors=tensors).run()


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("data", [b"", b"{broken", b"[]", b"{}", b'{"key": 1}', b"x" * 100])
def test_files_that_are_no_such_work(data: bytes, tensors: bool, tmp_path: Path) -> None:
    (tmp_path / "out.bin.partial").write_bytes(data)
    with pytest.raises(InputFileError, match=r"can't read .*out.bin.partial.*; delete it to start again"):
        Work(tmp_path / "out.bin", tensors=tensors).run()


def test_two_at_once(tmp_path: Path) -> None:
    first, second = Work(tmp_path / "out.bin"), Work(tmp_path / "out.bin")
    with first.store.resumed(first.restore, str), pytest.raises(OutputFileError, match="another process is writing it"):
        second.run()

"""Files are written whole or not at all: on a full disk, under a kill, by two at once, in the wrong place."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffsparse.errors import DiffsparseError, InputFileError, OutputFileError
from diffsparse.files import folder, if_stopped, locked, read_bytes, whole, writable, write_csv, write_text
from diffsparse.plans import sealed

ROOT = Path(__file__).parents[2]


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_success_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with whole(path) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


def test_failure_keeps_the_old_file_and_leaves_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with whole(path) as temporary:
            temporary.write_text("half")
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFileError, match="choose another"):
        folder(tmp_path / "file" / "below")
    (tmp_path / "folder").mkdir()
    long = tmp_path / f"{'x' * 252}.txt"
    places = {
        tmp_path / "folder": "a folder has that name",
        Path("/dev/null"): "a device has that name",
        long: "too long",
        tmp_path / "file" / "a.txt": "can't write to the folder",
    }
    for place, message in places.items():
        with pytest.raises(OutputFileError, match=message):
            writable(place)
        with pytest.raises(OutputFileError, match=message), whole(place):
            pytest.fail("nothing can be written there")
    with whole(tmp_path / f"{'x' * 251}.txt") as temporary:  # as long as names can be
        temporary.write_text("a")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_are_those_of_any_new_file(mask: int, tmp_path: Path) -> None:
    old = os.umask(mask)
    try:
        write_text("a", tmp_path / "a.txt")
        (tmp_path / "b.txt").write_text("b")
        sealed.write(tmp_path / "c.safetensors", {}, {"x": torch.zeros(1)})  # written by a library in its own way
    finally:
        os.umask(old)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "b.txt", "c.safetensors")}
    assert modes == {0o666 & ~mask}


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a.txt").symlink_to("there/b.txt")
    write_text("a", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "there" / "b.txt").read_text() == "a"


def test_errors_of_other_files_keep_their_names(tmp_path: Path) -> None:
    """InputFileError is an OSError too, and so is what `open` raises for a file that is merely read."""

    def ours() -> None:
        with whole(tmp_path / "a.txt"):
            raise InputFileError("can't read the picture")

    def theirs() -> None:
        with whole(tmp_path / "a.txt"):
            (tmp_path / "none").read_text()

    with pytest.raises(InputFileError, match="can't read the picture"):
        ours()
    with pytest.raises(FileNotFoundError, match="none"):
        theirs()
    assert not names(tmp_path)


def in_child(code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=check)


def test_a_full_disk(tmp_path: Path) -> None:
    """Writing past the limit on file sizes fails as a full disk does, and is no signal where that is ignored."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = """
import resource, signal, sys
from diffsparse.errors import OutputFileError
from diffsparse.files import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text("x" * 100_000, sys.argv[1])
except OutputFileError as error:
    print(error)
"""
    said = in_child(code, path).stdout
    assert "File too large, make room; what was there before is kept" in said
    assert said.count("\n") == 1
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_disk_that_is_found_full_only_when_it_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text("old", tmp_path / "a.txt")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputFileError, match="No space left on device, make room"):
        write_text("new", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def killed_while(code: str, path: Path, ready: Callable[[], bool]) -> None:
    """Run `code` in a child and kill it without warning some time after `ready`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment)
    try:
        while not ready():
            assert child.poll() is None
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    code = """
import itertools, sys
from diffsparse.files import write_json
for number in itertools.count():
    write_json([number] * 20_000, sys.argv[1])
"""
    for turn in range(3):
        before = path.stat().st_mtime_ns if path.exists() else 0
        killed_while(code, path, lambda before=before: path.exists() and path.stat().st_mtime_ns > before)
        values = json.loads(path.read_text())
        assert len(values) == 20_000
        assert len(set(values)) == 1, turn


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path, order = tmp_path / "a.json", []

    def other() -> None:
        with locked(path):
            order.append("second")

    with locked(path):
        code = "import sys\nfrom diffsparse.files import locked\nwith locked(sys.argv[1], wait=False): print('got it')"
        refused = in_child(code, path, check=False)
        assert "can't lock" in refused.stderr
        assert "another process is writing it" in refused.stderr
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert in_child(code, path).stdout == "got it\n"
    assert not names(tmp_path), "who holds it for all its work leaves nothing behind"


def test_texts_are_utf8_everywhere_and_not_endless(tmp_path: Path) -> None:
    write_text("± 猫\n", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == "± 猫\n".encode()
    write_csv([{"prompt": "猫"}], tmp_path / "a.csv")
    assert "猫" in (tmp_path / "a.csv").read_text(encoding="utf-8")
    assert read_bytes(tmp_path / "a.txt", "", most=8) == "± 猫\n".encode()
    for path, message in {
        Path("/dev/zero"): "larger than 1 MiB",
        tmp_path / "none": "No such file",
        tmp_path: "directory",
    }.items():
        with pytest.raises(InputFileError, match=f"can't read the text .*{message}.*; wanted a text"):
            read_bytes(path, "wanted a text", "the text", most=2**20)


def test_a_stop_carries_what_was_kept() -> None:
    def work() -> None:
        with if_stopped(lambda: "2 rows are kept"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        work()
    assert stopped.value.__notes__ == ["2 rows are kept"]
    with pytest.raises(DiffsparseError), if_stopped(lambda: "x"):
        raise DiffsparseError("no stop")

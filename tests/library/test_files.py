"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffsparse.errors import DiffsparseError, OutputFileError
from diffsparse.files import folder, whole


def test_success_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with whole(path) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


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
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFileError, match="choose another"):
        folder(tmp_path / "file" / "below")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiffsparseError, match="can't write"), whole(tmp_path / "folder") as temporary:
        temporary.write_text("a folder is in the way")

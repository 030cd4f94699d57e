"""Every code block of README and docs runs: Python as it stands, command lines up to where their work begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.pages import LANGUAGES, PAGES, ROOT, document, fences, prepare

IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(fences(page)) <= LANGUAGES, "a block of another language is not checked"
    prepare(monkeypatch, tmp_path)
    for example in document(page).examples():
        example.evaluate()

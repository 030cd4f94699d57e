"""Numbers that stand on pages by hand are those of committed rows."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from support import pages, quoted

ROOT = Path(__file__).parents[1]
PAGES = [str(path.relative_to(ROOT)) for path in pages.PAGES]
KNOBS = {"0.72"}  # which no row says in a column of its own


@cache
def sentences() -> list[tuple[str, str]]:
    return list(quoted.sentences())


@cache
def spaced(page: str) -> str:
    """A page as one line."""
    return re.sub(r"\s+", " ", (ROOT / page).read_text())


@pytest.mark.parametrize("page", PAGES)
def test_numbers_of_a_page_are_in_the_rows_of_the_files_that_it_names(page: str) -> None:
    text, told = spaced(page), quoted.told(ROOT / page) | KNOBS
    for where, sentence in sentences():
        text = text.replace(sentence, "") if where == page else text
    assert [number for number in quoted.numbers(text) if number not in told] == []


def test_sentences_say_what_rows_say() -> None:
    assert [(page, sentence) for page, sentence in sentences() if sentence not in spaced(page)] == []


def test_numbers_are_those_that_stand_there_by_hand() -> None:
    made = "<!-- t: made by make --> 7.5 <!-- /t -->"
    page = f"Wan 2.1 and 2.2 with `0.8`: 43.9 ± 2.0 dB, 1.58x [rows](a-0.5.json) arXiv 2502.21079 {made}"
    assert quoted.numbers(page) == ["43.9 ± 2.0", "1.58"]

"""The pages of recipes: no known model and no script is forgotten, and the tables are current."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffsparse_pipelines.families import FAMILIES
from support import recipes

SCRIPTS = sorted((Path(__file__).parents[2] / "pipelines").glob("*.py"))
NAMES = [name for page in recipes.PAGES.values() for names in page.scripts.values() for name in names]


def test_no_known_model_and_no_script_is_forgotten() -> None:
    assert sorted(NAMES) == sorted(set(FAMILIES) - {"tiny", "tiny-twin"})
    assert sorted(script for page in recipes.PAGES.values() for script in page.scripts) == [x.stem for x in SCRIPTS]


@pytest.mark.parametrize("file", recipes.FILES)
def test_the_tables_are_current(file: str) -> None:
    made = f"{recipes.BEGIN}\n{recipes.table(file)}\n{recipes.END}"
    assert made in (recipes.FOLDER / f"{file}.md").read_text(), "run `python -m support.recipes`"


def test_pages_show_what_the_command_prints() -> None:
    assert len(recipes.SHOWN) > 8
    stale = [page.name for page in recipes.SHOWN if recipes.shown(page.read_text()) != page.read_text()]
    assert not stale, "run `python -m support.recipes`"


def test_what_is_too_small_is_slower() -> None:
    """The one number of tokens that the advice goes by, against the model of time."""
    lines = [line.strip("| ").split(" | ") for file in recipes.PAGES for line in recipes.sizes(file).splitlines()[2:]]
    told = [(int(line[2].replace(",", "")), float(line[-1].rstrip("x"))) for line in lines if line[-1] != "-"]
    assert len(told) > 40
    assert all((tokens < recipes.FEW_TOKENS) == (speedup < 1) for tokens, speedup in told)

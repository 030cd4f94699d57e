"""The figures of the docs: committed as they are drawn, from rows and objects that are there."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from diffsparse.strategies import STRATEGIES
from diffsparse_eval import stack, style
from diffsparse_eval.figures import __main__ as figures
from diffsparse_eval.figures import drawings, measured
from diffsparse_eval.figures.table import CARD, FIGURES

COMMITTED, RESULTS = figures.FOLDER, measured.RESULTS
QUICK = [name for name in FIGURES if name.startswith("chart-")]
QUICK += ["sparse-vdit", "gna", "rounded", "one-call", "schedule", "stack", "seam"]


def parts(path: Path) -> tuple[list[str], np.ndarray]:
    """What a figure says, word for word, and all its numbers; without its bitmaps and names."""
    text = re.sub(r'base64,[^"]*"', "", path.read_text())
    numbers = re.findall(r"-?\d+\.\d+", re.sub(r'(id|href|clip-path)="[^"]*"', "", text))
    return re.findall(r"<!-- (.*?) -->", text), np.array(numbers, dtype=float)


def test_each_figure_has_its_files_and_each_file_its_figure() -> None:
    wanted = {f"{name}-{theme.name}.svg" for name in FIGURES for theme in style.THEMES}
    assert {path.name for path in COMMITTED.glob("*.svg")} == wanted
    assert all((figures.CARD_FOLDER / f"{name}.png").is_file() for name in CARD)
    assert sum(path.stat().st_size for path in COMMITTED.iterdir()) < 3.2e6


@pytest.mark.parametrize("name", QUICK)
def test_what_is_committed_is_what_is_drawn(name: str, tmp_path: Path) -> None:
    for drawn in figures.draw([name], tmp_path):
        (texts, numbers), (own_texts, own_numbers) = parts(COMMITTED / drawn.name), parts(drawn)
        assert texts == own_texts
        np.testing.assert_allclose(numbers, own_numbers, atol=0.05)


def test_drawn_twice_it_is_the_same(tmp_path: Path) -> None:
    first, second = ([path.read_bytes() for path in figures.draw(["gna"], tmp_path / name)] for name in "ab")
    assert first == second
    assert first[0] != first[1], "light and dark differ"


def test_an_unknown_figure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        figures.main(["chart-of-nothing"])
    assert "some of chart-fidelity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "strategy", "sparsity"),
    [("tiny-tangent.json", "digest", 0.8), ("tiny-tangent.json", "tangent", 0.5), ("tiny-rivals.json", "pisa", 0.8)],
)
def test_scores_are_those_of_the_rows(file: str, strategy: str, sparsity: float) -> None:
    rows = json.loads((RESULTS / file).read_text())["rows"]
    psnr = [row["psnr_db"] for row in rows if row["label"] == f"{strategy} {sparsity}"]
    score = measured.fidelity_scores()[strategy, sparsity]
    assert len(psnr) == 12
    assert score.mean == pytest.approx(mean(psnr))
    assert score.half > 0


def test_few_steps_are_those_of_the_rows() -> None:
    assert sorted(measured.few_scores()) == [(4, 0), (4, 1), (8, 0), (8, 1), (8, 2)]
    rows = json.loads((RESULTS / "few-8-steps-2-dense.json").read_text())["rows"]
    psnr = [row["psnr_db"] for row in rows if row["label"] == "digest 0.7"]
    assert measured.few_scores()[8, 2][0.7].mean == pytest.approx(mean(psnr))


def test_the_cache_leaves_the_steps_that_were_measured() -> None:
    _, points = drawings.stack_numbers()
    for strategy in ("dense", "tangent 0.8"):
        share = points[f"{drawings.SETTING}/{strategy}"].executed
        assert len(drawings.executed()) / drawings.STEPS == pytest.approx(share)


def test_all_rooms_are_drawn() -> None:
    there = {path.parent.name for path in (COMMITTED.parents[1] / "diffsparse").glob("*/__init__.py")}
    assert set(drawings.rooms()) == there


def luminance(colour: str) -> float:
    rgb = np.array(to_rgb(colour))
    return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("theme", style.THEMES, ids=["light", "dark"])
def test_methods_stand_out_from_the_paper_and_from_each_other(theme: style.Theme) -> None:
    assert set(STRATEGIES) <= set(style.LOOKS)
    for name in style.LOOKS:
        pair = sorted((luminance(style.colour(name, theme)), luminance(theme.paper)))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) > 3.5, name
    for some in (STRATEGIES, stack._KINDS):
        for a, b in itertools.combinations(some, 2):
            assert style.look(a).marker != style.look(b).marker
            assert style.colour(a, theme) != style.colour(b, theme)


def test_variants_have_their_methods_look() -> None:
    plain, means, tail = (style.line(label) for label in ("adaspa 0.8", "adaspa 0.8 +means", "adaspa+tail"))
    assert plain["color"] == means["color"] == tail["color"] == style.LOOKS["adaspa"].light
    assert plain["linestyle"] == "-"
    assert means["linestyle"] != tail["linestyle"]
    assert means["markerfacecolor"] == style.LIGHT.paper
    assert style.line("sparse-vdit 0.8 modes=diagonal+stripe")["linestyle"] == "-"
    assert style.look("taylor-seer:interval=2/digest 0.8") == style.LOOKS["digest"]
    assert style.look("a strategy of my own").marker


@pytest.mark.parametrize("theme", style.THEMES, ids=["light", "dark"])
def test_no_two_lines_of_a_plot_look_alike(theme: style.Theme) -> None:
    labels = ["cache/dense", "cache/digest", "cache/tangent", "gna order=auto", "digest", "gna", "gna +means"]
    found = style.lines(labels, theme)
    assert list(found) == labels
    for label in ("digest", "gna"):
        assert found[label] == style.line(label, theme), "a method keeps its look"
    kinds = {"cache/dense": "cache alone", "cache/digest": "stack"}
    assert [found[label]["color"] for label in kinds] == [style.colour(kind, theme) for kind in kinds.values()]
    full = [label for label in labels if label != "gna +means"]
    assert len({found[label]["color"] for label in full}) == len(full)
    assert found["gna +means"]["color"] == found["gna"]["color"]
    assert found["gna +means"]["markerfacecolor"] == theme.paper
    assert len(style.lines([f"cache/digest block={n}" for n in range(40)], theme)) == 40, "more than there are looks"


def test_names_stand_apart_and_near() -> None:
    places = np.array([1.0, 1.5, 2.0, 50.0, 99.0])
    found = style.apart(places, 10, 100)
    assert np.diff(found).min() >= 10 - 1e-9
    assert found[0] >= 0
    assert found[-1] <= 100
    assert found[3] == 50

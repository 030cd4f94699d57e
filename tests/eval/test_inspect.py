"""The inspect command on the embedded twin: pictures, numbers, errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffsparse import PARO, Dense, Layout, Random
from diffsparse.cli import main
from diffsparse.insight.inspection import LayerView
from diffsparse.orders.choice import candidates
from diffsparse.plans.plan import Plan
from diffsparse_eval import charts, style
from diffsparse_eval.attention import Sampling, _measured_at

COMMAND = ["inspect", "--model", "tiny-twin", "--block", "16", "--steps", "4", "--looks", "1"]
FACTS = {"model": "m", "label": "l", "layout": "1x8x8 = 64 tokens", "looks": [1], "sparsity": 0.8, "block": 8}


def call(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code


def test_pictures_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call([*COMMAND, "--layers", "0,3", "--orders", "FHW,WHF", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "3 blocks.3.attn1" in printed
    assert "1 blocks.1.attn1" not in printed
    maps = {f"maps-{n:02}-transformer.blocks.{n}.attn1.png" for n in (0, 3)}
    assert {path.name for path in tmp_path.iterdir()} == maps | {
        "recall.png",
        "orders.png",
        "inspect.json",
        "recall.csv",
    }
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            assert len(set(picture.convert("RGB").resize((64, 64)).get_flattened_data())) > 20
    found = json.loads((tmp_path / "inspect.json").read_text())
    assert found["looks"] == [3]
    assert len(found["rows"]) == 2 * 2
    for row in found["rows"]:
        assert row["best_recall"] == max(row["recall_FHW"], row["recall_WHF"]) == row[f"recall_{row['best_order']}"]
        assert row["raster_recall"] == row["recall_FHW"]
        assert 0 < row["chosen_recall"] < 1
        assert row["own_order"] in candidates(Layout(9, 8, 8), 16)
    with (tmp_path / "recall.csv").open() as file:
        assert [float(row["best_recall"]) for row in csv.DictReader(file)] == [r["best_recall"] for r in found["rows"]]


def test_dense_attention_may_be_inspected_too(tmp_path: Path) -> None:
    call([*COMMAND, "--strategy", "dense", "--layers", "1", "--orders", "WHF", "--out", str(tmp_path)])
    (row, _) = json.loads((tmp_path / "inspect.json").read_text())["rows"]
    assert (row["chosen_recall"], row["chosen_density"]) == (1.0, 1.0)


def test_blocks_of_more_queries_than_keys(tmp_path: Path) -> None:
    call([*COMMAND, "--layers", "1", "--orders", "WHF", "--block", "32x16", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "inspect.json").read_text())
    assert (found["block"], found["label"]) == ("32x16", "digest 0.8 block=32x16")
    assert 0 < found["rows"][0]["chosen_density"] < 0.3


BAD = {
    "two strategies": (["--strategy", "adaspa,random"], "inspect wants one strategy"),
    "layers": (["--layers", "-1"], "--layers wants whole numbers from 0"),
    "no such layer": (["--layers", "9"], "--layers wants some of 0 to 5; got 9"),
    "looks": (["--looks", "0"], "--looks wants a whole number from 1"),
    "order": (["--orders", "FHW,zigzag"], "--orders wants one of FHW"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[name]
    call([*COMMAND, *arguments, "--out", str(tmp_path / "out")], code=2)
    assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_recall_is_measured_as_the_strategy_runs() -> None:
    knobs = {"sparsity": 0.7, "block": 16}
    sampling = Sampling(**knobs)
    assert _measured_at(Random(0.4, block=32), sampling) == {"sparsity": 0.4, "block": 32}
    assert _measured_at(Dense(), sampling) == knobs
    settings = {"sparsity": 0.6, "block": 8, "orders": ["FHW"], "groups": 1}
    parts = {"orders": torch.zeros(1, dtype=torch.uint8), "masks": torch.ones(1, 1, 1, dtype=torch.uint8)}
    plan = Plan("paro", {}, Layout(1, 2, 2), settings, {f"transformer.a.{what}": x for what, x in parts.items()})
    assert _measured_at(PARO(plan), sampling) == {"sparsity": 0.6, "block": 8}


def view(heads: int, cells: tuple[int, int] = (6, 6), ran: bool = True) -> LayerView:
    own: Any = torch.rand(heads, *cells)
    figures = (torch.rand(heads), torch.rand(heads), own, own.round()) if ran else (None,) * 4
    recall, mass = torch.rand(2, heads), torch.rand(2, heads, *cells)
    return LayerView("transformer", "blocks.0", 0, ("FHW", "hilbert"), recall, mass, ("FHW",) * heads, *figures)


@pytest.mark.parametrize("heads", [1, 9])
@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("cells", [(6, 6), (3, 6)], ids=str)
def test_charts_of_any_number_of_heads(heads: int, ran: bool, cells: tuple[int, int], tmp_path: Path) -> None:
    views = [view(heads, cells, ran), view(max(1, heads - 1), ran=ran)]
    figure = charts.maps(views[0], FACTS)
    shown = [axes for axes in figure.axes if axes.get_visible() and axes.images]
    assert len(shown) == heads * (3 if ran else 2)
    assert all(axes.images[0].get_array().shape == cells for axes in shown)
    assert max(figure.get_size_inches()) < 22
    figure.draw_without_rendering()
    for axes in shown:
        assert axes.bbox.width == pytest.approx(axes.bbox.height, abs=1), "as many tokens along both sides"
    for made in (charts.recall(views, FACTS), charts.orders(views, FACTS)):
        style.save(made, tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.width < 5000

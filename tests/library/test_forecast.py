"""The model of time against the committed rows of a GPU, and against itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffsparse import AdaSpa, Compensated, Dense, Digest, Layout, Random, Schedule, Tangent
from diffsparse.insight.cost import Flops
from diffsparse.insight.device import DEVICES, H100, H100_UNFUSED, Device
from diffsparse.insight.forecast import Call, Forecast
from diffsparse.site.charge import summary_work
from diffsparse.strategies.base import Strategy
from diffsparse.strategies.work import Outline, Parts, Step

ROWS = Path(__file__).parents[2] / "eval" / "results" / "gpu"
SHAPES = {"wan 14b 720p": (75_600, 40, False), "hunyuan-video 720p": (119_056, 24, True)}
LAYOUTS = {"wan 14b 720p": Layout(21, 45, 80), "hunyuan-video 720p": Layout(33, 45, 80, 0, 256)}
Row = dict[str, Any]


def rows(day: str, *key: str) -> list[Row]:
    """Committed rows by stage, shape, kernel and, where they have them, kind and density."""
    found = map(json.loads, (ROWS / f"{day}.jsonl").read_text().splitlines())
    timed = [row for row in found if row["verdict"] in ("timed", "done", "profiled")]
    names = ("stage", "shape", "kernel", "kind")
    return [
        row
        for row in timed
        if all(row.get(name) == part for name, part in zip(names, key, strict=False))
        and (len(key) < 5 or round(row["density"], 2) == float(key[4]))
    ]


def row_of(measured: str) -> Row:
    """The one row that a rate names; of a profile its last word is an operation."""
    day, _, key = measured.partition(": ")
    parts = [part.strip() for part in key.split("|")]
    [found] = rows(day, *(parts[:3] if "profile" in key or parts[0] == "end to end" else parts))
    return found


def call(shape: str, block: tuple[int, int] = (128, 128), device: Device = H100_UNFUSED) -> Call:
    tokens, heads, masked = SHAPES[shape]
    return Call(device, tokens, heads, 128, block, masked)


WAN, HUNYUAN = call("wan 14b 720p"), call("hunyuan-video 720p")
FINE = call("wan 14b 720p", (128, 64))


def tflop_a_second(name: str, tflop: float, key: str = "ms") -> float:
    return 1e3 * tflop / float(row_of(getattr(H100_UNFUSED, name).measured)[key])


# name of a rate -> what its row gives
FROM_ROWS = {
    "dense": lambda: tflop_a_second("dense", WAN.dense_tflop),
    "dense_masked": lambda: tflop_a_second("dense_masked", HUNYUAN.dense_tflop),
    "dense_with_lse": lambda: row_of(H100.dense_with_lse.measured)["tflops"],
    "listed_blocks": lambda: row_of(H100.listed_blocks.measured)["tflops"],
    "mean_keys": lambda: (
        1e3 * FINE.dense_tflop * 1182 / 75_600 / row_of(H100_UNFUSED.mean_keys.measured)["ops"]["add_means"]
    ),
    "block_mass": lambda: row_of(H100.block_mass.measured)["tflops"],
    "matrix_product": lambda: 1e3 * 2e-12 * 8192**3 / row_of(H100.matrix_product.measured)["ms"],
    "rest_of_model": lambda: rest_of(row_of(H100.rest_of_model.measured), 1618.14),
    "copy": lambda: row_of(H100.copy.measured)["gb_per_s"],
    "moved_tokens": lambda: 1e3 * 8 * HUNYUAN.tensor / row_of(H100_UNFUSED.moved_tokens.measured)["ms"],
    "selection_of_a_pair": lambda: 1e-3 * row_of(H100_UNFUSED.selection_of_a_pair.measured)["ms"] / HUNYUAN.pairs,
    "lists_of_a_pair": lambda: 1e-3 * row_of(H100_UNFUSED.lists_of_a_pair.measured)["ms"] / HUNYUAN.pairs,
    "host_of_blocks": lambda: row_of(H100.host_of_blocks.measured)["host_ms"],
    "host_of_compensated": lambda: row_of(H100.host_of_compensated.measured)["host_ms"],
}


def rest_of(row: Row, tflop: float) -> float:
    """TFLOP/s outside of attention; one pass a step."""
    return tflop / float(row["dense_step_seconds"] * (1 - row["attention_share"]))


@pytest.mark.parametrize("name", FROM_ROWS)
def test_a_measured_rate_is_what_its_row_gives(name: str) -> None:
    assert getattr(H100_UNFUSED, name).value == pytest.approx(FROM_ROWS[name](), rel=0.003)


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_each_rate_says_whether_it_was_measured(device: Device) -> None:
    named = dict(device.rates())
    assert all(bool(rate.measured) != bool(rate.assumed) for rate in named.values())
    assert {name for name, rate in named.items() if rate.measured} <= set(FROM_ROWS)
    assert {name for name, rate in dict(H100_UNFUSED.rates()).items() if rate.measured} == set(FROM_ROWS)


STEPS = {
    "dense": Step(),
    "search": Step("search", 1.0, 0.5, 1.0),
    "sparse": Step("sparse", 0.2),
}


@pytest.mark.parametrize("day", ["h100-2026-11-26", "h100-2026-11-27"])
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_of_adaspa_take_what_was_measured(shape: str, kind: str, day: str) -> None:
    """Within 2 %, whatever the shape: all but one of the rates are of the other shape, or of other kernels' rows."""
    found = rows(day, "step", shape, f"adaspa, {kind}")
    if not found:
        pytest.skip("that account ran out of time")
    step = STEPS[kind] if kind != "sparse" else replace(STEPS[kind], density=found[0]["density"])
    pieces = call(shape).pieces(step)
    assert pieces is not None
    assert sum(piece.ms for piece in pieces) == pytest.approx(found[0]["ms"], rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_with_means_takes_what_was_measured(shape: str) -> None:
    """Within 10 %, of a Digest that is no longer; the model lacks its residual, in means over tokens."""
    [measured] = rows("h100-2026-11-27", "step", shape, "digest, sparse")
    listed = (measured["density"] - 1 / 64) / (1 - 1 / 64)
    pieces = replace(call(shape, (128, 64)), moved=True).pieces(
        Step("sparse", measured["density"], parts=Parts(listed, "means"))
    )
    assert pieces is not None
    assert sum(piece.ms for piece in pieces) == pytest.approx(measured["ms"], rel=0.1)


def forecast(strategy: Strategy, first: float = 0.2, shape: str = "wan 14b 720p", device: Device = H100) -> Forecast:
    count = Flops((117e12,) * 4, 100e12, 128)
    found = Forecast.of(count, strategy, Schedule(first), 50, LAYOUTS[shape], call(shape, device=device), 1)
    assert found is not None
    return found


def test_dense_runs_as_fast_as_dense() -> None:
    found = forecast(Dense())
    assert found.speedup == found.attention_speedup == 1
    assert found.beside is None
    assert found.search_share == 0


def test_no_run_beats_its_blocks() -> None:
    """A run of blocks alone is the limit of those that do something beside them."""
    alone = forecast(Random(0.8, block=128))
    assert alone.beside == 0
    assert alone.attention_speedup == pytest.approx(1 / (0.2 + 0.8 * 0.2 * 588.6 / 602.7), rel=0.01)
    for strategy in (Tangent(0.8, (128, 64)), Digest(0.8, (128, 64)), AdaSpa(0.8, block=128)):
        found = forecast(strategy)
        assert 1 < found.speedup < alone.speedup
        assert forecast(strategy, 0.1).speedup > found.speedup
    fused, unfused = (forecast(AdaSpa(0.8, block=128), device=device) for device in (H100, H100_UNFUSED))
    assert fused.search_share < unfused.search_share


def test_layers_that_stay_dense_gain_nothing() -> None:
    count = Flops((117e12,) * 4, 100e12, 128)
    schedule = Schedule(0.2, dense_layers=(0, 1))
    half = Forecast.of(count, Random(0.8, block=128), schedule, 50, LAYOUTS["wan 14b 720p"], WAN, 1)
    assert half is not None
    whole = forecast(Random(0.8, block=128), device=H100_UNFUSED)
    assert 1 / half.attention_speedup == pytest.approx((1 + 1 / whole.attention_speedup) / 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strategy", [Tangent(0.8, (128, 64)), Digest(0.8, (128, 64)), Tangent(0.8, 64)])
def test_parts_are_the_work_that_is_charged(strategy: Tangent, shape: str) -> None:
    layout = LAYOUTS[shape]
    for step in strategy.expected(Outline.of(Schedule(), 50, layout, 128)):
        if step.kind != "sparse":
            continue
        parts = step.parts
        assert parts is not None
        summaries = summary_work(parts.summary, 1 - parts.listed, strategy.block, layout.tokens, 128)
        assert step.density == pytest.approx(parts.listed + summaries)
        fit = (parts.probes + 64) / layout.tokens if parts.probes else 0
        routing = parts.routed / (2 * (strategy.block[1] if isinstance(strategy.block, tuple) else strategy.block))
        assert step.beside == pytest.approx(routing + fit + parts.rank / (2 * layout.tokens))


def test_what_is_made_is_counted_as_it_is_made() -> None:
    """Two passes over all mean keys to route, all of them in the softmax, H of all blocks made twice."""
    parts = Parts(0.1, "first-order", True, True, 128, 4)
    pieces = replace(FINE, moved=True).pieces(Step("sparse", 0.2, 0.1, 1.0, parts))
    assert pieces is not None
    found = {piece.name: piece for piece in pieces}
    means = 4e-12 * 75_600 * 1182 * 40 * 128
    assert found["mean keys"].tflop == found["routing"].tflop == pytest.approx(means)
    assert found["blocks"].tflop == pytest.approx(0.1 * FINE.dense_tflop)
    assert found["mixing"].tflop == pytest.approx(2e-12 * 40 * 591 * 1182 * 128**2)
    assert found["statistics"].tflop == pytest.approx(4e-12 * 75_600 * 40 * 128**2)
    assert found["tokens moved"].gigabytes == pytest.approx(8 * 2e-9 * 75_600 * 40 * 128)
    assert "host" not in found
    small = Call(H100, 1024, 4, 128, (128, 64)).pieces(Step("sparse", 0.2, 0.0, 1.0, parts))
    assert small is not None
    assert sum(piece.ms for piece in small) == pytest.approx(H100.host_of_compensated.value)


def test_what_is_not_known_is_not_foretold() -> None:
    count = Flops((1e12,), 1e12, 128)
    for strategy in (Compensated(Random(0.8, block=128), "tail"), Random(0.8, block=128)):
        found = Forecast.of(count, strategy, Schedule(), 50, LAYOUTS["wan 14b 720p"], WAN, 1)
        assert (found is None) == isinstance(strategy, Compensated)
    assert WAN.pieces(Step("sparse", None)) is None
    assert WAN.pieces(Step("sparse", 0.2, 0.1)) is None, "something beside the blocks, and nobody says what"


def test_the_fastest_dense_is_no_slower_than_the_users() -> None:
    for device in DEVICES.values():
        fastest = device.with_fastest_dense()
        assert fastest.dense_masked == device.dense_with_lse
        assert fastest.dense.value >= device.dense.value

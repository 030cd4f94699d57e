"""Step caches in experiments, and what a stack gains over a cache alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from PIL import Image

from diffsparse.cli import main
from diffsparse.errors import InputFileError
from diffsparse_eval import experiment, pictures, stack
from diffsparse_eval.stack import Point
from diffsparse_pipelines import tiny

STACKS = "taylor-seer:interval=2:warm_up=1/random,taylor-seer:interval=2:warm_up=1/dense,mag:threshold=0.2/tangent"
COMMAND = ["evaluate", "--model", "tiny-twin", "--steps", "6", "--block", "16", "--prompts", "2"]
CPU = "some processor, 2 threads"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stack")
    with pytest.raises(SystemExit) as ended:
        main([*COMMAND, "--strategy", f"random,{STACKS}", "--out", str(out)])
    assert not ended.value.code
    return out


def test_rows_of_a_stack_count_what_the_cache_answered(results: Path) -> None:
    rows = {row["label"]: row for row in stack.read(results / "results.json")}
    sparse, alone = (
        rows["taylor-seer:interval=2:warm_up=1/random 0.8 block=16"],
        rows["taylor-seer:interval=2:warm_up=1/dense"],
    )
    assert sparse["executed"] == alone["executed"] == pytest.approx(3 / 6)  # steps 0, 2 and 4
    assert alone["density"] == pytest.approx(3 / 6)
    assert sparse["density"] == pytest.approx((1 + 2 * (sparse["sparse_density"] or 0)) / 6)
    assert rows["random 0.8 block=16"]["executed"] == 1
    assert rows["mag:threshold=0.2/tangent 0.8 block=16"]["executed"] < 1
    assert set(pictures._lines(list(rows.values()))) == {
        "random block=16",
        "taylor-seer/random block=16",
        "taylor-seer/dense",
        "mag/tangent block=16",
    }


def test_a_folder_is_calibrated_on_one_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of prompts that come later stand beside the others."""
    file, seen, generation = tmp_path / "prompts.txt", [], experiment.generation

    def noted(pipe: Any, call: dict[str, Any], seed: int, *rest: Any) -> Any:
        if seed == experiment._CALIBRATION_SEED:
            seen.append(call["prompt"])
        return generation(pipe, call, seed, *rest)

    monkeypatch.setattr(experiment, "generation", noted)
    captions = tiny.prompts(3)
    for some in (captions[:2], captions[1:]):
        file.write_text("\n".join(some))
        command = ["evaluate", "--model", "tiny-twin", "--steps", "6", "--prompts", str(file)]
        command += ["--strategy", "mag:threshold=0.2/dense", "--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert not ended.value.code
    assert seen == [captions[0]] * 2


def point(kind: str, speed: float, decibels: list[float], executed: float = 1.0, work: float = 1.0) -> Point:
    return Point(f"{kind} {speed}", kind, decibels, [speed, speed], executed, work)


SETTINGS = [
    point("cache alone", 1.5, [44, 40]),
    point("cache alone", 2.2, [38, 36]),
    point("cache alone", 2.25, [30, 30]),  # nearer to 2.3, but worse than the next, which is faster too
    point("cache alone", 2.4, [35, 33]),
    point("stack", 2.0, [42, 40]),
    point("stack", 2.1, [39, 39]),  # beaten by the next
    point("stack", 2.4, [40, 39]),
    point("sparse alone", 1.8, [41, 41]),
]


def test_the_gain_is_at_the_speed_of_the_best_cache_prompt_by_prompt() -> None:
    (found,) = stack.margins(SETTINGS, lambda p: p.measured, [2.25])
    assert (found.cache, found.speedup) == ("cache alone 2.2", 2.2)
    assert (found.cache_db, found.stack_db, found.gain_db) == (37, pytest.approx(40.25), pytest.approx(3.25))
    gains = [41 - 38, 39.5 - 36]
    assert found.gain_db == pytest.approx(mean(gains))
    assert found.half is None, "an interval wants five runs"
    five = [p._replace(psnr_db=[*p.psnr_db, *p.psnr_db, p.psnr_db[0]]) for p in SETTINGS]
    (found,) = stack.margins(five, lambda p: p.measured, [2.25])
    assert found.half == pytest.approx(2.776 * stdev([*gains, *gains, gains[0]]) / 5**0.5, rel=1e-3)  # Student's t


def test_where_all_stacks_are_faster_the_slowest_is_meant() -> None:
    (found,) = stack.margins(SETTINGS, lambda p: p.measured, [1.5])
    assert (found.cache, found.cache_db, found.stack_db) == ("cache alone 1.5", 42, pytest.approx(41))


def test_no_gain_is_claimed_beyond_the_stacks_that_were_measured() -> None:
    fast = [p for p in SETTINGS if p.kind == "cache alone" or p.measured < 2.4]
    assert stack.margins(fast, lambda p: p.measured, [2.4]) == []
    assert stack.margins([p for p in SETTINGS if p.kind != "stack"], lambda p: p.measured) == []


@pytest.mark.parametrize(("share", "speedup"), [(0.0, 2.0), (1.0, 5.0), (0.5, 1 / 0.35)])
def test_counted_speed_ups(share: float, speedup: float) -> None:
    assert point("stack", 2.0, [40], executed=0.5, work=0.2).counted(share) == pytest.approx(speedup)


def test_processor_time_counts_on_a_cpu_and_the_clock_on_a_gpu() -> None:
    def made(**row: Any) -> list[float]:
        base = {"label": "random 0.8", "strategy": "random", "psnr_db": 30.0, "prompt": "", "seed": 0}
        (found,) = stack.points([{**base, "executed": 1, "work": 0.3, "speedup": 2.0, **row}])  # type: ignore[list-item]
        return found.speedups

    assert made(device=CPU, cpu_speedup=1.5) == [1.5]
    assert made(device="NVIDIA H100", cpu_speedup=1.5) == made(device=CPU, cpu_speedup=None) == [2.0]


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [("pab/dense", "cache alone"), ("sea/digest", "stack"), ("taylor-seer/dense+heads", None), ("dense+heads", None)],
)
def test_head_guidance_is_no_setting(strategy: str, kind: str | None) -> None:
    cache, _, method = strategy.rpartition("/")
    row = {"label": f"{cache}:range=2/{method} 0.8", "strategy": strategy, "psnr_db": None, "prompt": "", "seed": 0}
    row |= {"executed": 0.5, "work": 0.3, "speedup": 2.0, "device": "NVIDIA H100"}
    found = stack.points([row, {**row, "seed": 1, "psnr_db": 30.0}])  # type: ignore[list-item]
    assert [point.kind for point in found] == ([] if kind is None else [kind])
    assert all(point.psnr_db == [100.0, 30.0] for point in found)


def test_results_of_two_folders_are_told_apart(results: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name / "results.json" for name in ("h100", "h200")]
    for path in paths:
        path.parent.mkdir()
        path.write_text((results / "results.json").read_text())
    stack.main(list(map(str, paths)))
    text = (tmp_path / "h100" / "stack.md").read_text()
    assert "### H100" in text
    assert "### H200" in text


def test_files(results: Path, tmp_path: Path) -> None:
    for name in ("guidance-1", "guidance-5"):
        (tmp_path / f"stack-{name}.json").write_text((results / "results.json").read_text())
    stack.main([str(tmp_path / f"stack-guidance-{scale}.json") for scale in (1, 5)])
    text = (tmp_path / "stack.md").read_text()
    assert "### Guidance 1" in text
    assert "### Guidance 5" in text
    assert "| taylor-seer:interval=2:warm_up=1/dense |" in text
    with Image.open(tmp_path / "stack.png") as picture:
        assert picture.width > picture.height
    with pytest.raises(InputFileError, match=r"results\.json of `diffsparse evaluate`"):
        stack.read(tmp_path / "stack.md")


def test_the_tables_in_the_docs_are_those_of_the_committed_rows() -> None:
    for path, text in stack.pages().items():
        assert path.read_text() == text, f"{path.name} is stale: run make stack-tables"

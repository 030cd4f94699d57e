"""What a terminal of 80 columns shows, and what a file or a pipe shows in place of a bar."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from diffsparse.cli import COMMANDS, main
from diffsparse_eval import attention, replay, report, speed
from diffsparse_eval.commands import bench
from diffsparse_pipelines import bars, progress, tables
from diffsparse_pipelines.commands.hunt import HuntOptions
from diffsparse_pipelines.commands.models import _COLUMNS, row
from diffsparse_pipelines.families import FAMILIES
from diffsparse_pipelines.hunting import _headings, _rows

# --- tables -----------------------------------------------------------------------------------------------------------

NAME = "taylor-seer:interval=2:warm_up=0.45/digest 0.85 block=128x64"


def compared() -> dict[str, Any]:
    """The table of `evaluate`, of three runs with wide numbers."""
    base = {**dict.fromkeys(report._COLUMNS, 12.3456), "strategy": "digest", "label": NAME}
    rows: Any = [{**base, "psnr_db": db, "seconds": 1234.5 + db, "speedup": db} for db in (41.23, 42.03, 53.1)]
    headings, lines = report.table(rows)
    return {"rows": lines, "headings": headings, "alignment": "l" + "r" * (len(headings) - 1), "spare": report.SPARE}


def timed() -> dict[str, Any]:
    """The table of `evaluate --random-weights`, every kind of step in it."""
    rows: Any = [{**dict.fromkeys(speed.COLUMNS, 1234.5), "label": NAME}]
    headings, lines = speed.table(rows)
    return {"rows": lines, "headings": headings, "alignment": "l" + "r" * (len(headings) - 1), "spare": speed.SPARE}


def benched() -> dict[str, Any]:
    """One case of `bench`."""
    case: Any = {"backend": "flash-attn-4", "kind": "first-order", "density": 0.2, "ms": 12345.67, "tflops": 1234.567}
    lines = [bench._cells({**case, "speedup": 12.34, "efficiency": 0.98})]
    return {"rows": lines, "headings": bench._HEADINGS, "alignment": "llrrrrr"}


def replayed() -> dict[str, Any]:
    """The table of `inspect --replay`."""
    lines = [[NAME, *(["-12.3", "0.123"] * 3), *(["57 72 86 95 99"] * 2)]]
    return {"rows": lines, "headings": replay.HEADINGS, "alignment": "l" + "r" * 8, "spare": replay.SPARE}


def inspected() -> dict[str, Any]:
    """The table of `inspect`, of a model with many heads."""
    heads = " ".join(["tile4x8x8=0.73"] * 24)
    lines = [["12 single_transformer_blocks.12.attn", *(["0.123"] * 4), heads]]
    return {"rows": lines, "headings": attention.HEADINGS, "alignment": "lrrrrl"}


def known() -> dict[str, Any]:
    """The table of `models`."""
    lines = [["-" if row(name)[key] is None else str(row(name)[key]) for key in _COLUMNS] for name in FAMILIES]
    spare = ("checkpoint", "guidance", "makes")
    return {"rows": lines, "headings": list(_COLUMNS.values()), "alignment": "lllrrrrlll", "spare": spare}


def hunted() -> dict[str, Any]:
    """The table of `hunt`."""
    held = {"pairs": 24, "off": -0.2778, "on": 0.3718, "gain": -0.0940, "better": 24, "gain_95": [-0.0834, -0.1045]}
    preset: Any = type("Preset", (), {})()
    preset.about = {"held_out": held, "score": {"none": 0.2648, "all": 0.3501}, "images": 8}
    return {"rows": _rows(preset), "headings": _headings(preset), "alignment": "lrrrrr"}


TABLES = [compared, timed, benched, replayed, inspected, known, hunted]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("made", TABLES, ids=lambda made: str(made.__name__))
def test_tables_fit_and_no_cell_is_cut(made: Any, width: int) -> None:
    table = made()
    found = tables.laid_out(table["rows"], table["alignment"], table["headings"], width, table.get("spare", ()))
    assert max(map(len, [*found.head, *found.body])) <= width
    shown = "\n".join(found.body)
    kept = [i for i, heading in enumerate(table["headings"]) if heading not in found.left_out]
    words = " ".join(found.head).split()
    for i in kept:
        assert set(table["headings"][i].split()) <= set(words)
        if table["alignment"][i] == "r":
            numbers = [part for line in table["rows"] for part in line[i].split("\n")]
            assert all(re.search(rf"(?<!\S){re.escape(number)}(?!\S)", shown) for number in numbers)
    letters = sorted("".join(line[i] for line in table["rows"] for i in kept).replace("\n", ""))
    assert sorted(shown.replace("\n", "").replace(" ", "")) == [x for x in letters if x != " "], "nothing is lost"
    assert set(found.left_out) <= set(table.get("spare", ()))


@pytest.mark.parametrize(
    "arguments",
    [
        "models",
        "doctor",
        "simulate",
        "simulate --model hunyuan-video --device h100",
        "models --model flux",
        "generate --help",
    ],
)
def test_commands_fit_80_columns(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(arguments.split())
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_the_help_of_generate_tells_of_step_caches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "with a step cache CACHE/STRATEGY" in " ".join(re.sub("[│\n]", " ", capsys.readouterr().out).split())


def test_columns_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = compared()
    for width, left_out in ((80, "not shown at this width: density, attention speed-up, SSIM\n"), (200, "")):
        monkeypatch.setenv("COLUMNS", str(width))
        progress.show_table(**table)
        out = capsys.readouterr().out
        assert out.partition("not shown")[1:] == (left_out[:9], left_out[9:])
        assert "work" in out.partition("\n")[0]


def test_names_are_broken_where_they_have_joints() -> None:
    assert tables.broken("taylor-seer:interval=2/digest 0.8", 23) == ["taylor-seer:interval=2/", "digest 0.8"]
    assert tables.broken("abcdef gh\nij", 4) == ["abcd", "ef", "gh", "ij"]


# --- progress -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that goes by, in seconds."""
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    return now


def console(file: io.StringIO, terminal: bool = False) -> Console:
    return Console(file=file, width=80, force_terminal=terminal, force_interactive=terminal)


def test_a_file_gets_a_line_every_few_seconds_and_never_twice_the_same(clock: list[float]) -> None:
    file = io.StringIO()
    with progress.bar(console(file)) as shown:
        task = shown.add_task("runs", total=4)
        steps = shown.add_task("steps", total=None)
        for _ in range(3):
            clock[0] += 2
            shown.update(steps, completed=1, total=9)
        shown.update(steps, completed=1, total=9)
        clock[0] += 60
        shown.update(steps, completed=1, total=9)  # nothing has moved
        shown.remove_task(steps)
        shown.say("a line of its own")
        clock[0] += 1
        shown.advance(task)  # a second after that line
        clock[0] += 9
        shown.advance(task)
    lines = file.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "runs 0 of 4, steps 1 of 9",
        "a line of its own",
        "runs 2 of 4",
    ]


def test_the_time_left_is_told_once_each_kind_of_unit_has_been_there(clock: list[float]) -> None:
    file = io.StringIO()
    with progress.bar(console(file)) as shown:
        shown.get_time = lambda: clock[0]
        task = shown.add_task("runs", total=6, sure=3)
        for _ in range(4):
            clock[0] += 60
            shown.advance(task)
    lines = file.getvalue().splitlines()
    assert ["left" in line for line in lines] == [False, False, True, True]


def test_a_terminal_gets_a_bar() -> None:
    file = io.StringIO()
    with progress.bar(console(file, terminal=True)) as shown:
        assert type(shown) is bars.Bar
        shown.advance(shown.add_task("runs", total=4))
    assert "━" in file.getvalue()


def test_what_a_line_says() -> None:
    assert bars.counted([("runs", 3, 9), ("steps", 0, None)], 34.2, 51.0) == "runs 3 of 9: 34 s, about 51 s left"
    assert bars.counted([("runs", 3, 9), ("steps", 7, 15)], 600, None) == "runs 3 of 9, steps 7 of 15: 10 min"


LONG = """
import sys, time
from diffsparse_pipelines import bars, progress
bars.PACE = 0.1
for _ in progress.track(range(3), "units"):
    time.sleep(0.15)
with progress.status("loading"):
    pass
sys.stdin.read()
"""


def test_a_pipe_sees_lines_while_work_is_under_way() -> None:
    """Before the process ends: what is printed is flushed."""
    child = subprocess.Popen([sys.executable, "-c", LONG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(4)]
    child.communicate()
    assert [line.partition(":")[0].strip() for line in lines] == [
        "units 1 of 3",
        "units 2 of 3",
        "units 3 of 3",
        "loading",
    ]


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True], ids=["rich", "plain"])
@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_wraps_at_any_width(
    name: str, width: int, plain: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("diffsparse.cli.parser.RICH", not plain)
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= width
    assert "…" not in text
    usage = next(i for i, line in enumerate(lines) if "Usage:" in line)
    options = next(i for i, line in enumerate(lines) if "Options" in line and i > usage)
    for first, second in zip(lines[usage + 1 : options], lines[usage + 2 : options], strict=False):
        if first.strip() and second.strip():  # of one paragraph: the next word would not have fitted
            assert len(first) + 1 + len(second.split()[0]) > min(width, 80 if plain or width < 80 else width) - 3


@pytest.mark.parametrize("name", ["generate", "evaluate", "calibrate", "hunt", "simulate", "inspect"])
def test_help_names_the_known_models(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    words = set(re.split(r"[\s,]+", capsys.readouterr().out.replace(".\n", "\n").replace(". ", " ")))
    assert set(FAMILIES) <= words


def test_hunts_fit_the_embedded_models() -> None:
    options = HuntOptions("contrast")
    own, others = (options.hunter(model) for model in ("tiny-twin", "sd3.5"))
    assert (own.k, own.rounds, own.head_scale) == (2, 1, 1.0)
    assert (others.k, others.rounds, others.head_scale) == (3, 5, 3.0)
    assert HuntOptions("contrast", k=4).hunter("tiny").k == 4

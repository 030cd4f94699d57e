"""`python -m support.results` writes tables of docs/results.md, few-steps.md and tiny.md, the measures of evaluate.md.

Every number is computed from committed rows, and every command is what the rows say of how they were made.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from diffsparse_eval import report, stack
from diffsparse_eval.experiment import load
from diffsparse_eval.gpu import table as gpu
from diffsparse_eval.report import meanings
from diffsparse_eval.rows import DEFINITIONS, SPEED_DEFINITIONS
from diffsparse_pipelines.tables import markdown_table, mean_and_interval, spliced

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "eval/results"
PAGE, EVALUATE, FEW_STEPS = (ROOT / f"docs/{name}.md" for name in ("results", "evaluate", "few-steps"))
Row = dict[str, Any]

# --- the rows -------------------------------------------------------------------------------------------------------


@cache
def rows(name: str) -> list[Row]:
    """Of a committed file; numbers of CSV as numbers."""
    path = RESULTS / name
    if path.suffix == ".json":
        found: list[Row] = load(path)["rows"]
        return found
    with path.open() as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _number(value: str) -> float | str | None:
    try:
        return float(value) if value else None
    except ValueError:
        return value


def of(name: str, label: str, column: str) -> list[float]:
    """A column of the rows with a label."""
    return [row[column] for row in rows(name) if row["label"] == label and row.get(column) is not None]


def with_interval(values: list[float], digits: int = 1) -> str:
    """Mean and half of the 95 % interval."""
    middle, half = mean_and_interval(values)
    return f"{middle:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


# --- the table of methods -------------------------------------------------------------------------------------------

SHARES = (0.5, 0.7, 0.8, 0.9)
_PLANNED = ("paro", "sparse-vdit")  # on a plan, so there are no passes beside the blocks
_MODES = "sparse-vdit {} epsilon=100.0 modes=diagonal+multi-diagonal+stripe"


class Method(NamedTuple):
    """A line of the table: its rows, and where its times and its work are if not there.

    label: with {} for the sparsity.
    timed: file with processor times.
    """

    name: str
    file: str
    label: str
    timed: str = ""


METHODS = (
    Method("`Digest`", "tiny-tangent.json", "digest {}", "stack-guidance-1.json"),
    Method("`Tangent`", "tiny-tangent.json", "tangent {}", "stack-guidance-1.json"),
    Method("SVG-EAR, rebuilt", "tiny-rivals.json", "svg-ear {}"),
    Method("Sol-Attn, rebuilt, raster order", "tiny-rivals.json", "sol {}"),
    Method("DiTFastAttn, rebuilt", "tiny-rivals.json", "dit-fast {}"),
    Method("PISA, rebuilt", "tiny-rivals.json", "pisa {}"),
    *(
        Method(f"{name}{way.replace(' +', ' with ')}", "tiny.csv", f"{label}{way}")
        for name, label, ways in (
            ("`PARO`", "paro {}", (" +means", "")),
            ("`SparseVDiT`", _MODES, (" +means", "")),
            ("`AdaSpa`", "adaspa {}", (" +means", " +tail", "")),
            ("`GNA`", "gna {}", (" +means", "")),
            ("`Random`", "random {}", (" +means", "")),
        )
        for way in ways
    ),
    Method("`AdaSpa`, order auto", "tiny.csv", "adaspa {} order=auto"),
    Method("`AdaSpa` with means, order auto", "tiny.csv", "adaspa {} order=auto +means"),
    Method("`PARO`, raster order", "tiny.csv", "paro {} orders=FHW"),
)


def methods() -> str:
    """PSNR of each method at each sparsity, and its speed and work at 80 %."""
    headings = (
        "PSNR dB",
        *(f"{share:.0%}".replace("%", " %") for share in SHARES),
        "speed-up at 80 %",
        "of attention",
        "work at 80 %",
    )
    return markdown_table(headings, map(_line, METHODS))


def _line(method: Method) -> list[str]:
    fidelity = [of(method.file, method.label.format(share), "psnr_db") for share in SHARES]
    label = method.label.format(0.8)
    speeds = of(method.timed, label, "cpu_speedup") if method.timed else []
    attention: list[float] = []
    if method.file == "tiny.csv":
        speeds, attention = (of(method.file, label, column) for column in ("speedup", "attention_speedup"))
    work = of(method.file, label, "work") or of("tiny-work.json", label, "work")
    if label.startswith(_PLANNED):
        work = of(method.file, label, "density")
    cells = [with_interval(values) if values else "-" for values in fidelity]
    means = ((speeds, "{:.2f}x"), (attention, "{:.2f}x"), (work, "{:.2f}"))
    return [
        method.name,
        *cells,
        *(form.format(mean_and_interval(values)[0]) if values else "-" for values, form in means),
    ]


FEW = ((4, 0), (4, 1), (8, 0), (8, 1), (8, 2))  # steps of a run, and dense ones of them
_TAKEN = {(0.6, 4, 1), (0.7, 8, 2)}  # what the names of few-step models take


def few() -> str:
    """PSNR of `Digest` in runs of few steps, and what it computes."""
    headings = ["sparsity", *(f"{steps} steps, {dense or 'none'} dense" for steps, dense in FEW)]
    lines = []
    for share in (0.5, 0.6, 0.7, 0.8):
        cells = []
        for steps, dense in FEW:
            psnr, work = (
                of(f"few-{steps}-steps-{dense}-dense.json", f"digest {share}", x) for x in ("psnr_db", "work")
            )
            cell = f"{mean(psnr):.1f}"
            cells.append((f"**{cell}**" if (share, steps, dense) in _TAKEN else cell) + f", work {mean(work):.2f}")
        lines.append([str(share), *cells])
    return markdown_table(headings, lines)


# --- all files ------------------------------------------------------------------------------------------------------


def _fidelity(name: str, labels: Sequence[str]) -> str:
    return "; ".join(f"`{label}` {with_interval(of(name, label, 'psnr_db'))} dB" for label in labels)


def _work(name: str) -> str:
    labels = ("adaspa 0.8", "adaspa 0.8 +tail", "random 0.8")
    return "; ".join(f"`{label}` {mean(of(name, label, 'work')):.2f}" for label in labels)


def _stack(name: str) -> str:
    each = stack.margins(stack.points(stack.read(RESULTS / name)), stack.measured)[0]
    return f"at {each.speedup:.1f}x: cache alone {each.cache_db:.1f} dB, both {each.stack_db:.1f} dB"


def fifth(name: str, backend: str, kind: str) -> list[Row]:
    """Rows of a kernel over a fifth of the blocks."""
    own = (row for row in rows(name) if (row["backend"], row["kind"]) == (backend, kind))
    return [row for row in own if 0.15 < row["density"] < 0.25]


def _bench(name: str, backend: str) -> str:
    """Speed-up of sparse products over a fifth of the blocks, the least and the most."""
    found = [float(row["speedup"]) for row in fifth(name, backend, "sparse")]
    return f"`{backend}`, a fifth of the blocks: {min(found):.1f}x to {max(found):.1f}x of torch's dense attention"


def _account(name: str) -> str:
    found = gpu.read()[name.removeprefix("gpu/").removesuffix(".jsonl")]
    best = gpu.fastest(found, "wan 14b 720p")
    assert best is not None
    return f"attention of Wan 14B at 720p, a fifth of the blocks: {best['speedup']:.2f}x ({best['kernel']})"


class File(NamedTuple):
    """A committed file.

    holds: what it holds.
    says: what it says above all, by its name.
    command: where rows don't tell it.
    left_out: strategies whose rows no command of today would write.
    """

    holds: str
    says: Callable[[str], str]
    command: str = ""
    left_out: tuple[str, ...] = ()


def _labels(*labels: str) -> Callable[[str], str]:
    return partial(_fidelity, labels=labels)


_EIGHT = "taylor-seer:interval=2:warm_up=4"
_FEW = "{} steps of the embedded model, {} dense at the start, four sparsities"
_BENCH = "diffsparse bench {}--tokens 4096 --rounds 21 --out eval/results/{}"
_ONE, _TWO = "OMP_NUM_THREADS=1", "OMP_WAIT_POLICY=active"
_FLEX = "--backend cpu,flex --sparsity 0.8 "
_GPU = "make gpu    # then copy out/gpu/rows.jsonl"
FILES: dict[str, File] = {
    "demo.json": File(
        "README's picture: two prompts in 10 steps, on one core",
        _labels("taylor-seer:interval=2/dense", "digest 0.8", "taylor-seer:interval=2/digest 0.8"),
        "make demo\npython -m diffsparse_eval.pictures out/demo docs/figures/demo.png  # and copy results.json",
    ),
    "tiny.csv": File(
        "the embedded model at four sparsities: all strategies but `Tangent`, and an earlier `Digest`",
        _labels("paro 0.8 +means", "adaspa 0.8", "random 0.8"),
        left_out=("digest",),
    ),
    "tiny-tangent.json": File("`Digest` and `Tangent` on the same prompts", _labels("digest 0.8", "tangent 0.8")),
    "tiny-tangent-1-dense.json": File("with one dense step in place of three", _labels("digest 0.8", "tangent 0.8")),
    "tiny-tangent-0-dense.json": File("without a dense step", _labels("tangent 0.8")),
    "tiny-tangent-8-steps.json": File("8 steps, none dense", _labels("tangent 0.7")),
    "tiny-tangent-4-steps.json": File("4 steps, none dense", _labels("tangent 0.6")),
    "tiny-digest-guidance-5.json": File("guidance scale 5", _labels("digest 0.8")),
    "tiny-work.json": File("all attention that is computed, in dense runs: one prompt", _work),
    "tiny-rivals.json": File(
        "peers rebuilt from their papers", _labels("svg-ear 0.8", "sol 0.8", "dit-fast 0.8", "pisa 0.8")
    ),
    "tiny-sparse-vdit.json": File(
        "`SparseVDiT` by its knob epsilon, sparse from the first step",
        _labels("sparse-vdit 0.8 epsilon=0.05", "sparse-vdit 0.8"),
    ),
    "tiny-eight-bits.json": File("eight bits and none", _labels("digest 0.8", "digest 0.8 +int8")),
    "twin-eight-bits.json": File("the same on the twin", _labels("digest 0.8", "digest 0.8 +int8", "digest 0.8 +fp8")),
    "twin-digest-30-steps.json": File("long runs of the twin", _labels("digest 0.8 block=16", "digest 0.72 block=16")),
    "twin-digest-50-steps.json": File("longer ones", _labels("digest 0.8 block=16", "digest 0.72 block=16")),
    **{
        f"few-{steps}-steps-{dense}-dense.json": File(_FEW.format(steps, dense), _labels("digest 0.6", "digest 0.8"))
        for steps, dense in FEW
    },
    "stack-guidance-1.json": File("step caches, sparse attention, both", _stack, "make stack"),
    "stack-guidance-5.json": File("the same at guidance scale 5", _stack, "make stack"),
    "cache-8-steps.json": File(
        "8 steps: a step cache that leaves out every second of the last four, `Tangent`, both",
        _labels(*(f"{_EIGHT}/{name}" for name in ("dense", "tangent 0.8")), "tangent 0.8"),
        f"diffsparse evaluate --strategy {_EIGHT}/dense,{_EIGHT}/tangent,tangent --sparsity 0.8 --steps 8 --prompts 12 "
        "--out out/cache-8-steps",
    ),
    **{
        name: File(holds, partial(_bench, backend=backend), f"{threads} {_BENCH.format(options, name)}")
        for name, holds, backend, threads, options in (
            ("bench-cpu-one-thread.csv", "kernels on one CPU core", "cpu", _ONE, ""),
            ("bench-cpu.csv", "kernels on two cores", "cpu", _TWO, ""),
            ("bench-cpu-flex-one-thread.csv", "the same beside FlexAttention, compiled", "flex", _ONE, _FLEX),
            ("bench-cpu-flex.csv", "on two cores", "flex", _TWO, _FLEX),
        )
    },
    **{
        f"gpu/{path.name}": File("an account of a GPU", _account, _GPU)
        for path in sorted((RESULTS / "gpu").glob("*.jsonl"))
    },
}


TINY = RESULTS / "tiny.md"


def tiny() -> str:
    """The summary of `tiny.csv`, without rows of an earlier release, and what its columns mean."""
    kept: list[Any] = [row for row in rows("tiny.csv") if row["strategy"] not in FILES["tiny.csv"].left_out]
    return f"{report.markdown(kept)}\n\n{report.caption(kept)}\n\n## Columns\n{report.columns(kept)}"


def files() -> str:
    """Every committed file, what it holds, and what it says above all."""
    lines = [[f"[{name}](../eval/results/{name})", each.holds, each.says(name)] for name, each in FILES.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in [["file", "holds", "says"], ["---"] * 3, *lines])


# --- commands -------------------------------------------------------------------------------------------------------


def commands() -> str:
    """The commands by file, in the words of a shell."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, each in FILES.items():
        lines.setdefault((each.command,) if each.command else tuple(_evaluations(name)), []).append(name)
    blocks = ("\n".join([f"# {', '.join(names)}", *commands]) for commands, names in lines.items())
    return "```sh\n" + "\n".join(blocks) + "\n```"


def _evaluations(name: str) -> list[str]:
    """Of rows of `evaluate`: a command for those that have the same knobs, sparsities and number of prompts."""
    sparse = [row for row in rows(name) if row["strategy"] not in ("dense", *FILES[name].left_out)]
    prompts: dict[str, set[str]] = {}  # by label
    for row in sparse:
        prompts.setdefault(row["label"], set()).add(row["prompt"])
    asked: dict[tuple[str, str, int], set[float]] = {}  # by strategy, knobs and number of prompts
    for row in sparse:
        asked.setdefault((_strategy(row), _knobs(row), len(prompts[row["label"]])), set()).add(row["sparsity"])
    together: dict[tuple[str, str, int], list[str]] = {}  # by knobs, sparsities and number of prompts
    for (strategy, knobs, number), shares in asked.items():
        listed = ",".join(f"{share:g}" for share in sorted(shares))
        together.setdefault((knobs, listed, number), []).append(strategy)
    common, out = _run(name), f"out/{Path(name).stem}"
    return [
        f"diffsparse evaluate --strategy {','.join(names)} {_sparsity(names, shares)}{knobs}{common}"
        f"--prompts {number} --out {out}"
        for (knobs, shares, number), names in together.items()
    ]


def _strategy(row: Row) -> str:
    """As the command line has it; what runs on a plan names a file for it."""
    name = str(row["strategy"]).partition("+")[0]
    if name not in _PLANNED:
        return str(row["strategy"])
    return f"{row['strategy']}:{_plan(name, row)}"


def _plan(name: str, row: Row) -> str:
    """A name for a plan, of what its search was given."""
    knobs = dict(each.split("=") for each in row["label"].split() if "=" in each)
    modes = "" if "modes" not in knobs else "sparse-modes" if "+" in knobs["modes"] else knobs["modes"]
    searched = modes or knobs.get("epsilon") or knobs.get("orders", "")
    return "-".join(filter(None, (name, searched, f"{row['sparsity']:g}"))) + ".safetensors"


def _sparsity(names: list[str], shares: str) -> str:
    return "" if all(":" in name for name in names) else f"--sparsity {shares} "


def _knobs(row: Row) -> str:
    """Those of the label that are options."""
    pairs = (each.partition("=") for each in row["label"].split() if "=" in each)
    options = {"block": "--block", "order": "--order"}
    return "".join(f"{options[knob]} {value} " for knob, _, value in pairs if knob in options)


def _run(name: str) -> str:
    """Model, length, guidance and dense steps, where they are not the default."""
    row = rows(name)[-1]
    settings = load(RESULTS / name)["settings"]["arguments"] if name.endswith(".json") else {}
    first = str(row["schedule"]).partition("dense_first=")[2].partition(",")[0]
    parts = {
        "--model": ("" if row["model"] == "tiny" else row["model"]),
        "--steps": settings.get("num_inference_steps", 15) if settings.get("num_inference_steps", 15) != 15 else "",
        "--dense-first": "" if first == "0.2" else first,
        "--guidance-scale": "" if settings.get("guidance_scale", 1.0) == 1.0 else f"{settings['guidance_scale']:g}",
    }
    return "".join(f"{option} {value} " for option, value in parts.items() if value != "")


# --- the pages ------------------------------------------------------------------------------------------------------


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: made by python -m support.results -->", f"<!-- /{name} -->"


PARTS: dict[Path, dict[str, Callable[[], str]]] = {
    PAGE: {"methods": methods, "files": files, "commands": commands},
    EVALUATE: {
        "measures": lambda: meanings(DEFINITIONS),
        "without-weights": lambda: meanings(SPEED_DEFINITIONS),
    },
    FEW_STEPS: {"few": few},
    TINY: {"rows": tiny},
}


def pages() -> Iterable[tuple[Path, str]]:
    """The pages as they should be."""
    for page, parts in PARTS.items():
        text = page.read_text()
        for name, made in parts.items():
            begin, end = _marks(name)
            text = spliced(text, begin, made(), end)
        yield page, text


if __name__ == "__main__":
    for page, text in pages():
        page.write_text(text)
        print(page.name)

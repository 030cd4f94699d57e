"""Results of `evaluate` as tables and files."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from pathlib import Path

from diffsparse.files import write_csv, write_text
from diffsparse_eval.rows import DEFINITIONS, ResultRow, flat, number
from diffsparse_pipelines.tables import FEWEST, markdown_table, spread

# column -> (heading, digits)
_COLUMNS = {
    "density": ("density", 2),
    "sparse_density": ("of sparse calls", 2),
    "work": ("work", 2),
    "recall": ("recall", 3),
    "psnr_db": ("PSNR dB", 2),
    "psnr_db_min": ("worst frame", 2),
    "ssim": ("SSIM", 4),
    "latent_cosine": ("latent cosine", 4),
    "seconds": ("seconds", 1),
    "speedup": ("speed-up", 2),
    "attention_speedup": ("attention speed-up", 2),
}
# in a terminal: column -> (heading, digits)
_SHOWN = {
    "density": ("density", 2),
    "work": ("work", 2),
    "psnr_db": ("PSNR dB", 1),
    "ssim": ("SSIM", 3),
    "seconds": ("seconds", 1),
    "speedup": ("speed-up", 2),
    "attention_speedup": ("attention speed-up", 2),
}
_STEADY = 1.3  # of the time of a run that is repeated
STACKED = "CACHE/dense is a step cache alone, CACHE/STRATEGY both."
SPARE = ("density", "attention speed-up", "SSIM")  # headings that go first where the terminal is narrow


def groups(rows: list[ResultRow]) -> dict[str, list[ResultRow]]:
    """Rows by the label of their strategy, in order of appearance; dense first."""
    found: dict[str, list[ResultRow]] = {}
    for row in sorted(rows, key=lambda row: row["strategy"] != "dense"):
        found.setdefault(row["label"], []).append(row)
    return found


def summary(rows: list[ResultRow]) -> list[dict[str, str]]:
    """One record of texts for each strategy: `spread` over prompts and seeds, without columns that no row has."""
    told = _told(rows)
    return [
        {"label": label, "runs": str(len(group)), **{column: _cell(column, told[column][1], group) for column in told}}
        for label, group in groups(rows).items()
    ]


def _told(rows: list[ResultRow]) -> dict[str, tuple[str, int]]:
    """Those of `_COLUMNS` that a row has a value of."""
    return {column: (name, digits) for column, (name, digits) in _COLUMNS.items() if _cell(column, digits, rows) != "-"}


def _cell(column: str, digits: int, group: list[ResultRow]) -> str:
    values = [value for row in group if (value := number(row, column)) is not None]
    if not values:
        return "identical" if column.startswith("psnr") else "-"
    return spread(values, f".{digits}f")


def table(rows: list[ResultRow]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the summary for a terminal, with a range below its median."""
    lines = [
        [label, *(_cell(column, digits, group).replace(" (", "\n(") for column, (_, digits) in _SHOWN.items())]
        for label, group in groups(rows).items()
    ]
    return ["strategy", *(heading for heading, _ in _SHOWN.values())], lines


def caption(rows: list[ResultRow]) -> str:
    """What the numbers of the summary are."""
    found = groups(rows)
    runs = max(map(len, found.values()))
    numbers = (
        f"Median over prompts and seeds, {runs} in all; in brackets the lowest and the highest."
        if runs < FEWEST
        else "Mean ± half-width of the 95 % confidence interval over prompts and seeds."
    )
    return f"{numbers} {STACKED}" if any("/" in label for label in found) else numbers


def doubts(rows: list[ResultRow]) -> str:
    """A line if dense took another time when it ran again: then speed-ups tell more of the machine than of methods."""
    again = next((row["speedup"] for row in rows if row["strategy"] == "dense"), 1.0)
    if 1 / _STEADY <= again <= _STEADY:
        return ""
    return f"\nDense ran again at {again:.2f}x its own speed: the machine is busy, and its speed-ups say little."


def markdown(rows: list[ResultRow]) -> str:
    """The summary as a Markdown table."""
    return markdown_table(list(_headings(rows).values()), [list(record.values()) for record in summary(rows)])


def _headings(rows: list[ResultRow]) -> dict[str, str]:
    """The headings of the summary, by column."""
    return {"label": "strategy", "runs": "runs", **{column: heading for column, (heading, _) in _told(rows).items()}}


def columns(rows: list[ResultRow]) -> str:
    """What the columns of the summary mean, in their order, as a Markdown list."""
    headings = _headings(rows)
    told = {"runs": "runs: prompts and seeds that a line is over"}
    told |= {name: f"{headings[name]} (`{name}`): {DEFINITIONS[name]}" for name in headings if name in DEFINITIONS}
    return "\n".join(f"- {told[name]}" for name in headings)


def facts(rows: list[ResultRow]) -> str:
    """One line on where and how the rows were measured."""
    row, dense = rows[0], next((r for r in rows if r["strategy"] == "dense"), None)
    parts = [row["model"], row["size"], f"{row['steps']} steps, of which {_dense_steps(rows)} dense", row["dtype"]]
    parts += [f"dense backend {row['dense_backend']}", row["device"]]
    if dense:
        floor = "identical" if dense["psnr_db"] is None else f"{dense['psnr_db']:.1f} dB"
        parts += [f"attention {dense['attention_share']:.0%} of a dense call", f"noise floor (dense again) {floor}"]
    versions, commits = row["versions"], " and ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    parts += [f"torch {versions['torch']}", f"Diffusers {versions['diffusers']}", f"commit {commits}"]
    return "; ".join(parts)


def _dense_steps(rows: list[ResultRow]) -> str:
    counts = sorted({row["dense_steps"] for row in rows if not row["strategy"].startswith("dense")})
    return " or ".join(map(str, counts)) or "all"


def write(rows: list[ResultRow], out: Path) -> None:
    """Write `results.csv` and `report.md` into `out`."""
    write_csv(flat(rows), out / "results.csv")
    shown = _headings(rows)
    rest = {name: meaning for name, meaning in DEFINITIONS.items() if name not in shown}
    heads = "".join(_heads(label, group[0]) for label, group in groups(rows).items() if group[0].get("heads"))
    write_text(
        f"# {rows[0]['model']}: sparse beside dense\n\n{facts(rows)}\n\n{markdown(rows)}\n\n"
        f"{caption(rows)}\n{heads}\n"
        f"## Columns of the table\n{columns(rows)}\n\n"
        f"## Other columns of results.csv and results.json\n{meanings(rest)}\n",
        out / "report.md",
    )


def _heads(label: str, row: ResultRow) -> str:
    """Section on a strategy that chooses modes by head: the modes' shares, and those of each head, by steps."""
    shares = ", ".join(f"{mode} {share:.1%}" for mode, share in row["modes"].items())
    lines = ["| layer | head | modes, with their steps counted from 1 |", "| --- | ---: | --- |"]
    for layer, steps in row["heads"].items():
        numbers = [int(step) + 1 for step in steps]
        by_head = zip(*(modes.split() for modes in steps.values()), strict=True)
        lines += [f"| {layer} | {head} | {_spans(numbers, modes)} |" for head, modes in enumerate(by_head)]
    return "\n".join(["", f"## Modes of {label}, by head", shares, "", *lines, ""])


def _spans(steps: list[int], modes: tuple[str, ...]) -> str:
    """Spans of equal modes: `full 1-3, diagonal 4-15`."""
    spans = []
    for mode, run in groupby(zip(modes, steps, strict=True), key=itemgetter(0)):
        first, *rest = (step for _, step in run)
        spans.append(f"{mode} {first}-{rest[-1]}" if rest else f"{mode} {first}")
    return ", ".join(spans)


def meanings(definitions: dict[str, str]) -> str:
    """What columns mean, as a Markdown list."""
    return "\n".join(f"- `{name}`: {meaning}" for name, meaning in definitions.items())

"""A summary of the rows in under a hundred lines; `python -m diffsparse_eval.gpu.table` makes the tables of the docs.

Rows of a device are committed as `eval/results/gpu/<device>-<date>.jsonl`. `docs/gpu.md` has their
summaries, README.md a line for each card.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from diffsparse.seam.accelerate import SPEEDS
from diffsparse_eval.rows import AccountFacts, AccountRow
from diffsparse_pipelines.tables import markdown_table, spliced

_LONGEST = 95
_ROOT = Path(__file__).parents[3]
RESULTS = _ROOT / "eval/results/gpu"
_BEGIN, _END = "<!-- gpu: made by make gpu-tables -->", "<!-- /gpu -->"
_CARDS = "<!-- cards: made by make gpu-tables -->", "<!-- /cards -->"
_ACCOUNTS = "<!-- accounts: made by make gpu-tables -->", "<!-- /accounts -->"
SHAPES = ("wan 1.3b 480p", "wan 14b 720p", "hunyuan-video 720p", "flux 1024 px")
_RUN = "wan2.1-1.3b"  # the model whose runs under `accelerate` README.md names
_WHOLE = "hunyuan-video"  # the model whose whole run the overview names
_COLUMNS = ("card", "cases right", *SHAPES, f"whole run of {_WHOLE}")


def summary(rows: list[AccountRow], facts: AccountFacts, longest: int | None = _LONGEST) -> str:
    """One verdict a kernel, then times; at most `longest` lines."""
    known = {**{name: value for name, value in facts.items() if name != "versions"}, **facts.get("versions", {})}
    lines = [", ".join(f"{name} {value}" for name, value in known.items() if value), ""]
    parts = (_ceilings, _verdicts, _speed, _steps, _whole, _left_out)
    for part in parts:
        found = part(rows)
        lines += [*found, ""] if found else []
    if longest is not None and len(lines) > longest:
        lines = [*lines[:longest], "... the rest is in the rows"]
    return "\n".join(lines).rstrip() + "\n"


def verdicts(rows: list[AccountRow]) -> dict[str, tuple[int, int, str]]:
    """Of each kernel that was compared with float64: cases that are right, all cases, and the first that is wrong."""
    found: dict[str, tuple[int, int, str]] = {}
    for row in rows:
        if row["stage"] != "numerics" or row["verdict"] == "no time":
            continue
        right, all_, why = found.get(str(row["kernel"]), (0, 0, ""))
        good = row["verdict"] == "right"
        problem = f"{row['verdict']}: {row['shape']}" + (f" ({row['why']})" if row.get("why") else "")
        found[str(row["kernel"])] = right + good, all_ + 1, why or ("" if good else problem)
    return found


def _verdicts(rows: list[AccountRow]) -> list[str]:
    found = verdicts(rows)
    if not found:
        return []
    width = max(map(len, found))
    lines = ["kernels against float64, cases that are right"]
    for name, (right, all_, why) in found.items():
        lines.append(f"  {name:<{width}}  {right}/{all_}  {why}"[:150].rstrip())
    return lines


def _ceilings(rows: list[AccountRow]) -> list[str]:
    lines = []
    for row in rows:
        if row["stage"] == "facts" and row["ms"]:
            rate = f"{row['tflops']:.0f} TFLOP/s" if row["tflops"] else f"{row['gb_per_s']:.0f} GB/s"
            lines.append(f"{row['kernel']}, {row['shape']}: {rate}")
    return lines


def _speed(rows: list[AccountRow]) -> list[str]:
    """The fastest dense kernels of each shape, and ours beside them."""
    shown = _shown(rows)
    timed = [row for row in _timed(rows) if str(row["kernel"]).startswith("sdpa") or row["kernel"] in shown]
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in timed):
        mine = [row for row in timed if row["shape"] == shape]
        lines.append(f"{shape}, {mine[0]['tokens']} tokens, {mine[0]['heads']} heads")
        lines += [f"  {_speed_line(row)}" for row in mine]
    title = "speed: ms, TFLOP/s, speed-up over the fastest dense kernel, share of its speed for each operation"
    return [title, *lines] if lines else []


def _timed(rows: list[AccountRow]) -> list[AccountRow]:
    """Times at full size, without those of kernels that are wrong there."""
    speed = [row for row in rows if row["stage"] == "speed"]
    wrong = {(row["kernel"], row["shape"]) for row in speed if row["verdict"] == "wrong"}
    return [row for row in speed if row["verdict"] == "timed" and (row["kernel"], row["shape"]) not in wrong]


def _shown(rows: list[AccountRow]) -> set[str]:
    """Kernels that the summary shows: of the kinds of the Triton kernel only the first that ran."""
    here = {row["kernel"] for row in _timed(rows)}
    kinds = [name for name in ("triton-specialised", "triton-tma", "triton") if name in here]
    return {"gluon", "cpu", "torch", *kinds[:1]}


def _speed_line(row: AccountRow) -> str:
    rate = "" if not row["tflops"] else f"{row['tflops']:7.1f} TFLOP/s"
    share = "" if row["share"] is None else f"{row['share']:6.2f}"
    speedup = f"{row['speedup']:7.2f}x" if row.get("speedup") and row["tflops"] else ""
    return (
        f"{row['kernel']:<19}{row['kind']:<36}{row['density']:5.2f}{row['ms']:10.3f} ms {rate:>16}{speedup:>9}{share}"
    )


def _steps(rows: list[AccountRow]) -> list[str]:
    lines = []
    for row in rows:
        if row["stage"] == "step" and row["ms"]:
            peak = f", {row['peak_gib']:.1f} GiB" if row.get("peak_gib") else ""
            counts = f"host {row['host_ms']:.2f} ms, {_launches(rows, row)} launches{peak}"
            lines.append(f"  {row['shape']:<20}{row['kernel']:<18}{row['ms']:10.2f} ms, {counts}, {row['backend']}")
    return ["a layer of a strategy, all heads", *lines] if lines else []


def _launches(rows: list[AccountRow], timed: AccountRow) -> int | str:
    """Launches of a call, as its profile counted them."""
    wanted = timed["shape"], f"{timed['kernel']}, profile"
    found = (row.get("launches") for row in rows if (row["shape"], row["kernel"]) == wanted)
    return next((count for count in found if count is not None), "?")


def _whole(rows: list[AccountRow]) -> list[str]:
    lines = []
    for row in rows:
        if row["stage"] == "end to end" and row["verdict"] == "timed":
            gain = f"{row['speedup']:6.2f}x, attention {row['attention_speedup']:.2f}x"
            lines.append(f"  {row['shape']:<16}{row['kind']:<18}{row['seconds']:9.1f} s {gain}")
        if row["stage"] == "accelerate" and row["verdict"] == "timed":
            what = f" of {row['executed']:.2f} of the steps, density {row['density']:.2f}" if "executed" in row else ""
            name = f"accelerate, {row['kernel']}" if what else str(row["kernel"])
            lines.append(f"  {row['shape']:<16}{name:<34}{row['seconds']:7.1f} s {row['speedup']:6.2f}x{what}")
        if row["stage"] == "sanity" and row.get("psnr_db") is not None:
            where = f"at density {row['density']:.2f}, {', '.join(row['backends'])}"
            lines.append(f"  {row['shape']:<16}{row['kernel']:<18}{row['psnr_db']:9.2f} dB {where}")
    return ["whole models", *lines] if lines else []


def _left_out(rows: list[AccountRow]) -> list[str]:
    """Failures outside of the numerics: the first of each kernel and stage, and how many more."""
    bad = ("left out", "no time", "raised", "hang", "crash", "wrong")
    found: dict[tuple[str, str, str], list[AccountRow]] = {}
    for row in rows:
        if row["verdict"] in bad and row["stage"] != "numerics":
            kernel = str(row["kernel"] or "all").split(",")[0]
            found.setdefault((row["stage"], kernel, row["verdict"]), []).append(row)
    lines = []
    for (stage, kernel, verdict), similar in found.items():
        more = f", and {len(similar) - 1} more" if len(similar) > 1 else ""
        first = similar[0]
        lines.append(f"  {stage}: {kernel} {verdict}: {first['shape'] or ''} {first.get('why') or ''}"[:130] + more)
    return ["failed or left out", *lines[:20]] if lines else []


# --- committed rows -----------------------------------------------------------------------------------------------


def read(folder: Path = RESULTS) -> dict[str, list[AccountRow]]:
    """The rows of each committed file, by its name."""
    files = sorted(folder.glob("*.jsonl"))
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def overview(results: dict[str, list[AccountRow]]) -> str:
    """Each account's speed-up at 80 % sparsity, and in brackets the share of the dense kernel's speed."""
    lines = []
    for name, rows in results.items():
        found = verdicts(rows).values()
        cases = f"{sum(right for right, _, _ in found)} of {sum(all_ for _, all_, _ in found)}"
        lines.append([name, cases, *(_cell(rows, shape) for shape in SHAPES), _whole_cell(rows)])
    if not results:
        lines.append(["any", *["not measured"] * (len(_COLUMNS) - 1)])
    return markdown_table(_COLUMNS, lines)


def headline(results: dict[str, list[AccountRow]]) -> str:
    """The table of README.md, of the last account of each card: attention alone, and whole runs."""
    last = {name.partition("-")[0]: rows for name, rows in results.items()}
    kept = [shape for shape in SHAPES if all(fastest(rows, shape) for rows in last.values())]
    lines = []
    for card, rows in last.items():
        alone = [f"{best['speedup']:.2f}x" for shape in kept if (best := fastest(rows, shape))]
        lines.append([card.upper(), *alone, _accelerated(rows)])
    if not lines:
        return "Not measured yet: `make gpu` does it."
    return markdown_table(["card", *(f"attention, {shape}" for shape in kept), f"whole run, {_RUN}"], lines)


def _accelerated(rows: list[AccountRow]) -> str:
    """Speed-ups of whole runs under `accelerate`, the slowest first."""
    timed = [row for row in rows if row["stage"] == "accelerate" and row["verdict"] == "timed" and row["shape"] == _RUN]
    found = [row for row in timed if row["kernel"] in SPEEDS]
    return ", ".join(f"{row['speedup']:.2f}x" for row in sorted(found, key=lambda row: row["speedup"])) or "-"


def fastest(rows: list[AccountRow], shape: str) -> AccountRow | None:
    """Of our kernels over lists like those of a video, with a fifth of the blocks; None if it was not measured."""
    timed = [
        row
        for row in _timed(rows)
        if row["shape"] == shape
        and row["kind"].startswith("ragged lists")
        and "with" not in row["kind"]  # summaries of the other blocks
        and 0.19 < row["density"] < 0.25
    ]
    return min(timed, key=lambda row: row["ms"] or 0.0, default=None)


def _cell(rows: list[AccountRow], shape: str) -> str:
    best = fastest(rows, shape)
    return "not measured" if best is None else f"{best['speedup']:.2f}x ({best['share']:.2f}, {best['kernel']})"


def _whole_cell(rows: list[AccountRow]) -> str:
    """The fastest run of all steps, dense ones and searches included."""
    ours = [
        row for row in rows if row["stage"] == "end to end" and row["verdict"] == "timed" and row["kernel"] != "dense"
    ]
    best = max((row for row in ours if row["shape"] == _WHOLE), key=lambda row: row["speedup"], default=None)
    return "not measured" if best is None else f"{best['speedup']:.2f}x ({best['kind']})"


def pages(results: dict[str, list[AccountRow]]) -> dict[Path, str]:
    """The text that README.md and docs/gpu.md should have."""
    readme, page = _ROOT / "README.md", _ROOT / "docs/gpu.md"
    accounts = (f"## {name}\n```text\n{summary(rows, _facts(rows), None)}```\n" for name, rows in results.items())
    text = page.read_text()
    for (begin, end), made in ((_CARDS, overview(results)), (_ACCOUNTS, "\n" + "\n".join(accounts))):
        text = spliced(text, begin, made, end)
    return {readme: spliced(readme.read_text(), _BEGIN, headline(results), _END), page: text}


def _facts(rows: list[AccountRow]) -> AccountFacts:
    """Of an account, as its last row has them."""
    last = rows[-1]
    return {
        "device": last["device"],
        "driver": last["driver"],
        "date": last["date"],
        "commit": last["commit"],
        "versions": last["versions"],
    }


def main() -> None:
    """Write the tables."""
    if not (_ROOT / "README.md").is_file():
        print("error: the tables are made in a checkout of the project; this is an installed package", file=sys.stderr)
        sys.exit(2)
    for path, text in pages(read()).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(path.relative_to(_ROOT))


if __name__ == "__main__":
    main()

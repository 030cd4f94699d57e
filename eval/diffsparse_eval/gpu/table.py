"""What the rows say, in less than a hundred lines; and the tables of committed rows in README and docs."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
_LONGEST = 95


def summary(rows: list[Row], facts: Row) -> str:
    """One verdict a kernel, then times."""
    known = {**{name: value for name, value in facts.items() if name != "versions"}, **facts.get("versions", {})}
    lines = [", ".join(f"{name} {value}" for name, value in known.items() if value), ""]
    parts = (_ceilings, _verdicts, _speed, _steps, _whole, _left_out)
    for part in parts:
        found = part(rows)
        lines += [*found, ""] if found else []
    if len(lines) > _LONGEST:
        lines = [*lines[:_LONGEST], "... the rest is in the rows"]
    return "\n".join(lines).rstrip() + "\n"


def verdicts(rows: list[Row]) -> dict[str, tuple[int, int, str]]:
    """Of each kernel that was compared with float64: cases that are right, all cases, and what is wrong first."""
    found: dict[str, tuple[int, int, str]] = {}
    for row in rows:
        if row["stage"] != "numerics" or row["verdict"] == "no time":
            continue
        right, all_, why = found.get(str(row["kernel"]), (0, 0, ""))
        good = row["verdict"] == "right"
        told = f"{row['verdict']}: {row['shape']}" + (f" ({row['why']})" if row.get("why") else "")
        found[str(row["kernel"])] = right + good, all_ + 1, why or ("" if good else told)
    return found


def _verdicts(rows: list[Row]) -> list[str]:
    found = verdicts(rows)
    if not found:
        return []
    width = max(map(len, found))
    lines = ["kernels against float64, cases that are right"]
    for name, (right, all_, why) in found.items():
        lines.append(f"  {name:<{width}}  {right}/{all_}  {why}"[:150].rstrip())
    return lines


def _ceilings(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["stage"] == "facts" and row["ms"]:
            rate = f"{row['tflops']:.0f} TFLOP/s" if row["tflops"] else f"{row['gb_per_s']:.0f} GB/s"
            lines.append(f"{row['kernel']}, {row['shape']}: {rate}")
    return lines


def _speed(rows: list[Row]) -> list[str]:
    """The fastest dense kernels of each shape, and ours beside them."""
    timed = [row for row in rows if row["stage"] == "speed" and row["verdict"] == "timed" and _shown(row["kernel"])]
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in timed):
        mine = [row for row in timed if row["shape"] == shape]
        lines.append(f"{shape}, {mine[0]['tokens']} tokens, {mine[0]['heads']} heads")
        lines += [f"  {_speed_line(row)}" for row in mine]
    title = "speed: ms, TFLOP/s, speed-up over the fastest dense kernel, share of its speed for each operation"
    return [title, *lines] if lines else []


def _shown(kernel: str) -> bool:
    return kernel.startswith("sdpa") or kernel in ("gluon", "triton-specialised", "cpu", "torch")


def _speed_line(row: Row) -> str:
    rate = "" if not row["tflops"] else f"{row['tflops']:7.1f} TFLOP/s"
    share = "" if row["share"] is None else f"{row['share']:6.2f}"
    speedup = f"{row['speedup']:7.2f}x" if row.get("speedup") and row["tflops"] else ""
    return (
        f"{row['kernel']:<19}{row['kind']:<36}{row['density']:5.2f}{row['ms']:10.3f} ms {rate:>16}{speedup:>9}{share}"
    )


def _steps(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["stage"] == "step" and row["ms"]:
            peak = f", {row['peak_gib']:.1f} GiB" if row.get("peak_gib") else ""
            counts = f"host {row['host_ms']:.2f} ms, {row['launches']} launches{peak}"
            lines.append(f"  {row['shape']:<20}{row['kernel']:<18}{row['ms']:10.2f} ms, {counts}, {row['backend']}")
    return ["a layer of a strategy, all heads", *lines] if lines else []


def _whole(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["stage"] == "end to end" and row["verdict"] == "timed":
            gain = f"{row['speedup']:6.2f}x, attention {row['attention_speedup']:.2f}x"
            lines.append(f"  {row['shape']:<16}{row['kind']:<18}{row['seconds']:9.1f} s {gain}")
        if row["stage"] == "sanity" and row.get("psnr_db") is not None:
            where = f"at density {row['density']:.2f}, {', '.join(row['backends'])}"
            lines.append(f"  {row['shape']:<16}{row['kernel']:<18}{row['psnr_db']:9.2f} dB {where}")
    return ["whole models", *lines] if lines else []


def _left_out(rows: list[Row]) -> list[str]:
    bad = ("left out", "no time", "raised", "hang", "crash", "wrong")
    found = [row for row in rows if row["verdict"] in bad and row["stage"] != "numerics"]
    lines = [
        f"  {row['stage']}: {row['kernel'] or 'all'}, {row['shape'] or ''}: {row['verdict']} {row.get('why') or ''}"[
            :150
        ]
        for row in found
    ]
    return ["failed or left out", *lines[:20]] if lines else []

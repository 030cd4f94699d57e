"""The side-by-side sheet: dense and each strategy, one row each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffsparse_eval.report import groups
from diffsparse_pipelines import media


def write_sheet(rows: list[dict[str, Any]], prompt: str, seed: int, out: Path) -> None:
    """Write `sheet.png` into `out` from the files of one prompt and seed, the first of an experiment."""
    strips: dict[str, np.ndarray] = {}
    for label, group in groups(rows).items():
        row = next((r for r in group if (r["prompt"], r["seed"]) == (prompt, seed)), None)
        if row is None:
            continue
        figures = "" if row["psnr_db"] is None else f", {row['psnr_db']:.1f} dB, {row['speedup']:.2f}x"
        strips[f"{label}{figures}"] = media.read(out / row["file"])
    media.sheet(strips, out / "sheet.png")

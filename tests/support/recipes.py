"""The tables of docs/recipes: which script and which settings serve each known model, and what attention is there.

`python -m support.recipes` writes them into the pages, and what `diffsparse simulate` prints after its commands;
`tests/pipelines/test_recipes.py` holds that no known model and no script is left out, and that the pages are current.
"""

from __future__ import annotations

import io
import math
import os
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from diffsparse import Schedule
from diffsparse.cli import main as command
from diffsparse.insight.device import H100
from diffsparse.seam.caching import BLOCKS
from diffsparse_pipelines.architectures import ARCHITECTURES
from diffsparse_pipelines.commands.forecasts import Row, foretell, on_device
from diffsparse_pipelines.families import FAMILIES, Call, few_steps, grid
from diffsparse_pipelines.preflight import FEW_TOKENS
from diffsparse_pipelines.tables import significant, spliced
from support import walk

FOLDER = Path(__file__).parents[2] / "docs" / "recipes"
BEGIN, END = "<!-- models: made by python -m support.recipes -->", "<!-- /models -->"


class Page(NamedTuple):
    """A page of recipes: its title, and the known models by the script that shows them."""

    title: str
    scripts: dict[str, tuple[str, ...]]


PAGES = {
    "wan": Page(
        "Wan",
        {
            "wan": ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b", "wan2.2-5b"),
            "wan_lightning": ("wan2.2-lightning",),
            "fastwan": ("fastwan2.2-5b",),
            "wan_animate2": ("wan-animate-2",),
        },
    ),
    "hunyuan": Page(
        "HunyuanVideo",
        {
            "hunyuan_video": ("hunyuan-video", "hunyuan-video-1.5"),
            "framepack": ("framepack",),
            "hunyuan_image": ("hunyuan-image", "hunyuan-image-distilled"),
        },
    ),
    "minimax-h3": Page("MiniMax-H3", {"minimax_h3": ("minimax-h3", "minimax-h3-turbo")}),
    "ltx": Page(
        "LTX",
        {
            "ltx": ("ltx-video",),
            "ltx_condition": ("ltx-condition",),
            "ltx_distilled": ("ltx-distilled",),
            "ltx2_condition": ("ltx2", "ltx2-distilled", "ltx2.5"),
        },
    ),
    "video": Page(
        "Other video models",
        {
            "cogvideox": ("cogvideox1.5-5b",),
            "mochi": ("mochi",),
            "cosmos": ("cosmos1-7b",),
            "cosmos2": ("cosmos2-2b", "cosmos2-2b-image"),
            "cosmos25": ("cosmos2.5-2b",),
            "cosmos3": ("cosmos3-nano",),
            "skyreels_v2": ("skyreels-v2-df",),
            "kandinsky5": ("kandinsky5-lite", "kandinsky5-lite-distilled"),
            "kandinsky6": ("kandinsky6-pro-distilled",),
        },
    ),
    "flux": Page(
        "Flux",
        {
            "flux": ("flux", "flux2"),
            "flux_schnell": ("flux-schnell",),
            "flux2_klein": ("flux2-klein-4b",),
            "flux2_klein_kv": ("flux2-klein-9b-kv",),
            "flux3": ("flux3-klein", "flux3-klein-base"),
        },
    ),
    "qwen-image": Page(
        "Qwen-Image",
        {
            "qwen_image": ("qwen-image",),
            "qwen_image_edit": ("qwen-image-edit",),
            "qwen_image21": ("qwen-image-2.1",),
        },
    ),
    "image": Page(
        "Other image models",
        {
            "sd3": ("sd3.5",),
            "z_image": ("z-image-turbo",),
            "bria_fibo2": ("bria-fibo2",),
            "omnigen": ("omnigen",),
            "prx": ("prx",),
            "nucleus_moe": ("nucleus-moe",),
            "ideogram4": ("ideogram4",),
            "joyimage_edit_plus": ("joyimage-edit-plus",),
        },
    ),
}
# Models whose own size is small, at a size where there is something to gain.
_SQUARE: Call = {"height": 2048, "width": 2048}
LARGER: dict[str, Call] = {
    **dict.fromkeys(("flux", "flux2", "flux-schnell", "flux2-klein-4b", "flux2-klein-9b-kv"), _SQUARE),
    **dict.fromkeys(("flux3-klein", "flux3-klein-base", "qwen-image", "qwen-image-2.1"), _SQUARE),
    **dict.fromkeys(("sd3.5", "z-image-turbo", "bria-fibo2", "nucleus-moe"), _SQUARE),
    "ltx-video": {"height": 704, "width": 1216},
    "ltx-condition": {"height": 704, "width": 1216},
    "ltx-distilled": {"height": 704, "width": 1216},
    "ltx2": {"height": 1024, "width": 1536},
    "ltx2-distilled": {"height": 1024, "width": 1536},
}
# Transformers of models without a listed architecture.
_CLASSES = {
    "wan-animate-2": "WanAnimate2Transformer3DModel",
    "hunyuan-video-1.5": "HunyuanVideo15Transformer3DModel",
    "ltx2.5": "LTX2VideoTransformer3DModel",
    "kandinsky5-lite": "Kandinsky5Transformer3DModel",
    "kandinsky5-lite-distilled": "Kandinsky5Transformer3DModel",
    "ideogram4": "Ideogram4Transformer2DModel",
    "joyimage-edit-plus": "JoyImageEditPlusTransformer3DModel",
}


def transformer(name: str) -> str:
    """Class of the transformer of a known model."""
    return ARCHITECTURES[name].transformer if name in ARCHITECTURES else _CLASSES[name]


def advice(name: str, size: Call | None = None) -> str:
    """What to put on a model at a size, its own by default: Python, or a word where there is nothing."""
    cls = transformer(name)
    few = few_steps(name, FAMILIES[name].defaults["num_inference_steps"])
    small, cached = math.prod(grid(name, size or {})) < FEW_TOKENS, cls in BLOCKS and not few
    if cls in walk.EXCEPTIONS:
        return "nothing"
    if small:
        return "`accelerate(pipe, strategy=Dense())`" if cached else "nothing"
    return "`accelerate(pipe)`" if cached else f"`Digest({few.sparsity if few else 0.8})`"


def index() -> str:
    """The table of docs/recipes/index.md."""
    lines = []
    for file, page in PAGES.items():
        families = [f"[{page.title}]({file}.md)"]
        for script, names in page.scripts.items():
            groups: dict[tuple[str, str, str], list[str]] = {}
            for name in names:
                groups.setdefault(_settings(name), []).append(f"`{name}`")
            for settings, listed in groups.items():
                lines.append((families.pop() if families else "", _linked(script), ", ".join(listed), *settings))
    return _table(("family", "script", "known names", "steps", "put on", "at a larger size"), lines)


def _settings(name: str) -> tuple[str, str, str]:
    larger = advice(name, LARGER[name]) if name in LARGER else "-"
    return str(FAMILIES[name].defaults["num_inference_steps"]), advice(name), larger


def _linked(script: str) -> str:
    return f"[{script}.py](../../pipelines/{script}.py)"


def sizes(file: str) -> str:
    """The table of a page: how many tokens, and what attention is of a run."""
    lines = [
        line
        for names in PAGES[file].scripts.values()
        for name in names
        for size in ({}, *([LARGER[name]] if name in LARGER else ()))
        for line in [_line(name, size)]
    ]
    headings = ("model", "pixels", "tokens", "steps", "put on", "attention", "dense", "`Digest` alone", "speed-up")
    return _table(headings, lines)


def _line(name: str, size: Call) -> tuple[str, ...]:
    whole: Call = {**FAMILIES[name].defaults, **size}
    edges = [whole["width"], whole["height"], *([whole["num_frames"]] if "num_frames" in whole else [])]
    run = foretold(name, size)
    times = (
        ("-",) * 4
        if run is None
        else (
            f"{run['attention_share']:.2f}",
            _seconds(run["dense_seconds"]),
            _seconds(run["seconds"]),
            f"{run['speedup']:.2f}x",
        )
    )
    tokens = math.prod(grid(name, size))
    return (
        f"`{name}`",
        " x ".join(map(str, edges)),
        f"{tokens:,}",
        str(whole["num_inference_steps"]),
        advice(name, size),
        *times,
    )


def _seconds(value: object) -> str:
    assert isinstance(value, float)
    return f"{significant(value)} s"


def foretold(name: str, size: Call) -> Row | None:
    """A run of `Digest` on an H100, by the model of time of `diffsparse simulate`; None without an architecture."""
    if name not in ARCHITECTURES:
        return None
    few = few_steps(name, FAMILIES[name].defaults["num_inference_steps"])
    digest = on_device(["digest"], H100, sparsity=few.sparsity if few else 0.8)
    return foretell(name, size, H100, digest, [Schedule()])[0].row()


def _table(headings: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table whose columns of numbers stand at the right."""
    right = [all(cell == "-" or cell[0].isdigit() for cell in column) for column in zip(*lines, strict=True)]
    ruled = [headings, tuple("---:" if each else "---" for each in right), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


# --- excerpts -------------------------------------------------------------------------------------------------------

_EXCERPT = re.compile(r"(```sh\ndiffsparse (simulate [^\n]*)\n```\n\n```text\n).*?(```)", re.DOTALL)
SHOWN = [page for page in sorted(FOLDER.parent.rglob("*.md")) if _EXCERPT.search(page.read_text())]


def shown(page: str) -> str:
    """A page with what its commands `diffsparse simulate` print, where it shows that."""
    return _EXCERPT.sub(lambda found: found[1] + _printed(found[2]) + found[3], page)


def _printed(line: str) -> str:
    """What a command prints into a pipe."""
    out = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="80"), redirect_stdout(out), suppress(SystemExit):
        command(line.split())
    return out.getvalue()


FILES = ("index", *PAGES)


def table(file: str) -> str:
    """What should stand between the marks of a page."""
    return index() if file == "index" else sizes(file)


def main() -> None:
    """Write the tables and the excerpts into the pages."""
    for file in FILES:
        path = FOLDER / f"{file}.md"
        path.write_text(spliced(path.read_text(), BEGIN, table(file), END))
    for path in SHOWN:
        path.write_text(shown(path.read_text()))


if __name__ == "__main__":
    main()

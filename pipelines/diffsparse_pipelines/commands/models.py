"""`diffsparse models`: the known names, with what is known of each."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from diffsparse.errors import UnknownNameError
from diffsparse_pipelines.commands import checks

Row = dict[str, object]

# key of a row -> heading
_COLUMNS = {
    "model": "model",
    "makes": "makes",
    "size": "size",
    "steps": "steps",
    "guidance": "guidance",
    "sparsity": "sparsity",
    "dense_first": "dense first",
    "image": "image input",
    "architecture": "timed",
    "checkpoint": "checkpoint",
}
# what stands in their place where one model is shown alone
_WORDS = {
    "size": "size in pixels, and frames",
    "steps": "denoising steps",
    "guidance": "guidance scale",
    "sparsity": "sparsity by default",
    "dense_first": "dense steps at the start",
    "adapters": "LoRAs loaded with it",
    "architecture": "timed by simulate --device",
    "by_hand": "only by its script",
    "dense": "stays dense",
}


def models(
    model: Annotated[str | None, typer.Option(help="A known name.", show_default="all", callback=checks.text)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the known models: their checkpoints, sizes and steps, and what is sparse of a run by default.

    Sizes are width x height x frames. Sparsity is that of the strategies' default; the first steps stay dense. A "-"
    stands where nothing is known, or nothing is sparse. Image input is optional or required. Timed
    are those whose times simulate --device and evaluate --random-weights tell without a download.

    Args:
        model: one of them.
        as_json: print JSON.

    Raises:
        UnknownNameError: no such model.
    """
    from diffsparse_pipelines.families import FAMILIES, suggested
    from diffsparse_pipelines.progress import say, show_table

    if model is not None and model not in FAMILIES:
        raise UnknownNameError(f"no known model is called {model!r}; {suggested(model)}")
    rows = [row(name) for name in FAMILIES if model in (None, name)]
    if as_json:
        print(json.dumps({"rows": rows}, indent=2))
    elif model is not None:
        told = {key: value for key, value in rows[0].items() if value is not None or key in _COLUMNS}
        show_table([[_WORDS.get(key, _COLUMNS.get(key, key)), _text(value)] for key, value in told.items()], "ll")
    else:
        lines = [[_text(each[key]) for key in _COLUMNS] for each in rows]
        show_table(lines, "lllrrrrlll", list(_COLUMNS.values()), spare=("checkpoint", "guidance", "makes"))
        say("\nall that is known of one of them: diffsparse models --model NAME", highlight=False)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) or "-" if isinstance(value, list) else "-" if value is None else str(value)


def row(name: str) -> Row:
    """What is known of a model; None where that is nothing.

    Keys: those of `_COLUMNS`, of which "architecture" is whether `--random-weights` knows it, "adapters", "by_hand" and
    "dense": why `generate` can't make it, and why nothing of it is sparse.
    """
    from diffsparse.schedule import Schedule
    from diffsparse_pipelines import families
    from diffsparse_pipelines.architectures import ARCHITECTURES

    family, call = families.FAMILIES[name], families.defaults(name)
    steps = call.get("num_inference_steps")
    few = families.few_steps(name, steps)
    edges = [call.get("width"), call.get("height"), call.get("num_frames")]
    return {
        "model": name,
        "makes": family.output,
        "size": "x".join(str(edge) for edge in edges if edge) or None,
        "steps": steps,
        "guidance": call.get("guidance_scale", call.get("true_cfg_scale")),
        "sparsity": None if family.dense else few.sparsity if few else 0.8,
        "dense_first": Schedule().bounds(steps)[0] if steps and not family.dense else None,
        "image": "required" if family.wants_image else "optional" if family.image_hub else None,
        "checkpoint": family.hub or "embedded",
        "adapters": [f"{adapter.hub}/{adapter.file}" for adapter in family.adapters],
        "architecture": name in ARCHITECTURES or not family.hub,
        "by_hand": f"pipelines/{family.script}: wants {family.by_hand}" if family.by_hand else None,
        "dense": family.dense or None,
    }

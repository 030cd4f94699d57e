"""The table of commands: subcommand -> where its function lives, imported when it is called."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

RICH = find_spec("rich") is not None

# name -> (module:function, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("diffsparse_pipelines.commands.generate:generate", "Generate a video or an image from a prompt."),
    "evaluate": (
        "diffsparse_eval.commands.evaluate:evaluate",
        "Compare strategies with dense attention: fidelity and speed.",
    ),
    "calibrate": (
        "diffsparse_pipelines.commands.calibrate:calibrate",
        "Search a plan offline, for strategies that run on one.",
    ),
    "hunt": (
        "diffsparse_pipelines.commands.hunt:hunt",
        "Search heads whose perturbation raises an objective (HeadHunter).",
    ),
    "simulate": (
        "diffsparse_pipelines.commands.simulate:simulate",
        "Estimate what windows can save, or what a run takes on a GPU, without running.",
    ),
    "inspect": (
        "diffsparse_eval.commands.inspect:inspect",
        "Draw attention, chosen blocks, orders and recall by head.",
    ),
    "models": ("diffsparse_pipelines.commands.models:models", "List the known models, with their sizes and steps."),
    "bench": ("diffsparse_eval.commands.bench:bench", "Time the attention kernels beside torch's, in one process."),
    "doctor": ("diffsparse_eval.commands.doctor:doctor", "Show versions, devices, and which backends run here."),
}

# package that an installation without extras may lack -> the extra that it comes with
EXTRAS: dict[str, str] = {
    **dict.fromkeys(("typer", "rich", "imageio", "imageio_ffmpeg", "PIL"), "cli"),
    **dict.fromkeys(("transformers", "accelerate", "sentencepiece", "ftfy"), "cli"),
    **dict.fromkeys(("matplotlib", "skimage", "scipy"), "eval"),
}


def missing(error: ImportError) -> str | None:
    """The package of an extra that this error says is not installed; None if it is of something else.

    Diffusers and transformers raise errors without a name, which say "requires the ... library".
    """
    named = [error.name.partition(".")[0]] if error.name else re.findall(r"\w+", str(error))
    return next((name for name in named if name in EXTRAS and find_spec(name) is None), None)


def command(name: str) -> Callable[..., None]:
    """The function behind a row of the table."""
    module, function = COMMANDS[name][0].split(":")
    found: Callable[..., None] = getattr(import_module(module), function)
    return found

"""All transformer classes of the installed Diffusers, and what is known of each.

A class is sparse (it has a case in `tiny_transformers.py` or `tiny_newer.py`), an exception with a reason, pending, or
new. `python -m support.walk` prints them all and writes docs/models.md and the list in README.md.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import CacheMixin, ModelMixin
from diffusers.models import controlnets, transformers

from diffsparse_pipelines.tables import spliced
from support.pipeline_calls import guidance_styles
from support.tiny_transformers import CASES

_SOUND = "makes sound, whose sequences are short"
_LINEAR = "linear attention, without a softmax to make sparse"
# Classes that stay dense, and why. `test_walk.py` holds that each is refused, or dense with its reason told.
EXCEPTIONS: dict[str, str] = {
    "AceStepTransformer1DModel": _SOUND,
    "AnyFlowFARTransformer3DModel": "causal attention over chunks, on FlexAttention alone",
    "Kandinsky6SRTransformer3DModel": "block-sparse attention of its own (NABLA), on FlexAttention alone",
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": f"{_SOUND}, and causal",
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "PriorTransformer": "makes an embedding of one token, behind a causal mask",
    "RFD4ProteinaTransformer": "makes proteins, with a bias for each pair and head",
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": "a window that slides over keys of its past; its arguments tell no grid",
    "SanaWMTransformer3DModel": f"{_LINEAR}, but for every fourth layer",
    "StableAudio3DiTModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "WanAnimate2Transformer3DModel": "FlexAttention alone, but for the pass over the driving video",
    "TransformerTemporalModel": "attention along time alone, within UNets",
}
# Classes and modes that the seam has still to learn, and what it lacks: a row goes when it has learned it.
PENDING: dict[str, str] = {}
_CONTROLNETS = ("controlnet_cosmos", "controlnet_flux", "controlnet_qwenimage", "controlnet_sd3")


def classes() -> dict[str, type[torch.nn.Module]]:
    """The transformers of the installed Diffusers by name, and the controlnets that are made like them."""
    modules = [f"{transformers.__name__}.{module.name}" for module in pkgutil.iter_modules(transformers.__path__)]
    modules += [f"{controlnets.__name__}.{name}" for name in _CONTROLNETS]
    return dict(sorted((cls.__name__, cls) for module in modules for cls in _models(importlib.import_module(module))))


def _models(module: Any) -> Iterator[type[torch.nn.Module]]:
    """What a module defines; several controlnets as one hold classes that are walked by themselves."""
    for name, cls in vars(module).items():
        ours = inspect.isclass(cls) and issubclass(cls, ModelMixin) and cls.__module__ == module.__name__
        if ours and not ("Multi" in name and "ControlNet" in name):
            yield cls


def state(name: str) -> str:
    """What is known of a class: sparse, pending, exception or new."""
    if name in EXCEPTIONS:
        return "exception"
    if name in PENDING:
        return "pending"
    return "sparse" if name in CASES else "new"


# --- the page -------------------------------------------------------------------------------------------------------

_ROOT = Path(__file__).parents[2]
PAGE, README = _ROOT / "docs/models.md", _ROOT / "README.md"
_BEGIN, _END = "<!-- models: made by python -m support.walk -->", "<!-- /models -->"
_HEAD = """# Models

Whether the transformer of your pipeline is served, and what is known of it: every class of Diffusers {version}.

Find the class by `type(pipe.transformer).__name__`. A class that says "yes" attends sparsely and changes no bit under
`Dense()`, also when it is taken off, at another size, and in its other modes; its heads can be guided. The others are
refused, or run dense and say so, for the reason that stands in their row. By family: [Recipes](recipes/index.md).

- **sparse**: or why not, or what is still missing.
- **guidance**: how its pipelines call it in a step: a batch of branches; one call after the other, in cache contexts
  where they are named; or a guider's batches (modular pipelines).
- **blocks compiled**: `compile_repeated_blocks` knows its blocks.
- **step caches**: it takes those of Diffusers.
- **offloaded**: by groups, and by layers where it says which not to split.

Written by `python -m support.walk` and held by `tests/library/test_walk.py`, with small random weights.
`make walk DIFFUSERS=0.40.0` walks another release.

"""


def page(version: str = diffusers.__version__) -> str:
    """docs/models.md as it should be."""
    found = classes()
    styles = guidance_styles(found)
    lines = [
        "| class | sparse | guidance | blocks compiled | step caches | offloaded |",
        "|---|---|---|:---:|:---:|---|",
    ]
    lines += [f"| {' | '.join((f'`{name}`', *row(name, cls, styles[name])))} |" for name, cls in found.items()]
    return _HEAD.format(version=version) + "\n".join(lines) + "\n"


def row(name: str, cls: type[torch.nn.Module], styles: list[str]) -> tuple[str, ...]:
    """The cells of a class."""
    known = {
        "sparse": "yes",
        "exception": EXCEPTIONS.get(name),
        "pending": f"not yet: {PENDING.get(name)}",
        "new": "new",
    }
    blocks, whole = getattr(cls, "_repeated_blocks", None), getattr(cls, "_no_split_modules", None)
    offloaded = [
        way for way, can in (("group", getattr(cls, "_supports_group_offloading", True)), ("layers", whole)) if can
    ]
    return (
        str(known[state(name)]),
        "; ".join(styles) or "in no pipeline as a transformer",
        "yes" if blocks else "",
        "yes" if issubclass(cls, CacheMixin) else "",
        ", ".join(offloaded),
    )


def short() -> str:
    """What README.md says."""
    states = [state(name) for name in classes()]
    rest = ", ".join(f"{states.count(kind)} {what}" for kind, what in _REST if states.count(kind))
    proven = f"{states.count('sparse')} transformer classes of Diffusers are sparse, and unchanged to the bit under"
    return f"{proven} `Dense()`,\ntested with small random weights; {rest}: [every class](docs/models.md)."


_REST = (
    ("pending", "are to come"),
    ("exception", "are left alone, each for a reason that is told"),
    ("new", "are new"),
)


def main() -> None:
    """Print the walk; write the pages, but for a release that they are not of."""
    print(page())
    if "--print" not in sys.argv:
        PAGE.write_text(page())
        README.write_text(spliced(README.read_text(), _BEGIN, short(), _END))
    if new := [name for name in classes() if state(name) == "new"]:
        print(f"new: {', '.join(new)}")


if __name__ == "__main__":
    main()

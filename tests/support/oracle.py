"""What "unchanged" means: the same bits, the same processors, nothing left behind."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

import diffsparse
from diffsparse import Dense, Schedule
from diffsparse.site.report import Report

ALWAYS = Schedule(dense_first=0)
# What is not self-attention over the latents: cross-attention, text refiners, audio, faces, attention along time alone.
LEFT_ALONE = re.compile(
    r"attn2$|attn_2$|cross_att|audio|context_|token_refiner|temporal_|text_|perceiver|face_adapter|motion_"
    r"|txt_mode|image_cond|[av][va]_cross"
)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def processors(model: torch.nn.Module) -> list[tuple[object, type]]:
    found = [getattr(module, "processor", None) for module in model.modules()]
    return [(p, type(p)) for p in found if p is not None]


def unchanged(model: torch.nn.Module, *runs: Callable[[], list[Tensor]]) -> Report:
    """Assert that `Dense()` changes no bit of each run, at no call and not after removal; the report of the last."""
    wants, before = [run() for run in runs], processors(model)
    assert all(x.isfinite().all() for want in wants for x in want)
    handle = diffsparse.apply(model, Dense(), schedule=ALWAYS)
    for when in ("first call", "second call"):
        assert all(same(run(), want) for run, want in zip(runs, wants, strict=True)), when
    report = handle.report()
    handle.remove()
    assert all(same(run(), want) for run, want in zip(runs, wants, strict=True)), "after removal"
    left_as_it_was(model, before)
    return report


def left_as_it_was(model: torch.nn.Module, before: list[tuple[object, type]]) -> None:
    """Assert that the model's processors are those of `before`, and that nothing of ours is left in its modules."""
    after = processors(model)
    assert all(a is b and x is y for (a, x), (b, y) in zip(after, before, strict=True))
    assert not [m for m in model.modules() if "_diffsparse" in {**vars(m), **m._modules} or "forward" in vars(m)]

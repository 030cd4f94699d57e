"""Head-level perturbation guidance (HeadHunter and SoftPAG, arXiv 2506.10978): `guide` puts it on, its handle off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffsparse.errors import UnsupportedModelError
from diffsparse.guidance.hooks import Guide
from diffsparse.guidance.preset import Preset
from diffsparse.seam.models import UNGUIDED
from diffsparse.seam.patch import attach, detach, guidance_of, replaced_by, warn_replaced
from diffsparse.seam.targets import entrances_of, models_of
from diffsparse.wrappers import class_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def guide(
    target: DiffusionPipeline | torch.nn.Module,
    heads: Preset | str | Path | Sequence[str],
    *,
    head_strength: float | None = None,
    head_scale: float | None = None,
    start: int | float | None = None,
    stop: int | float | None = None,
    rescale: float | None = None,
    kind: str | None = None,
    branch: str | None = None,
    text: bool | None = None,
    reuse: bool = True,
) -> GuideHandle:
    """Guide `target` away from what it draws with some heads perturbed, until the handle is removed.

    Each guided step gives `prediction + head_scale * (prediction - perturbed prediction)`, beside classifier-free
    guidance of any kind that is linear: in one batch, in one call after the other, distilled, or none. It works on
    whatever attention runs, dense or sparse, put on before or after. Guiding again replaces.

    Args:
        target: a Diffusers pipeline (all its transformers are taken), or a transformer.
        heads: names of heads ("5.3", "12.0-7", "single.4.*", "blocks.5.attn1:3"), a `Preset`, or a preset's file.
        head_strength: how far the heads are perturbed. This and all that follow but `reuse` overrule the preset's.
        head_scale: weight of the guidance, at least 0.
        start: first guided step; an int counts steps from 0, a float is a share of the run.
        stop: end of the guided steps, likewise; it is not guided itself.
        rescale: share in [0, 1] by which predictions get their standard deviation back.
        kind: what a perturbed head does: "identity", "self", "uniform", "query-mean" or "zero".
        branch: "extra", one more pass in each step, or "uncond", the unconditional one.
        text: whether rows of text are perturbed too.
        reuse: don't compute blocks ahead of the first perturbed one a second time; changes no bit.

    Raises:
        UnsupportedModelError: `target` holds no attention that can be redirected.
        ConfigError: a value out of its range.
        UnknownNameError: no such heads.
        PlanError: another model's preset.
        InputFileError: the preset can't be read.

    Examples:
        >>> from diffsparse import guide
        >>> with guide(pipe, ["1.0", "0.*"], head_strength=0.5, head_scale=2.0) as guided:
        ...     video = pipe("a red ball").frames[0]
        >>> guided.report().passes > 0  # one more for each guided step
        True
    """
    knobs = {"head_strength": head_strength, "head_scale": head_scale, "start": start, "stop": stop}
    preset = Preset.read(heads, **knobs, rescale=rescale, kind=kind, branch=branch, text=text)
    pipe = None if isinstance(target, torch.nn.Module) else target
    models = _guidable(target)
    chosen, entrances = preset.of(models), entrances_of(target)
    guides = []
    for name, model in models.items():
        _end(model)
        guides.append(Guide(preset, model, chosen[name], reuse, entrances[name]))
        attach(name, model, guides[-1], pipe)
    return GuideHandle(preset, models, guides)


def _end(model: torch.nn.Module) -> None:
    """Unhook the guidance that is on a transformer, if any; its handle tells."""
    earlier = guidance_of(model)
    if earlier is not None:
        earlier.unhook()
    if isinstance(earlier, Guide):
        earlier.replaced = True


def _guidable(target: DiffusionPipeline | torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The transformers of `target` by name, if their heads can be perturbed."""
    models = models_of(target)
    for name in {class_of(model).__name__ for model in models.values()} & UNGUIDED.keys():
        raise UnsupportedModelError(f"the heads of {name} can't be guided: {UNGUIDED[name]}")
    return models


@dataclass(frozen=True)
class GuideReport:
    """What guidance did in the last (or running) pipeline call.

    Attributes:
        preset: what was asked for.
        heads: number of heads that are perturbed.
        passes: extra forward passes.
        blocks_run: blocks computed in them.
        blocks_skipped: blocks that were not, as their outputs were known.
        whole: why passes were not shortened, by reason.
        perturbed: calls of attention that were perturbed.
        replaced: a later `guide` took its place; the numbers are of the last run before that.
    """

    preset: Preset
    heads: int
    passes: int
    blocks_run: int
    blocks_skipped: int
    whole: dict[str, int]
    perturbed: int
    replaced: bool = False

    def __str__(self) -> str:
        share = self.blocks_skipped / max(self.blocks_run + self.blocks_skipped, 1)
        whole = ", ".join(f"{reason} x{count}" for reason, count in self.whole.items())
        rows = [
            ("head guidance", str(self.preset)),
            ("heads", str(self.heads)),
            ("extra passes", f"{self.passes}, blocks re-used {share:.0%}" + (f" (whole: {whole})" if whole else "")),
            ("perturbed", f"{self.perturbed} attention calls"),
        ]
        if self.replaced:
            rows.append(("notes", replaced_by("guide")))
        return "\n".join(f"{name:<18} {value}" for name, value in rows)


class GuideHandle:
    """What `guide` gives back: `report()` says what happened, `remove()` or leaving a `with` block undoes it.

    Attributes:
        preset (Preset): which heads are perturbed, how, and how hard.
    """

    def __init__(self, preset: Preset, models: dict[str, torch.nn.Module], guides: list[Guide]) -> None:
        self.preset = preset
        self._models, self._guides = models, guides

    def report(self) -> GuideReport:
        """Summary of the last (or running) pipeline call."""
        tallies = [guide.tally for guide in self._guides]
        return GuideReport(
            self.preset,
            heads=sum(len(heads) for guide in self._guides for heads in guide.heads.values()),
            passes=sum(tally.passes for tally in tallies),
            blocks_run=sum(tally.blocks_run for tally in tallies),
            blocks_skipped=sum(tally.blocks_skipped for tally in tallies),
            whole=dict(sum((tally.whole for tally in tallies), Counter())),
            perturbed=sum(tally.perturbed for tally in tallies),
            replaced=any(guide.replaced for guide in self._guides),
        )

    def remove(self) -> None:
        """Take the guidance off. Removing twice does no harm."""
        for model, guide in zip(self._models.values(), self._guides, strict=True):
            guide.unhook()
            detach(model, guide)

    def __enter__(self) -> GuideHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.remove()
        if kind is None and any(guide.replaced for guide in self._guides):
            warn_replaced("head guidance", "guide")

    def __repr__(self) -> str:
        return f"GuideHandle({self.preset!r} on {', '.join(self._models)})"

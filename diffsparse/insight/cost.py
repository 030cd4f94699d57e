"""What a run costs: kinds of steps, FLOPs of one forward pass, and what sparse attention can save of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import TYPE_CHECKING

from torch import nn

from diffsparse.errors import ConfigError
from diffsparse.orders.layout import Layout
from diffsparse.schedule import Schedule
from diffsparse.seam.caches import Outlook
from diffsparse.seam.models import spec_of
from diffsparse.seam.targets import attentions
from diffsparse.site.record import CallRecord
from diffsparse.site.report import Report
from diffsparse.strategies.base import Attending, Strategy, as_strategy
from diffsparse.strategies.work import Outline
from diffsparse.wrappers import heads_of

if TYPE_CHECKING:
    from diffusers.models.attention import AttentionModuleMixin as Attention

_ONCE = (
    "norm",
    "time",
    "guidance",
    "modulation",
    "_mod.",
    "adaln",
    "pooled",
)  # input: one vector for each sample
_TEXT = ("add_", "text", "txt", "caption", "image_emb")  # input: the prompt (or an image) alone
_KEYS = (".to_k", ".to_v")  # of cross-attention: also "to_key" and "to_value"
FEWEST = 3  # dense steps, by whose median a dense run is estimated: of fewer, one that warms up spoils it
_PRODUCTS = nn.Linear | nn.Conv2d | nn.Conv3d


def end_to_end(share: float, attention_speedup: float, dense: float = 0.0) -> float:
    """Speed-up of a whole run whose attention gets faster: 1 / (1 - p + p (w + (1 - w) / s)).

    Args:
        share: p, share of attention in a dense step.
        attention_speedup: s, of the attention of the other steps.
        dense: w, share of the steps that stay dense.

    Raises:
        ConfigError: a share outside [0, 1].
    """
    for name, value in (("share", share), ("dense", dense)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} wants a number in [0, 1]; got {value!r}")
    return 1 / (1 - share + share * (dense + (1 - dense) / attention_speedup))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward pass of one sample, 2 for each multiplication.

    Attributes:
        attention: the two products of self-attention over the grid, for each of the model's attention modules in order
            (0 for those that are never sparse).
        rest: everything else that multiplies matrices.
        head_dim: channels of a head of the first of these modules; None if it is not known.
    """

    attention: tuple[float, ...]
    rest: float
    head_dim: int | None = None

    @property
    def total(self) -> float:
        """Both."""
        return sum(self.attention) + self.rest

    @property
    def share(self) -> float:
        """Share of attention."""
        return sum(self.attention) / self.total


def flops(model: nn.Module, video: int, text: int) -> Flops:
    """Count the operations of one forward pass of one sample, from the shapes of the weights alone.

    Each linear layer costs 2 x weights x rows, each attention 4 x rows x columns x width. Which rows a layer sees is
    read off its name; an input image counts as many tokens as the prompt. Tests compare the count with
    `torch.utils.flop_counter` on real passes, which can't serve here: it wants a pass of the whole model, with inputs
    that differ for each class and that only its pipeline knows.

    Args:
        model: a transformer of Diffusers; the meta device will do.
        video: tokens of the grid.
        text: tokens of the prompt.
    """
    joint = 0 if spec_of(model).text == "none" else text
    attention, crossed = [], 0.0
    for name, module in attentions(model):
        products = 4.0 * _width(module)
        if any(part in name for part in spec_of(model).skip):
            attention.append(0.0)
            crossed += products * text * text
        elif _crosses(name) and not joint:
            attention.append(0.0)
            image = getattr(module, "add_k_proj", None) is not None  # keys of an input image too
            crossed += products * video * text * (2 if image else 1)
        else:
            attention.append(products * (video + (0 if _crosses(name) else joint)) ** 2)
    counted = ((module, heads_of(module)) for _, module in attentions(model))
    head_dim = next((_width(module) // heads for module, heads in counted if heads), None)
    return Flops(tuple(attention), crossed + sum(_linear(model, video, text, joint)), head_dim)


def _linear(model: nn.Module, video: int, text: int, joint: int) -> list[float]:
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, _PRODUCTS)]
    two_streams = {_block(name) for name, _ in named if _reads(name, _TEXT)}
    found = []
    for name, module in named:
        if _reads(name, _ONCE):
            rows = 1
        elif _reads(name, _TEXT) or (not joint and _crosses(name.rpartition(".")[0]) and _reads(name, _KEYS)):
            rows = text
        else:
            rows = video if _block(name) in two_streams else video + joint
        found.append(2.0 * _weights(module) * rows)
    return found


def _weights(module: nn.Linear | nn.Conv2d | nn.Conv3d) -> int:
    """Number of weights, also where they are packed by quantisation."""
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()


def _block(name: str) -> str:
    """ "transformer_blocks.3.ff.net.2" -> "transformer_blocks.3"; layers outside of blocks share one of their own."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdecimal() else ""


def _reads(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name for word in words)


def _crosses(name: str) -> bool:
    """Whether a module of this name attends to the prompt."""
    return name.endswith(("attn2", "cross_attn", "cross_attention"))


def _width(module: Attention) -> int:
    """Heads times head size of the queries."""
    width, size, heads = getattr(module, "inner_dim", None), getattr(module, "head_dim", None), heads_of(module)
    if width:
        return int(width)
    if size is None or heads is None:
        return int((getattr(module, "to_query", None) or module.to_q).out_features)
    return heads * int(size)


@dataclass(frozen=True)
class Estimate:
    """What a strategy saves in a run, and a step cache with it; beside a dense run without one.

    Attributes:
        attention_share: share of attention in a dense step.
        attention_speedup: of the attention of the whole run, dense steps and searches included.
        speedup: of the whole run.
        executed: share of the steps that reach attention.
        is_known: whether that is known beforehand; else all are taken to.
        dense_steps: of the run, by which it was measured; 0 of what was only counted.
    """

    attention_share: float
    attention_speedup: float
    speedup: float
    executed: float = 1.0
    is_known: bool = True
    dense_steps: int = 0

    @classmethod
    def before(
        cls,
        count: Flops,
        strategy: Strategy | Attending,
        schedule: Schedule,
        steps: int,
        layout: Layout | None = None,
        left: Sequence[Outlook] = (),
    ) -> Estimate | None:
        """From operations alone: as if the machine did all of them equally fast, and nothing else took time.

        Args:
            count: of a dense pass.
            strategy: what computes attention.
            schedule: steps and layers that stay dense.
            steps: length of the run.
            layout: of the tokens; some strategies can't tell without.
            left: what step caches leave of each attention module; nothing where there are none.

        Returns:
            The estimate; None if what the strategy computes is unknown before it runs.
        """
        layers = len(count.attention)
        seen = left or [Outlook(tuple(range(steps)))] * layers
        works = {
            each: _work(strategy, Outline.of(schedule, steps, layout, count.head_dim, each.executed, each.warm_up))
            for each in dict.fromkeys(seen)
        }
        if None in works.values():
            return None
        done = (
            len(each.executed) if schedule.excludes(i, layers) else works[each] or 0.0 for i, each in enumerate(seen)
        )
        attention = sum(flop * passes for flop, passes in zip(count.attention, done, strict=True)) / steps
        spared = [steps - len(each.executed) for flop, each in zip(count.attention, seen, strict=True) if flop]
        wide = all(each.is_wide for each in seen)
        rest = count.rest * (1 - mean(spared) / steps) if wide else count.rest
        faster = sum(count.attention) / attention, count.total / (attention + rest)
        return cls(count.share, *faster, 1 - mean(spared) / steps, all(each.is_known for each in seen))

    @classmethod
    def after(cls, report: Report, seconds: float) -> Estimate | None:
        """From a finished call: a dense run without a step cache is estimated from the call's own dense steps.

        What the first dense and the first sparse step took longer than most of their kind is warm-up, and left out.

        Args:
            report: of the call.
            seconds: that it took.

        Returns:
            The estimate; None if fewer than `FEWEST` steps were dense, or none was anything else.
        """
        steps: dict[int, list[CallRecord]] = {}
        for call in report.calls:
            steps.setdefault(call.step, []).append(call)
        kinds = {step: {call.kind for call in calls} for step, calls in steps.items()}
        dense = [calls for step, calls in steps.items() if kinds[step] == {"dense"}]
        sparse = [calls for step, calls in steps.items() if "sparse" in kinds[step] and "search" not in kinds[step]]
        if len(dense) < FEWEST or len(dense) == len(steps) or not report.attention_seconds:
            return None
        made = median(_seconds(calls) / len(calls) for calls in dense) * len(report.calls)
        warm_up = _warm_up(dense) + _warm_up(sparse)
        taken, ran = seconds - warm_up, report.attention_seconds - warm_up
        rest = max(taken - ran, 0.0) / (report.executed if report.cache_is_wide else 1)
        attention = made / report.executed
        whole = attention + rest
        return cls(attention / whole, attention / ran, whole / taken, report.executed, dense_steps=len(dense))


def _seconds(calls: list[CallRecord]) -> float:
    return sum(call.seconds for call in calls)


def _warm_up(steps: list[list[CallRecord]]) -> float:
    """Seconds that the first of some steps of a kind took longer than most of them; 0 where they are too few."""
    taken = [_seconds(calls) for calls in steps]
    return max(taken[0] - median(taken), 0.0) if len(taken) >= FEWEST else 0.0


def _work(strategy: Strategy | Attending, run: Outline) -> float | None:
    """Dense passes of an attention layer in a run; None if they are not known beforehand."""
    works = [step.work for step in as_strategy(strategy).steps(run)]
    known = [work for work in works if work is not None]
    return sum(known) if len(known) == len(works) else None

"""HeadHunter: the heads whose perturbation raises an objective, found greedily (arXiv 2506.10978, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from diffsparse.errors import ConfigError
from diffsparse.guidance.guide import guide
from diffsparse.guidance.objectives import Frames, Objective
from diffsparse.guidance.preset import Preset
from diffsparse.plans.plan import fingerprints
from diffsparse.plans.sealed import Values
from diffsparse.plans.store import Store
from diffsparse.seam.targets import models_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Pair = tuple[str, int]  # prompt and seed
Render = Callable[[Sequence[Pair]], Sequence[Frames]]
Scores = dict[str, list[float]]  # head -> its score for each pair

UNGUIDED, FINAL = "none", "all"  # scored beside the rounds: the baseline, and the heads that were found


@dataclass(frozen=True)
class HeadHunter:
    """Iterative greedy selection: in each round every head left is tried beside those chosen; the best `k` join them.

    Heads that look bad alone can serve in a set, and good ones can clash: hence rounds. The paper uses k = 3 in 5
    rounds for styles at strength 1, and k = 24 in one round for general quality at strength 0.25.

    Attributes:
        k: heads that join in each round.
        rounds: how many.
        head_strength: how far heads are perturbed, see `Preset`; so are all that follow.
        head_scale: weight of the guidance.
        kind: what a perturbed head does instead of attending.
        start: first guided step.
        stop: end of the guided steps.
        rescale: share by which predictions get their standard deviation back.
        branch: the pass that is perturbed.
        text: whether rows of text are perturbed too.

    Raises:
        ConfigError: a value out of its range, or a strength or scale of 0, with which no head changes anything.

    Examples:
        >>> from diffsparse import HeadHunter
        >>> HeadHunter(k=24, rounds=1, head_strength=0.25).trials(pool=480)  # sets of heads that are tried
        480
    """

    k: int = 3
    rounds: int = 5
    head_strength: float = 1.0
    head_scale: float = 3.0
    kind: str = "identity"
    start: int | float = 0.0
    stop: int | float = 1.0
    rescale: float = 0.0
    branch: str = "extra"
    text: bool = False

    def __post_init__(self) -> None:
        for name in ("k", "rounds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} wants a whole number of at least 1; got {value!r}")
        if self.preset(["0.0"]).idle:
            raise ConfigError("a hunt wants a strength and a scale above 0: with 0 no head changes anything")

    def preset(self, heads: Sequence[str], models: dict[str, str] | None = None, about: Values | None = None) -> Preset:
        """The guidance with these heads.

        Args:
            heads: names of heads.
            models: fingerprints of the transformers, by name; None fits all that have such heads.
            about: how the heads were found, plain values.
        """
        knobs = {knob.name: getattr(self, knob.name) for knob in fields(self) if knob.name not in ("k", "rounds")}
        return Preset(tuple(heads), **knobs, models=models or {}, about=about or {})

    def check(self, pool: Sequence[str]) -> None:
        """Raise ConfigError unless the pool has enough heads for all rounds."""
        if len(pool) < self.k * self.rounds:
            raise ConfigError(
                f"{self.rounds} rounds for {self.k} heads each want a pool of at least {self.k * self.rounds}; got "
                f"{len(pool)}"
            )

    def trials(self, pool: int) -> int:
        """Sets of heads that are tried, out of a pool of that size; each costs one generation for each pair."""
        return sum(pool - turn * self.k for turn in range(self.rounds))


def hunt(
    pipe: DiffusionPipeline | nn.Module,
    hunter: HeadHunter,
    pool: Sequence[str],
    pairs: Sequence[Pair],
    render: Render,
    objective: Objective,
    out: str | Path,
    *,
    name: str = "",
    about: Values | None = None,
    after_trial: Callable[[int], object] = lambda done: None,
) -> Preset:
    """Search heads and write them to `out` as a preset.

    A hunt that was stopped goes on after the last trial that it finished, and ends with the same heads. Equal scores
    are decided by the order of the pool.

    Args:
        pipe: a Diffusers pipeline, or a transformer.
        hunter: how to search.
        pool: names of heads, such as `diffsparse.guidance.heads.names_of(pipe.transformer)`.
        pairs: prompts and seeds, the same for all trials.
        render: runs `pipe` for some pairs, always in the same way, and gives one clip [F, H, W, C] for each.
        objective: (clips, prompts) -> scores, higher is better.
        out: a `.json` file; the work so far is kept beside it until the preset is written.
        name: identifies this objective and these calls; a hunt is only continued with the same one.
        about: plain values for the preset's record.
        after_trial: called with the number of trials that are done, at first those of an earlier attempt.

    Raises:
        ConfigError: a pool or list of pairs that is too small, scores that are no numbers or too many or few, or the
            file beside `out` is of another hunt. The trials done are kept.
        OutputFileError: `out` can't be written, or another process is at it.

    Examples:
        >>> from diffsparse import HeadHunter, hunt
        >>> from diffsparse.guidance.heads import names_of
        >>> def render(pairs):
        ...     return [pipe(prompt, generator=torch.manual_seed(seed)).frames[0] for prompt, seed in pairs]
        >>> def contrast(clips, prompts):
        ...     return [float(clip.std()) for clip in clips]
        >>> pool = names_of(pipe.transformer, ["1.*"])
        >>> pairs = [("a red ball", 0), ("a quiet sea", 1)]
        >>> preset = hunt(pipe, HeadHunter(k=1, rounds=1), pool, pairs, render, contrast, folder / "heads.json")
    """
    hunter.check(pool)
    if not pairs:
        raise ConfigError("a hunt wants one or more pairs of prompt and seed; got none")
    models = fingerprints(models_of(pipe))
    # The knobs under their first names, so that a hunt that an earlier release has begun goes on.
    settings = [repr(hunter).replace("head_s", "s"), models, list(pool), list(pairs), name]
    store = Store.beside(out, "hunt", settings)
    trials = _Trials(pipe, hunter, pairs, render, objective, store, after_trial)
    with store.resumed(trials.restore, lambda: f"{trials.done} of {hunter.trials(len(pool))} trials"):
        after_trial(trials.done)
        chosen = trials.search(pool)
        preset = hunter.preset(chosen, models, {**(about or {}), **trials.summary(chosen)})
        preset.save(out)
    return preset


def checked(scores: Iterable[float], wanted: int) -> list[float]:
    """The scores as numbers, one for each clip.

    Raises:
        ConfigError: too many or too few, or one that is no finite number.
    """
    try:
        values = [float(x) for x in scores]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"an objective returns one number for each clip; got {scores!r}") from error
    if len(values) != wanted:
        raise ConfigError(f"an objective returns one number for each clip; got {len(values)} for {wanted} clips")
    if not all(math.isfinite(x) for x in values):
        raise ConfigError(f"an objective returns finite numbers; got {values}")
    return values


@dataclass
class _Trials:
    """The trials of a hunt: each a set of heads, rendered and scored once.

    Attributes:
        rounds: the scores by round; the round after the last holds those without guidance, and with all heads found.
    """

    pipe: DiffusionPipeline | nn.Module
    hunter: HeadHunter
    pairs: Sequence[Pair]
    render: Render
    objective: Objective
    store: Store
    after_trial: Callable[[int], object]
    rounds: dict[str, Scores] = field(default_factory=dict)

    def search(self, pool: Sequence[str]) -> list[str]:
        """The heads that all rounds choose out of the pool."""
        end, chosen = self.hunter.rounds, list[str]()
        self._score(end, UNGUIDED, ())
        for turn in range(end):
            means = {head: self._score(turn, head, (*chosen, head)) for head in pool if head not in chosen}
            chosen += sorted(means, key=lambda head: -means[head])[: self.hunter.k]
        self._score(end, FINAL, chosen)
        return chosen

    def _score(self, turn: int, label: str, heads: Sequence[str]) -> float:
        """The mean score with these heads perturbed, from the file if that trial is done."""
        scores = self._of(turn)
        if label not in scores:
            clips = self._rendered(heads)
            scores[label] = checked(self.objective(clips, [prompt for prompt, _ in self.pairs]), len(self.pairs))
            self.store.save({"rounds": self.rounds})
            self.after_trial(self.done)
        return _mean(scores[label])

    def _rendered(self, heads: Sequence[str]) -> Sequence[Frames]:
        if not heads:
            return self.render(self.pairs)
        with guide(self.pipe, self.hunter.preset(heads)):
            return self.render(self.pairs)

    def _of(self, turn: int) -> Scores:
        return self.rounds.setdefault(str(turn), {})

    @property
    def done(self) -> int:
        """Trials in the rounds that are done."""
        return sum(len(scores) for turn, scores in self.rounds.items() if turn != str(self.hunter.rounds))

    def restore(self, values: Values, tensors: dict[str, Tensor]) -> None:
        """Take over what an earlier attempt has kept."""
        self.rounds = {turn: dict(scores) for turn, scores in values["rounds"].items()}

    def summary(self, chosen: list[str]) -> Values:
        """Means without guidance, of each head when it was chosen, and of all together."""
        k, end = self.hunter.k, self.hunter.rounds
        picked = {head: _mean(self._of(i // k)[head]) for i, head in enumerate(chosen)}
        ends = {name: _mean(self._of(end)[name]) for name in (UNGUIDED, FINAL)}
        return {"k": k, "rounds": end, "score": {**ends, "when chosen": picked}}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)

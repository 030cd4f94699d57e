"""HeadHunter: the heads whose perturbation raises an objective, found greedily (arXiv 2506.10978, section 4.2)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsparse.errors import ConfigError, InputFileError
from diffsparse.files import if_stopped, locked, read_bytes, writable, write_json
from diffsparse.guidance.guide import guide
from diffsparse.guidance.objectives import Frames, Objective
from diffsparse.guidance.preset import Preset
from diffsparse.insight.calibration import partial
from diffsparse.plans.plan import fingerprints
from diffsparse.seam.targets import models_of

Pair = tuple[str, int]  # prompt and seed
Render = Callable[[Sequence[Pair]], Sequence[Frames]]
Scores = dict[str, list[float]]  # head -> its score for each pair

UNGUIDED, FINAL = "none", "all"  # what the rounds are measured against, and where they end


@dataclass(frozen=True)
class HeadHunter:
    """Iterative greedy selection: in each round every head left is tried beside those chosen; the best `k` join them.

    Heads that look bad alone can serve in a set, and good ones can clash: hence rounds. The paper uses k = 3 in 5
    rounds for styles at strength 1, and k = 24 in one round for general quality at strength 0.25.

    k: heads that join in each round. rounds: how many.
    strength, scale, kind, start, stop, rescale, branch, text: how heads are perturbed, see `Preset`.
    """

    k: int = 3
    rounds: int = 5
    strength: float = 1.0
    scale: float = 3.0
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

    def preset(self, heads: Sequence[str], **more: Any) -> Preset:
        """The guidance with these heads."""
        knobs = {name: value for name, value in vars(self).items() if name not in ("k", "rounds")}
        return Preset(tuple(heads), **knobs, **more)

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
    pipe: Any,
    hunter: HeadHunter,
    pool: Sequence[str],
    pairs: Sequence[Pair],
    render: Render,
    objective: Objective,
    out: Path,
    *,
    name: str = "",
    about: dict[str, Any] | None = None,
    after_trial: Callable[[int], Any] = lambda done: None,
) -> Preset:
    """Search heads and write them to `out` as a preset.

    A hunt that was killed goes on after the last trial that it finished, and ends with the same heads. Equal scores
    are decided by the order of the pool.

    Args:
        pipe: a Diffusers pipeline, or a transformer.
        hunter: how to search.
        pool: names of heads, such as `diffsparse.guidance.heads.names_of(pipe.transformer)`.
        pairs: prompts and seeds, the same for all trials.
        render: runs `pipe` for some pairs, always in the same way, and gives one clip [F, H, W, C] for each.
        objective: (clips, prompts) -> scores, higher is better.
        out: a `.json` file; the work so far is kept beside it until the preset is written.
        name: what tells this objective and these calls apart; a hunt is only continued with the same one.
        about: plain values for the preset's record.
        after_trial: told how many trials are done, at first those of an earlier attempt.

    Raises:
        ConfigError: a pool or list of pairs that is too small, scores that are no numbers or too many or few, or the
        file beside `out` is of another hunt. The trials done are kept.
        OutputFileError: `out` can't be written, or another process is at it.
    """
    hunter.check(pool)
    if not pairs:
        raise ConfigError("a hunt wants one or more pairs of prompt and seed; got none")
    writable(out)
    models = fingerprints(models_of(pipe))
    key = hashlib.sha256(json.dumps([repr(hunter), models, list(pool), list(pairs), name]).encode()).hexdigest()
    trials = _Trials(partial(out), key)

    def score(turn: int, label: str, heads: Sequence[str]) -> float:
        if label not in trials.of(turn):
            if heads:
                with guide(pipe, hunter.preset(heads)):
                    clips = render(pairs)
            else:
                clips = render(pairs)
            trials.add(turn, label, checked(objective(clips, [prompt for prompt, _ in pairs]), len(pairs)))
            after_trial(trials.done(hunter.rounds))
        return _mean(trials.of(turn)[label])

    with locked(trials.path, wait=False), if_stopped(lambda: trials.kept(hunter, len(pool))):
        trials.load()
        after_trial(trials.done(hunter.rounds))
        score(hunter.rounds, UNGUIDED, ())
        chosen: list[str] = []
        for turn in range(hunter.rounds):
            means = {head: score(turn, head, (*chosen, head)) for head in pool if head not in chosen}
            chosen += sorted(means, key=lambda head: -means[head])[: hunter.k]
        score(hunter.rounds, FINAL, chosen)
        preset = hunter.preset(chosen, models=models, about={**(about or {}), **trials.summary(hunter, chosen)})
        preset.save(out)
        trials.path.unlink()
    return preset


def checked(scores: Any, wanted: int) -> list[float]:
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
    """The scores of all trials, and the file that keeps them; the last entry is that of the ends of the hunt."""

    path: Path
    key: str
    rounds: dict[str, Scores] = field(default_factory=dict)

    def of(self, turn: int) -> Scores:
        return self.rounds.setdefault(str(turn), {})

    def add(self, turn: int, label: str, scores: list[float]) -> None:
        self.of(turn)[label] = scores
        write_json({"key": self.key, "rounds": self.rounds}, self.path)

    def done(self, rounds: int) -> int:
        """Trials in the rounds that are done."""
        return sum(len(scores) for turn, scores in self.rounds.items() if turn != str(rounds))

    def kept(self, hunter: HeadHunter, pool: int) -> str:
        """What a hunt that is stopped leaves behind."""
        done, trials = self.done(hunter.rounds), hunter.trials(pool)
        return f"{done} of {trials} trials are kept in {self.path}; the same command goes on with the next"

    def load(self) -> None:
        """Go on where the file stopped, if there is one.

        Raises:
            InputFileError: it can't be read. ConfigError: it is of another hunt.
        """
        if not self.path.exists():
            return
        try:
            kept = json.loads(read_bytes(self.path))
            key, self.rounds = kept["key"], {turn: dict(scores) for turn, scores in kept["rounds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputFileError(f"can't read {self.path}: {error!r}; delete it to begin anew") from error
        if key != self.key:
            raise ConfigError(
                f"{self.path} is of a hunt with other settings; delete it, or choose another --out, to begin anew"
            )

    def summary(self, hunter: HeadHunter, chosen: list[str]) -> dict[str, Any]:
        """Means without guidance, of each head when it was chosen, and of all together."""
        picked = {head: _mean(self.of(i // hunter.k)[head]) for i, head in enumerate(chosen)}
        ends = {name: _mean(self.of(hunter.rounds)[name]) for name in (UNGUIDED, FINAL)}
        return {"k": hunter.k, "rounds": hunter.rounds, "score": {**ends, "when chosen": picked}}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)

"""Put a step cache of Diffusers on a transformer, by name, with patterns that are proven for its class; take it off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import diffusers
import torch
from torch.nn import Module, ModuleList

from diffsparse.errors import ConfigError, UnknownNameError, UnsupportedModelError, closest
from diffsparse.schedule import check_amount, resolve
from diffsparse.seam.caches import around, cache_on
from diffsparse.seam.hooks import HOOK, run_of
from diffsparse.seam.run import Run
from diffsparse.seam.targets import attentions, entrances_of
from diffsparse.wrappers import class_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_REGISTRY, _TAYLOR = "_diffusers_hook", "taylorseer_cache"
_FEW_STEPS = 10  # of a run: with a warm-up there is too little left to skip
_MANY_STEPS = 50  # until a run says how many it has

# The lists of blocks of a class, in the order of running; what comes after them sees the output of the last alone.
BLOCKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "AllegroTransformer3DModel",
            "CogVideoXTransformer3DModel",
            "CogView4Transformer2DModel",
            "GlmImageTransformer2DModel",
            "HunyuanVideo15Transformer3DModel",
            "LatteTransformer3DModel",
            "LTX2VideoTransformer3DModel",
            "LTXVideoTransformer3DModel",
            "MochiTransformer3DModel",
            "NucleusMoEImageTransformer2DModel",
            "QwenImageTransformer2DModel",
        ),
        ("transformer_blocks",),
    ),
    **dict.fromkeys(
        (
            "BriaTransformer2DModel",
            "ChromaTransformer2DModel",
            "Flux2Transformer2DModel",
            "FluxTransformer2DModel",
            "HunyuanVideoFramepackTransformer3DModel",
            "HunyuanVideoTransformer3DModel",
            "LongCatImageTransformer2DModel",
            "MotifVideoTransformer3DModel",
            "OvisImageTransformer2DModel",
        ),
        ("transformer_blocks", "single_transformer_blocks"),
    ),
    **dict.fromkeys(
        (
            "ChronoEditTransformer3DModel",
            "HeliosTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "WanAnimateTransformer3DModel",
            "WanTransformer3DModel",
        ),
        ("blocks",),
    ),
    "WanVACETransformer3DModel": ("vace_blocks", "blocks"),
}


class _Kind(NamedTuple):
    """A class of configurations, what its knobs are called here, and what they are if nothing else is said."""

    config: str
    short: dict[str, str]
    default: dict[str, object]


CACHES: dict[str, _Kind] = {
    "taylor-seer": _Kind(
        "TaylorSeerCacheConfig",
        {"interval": "cache_interval", "order": "max_order", "warm_up": "disable_cache_before_step"},
        {"taylor_factors_dtype": torch.float32},
    ),
    "first-block": _Kind("FirstBlockCacheConfig", {}, {}),
    "mag": _Kind("MagCacheConfig", {"steps": "num_inference_steps", "ratios": "mag_ratios"}, {}),
    "pab": _Kind(
        "PyramidAttentionBroadcastConfig",
        {"range": "spatial_attention_block_skip_range", "timesteps": "spatial_attention_timestep_skip_range"},
        {},
    ),
    "faster": _Kind(
        "FasterCacheConfig",
        {"range": "spatial_attention_block_skip_range", "timesteps": "spatial_attention_timestep_skip_range"},
        {},
    ),
    "sea": _Kind("SeaCacheConfig", {}, {}),
    "text-kv": _Kind("TextKVCacheConfig", {}, {}),
}


@dataclass(frozen=True)
class Caching:
    """A step cache by name, and its knobs: those of Diffusers' configuration, or short names for some of them.

    A `warm_up` of TaylorSeer may be a share of the run's steps (float); runs of fewer than ten are then computed whole.

    >>> Caching("taylor-seer", interval=2)
    Caching('taylor-seer:interval=2')

    Raises:
        UnknownNameError: no such cache. ConfigError: it has no such knob.
    """

    name: str
    knobs: tuple[tuple[str, object], ...]

    def __init__(self, name: str, **knobs: object) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "knobs", tuple((knob, _fixed(value)) for knob, value in knobs.items()))
        if name not in CACHES:
            raise UnknownNameError(f"no step cache is called {name!r}; known: {closest(name, CACHES)}")
        known = {*CACHES[name].short, *(knob.name for knob in fields(self._config))}
        for knob in knobs:
            if knob not in known:
                raise ConfigError(f"step cache {name!r} has no {knob!r}; it has {', '.join(sorted(known))}")
        if self.warm_up is not None:
            check_amount("warm_up", self.warm_up)

    @classmethod
    def parse(cls, text: str) -> Caching:
        """From "taylor-seer:interval=2:order=1": a name, then knobs."""
        name, *pairs = text.split(":")
        knobs = {}
        for pair in pairs:
            knob, equals, value = pair.partition("=")
            if not equals:
                raise ConfigError(f"after a colon wanted knob=value, as in taylor-seer:interval=2; got {text!r}")
            knobs[knob.replace("-", "_")] = _number(value)
        return cls(name, **knobs)

    @property
    def _config(self) -> Any:
        name = CACHES[self.name].config
        if not hasattr(diffusers, name):
            raise ConfigError(
                f"step cache {self.name!r} wants a Diffusers with {name}; this is {diffusers.__version__}"
            )
        return getattr(diffusers, name)

    def config(self, model: Module, pipe: DiffusionPipeline | None = None) -> Any:
        """Diffusers' configuration of it for a transformer; one that asks for the timestep gets that of `pipe`.

        Raises:
            UnsupportedModelError: no patterns are known for the class. ConfigError: a value that it doesn't take.
        """
        short = CACHES[self.name].short
        whole = {"warm_up": resolve(self.warm_up, _MANY_STEPS)} if self.warm_up is not None else {}
        own = {
            short.get(knob, knob): list(value) if isinstance(value, tuple) else value
            for knob, value in {**dict(self.knobs), **whole}.items()
        }
        given: dict[str, object] = {**CACHES[self.name].default, **own}
        if self.name == "taylor-seer" and not given.keys() & {"cache_identifiers", "use_lite_mode"}:
            given |= _last_block(model)
        if "current_timestep_callback" in (knob.name for knob in fields(self._config)):
            given.setdefault("current_timestep_callback", lambda: pipe._current_timestep)  # type: ignore[union-attr]
        try:
            return self._config(**given)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"step cache {self}: {error}") from error

    @property
    def warm_up(self) -> float | None:
        """Share of the run's steps that are computed at the start; None if it is a number of steps."""
        found = dict(self.knobs).get("warm_up")
        return found if isinstance(found, float) else None

    def __str__(self) -> str:
        return ":".join((self.name, *(f"{knob}={value}" for knob, value in self.knobs)))

    def __repr__(self) -> str:
        return f"Caching({str(self)!r})"


def _fixed(value: object) -> object:
    """Lists as tuples, so that it can be a key."""
    return tuple(value) if isinstance(value, list) else value


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _last_block(model: Module) -> dict[str, object]:
    """Patterns of TaylorSeer that extrapolate the output of the last block and compute no other.

    Extrapolating every block, as the class does by itself or not at all (its patterns are for attention modules named
    `attn`), gives the same pixels and keeps all blocks' outputs: 60 GB instead of 1.5 for Wan 14B at 720p.
    """
    lists = BLOCKS.get(class_of(model).__name__)
    if lists is None:
        raise UnsupportedModelError(
            f"no patterns are proven for {class_of(model).__name__}; wanted one of {', '.join(BLOCKS)}. Give `cache` "
            "a configuration of Diffusers with patterns of your own, or None to go without one"
        )
    *others, last = (re.escape(f"{name}.{i}") for name in lists for i in range(len(_blocks(model, name))))
    return {"cache_identifiers": [last], "skip_predict_identifiers": others}


def _blocks(model: Module, name: str) -> ModuleList:
    found = getattr(model, name)
    assert isinstance(found, ModuleList)
    return found


class Added:
    """A cache that was enabled on a model; calling it takes that off, if it still is on, with all that it left."""

    def __init__(self, model: Any, config: Any, warm_up: float | None = None, experts: int = 1) -> None:
        self.model, self.config, self._warm_up, self._experts = model, config, warm_up, experts
        self._before = [(module, _names(module)) for module in model.modules()]
        model.enable_cache(config)

    @property
    def is_on(self) -> bool:
        """Whether nobody has taken it off or put another in its place."""
        return self.model._cache_config is self.config

    def begin(self, steps: int) -> None:
        """A run of `steps` begins: a warm-up that is a share takes its steps, and short runs are all of it.

        Each of a pipeline's experts counts its own steps, of which it has its part.
        """
        if self._warm_up is None or not self.is_on:
            return
        first = steps if steps < _FEW_STEPS else resolve(self._warm_up, steps // self._experts)
        for module, _ in self._before:
            hook = module.__dict__[_REGISTRY].get_hook(_TAYLOR) if _REGISTRY in module.__dict__ else None
            if hook is not None:
                hook.disable_cache_before_step = first

    def __call__(self) -> None:
        """Take it off."""
        if self.is_on:
            self.model.disable_cache()
            for module, names in self._before:
                _tidy(module, names)


def put_on(model: Any, cache: object, pipe: DiffusionPipeline | None = None) -> Added:
    """Enable a cache, a `Caching` or a configuration, and return what takes it off and leaves the model as it was.

    Raises:
        UnsupportedModelError: the class takes no caches, or the cache has nothing to skip in it.
        ConfigError: it takes no such configuration.
    """
    if not hasattr(model, "enable_cache"):
        raise UnsupportedModelError(
            f"{class_of(model).__name__} takes no step cache of Diffusers; give None as `cache` to go without one"
        )
    if isinstance(cache, Caching):
        experts = 1 if pipe is None else len(entrances_of(pipe))
        added = Added(model, cache.config(model, pipe), cache.warm_up, experts)
    else:
        added = Added(model, cache)
    if not any(map(cache_on, around(model, [module for _, module in attentions(model)]))):
        added()
        raise UnsupportedModelError(
            f"{type(added.config).__name__} skips nothing of {class_of(model).__name__}: its patterns fit no module "
            "there. Leave `cache` out for patterns that do"
        )
    return added


def prepare(model: Module, steps: int) -> None:
    """A run of `steps` is about to begin, or to be estimated."""
    run = run_of(model)
    if run is not None and run.added is not None:
        run.added.begin(steps)


def _names(module: Module) -> set[str]:
    """What the object has of its own, without a registry of hooks that is there for ours alone."""
    registry = module.__dict__.get(_REGISTRY)
    ours = None if registry is None else registry.get_hook(HOOK)
    return set(module.__dict__) - ({_REGISTRY} if isinstance(ours, Run) and ours.made_registry else set())


def _tidy(module: Module, names: set[str]) -> None:
    """Diffusers leaves empty registries, methods bound to the object, and a configuration that is None."""
    registry = module.__dict__.get(_REGISTRY)
    left = {"_cache_config"}
    if registry is not None and not registry.hooks.keys() - {HOOK}:
        left |= {"forward"} if registry.hooks else {"forward", _REGISTRY}
    for name in left - names:
        module.__dict__.pop(name, None)


def caches_of(models: dict[str, Module]) -> Iterator[str]:
    """Names of the step caches that transformers have of the user."""
    for model in models.values():
        run = run_of(model)
        if run is not None and isinstance(run.added, Added) and run.added.is_on:
            continue
        chains = around(model, [module for _, module in attentions(model)])
        found = (cache.name for chain in chains if (cache := cache_on(chain)) is not None)
        yield from dict.fromkeys(found)

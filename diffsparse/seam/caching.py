"""Step caches of Diffusers by name, with patterns that are proven for the class of the transformer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import diffusers
import torch
from torch.nn import Module, ModuleList

from diffsparse.errors import ConfigError, UnknownNameError, UnsupportedModelError, closest
from diffsparse.schedule import check_amount, resolve
from diffsparse.wrappers import class_of

_FROM_ONE = ("skip_range", "cache_interval", "disable_cache_before_step", "num_inference_steps")  # ends of names
_MANY_STEPS = 50  # of a run, until it says how many it has
_PATTERNS = ("cache_identifiers", "skip_predict_identifiers", "use_lite_mode")  # of TaylorSeer: which modules it takes

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

    Args:
        name: "taylor-seer", "first-block", "mag", "pab", "faster", "sea" or "text-kv".
        **knobs: of the cache; what is left out is Diffusers' own default.

    Attributes:
        name: of the cache.
        knobs: name and value of each that was given.

    Raises:
        UnknownNameError: no such cache.
        ConfigError: it has no such knob.

    Examples:
        >>> Caching("taylor-seer", interval=2)
        Caching('taylor-seer:interval=2')
    """

    name: str
    knobs: tuple[tuple[str, object], ...]

    def __init__(self, name: str, **knobs: object) -> None:
        if name not in CACHES:
            raise UnknownNameError(f"no step cache is called {name!r}; known: {closest(name, CACHES)}")
        object.__setattr__(self, "name", name)
        short = {long: short for short, long in CACHES[name].short.items()}
        own = {short.get(knob, knob): _fixed(value) for knob, value in knobs.items()}
        object.__setattr__(self, "knobs", tuple(own.items()))
        for knob, value in own.items():
            self._check(knob, value)

    def _check(self, knob: str, value: object) -> None:
        """Raise ConfigError for a knob that it has not, or a value that makes no sense."""
        types = {each.name: each.type for each in fields(self._config)}
        kinds = {name: kind.__name__ if isinstance(kind, type) else str(kind) for name, kind in types.items()}
        long = CACHES[self.name].short.get(knob, knob)
        if long not in kinds:
            known = sorted({*CACHES[self.name].short, *kinds})
            raise ConfigError(f"step cache {self.name!r} has no {knob!r}; it has {', '.join(known)}")
        if knob == "warm_up" and isinstance(value, float) and value:
            return check_amount("warm_up", value)
        kind = kinds[long]
        wanted = None if value is None and ("None" in kind or "Callable" in kind) else _wanted(value, kind, long)
        if wanted is not None:
            raise ConfigError(f"step cache {self.name!r} wants {wanted} for {knob}; got {value!r}")

    @classmethod
    def parse(cls, text: str) -> Caching:
        """From "taylor-seer:interval=2:order=1": a name, then knobs; several numbers as in "pab:timesteps=100x900"."""
        name, *pairs = text.split(":")
        knobs = {}
        for pair in pairs:
            knob, equals, value = pair.partition("=")
            if not equals:
                raise ConfigError(f"after a colon wanted knob=value, as in taylor-seer:interval=2; got {text!r}")
            knobs[knob.replace("-", "_")] = _value(value)
        return cls(name, **knobs)

    @property
    def _config(self) -> Any:
        name = CACHES[self.name].config
        if not hasattr(diffusers, name):
            raise ConfigError(
                f"step cache {self.name!r} wants a Diffusers with {name}; this is {diffusers.__version__}"
            )
        return getattr(diffusers, name)

    def config(self, model: Module, timestep: Callable[[], object] | None = None) -> Any:
        """Diffusers' configuration of it for a transformer; some ask for the run's `timestep` in each step.

        Raises:
            UnsupportedModelError: no patterns are known for the class.
            ConfigError: a value that it doesn't take.
        """
        short = CACHES[self.name].short
        whole = {"warm_up": first_steps(self.warm_up, _MANY_STEPS)} if self.warm_up is not None else {}
        own = {
            short.get(knob, knob): list(value) if isinstance(value, tuple) else value
            for knob, value in {**dict(self.knobs), **whole}.items()
        }
        given: dict[str, object] = {**CACHES[self.name].default, **own}
        if self.name == "taylor-seer" and not any(map(given.get, _PATTERNS)):
            given |= _last_block(model)
        if "current_timestep_callback" in (knob.name for knob in fields(self._config)):
            given.setdefault("current_timestep_callback", timestep)
        try:
            return self._config(**given)
        except Exception as error:  # it takes lengths and first elements of what it has not looked at
            raise ConfigError(f"step cache {self}: {error}") from error

    @property
    def warm_up(self) -> float | None:
        """Share of the run's steps that are computed at the start; None if it is a number of steps."""
        found = dict(self.knobs).get("warm_up")
        return found if isinstance(found, float) else None

    def __str__(self) -> str:
        return ":".join((self.name, *(f"{knob}={_text(value)}" for knob, value in self.knobs)))

    def __repr__(self) -> str:
        return f"Caching({str(self)!r})"


def first_steps(warm_up: float, steps: int) -> int:
    """How many steps of a run a warm-up that is a share of it has: one at least, or nothing could be extrapolated."""
    return max(resolve(warm_up, steps), 1)


def _fixed(value: object) -> object:
    """Lists as tuples, so that it can be a key."""
    return tuple(value) if isinstance(value, list) else value


def _wanted(value: object, kind: str, name: str) -> str | None:
    """What a knob of this kind, by its annotation, wants and the value is not; None if it is."""
    least = int(name.endswith(_FROM_ONE))
    patterns, numbers = _are(value, str), _are(value, (int, float)) or isinstance(value, torch.Tensor)
    rules = {
        "int": (f"a whole number from {least}", _is(value, int) and cast(int, value) >= least),
        "float": ("a number from 0", _is(value, (int, float)) and cast(float, value) >= 0),
        "bool": ("true or false", isinstance(value, bool)),
        "str": ("a word", isinstance(value, str)),
        "tuple[int": ("two whole numbers (100x900)", _are(value, int) and len(cast(tuple[int, ...], value)) == 2),
        "tuple[str": ("patterns", patterns),
        "list[str": ("a list of patterns", patterns),
        "torch.dtype": ("a type of floating-point numbers", getattr(value, "is_floating_point", False)),
        "typing.Union[torch.Tensor": ("numbers (1x0.99x0.98)", numbers),
        "typing.Callable": ("a function", callable(value)),
    }
    return next((wanted for start, (wanted, fits) in rules.items() if kind.startswith(start) and not fits), None)


def _is(value: object, kinds: type | tuple[type, ...]) -> bool:
    """Whether it is of one of these kinds; a truth value is no number."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _are(value: object, kinds: type | tuple[type, ...]) -> bool:
    """Whether it is several of these."""
    return isinstance(value, tuple) and bool(value) and all(_is(each, kinds) for each in value)


def _text(value: object) -> str:
    """A value as `_value` reads it, where it is numbers."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value(text: str) -> object:
    """A number or several, a type of torch, or a word."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    with contextlib.suppress(ValueError):
        return tuple(float(part) if {*part} & {*".e"} else int(part) for part in text.split("x"))
    return getattr(torch, text) if isinstance(getattr(torch, text, None), torch.dtype) else text


def _last_block(model: Module) -> dict[str, object]:
    """Patterns of TaylorSeer that extrapolate the output of the last block and compute no other.

    Extrapolating every block, as the class does by itself or not at all (its patterns are for attention modules named
    `attn`), gives the same pixels and keeps the outputs of all, 40 times as much for Wan 14B.
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

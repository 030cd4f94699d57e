"""Attention heads by name: "5.3", "12.0-7", "single.4.*", or by module, "blocks.5.attn1:3"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from diffsparse.errors import ConfigError, UnknownNameError, UnsupportedModelError, closest
from diffsparse.seam.models import spec_of
from diffsparse.seam.targets import attentions
from diffsparse.wrappers import HEADS, class_of, heads_of

Heads = dict[str, tuple[int, ...]]  # attention module -> its heads, ascending; modules in the model's order

_SPAN = r"\*|\d{1,6}(?:-\d{1,6})?"
_SHORT = re.compile(rf"(?:(?P<stack>[A-Za-z_]\w*)\.)?(?P<block>{_SPAN})\.(?P<head>{_SPAN})")
_LONG = re.compile(rf"(?P<module>[^:]+):(?P<head>{_SPAN})")
_PATH = re.compile(r"(?P<stack>.+?)\.(?P<block>\d+)\..+")
_MAIN = ("transformer_blocks", "blocks", "layers")  # the stack that a block number alone means

_FORMS = (
    'wanted "5.3" (block 5, head 3), "12.0-7", "7-10.*", "single.4.*" (a stack of blocks by the start of its name) or '
    '"blocks.5.attn1:3" (an attention module by name)'
)


@dataclass(frozen=True)
class Place:
    """An attention module that can be named.

    Attributes:
        stack: name of the list of blocks that it is in.
        block: number of its block there.
        path: its name in the model.
        heads: number of heads.
    """

    stack: str
    block: int
    path: str
    heads: int


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ConfigError: none at all, or one that can't be read.
    """
    listed = (names,) if isinstance(names, str) else tuple(names)
    parts = tuple(part.strip() for name in listed for part in str(name).split(",") if part.strip())
    if not parts:
        raise ConfigError(f"wanted one or more attention heads, got none; {_FORMS}")
    for part in parts:
        if not (_SHORT.fullmatch(part) or _LONG.fullmatch(part)):
            raise ConfigError(f"{part!r} names no attention head; {_FORMS}")
    return parts


def resolve(names: Iterable[str], model: torch.nn.Module) -> Heads:
    """Which heads of which modules `names` mean.

    Raises:
        ConfigError: no names, or one that can't be read.
        UnknownNameError: one that matches nothing, or a head that the module doesn't have.
    """
    found: dict[str, set[int]] = {}
    everywhere = list(_places(model))
    for name in check_names(names):
        for place, heads in _match(name, everywhere, model):
            found.setdefault(place.path, set()).update(heads)
    return {place.path: tuple(sorted(found[place.path])) for place in everywhere if place.path in found}


def names_of(model: torch.nn.Module, pattern: Iterable[str] = ("*",)) -> list[str]:
    """The short names of heads, one each, in the model's order.

    Args:
        model: a transformer.
        pattern: names that choose some, such as "0-11.*"; all by default.

    Raises:
        UnsupportedModelError: none of its attention is in a stack of blocks.
        ConfigError: a pattern that can't be read.
        UnknownNameError: a pattern that matches nothing.
    """
    everywhere = list(_firsts(_places(model)))
    if not everywhere:
        raise UnsupportedModelError(f"{class_of(model).__name__} has no stack of blocks with attention heads to name")
    patterns = [p for p in pattern if p != "*"]
    chosen = resolve(patterns, model) if patterns else {p.path: tuple(range(p.heads)) for p in everywhere}
    main = _main(everywhere)
    return [f"{_label(p, main)}.{head}" for p in everywhere for head in chosen.get(p.path, ())]


def _label(place: Place, main: str) -> str:
    return str(place.block) if place.stack == main else f"{place.stack}.{place.block}"


def _places(model: torch.nn.Module) -> Iterator[Place]:
    """Attention modules within stacks of blocks, but for those that the model's row of the table skips."""
    skip = spec_of(model).skip
    for path, module in attentions(model):
        parts = _PATH.fullmatch(path)
        if parts and not any(part in path for part in skip):
            yield Place(parts["stack"], int(parts["block"]), path, _heads(module))


def _firsts(places: Iterable[Place]) -> Iterator[Place]:
    """The first attention of each block: in Diffusers' models it is the self-attention."""
    seen: set[tuple[str, int]] = set()
    for place in places:
        if (place.stack, place.block) not in seen:
            seen.add((place.stack, place.block))
            yield place


def _heads(module: torch.nn.Module) -> int:
    count = heads_of(module)
    if count is None:
        raise UnsupportedModelError(f"{type(module).__name__} doesn't say how many heads it has ({', '.join(HEADS)})")
    return count


def _main(places: list[Place]) -> str:
    stacks = list(dict.fromkeys(place.stack for place in places))
    return next((name for name in _MAIN if name in stacks), stacks[0] if stacks else "")


def _match(name: str, everywhere: list[Place], model: torch.nn.Module) -> Iterator[tuple[Place, range]]:
    long = _LONG.fullmatch(name)
    if long:
        known = [place.path for place in everywhere]
        hits = [place for place in everywhere if fnmatchcase(place.path, long["module"])]
        wanted, span = f"attention module {long['module']!r}", long["head"]
    else:
        short = _SHORT.fullmatch(name)
        assert short is not None
        firsts = list(_firsts(everywhere))
        stack = short["stack"] or _main(firsts)
        main = _main(firsts)
        known = [_label(place, main) for place in firsts]
        hits = [p for p in firsts if p.stack.startswith(stack) and (short["stack"] or p.stack == stack)]
        hits = [p for p in hits if p.block in _numbers(short["block"], p.block + 1)]
        wanted, span = f"block {name.rpartition('.')[0]!r}", short["head"]
    if not hits:
        raise UnknownNameError(f"{name!r}: {class_of(model).__name__} has no {wanted}; it has {closest(name, known)}")
    for place in hits:
        heads = _numbers(span, place.heads)
        if not heads or heads[-1] >= place.heads:
            raise UnknownNameError(f"{name!r}: {place.path} has the heads 0 to {place.heads - 1}")
        yield place, heads


def _numbers(span: str, count: int) -> range:
    """ "*" stands for all of `count`; "3" for one; "3-7" for both ends and what is between."""
    if span == "*":
        return range(count)
    first, _, last = span.partition("-")
    return range(int(first), int(last or first) + 1)

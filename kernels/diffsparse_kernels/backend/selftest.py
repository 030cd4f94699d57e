"""A kernel beside the reference in float64 on this device: `python -m diffsparse_kernels.backend.selftest DEVICE`.

Run by `trials.py` in a process of its own, since what it tries may hang or crash. It is told the cases on its standard
input; or one case in its arguments. Tolerances come from the data: twice
the error of the same computation in plain torch with every step rounded to the inputs' dtype, or to eight bits where
the case says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsparse_kernels import fit, rows, select, summaries
from diffsparse_kernels.backend import emulated, reference
from diffsparse_kernels.case import PRECISIONS, Case, Summary
from diffsparse_kernels.catalog import load
from diffsparse_kernels.child import follow_parent, requests, say
from diffsparse_kernels.lists import BlockLists, blocks_of
from diffsparse_kernels.masks import Boxes, is_bias, masked, shown
from diffsparse_kernels.rows import Correction
from diffsparse_kernels.summaries import StandIns, Summaries

_MANY = 40_000  # keys: more than 16 bits count
# Faults of the machine at this moment, not of a kernel.
_PASSING = ("out of memory", "ALLOC_FAILED", "No space left", "C compiler", "busy or unavailable")
_SUMS = 1e-3  # relative: sums of products in float32, in whatever order, are better than that
_FAST = 2.0**-18  # what a GPU's fast exponent and logarithm may be off by, relatively
IDLE = 20.0  # seconds without a case, after which it ends: it holds memory of the device
REPEATS = 3  # there are no atomics, so a difference between two runs is a race
Kernel = ModuleType | SimpleNamespace  # whatever has the functions of a back end
KERNELS = {  # name -> back end, and which of its kernels, where there are several
    "cpu": ("cpu", ""),
    "reference": ("reference", ""),
    "gluon": ("gluon", ""),
    "triton": ("triton", "pointers"),
    "triton-tma": ("triton", "tma"),
    "triton-specialised": ("triton", "specialised"),
    **{f"triton-{precision}": (f"triton {precision}", precision) for precision in PRECISIONS},
    "flash-attn-4": ("flash-attn-4", ""),
}
_WITH_TILES = ("attention", "attention_with_mass", "block_sparse_attention", "block_mass")
_WITHOUT_TILES = (
    *("first_order", "summary_error", "stand_ins", "merge"),
    *("lists_of_largest", "lists_of_bits", "move_rows", "restore_rows", "fit_rows"),
)
_PLAIN = SimpleNamespace(**{**vars(summaries), **vars(select), **vars(rows), **vars(fit)})
_RANK = 4  # of a correction
_RESULTS = {
    "attend": ("output", "LSE"),
    "summaries": ("output", "LSE"),
    "errors": ("error",),
    "statistics": ("mean key", "mean value", "variance", "spread", "steepness"),
    "selection": ("numbers", "lengths", "order", "bits"),
    "mass": ("mass",),
    "fused": ("output", "LSE", "mass"),
    "rows": ("queries", "keys", "corrected rows", "rows of a residual"),
    "fit": ("map", "constant", "map of codes"),
}


class Sample(NamedTuple):
    """One call: q, k, v [B, H, N, D], the lists (None: dense), and what hides keys.

    Of a selection, q is errors [B, H, nQ, nK] and the key mask what is always listed [nQ, nK].
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    lists: BlockLists | None = None
    key_mask: Tensor | None = None
    boxes: Boxes | None = None
    scale: float = 0.1
    summary: Summary = "means"  # of dropped blocks, where these are to be merged

    def double(self) -> Sample:
        """The same in float64."""
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        return self._replace(q=q, k=k, v=v)

    def seen(self) -> Tensor:
        """Which keys each query sees: bool, broadcastable to [B, H, N_q, N_kv]."""
        n_q, n_kv = self.q.shape[2], self.k.shape[2]
        seen = torch.ones(1, 1, n_q, n_kv, dtype=torch.bool, device=self.q.device)
        if self.lists is not None:
            rows = self.lists.to_mask().repeat_interleave(self.lists.q_block, 2)[:, :, :n_q]
            seen = rows.repeat_interleave(self.lists.kv_block, 3)[..., :n_kv]
        seen = seen if self.key_mask is None else seen & shown(self.key_mask)[:, None, None]
        return seen if self.boxes is None else seen & self.boxes.visible()


# --- small calls of a case ----------------------------------------------------------------------------------------


def samples(case: Case, device: torch.device, long: bool = True) -> Iterator[Sample]:
    """Ragged lengths, both layouts of memory, an empty list, lists for each sample and for all, a prefix and holes.

    Args:
        long: one with more keys than 16 bits count, too, for which a CPU takes seconds.
    """
    draw = _Draw(case, device)
    if case.kind == "selection":
        yield draw.errors("errors", (2, 3, 7, 19), None)
        yield draw.errors("errors beside text", (1, 2, 9, 1030), 4)
        if long:
            yield draw.errors("errors of many rows", (2, 8, 300, 600), 7)
        return
    n_q, n_kv = 3 * case.q_block - 9, 6 * case.kv_block - case.kv_block // 2 - 4
    mask = draw.less((2, 2, 3, 6), 0.7)
    mask[0, 0, 0] = False
    prefix = torch.arange(n_kv) < torch.tensor([[n_kv - case.kv_block // 3], [n_kv]])
    holes = draw.less((2, n_kv), 0.8)
    holes[0, : case.kv_block] = False
    if case.kind in ("rows", "fit"):
        yield draw.sample("head-major", n_kv, None, prefix, False)
        yield draw.sample("token-major", n_kv, None, prefix, True)
        return
    if case.kind in ("attend", "summaries"):
        yield draw.sample("lists", n_q, mask, prefix, False)
        yield draw.sample("one set of lists for all, token-major", n_q, mask[1:], holes, True)
    if case.kind in ("summaries", "errors", "statistics") or case.summary == "first-order":
        yield draw.sample("first order", n_q, mask, holes, False)._replace(summary="first-order")
    if case.kind in ("fused", "mass"):
        yield draw.sample("dense", n_q, None, prefix, False)
    if case.kind in ("errors", "statistics"):
        yield draw.sample("first order, token-major", n_q, mask, prefix, True)._replace(summary="first-order")
    elif case.kind != "summaries" and case.summary is None and not case.axes and case.precision is None:
        yield draw.sample("dense, token-major", n_q, None, holes, True)
    if long and case.kind == "attend" and not case.axes:
        mask = draw.less((2, 2, 1, blocks_of(_MANY, case.kv_block)), 0.02)
        mask[..., -1] = True
        keys = torch.arange(_MANY) < torch.tensor([[_MANY - 1], [_MANY - 1000]])
        yield draw.sample(f"{_MANY} keys", case.q_block, mask, keys, False)


class _Draw:
    """Random inputs of a case, the same for every kernel."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self._case, self._device, self._generator = case, device, torch.Generator().manual_seed(0)

    def less(self, shape: tuple[int, ...], share: float) -> Tensor:
        """A bool mask of which this share is True."""
        return torch.rand(*shape, generator=self._generator) < share

    def sample(self, name: str, n_q: int, mask: Tensor | None, keys: Tensor, token_major: bool) -> Sample:
        """Two samples of two heads. mask: of the blocks, None for dense attention. keys: bool [2, N_kv]."""
        case, n_kv = self._case, keys.shape[1]
        dims = (n_q, case.head_dim), (n_kv, case.head_dim), (n_kv, case.value_dim)
        q, k, v = (self._normal(*size, token_major) for size in dims)
        sizes = {"q_block": case.q_block, "kv_block": case.kv_block, "q_len": n_q, "kv_len": n_kv}
        lists = None if mask is None else BlockLists.from_mask(mask.to(self._device), **sizes)
        boxes = _boxes(case.axes, n_q, n_kv, self._generator, self._device) if case.axes else None
        return Sample(name, q, k, v, lists, self._mask(keys) if case.masked else None, boxes)

    def errors(self, name: str, shape: tuple[int, int, int, int], text: int | None) -> Sample:
        """A selection among errors of which some are equal and some aren't finite. text: of these blocks each."""
        errors = torch.rand(shape, generator=self._generator).mul(8).exp2()
        errors = torch.where(self.less(shape, 0.5), errors.round(), errors)
        errors = errors.masked_fill(self.less(shape, 0.1), torch.nan).to(self._device)
        always = None
        if text is not None:
            rows, columns = (torch.arange(size) % text == 0 for size in shape[2:])
            always = (rows[:, None] | columns).to(self._device)
        return Sample(name, errors, errors, errors, key_mask=always)

    def _mask(self, keys: Tensor) -> Tensor:
        """Of these keys, bool; or what is added to their scores."""
        if self._case.biased:
            keys = torch.randn(keys.shape, generator=self._generator).masked_fill(~keys, -torch.inf)
        return keys.to(self._device)

    def _normal(self, length: int, dim: int, token_major: bool) -> Tensor:
        shape = (2, length, 2, dim) if token_major else (2, 2, length, dim)
        x = torch.randn(*shape, generator=self._generator).to(self._device, self._case.dtype)
        x = x if self._case.copyable else torch.stack((x, x), -1)[..., 0]
        return x.transpose(1, 2) if token_major else x


def _boxes(axes: int, n_q: int, n_kv: int, generator: torch.Generator, device: torch.device) -> Boxes:
    place, low = (torch.randint(0, 6, (axes, n), generator=generator, dtype=torch.int32) for n in (n_kv, n_q))
    place[0, ::7] = -1
    return Boxes(*(x.to(device) for x in (place, low, low + 3)))


# --- a result and what to make of it ------------------------------------------------------------------------------


def compute(case: Case, kernel: Kernel, sample: Sample) -> tuple[Tensor, ...]:
    """What a kernel gives for one call of a case."""
    if case.kind == "rows":
        return _moved(kernel, sample)
    if case.kind == "fit":
        return _fitted(case, kernel, sample)
    q, k, v, lists, key_mask, boxes, scale = sample[1:8]
    if case.kind == "selection":
        return _selected(kernel, q, key_mask)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.linspace(3, 6, q.shape[2], device=q.device).to(wide).expand(q.shape[:3])
    tiles = lse, case.q_block, case.kv_block, scale, key_mask
    if case.kind == "mass":
        return (kernel.block_mass(q, k, *tiles),)
    if case.kind == "fused":
        return tuple(kernel.attention_with_mass(q, k, v, *tiles))
    if lists is None:
        return tuple(kernel.attention(q, k, v, scale, key_mask))
    if case.kind == "attend" and case.summary is None:
        return tuple(kernel.block_sparse_attention(q, k, v, lists, scale, key_mask, boxes))
    if case.kind == "statistics":
        made = kernel.first_order(k, v, case.kv_block, scale, key_mask)
        return made.key, made.value, made.variance, made.spread, made.steepness
    made = summaries.summarise(k, v, case.kv_block, scale, key_mask, sample.summary)
    if case.kind == "errors":
        return (kernel.summary_error(q, made, case.q_block, scale),)
    if case.kind == "attend":
        theirs = stand_ins(sample, q.dtype)
        return tuple(kernel.block_sparse_attention(q, k, v, lists, scale, key_mask, boxes, stand_ins=theirs))
    theirs = kernel.stand_ins(q, k, v, lists, scale, key_mask, made)
    return tuple(kernel.merge(q, k, v, lists, scale, theirs, q.new_ones(*q.shape[:3], v.shape[3]), lse.clone()))


def stand_ins(sample: Sample, dtype: torch.dtype) -> StandIns:
    """What stands for the dropped blocks of a call, by plain torch; what kernels multiply is rounded to `dtype`."""
    q, k, v, lists, key_mask, _, scale = sample[1:8]
    assert lists is not None
    known = summaries.summarise(k, v, lists.kv_block, scale, key_mask, sample.summary)
    made = summaries.stand_ins(q, k, v, lists, scale, key_mask, known)
    slope = None if made.slope is None else made.slope.to(dtype)
    return made._replace(key=made.key.to(dtype), value=made.value.to(dtype), slope=slope)


def _selected(kernel: Kernel, error: Tensor, always: Tensor | None) -> tuple[Tensor, ...]:
    """A third of the blocks: numbers [2, B, H, nQ, nK], from errors and from bits, lengths, order and bits."""
    columns = error.shape[3]
    idx, cnt, bits, order = kernel.lists_of_largest(error, 1 / 3, always, (0, error.shape[1]))
    again, *rest = kernel.lists_of_bits(bits, columns)
    numbers = torch.stack([torch.nn.functional.pad(x, (0, columns - x.shape[3])) for x in (idx, again)])
    return numbers.double(), *(torch.stack(x).double() for x in zip((cnt, order), rest, strict=True)), bits.double()


def _moved(kernel: Kernel, sample: Sample) -> tuple[Tensor, ...]:
    """Queries and keys in an order for each head, and queries put back with a map and a residual added."""
    (batch, heads, tokens, dim), draw, device = sample.q.shape, torch.Generator().manual_seed(1), sample.q.device
    orders = torch.stack([torch.randperm(tokens, generator=draw) for _ in range(3)])
    picked = torch.randint(0, 3, (batch, heads), generator=draw).to(device)
    inverses, orders = (x.to(device) for x in (orders.argsort(), orders))
    by_output, constant = (torch.randn(batch, heads, n, dim, generator=draw) / dim**0.5 for n in (dim, 1))
    some = torch.rand(tokens, 1, generator=draw) < 0.8
    moved = kernel.move_rows([sample.q, sample.k], orders, picked)
    residual = Correction(None, None, *_residual(sample))
    whole = residual._replace(by_output=by_output.to(device), constant=constant.to(device), rows=some.to(device))
    restored = kernel.restore_rows(moved[0], inverses, picked, whole)
    return *moved, restored, kernel.restore_rows(sample.q, None, None, residual)


def _residual(sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and basis of one of low rank, with numbers that few bits hold."""
    (batch, heads, tokens, dim), draw = sample.q.shape, torch.Generator().manual_seed(2)
    codes = torch.randint(-127, 128, (batch, heads, tokens, _RANK), generator=draw, dtype=torch.int8)
    scale = torch.full((batch, heads, tokens, 1), 2.0**-6, dtype=torch.bfloat16)
    basis = torch.eye(_RANK, dim).expand(batch, heads, -1, -1)
    return codes.to(sample.q.device), scale.to(sample.q.device), basis.to(sample.q.device)


def _fitted(case: Case, kernel: Kernel, sample: Sample) -> tuple[Tensor, ...]:
    """Maps of rows that miss as much as they have, and a residual: exact in few bits, so that one candidate is best."""
    (codes, scale, basis), tokens, device = _residual(sample), sample.q.shape[2], sample.q.device
    count = min(case.q_block * 7 // 8, tokens)
    probes = torch.linspace(0, tokens - 1, count).long().to(device)
    out = sample.q.clone(memory_format=torch.preserve_format)
    out[..., :_RANK] = 0
    exact = 2 * out
    exact[..., :_RANK] = rows.decoded(codes, scale)
    made = kernel.fit_rows(exact[:, :, probes], out, probes, codes, scale, basis)
    return made.by_output, made.constant, made.by_code


def exact(case: Case, sample: Sample) -> tuple[Tensor, ...]:
    """The same by the reference, in float64."""
    return compute(case, SimpleNamespace(**{**vars(_PLAIN), **vars(reference)}), sample.double())


def rounded(case: Case, sample: Sample) -> tuple[Tensor, ...]:
    """The same in plain torch, every step rounded to the inputs' dtype, or to the eight bits that the case asks for."""
    if case.kind == "selection":
        return compute(case, select, sample)
    if case.kind == "summaries":
        out, lse = compute(case, summaries, sample)
        return out, lse.to(out.dtype)
    if case.kind == "errors":
        return compute(case, SimpleNamespace(summary_error=_rounded_error), sample)
    if case.kind in ("statistics", "rows", "fit"):
        return tuple(x.to(sample.q.dtype) for x in compute(case, _PLAIN, sample))
    if case.precision is not None:
        q, k, v, lists, key_mask, _, scale = sample[1:8]
        assert lists is not None
        return emulated.block_sparse_attention(q, k, v, lists, scale, key_mask, case.precision)
    scores, out, lse = rounded_attention(sample)
    if case.summary is not None:
        q, k, v, lists, _, _, scale = sample[1:8]
        assert lists is not None
        return summaries.merge(q, k, v, lists, scale, stand_ins(sample, q.dtype), out, lse)
    if case.kind == "attend":
        return out, lse

    def block_mass(q: Tensor, k: Tensor, lse: Tensor, q_block: int, kv_block: int, *_: object) -> Tensor:
        return reference.tile_sums((scores - lse[..., None].to(scores.dtype)).exp(), q_block, kv_block)

    mass = compute(case._replace(kind="mass"), SimpleNamespace(block_mass=block_mass), sample)
    return mass if case.kind == "mass" else (out, lse, *mass)


def _rounded_error(q: Tensor, made: Summaries, *rest: Any) -> Tensor:
    """By mean keys in the dtype of the queries, and itself in that dtype."""
    return summaries.summary_error(q, made._replace(key=made.key.to(q.dtype).to(made.key.dtype)), *rest).to(q.dtype)


def rounded_attention(sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and output in plain torch, every step rounded to the inputs' dtype; the LSE in float32, as kernels do."""
    wide, hidden = torch.promote_types(sample.q.dtype, torch.float32), ~sample.seen()
    products = sample.q @ sample.k.mT * sample.scale, sample.q.to(wide) @ sample.k.to(wide).mT * sample.scale
    if is_bias(sample.key_mask):
        products = masked(products[0], sample.key_mask), masked(products[1], sample.key_mask)
    scores, whole = (x.masked_fill(hidden, -torch.inf) for x in products)
    return scores, scores.softmax(-1).nan_to_num(0.0) @ sample.v, whole.logsumexp(-1)


def some_rows(sample: Sample, head: int, blocks: int = 6) -> tuple[Sample, Tensor]:
    """A part of a large call that float64 can compute: one head, a few query blocks, the last too -> it, its rows."""
    lists = sample.lists
    assert lists is not None
    picked = torch.linspace(0, lists.q_blocks - 1, min(blocks, lists.q_blocks), device=lists.idx.device).round().long()
    rows = (picked[:, None] * lists.q_block + torch.arange(lists.q_block, device=picked.device)).flatten()
    rows = rows[rows < lists.q_len]
    idx, cnt = (x[:1, head : head + 1, picked] for x in (lists.idx, lists.cnt))
    few = BlockLists(idx, cnt, lists.q_block, lists.kv_block, len(rows), lists.kv_len)
    one = slice(head, head + 1)
    q, k, v = sample.q[:1, one, rows], sample.k[:1, one], sample.v[:1, one]
    keys = None if sample.key_mask is None else sample.key_mask[:1]
    return sample._replace(q=q, k=k, v=v, lists=few, key_mask=keys), rows


def difference(got: Tensor, want: Tensor, low: Tensor, least: float = _FAST) -> tuple[float, float]:
    """The largest error of `got`, infinite if it isn't finite where it should be, and the largest that is explained.

    Args:
        want: float64.
        low: the same in plain torch, as rounded as it may be: twice its error is explained, and one rounding more.
        least: relative size of that rounding, if its dtype has a smaller one.
    """
    alive = want.isfinite()
    if not torch.equal(got.isfinite(), alive) or not torch.equal(got[~alive].double(), want[~alive]):
        return float("inf"), 0.0
    if not bool(alive.any()):
        return 0.0, 0.0
    largest = max(1.0, want[alive].abs().max().item())
    error, explained = ((x - want)[alive].abs().max().item() for x in (got, low))
    return error, 2 * explained + max(torch.finfo(low.dtype).eps, least) * largest


def distance(got: Tensor, want: Tensor, low: Tensor) -> tuple[float, float]:
    """The same of the whole: L2 norm of the error over that of `want`. A scale that is off shows here."""
    norm = want.norm().clamp(min=1e-30)
    error, explained = (((x - want).norm() / norm).item() for x in (got.double(), low.double()))
    return error, 2 * explained + _SUMS


class Finding(NamedTuple):
    """What came of one call.

    Attributes:
        problem: what is wrong; empty if nothing is.
        error: the largest of the output.
        equal: whether all repeats gave the same bits.
    """

    problem: str
    error: float
    equal: bool


def examine(case: Case, kernel: Kernel, sample: Sample, repeats: int = REPEATS) -> Finding:
    """Compare a kernel's results for one call with the exact ones, and with those of the same call again."""
    results = [compute(case, kernel, sample) for _ in range(repeats)]
    equal = all(torch.equal(x, y) for again in results[1:] for x, y in zip(again, results[0], strict=True))
    parts = results[0], exact(case, sample), rounded(case, sample)
    wrong, errors = "" if equal else f"wrong: not the same twice ({sample.name})", []
    for name, got, want, low in zip(_RESULTS[case.kind], *parts, strict=True):
        found = _errors(name, got, want, low)
        errors.append(found[0][0])
        off = next((pair for pair in found if not pair[0] <= pair[1]), None)
        if off is not None:
            wrong = f"wrong: the {name} is off by {off[0]:.2e}, {off[1]:.2e} is explained ({sample.name})"
            break
    return Finding(wrong, errors[0], equal)


def _errors(name: str, got: Tensor, want: Tensor, low: Tensor) -> list[tuple[float, float]]:
    """The errors of a result, each with what is explained of it."""
    largest = difference(got, want, low, _SUMS if name == "LSE" else _FAST)
    return [largest] if name in ("LSE", "mass") else [largest, distance(got, want, low)]


def spot_check(out: Tensor, sample: Sample) -> tuple[float, float]:
    """Error of an output and what of it is explained, where it is worst, in a part of a call that is large.

    That is a few query blocks of the first and of the last head.
    """
    found: list[tuple[float, float]] = []
    assert sample.lists is not None
    attend = Case.of("attend", *sample[1:4], (sample.lists.q_block, sample.lists.kv_block))
    for head in {0, sample.q.shape[1] - 1}:
        part, rows = some_rows(sample, head)
        compared = out[:1, head : head + 1, rows], exact(attend, part)[0], rounded_attention(part)[1]
        found += [difference(*compared), distance(*compared)]
    return max(found, key=lambda pair: pair[0] - pair[1])


# --- the child ----------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """Try the one case of the arguments, kernel and words, or those that are asked for."""
    place, *one = arguments
    if one:
        follow_parent()
        return attempt(place, one[0], one[1:])
    for request in requests(IDLE):
        attempt(place, request["kernel"], request["case"])
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the caller goes on, and may want all of the device


def attempt(place: str, name: str, words: list[str]) -> None:
    """Try one kernel with one case: a message before each call, the verdict last."""
    try:
        device = torch.zeros(1, device=place).device
    except Exception as error:  # of a device that is full or busy, not of the kernel
        return say(untried=_line(error))
    say(trying="the first call")
    try:
        say(verdict=_verdict(name, Case.read(words), device))
    except Exception as error:
        line = _line(error)
        passing = isinstance(error, torch.OutOfMemoryError) or any(sign in line for sign in _PASSING)
        say(**({"untried": line} if passing else {"verdict": f"raised {line}"}))


def _verdict(name: str, case: Case, device: torch.device) -> str:
    kernel = kernel_of(name)
    poison()
    for sample in samples(case, device, long=device.type != "cpu"):
        say(trying=sample.name)
        found = examine(case, kernel, sample)
        if found.problem:
            return found.problem
    return "right"


def kernel_of(name: str) -> Kernel:
    """The functions of a kernel: a backend's module, or those of one kind of its tiles.

    Args:
        name: one of `KERNELS`, or "module:attribute" for a kernel of one's own.
    """
    if ":" in name:
        module_name, attribute = name.split(":")
        kernel: Kernel = getattr(import_module(module_name), attribute)
        return kernel
    backend, kind = KERNELS[name]
    module = load(backend)
    if kind in PRECISIONS:  # without boxes
        return SimpleNamespace(block_sparse_attention=lambda *call: module.block_sparse_attention(*call[:-1], kind))
    if not kind:
        return module
    only = {function: partial(getattr(module, function), copy=kind) for function in _WITH_TILES}
    rest = {function: getattr(module, function) for function in _WITHOUT_TILES}
    return SimpleNamespace(**only, **rest)


def poison() -> None:
    """From now on `torch.empty` gives NaN: memory that no kernel wrote must not pass for a result."""
    torch.set_deterministic_debug_mode("warn")  # `use_deterministic_algorithms` takes seconds to import a compiler
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


if __name__ == "__main__":
    main(sys.argv[1:])

"""Our kernels beside torch's dense ones at the shapes of real models: same tensors, same process, in turns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from diffsparse_eval.gpu.numerics import does, kernels
from diffsparse_eval.gpu.stage import Channel, Options, label
from diffsparse_eval.rows import Attempt
from diffsparse_eval.suites import Case, Pattern, sdpa
from diffsparse_eval.timing import Call, in_turns
from diffsparse_kernels import BlockLists, Summary, select_heads, select_rows, summarise, summary_error
from diffsparse_kernels.backend.selftest import KERNELS, Kernel, Sample, kernel_of, spot_check
from diffsparse_kernels.backend.triton import launch as triton
from diffsparse_kernels.case import Case as KernelCase
from diffsparse_kernels.case import Kind
from diffsparse_kernels.catalog import BACKENDS
from diffsparse_kernels.lists import blocks_of
from diffsparse_kernels.summaries import SUMMARIES

if TYPE_CHECKING:
    from diffsparse.orders.per_head import HeadOrders
    from diffsparse_eval.suites import QKV

ROUNDS, INPUTS = 9, 2
_DENSITIES = (0.2, 0.1)
_PATTERNS: tuple[Pattern, ...] = ("random", "ragged")


@dataclass(frozen=True)
class Shape:
    """Self-attention of a model.

    Attributes:
        grid: tokens of the video along frames, height and width.
        heads: of the model.
        timed: how many of them are timed; the others take as long.
        text: tokens of the prompt, after the video.
        hidden: how many of them a key mask hides.
    """

    name: str
    grid: tuple[int, int, int]
    heads: int
    timed: int
    text: int = 0
    hidden: int = 0

    @property
    def tokens(self) -> int:
        """Of the video and the prompt."""
        frames, height, width = self.grid
        return frames * height * width + self.text

    def key_mask(self, device: str) -> Tensor | None:
        """bool [1, N], if the prompt is padded."""
        places = torch.arange(self.tokens, device=device)
        return (places < self.tokens - self.hidden)[None] if self.hidden else None

    def shrunk(self, by: int) -> Shape:
        """The same in small, for a machine without a GPU."""
        if by == 1:
            return self
        return Shape(self.name, (5, 8, 8), 2, 2, self.text and 20, self.hidden and 7)


SHAPES = (
    Shape("wan 1.3b 480p", (21, 30, 52), 12, 12),
    Shape("wan 14b 720p", (21, 45, 80), 40, 10),
    Shape("hunyuan-video 720p", (33, 45, 80), 24, 24, 256, 180),
    Shape("flux 1024 px", (1, 64, 64), 24, 24, 512),
)


@dataclass(frozen=True)
class Candidate:
    """What is timed: one kernel's calls of one kind.

    Attributes:
        density: share of blocks computed.
        flops: floating-point operations of one call; 0 where they don't matter.
        calls: one for each set of inputs.
        sample: the first call's arguments, if its result can be compared with float64.
    """

    kernel: str
    kind: str
    density: float
    flops: float
    calls: Sequence[Call]
    sample: Sample | None = None

    @property
    def key(self) -> tuple[str, str, float]:
        """Name of the candidate among those of its shape."""
        return self.kernel, self.kind, self.density


def shapes(options: Options) -> list[Shape]:
    """Those that are timed."""
    return [shape.shrunk(options.shrink) for shape in SHAPES]


def jobs(options: Options) -> list[str]:
    """A child for each shape."""
    return [shape.name for shape in SHAPES]


def run(job: str, options: Options, channel: Channel) -> None:
    """One shape: each candidate once, which shows what fails or is wrong, then in turns."""
    shape = next(shape for shape in shapes(options) if shape.name == job)
    with torch.inference_mode():
        candidates: dict[tuple[str, str, float], Candidate] = {}
        for candidate in _ShapeBench(shape, options).candidates():
            known: Attempt = {"kind": candidate.kind, "density": candidate.density}
            found = channel.attempt(candidate.kernel, shape.name, partial(_once, candidate), again=True, known=known)
            if found.get("verdict") in ("right", "ran"):
                candidates[candidate.key] = candidate
        seconds = in_turns(
            {key: candidate.calls for key, candidate in candidates.items()},
            ROUNDS if options.on_gpu else 3,
            options.device,
            end=channel.end,
            tick=channel.alive,
        )
    dense = [taken for (_, kind, _), taken in seconds.items() if kind.startswith("dense") and "mass" not in kind]
    for key, taken in seconds.items():
        channel.row(**_row(shape, candidates[key], taken, min(dense, default=None)))


def launches(options: Options) -> Iterator[tuple[str, str, Call]]:
    """Our kernels' calls at each shape, for the stage that compiles."""
    for shape in shapes(options):
        for name in _ShapeBench(shape, options, inputs=0).timed():
            yield name, shape.name, partial(_launch_all, shape, options, name)


def _launch_all(shape: Shape, options: Options, name: str) -> None:
    for candidate in _ShapeBench(shape, options, inputs=1).ours(name):
        candidate.calls[0]()


def _once(candidate: Candidate) -> Attempt:
    """The first call, and the error where the kernel can be compared with float64."""
    result = candidate.calls[0]()
    if candidate.sample is None:
        return {"verdict": "ran"}
    assert isinstance(result, tuple)
    error, limit = spot_check(result[0], candidate.sample)
    if not error <= limit:
        return {"verdict": "wrong", "why": f"off by {error:.2e}, {limit:.2e} is explained", "error": error}
    return {"verdict": "right", "error": error}


def _row(shape: Shape, candidate: Candidate, seconds: float, dense: float | None) -> Attempt:
    """A row of times. dense: seconds of the fastest dense kernel; its rate is what `share` refers to."""
    density = candidate.density
    row: Attempt = {
        "kernel": candidate.kernel,
        "kind": candidate.kind,
        "shape": shape.name,
        "tokens": shape.tokens,
        "heads": shape.timed,
        "density": density,
        "verdict": "timed",
        "ms": seconds * 1e3,
    }
    if candidate.flops:
        row["tflops"] = candidate.flops / seconds / 1e12
    if dense is not None:
        row["speedup"] = dense / seconds
        row["share"] = density * dense / seconds if candidate.flops else None
    return row


class _ShapeBench:
    """The tensors of one shape, and the calls that are timed on them."""

    def __init__(self, shape: Shape, options: Options, inputs: int = INPUTS) -> None:
        self.shape, self.options = shape, options
        self.case = Case(
            shape.tokens, shape.timed, 128 if options.on_gpu else 16, "bfloat16", 128 if options.on_gpu else 32, ()
        )
        self.inputs: list[QKV] = [self.case.tensors(options.device, seed) for seed in range(inputs)]
        self.scale = self.case.head_dim**-0.5
        self.key_mask = shape.key_mask(options.device)

    def candidates(self) -> Iterator[Candidate]:
        """Dense ones first."""
        yield from self.dense()
        for name in self.timed():
            yield from self.ours(name)
        yield from self.around()

    def timed(self) -> list[str]:
        """At the first shape all kernels, at the others the fastest kind of Triton's tiles that this device has."""
        masked = self.key_mask is not None
        listed = [name for name in kernels(self.options) if label(name, masked) not in self.options.without]
        listed = [name for name in listed if self._does(name, "attend")]
        if self.shape.name == SHAPES[0].name:
            return listed
        slower = [name for name in listed if name.startswith("triton")][:-1]
        if not self.options.on_gpu:
            slower.append("triton")  # the interpreter
        return [name for name in listed if name not in ("reference", *slower)]

    def _does(self, name: str, kind: Kind) -> bool:
        case, masked = self.case, self.key_mask is not None
        sizes = case.head_dim, case.head_dim, case.q_block, case.kv_block
        return does(name, KernelCase(kind, torch.bfloat16, *sizes, masked), torch.device(self.options.device))

    def dense(self) -> Iterator[Candidate]:
        """torch's kernels; with a mask the one that torch chooses, since flash takes none."""
        names = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        for name, member in names.items() if self.options.on_gpu else [("flash", SDPBackend.FLASH_ATTENTION)]:
            calls = [partial(sdpa, member, *qkv) for qkv in self.inputs]
            yield self._candidate(f"sdpa-{name}", "dense", 1.0, calls)
        if self.key_mask is not None:
            whole = partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=self.key_mask[:, None, None])
            calls = [partial(whole, *qkv) for qkv in self.inputs]
            yield self._candidate("sdpa", "dense, masked", 1.0, calls)

    def ours(self, name: str) -> Iterator[Candidate]:
        """One kernel: dense, over random lists, over those of a video, with summaries, and the mass."""
        kernel, rest = kernel_of(name), (self.scale, self.key_mask)
        masked = "" if self.key_mask is None else ", masked"
        calls: list[Call] = [partial(kernel.attention, *qkv, *rest) for qkv in self.inputs]
        yield self._candidate(name, f"dense with LSE{masked}", 1.0, calls)
        for density, pattern in itertools.product(_DENSITIES, _PATTERNS):
            lists = self.lists(density, pattern)
            share = float(lists.density())
            calls = [partial(kernel.block_sparse_attention, *qkv, lists, *rest) for qkv in self.inputs]
            sample = Sample(pattern, *self.inputs[0], lists, self.key_mask, None, self.scale)
            yield self._candidate(name, f"{pattern} lists{masked}", share, calls, sample=sample)
            if pattern == "ragged" and self.options.on_gpu:
                for by in SUMMARIES:
                    of = by, name in KERNELS and BACKENDS[KERNELS[name][0]].folds
                    calls = [partial(_summarised, *of, kernel, *qkv, lists, *rest) for qkv in self.inputs]
                    kind = f"{pattern} lists with {by.replace('-', ' ')}{masked}"
                    yield self._candidate(name, kind, share, calls)
        blocks = self.case.q_block, self.case.kv_block
        lse = torch.full(self.inputs[0][0].shape[:3], 12.0, device=self.options.device)
        if hasattr(kernel, "block_mass") and self._does(name, "mass"):
            calls = [partial(kernel.block_mass, q, k, lse, *blocks, *rest) for q, k, _ in self.inputs]
            yield self._candidate(name, f"block mass{masked}", 0.5, calls)  # one product of two
        if hasattr(kernel, "attention_with_mass") and self._does(name, "fused"):
            calls = [partial(kernel.attention_with_mass, *qkv, lse, *blocks, *rest) for qkv in self.inputs]
            yield self._candidate(name, f"dense with LSE and mass{masked}", 1.0, calls)

    def around(self) -> Iterator[Candidate]:
        """The work around the kernels: summaries, blocks chosen, lists made, tokens put in order and back."""
        from diffsparse.orders.layout import Layout
        from diffsparse.orders.named import AXES
        from diffsparse.orders.per_head import HeadOrders

        case, device = self.case, self.options.device
        rows, columns = blocks_of(case.tokens, case.q_block), blocks_of(case.tokens, case.kv_block)
        masses = [torch.rand(1, case.heads, rows, columns, device=device) for _ in self.inputs]
        sizes = {"q_block": case.q_block, "kv_block": case.kv_block, "q_len": case.tokens, "kv_len": case.tokens}
        masks = [select_rows(mass, columns // 5) for mass in masses]
        orders = HeadOrders.of(
            AXES,
            torch.arange(case.heads) % len(AXES),
            Layout(*self.shape.grid, 0, self.shape.text),
            torch.device(device),
        )
        summaries = [summarise(k, v, case.kv_block) for _, k, v in self.inputs]
        errors = partial(summary_error, q_block=case.q_block)
        around: dict[str, Sequence[Call]] = {
            "first-order summaries": [partial(summarise, k, v, case.kv_block) for _, k, v in self.inputs],
            "their estimated error": [
                partial(errors, q, s) for (q, _, _), s in zip(self.inputs, summaries, strict=True)
            ],
            "select by row": [partial(select_rows, mass, columns // 5) for mass in masses],
            "select by head": [partial(select_heads, mass, 0.2) for mass in masses],
            "lists from a mask": [partial(BlockLists.from_mask, mask, **sizes) for mask in masks],
            "orders, q k v out": [partial(_apply_all, orders, qkv) for qkv in self.inputs],
        }
        for name, calls in around.items():
            yield self._candidate("torch", name, 0.0, calls, flops=0.0)

    @lru_cache  # noqa: B019  # the object lives as long as its process
    def lists(self, density: float, pattern: Pattern) -> BlockLists:
        """Of about this share of the blocks."""
        case = Case(self.case.tokens, self.case.heads, self.case.head_dim, "bfloat16", self.case.block, (), pattern)
        lists = case.lists(1 - density, self.options.device)
        return replace(lists, bits=lists.packed())

    def _candidate(
        self,
        kernel: str,
        kind: str,
        density: float,
        calls: Sequence[Call],
        *,
        flops: float | None = None,
        sample: Sample | None = None,
    ) -> Candidate:
        done = density * self.case.flops if flops is None else flops
        return Candidate(kernel, kind, density, done, calls, sample)


def _summarised(
    by: Summary,
    folds: bool,
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    made = summarise(k, v, lists.kv_block, scale=scale, key_mask=mask, by=by)
    theirs = triton.stand_ins(q, k, v, lists, scale, mask, made)
    if folds:
        return cast(tuple[Tensor, Tensor], kernel.block_sparse_attention(q, k, v, lists, scale, mask, stand_ins=theirs))
    return triton.merge(q, k, v, lists, scale, theirs, *kernel.block_sparse_attention(q, k, v, lists, scale, mask))


def _apply_all(orders: HeadOrders, qkv: QKV) -> None:
    orders.undo(orders.apply(*qkv)[0])

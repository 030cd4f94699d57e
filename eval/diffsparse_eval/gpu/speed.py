"""Our kernels beside torch's dense ones at the shapes of real models: same tensors, same process, in turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffsparse_eval.gpu.numerics import does, kernels
from diffsparse_eval.gpu.stage import Options, Row, Talk, label
from diffsparse_eval.suites import Case
from diffsparse_eval.timing import in_turns
from diffsparse_kernels import BlockLists, select_heads, select_rows
from diffsparse_kernels.backend.selftest import Sample, kernel_of, spot_check
from diffsparse_kernels.backend.triton.launch import merge_means
from diffsparse_kernels.case import Case as KernelCase
from diffsparse_kernels.case import Kind

if TYPE_CHECKING:
    from diffsparse_eval.suites import QKV

ROUNDS, INPUTS = 9, 2
_DENSITIES = (0.2, 0.1)
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """A model's attention: of its `heads` only `timed`, for the rest takes as long. text: keys of a prompt behind the
    video, of which a mask hides a part. grid: of the video's tokens.
    """

    name: str
    grid: tuple[int, int, int]
    heads: int
    timed: int
    text: int = 0
    hidden: int = 0

    @property
    def tokens(self) -> int:
        """In all."""
        frames, height, width = self.grid
        return frames * height * width + self.text

    def key_mask(self, device: str) -> Tensor | None:
        """bool [1, N], if the prompt is padded."""
        places = torch.arange(self.tokens, device=device)
        return (places < self.tokens - self.hidden)[None] if self.hidden else None

    def shrunk(self, by: int) -> Shape:
        """In small, for a machine without a GPU."""
        if by == 1:
            return self
        return Shape(self.name, (5, 8, 8), 2, 2, self.text and 20, self.hidden and 7)


SHAPES = (
    Shape("wan 1.3b 480p", (21, 30, 52), 12, 12),
    Shape("wan 14b 720p", (21, 45, 80), 40, 10),
    Shape("hunyuan-video 720p", (33, 45, 80), 24, 24, 256, 180),
    Shape("flux 1024 px", (1, 64, 64), 24, 24, 512),
)


class Contestant(dict[str, Any]):
    """Calls of one kernel, one for each set of inputs, with what they compute: kernel, kind, density, flops, calls."""


def shapes(options: Options) -> list[Shape]:
    """Those that are timed."""
    return [shape.shrunk(options.shrink) for shape in SHAPES]


def jobs(options: Options) -> list[str]:
    """A child for each shape."""
    return [shape.name for shape in SHAPES]


def run(job: str, options: Options, talk: Talk) -> None:
    """One shape: each contestant once, which says what it can't, then in turns."""
    shape = next(shape for shape in shapes(options) if shape.name == job)
    with torch.inference_mode():
        field = _Field(shape, options)
        ran: dict[tuple[str, str, float], Contestant] = {}
        for contestant in field.contestants():
            known = {"kind": contestant["kind"], "density": contestant["density"]}
            told = talk.attempt(contestant["kernel"], shape.name, partial(_once, contestant), again=True, **known)
            if told.get("verdict") in ("right", "ran"):
                ran[contestant["kernel"], contestant["kind"], contestant["density"]] = contestant
        seconds = in_turns(
            {key: c["calls"] for key, c in ran.items()},
            ROUNDS if options.on_gpu else 3,
            options.device,
            talk.end,
            talk.alive,
        )
    dense = [taken for (_, kind, _), taken in seconds.items() if kind.startswith("dense") and "mass" not in kind]
    for key, taken in seconds.items():
        talk.row(**_row(shape, ran[key], taken, min(dense, default=None)))


def launches(options: Options) -> Iterator[tuple[str, str, Call]]:
    """Our kernels' calls at each shape, for the stage that compiles."""
    for shape in shapes(options):
        for name in _Field(shape, options, inputs=0).timed():
            yield name, shape.name, partial(_launch_all, shape, options, name)


def _launch_all(shape: Shape, options: Options, name: str) -> None:
    for contestant in _Field(shape, options, inputs=1).ours(name):
        contestant["calls"][0]()


def _once(contestant: Contestant) -> Row:
    """The first call, and the error where the kernel can be compared with float64."""
    result = contestant["calls"][0]()
    sample = contestant.get("sample")
    if sample is None:
        return {"verdict": "ran"}
    error, limit = spot_check(result[0], sample)
    if not error <= limit:
        return {"verdict": "wrong", "why": f"off by {error:.2e}, {limit:.2e} is explained", "error": error}
    return {"verdict": "right", "error": error}


def _row(shape: Shape, contestant: Contestant, seconds: float, dense: float | None) -> Row:
    """share: of the fastest dense kernel's speed, for each operation that is done."""
    density = contestant["density"]
    row = {
        "kernel": contestant["kernel"],
        "kind": contestant["kind"],
        "shape": shape.name,
        "tokens": shape.tokens,
        "heads": shape.timed,
        "density": density,
        "verdict": "timed",
        "ms": seconds * 1e3,
    }
    if contestant["flops"]:
        row["tflops"] = contestant["flops"] / seconds / 1e12
    if dense is not None:
        row["speedup"] = dense / seconds
        row["share"] = density * dense / seconds if contestant["flops"] else None
    return row


class _Field:
    """The tensors of one shape, and who computes with them."""

    def __init__(self, shape: Shape, options: Options, inputs: int = INPUTS) -> None:
        self.shape, self.options = shape, options
        self.case = Case(
            shape.tokens, shape.timed, 128 if options.on_gpu else 16, "bfloat16", 128 if options.on_gpu else 32, ()
        )
        self.inputs: list[QKV] = [self.case.tensors(options.device, seed) for seed in range(inputs)]
        self.scale = self.case.head_dim**-0.5
        self.key_mask = shape.key_mask(options.device)

    def contestants(self) -> Iterator[Contestant]:
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
        sizes = case.head_dim, case.head_dim, case.block, case.block
        return does(name, KernelCase(kind, torch.bfloat16, *sizes, masked), torch.device(self.options.device))

    def dense(self) -> Iterator[Contestant]:
        """torch's kernels; with a mask the one that it chooses itself, for flash takes none."""
        from torch.nn.attention import SDPBackend

        names = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        for name, member in names.items() if self.options.on_gpu else [("flash", SDPBackend.FLASH_ATTENTION)]:
            calls = [partial(_sdpa, member, *qkv) for qkv in self.inputs]
            yield self._contestant(f"sdpa-{name}", "dense", 1.0, calls)
        if self.key_mask is not None:
            whole = partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=self.key_mask[:, None, None])
            calls = [partial(whole, *qkv) for qkv in self.inputs]
            yield self._contestant("sdpa", "dense, masked", 1.0, calls)

    def ours(self, name: str) -> Iterator[Contestant]:
        """One kernel: dense, over random lists, over those of a video, with means, and the mass."""
        kernel, rest = kernel_of(name), (self.scale, self.key_mask)
        masked = "" if self.key_mask is None else ", masked"
        calls: list[Call] = [partial(kernel.attention, *qkv, *rest) for qkv in self.inputs]
        yield self._contestant(name, f"dense with LSE{masked}", 1.0, calls)
        for density, pattern in itertools.product(_DENSITIES, ("random", "ragged")):
            lists = self.lists(density, pattern)
            share = float(lists.density())
            calls = [partial(kernel.block_sparse_attention, *qkv, lists, *rest) for qkv in self.inputs]
            found = self._contestant(name, f"{pattern} lists{masked}", share, calls)
            found["sample"] = Sample(pattern, *self.inputs[0], lists, self.key_mask, None, self.scale)
            yield found
            if pattern == "ragged" and self.options.on_gpu:
                calls = [partial(_with_means, kernel, *qkv, lists, *rest) for qkv in self.inputs]
                yield self._contestant(name, f"{pattern} lists with means{masked}", share, calls)
        block = self.case.block
        lse = torch.full(self.inputs[0][0].shape[:3], 12.0, device=self.options.device)
        if hasattr(kernel, "block_mass") and self._does(name, "mass"):
            calls = [partial(kernel.block_mass, q, k, lse, block, block, *rest) for q, k, _ in self.inputs]
            yield self._contestant(name, f"block mass{masked}", 0.5, calls)  # one product of two
        if hasattr(kernel, "attention_with_mass") and self._does(name, "fused"):
            calls = [partial(kernel.attention_with_mass, *qkv, lse, block, block, *rest) for qkv in self.inputs]
            yield self._contestant(name, f"dense with LSE and mass{masked}", 1.0, calls)

    def around(self) -> Iterator[Contestant]:
        """What is done around the kernels: blocks chosen, lists made, tokens put in order and back."""
        from diffsparse.orders.layout import Layout
        from diffsparse.orders.named import AXES
        from diffsparse.orders.per_head import HeadOrders

        case, device = self.case, self.options.device
        blocks = -(-case.tokens // case.block)
        masses = [torch.rand(1, case.heads, blocks, blocks, device=device) for _ in self.inputs]
        sizes = {"q_block": case.block, "kv_block": case.block, "q_len": case.tokens, "kv_len": case.tokens}
        masks = [select_rows(mass, blocks // 5) for mass in masses]
        orders = HeadOrders.of(
            AXES,
            torch.arange(case.heads) % len(AXES),
            Layout(*self.shape.grid, 0, self.shape.text),
            torch.device(device),
        )
        around: dict[str, Sequence[Call]] = {
            "select by row": [partial(select_rows, mass, blocks // 5) for mass in masses],
            "select by head": [partial(select_heads, mass, 0.2) for mass in masses],
            "lists from a mask": [partial(BlockLists.from_mask, mask, **sizes) for mask in masks],
            "orders, q k v out": [partial(_apply_all, orders, qkv) for qkv in self.inputs],
        }
        for name, calls in around.items():
            yield self._contestant("torch", name, 0.0, calls, flops=0.0)

    @lru_cache  # noqa: B019  # it lives as long as its process
    def lists(self, density: float, pattern: Any) -> BlockLists:
        """Of about this share of the blocks."""
        case = Case(self.case.tokens, self.case.heads, self.case.head_dim, "bfloat16", self.case.block, (), pattern)
        return case.lists(1 - density, self.options.device)

    def _contestant(
        self, kernel: str, kind: str, density: float, calls: Sequence[Call], flops: float | None = None
    ) -> Contestant:
        done = density * self.case.flops if flops is None else flops
        return Contestant(kernel=kernel, kind=kind, density=density, flops=done, calls=calls)


def _sdpa(member: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(member):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _with_means(
    kernel: Any, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, mask: Tensor | None
) -> Any:
    out, lse = kernel.block_sparse_attention(q, k, v, lists, scale, mask)
    merge_means(q, k, v, lists, scale, mask, out, lse)
    return out, lse


def _apply_all(orders: Any, qkv: QKV) -> None:
    for x in qkv:
        x = orders.apply(x)
    orders.undo(x)

"""The Hopper kernel without a GPU: run in threads that are as asynchronous as its warps, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import compute_cache_key, create_function_from_signature

import diffsparse_kernels as dk
from diffsparse_kernels import summaries
from diffsparse_kernels.backend import reference
from diffsparse_kernels.backend.gluon import kernels as gluon_kernels
from diffsparse_kernels.backend.gluon import launch as gluon
from diffsparse_kernels.backend.nvidia import mask_pointers
from diffsparse_kernels.case import Case
from diffsparse_kernels.summaries import StandIns
from support import aot, exact, hopper
from support.cases import KEY_MASKS, MASKS, Size, assert_attention, prefixes, random_mask
from support.devices import pretended

ATTEND = gluon_kernels.attend
SIZES = [
    Size(batch=1, heads=2, q_len=200, kv_len=700, dim=64, q_block=128, kv_block=64),  # turns outnumber the stages
    Size(batch=2, heads=1, q_len=257, kv_len=333, dim=72, q_block=128, kv_block=128),  # both ends ragged
    Size(batch=1, heads=1, q_len=128, kv_len=512, dim=128, q_block=128, kv_block=64),
    Size(batch=1, heads=1, q_len=1, kv_len=1, dim=96, q_block=128, kv_block=128),
]
MASKED_SIZES = [
    Size(batch=2, heads=1, q_len=130, kv_len=300, dim=64, q_block=128, kv_block=64),
    Size(batch=2, heads=1, q_len=120, kv_len=333, dim=72, q_block=128, kv_block=128),
    Size(batch=2, heads=2, q_len=128, kv_len=256, dim=128, q_block=128, kv_block=128),  # no end is ragged
]
SUMMARISED_SIZES = [
    Size(batch=1, heads=2, q_len=200, kv_len=70 * 64 - 9, dim=64, q_block=128, kv_block=64),  # two tiles of means
    Size(batch=2, heads=1, q_len=257, kv_len=333, dim=72, q_block=128, kv_block=128),
    Size(batch=2, heads=2, q_len=100, kv_len=512, dim=128, q_block=128, kv_block=64),
    Size(batch=1, heads=1, q_len=1, kv_len=1, dim=96, q_block=128, kv_block=128),
]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Launches run on threads."""
    monkeypatch.setattr(gluon_kernels, "attend", hopper.Hopper(gluon_kernels, "attend"))


pytestmark = pytest.mark.usefixtures("emulated")


def attend(
    size: Size,
    qkv: tuple[Tensor, ...],
    lists: dk.BlockLists | None,
    keys: Tensor | None = None,
    stand_ins: StandIns | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over lists, or dense by tiles of any size."""
    q, k, v = qkv
    return gluon._attend(q, k, v, size.scale, keys, size.kv_block, lists, stand_ins)[:2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["random", "full"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_block_sparse(size: Size, kind: str, dtype: torch.dtype) -> None:
    qkv, mask = size.qkv(dtype), MASKS[kind](size)
    mask[0, 0, 0] = kind == "full"  # an empty list
    assert_attention(attend(size, qkv, size.lists(mask)), qkv, size.allowed(mask), size.scale)


def test_rows_that_the_copy_engine_cannot_store() -> None:
    size = Size(batch=2, heads=2, q_len=200, kv_len=300, dim=68, q_block=128, kv_block=64)
    qkv, mask = size.qkv(torch.bfloat16), random_mask(size)
    padded = tuple(torch.nn.functional.pad(x, (0, 4))[..., :68] for x in qkv)
    assert_attention(attend(size, padded, size.lists(mask)), qkv, size.allowed(mask), size.scale)


def test_more_keys_than_16_bits_count() -> None:
    size = Size(batch=1, heads=1, q_len=3, kv_len=40_000, dim=64, q_block=128, kv_block=64)
    qkv, mask = size.qkv(torch.float16), torch.zeros(size.blocks, dtype=torch.bool)
    mask[..., [0, 300, 600, 624]] = True
    assert_attention(attend(size, qkv, size.lists(mask)), qkv, size.allowed(mask), size.scale)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dense(size: Size) -> None:
    qkv = size.qkv(torch.bfloat16)
    whole = torch.ones(size.batch, size.heads, size.q_len, size.kv_len, dtype=torch.bool)
    assert_attention(attend(size, qkv, None), qkv, whole, size.scale)


@pytest.mark.parametrize("shared", [True, False])
def test_in_order_and_one_mask_for_the_batch(shared: bool) -> None:
    size = Size(batch=2, heads=2, q_len=300, kv_len=300, dim=64, q_block=128, kv_block=64)
    qkv, mask = size.qkv(torch.bfloat16), random_mask(size)
    mask = mask[:1] if shared else mask
    token_major = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
    got = attend(size, (qkv[0], *token_major[1:]), size.lists(mask).ordered())
    assert_attention(got, qkv, size.allowed(mask).expand(2, -1, -1, -1), size.scale)


@pytest.mark.parametrize("kind", KEY_MASKS)
@pytest.mark.parametrize("size", MASKED_SIZES, ids=str)
def test_padded_keys(size: Size, kind: str) -> None:
    qkv, mask, keys = size.qkv(torch.bfloat16), random_mask(size), KEY_MASKS[kind](size)
    mask[0, 0, 0] = False  # an empty list
    assert_attention(attend(size, qkv, size.lists(mask), keys), qkv, size.allowed(mask, keys), size.scale)


@pytest.mark.parametrize("kind", KEY_MASKS)
def test_dense_with_padded_keys(kind: str) -> None:
    size = MASKED_SIZES[1]
    qkv, keys = size.qkv(torch.float16), KEY_MASKS[kind](size)
    allowed = keys[:, None, None].expand(-1, size.heads, size.q_len, -1)
    assert_attention(attend(size, qkv, None, keys), qkv, allowed, size.scale)


@pytest.mark.parametrize("kind", ["end", "holes"])
def test_padded_keys_and_one_mask_for_the_batch(kind: str) -> None:
    size = MASKED_SIZES[0]
    qkv, mask, keys = size.qkv(torch.bfloat16), random_mask(size, 0.7)[:1], KEY_MASKS[kind](size)
    token_major = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
    got = attend(size, (qkv[0], *token_major[1:]), size.lists(mask).ordered(), keys)
    assert_attention(got, qkv, size.allowed(mask, keys), size.scale)


def test_the_mask_is_read_where_keys_are_hidden_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    size = MASKED_SIZES[0]
    qkv, mask, keys = size.qkv(torch.bfloat16), MASKS["full"](size), prefixes(size, 200, 64)
    known = mask_pointers(keys, keys)
    known["key_mask_ptr"] = (keys & ~prefixes(size, 192, 64)).view(torch.uint8)  # wrong before the tile of the end
    monkeypatch.setattr(gluon, "mask_pointers", lambda *_: known)
    assert_attention(attend(size, qkv, size.lists(mask), keys), qkv, size.allowed(mask, keys), size.scale)


def test_how_many_leading_keys_are_allowed() -> None:
    size = Size(batch=5, kv_len=70)
    keys = prefixes(size, 70, 0, 1, 33, 69)
    keys[3, 50:] = True
    wanted = torch.tensor([70, 0, 1, 33, 69], dtype=torch.int32)
    for view in (keys, keys.t().contiguous().t()):
        known = mask_pointers(view, keys)
        torch.testing.assert_close(known["clear_ptr"], wanted, rtol=0, atol=0)
        assert torch.equal(known["key_mask_ptr"].bool(), keys)
        assert known["key_mask_ptr"].is_contiguous()


# --- what stands for the blocks that are not listed -------------------------------------------------------------------


def drawn(size: Size, dtype: torch.dtype, *parts: str) -> StandIns:
    """Stand-ins of no particular keys and values, some without any key; `parts`: variance, slope, reach."""
    batch, heads, rows, blocks = size.blocks
    counts = torch.randint(0, size.kv_block + 1, (batch, heads, blocks)).clamp(max=size.kv_block)
    every = {
        "variance": torch.rand(batch, heads, blocks) * 12 / size.dim,  # up to twice the most that counts
        "slope": torch.randn(batch, heads, rows, size.dim, size.dim).to(dtype) / 4,
        "reach": torch.rand(batch, heads, rows) * 4,
    }
    means = (torch.randn(batch, heads, blocks, size.dim).to(dtype) for _ in range(2))
    return StandIns(*means, counts.log(), **{name: every[name] for name in parts})


def written_out(
    size: Size, qkv: tuple[Tensor, ...], mask: Tensor, keys: Tensor | None, stand_ins: StandIns
) -> tuple[Tensor, Tensor]:
    """One softmax over the listed keys and the stand-ins of all other blocks, in the dtype of the inputs."""
    q, k, v = qkv
    key, value, log_count, variance, slope, reach = (None if x is None else x.to(q.dtype) for x in stand_ins)
    assert key is not None
    assert value is not None
    assert log_count is not None
    scores = (q @ k.mT * size.scale).masked_fill(~size.allowed(mask, keys), -torch.inf)
    theirs = q @ key.mT * size.scale + log_count[:, :, None]
    if variance is not None:
        theirs = theirs + (q.square().sum(-1)[..., None] * variance[:, :, None] / 2).clamp(max=3)
    rows = torch.arange(size.q_len) // size.q_block
    theirs = theirs.masked_fill(mask.expand(size.blocks)[:, :, rows], -torch.inf)
    both = torch.cat((scores, theirs), -1)
    weights = both.softmax(-1).nan_to_num(0)
    out = weights @ torch.cat((v, value), 2)
    if slope is not None:
        step = (q[..., None, :] @ slope[:, :, rows])[..., 0, :]
        if reach is not None:
            most = reach[:, :, rows, None]
            step = step * most / (most.square() + step.square().sum(-1, keepdim=True)).sqrt()
        out = out + weights[..., k.shape[2] :].sum(-1, keepdim=True) * step
    return out, both.logsumexp(-1)


def assert_stands(got: tuple[Tensor, Tensor], size: Size, qkv: tuple[Tensor, ...], *rest: Any) -> None:
    """As float64 has it, but for twice the error of the same in the dtype of the inputs."""
    wants, lows = written_out(size, tuple(x.double() for x in qkv), *rest), written_out(size, qkv, *rest)
    dead = wants[1].isneginf()
    assert got[0].dtype == qkv[0].dtype
    assert torch.equal(got[1].isneginf(), dead)
    assert (got[0][dead] == 0).all()
    for x, want, low in zip(got, wants, lows, strict=True):
        assert (x.double() - want)[~dead].abs().max() <= exact.tolerance(want[~dead], low[~dead])


PARTS = {
    "means": (),
    "varied": ("variance",),
    "sloped": ("variance", "slope"),
    "bounded": ("variance", "slope", "reach"),
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("size", SUMMARISED_SIZES, ids=str)
def test_other_blocks_stand_as_their_summaries(size: Size, parts: str) -> None:
    qkv, mask = size.qkv(torch.bfloat16), random_mask(size, 0.3)
    mask[0, 0, 0] = False
    stand_ins = drawn(size, torch.bfloat16, *PARTS[parts])
    got = attend(size, qkv, size.lists(mask), stand_ins=stand_ins)
    assert_stands(got, size, qkv, mask, None, stand_ins)


def test_tiles_of_means_outnumber_the_stages() -> None:
    size = Size(batch=1, heads=2, q_len=150, kv_len=40_000, dim=128, q_block=128, kv_block=128)
    qkv, stand_ins = size.qkv(torch.bfloat16), drawn(size, torch.bfloat16, "variance")
    mask = random_mask(size, 0.02)
    mask[0, 1] = False
    got = attend(size, qkv, size.lists(mask), stand_ins=stand_ins)
    assert_stands(got, size, qkv, mask, None, stand_ins)


@pytest.mark.parametrize("kind", ["full", "empty", "sparse"])
def test_all_blocks_are_listed_or_none(kind: str) -> None:
    size = SUMMARISED_SIZES[2]
    qkv, mask, stand_ins = size.qkv(torch.float16), MASKS[kind](size), drawn(size, torch.float16, *PARTS["bounded"])
    got = attend(size, qkv, size.lists(mask), stand_ins=stand_ins)
    assert_stands(got, size, qkv, mask, None, stand_ins)


@pytest.mark.parametrize("kind", KEY_MASKS)
def test_summaries_of_padded_keys_and_one_mask_for_the_batch(kind: str) -> None:
    size = MASKED_SIZES[1]
    qkv, mask, keys = size.qkv(torch.bfloat16), random_mask(size)[:1], KEY_MASKS[kind](size)
    made = drawn(size, torch.bfloat16, *PARTS["bounded"])
    made = made._replace(log_count=made.log_count[:1].masked_fill(torch.arange(3) == 2, -torch.inf))
    got = attend(size, qkv, size.lists(mask).ordered(), keys, made)
    assert_stands(got, size, qkv, mask, keys, made)


def test_no_key_at_all() -> None:
    size = MASKED_SIZES[0]
    qkv, mask, keys = size.qkv(torch.bfloat16), random_mask(size), KEY_MASKS["nothing"](size)
    made = drawn(size, torch.bfloat16, *PARTS["bounded"])
    made.log_count[0] = -torch.inf
    got = attend(size, qkv, size.lists(mask), keys, made)
    assert got[1][0].isneginf().all()
    assert_stands(got, size, qkv, mask, keys, made)


@pytest.mark.parametrize("scale", [0.2, -0.2, 0.0])
def test_scales_of_either_sign(scale: float) -> None:
    size = SUMMARISED_SIZES[2]
    (q, k, v), mask, made = size.qkv(torch.float16), random_mask(size), drawn(size, torch.float16, *PARTS["bounded"])
    got = gluon.block_sparse_attention(q, k, v, size.lists(mask), scale, None, None, made)
    times = scale / size.scale
    made = made._replace(key=made.key * times)
    want = written_out(size, (q.double(), k.double() * times, v.double()), mask, None, made)
    low = written_out(size, (q, k * times, v), mask, None, made)
    assert (got[0].double() - want[0]).abs().max() <= exact.tolerance(want[0], low[0])


@pytest.mark.parametrize("by", summaries.SUMMARIES)
def test_in_its_own_loop_as_merged_afterwards(by: dk.Summary) -> None:
    size = SUMMARISED_SIZES[2]
    qkv, mask = size.qkv(torch.bfloat16), random_mask(size, 0.3)
    (q, k, v), lists = (x.double() for x in qkv), size.lists(mask)
    made = dk.summarise(k, v, size.kv_block, by=by)
    exactly = summaries.stand_ins(q, k, v, lists, size.scale, None, made)
    apart = reference.block_sparse_attention(q, k, v, lists, size.scale, None)
    want = summaries.merge(q, k, v, lists, size.scale, exactly, *apart)
    parts = {name: getattr(exactly, name) for name in ("key", "value", "slope")}
    stand_ins = exactly._replace(**{name: None if x is None else x.bfloat16() for name, x in parts.items()})
    out, lse = attend(size, qkv, lists, stand_ins=stand_ins)
    low = written_out(size, qkv, mask, None, stand_ins)
    assert (out.double() - want[0]).abs().max() <= exact.tolerance(want[0], low[0])
    assert (lse.double() - want[1]).abs().max() <= exact.tolerance(want[1], low[1])


def test_one_slope_for_all_query_blocks() -> None:
    size = SUMMARISED_SIZES[1]
    qkv, mask = size.qkv(torch.bfloat16), random_mask(size)
    made = drawn(size, torch.bfloat16, "slope")
    assert made.slope is not None
    one = made._replace(slope=made.slope[:, :, :1])
    each = made._replace(slope=made.slope[:, :, :1].expand_as(made.slope))
    assert_stands(attend(size, qkv, size.lists(mask), stand_ins=one), size, qkv, mask, None, each)


# --- the mass of the blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *KEY_MASKS])
@pytest.mark.parametrize("size", MASKED_SIZES, ids=str)
def test_mass_in_the_same_pass(size: Size, kind: str | None) -> None:
    qkv = size.qkv(torch.bfloat16)
    keys = None if kind is None else KEY_MASKS[kind](size)
    cached = torch.linspace(2, 5, size.q_len).expand(qkv[0].shape[:3]).clone()
    cached[:, :, 3], cached[:, :, 7] = torch.inf, -torch.inf
    blocks = size.q_block, size.kv_block
    out, lse, mass = gluon.attention_with_mass(*qkv, cached, *blocks, size.scale, keys)
    everywhere = torch.ones(size.blocks, dtype=torch.bool)
    assert_attention((out, lse), qkv, size.allowed(everywhere, keys), size.scale)
    want = reference.block_mass(qkv[0].double(), qkv[1].double(), cached.double(), *blocks, size.scale, keys)
    torch.testing.assert_close(mass.double(), want, rtol=1e-5, atol=0)


# --- scores that grow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [SUMMARISED_SIZES[0], *MASKED_SIZES], ids=str)
def test_keys_that_have_much_in_common(size: Size, masked: bool) -> None:
    qkv, mask = size.qkv(torch.bfloat16), random_mask(size, 0.4)
    mask[0, 0, 0] = False
    q, k, v = qkv
    k = k + torch.randn(k.shape[2], 1).to(k.dtype)  # maxima grow, some by little and some by much
    keys = KEY_MASKS["end"](size) if masked else None
    got = attend(size, (q * 4, k, v), size.lists(mask).ordered(), keys)
    assert_attention(got, (q * 4, k, v), size.allowed(mask, keys), size.scale)
    stand_ins = drawn(size, torch.bfloat16, *PARTS["bounded"])
    got = attend(size, (q, k, v), size.lists(mask).ordered(), keys, stand_ins)
    assert_stands(got, size, (q, k, v), mask, keys, stand_ins)


def test_maxima_that_grow_by_little_and_by_much() -> None:
    size = Size(batch=1, heads=2, q_len=200, kv_len=6 * 64, dim=64, q_block=128, kv_block=64)
    q, k, v = size.qkv(torch.float16)
    q[..., 0] = 8
    k[..., 0] = torch.tensor([0.0, 3, 4, 140, 142, 150]).repeat_interleave(64)
    got = attend(size, (q, k, v), None)
    assert_attention(got, (q, k, v), size.allowed(MASKS["full"](size)), size.scale)


# --- compiled ---------------------------------------------------------------------------------------------------------


class Launched:
    """Stands where the kernel does, and keeps what launches on sm_90 would look up and compile."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.sources: list[GluonASTSource] = []
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._bind = create_function_from_signature(ATTEND.signature, ATTEND.params, self._backend)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return self._launch

    def _launch(self, **arguments: Any) -> None:
        bound, specialization, options = self._bind(**arguments, debug=False, instrumentation_mode="")
        self.keys.add(compute_cache_key({}, specialization, options))
        packed = ATTEND._pack_args(self._backend, options, bound, specialization, options)
        self.sources.append(GluonASTSource(ATTEND, *packed[1:]))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    kernel = Launched()
    monkeypatch.setattr(gluon_kernels, "attend", kernel)
    return kernel


def launch(size: Size, work: str) -> None:
    """One call of this kind of work, a word for each part of it."""
    qkv = size.qkv(torch.bfloat16)
    keys = KEY_MASKS["all"](size) if "masked" in work else None
    if "mass" in work:
        cached = torch.zeros(qkv[0].shape[:3])
        gluon.attention_with_mass(*qkv, cached, size.q_block, size.kv_block, size.scale, keys)
        return
    stand_ins = drawn(size, torch.bfloat16, *PARTS["bounded" if "first order" in work else "means"])
    attend(size, qkv, size.lists(random_mask(size)).ordered(), keys, None if "lists" in work else stand_ins)


WORK = ("lists", "lists, masked", "mass", "mass, masked", "means", "first order", "first order, masked")
SHOWN = {
    "lists": [(128, 128), (128, 64), (72, 128), (64, 128), (64, 64)],
    "lists, masked": [(128, 128), (128, 64), (64, 64)],
    "first order": [(128, 128), (128, 64)],
}
BUILDS = [(work, *size) for work in WORK for size in SHOWN.get(work, [(128, 128)])]


@aot.compiles
@pytest.mark.parametrize(("work", "head_dim", "kv_block"), BUILDS)
def test_ahead_of_time(work: str, head_dim: int, kv_block: int, launched: Launched) -> None:
    launch(Size(batch=1, heads=2, q_len=200, kv_len=200, dim=head_dim, q_block=128, kv_block=kv_block), work)
    kernel = aot.inspected(launched.sources[0], 90, num_warps=4)
    aot.assert_sound(kernel, 90)
    assert aot.COPY_ENGINE in kernel.ptx
    assert aot.SPECIALISED in kernel.ptx


@pytest.mark.parametrize("work", WORK)
def test_one_kernel_for_prompts_of_any_length(work: str, launched: Launched) -> None:
    for batch, length in ((1, 4096), (1, 4097), (2, 4104), (1, 4112), (1, 100)):
        launch(Size(batch, batch, length, length, 64, q_block=128, kv_block=64), work)
    assert len(launched.keys) == 1
    launch(Size(1, 1, 100, 100, 64, q_block=128, kv_block=128), work)
    assert len(launched.keys) == 2  # so the keys tell kernels apart


CASE = Case("attend", torch.bfloat16, 128, 128, 128, 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"dtype": torch.float16, "head_dim": 72, "value_dim": 72, "kv_block": 128}, ""),
        ({"masked": True}, ""),
        ({"q_block": 64}, "blocks of 128 queries and 64 or 128 keys; got 64 and 64"),
        ({"kv_block": 32}, "got 128 and 32"),
        ({"axes": 1}, "no boxes"),
        ({"masked": True, "biased": True}, "no key mask that is added to the scores"),
        ({"dtype": torch.float32}, "bfloat16 and float16; got torch.float32"),
        ({"head_dim": 256, "value_dim": 256}, "heads of at most 128 channels"),
        ({"value_dim": 64}, "as many of keys as of values"),
        ({"copyable": False}, "multiples of 16 bytes"),
        ({"kind": "fused"}, ""),
        ({"summary": "means"}, ""),
        ({"summary": "first-order", "head_dim": 68, "value_dim": 68}, "a multiple of 8 channels; got 68"),
    ],
)
def test_what_is_left_to_the_triton_backend(change: dict[str, Any], reason: str) -> None:
    told = gluon.case_capability(CASE._replace(**change)) or ""
    assert reason in told
    assert bool(told) == bool(reason)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a Hopper GPU")
def test_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("wants a Hopper GPU")
    assert gluon.capability(device) is None
    monkeypatch.setattr(gluon_kernels, "attend", ATTEND)
    for size in [*SIZES, *SUMMARISED_SIZES]:
        qkv, mask, made = size.qkv(torch.bfloat16), random_mask(size), drawn(size, torch.bfloat16, *PARTS["bounded"])
        there, lists = [x.to(device) for x in qkv], size.lists(mask).to(device).ordered()
        moved = StandIns._make(None if x is None else x.to(device) for x in made)
        for keys in (None, *(make(size) for make in KEY_MASKS.values())):
            hidden = None if keys is None else keys.to(device)
            out, lse = attend(size, there, lists, hidden)
            assert_attention((out.cpu(), lse.cpu()), qkv, size.allowed(mask, keys), size.scale)
            out, lse = attend(size, there, lists, hidden, moved)
            assert_stands((out.cpu(), lse.cpu()), size, qkv, mask, keys, made)


@pytest.fixture
def hopper_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as if it were a Hopper GPU."""
    with pretended(monkeypatch, "gluon", "triton"):
        yield


@pytest.mark.parametrize(
    ("block", "dtype", "masked", "wanted"),
    [
        (128, torch.bfloat16, False, "gluon"),
        (64, torch.bfloat16, False, "triton"),
        (128, torch.float32, False, "triton"),
        (128, torch.bfloat16, True, "gluon"),
        (64, torch.bfloat16, True, "triton"),
    ],
)
@pytest.mark.usefixtures("hopper_here")
def test_the_kernel_that_runs_is_named(block: int, dtype: torch.dtype, masked: bool, wanted: str) -> None:
    size = Size(q_len=256, kv_len=256, q_block=block, kv_block=block, dim=64)
    qkv, lists = size.qkv(dtype), size.lists(random_mask(size))
    keys = torch.ones(size.batch, 256, dtype=torch.bool) if masked else None
    choice = dk.kernel_for(*qkv, lists, key_mask=keys)
    assert choice.name == wanted
    assert bool(choice.passed_over) == (wanted == "triton")
    assert all(reason.startswith("gluon: it takes ") for reason in choice.passed_over)
    assert dk.kernel_for(*qkv, key_mask=keys).name == (wanted if block == 128 else "gluon")

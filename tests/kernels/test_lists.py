"""`BlockLists` and the selections: laws, by example and by property."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffsparse_kernels as dk
from diffsparse_kernels import BlockLists, KernelInputError

shapes = st.tuples(*(st.integers(1, high) for high in (2, 3, 7, 9)))


def lists_of(mask: Tensor, block: int = 8, spare: int = 0, width: int | None = None) -> BlockLists:
    q_len, kv_len = (n * block - spare for n in mask.shape[2:])
    return BlockLists.from_mask(mask, q_block=block, kv_block=block, q_len=q_len, kv_len=kv_len, width=width)


@settings(deadline=None, max_examples=60)
@given(shape=shapes, density=st.floats(0, 1), seed=st.integers(0, 2**31), spare=st.integers(0, 7))
def test_lists_and_masks_say_the_same(shape: tuple[int, ...], density: float, seed: int, spare: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    lists = lists_of(mask, spare=spare)
    assert torch.equal(lists.to_mask(), mask)
    assert float(lists.density()) == pytest.approx(mask.float().mean().item())
    assert (lists.idx.dtype, lists.cnt.dtype) == (torch.int16, torch.int32)
    steps = lists.idx.diff(dim=-1)
    inside = torch.arange(1, lists.idx.shape[-1]) < lists.cnt[..., None]
    assert (steps[inside] > 0).all()
    assert lists.nbytes == lists.idx.nbytes + lists.cnt.nbytes


def test_block_masks_there_and_back() -> None:
    mask = torch.rand(2, 3, 4, 5) < 0.5
    lists = lists_of(mask)
    assert torch.equal(BlockLists.from_block_mask(lists.to_block_mask()).to_mask(), mask)


def test_partial_block_masks_are_refused() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    causal = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 256, 256, device="cpu")
    with pytest.raises(KernelInputError, match="full blocks only"):
        BlockLists.from_block_mask(causal)


def test_a_given_width_keeps_the_first() -> None:
    lists = lists_of(torch.ones(1, 1, 2, 5, dtype=torch.bool), width=3)
    assert lists.idx.tolist() == [[[[0, 1, 2], [0, 1, 2]]]]
    assert lists.cnt.tolist() == [[[3, 3]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"idx": torch.zeros(1, 2, 3, dtype=torch.int32)}, "wanted idx"),
        ({"idx": torch.zeros(1, 2, 3, 4)}, "int32"),
        ({"q_block": 0}, "at least 1 token"),
        ({"q_len": 30}, "want lists for"),
        ({"cnt": torch.zeros(1, 2, 4, dtype=torch.int32)}, "wanted idx"),
    ],
    ids=["three-axes", "float", "zero-block", "length", "count-shape"],
)
def test_lists_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    right = {
        "idx": torch.zeros(1, 2, 3, 4, dtype=torch.int32),
        "cnt": torch.zeros(1, 2, 3, dtype=torch.int32),
        "q_block": 8,
        "kv_block": 8,
        "q_len": 24,
        "kv_len": 32,
    }
    BlockLists(**right)  # type: ignore[arg-type]
    with pytest.raises(KernelInputError, match=message):
        BlockLists(**{**right, **change})  # type: ignore[arg-type]


def test_masks_that_make_no_sense_are_refused() -> None:
    sizes = {"q_block": 8, "kv_block": 8, "q_len": 16, "kv_len": 16}
    with pytest.raises(KernelInputError, match="bool mask"):
        BlockLists.from_mask(torch.ones(1, 1, 2, 2), **sizes)
    with pytest.raises(KernelInputError, match="mask of 2 x 2"):
        BlockLists.from_mask(torch.ones(1, 1, 2, 3, dtype=torch.bool), **sizes)


@settings(deadline=None, max_examples=60)
@given(shape=shapes, keep=st.integers(0, 9), seed=st.integers(0, 2**31), ties=st.booleans())
def test_rows_keep_the_best(shape: tuple[int, ...], keep: int, seed: int, ties: bool) -> None:
    """Exactly `keep` in each row, none of them worse than one left out, lower numbers first among equals."""
    mass = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    mass = (mass * 3).round() if ties else mass
    mask = dk.select_rows(mass, keep)
    assert (mask.sum(-1) == min(keep, shape[-1])).all()
    want = torch.zeros_like(mask)
    for row in torch.cartesian_prod(*(torch.arange(n) for n in shape[:-1])).view(-1, 3).tolist():
        place = tuple(row)
        best = sorted(range(shape[-1]), key=lambda i, place=place: (-mass[place][i].item(), i))
        want[place][best[:keep]] = True
    assert torch.equal(mask, want)


def test_rows_with_blocks_that_always_stay() -> None:
    mass = torch.tensor([[5.0, 4, 3, 2, 1], [1, 2, 3, 4, 5]])[None, None]
    always = torch.tensor([[False, False, False, False, True], [True, True, True, False, False]])
    mask = dk.select_rows(mass, 2, always)[0, 0]
    assert mask.tolist() == [[True, False, False, False, True], [True, True, True, False, False]]


def test_rows_with_a_number_for_each_head_and_nan() -> None:
    mass = torch.tensor([[3.0, 2, 1], [torch.nan, 1, 2]])[None, :, None]
    mask = dk.select_rows(mass, torch.tensor([[1, 2]]))
    assert mask[0, :, 0].tolist() == [[True, False, False], [False, True, True]]


@settings(deadline=None, max_examples=60)
@given(shape=shapes, share=st.floats(0.01, 1), seed=st.integers(0, 2**31))
def test_mass_is_held_by_the_fewest(shape: tuple[int, ...], share: float, seed: int) -> None:
    mass = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 1e-3
    mask = dk.select_mass(mass, share)
    held = (mass * mask).sum(-1) / mass.sum(-1)
    assert (held >= share - 1e-5).all()
    weakest = mass.masked_fill(~mask, torch.inf).amin(-1)
    assert (held - weakest / mass.sum(-1) < share + 1e-5).all()
    assert (mass.masked_fill(mask, -1).amax(-1) <= weakest).all()


@settings(deadline=None, max_examples=60)
@given(shape=shapes, density=st.floats(0.01, 1), seed=st.integers(0, 2**31), octaves=st.floats(0, 30))
def test_heads_keep_their_share_by_one_threshold(
    shape: tuple[int, ...], density: float, seed: int, octaves: float
) -> None:
    mass = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).mul(-octaves).exp2()
    mask = dk.select_heads(mass, density)
    size = shape[2] * shape[3]
    flat, kept = mass.flatten(2), mask.flatten(2)
    assert (kept.sum(-1) >= density * size - 1e-4).all()
    assert mask.any(-1).all()
    # A threshold finer than 1/100 octave: what is kept is at most that much under the exact k-th largest.
    exact = flat.sort(-1, descending=True).values[..., max(0, int(-(-density * size // 1)) - 1)]
    best = mass.amax(-1, keepdim=True).expand_as(mass).flatten(2) == flat
    assert (flat >= exact[..., None] * 2 ** (-40 / 4000))[kept & ~best].all()


def test_a_bin_counts_beyond_what_float32_can() -> None:
    """24 heads of a long video hold more blocks than 2^24, and with `Digest` they are one histogram."""
    many, few = 2**24 + 2**20, 2**19
    mass = torch.cat([torch.ones(many), torch.full((few,), 0.5)])[None, None, None]
    assert int(dk.select_heads(mass, (2**24 + 2**18) / (many + few)).sum()) == many


@pytest.mark.parametrize(("density", "blocks", "kept"), [(0.7, 10, 7), (0.1, 30, 3), (0.25, 10, 3)])
def test_a_share_is_rounded_up_once(density: float, blocks: int, kept: int) -> None:
    mass = torch.arange(blocks, 0, -1.0)[None, None, None].exp2()
    assert int(dk.select_heads(mass, density).sum()) == kept


def test_heads_of_zero_and_nan_mass() -> None:
    assert dk.select_heads(torch.zeros(1, 1, 3, 3), 0.5).any(-1).all()
    assert dk.select_heads(torch.full((1, 1, 3, 3), torch.nan), 0.5).any(-1).all()


@settings(deadline=None, max_examples=40)
@given(shape=shapes, density=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_the_order_has_every_list_once_and_the_longest_first(shape: tuple[int, ...], density: float, seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    lists = lists_of(mask).ordered()
    assert lists.order is not None
    assert torch.equal(lists.order.sort().values, torch.arange(lists.cnt.numel()))
    in_order = lists.cnt.flatten()[lists.order.long()].view(-1, shape[2])  # [heads, nQ]
    assert (in_order.diff(dim=1) <= 0).all()
    assert (in_order.sum(1).diff() <= 0).all()
    assert lists.to("cpu").order is not None


def test_an_order_of_other_lists_is_refused() -> None:
    lists = lists_of(torch.ones(1, 2, 3, 4, dtype=torch.bool)).ordered()
    assert lists.order is not None
    with pytest.raises(KernelInputError, match="the order of 6 lists"):
        dataclasses.replace(lists, order=lists.order[:-1])


def search(mass: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    """All that a search does after the mass is known."""
    sizes = {"q_block": 8, "kv_block": 8, "q_len": 60, "kv_len": 70}
    found = []
    for mask in (
        dk.select_rows(mass, 3),
        dk.select_rows(mass, keep, mass[0, 0] > 0.9),
        dk.select_heads(mass, 0.3),
        dk.select_mass(mass, 0.8),
    ):
        lists = BlockLists.from_mask(mask, **sizes, width=9)
        found += [lists.idx, lists.cnt, lists.ordered().order, lists.density(), lists.to_mask()]
    return tuple(found)


def test_a_search_on_a_device_waits_for_nothing() -> None:
    """Meta tensors are on a device that has no values to give."""
    mass, keep = torch.rand(2, 3, 8, 9, device="meta"), torch.ones(2, 3, dtype=torch.int64, device="meta")
    assert all(x.device.type == "meta" for x in search(mass, keep))
    lists = BlockLists.from_mask(dk.select_rows(mass, 3), q_block=8, kv_block=8, q_len=60, kv_len=70)
    assert lists.idx.shape == (2, 3, 8, 9)  # not as wide as the longest list, for which one would have to ask
    assert lists.order is not None
    with pytest.raises(RuntimeError, match="meta tensors"):
        float(lists.density())


def test_a_search_compiles_into_one_graph() -> None:
    mass, keep = torch.rand(2, 3, 8, 9), torch.randint(1, 9, (2, 3))
    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(mass, keep), search(mass, keep), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("samples", [1, 2])
def test_heads_as_samples(samples: int) -> None:
    mask = torch.rand(samples, 3, 5, 7) < 0.5
    lists = BlockLists.from_mask(mask, q_block=16, kv_block=16, q_len=80, kv_len=112).ordered()
    apart = lists.by_head(2)
    assert torch.equal(apart.to_mask(), mask.expand(2, -1, -1, -1).flatten(0, 1)[:, None])
    assert apart.order is not None
    assert lists.order is not None
    assert torch.equal(apart.order.sort().values, torch.arange(2 * 3 * 5, dtype=torch.int32))
    assert torch.equal(apart.order[: lists.order.numel()], lists.order)

"""`BlockLists` and the selections: laws, by example and by property."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffsparse_kernels as dk
from diffsparse_kernels import BlockLists, KernelInputError, select, strips
from diffsparse_kernels.lists import from_bits, to_bits
from support.memory import Peak

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


def by_sorting(error: Tensor, share: float, above: float) -> Tensor:
    """What is taken of each group [G, R, nK]: the best of its rows, then the largest others, of equals the first.

    above: what is no more counts for nothing.
    """
    mask = torch.zeros(error.shape, dtype=torch.bool)
    for flat, one in zip(error.nan_to_num(0, 0, 0).clamp(min=0), mask, strict=True):
        best = flat.argmax(-1) + torch.arange(len(flat)) * flat.shape[1]
        values, firsts = flat.flatten().tolist(), set(best.tolist())
        ranked = sorted(range(len(values)), key=lambda i: (i not in firsts, -values[i], i))
        ranked = [i for i in ranked if values[i] > above]
        wanted = math.ceil(round(share * len(values), 6))
        one.view(-1)[ranked[: max(wanted, len(firsts & set(ranked)))]] = True
    return mask


@pytest.fixture(params=[False, True], ids=["at once", "row by row"])
def strip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(strips, "_CACHE_BYTES", 1)


WORLDS = st.sampled_from(["distinct", "equal", "odd", "nothing"])


def errors_of(shape: tuple[int, ...], seed: int, world: str) -> Tensor:
    """Over 20 octaves; some equal; or some neither finite nor positive; or all zero."""
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(shape, generator=generator).mul(-20).exp2()
    if world == "equal":
        return (3 * errors).round()
    if world == "nothing":
        return torch.zeros(shape)
    if world == "odd":
        for strange in (torch.nan, torch.inf, -torch.nan, -1.0, -0.0):
            errors[torch.rand(shape, generator=generator) < 0.1] = strange
    return errors


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes, density=st.floats(0.001, 1), seed=st.integers(0, 2**31), world=WORLDS)
def test_heads_keep_exactly_their_share(
    shape: tuple[int, ...], density: float, seed: int, world: str, strip: None
) -> None:
    mass = errors_of(shape, seed, world)
    mask, rows, blocks = dk.select_heads(mass, density), shape[2], shape[2] * shape[3]
    assert (mask.sum((-2, -1)) == max(math.ceil(round(density * blocks, 6)), rows)).all()
    assert torch.equal(mask.flatten(0, 1), by_sorting(mass.flatten(0, 1), density, -1))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes, share=st.floats(0, 1), seed=st.integers(0, 2**31), world=WORLDS, text=st.booleans())
def test_lists_of_the_largest_errors(
    shape: tuple[int, ...], share: float, seed: int, world: str, text: bool, strip: None
) -> None:
    """One budget for all heads; what is listed anyway has no part in it, and what is nothing takes none of it."""
    error = errors_of(shape, seed, world)
    always = torch.rand(shape[2:], generator=torch.Generator().manual_seed(seed)) < 0.2 if text else None
    apart = torch.zeros(shape[2:], dtype=torch.bool) if always is None else always
    lists = dk.lists_of_largest(error, share, **square(shape), always=always)
    counted = error.masked_fill(apart, 0)
    mask = by_sorting(counted.flatten(1, 2), share, 0).view(shape)
    assert torch.equal(lists.to_mask(), mask | apart)
    again = dk.lists_of_bits(lists.packed(), **square(shape))
    assert lists.order is not None
    assert again.order is not None
    plain = BlockLists.from_mask(mask | apart, **square(shape)).ordered()
    for got in (lists, again):
        assert torch.equal(got.idx, plain.idx)
        assert torch.equal(got.cnt, plain.cnt)
        assert got.order.equal(plain.order)
        assert torch.equal(got.packed(), to_bits(mask | apart))


def test_lists_of_some_heads_are_chosen_among_all() -> None:
    error = errors_of((2, 4, 5, 9), 0, "equal")
    whole = dk.lists_of_largest(error, 0.3, **square(error.shape)).to_mask()
    some = dk.lists_of_largest(error, 0.3, **square(error.shape), heads=(1, 3))
    assert torch.equal(some.to_mask(), whole[:, 1:3])


def test_what_is_forty_octaves_down_is_nothing() -> None:
    error = torch.tensor([[8.0, 2.0**-35, 2.0**-37.5], [2.0**-38, 0, 0]])[None, None]
    assert dk.lists_of_largest(error, 1.0, **square(error.shape)).to_mask().tolist() == [
        [[[True, True, False], [False, False, False]]]
    ]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes, seed=st.integers(0, 2**31), text=st.booleans(), by_head=st.booleans())
def test_lists_of_the_best_of_rows(shape: tuple[int, ...], seed: int, text: bool, by_head: bool, strip: None) -> None:
    generator = torch.Generator().manual_seed(seed)
    mass = errors_of(shape, seed, "equal")
    always = torch.rand(shape[2:], generator=generator) < 0.2 if text else None
    keep = torch.randint(1, shape[3] + 1, shape[:2], generator=generator)
    number = keep if by_head else int(keep[0, 0])
    lists = dk.lists_of_rows(mass, number, **square(shape), always=always)
    assert torch.equal(lists.to_mask(), dk.select_rows(mass, number, always))
    assert lists.bits is not None


def test_selection_and_lists_take_bounded_memory() -> None:
    """One layer of a million tokens, 24 heads in blocks of 128, from what 131,072 tokens take: under 4 GiB."""
    longer, heads, room = 10**6, 24, 4 * 2**20
    for some in (1, 2):
        error = torch.rand(1, some, 1024, 1024)
        calls = {
            "largest": lambda error=error: select.lists_of_largest(error, 0.2, None, (0, error.shape[1])),
            "rows": lambda error=error: select.lists_of_bits(select.bits_of_rows(error, 205, None), 1024),
        }
        for name, call in calls.items():
            with Peak() as peak:
                made = call()
            bits = 0 if name == "largest" else error.numel() // 8
            assert peak.bytes - bits - sum(x.nbytes for x in made) < 1.5 * room, name
        mask = error > 0.8
        with Peak() as peak:
            lists = BlockLists.from_mask(mask, **square(error.shape))
        assert peak.bytes - lists.nbytes < 1.5 * room
    blocks = -(-longer // 128)
    whole = heads * blocks * (2 * blocks + blocks / 8 + 24)  # as wide as can be, bits, and what there is of a row
    assert whole + 1.5 * strips._DEVICE_BYTES < 4 * 2**30


def test_lists_are_trimmed_to_their_longest() -> None:
    mask = torch.zeros(1, 2, 3, 9, dtype=torch.bool)
    mask[0, 1, 2, 3:7] = True
    wide = lists_of(mask, width=9)
    trimmed = wide.trimmed(4)
    assert trimmed.idx.shape == (1, 2, 3, 4)
    assert trimmed.idx.is_contiguous()
    assert torch.equal(trimmed.to_mask(), mask)
    assert trimmed.trimmed(4) is trimmed
    assert lists_of(mask[:, :1], width=9).trimmed(0).idx.shape == (1, 1, 3, 1)


def square(shape: tuple[int, ...], block: int = 8) -> dict[str, int]:
    return {"q_block": block, "kv_block": block, "q_len": shape[2] * block, "kv_len": shape[3] * block}


def test_more_blocks_than_float32_counts() -> None:
    """24 heads of a long video hold more than 2^24, and in `Tangent` they are one group."""
    many, few = 2**24 + 2**20, 2**19
    mass = torch.cat([torch.ones(many), torch.full((few,), 0.5)])[None, None, None]
    mask = dk.select_heads(mass, (2**24 + 2**18) / (many + few))
    assert int(mask.sum()) == 2**24 + 2**18
    assert mask[..., : 2**24 + 2**18].all()


@pytest.mark.parametrize(("density", "blocks", "kept"), [(0.7, 10, 7), (0.1, 30, 3), (0.25, 10, 3)])
def test_a_share_is_rounded_up_once(density: float, blocks: int, kept: int) -> None:
    mass = torch.arange(blocks, 0, -1.0)[None, None, None].exp2()
    assert int(dk.select_heads(mass, density).sum()) == kept


@pytest.mark.parametrize("length", [1, 7, 8, 9, 70])
def test_bits(length: int) -> None:
    mask = torch.rand(2, 3, 5, length) < 0.5
    bits = to_bits(mask)
    assert bits.shape == (2, 3, 5, -(-length // 8))
    assert bits.dtype == torch.uint8
    assert torch.equal(from_bits(bits, length), mask)


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


def test_lists_have_room_for_a_block() -> None:
    counts = torch.zeros(1, 2, 2, dtype=torch.int32)
    with pytest.raises(KernelInputError, match="1 to 2 wide; got 2 rows, 0 wide"):
        BlockLists(counts[..., None].expand(-1, -1, -1, 0), counts, 32, 32, 64, 64)
    with pytest.raises(KernelInputError, match="at least one block"):
        BlockLists.from_mask(torch.ones(0, 2, 2, 2) > 0, q_block=32, kv_block=32, q_len=64, kv_len=64)

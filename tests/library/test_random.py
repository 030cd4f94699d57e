"""The control: as many blocks as any method, but drawn by lot."""

from __future__ import annotations

import pytest
import torch

import diffsparse
from diffsparse import GNA, AdaSpa, Compensated, Layout, PAROSearch, Random, Schedule, SparseVDiTSearch
from diffsparse.errors import BackendError, ConfigError
from diffsparse.strategies.base import found_orders, in_order
from diffsparse.strategies.work import Outline
from support import exact
from support.sites import site
from support.tiny_transformers import build, inputs, tensors

ALWAYS = Schedule(dense_first=0)


def test_its_density_is_the_one_asked_for_and_its_seed_decides() -> None:
    model, kwargs = build("WanTransformer3DModel"), inputs("WanTransformer3DModel")
    outs = {}
    for seed in (0, 0, 1):
        with diffsparse.apply(model, Random(0.5, seed=seed, block=8), schedule=ALWAYS) as handle:
            out = tensors(model, kwargs)[0]
        assert handle.report().sparse_density == pytest.approx(5 / 9)  # half of 9 blocks, rounded up
        assert torch.equal(outs.setdefault(seed, out), out)
    assert not torch.equal(outs[0], outs[1])


def test_text_is_always_kept() -> None:
    model, kwargs = build("HunyuanVideoTransformer3DModel"), inputs("HunyuanVideoTransformer3DModel")
    lists = []

    class Watched(Random):
        def attend(self, q, k, v, site):  # type: ignore[no-untyped-def]
            out = super().attend(q, k, v, site)
            lists.append(site.memory["lists"].to_mask())
            return out

    with diffsparse.apply(model, Watched(0.8, block=8), schedule=ALWAYS):
        tensors(model, kwargs)
    assert lists
    for mask in lists:  # 72 tokens of video, 6 of text in the last block
        assert mask[..., -1].all()
        assert mask[..., -1, :].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(128, 64), (64, 128), (32, 64), 64], ids=str)
@pytest.mark.parametrize("layout", [Layout(5, 9, 11), Layout(4, 9, 11, text_before=13, text_after=70)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_blocks_of_any_sides_are_what_is_attended_to(
    layout: Layout, block: int | tuple[int, int], dtype: torch.dtype
) -> None:
    """In two samples with hidden keys: the lists as a mask of tokens, the rows' counts, text, and what is reported."""
    rows, columns = (block, block) if isinstance(block, int) else block
    n, scale = layout.tokens, 16**-0.5
    q, k, v = (torch.randn(2, 3, n, 16, dtype=dtype) for _ in range(3))
    keys = torch.ones(2, n, dtype=torch.bool)
    keys[0, 100:300], keys[1, -5:] = False, False
    here = site(layout, key_mask=keys)
    strategy = Random(0.7, block=block)
    out = strategy.attend(q, k, v, here)
    mask = here.memory["lists"].to_mask()
    allowed = exact.element_mask(mask, rows, columns, n, n) & keys[:, None, None]
    want, _ = exact.softmax_attention(q, k, v, allowed, scale)
    assert (out.double() - want).abs().max() <= exact.tolerance(want, exact.eager(q, k, v, allowed, scale))

    text = torch.ones(n, dtype=torch.bool)
    text[layout.span] = False
    by_row, by_column = (torch.tensor([part.any() for part in text.split(side)]) for side in (rows, columns))
    assert mask[..., by_column].all()
    assert mask[:, :, by_row].all()
    kept = int(by_column.sum()) + round(0.3 * int((~by_column).sum()))
    assert (mask[:, :, ~by_row].sum(-1) == kept).all()
    density = float(mask.float().mean())
    assert float(here.record.density) == pytest.approx(density)
    assert strategy.expected(Outline.of(ALWAYS, 3, layout))[1].density == pytest.approx(density)


@pytest.mark.parametrize("block", [32, (64, 32), (8, 32)], ids=str)
def test_orders_gather_blocks_of_keys(block: int | tuple[int, int]) -> None:
    """Order "auto" makes boxes of them: blocks of queries are runs of boxes, or parts of one."""
    layout, strategy = Layout(4, 8, 8), Random(0.5, block=block, order="auto")
    frame, row, column = torch.cartesian_prod(*(torch.arange(side) for side in (4, 8, 8))).T
    boxes = torch.randn(8, 16)[(frame // 2) * 4 + (row // 4) * 2 + column // 4]  # each of 2 x 4 x 4 tokens
    x = (boxes + 0.1 * torch.randn(3, layout.tokens, 16))[None]
    here = site(layout)
    in_order(strategy, strategy.attend, (x, x, x), here)
    assert found_orders(strategy, here) == ("tile2x4x4",) * 3


@pytest.mark.parametrize("make", [GNA, PAROSearch, SparseVDiTSearch])
def test_windows_and_plans_want_square_blocks(make: type) -> None:
    with pytest.raises(ConfigError, match=r"such as 64: windows and plans are of square blocks; got \(128, 64\)"):
        make(block=(128, 64))


def test_a_backend_that_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a strategy whose first question is how dense it may be."""
    monkeypatch.setenv("DIFFSPARSE_BACKEND", "fast")
    model, kwargs = build("WanTransformer3DModel"), inputs("WanTransformer3DModel")
    for strategy in (Random(0.5, block=8), Compensated(Random(0.5, block=8)), GNA(block=8), AdaSpa(0.5, block=8)):
        with diffsparse.apply(model, strategy, schedule=ALWAYS), pytest.raises(BackendError, match="called 'fast'"):
            tensors(model, kwargs)


@pytest.mark.parametrize("knobs", [{"seed": -1}, {"seed": 0.5}, {"sparsity": 1.0}, {"block": 0}, {"block": (8, 0)}])
def test_bad_knobs_are_refused(knobs: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="wants"):
        Random(**knobs)  # type: ignore[arg-type]

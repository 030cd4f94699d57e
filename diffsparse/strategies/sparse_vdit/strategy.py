"""Sparse-vDiT: one of five patterns for each head and step, found offline along real runs (arXiv 2506.03065)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.orders.layout import Layout
from diffsparse.orders.named import RASTER
from diffsparse.orders.per_head import HeadOrders
from diffsparse.site.compute import Blocks, Site
from diffsparse.strategies.blocks import check_count, check_number, check_share, check_square, keep_count, with_text
from diffsparse.strategies.planned import Check, Part, Planned, group_of, list_of, one_of, optional
from diffsparse.strategies.work import Outline, Step
from diffsparse_kernels import BlockLists, select_rows

MODES = ("full", "skip", "diagonal", "multi-diagonal", "stripe")
FULL, SKIP, DIAGONAL, MULTI_DIAGONAL, STRIPE = range(len(MODES))
_ORDERS = (RASTER, "HWF")  # multi-diagonal heads: frame-major to spatial-major


@dataclass(frozen=True, repr=False)
class SparseVDiT(Planned):
    """One pattern for each head, layer and step, chosen offline (arXiv 2506.03065).

    Of n video blocks at a sparsity s, every row of a sparse head keeps k = round((1 - s) n) key blocks:

    - full: all of them, on the user's own backend;
    - skip: none, the output is zero;
    - diagonal: the k blocks nearest to the row's own, moved inwards at the ends;
    - multi-diagonal: the same with the tokens in the order HWF, in which a place is next to itself in other frames;
    - stripe: the k key blocks with the most softmax mass in the search, the same ones for all rows.

    `diffsparse calibrate --strategy sparse-vdit` makes the plan; `SparseVDiT.load(path)` reads it. The paper leaves
    widths, columns and text open. Here text is always kept: rows that hold text are dense in every mode, columns that
    hold text are kept in every mode but skip, whose other rows are zero.

    All heads that aren't full run in one kernel call, each with its own list and order.

    Widths and places are relative, so a plan serves other sizes and numbers of frames too, and the report says so: k
    follows from s, columns lie at the same fraction of the video, steps at the same fraction of the run.

    Attributes:
        plan: settings `sparsity`, `block`; for each layer `modes`, uint8 [steps or groups, H], numbers of `MODES`, and
            `columns`, float32 [H, n], the share of each head's mass in each key block.
    """

    _plan_of = "sparse-vdit"
    _needed = frozenset({"sparsity", "block"})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Attention over q, k, v [B, H, N, D], each head by its mode."""
        table = site.shard.own(self.plan.part(site.model, site.layer, "modes"), -1)
        modes = table[group_of(site.step, site.steps, len(table))]  # [H], on the CPU
        site.record.heads = tuple(MODES[mode] for mode in modes)
        if site.layout.grid != self.plan.layout:
            site.record.note = f"a plan of {self.plan.layout} serves {site.layout.grid}"
        full, sparse = ((modes == FULL) == wanted for wanted in (True, False))
        if not sparse.any():
            return site.dense(q, k, v, reason="all heads full")
        if not full.any():
            return self._sparse(q, k, v, modes, site)
        full, rest = (which.nonzero()[:, 0].to(q.device) for which in (full, sparse))
        out = v.new_empty(v.shape)
        out[:, full] = site.dense(q[:, full], k[:, full], v[:, full], reason="full heads")
        out[:, rest] = self._sparse(q[:, rest], k[:, rest], v[:, rest], modes, site)
        return out

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, modes: Tensor, site: Site) -> Tensor:
        """The heads that aren't full; q, k, v hold no others."""
        settings, sparse = self.plan.settings, modes != FULL
        orders = head_orders(modes[sparse], site.layout, q.device)
        if site.memory.get("modes") != (chosen := tuple(modes.tolist())):
            columns = site.shard.own(self.plan.part(site.model, site.layer, "columns"))[sparse]
            layout = site.layout.text_last()
            lists = head_lists(modes[sparse], columns, layout, settings["sparsity"], settings["block"], q.device)
            site.memory.update(modes=chosen, lists=lists)
        return site.sparse(q, k, v, Blocks(site.memory["lists"], orders, heads=len(modes)))

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes: by the modes of the plan's layers."""
        tables = [x for name, x in self.plan.tensors.items() if name.endswith(".modes")]
        held: list[tuple[int, ...]] = [()] * len(tables)

        def sparse(step: int) -> Step:
            densities, new = [], 0
            for layer, table in enumerate(tables):
                modes = tuple(table[group_of(step, run.steps, len(table))].tolist())
                densities.append(self._density(modes, run.layout or self.plan.layout))
                if modes != held[layer] and set(modes) != {FULL}:
                    held[layer], new = modes, new + 1
            return Step("sparse", sum(densities) / len(tables), new=new / len(tables))

        return run.each(sparse)

    def _density(self, modes: tuple[int, ...], layout: Layout) -> float:
        """Share of attention that heads in `modes` compute."""
        sparsity, block = self.plan.settings["sparsity"], self.plan.settings["block"]
        blocks = layout.grid.blocks(block)
        kept = with_text(keep_count(sparsity, blocks) / blocks, block, layout)
        text = int(layout.exact_keys(block).sum()) / layout.blocks(block)
        shares = {FULL: 1.0, SKIP: text}  # rows that hold text are dense in skipped heads too
        return sum(shares.get(mode, kept) for mode in modes) / len(modes)

    @staticmethod
    def _settings() -> dict[str, Check]:
        return {
            "sparsity": check_share,
            "block": lambda _, block: check_square(block),
            "groups": optional(check_count),
            "modes": list_of(one_of(*MODES[1:]), most=len(MODES)),
            "costs": list_of(check_number, most=len(MODES)),
            "cost": one_of("sparsity", "time"),
            **dict.fromkeys(("epsilon", "weight"), check_number),
            "looks": check_count,
        }

    def _parts(self, settings: dict[str, Any], layout: Layout) -> dict[str, Part]:
        return {
            "modes": Part(torch.uint8, (settings.get("groups") or ..., None), below=len(MODES)),
            "columns": Part(torch.float32, (None, layout.blocks(settings["block"]))),
        }

    def facts(self) -> dict[str, str]:
        """Share of heads, layers and steps in each mode."""
        tables = [x for name, x in self.plan.tensors.items() if name.endswith(".modes")]
        counts = Counter(int(mode) for table in tables for mode in table.flatten())
        shares = (f"{mode} {counts[number] / counts.total():.1%}" for number, mode in enumerate(MODES))
        return {"modes": ", ".join(shares)}


def head_orders(modes: Tensor, layout: Layout, device: torch.device) -> HeadOrders:
    """Spatial-major tokens for the heads that are multi-diagonal, raster order for the others; text last."""
    return HeadOrders.of(_ORDERS, modes == MULTI_DIAGONAL, layout, device)


def head_lists(
    modes: Tensor, columns: Tensor, layout: Layout, sparsity: float, block: int, device: torch.device
) -> BlockLists:
    """The blocks of heads in sparse `modes`, integers [H], whose columns weigh `columns`, float [H, some blocks].

    Args:
        layout: with all text behind the video.
    """
    blocks, keep = layout.grid.blocks(block), keep_count(sparsity, layout.grid.blocks(block))
    modes = modes.to(device, non_blocking=True)[:, None, None]  # [H, 1, 1]
    columns = columns.to(device, non_blocking=True)[:, None]  # [H, 1, any]
    place = torch.arange(blocks, device=device)
    nearest = select_rows(-(place[:, None] - place).abs().float(), keep)  # [n, n]
    stripes = select_rows(_resampled(columns, blocks), keep)  # [H, 1, n]
    video = torch.where(modes == STRIPE, stripes, nearest) & (modes != SKIP)  # [H, n, n]
    missing = layout.blocks(block) - blocks
    text = layout.exact_keys(block).to(device, non_blocking=True)
    mask = F.pad(video, (0, missing, 0, missing)) | text[:, None] | (text & (modes != SKIP))
    sizes = {"q_block": block, "kv_block": block, "q_len": layout.tokens, "kv_len": layout.tokens}
    # Rows of text list every block; without them the width is known, and no device is asked for it.
    return BlockLists.from_mask(mask[None], **sizes, width=None if layout.has_text else keep)


def _resampled(columns: Tensor, blocks: int) -> Tensor:
    """columns [H, 1, n] at the same fractions of another number of blocks."""
    return columns if columns.shape[-1] == blocks else F.interpolate(columns, size=blocks, mode="area")

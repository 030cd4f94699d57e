"""PAROAttention: a token order for each head and static block masks, both found offline (arXiv 2506.16054)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.orders.layout import Layout
from diffsparse.orders.named import check_order
from diffsparse.orders.per_head import HeadOrders
from diffsparse.site.compute import Blocks, Site
from diffsparse.strategies.blocks import check_count, check_number, check_share, check_square, with_text
from diffsparse.strategies.planned import Check, Part, Planned, group_of, list_of, one_of
from diffsparse.strategies.work import Outline, Step
from diffsparse_kernels import BlockLists
from diffsparse_kernels.lists import from_bits, to_bits

MOST_ORDERS = 256  # their numbers are bytes
MEASURED = ("queries", "keys", "map")  # whose incoherence is in the plan


@dataclass(frozen=True, repr=False)
class PARO(Planned):
    """Pattern-aware reordering with static block masks (arXiv 2506.16054).

    Each head attends with its tokens in the order that gathers its attention in few blocks (section 4.1); the blocks
    it keeps were found offline for a few groups of steps (section 4.2) and are the same for all prompts.
    `diffsparse calibrate --strategy paro` makes the plan; `PARO.load(path)` reads it. Text never moves, and blocks
    that hold text are always kept. Skipped blocks are left out of the softmax, as in the authors' kernel.

    Attributes:
        plan: settings `sparsity`, `block`, `orders` (names), `groups`, `bits` (of both products); for each layer
            `orders`, uint8 [H], and `masks`, bits of bool [groups, H, n, n] over the n blocks of the video. Below 16
            bits queries, keys, values and softmax weights are rounded block by block (emulated: exact and slow), and
            `incoherence`, float32 [raster or own order, `MEASURED`, H], how hard that was.
    """

    needs_grid = True
    _plan_of = "paro"
    _needed = frozenset({"sparsity", "block", "orders", "groups"})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Block-sparse attention over q, k, v [B, H, N, D] in each head's order."""
        self.plan.check_layout(site.layout)
        settings = self.plan.settings
        picked = site.shard.own(self.plan.part(site.model, site.layer, "orders"))
        orders = HeadOrders.of(tuple(settings["orders"]), picked, site.layout, q.device)
        group = group_of(site.step, site.steps, settings["groups"])
        if site.memory.get("group") != group:
            site.memory.update(group=group, lists=self._lists(site, group, q.device))
        return site.sparse(q, k, v, Blocks(site.memory["lists"], orders, bits=settings.get("bits", 16)))

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes: by the plan's masks, over all layers."""
        groups, layout = self.plan.settings["groups"], run.layout or self.plan.layout
        shares = [with_text(self._kept(group), self.plan.settings["block"], layout) for group in range(groups)]
        numbers = [group_of(step, run.steps, groups) for step in range(run.steps)]

        def sparse(step: int) -> Step:
            new = step == run.first or numbers[step] != numbers[step - 1]
            return Step("sparse", shares[numbers[step]], new=float(new))

        return run.each(sparse)

    def _kept(self, group: int) -> float:
        """Share of the video's blocks that the masks of a group keep, over layers and heads."""
        blocks = self.plan.layout.blocks(self.plan.settings["block"])
        masks = [x[group] for name, x in self.plan.tensors.items() if name.endswith(".masks")]  # [H, bytes] each
        kept = sum(int.from_bytes(bits.numpy().tobytes()).bit_count() for bits in masks)
        return kept / (blocks**2 * sum(map(len, masks)))

    @staticmethod
    def _settings() -> dict[str, Check]:
        return {
            "sparsity": check_share,
            "block": lambda _, block: check_square(block),
            "orders": list_of(lambda _, order: check_order(order), most=MOST_ORDERS),
            "groups": check_count,
            "metric": one_of("recall", "paper"),
            "alpha": check_number,
            "bits": one_of(16, 8, 4),
        }

    def _parts(self, settings: dict[str, Any], layout: Layout) -> dict[str, Part]:
        bits = layout.blocks(settings["block"]) ** 2
        return {
            "orders": Part(torch.uint8, (None,), below=len(settings["orders"])),
            "masks": Part(torch.uint8, (settings["groups"], None, -(-bits // 8))),
            "incoherence": Part(torch.float32, (2, len(MEASURED), None), needed=False),
        }

    def facts(self) -> dict[str, str]:
        """How many heads have each order; where bits are few, the mean incoherence before and after reordering."""
        names = self.plan.settings["orders"]
        counts = Counter(names[int(i)] for name, x in self.plan.tensors.items() if name.endswith(".orders") for i in x)
        found = {"orders": ", ".join(f"{name} x{count}" for name, count in counts.most_common())}
        measured = [x.mean(-1) for name, x in self.plan.tensors.items() if name.endswith(".incoherence")]
        if measured:
            figures = torch.stack(measured).mean(0).T.tolist()  # [queries, keys and map][raster and own order]
            parts = (f"{what} {raster:.1f} -> {own:.1f}" for what, (raster, own) in zip(MEASURED, figures, strict=True))
            found["incoherence"] = ", ".join(parts)
        return found

    def _lists(self, site: Site, group: int, device: torch.device) -> BlockLists:
        block, layout = self.plan.settings["block"], site.layout.text_last()
        masks = site.shard.own(self.plan.part(site.model, site.layer, "masks")[group])
        video = unpack(masks, layout.grid.blocks(block))
        rest = layout.blocks(block) - video.shape[-1]
        mask = F.pad(video, (0, rest, 0, rest), value=True)[None]
        sink = layout.sink(block)
        mask = mask if sink is None else mask | sink
        sizes = {"q_block": block, "kv_block": block, "q_len": layout.tokens, "kv_len": layout.tokens}
        return BlockLists.from_mask(mask, **sizes).to(device)  # made where its width is known without waiting


def pack(masks: Tensor) -> Tensor:
    """bool [..., nQ, nK] to bits, uint8 [..., bytes]."""
    return to_bits(masks.flatten(-2).cpu())


def unpack(bits: Tensor, blocks: int) -> Tensor:
    """The inverse of `pack` for square masks: bool [..., blocks, blocks]."""
    return from_bits(bits, blocks * blocks).view(*bits.shape[:-1], blocks, blocks)

"""The offline search of Sparse-vDiT: modes chosen along real runs, which go on with what was chosen (2506.03065)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.plans.sealed import Values
from diffsparse.plans.sums import Sums
from diffsparse.site.compute import Site
from diffsparse.strategies.base import Strategy
from diffsparse.strategies.blocks import check_count, check_number, check_share, check_square, keep_count
from diffsparse.strategies.planned import group_of
from diffsparse.strategies.search import Watcher, is_sampled, sums_of
from diffsparse.strategies.sparse_vdit.strategy import FULL, MODES, SKIP, head_lists, head_orders
from diffsparse_kernels import block_mass, block_sparse_attention, default_block

_ROUNDS = 3  # timings of each mode, of which the middle one counts


@dataclass(frozen=True)
class SparseVDiTSearch:
    """Find what `SparseVDiT` runs on: two passes over each prompt (arXiv 2506.03065, algorithm 1).

    The first runs dense and adds up the softmax mass of each key block, for the stripes. The second computes, at each
    step and layer, the output of every mode beside the dense one, and chooses for each head the mode i with the least

        L_i = mean((O_i - O_full)^2) / mean(O_full^2) + weight * cost_i,    or full, if all L_i are above epsilon.

    The run goes on with the output chosen, so later layers and steps see what earlier choices have cost.

    Decided here:

    - The error is relative, so that epsilon means the same on every model. It is divided by the mean over all heads of
      the layer: a head whose output is small beside its neighbours' can be skipped.
    - The appendix prints lambda * S_i; Eq. 2, and the meaning of a cost, want 1 - S_i.
    - Errors are those of the video's rows, averaged over samples, guidance branches, the steps of a group and prompts.
      Each run goes on with what the mean so far, its own call included, would choose.
    - A mode that costs no less than full is never chosen.
    - Steps at which a model never ran (experts of Wan 2.2) are full.

    Attributes:
        strategy: "sparse-vdit", the name of the strategy that runs on its plans.
        passes: 2, how often each prompt is run.
        sparsity: share of the video's blocks that a sparse mode drops, in [0, 1).
        epsilon: largest loss at which a head is not full: the knob between fidelity and speed.
        weight: of the cost (lambda in the paper).
        modes: candidates beside full.
        cost: "sparsity", the share of blocks that a mode computes (the paper's 1 - S_i), or "time" (ours), the time of
            its kernel call on this machine, as a share of that of torch's dense attention.
        groups: parts of the run with modes of their own; None: each step has its own, as in the paper.
        block: edge of a block in tokens; by default 128 on a machine with a GPU, else 64.
        looks: number of sampled steps of a run, evenly spread, at which masses are added up.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> from diffsparse import SparseVDiT, SparseVDiTSearch, calibrate
        >>> calls = [lambda: pipe("a red ball", generator=torch.manual_seed(0))]
        >>> plan = calibrate(pipe, SparseVDiTSearch(epsilon=0.1), calls, ["ball"], folder / "plan.safetensors")
        >>> print(SparseVDiT(plan).facts()["modes"])  # shares of heads, layers and steps
        full ...%, skip ...%
    """

    sparsity: float = 0.8
    epsilon: float = 0.1
    weight: float = 0.1
    modes: tuple[str, ...] = MODES[1:]
    cost: Literal["sparsity", "time"] = "sparsity"
    groups: int | None = None
    block: int = field(default_factory=default_block)
    looks: int = 4

    strategy: ClassVar[str] = "sparse-vdit"
    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        check_square(self.block)
        for name in ("epsilon", "weight"):
            check_number(name, getattr(self, name))
        if not isinstance(self.modes, tuple) or not self.modes or not set(self.modes) <= set(MODES[1:]):
            raise ConfigError(f"modes wants a tuple of one or more of {', '.join(MODES[1:])}; got {self.modes!r}")
        if self.cost not in ("sparsity", "time"):
            raise ConfigError(f"cost wants 'sparsity' or 'time'; got {self.cost!r}")
        check_count("looks", self.looks)
        if self.groups is not None:
            check_count("groups", self.groups)

    def watcher(self, number: int, sums: Sums) -> Strategy:
        """Sums up the mass of key blocks in the first pass, chooses and follows in the second."""
        if number == 0:
            return Watcher(partial(self._sum, sums))
        return _Follower(self, sums, self._costs(sums))

    def plan(self, sums: Sums) -> tuple[Values, dict[str, Tensor]]:
        """Modes and columns of all layers."""
        costs, tensors = self._costs(sums), {}
        for name, errors in sums.of("errors").items():  # [groups, modes, H]
            tensors[f"{name}.modes"] = self.choose(errors, sums.of("seen")[name], costs)
            tensors[f"{name}.columns"] = _shares(sums.of("columns")[name])
        settings = {"modes": list(self.modes), "costs": [round(float(cost), 6) for cost in costs]}
        knobs = ("sparsity", "epsilon", "weight", "cost", "groups", "block", "looks")
        return {**settings, **{knob: getattr(self, knob) for knob in knobs}}, tensors

    def choose(self, errors: Tensor, seen: Tensor, costs: Tensor) -> Tensor:
        """The mode of each head, uint8 [..., H], from sums of errors [..., modes, H] over `seen` [...] calls."""
        mean = (errors / seen[..., None, None]).nan_to_num(nan=torch.inf)  # 0 / 0 where nothing was seen
        loss = (mean + self.weight * costs[:, None]).masked_fill(costs[:, None] >= 1, torch.inf)
        best = loss.argmin(-2, keepdim=True)  # [..., 1, H]
        numbers = torch.tensor([MODES.index(mode) for mode in self.modes])
        chosen = numbers[best].where(loss.gather(-2, best) <= self.epsilon, FULL)
        return chosen.squeeze(-2).to(torch.uint8)

    def _sum(self, sums: Sums, q: Tensor, k: Tensor, lse: Tensor, site: Site) -> None:
        """Add up the mass of key blocks at sampled steps, and at each layer's first whichever it is."""
        here = sums_of(sums, site)
        if not is_sampled(site, self.looks) and here.has("columns"):
            return
        video, size = site.layout.span, self.block
        q, k, lse, keys = *(x[:, :, video] for x in (q, k, lse)), site.key_mask
        keys = None if keys is None else keys[:, video]
        mass = block_mass(q, k, lse, q_block=size, kv_block=size, scale=site.scale, key_mask=keys)
        columns = mass.sum((0, 2))
        here.add("columns", columns, tuple(columns.shape))
        if self.cost == "time" and not here.has("costs"):
            here.add("costs", self._timed(q, k, columns, site), (len(self.modes),))

    def _costs(self, sums: Sums) -> Tensor:
        """Cost of each mode, float32 [modes]: what of full attention's blocks, or of its time, it takes."""
        measured = list(sums.of("costs").values())
        if measured:
            return torch.stack(measured).mean(0)
        blocks = 1 if sums.layout is None else sums.layout.blocks(self.block)
        share = keep_count(self.sparsity, blocks) / blocks
        return torch.tensor([0.0 if MODES.index(mode) == SKIP else share for mode in self.modes])

    def _timed(self, q: Tensor, k: Tensor, columns: Tensor, site: Site) -> Tensor:
        """Time of each mode's kernel call on the video rows of q and k, over that of torch's dense attention."""
        seconds = []
        for mode in self.modes:
            modes = torch.full((q.shape[1],), MODES.index(mode))
            lists = head_lists(modes, columns, site.layout.grid, self.sparsity, self.block, q.device)
            seconds.append(_seconds(partial(block_sparse_attention, q, k, k, lists), q.device))
        return torch.tensor(seconds) / _seconds(partial(F.scaled_dot_product_attention, q, k, k), q.device)


@dataclass(frozen=True)
class _Follower(Strategy):
    """Computes every mode at every call, chooses for each head, and goes on with what it chose."""

    search: SparseVDiTSearch
    sums: Sums
    costs: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The outputs chosen over q, k, v [B, H, N, D]."""
        out, _ = site.dense_with_lse(q, k, v)
        outs = [self._output(MODES.index(mode), q, k, v, site) for mode in self.search.modes]
        chosen = self._choose(_errors(outs, out, site), site).to(q.device)
        for mode, other in zip(self.search.modes, outs, strict=True):
            out = torch.where((chosen == MODES.index(mode))[:, None, None], other, out)
        return out

    def _output(self, mode: int, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """All heads in one mode."""
        modes = torch.full((q.shape[1],), mode)
        columns = sums_of(self.sums, site).get("columns")
        orders, layout = head_orders(modes, site.layout, q.device), site.layout.text_last()
        lists = head_lists(modes, columns, layout, self.search.sparsity, self.search.block, q.device)
        q, k, v, keys = *orders.apply(q, k, v), orders.keys(site.key_mask)
        return orders.undo(block_sparse_attention(q, k, v, lists, scale=site.scale, key_mask=keys)[0])

    def _choose(self, errors: Tensor, site: Site) -> Tensor:
        here, groups = sums_of(self.sums, site), self.search.groups or site.steps or 1
        group = group_of(site.step, site.steps, groups)
        here.add("errors", errors, (groups, *errors.shape), group)
        here.add("seen", torch.ones(()), (groups,), group)
        return self.search.choose(here.get("errors")[group], here.get("seen")[group], self.costs)


def _errors(outs: list[Tensor], full: Tensor, site: Site) -> Tensor:
    """Squared error of each mode and head on the video's rows, over the layer's mean square: [modes, H]."""
    video = site.layout.span
    exact = full[:, :, video].float()
    errors = [(out[:, :, video].float() - exact).square().mean((0, 2, 3)) for out in outs]
    return torch.stack(errors) / exact.square().mean().clamp(min=torch.finfo(torch.float32).tiny)


def _shares(columns: Tensor) -> Tensor:
    return columns / columns.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of a few timings, after one call that warms up."""
    call()
    found = []
    for _ in range(_ROUNDS):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Context parallelism: two ranks give what one process gives, or refuse."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

from diffsparse.site.shard import WHOLE, Shard
from support import ranks


def test_a_share_of_the_heads() -> None:
    x = torch.arange(12).view(2, 6)
    assert torch.equal(Shard(1, 3).own(x, 1), x[:, 2:4])
    assert Shard(1, 3).own_numbers((0, 2, 3, 5), 2) == (0, 1)
    assert WHOLE.own(x) is x
    assert WHOLE.all_heads(x) is x


@pytest.mark.skipif(not hasattr(diffusers, "ContextParallelConfig"), reason="a later Diffusers has it")
@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")
def test_two_ranks_are_as_one_or_refuse(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ranks.rank, (2, str(tmp_path / "store")), nprocs=2)

"""What a sparse call, and a dense one that teaches, ask of a GPU: counted without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from diffsparse import Digest, Layout, Tangent
from diffsparse.site.compute import DenseBackend, Site
from diffsparse.strategies.base import in_order
from support.devices import Launches, OnDevice
from support.sites import site

LAYOUT = Layout(8, 32, 32)
TEXT = Layout(8, 32, 32, 0, 100)
MOST = 19  # launches of a sparse call
TEACHING = 150  # of a dense call that teaches
AROUND = ["move", "judge", "combine", "restore"]  # what there is beside summaries, blocks and attention
CALLS = {  # strategy, steps of the run, tokens
    "Digest": (Digest(0.8, (128, 64)), 10, LAYOUT),
    "Digest with the blocks of a dense step": (Digest(0.8, (128, 64), probes=False), 50, LAYOUT),
    "Tangent": (Tangent(0.8, (128, 64)), 10, LAYOUT),
    "Tangent beside text": (Tangent(0.8, (128, 64)), 10, TEXT),
}


def place(layout: Layout, step: int, steps: int, memory: dict[str, Any]) -> Site:
    """On a device where dense attention is somebody else's."""
    return replace(site(layout, step, steps, memory), dense_backend=DenseBackend("native", lambda q, k, v: v))


def launches_of(strategy: Tangent, steps: int, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the second sparse call of a layer asks for, in order."""
    monkeypatch.setenv("DIFFSPARSE_BACKEND", "triton")
    memory: dict[str, Any] = {}
    with Launches(monkeypatch) as launches:
        q, k, v = (OnDevice(torch.randn(1, layout.tokens, 2, 128).bfloat16()).transpose(1, 2) for _ in range(3))
        if strategy.observes:
            in_order(strategy, strategy.observe, (q, k, v), place(layout, 1, steps, memory))
        for step in (2, 3):
            launches.names.clear()
            out = in_order(strategy, strategy.attend, (q, k, v), place(layout, step, steps, memory))
        assert out.device.type == "cuda"
        assert out.shape == q.shape
        assert out.stride() == q.stride(), "as processors want it next"
    return launches.names


@pytest.mark.parametrize(("strategy", "steps", "layout"), CALLS.values(), ids=CALLS)
def test_launches_of_a_sparse_call(
    strategy: Tangent, steps: int, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = launches_of(strategy, steps, layout, monkeypatch)
    wanted = [name for name in AROUND if strategy.probes or name not in ("judge", "combine")]
    assert [name for name in names if name in AROUND] == wanted
    assert names.count("attend") == (2 if strategy.probes else 1)
    assert names.count("index_select") == (1 if strategy.probes else 0), "the queries of the probes"
    assert names.count("_local_scalar_dense") == 0, "nothing waits for the device"
    assert len(names) <= MOST, f"{len(names)}: {' '.join(names)}"


def test_launches_of_a_call_that_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an order that is given: to choose one takes a few hundred more, once a run."""
    monkeypatch.setenv("DIFFSPARSE_BACKEND", "triton")
    strategy = Digest(0.8, (128, 64), order="FHW")
    with Launches(monkeypatch) as launches:
        qkv = [OnDevice(torch.randn(1, LAYOUT.tokens, 2, 128).bfloat16()).transpose(1, 2) for _ in range(3)]
        launches.names.clear()
        in_order(strategy, strategy.observe, tuple(qkv), place(LAYOUT, 1, 10, {}))
    names = [name for name in launches.names if name != "_unsafe_view"]
    assert "_linalg_eigh" not in names, "which alone is thousands"
    assert names.count("_local_scalar_dense") == 0, "nothing waits for the device"
    assert len(names) <= TEACHING, f"{len(names)}: {' '.join(names)}"

"""What a sparse call asks of a GPU: counted without one."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from diffsparse import Digest, Layout
from diffsparse.site.compute import DenseBackend
from diffsparse.strategies.base import in_order
from support.devices import Launches, OnDevice
from support.sites import site


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, memory = Layout(8, 32, 32), {}
    monkeypatch.setenv("DIFFSPARSE_BACKEND", "triton")
    strategy = Digest(0.8, (128, 64))
    qkv = [OnDevice(torch.randn(1, layout.tokens, 2, 128).bfloat16()) for _ in range(3)]

    def place(step):
        return replace(site(layout, step, 10, memory), dense_backend=DenseBackend("native", lambda q, k, v: v))

    with Launches(monkeypatch) as launches:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        in_order(strategy, strategy.observe, (q, k, v), place(1))
        for step in (2, 3, 4):
            launches.names.clear()
            start = time.perf_counter()
            in_order(strategy, strategy.attend, (q, k, v), place(step))
            print(time.perf_counter() - start)
    print(" ".join(launches.names))
    print(len(launches.names))

"""The first use of GPU kernels can't hurt: what fails is passed over, what none can do runs dense, and it is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import diffsparse
import diffsparse_kernels as dk
from diffsparse import AdaSpa, Digest, Random, Schedule, Tangent
from diffsparse.errors import DenseFallbackError
from diffsparse_kernels import registry, trials
from diffsparse_kernels.case import Kind
from support import first_use, tiny_transformers
from support.devices import pretended

ALWAYS = Schedule(dense_first=0)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("raise", "raised RuntimeError: out of resource"),
        ("wrong", "wrong: the output is off by"),
        ("hang", r"hang in its trial \((lists|dense)\): killed after"),
        ("crash", r"crash in its trial \((lists|dense)\): ended by SIGSEGV"),
    ],
)
def test_a_kernel_that_fails_leaves_the_run_to_the_next(mode: str, reason: str, tmp_path: Path) -> None:
    """In Triton's interpreter, so in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "DIFFSPARSE_CACHE": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(Path(first_use.__file__)), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backends"] == {"triton": 4}
    assert sum(found["passed_over"].values()) == 4  # the search, and the sparse product
    for told in found["passed_over"]:
        assert re.match(f"gluon: {reason}", told), told
        assert told in found["text"]
    assert any("the kernel gluon is not used on" in said for said in found["said"])
    assert found["known"]["triton"] == "available"
    assert re.match(reason, found["known"]["gluon"])
    assert found["error"] < 0.1  # nothing was dropped


@pytest.fixture
def only_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as if it were a GPU, but for what would run there whatever the blocks are."""
    for name in ("lists_of_largest", "lists_of_bits", "move_rows", "restore_rows", "fit_rows"):
        monkeypatch.delattr(registry.load("triton"), name)
    monkeypatch.setattr("diffsparse_kernels.break_even", registered_break_even)
    with pretended(monkeypatch, "triton"):
        yield


registered_break_even = dk.break_even


@pytest.mark.usefixtures("only_triton")
@pytest.mark.parametrize("strategy", [AdaSpa(block=256), Digest(block=256), Random(block=256)], ids=str)
def test_blocks_that_no_kernel_takes_run_dense(strategy: Any) -> None:
    model, inputs = tiny_transformers.build("WanTransformer3DModel"), tiny_transformers.inputs("WanTransformer3DModel")
    dense = tiny_transformers.tensors(model, inputs)
    with diffsparse.apply(model, strategy, schedule=ALWAYS) as handle:
        for _ in range(2):
            assert all(map(torch.equal, tiny_transformers.tensors(model, inputs), dense))
        report = handle.report()
    ((reason, count),) = report.fallbacks.items()
    assert "triton: it wants blocks of 16, 32, 64, 128 tokens; got 256 and 256" in reason
    assert count == report.dense_calls == len(report.calls)
    with (
        diffsparse.apply(model, strategy, schedule=ALWAYS, strict=True),
        pytest.raises(DenseFallbackError, match=r"would run dense \(no kernel on cpu can do this"),
    ):
        tiny_transformers.tensors(model, inputs)


@pytest.mark.usefixtures("only_triton")
def test_heads_that_no_kernel_takes_run_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """AuraFlow has heads of 256."""
    name = "AuraFlowTransformer2DModel"
    case = tiny_transformers.CASES[name]
    config = {**case.config, "attention_head_dim": 256, "num_attention_heads": 1, "caption_projection_dim": 256}
    monkeypatch.setitem(tiny_transformers.CASES, name, case.__class__(config, case.inputs))
    model, inputs = tiny_transformers.build(name), tiny_transformers.inputs(name)
    dense = tiny_transformers.tensors(model, inputs)
    with diffsparse.apply(model, Digest(block=64), schedule=ALWAYS) as handle:
        assert all(map(torch.equal, tiny_transformers.tensors(model, inputs), dense))
        (reason,) = handle.report().fallbacks
    assert "heads of at most 128 channels; got 256" in reason


@pytest.mark.parametrize("cpu_has_them", [False, True])
@pytest.mark.parametrize(
    ("strategy", "limit", "merged"),
    [(Tangent(block=16), 1.0, True), (Digest(block=16), 1.0, True), (Tangent(block=16), 0.0, False)],
    ids=["sparse", "and a dense step that learns", "falls back"],
)
def test_summaries_that_a_slower_kernel_makes_are_told(
    strategy: Tangent, limit: float, merged: bool, cpu_has_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: limit)
    theirs: tuple[Kind, ...] = ("summaries", "errors", "statistics", "selection")
    others: tuple[Kind, ...] = ("attend", "fused", "mass")
    with pretended(monkeypatch, "triton", "cpu"):
        here = registry.BACKENDS
        rows = {"triton": theirs, "cpu": (*others, *theirs) if cpu_has_them else others}
        monkeypatch.setattr(registry, "BACKENDS", {name: here[name]._replace(kinds=rows[name]) for name in rows})
        monkeypatch.setattr(trials, "verdict", lambda kernel, case, device: f"{case.kind} are wrong")
        monkeypatch.setattr("diffsparse.strategies.tangent._MOST_STATISTICS", 9.0)  # first order for few tokens
        model, inputs = (make("WanTransformer3DModel") for make in (tiny_transformers.build, tiny_transformers.inputs))
        with diffsparse.apply(model, strategy, schedule=Schedule(dense_first=int(strategy.observes))) as handle:
            for _ in range(2):
                tiny_transformers.tensors(model, inputs)
            report = handle.report()
    told = {f"triton: {kind} are wrong": len(report.calls) for kind in theirs if merged or kind != "summaries"}
    assert report.passed_over == told
    assert all(reason in str(report) for reason in told)


class _WhichKernel:
    """Runs dense, and remembers which kernel would have run: sparse, and dense with its LSE."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, bool]] = []

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Any) -> torch.Tensor:
        n = q.shape[2]
        mask = torch.ones(1, q.shape[1], -(-n // 128), -(-n // 128), dtype=torch.bool)
        lists = dk.BlockLists.from_mask(mask, q_block=128, kv_block=128, q_len=n, kv_len=n)
        kernels = [dk.kernel_for(q, k, v, x, key_mask=site.key_mask).name for x in (lists, None)]
        self.found.append((kernels[0], kernels[1], site.key_mask is not None))
        return site.dense(q, k, v)  # type: ignore[no-any-return]


@pytest.mark.parametrize("hidden", [0, 2])
@pytest.mark.parametrize("name", ["HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel"])
def test_hunyuan_videos_calls_are_for_the_hopper_kernel(
    name: str, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They pass a key mask in every call, of all keys or of a prefix."""
    model, inputs = tiny_transformers.build(name).bfloat16(), tiny_transformers.inputs(name)
    inputs["encoder_attention_mask"][:, inputs["encoder_attention_mask"].shape[1] - hidden :] = 0
    inputs = first_use.sixteen_bits(inputs)
    which = _WhichKernel()
    with pretended(monkeypatch, "gluon", "triton"), diffsparse.apply(model, which, schedule=ALWAYS):
        tiny_transformers.tensors(model, inputs)
    assert set(which.found) == {("gluon", "gluon", True)}

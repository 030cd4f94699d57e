"""The lines before and after a call, on stock pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import GNA, AdaSpa, Dense, Digest, Layout, Random, Schedule, Tangent
from diffsparse.cli import main
from diffsparse.insight.cost import Estimate
from diffsparse.seam.added import put_on
from diffsparse.seam.caching import Caching
from diffsparse.strategies import as_strategy
from diffsparse.strategies.gna.bounds import bounds_of
from diffsparse_pipelines import preflight as preflights
from diffsparse_pipelines import tiny
from diffsparse_pipelines.generation import generation
from diffsparse_pipelines.preflight import Compression, Tokens, announce, few_tokens, layout, preflight, tokens
from support.tiny_pipelines import BUILDERS, run


class Layouts:
    """Runs dense and remembers the last layout."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        self.last = site.layout
        return site.dense(q, k, v)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "wan22"])
def test_tokens_are_those_that_the_transformer_sees(name: str) -> None:
    pipe, call = BUILDERS[name]()
    call = {**call, "height": 64, "num_inference_steps": 2}
    seen = Layouts()
    with diffsparse.apply(pipe, seen, schedule=Schedule(0)):
        run(pipe, call)
    found = tokens(pipe, call)
    assert found is not None
    assert found.video == seen.last.video
    assert found.text == call.get("max_sequence_length", 0)
    assert preflight(pipe, call, Random(), Schedule()) is not None


def test_sizes_of_the_embedded_model_and_unknown_sizes() -> None:
    pipe = tiny.load("twin")
    assert tokens(pipe, tiny.defaults("twin")) == Tokens(9 * 8 * 8, 32)
    pipe, call = BUILDERS["flux"]()
    unsized = {key: value for key, value in call.items() if key != "height"}
    assert tokens(pipe, unsized) is None
    assert preflight(pipe, unsized, AdaSpa(), Schedule()) is None


def test_windows_are_estimated_by_the_grid_and_what_is_unknown_is_said_to_be() -> None:
    pipe, call = tiny.load("twin"), tiny.defaults("twin")
    windows = GNA((3, 4, 4), block=16)
    found = preflight(pipe, call, windows, Schedule(0))
    assert found is not None
    assert found.attention_speedup == pytest.approx(1 / bounds_of(windows.tiling((9, 8, 8))).density)
    unknown = preflight(pipe, call, Layouts(), Schedule())
    assert unknown is None
    assert announce(unknown).startswith("expected speed-up: unknown")


def test_text_of_joint_attention_is_in_the_layout() -> None:
    pipe, call = BUILDERS["hunyuan_video"]()
    seen = Layouts()
    with diffsparse.apply(pipe, seen, schedule=Schedule(0)):
        run(pipe, {**call, "num_inference_steps": 1})
    counted = tokens(pipe, call)
    assert counted is not None
    latent = Compression.of(pipe).latent(call["num_frames"], call["height"], call["width"])  # type: ignore[union-attr]
    assert layout(pipe.transformer, latent, counted.text) == seen.last
    assert layout(tiny.load("twin").transformer, (9, 16, 16), 32) == Layout(9, 8, 8), "text only in cross-attention"


def test_generate_says_what_to_expect_and_what_came(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", "tiny-twin", "--steps", "15", "--block", "16", "--out", str(tmp_path / "a.gif")])
    assert not ended.value.code
    printed = " ".join(capsys.readouterr().out.split())
    before, after = printed.index("attention is"), printed.index("attention was")
    assert before < printed.index("fall-backs") < after
    assert re.search(r"attention is \d+% of your step; at most \d\.\dx, by operations", printed)
    assert re.search(
        r"attention was \d+% of a dense run \(\d+% by operations\), the run was \d+\.\d+x (fast|slow)er than a dense "
        "one, by the time of its 3 dense steps",
        printed,
    )


def test_there_is_no_verdict_by_two_dense_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--model", "tiny-twin", "--steps", "10", "--block", "16", "--out", str(tmp_path / "a.gif")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "no verdict on the speed: that takes 3 dense steps to compare with" in printed
    assert "attention was" not in printed


def test_few_tokens_on_a_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = tiny.load("twin"), tiny.defaults("twin")
    assert few_tokens(pipe, call, Digest()) is None, "a CPU"
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda"))
    line = few_tokens(pipe, call, Digest())
    assert line is not None
    assert line.startswith("576 tokens: under 10000 on a GPU sparse attention is expected to be slower than dense.")
    assert line.endswith("Take --strategy dense, or a step cache: --strategy taylor-seer:interval=3/dense")
    assert few_tokens(pipe, call, Dense()) is None
    monkeypatch.setattr(preflights, "FEW_TOKENS", 576)
    assert few_tokens(pipe, call, Digest()) is None
    monkeypatch.setattr(preflights, "FEW_TOKENS", 577)
    monkeypatch.setattr(preflights, "BLOCKS", {})
    assert str(few_tokens(pipe, call, Digest())).endswith("Take --strategy dense")


RATIOS = [1.0, 0.9, 1.05, 0.97, 1.02, 0.99, 1.01, 0.95, 1.0, 1.0, 1.04, 0.98, 1.0, 0.9]
KNOWN = [
    Caching("taylor-seer", interval=3),
    Caching("taylor-seer", interval=2, warm_up=5, disable_cache_after_step=11),
    Caching("mag", threshold=0.1, steps=14, ratios=RATIOS),
    Caching("pab", range=3, timesteps=(100, 800)),
]


def cached_run(cache: Caching, strategy: Any) -> tuple[Estimate | None, diffsparse.Report]:
    pipe = tiny.load("twin")
    call = {**tiny.defaults("twin"), "num_inference_steps": 14, "guidance_scale": 1.0, "prompt": tiny.prompts(1)[0]}
    with diffsparse.apply(pipe, strategy) as handle:
        handle.also(lambda model: put_on(model, cache, pipe))
        expected = preflight(pipe, call, as_strategy(strategy), Schedule())
        generation(pipe, call, 0)
        return expected, handle.report()


@pytest.mark.parametrize("strategy", [Digest(0.8, 16), Tangent(0.7, 16), AdaSpa(0.6, block=16)], ids=str)
@pytest.mark.parametrize("cache", KNOWN, ids=str)
def test_the_estimate_under_a_step_cache_agrees_with_the_calls_that_were_counted(cache: Caching, strategy: Any) -> None:
    expected, report = cached_run(cache, strategy)
    assert expected is not None
    assert expected.is_known
    assert expected.executed == pytest.approx(report.executed)
    assert report.executed < 1
    assert expected.attention_speedup == pytest.approx(1 / (report.work * report.executed), rel=0.03)
    left = 1 - expected.attention_share
    rest = left * expected.executed if report.cache_is_wide else left
    assert expected.speedup == pytest.approx(1 / (rest + expected.attention_share / expected.attention_speedup))
    assert f"{expected.executed:.0%} of the steps' attention left by the step cache" in announce(expected)


def test_the_estimate_under_a_cache_that_decides_as_it_goes_is_a_bound() -> None:
    expected, report = cached_run(Caching("first-block", threshold=0.5), Tangent(0.7, 16))
    assert expected is not None
    assert not expected.is_known
    assert expected.attention_speedup < 1 / (report.work * report.executed)
    assert "(more with what the step cache skips, which it decides as it goes)" in announce(expected)

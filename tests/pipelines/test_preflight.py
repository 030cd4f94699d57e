"""The lines before and after a call, on stock pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import diffsparse
from diffsparse import GNA, AdaSpa, Layout, Random, Schedule
from diffsparse.cli import main
from diffsparse.strategies.gna.bounds import bounds_of
from diffsparse_pipelines import tiny
from diffsparse_pipelines.preflight import Compression, Tokens, announce, layout, preflight, tokens
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
        main(["generate", "--model", "tiny-twin", "--steps", "10", "--block", "16", "--out", str(tmp_path / "a.gif")])
    assert not ended.value.code
    printed = capsys.readouterr().out
    before, after = printed.index("attention is"), printed.index("attention was")
    assert before < printed.index("retained mass") < after
    assert re.search(r"attention is \d+% of your step; expected \d\.\dx \(an estimate", printed)
    assert re.search(
        r"attention was \d+% of a dense call \(expected \d+%\), the run was \d+\.\d+x (fast|slow)er \(expected", printed
    )

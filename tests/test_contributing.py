"""The code blocks of CONTRIBUTING.md: a strategy, a model, a back end and a command, each added as it says, and run."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

import diffsparse
import diffsparse_kernels
from diffsparse import Layout, Schedule, Site
from diffsparse_kernels import BlockLists
from support import tiny_transformers
from support.tiny_transformers import Shape, build, inputs, tensors

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
TITLES = ("Add a strategy", "Add a model", "Add a back end", "Add a command")


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def section(title: str) -> list[str]:
    """The code blocks of a section."""
    return blocks(TEXT.split(f"## {title}\n")[1].split("\n## ")[0])


def add(package: str, code: str, folder: Path) -> None:
    """Write a block that begins with the name of its file, as a further module of a package."""
    found = re.match(r"# (\S+)/(\w+)\.py\n", code)
    assert found is not None, code
    assert found[1].endswith(package.replace(".", "/")), found[1]
    (folder / f"{found[2]}.py").write_text(code)


@pytest.fixture
def room(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules belong to the package that the test names, for as long as the test runs."""
    package = importlib.import_module(request.param)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith(f"{request.param}."):
            del sys.modules[name]


def test_all_code_blocks_are_of_these_sections() -> None:
    assert sum(len(section(title)) for title in TITLES) == len(blocks(TEXT))


@pytest.mark.parametrize("room", ["diffsparse.strategies"], indirect=True)
def test_a_strategy(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = importlib.import_module("diffsparse.strategies")
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 9.0)  # so small, all of it would be faster dense
    monkeypatch.setattr(strategies, "STRATEGIES", dict(strategies.STRATEGIES))
    file, row = section("Add a strategy")
    add("diffsparse.strategies", file, room)
    band = importlib.import_module("diffsparse.strategies.band").Band
    exec(row, {"Band": band})
    (strategy,) = strategies.parse("band", block=32)
    assert strategy == band(block=32)
    model, call = build("WanTransformer3DModel"), inputs("WanTransformer3DModel", Shape(8, 8, 12))
    dense = tensors(model, call)
    with diffsparse.apply(model, band(reach=1, block=32), schedule=Schedule(dense_first=0)) as handle:
        assert not all(map(torch.equal, tensors(model, call), dense))
        assert handle.report().sparse_calls > 0
        assert handle.report().density < 1
    with diffsparse.apply(model, band(reach=10**6, block=32), schedule=Schedule(dense_first=0)):
        for got, want in zip(tensors(model, call), dense, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


class Seen(diffsparse.Strategy):
    """Dense; remembers the layouts."""

    def __init__(self) -> None:
        self.layouts: set[Layout] = set()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        self.layouts.add(site.layout)
        return site.dense(q, k, v)


def test_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    models = importlib.import_module("diffsparse.seam.models")
    without = {name: spec for name, spec in models.SPECS.items() if name != "CogVideoXTransformer3DModel"}
    monkeypatch.setattr(models, "SPECS", without)

    class MyVideoTransformer3DModel(diffusers.CogVideoXTransformer3DModel):  # type: ignore[misc]
        """A class that Diffusers doesn't know: text first, then frames."""

    case, shape = tiny_transformers.CASES["CogVideoXTransformer3DModel"], Shape()
    torch.manual_seed(0)
    model = MyVideoTransformer3DModel(**case.config).eval()
    assert case.layout is not None

    def layouts() -> set[Layout]:
        seen = Seen()
        with diffsparse.apply(model, seen, schedule=Schedule(dense_first=0)), torch.no_grad():
            model(**inputs("CogVideoXTransformer3DModel", shape))
        return seen.layouts

    frames, height, width, before, after = case.layout(shape)
    with pytest.warns(UserWarning, match="the order of its tokens is not known"):
        assert layouts() == set()
    (row,) = section("Add a model")
    exec(row, {})
    assert layouts() == {Layout(frames, height, width, before, after)}


@pytest.mark.parametrize("room", ["diffsparse_kernels.backend"], indirect=True)
def test_a_back_end(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = importlib.import_module("diffsparse_kernels.catalog")
    file, row = section("Add a back end")
    add("diffsparse_kernels.backend", file, room)
    known = dict(catalog.BACKENDS)
    try:
        exec(row, {})
        diffsparse_kernels.forget_measurements()
        assert diffsparse_kernels.backends()["plain"] == "available"
        q, k, v = torch.randn(3, 2, 3, 100, 16).unbind()
        mask = torch.rand(2, 3, 4, 4) < 0.5
        mask[:, :, 1] = False  # a row without keys
        lists = BlockLists.from_mask(mask, q_block=32, kv_block=32, q_len=100, kv_len=100)
        with diffsparse_kernels.record() as ran:
            out, lse = diffsparse_kernels.block_sparse_attention(q, k, v, lists, backend="plain")
        assert ran[0].name == "plain"
        exact, exact_lse = diffsparse_kernels.block_sparse_attention(q, k, v, lists, backend="reference")
        torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, exact_lse, atol=1e-5, rtol=1e-5)
        assert not out[:, :, 32:64].any()
    finally:
        catalog.BACKENDS.clear()
        catalog.BACKENDS.update(known)
        diffsparse_kernels.forget_measurements()


@pytest.mark.parametrize("room", ["diffsparse_pipelines.commands"], indirect=True)
def test_a_command(room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cli = importlib.import_module("diffsparse.cli")
    file, row = section("Add a command")
    add("diffsparse_pipelines.commands", file, room)
    known = dict(cli.COMMANDS)
    try:
        exec(row, {})
        with pytest.raises(SystemExit) as ended:
            cli.main(["tokens", "--model", "tiny-twin"])
        assert ended.value.code == 0
        assert capsys.readouterr().out == "576\n"
        with pytest.raises(SystemExit):
            cli.main(["--help"])
        assert "Count the tokens of a clip." in capsys.readouterr().out
    finally:
        cli.COMMANDS.clear()
        cli.COMMANDS.update(known)

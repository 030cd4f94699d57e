"""The code of the pages: blocks of Python run, command lines are taken by the real parsers.

The embedded twin stands in for the checkpoints of a hub, and takes the arguments that the named pipeline takes; runs
are cut to a few steps and frames. All else is as it stands on the page.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import pytest
import torch
import torch.distributed as dist
import transformers
import typer
from PIL import Image
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from diffsparse import Layout, Preset
from diffsparse.cli import main
from diffsparse.plans.plan import Plan
from diffsparse_pipelines import tiny
from diffsparse_pipelines.commands.options import ModelOptions
from support.scripts import load

ROOT = Path(__file__).parents[2]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [ROOT / "README.md", CONTRIBUTING, *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "sh", "text"}
MOST = {"num_inference_steps": 4, "num_frames": 5}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What a person would have at hand, with as much in it as the parsers look at.
FILES = ("photo.png", "look.png", "prompts.txt", "clips/a.mp4")


def document(page: Path) -> Document:
    """The page, with its blocks as examples in order: Python runs, command lines are checked.

    The Python of CONTRIBUTING.md is files, which `tests/test_contributing.py` adds and runs.
    """
    parsers = [CodeBlockParser("sh", shell), *([] if page == CONTRIBUTING else [PythonCodeBlockParser()])]
    return Sybil(parsers, patterns=["*.md"], path=str(page.parent)).parse(page)


def fences(page: Path) -> list[str]:
    """The languages of all fenced blocks of a page."""
    return re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)[::2]


# --- a machine with the checkpoints ---------------------------------------------------------------------------------


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Stand-ins for checkpoints and a GPU, short runs, and a folder with what the pages speak of."""
    monkeypatch.chdir(folder)
    for name in FILES:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
        if name.endswith(".png"):
            Image.new("RGB", (64, 48), "grey").save(name)
    for name in ("pipelines", "eval", "docs"):
        Path(name).symlink_to(ROOT / name)
    Preset(("0.0",)).save("heads.json")
    for owner, made in STAND_INS.items():
        _from_hub(monkeypatch, owner, made)
    monkeypatch.setattr(diffusers.ModelMixin, "compile_repeated_blocks", lambda *_, **__: None)  # takes minutes
    monkeypatch.setattr(tiny.TinyPipeline, "__call__", _shortened(tiny.TinyPipeline.__call__))
    join = dist.init_process_group
    store = f"file://{folder}/store"  # in place of what torchrun sets
    monkeypatch.setattr(dist, "init_process_group", lambda *_: join("gloo", init_method=store, rank=0, world_size=1))


def _from_hub(monkeypatch: pytest.MonkeyPatch, owner: type, made: Callable[[type], Any]) -> None:
    """`owner.from_pretrained` of a name of the hub gives what is `made` for the class; folders are read as ever."""
    original = owner.__dict__["from_pretrained"].__func__

    def pretrained(cls: type, source: str | Path, **options: Any) -> Any:
        return original(cls, source, **options) if Path(source).exists() else made(cls)

    monkeypatch.setattr(owner, "from_pretrained", classmethod(pretrained))


def _shortened(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        self.set_progress_bar_config(disable=True)
        less = {name: min(most, options[name]) for name, most in MOST.items()}
        return call(self, *args, **{**options, **less})

    return run


def stand_in(cls: type) -> Any:
    """The embedded twin in place of a checkpoint: called with what `cls` takes, and on any device."""
    pipe, takes = tiny.load("twin"), inspect.signature(cls.__call__)

    class StandIn(tiny.TinyPipeline):
        def __call__(self, *args: Any, **options: Any) -> Any:
            if not issubclass(cls, diffusers.ModularPipeline):
                takes.bind(self, *args, **options)
            out = super().__call__(tiny.prompts(1)[0], **tiny.defaults("twin"), generator=options.get("generator"))
            out.images = self.numpy_to_pil(out.frames[0])
            named = options.get("output")  # of a modular pipeline
            return out if named is None else {"videos": out.frames}.get(named, out.images)

        def to(self, *_: Any, **__: Any) -> Any:
            return self

        def _nothing(self, *_: Any, **__: Any) -> None:
            """What wants a device, files of weights, or parts that the twin has not."""

        enable_model_cpu_offload = enable_group_offload = enable_sequential_cpu_offload = _nothing
        load_components = load_lora_weights = fuse_lora = unload_lora_weights = _nothing

    pipe.__class__ = StandIn
    return pipe


STAND_INS: dict[Any, Callable[[type], Any]] = {
    diffusers.DiffusionPipeline: stand_in,
    diffusers.ModularPipeline: stand_in,
    diffusers.ModelMixin: lambda _: tiny.load("twin").vae,
    transformers.PreTrainedModel: lambda _: tiny.load("twin").text_encoder,
    transformers.image_processing_base.ImageProcessingMixin: lambda _: tiny.load("twin").tokenizer,
}


# --- command lines --------------------------------------------------------------------------------------------------


def shell(example: Example) -> None:
    """Check each command of a block of shell lines."""
    for line in str(example.parsed).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            known = next((check for name, check in COMMANDS.items() if words[0].endswith(name)), None)
            assert known is not None, f"no check for: {line}"
            known(words[1:])


class _RanError(Exception):
    """A command has taken its arguments, and would now begin its work."""


def _begins(*_: Any, **__: Any) -> NoReturn:
    raise _RanError


def diffsparse(words: Sequence[str]) -> None:
    """The command with these arguments, up to where it would load a model or time a kernel."""
    for before, word in itertools.pairwise(["", *words]):
        if word.endswith(".safetensors") and before not in ("--out", "--record"):
            Path(word.rpartition(":")[2]).touch()
    for strategy, name in re.findall(r"(paro|sparse-vdit)[+\w-]*:([\w./-]+\.safetensors)", " ".join(words)):
        _plan(strategy).save(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelOptions, "load", _begins)
        patch.setattr("diffsparse.guidance.objectives.Clip.load", _begins)
        patch.setattr("diffsparse_pipelines.preflight.admit", lambda *_, **__: None)  # as if there were a GPU
        patch.setattr("diffsparse_eval.commands.bench.measure", _begins)
        patch.setattr("diffsparse_eval.commands.doctor.examine", _begins)
        with pytest.raises((_RanError, SystemExit)) as ended:
            main(list(words))
    assert not getattr(ended.value, "code", 0), f"diffsparse {shlex.join(words)}: exit code {ended.value}"


def _plan(strategy: str) -> Plan:
    """The least that a strategy takes for its plan."""
    settings = {"sparsity": 0.8, "block": 64, "orders": ["FHW"], "groups": 1}
    tensors = {"orders": torch.zeros(1, dtype=torch.uint8), "masks": torch.zeros(1, 1, 1, dtype=torch.uint8)}
    if strategy == "sparse-vdit":
        settings = {"sparsity": 0.8, "block": 64}
        tensors = {"modes": torch.zeros(1, 1, dtype=torch.uint8), "columns": torch.ones(1, 1)}
    return Plan(strategy, {}, Layout(1, 8, 8), settings, {f"model.layer.{name}": x for name, x in tensors.items()})


def _make(words: Sequence[str]) -> None:
    rules = (ROOT / "Makefile").read_text()
    for target in (word for word in words if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", rules, re.MULTILINE), f"no target {target}"


def _pip(words: Sequence[str]) -> None:
    assert words[0] == "install"
    for extras in re.findall(r"\[(.*?)\]", " ".join(words)):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys(), extras


def _git(words: Sequence[str]) -> None:
    assert words == ["clone", PROJECT["urls"]["Repository"]]


def _python(words: Sequence[str]) -> None:
    if words[0] == "-m":
        assert words[1] in ("venv", "pip") or importlib.util.find_spec(words[1]), words[1]
        return
    app = typer.Typer()
    app.command()(load(ROOT / words[0]).main)
    typer.main.get_command(app).make_context("script", list(words[1:]))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "diffsparse": diffsparse,
    "make": _make,
    "pip": _pip,
    "git": _git,
    "pre-commit": lambda _: None,
    "cd": lambda _: None,
    "source": lambda _: None,
    "torchrun": lambda _: None,
    "python": _python,
    "python3": _python,
}

"""Commands are ordinary functions; the command line gives each field of their dataclasses an option."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer

from diffsparse import GNA, AdaSpa, Digest, Schedule
from diffsparse.cli import COMMANDS
from diffsparse.cli.parser import flat
from diffsparse.cli.table import command
from diffsparse.errors import ConfigError
from diffsparse_pipelines.commands.calibrate import SearchOptions
from diffsparse_pipelines.commands.generate import generate
from diffsparse_pipelines.commands.options import GuidanceOptions, ModelOptions, SamplingOptions, SparsityOptions
from diffsparse_pipelines.commands.simulate import GridOptions, WindowOptions, simulate


@dataclass(frozen=True)
class Fruit:
    """Two options, of which the second has a fixed value in `Apple`."""

    size: Annotated[int, typer.Option(help="Millimetres.")]
    colour: Annotated[str, typer.Option(help="Of the skin.")] = "green"


@dataclass(frozen=True)
class Apple(Fruit):
    """Red."""

    colour: str = "red"


def test_a_dataclass_becomes_options_and_comes_back_as_one() -> None:
    seen: list[object] = []

    def eat(name: Annotated[str, typer.Option()], fruit: Fruit, bites: int = 3) -> None:
        """Eat.

        Args:
            name: who.
        """
        seen.extend([name, fruit, bites])

    eat.__annotations__ = {"name": Annotated[str, typer.Option()], "fruit": Fruit, "bites": int}
    parameters = inspect.signature(flat(eat)).parameters
    assert list(parameters) == ["name", "size", "colour", "bites"]
    assert parameters["size"].default is inspect.Parameter.empty
    assert parameters["colour"].default == "green"
    flat(eat)(name="I", size=80, colour="yellow", bites=1)
    assert seen == ["I", Fruit(80, "yellow"), 1]
    assert flat(eat).__doc__ == "Eat."


def test_a_field_without_an_option_keeps_its_value() -> None:
    seen: list[Apple] = []

    def eat(apple: Apple) -> None:
        seen.append(apple)

    eat.__annotations__ = {"apple": Apple}
    assert list(inspect.signature(flat(eat)).parameters) == ["size"]
    flat(eat)(size=70)
    assert seen == [Apple(70, "red")]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_for_the_command_line_and_arguments_are_for_callers(name: str) -> None:
    text = flat(command(name)).__doc__
    assert text
    assert "Args:" not in text
    assert "Raises:" not in text


def test_options_together() -> None:
    assert SparsityOptions(dense_first="2", dense_layers="0,-1").schedule == Schedule(2, 0, (0, -1))
    assert SparsityOptions("adaspa", sparsity=0.5, searches="3").strategies() == [AdaSpa(0.5, searches=(3,))]
    assert SparsityOptions("gna,digest", block="16").strategies([0.5, None, 0.5]) == [
        GNA(sparsity=0.5, block=16),
        Digest(0.5, block=16),
        GNA(block=16),
        Digest(block=16),
    ]
    assert SamplingOptions(frames=5, guidance_scale=2.0).arguments() == {"num_frames": 5, "guidance_scale": 2.0}
    assert GuidanceOptions().preset() is None
    preset = GuidanceOptions("0.1", head_scale=2.0).preset()
    assert preset is not None
    assert (preset.heads, preset.head_scale) == (("0.1",), 2.0)
    assert SearchOptions("paro", orders="FHW, HFW").search().orders == ("FHW", "HFW")


def test_a_command_is_called_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    generate("a red circle", out, model=ModelOptions("tiny-twin"), sampling=SamplingOptions(steps=1))
    assert out.is_file()
    with pytest.raises(ConfigError, match="--prompt is missing"):
        generate(out=out, model=ModelOptions("flux"))
    capsys.readouterr()
    simulate(GridOptions("4x4x4"), WindowOptions("2x2x2", block=8), as_json=True)
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["window"] == [2, 2, 2]

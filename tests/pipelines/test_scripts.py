"""Every script of the pipelines folder: on a small pipeline of its family saved to disk, or held against its class."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest

from diffsparse_pipelines import families
from diffsparse_pipelines.families import FAMILIES
from support.scripts import load
from support.tiny_pipelines import BUILDERS

SCRIPTS = sorted((Path(__file__).parents[2] / "pipelines").glob("*.py"))


def test_there_is_a_script_for_each_family() -> None:
    assert {path.stem for path in SCRIPTS} >= {name for name in BUILDERS if name != "wan22"}


def default(name: str, path: Path) -> Any:
    """Of a parameter of the script's function; None where there is none."""
    found = inspect.signature(load(path).main).parameters.get(name)
    return found.default if found is not None else None


def calls(path: Path) -> Iterator[tuple[str, str, set[str]]]:
    """What a script calls: an object's name, the method's (or its own), and the keywords, those of a dict as well."""
    tree = ast.parse(path.read_text())
    dicts = {
        node.targets[0].id: {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=owner)):
                name = owner
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)):
                pass
            case _:
                continue
        spread = [dicts.get(ast.unparse(word.value), set()) for word in node.keywords if not word.arg]
        yield owner, name, {word.arg for word in node.keywords if word.arg}.union(*spread)


BLOCKS = {"minimax_h3": "MiniMaxH3Blocks", "flux3": "Flux3DistilledAutoBlocks", "wan_animate2": "WanAnimate2Blocks"}
SIZES = {"height": "height", "width": "width", "frames": "num_frames", "steps": "num_inference_steps"}
UNBUILT = [path for path in SCRIPTS if path.stem not in BUILDERS]


def taken(path: Path) -> set[str]:
    """Arguments that the pipeline of a script takes."""
    if path.stem in BLOCKS:
        return {each.name for each in getattr(diffusers, BLOCKS[path.stem])().inputs} | {"output"}
    owners = (owner for owner, name, _ in calls(path) if name == "from_pretrained" and "Pipeline" in owner)
    return set(inspect.signature(getattr(load(path), next(owners)).__call__).parameters)


@pytest.mark.parametrize("path", UNBUILT, ids=lambda path: path.stem)
def test_script_calls_its_pipeline_with_what_that_takes(path: Path) -> None:
    """Of pipelines that are too large to be built here."""
    assert len(path.read_text().splitlines()) < 40
    (given,) = (words for owner, name, words in calls(path) if owner == name == "pipe")
    assert given <= taken(path)
    assert given & {"num_inference_steps", "timesteps"}


@pytest.mark.parametrize("path", UNBUILT, ids=lambda path: path.stem)
def test_script_has_the_defaults_of_a_known_model(path: Path) -> None:
    hub = default("framepack", path) or default("model", path)
    told = {key: default(name, path) for name, key in SIZES.items() if default(name, path) is not None}
    names = [
        name
        for name, family in FAMILIES.items()
        if hub in (family.hub, family.image_hub) and told.items() <= dict(family.defaults).items()
    ]
    few = families.few_steps(names[0], FAMILIES[names[0]].defaults["num_inference_steps"])
    assert default("sparsity", path) == (few.sparsity if few else 0.8)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.stem in BUILDERS], ids=lambda path: path.stem)
def test_script(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text().splitlines()) < 40
    pipe, call = BUILDERS[path.stem]()
    if path.stem == "cogvideox":  # as long as the pipeline's default prompt is padded
        pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config, max_text_seq_length=226)
    pipe.save_pretrained(tmp_path / "model")
    main = load(path).main
    takes = inspect.signature(main).parameters
    names = {"num_frames": "frames", "num_inference_steps": "steps"}
    given = {names.get(key, key): value for key, value in call.items() if key != "prompt"}
    size = {key: value for key, value in given.items() if key in takes}
    out = tmp_path / takes["out"].default
    main(model=str(tmp_path / "model"), out=str(out), **size)
    assert out.stat().st_size > 0
    assert "sparse" in capsys.readouterr().out

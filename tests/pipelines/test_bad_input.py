"""Bad input ends before any work: exit code 2, one line on stderr, no traceback, nothing written."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from diffsparse.cli import COMMANDS, main
from diffsparse.cli.parser import flat
from diffsparse.cli.table import command as command_of
from diffsparse.errors import ConfigError
from diffsparse.guidance.objectives import objective
from diffsparse.strategies import blocks
from diffsparse_pipelines import families, machine, preflight, prompts, tiny, values
from diffsparse_pipelines.commands.options import SparsityOptions
from diffsparse_pipelines.generation import generation

GENERATE = ["generate", "--model", "tiny-twin", "--steps", "2"]
EVALUATE = ["evaluate", "--model", "tiny-twin", "--steps", "2", "--out", "results"]
INSPECT = ["inspect", "--model", "tiny-twin", "--steps", "2", "--out", "pictures"]
CALIBRATE = ["calibrate", "--model", "tiny-twin", "--steps", "2", "--out", "a.safetensors"]
HUNT = ["hunt", "--model", "tiny-twin", "--steps", "2", "--out", "a.json", "--k", "1", "--rounds", "1"]
CONTRAST = [*HUNT, "--objective", "contrast"]
FORETELL = ["evaluate", "--out", "results", "--model", "flux", "--random-weights"]
RUNS = {
    "generate": GENERATE,
    "evaluate": EVALUATE,
    "inspect": INSPECT,
    "calibrate": CALIBRATE,
    "hunt": CONTRAST,
    "bench": ["bench"],
}
ENORMOUS = "9" * 23
ENDLESS = "9" * 5000  # more digits than Python reads

# what is refused before a model is loaded: name -> (arguments, a part of the line)
EARLY: dict[str, tuple[list[str], str]] = {
    **{
        f"{name}: no such device": ([*run, "--device", "foo"], "--device wants cpu, cuda") for name, run in RUNS.items()
    },
    **{f"{name}: absent device": ([*run, "--device", "xpu:7"], "xpu:7 is not there") for name, run in RUNS.items()},
    "empty device": ([*GENERATE, "--device", ""], "--device wants cpu, cuda, cuda:1, ... or auto; got ''"),
    "meta device": ([*GENERATE, "--device", "meta"], "no meta device that torch can use"),
    "one pixel": ([*GENERATE, "--height", "1", "--width", "1"], "wants a multiple of 16, such as 16; got 1"),
    "one pixel, evaluated": ([*EVALUATE, "--height", "1"], "--height of 'tiny-twin' wants a multiple of 16"),
    "one pixel, simulated": (["simulate", "--height", "1"], "--height of 'tiny' wants a multiple of 16"),
    "one pixel, foretold": ([*FORETELL, "--height", "1"], "--height of 'flux' wants a multiple of 16"),
    "odd width": (["generate", "--model", "wan2.1-1.3b", "--prompt", "x", "--width", "830"], "such as 816; got 830"),
    "frames of an image": (
        ["generate", "--model", "flux", "--frames", "9", "--prompt", "x", "--out", "a.png"],
        "leave out --frames",
    ),
    "a size beyond memory": ([*GENERATE, "--height", "160000", "--width", "160000"], "of memory; lower --height"),
    "frames beyond memory": ([*EVALUATE, "--height", "3200", "--frames", "1000000"], "of memory; lower --height"),
    "a foretold size beyond memory": ([*FORETELL, "--height", "160000", "--width", "160000"], "lower --height"),
    "tensors beyond memory": (["bench", "--tokens", "1000000", "--heads", "4096"], "of memory; lower --tokens"),
    "no seed": ([*EVALUATE, "--seeds", ","], "--seeds wants whole numbers from 0 to 18446744073709551615"),
    "long seeds": ([*EVALUATE, "--seeds", f"1,{ENORMOUS}"], "--seeds wants whole numbers from 0 to"),
    "endless seeds": ([*EVALUATE, "--seeds", ENDLESS], "--seeds wants whole numbers from 0 to"),
    "endless prompts": ([*EVALUATE, "--prompts", ENDLESS], "--prompts wants a file, or a number from 1 to 1000"),
    "an endless grid": (["simulate", "--grid", f"{ENDLESS}x1x1"], "--grid wants frames x rows x columns"),
    "prompts below zero": ([*EVALUATE, "--prompts=--5"], "--prompts wants a file, or a number from 1 to 1000; got --5"),
    "too many prompts": ([*EVALUATE, "--prompts", "99999999"], "a number from 1 to 1000; got 99999999"),
    "more prompts than there are": (["evaluate", "--out", "o", "--model", "flux", "--prompts", "17"], "from 1 to 16"),
    "no held-out prompts": ([*CONTRAST, "--held-out", "-3"], "--held-out wants a file, or a number from 1 to 1000"),
    "empty prompts": ([*EVALUATE, "--prompts", ""], "--prompts wants a value; got an empty text"),
    "empty model": (["generate", "--model", ""], "--model wants a value; got an empty text"),
    "empty model, evaluated": ([*EVALUATE, "--model", ""], "--model wants a value; got an empty text"),
    "empty strategy": ([*GENERATE, "--strategy", ""], "--strategy wants a value"),
    "empty order": ([*GENERATE, "--order", ""], "--order wants a value"),
    "empty orders": ([*CALIBRATE, "--orders", ""], "--orders wants a value"),
    "empty heads": ([*GENERATE, "--heads", ""], "--heads wants a value"),
    "empty offload": ([*GENERATE, "--offload", ""], "--offload wants one of none, model"),
    "empty image": ([*GENERATE, "--image", ""], "--image wants the name of a file or folder"),
    "empty sheet": ([*GENERATE, "--heads", "0.0", "--compare", ""], "--compare wants the name of a file"),
    "empty grid": (["simulate", "--grid", ""], "--grid wants frames x rows x columns"),
    **{
        f"{name}: empty out": ([*run, "--out", ""], "--out wants the name of a file or folder; got an empty one")
        for name, run in RUNS.items()
    },
    "a function that is no objective": (
        [*HUNT, "--objective", "os:system"],
        "os:system is no objective; wanted a func",
    ),
    "a function without a signature": ([*HUNT, "--objective", "builtins:max"], "builtins:max is no objective"),
    "no function": ([*HUNT, "--objective", "os:sep"], "os:sep is no objective"),
    "no module": ([*HUNT, "--objective", ":system"], "can't import the objective :system"),
    "a large block": ([*GENERATE, "--block", "1000000"], "--block wants a whole number from 1 to 4096, or queries"),
    "large blocks": (["bench", "--block", "64,1000000"], "or queries x keys such as 128x64; got '1000000'"),
    "no blocks": (["bench", "--block", ","], "--block wants a whole number from 1 to 4096, or queries x keys"),
    "three edges": ([*GENERATE, "--block", "128x64x32"], "queries x keys such as 128x64; got '128x64x32'"),
    "half a block": ([*GENERATE, "--block", "128x"], "queries x keys such as 128x64; got '128x'"),
    "edges that don't divide": ([*GENERATE, "--block", "48x32"], "of which one divides the other"),
    "windows of unequal blocks": ([*GENERATE, "--strategy", "gna", "--block", "128x64"], "block wants one number of"),
    "a plan of unequal blocks": ([*CALIBRATE, "--block", "128x64"], "windows and plans are of square blocks"),
    "an enormous grid": (["simulate", "--grid", "9999x9999x9999"], "9999x9999x9999 tokens is too large to simulate"),
    "a large grid": (["simulate", "--grid", "512x512x512"], "2097152 in all"),
    "large pixels": (["simulate", "--height", "160000"], "is too large to simulate"),
    "an enormous window": (["simulate", "--window", "99999999x1x1"], "each from 0 to 1000000; got '99999999x1x1'"),
    "digest's window": ([*GENERATE, "--window", "4x4x4"], "digest takes no --window; leave it out, or take one that"),
    "digest's stride": ([*GENERATE, "--stride", "2x2x2"], "does: gna"),
    "digest's dilation": ([*GENERATE, "--dilation", "1x1x1"], "digest takes no --dilation"),
    "digest's threshold": ([*GENERATE, "--recall-threshold", "0.5"], "digest takes no --recall-threshold"),
    "digest's heads": ([*GENERATE, "--no-head-adaptive"], "digest takes no --no-head-adaptive"),
    "random's searches": ([*GENERATE, "--strategy", "random", "--searches", "3"], "random takes no --searches"),
    "dense's sparsity": ([*GENERATE, "--strategy", "dense", "--sparsity", "0.5"], "dense takes no --sparsity"),
    "gna's order": ([*INSPECT, "--strategy", "gna", "--order", "FHW"], "gna takes no --order"),
    "windows of none": (
        [*EVALUATE, "--strategy", "adaspa,random", "--window", "4x4x4"],
        "adaspa, random takes no --w",
    ),
    "compensated random's window": ([*GENERATE, "--strategy", "random+means", "--window", "4x4x4"], "random takes no"),
    "sparsity beside a window": (
        [*GENERATE, "--strategy", "gna", "--window", "4x4x4", "--sparsity", "0.5"],
        "gna takes no --sparsity beside --window",
    ),
    "simulated sparsity beside a window": (["simulate", "--window", "4x4x4", "--sparsity", "0.5"], "beside --window"),
    "a block beside a tile": (["simulate", "--q-tile", "4x4x4", "--block", "64"], "no --block beside --q-tile"),
    "a model beside a grid": (["simulate", "--grid", "4x4x4", "--model", "tiny"], "no --model beside --grid"),
    "pixels beside a grid": (["simulate", "--grid", "4x4x4", "--height", "64"], "--frames beside --grid"),
    "dense steps without a share": (["simulate", "--dense", "0.2"], "--dense wants --share"),
    "block beside a plan": (
        [*GENERATE, "--strategy", "sparse-vdit:none.safetensors", "--block", "16"],
        "its plan fixes that",
    ),
    "sparsity beside a plan": (
        [*EVALUATE, "--strategy", "sparse-vdit:none.safetensors", "--sparsity", "0.3"],
        "its plan fixes",
    ),
    "the other search's knob": ([*CALIBRATE, "--epsilon", "0.3"], "paro takes no --epsilon; leave it out, or take one"),
    "the first search's knob": (
        [*CALIBRATE, "--strategy", "sparse-vdit", "--bits", "8"],
        "sparse-vdit takes no --bits",
    ),
    "shrunk without a suite": (["bench", "--shrink", "2"], "--shrink wants --suite"),
    "layers of real weights": ([*EVALUATE, "--layers", "2"], "--layers goes together with --random-weights"),
    "heads of random weights": ([*FORETELL, "--heads", "0.0"], "leave out --heads"),
    "sparsity in words": (
        [*EVALUATE, "--sparsity", "x"],
        "--sparsity wants numbers in [0, 1), separated by commas, such",
    ),
    "benched sparsity in words": (["bench", "--sparsity", "x"], "--sparsity wants numbers in [0, 1)"),
    "sparsity that is none": ([*EVALUATE, "--sparsity", "0.5,nan"], "--sparsity wants numbers in [0, 1)"),
    "tokens in words": (["bench", "--tokens", "x"], "--tokens wants whole numbers from 1 to 1000000"),
    "strange words": (
        [*GENERATE, "--prompt", "a dragon over Paris"],
        "doesn't know 'dragon', 'paris'; it was trained on",
    ),
    "strange words in a file": ([*EVALUATE, "--prompts", "prompts.txt"], "doesn't know 'dragon'"),
    "strange words to avoid": ([*GENERATE, "--negative-prompt", "blurry"], "doesn't know 'blurry'"),
    "a strange style": ([*CONTRAST, "--style", "ink"], "doesn't know 'ink'"),
    "head guidance without heads": ([*GENERATE, "--head-scale", "2"], "--head-strength and --head-scale want --heads"),
    "an old name": ([*GENERATE, "--guidance", "2"], "No such option: --guidance"),
    "a word too many": (["generate", "cat"], "unexpected extra argument"),
    "no such command": (["generat"], "No such command 'generat'"),
    "nothing asked": (["evaluate"], "evaluate wants --out; got none. Give it a value: Folder for results.json, "),
    "no objective": (["hunt", "--out", "a.json"], "hunt wants --objective; got none. Give it a value: "),
    "a number in words": ([*GENERATE, "--sparsity", "abc"], "error: --sparsity wants a number in [0, 1); got 'abc'"),
    "half a step": ([*GENERATE, "--steps=1.5"], "error: --steps wants a whole number from 1 to 10000; got '1.5'"),
    "endless guidance": ([*GENERATE, "--guidance-scale", "inf"], "wants a finite number of at least 0; got inf"),
    "a strange order": ([*GENERATE, "--order", "XYZ"], "error: --order wants one of FHW"),
    "a strange candidate order": ([*CALIBRATE, "--orders", "FHW,XYZ"], "error: --orders wants one of FHW"),
    "less than no dense step": (
        [*GENERATE, "--dense-first=-1"],
        "error: --dense-first wants a whole number of steps such as 3, or a fraction in [0, 1] such as 0.2; got -1",
    ),
    "a strange offload": ([*EVALUATE, "--offload", "foo"], "error: --offload wants one of none, model"),
    "compensated twice": (
        [*GENERATE, "--strategy", "digest+means"],
        "+means wants a strategy that doesn't make up for what it drops; got digest, which does. Leave out +means",
    ),
}

# what only the loaded model can tell
LATE = {
    "layers that it lacks": ([*GENERATE, "--dense-layers", "99"], "--dense-layers wants numbers from -12 to 11"),
    "more dense steps than steps": ([*GENERATE, "--dense-first", "3"], "--dense-first wants at most the run's 2 steps"),
    "searches after the run": (
        [*GENERATE, "--strategy", "adaspa", "--searches", "0.5,2"],
        "--searches wants steps before the run's 2, counted",
    ),
    "more dense steps at the end": ([*EVALUATE, "--dense-last", "3"], "--dense-last wants at most the run's 2 steps"),
    "layers before the first": ([*GENERATE, "--dense-layers", "0,-13"], "12 attention layers; got -13"),
    "evaluated layers that it lacks": ([*EVALUATE, "--dense-layers", "99"], "12 attention layers; got 99"),
    "inspected layers that it lacks": ([*INSPECT, "--dense-layers", "99"], "12 attention layers; got 99"),
    "heads that it lacks, beside a plain run": (
        [*GENERATE, "--heads", "9.0", "--compare", "c.png"],
        "'9.0': WanTransformer3DModel has no block '9'",
    ),
    "evaluated heads that it lacks": ([*EVALUATE, "--heads", "0.9"], "'0.9': blocks.0.attn1 has the heads 0 to"),
    "more frames than positions": ([*GENERATE, "--frames", "65"], "--frames makes 65 tokens along that side"),
    "more rows than positions": ([*CALIBRATE, "--height", "272"], "wants at least 1, and at most 64"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded twin in a folder of its own, written by `save_pretrained`."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.load("twin").save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line, after a call that left nothing behind in the working folder."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert sorted(path for path in Path().rglob("*") if path.is_file() or path in before) == before
    return error


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was loaded")


def stub_out(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The embedded pipeline is loaded as ever, and raises when it is called."""

    @functools.wraps(tiny.TinyPipeline.__call__)
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(tiny.TinyPipeline, "__call__", fails)


@pytest.mark.parametrize("name", EARLY)
def test_refused_before_a_model_is_loaded(
    name: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "load", never)
    (here / "prompts.txt").write_text("a red circle\na dragon\n")
    arguments, message = EARLY[name]
    assert message in refusal(arguments, capsys)


@pytest.mark.parametrize("name", LATE)
def test_refused_before_the_loaded_model_runs(
    name: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_out(monkeypatch, AssertionError("the model ran"))
    arguments, message = LATE[name]
    assert message in refusal(arguments, capsys)


# what is said of a file that is missing: name -> (arguments, the whole line)
MISSING = {
    "preset": (
        [*EVALUATE, "--heads", "none.json"],
        "can't read the preset none.json: No such file or directory; wanted a JSON file that `diffsparse hunt` has "
        "written",
    ),
    "image": (
        ["generate", "--model", "wan2.1-14b", "--image", "none.png"],
        "can't read the image none.png: No such file or directory; wanted a file such as photo.png",
    ),
    "prompts": (
        [*EVALUATE, "--prompts", "none.txt"],
        "can't read the prompt file none.txt: No such file or directory; wanted a number, or a text file in UTF-8 with "
        "one prompt a line",
    ),
    "look": (
        [*HUNT, "--objective", "look:none.png"],
        "can't read the reference look none.png: No such file or directory; wanted look:IMAGE, such as look:photo.jpg",
    ),
    "plan": (
        [*GENERATE, "--strategy", "paro:none.safetensors"],
        "can't read the plan none.safetensors: No such file or directory; wanted a file that `diffsparse calibrate` "
        "has written; calibrate again",
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_told_once(
    name: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "load", never)
    arguments, line = MISSING[name]
    assert refusal(arguments, capsys) == f"error: {line}\n"


def test_a_file_of_another_kind_is_named_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("b.png").write_text("no picture")
    line = "can't read the reference look b.png: it is no image; wanted look:IMAGE, such as look:photo.jpg"
    assert refusal([*HUNT, "--objective", "look:b.png"], capsys) == f"error: {line}\n"


def test_a_preset_changed_by_hand_is_told_of_its_digest(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.json").write_text("{}")
    assert refusal([*EVALUATE, "--heads", "a.json"], capsys).endswith('goes without its entry "digest"\n')


NO_NUMBERS = {int: ("x", "", ENORMOUS, f"-{ENORMOUS}", "-1"), float: ("x", "", "nan", "inf", "-inf", "-0.5")}


def numbers() -> list[tuple[str, str, type]]:
    """Command, option and type of all options that are numbers."""
    found = []
    for command in COMMANDS:
        for name, parameter in inspect.signature(flat(command_of(command))).parameters.items():
            hint = parameter.annotation
            kind = next((kind for kind in NO_NUMBERS if get_args(hint)[:1] in ((kind,), (kind | None,))), None)
            if kind is not None:
                declared = get_args(hint)[1].param_decls or [f"--{name.replace('_', '-')}"]
                found.append((command, declared[0], kind))
    return found


@pytest.mark.parametrize(("command", "option", "kind"), numbers())
def test_every_number_has_its_limits(
    command: str,
    option: str,
    kind: type,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all commands, those to come too."""
    monkeypatch.setattr(families, "load", never)
    for text in NO_NUMBERS[kind]:
        error = refusal([command, option, text], capsys)
        assert error.startswith(f"error: {option} wants a ")
        assert re.search(r"; got '?" + re.escape(text), error)


def test_knobs_are_for_those_that_have_them() -> None:
    """One of several strategies is enough; each gets its own."""
    digest, gna = SparsityOptions("digest,gna", sparsity=0.5, window="4x8x8").strategies()
    assert (digest.sparsity, gna.window) == (0.5, (4, 8, 8))
    with pytest.raises(ConfigError, match="digest takes no --window"):
        SparsityOptions("digest", window="4x8x8").strategies()


def test_a_saved_embedded_model_is_known_as_such(saved: Path) -> None:
    assert families.defaults(str(saved)) == tiny.defaults("twin")
    assert prompts.read_prompts("2", str(saved)) == prompts.read_prompts("2", "tiny-twin")
    call = {**tiny.defaults("twin"), "num_inference_steps": 1, "prompt": "a red circle"}
    found, wanted = (generation(families.load(name), call, 0).frames for name in (str(saved), "tiny-twin"))
    assert np.allclose(found, wanted, atol=1e-5)  # the same weights, elsewhere in memory


def test_a_saved_embedded_model_generates(here: Path, saved: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", str(saved), "--steps", "1", "--block", "16", "--out", "a.gif"])
    assert ended.value.code == 0
    assert Path("a.gif").is_file()


def test_a_folder_of_a_strange_pipeline(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    Path("model", "model_index.json").write_text('{"_class_name": "UnknownPipeline", "vae": 3}')
    before = ["generate", "--model", "model", "--prompt", "x"]
    with pytest.raises(SystemExit) as ended:
        main(before)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: can't load 'model': ")


def test_an_objective_of_ones_own_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    score = objective("shutil:copy")  # takes two arguments, as an objective does
    with pytest.raises(ConfigError, match=r"objective shutil:copy failed on 1 clips: TypeError: .*; wanted a function"):
        score([np.zeros((1, 2, 2, 3), np.float32)], ["x"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ],
)
def test_memory_that_runs_out(
    error: Exception, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_out(monkeypatch, error)
    assert "out of memory" in refusal(GENERATE, capsys)


def test_what_torch_calls_a_device_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.place("cpu:3") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [machine.place(name) for name in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(ConfigError, match="cuda:2 is not there: this machine has 2 of that kind"):
        machine.place("cuda:2")


def test_memory_is_the_machines() -> None:
    have = machine.memory("cpu")
    assert have is not None
    machine.hold(have, "cpu", "all of it", "")
    with pytest.raises(ConfigError, match=r"take at least .* GiB, and cpu has .* GiB of memory; take less"):
        machine.hold(have + 1, "cpu", "a little more", "take less")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (GENERATE, "576 tokens of WanTransformer3DModel take at least"),
        ([*FORETELL, "--height", "64", "--width", "64", "--layers", "1"], "cpu has 0 GiB; time a part"),
    ],
    ids=["tokens", "weights"],
)
def test_a_machine_without_memory(
    arguments: list[str],
    message: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Frames would fit into a mebibyte, what the transformer keeps does not."""
    monkeypatch.setattr(machine, "memory", lambda device: 2**20)
    assert message in refusal(arguments, capsys)


def test_a_slower_run_is_called_slower() -> None:
    assert preflight.pace(1.3) == "1.30x faster"
    assert preflight.pace(0.77) == "1.30x slower"


def test_a_blocks_limit_is_that_of_the_strategies() -> None:
    """It stands twice, because options are declared without torch."""
    assert values.MOST_BLOCK == blocks.MOST_BLOCK

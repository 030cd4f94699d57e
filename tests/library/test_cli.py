"""The command line: quick help, one clear line and exit code 2 for bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffsparse
from diffsparse.cli import COMMANDS, main
from diffsparse.cli.parser import load
from diffsparse.errors import ConfigError


def status(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_help_lists_every_command_and_imports_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    code = "import sys; from diffsparse.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load(name) is not None
    assert status([name, "--help"]) == 0
    assert f"diffsparse {name}" in capsys.readouterr().out


def test_threads_of_commands_do_not_spin_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, found in ((None, "passive"), ("active", "active")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if given:
            monkeypatch.setenv("OMP_WAIT_POLICY", given)
        assert status(["--version"]) == 0
        assert os.environ["OMP_WAIT_POLICY"] == found


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["--version"]) == 0
    assert diffsparse.__version__ in capsys.readouterr().out


def test_short_help_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-h"], []):
        assert status(arguments) == 0
        assert "Usage: diffsparse" in capsys.readouterr().out
    assert status(["generate", "-h"]) == 0
    assert "diffsparse generate" in capsys.readouterr().out


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffsparse", "--version"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"diffsparse {diffsparse.__version__}\n")


@pytest.mark.parametrize(
    ("words", "found"), [("diffsparse sim", "simulate"), ("diffsparse generate --strat", "--strategy")]
)
def test_shells_complete_commands_and_options(
    words: str, found: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"_DIFFSPARSE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert status([]) == 0
    assert capsys.readouterr().out.split() == [found]


# what is asked, a package that it wants, and the extra that brings it
WITHOUT = [
    ("--help", "typer", "cli"),
    ("generate", "imageio_ffmpeg", "cli"),
    ("generate", "transformers", "cli"),
    ("hunt --out a.json --objective contrast", "scipy", "eval"),
]


@pytest.mark.parametrize(("arguments", "package", "extra"), WITHOUT)
def test_without_an_extra_a_command_ends_in_one_line_that_names_it(
    arguments: str, package: str, extra: str, tmp_path: Path
) -> None:
    code = f"import sys; sys.modules[{package!r}] = None\nfrom diffsparse.cli import main; main({arguments.split()!r})"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path)
    wanted = f"error: this command wants the package {package}: pip install 'diffsparse[{extra}]'\n"
    assert (done.returncode, done.stderr) == (2, wanted)


def test_a_module_that_is_in_no_extra_is_a_fault_and_shown_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "doctor", ("no_such_module:run", ""))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main(["doctor"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--dense-first", "-1"], "--dense-first wants a number"),
        (["--dense-first=-1"], "--dense-first wants a number"),
        (["--dense-last", "0"], "dense_first wants a number"),
    ],
)
def test_a_knob_goes_by_its_option_only_where_that_was_typed(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: list[str]) -> int:
        raise ConfigError("dense_first wants a number")

    monkeypatch.setattr("diffsparse.cli.parser.run", fails)
    assert status(given) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


BAD = {
    "unknown model": (["generate", "--model", "wan2.1-1.3c"], "did you mean wan2.1-1.3b, "),
    "part of a name": (["generate", "--model", "Mochi-1"], "did you mean mochi? diffsparse models lists all"),
    "unlike any": (["models", "--model", "foo"], "no known model is called 'foo'; diffsparse models lists all"),
    "unknown strategy": (["generate", "--strategy", "adaspar"], "no strategy is called 'adaspar'; known: adaspa"),
    "unknown step cache": (
        ["generate", "--strategy", "foo/digest"],
        "no step cache is called 'foo'; known: faster, first-block, mag, pab, ",
    ),
    "two strategies": (["generate", "--strategy", "adaspa,random"], "wants one strategy"),
    "sparsity one": (["generate", "--sparsity", "1.0"], "--sparsity wants a number in [0, 1); got 1.0"),
    "negative sparsity": (["generate", "--sparsity", "-0.1"], "--sparsity wants a number in [0, 1); got -0.1"),
    "zero frames": (["generate", "--frames", "0"], "--frames wants a whole number from 1 to 1000000; got 0"),
    "zero steps": (["generate", "--steps", "0"], "--steps wants a whole number from 1 to 10000; got 0"),
    "no prompt": (["generate", "--model", "flux", "--out", "a.png"], "--prompt is missing"),
    "missing image": (["generate", "--model", "wan2.1-14b", "--image", "none.png"], "can't read the image none.png"),
    "image for a text model": (
        ["generate", "--image", "none.png"],
        "lists all, and in its column image input which do",
    ),
    "image beside a namesake": (
        ["generate", "--model", "wan2.1-1.3b", "--image", "none.png"],
        "takes no input image; did you mean wan2.1-14b, wan2.2-a14b, ",
    ),
    "strange suffix": (["generate", "--out", "a.avi"], "wanted a name that ends in .mp4"),
    "video as image": (["generate", "--model", "flux", "--out", "a.mp4", "--prompt", "x"], "can't write an image"),
    "bad searches": (["generate", "--searches", "soon"], "--searches wants a number"),
    "bad dense steps": (
        ["generate", "--dense-first", "1.5"],
        "--dense-first wants a whole number of steps such as 3, or a fraction",
    ),
    "bad layers": (["generate", "--dense-layers", "0.5"], "--dense-layers wants whole numbers"),
    "bad block": (["generate", "--block", "0"], "block"),
    "bad order": (["generate", "--order", "zigzag"], "--order wants one of FHW"),
    "bad window": (
        ["generate", "--strategy", "gna", "--window", "8x8"],
        "--window wants frames x rows x columns such as",
    ),
    "bad stride": (["evaluate", "--out", "OUT", "--stride", "0x1x1"], "each from 1 to 1000000; got '0x1x1'"),
    "stride over window": (
        ["generate", "--strategy", "gna", "--window", "4x4x4", "--stride", "1x8x1"],
        "--stride wants at most the window's (4, 4, 4)",
    ),
    "bad dilation": (["generate", "--dilation", "two"], "--dilation wants frames x rows x columns"),
    "simulated grid": (["simulate", "--grid", "8x-8x8"], "--grid wants frames x rows x columns"),
    "simulated model": (["simulate", "--model", "wan"], "no known model is called 'wan'; did you mean wan2"),
    "simulated image": (["simulate", "--model", "flux", "--frames", "9"], "makes images; leave out --frames"),
    "simulated sparsity": (["simulate", "--sparsity", "1"], "--sparsity wants a number in [0, 1)"),
    "simulated share": (["simulate", "--share", "60"], "--share wants a number in [0, 1]; got 60"),
    "simulated device": (["simulate", "--model", "flux", "--device", "h1"], "no device is called 'h1'; known: "),
    "a device without a model": (["simulate", "--device", "h100"], "--device wants --model"),
    "steps without a device": (["simulate", "--steps", "4"], "--steps wants --device"),
    "pieces without a device": (["simulate", "--pieces"], "--pieces wants --device"),
    "an architecture that is not listed": (
        ["simulate", "--model", "hunyuan-video-1.5", "--device", "h100"],
        "model 'hunyuan-video-1.5' is known, but its architecture isn't listed",
    ),
    "an unknown model on a device": (
        ["simulate", "--model", "hunyuan", "--device", "h100"],
        "no known model is called 'hunyuan'; did you mean hunyuan-",
    ),
    "windows on a device": (
        ["simulate", "--model", "flux", "--device", "h100", "--window", "1x8x8"],
        "simulate takes no --window beside --device",
    ),
    "bad dtype": (["generate", "--dtype", "int8"], "error: --dtype wants one of"),
    "offload without a gpu": (["generate", "--device", "cpu", "--offload", "model"], "wants a GPU to offload from"),
    "strength without heads": (["generate", "--head-strength", "0.5"], "want --heads"),
    "heads that can't be read": (["generate", "--heads", "five"], "'five' names no attention head"),
    "missing preset": (["evaluate", "--out", "OUT", "--heads", "none.json"], "can't read the preset none.json"),
    "strength out of range": (["generate", "--heads", "0.0", "--head-strength", "2"], "strength wants a number in"),
    "compare without heads": (["generate", "--compare", "a.png"], "it wants --heads"),
    "compare format": (["generate", "--heads", "0.0", "--compare", "a.mp4"], "--compare wants a .png file"),
    "hunt objective": (["hunt", "--out", "a.json", "--objective", "beauty"], "no objective is called 'beauty'"),
    "hunt out": (["hunt", "--out", "a.txt", "--objective", "contrast"], "--out wants a .json file"),
    "hunt rounds": (["hunt", "--out", "a.json", "--objective", "contrast", "--rounds", "0"], "--rounds wants a whole"),
    "hunt batch": (["hunt", "--out", "a.json", "--objective", "contrast", "--batch", "0"], "--batch wants a whole"),
    "hunt pool": (["hunt", "--out", "a.json", "--objective", "contrast", "--pool", "99.*"], "has no block '99'"),
    "hunt in a small pool": (
        ["hunt", "--out", "a.json", "--objective", "contrast", "--pool", "0.*", "--rounds", "3"],
        "want a pool of at least 6",
    ),
    "empty strategies": (["evaluate", "--out", "OUT", "--strategy", ","], "wanted one or more strategies"),
    "empty sparsity": (["evaluate", "--out", "OUT", "--sparsity", ""], "--sparsity wants numbers in [0, 1)"),
    "sparsity list": (["evaluate", "--out", "OUT", "--sparsity", "0.5,1"], "--sparsity wants numbers in [0, 1)"),
    "no prompts": (["evaluate", "--out", "OUT", "--prompts", "0"], "--prompts wants a file, or a number from 1"),
    "prompt file": (["evaluate", "--out", "OUT", "--prompts", "none.txt"], "can't read the prompt file none.txt"),
    "seeds": (["evaluate", "--out", "OUT", "--seeds", "one"], "--seeds wants whole numbers"),
    "bench tokens": (["bench", "--tokens", "0"], "--tokens wants whole numbers from 1 to"),
    "bench heads": (["bench", "--heads", "0"], "--heads wants a whole number from 1 to"),
    "bench dtype": (["bench", "--dtype", "int4"], "--dtype wants some of"),
    "bench sparsity": (["bench", "--sparsity", "1"], "--sparsity wants numbers in [0, 1)"),
    "bench backend": (["bench", "--backend", "fast"], "backend 'fast': unknown"),
    "bench rounds": (["bench", "--rounds", "0"], "--rounds wants a whole number from 1"),
    "bench out": (["bench", "--out", "a.xls"], "--out wants a .csv or .json file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[name]
    assert status([str(tmp_path / "out") if part == "OUT" else part for part in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_empty_prompt_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n# nothing\n")
    assert status(["evaluate", "--out", str(tmp_path / "out"), "--prompts", str(file)]) == 2
    assert "holds no prompt; write one a line" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_an_output_that_cannot_be_written(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "below" / "out.mp4"
    assert status([command, "--out", str(out)]) == 2
    assert "can't write to the folder" in capsys.readouterr().err


def test_a_folder_without_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "a.mp4")
    assert status(["generate", "--model", str(tmp_path), "--prompt", "x", "--out", out]) == 2
    assert "holds no model_index.json" in capsys.readouterr().err


def test_a_folder_with_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text("{broken")
    out = str(tmp_path / "a.mp4")
    assert status(["generate", "--model", str(tmp_path), "--prompt", "x", "--out", out]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: can't load")

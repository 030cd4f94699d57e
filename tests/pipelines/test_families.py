"""Every strategy by every command, on a saved pipeline of each family: text before, after and absent, odd sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffsparse.cli import main
from diffsparse.errors import InputFileError
from diffsparse_pipelines import families, tiny
from diffsparse_pipelines.loading import unreachable
from support.tiny_pipelines import BUILDERS, ODD

SEARCHED = ("paro", "sparse-vdit")
FREE = ("adaspa", "digest", "gna", "random", "random+means", "adaspa+tail")
OPTIONS = {"height": "--height", "width": "--width", "num_frames": "--frames"}


def call(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code, arguments


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ODD)
def test_every_strategy_by_every_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 9.0)  # so small, all of it would be faster dense
    pipe, kwargs = BUILDERS[name]()
    model, prompts, results = tmp_path / "model", tmp_path / "prompts.txt", tmp_path / "results"
    if name == "cogvideox":  # commands leave prompts at the pipeline's own length, which the small model is short of
        pipe.transformer = type(pipe.transformer).from_config({**pipe.transformer.config, "max_text_seq_length": 226})
    pipe.save_pretrained(model)
    prompts.write_text("x\n")
    size = {key: value for key, value in {**kwargs, **ODD[name]}.items() if key in OPTIONS}
    small, blocks = ["--model", str(model), "--steps", "3"], ["--block", "8", "--sparsity", "0.5"]
    small += [text for key, value in size.items() for text in (OPTIONS[key], str(value))]
    plans = {strategy: str(tmp_path / f"{strategy}.safetensors") for strategy in SEARCHED}
    for strategy, plan in plans.items():
        knobs = ["--strategy", strategy, "--looks", "1", "--groups", "2"]
        knobs += ["--epsilon", "0.8"] if strategy == "sparse-vdit" else []
        call(["calibrate", *small, *blocks, *knobs, "--prompts", str(prompts), "--out", plan])
    listed = [*FREE, *(f"{strategy}:{plan}" for strategy, plan in plans.items())]
    call(
        ["evaluate", *small, *blocks, "--strategy", ",".join(listed), "--prompts", str(prompts), "--out", str(results)]
    )
    rows = json.loads((results / "results.json").read_text())["rows"]
    assert [row["strategy"] for row in rows] == ["dense", *FREE, *SEARCHED]
    assert all(not row["fallbacks"] for row in rows)
    assert all(row["psnr_db"] is not None for row in rows if (row["sparse_density"] or 1) < 1)  # blocks were dropped
    assert {row["label"] for row in rows} >= {"digest 0.5 block=8", "random 0.5 block=8 +means"}
    for strategy in listed:
        out = tmp_path / ("a.gif" if "num_frames" in size else "a.png")
        call(
            [
                "generate",
                *small,
                *(blocks if strategy in FREE else []),
                "--strategy",
                strategy,
                "--prompt",
                "x",
                "--out",
                str(out),
            ]
        )
        assert out.stat().st_size > 0


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes"), InputFileError),
        (ImportError("it requires the onnxruntime library"), InputFileError),
        (ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece"), ModuleNotFoundError),
    ],
    ids=str,
)
def test_a_checkpoint_that_wants_a_package(
    error: ImportError, wanted: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of an extra is named as such; any other is a reason why the checkpoint can't be loaded."""

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("diffsparse.cli.table.find_spec", lambda name: None)
    monkeypatch.setattr("diffsparse_pipelines.loading.from_pretrained", fails)
    with pytest.raises(wanted, match=str(error)):
        families.load(str(tiny.folder("twin")), device="cpu")


@pytest.mark.parametrize("source", ["wan2.1-1.3b", "some/thing"])  # by its parts, as a whole
def test_a_hub_that_is_out_of_reach_is_named(
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", source, "--prompt", "x", "--out", str(tmp_path / "x.mp4")])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert "the hub can't be reached: " in line
    assert line.endswith("; wanted a connection, or a folder written by save_pretrained")
    assert not caplog.records


def test_a_file_that_the_hub_lacks_is_no_lack_of_a_connection() -> None:
    error = OSError("no config.json")
    error.__cause__ = FileNotFoundError("404")
    assert unreachable(error) == ""
    error.__cause__.__context__ = ConnectionRefusedError("refused.")
    assert unreachable(error) == "refused"

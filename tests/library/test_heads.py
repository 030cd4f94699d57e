"""Heads by name, and presets as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import diffsparse
from diffsparse import Preset
from diffsparse.errors import ConfigError, DiffsparseError, InputFileError, PlanError, UnknownNameError
from diffsparse.guidance.heads import names_of, resolve
from diffsparse.plans import sealed
from diffsparse.plans.plan import fingerprints
from diffsparse.seam.targets import models_of
from support.tiny_transformers import CASES, build

WAN, FLUX = build("WanTransformer3DModel"), build("FluxTransformer2DModel")


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("1.1", {"blocks.1.attn1": (1,)}),
        ("0-1.0", {"blocks.0.attn1": (0,), "blocks.1.attn1": (0,)}),
        ("1.0-1", {"blocks.1.attn1": (0, 1)}),
        ("*.1", {"blocks.0.attn1": (1,), "blocks.1.attn1": (1,)}),
        ("blocks.1.*", {"blocks.1.attn1": (0, 1)}),
        ("blocks.1.attn1:0", {"blocks.1.attn1": (0,)}),
        ("blocks.*.attn1:1", {"blocks.0.attn1": (1,), "blocks.1.attn1": (1,)}),
        ("1.0, 0.1,1.1", {"blocks.0.attn1": (1,), "blocks.1.attn1": (0, 1)}),
    ],
)
def test_names(name: str, want: Any) -> None:
    assert resolve([name], WAN) == want
    assert list(resolve([name], WAN)) == list(want), "in the order of the model"


def test_stacks_by_the_start_of_their_name() -> None:
    assert resolve(["single.0.*"], FLUX) == {"single_transformer_blocks.0.attn": (0, 1)}
    assert resolve(["0.1"], FLUX) == {"transformer_blocks.0.attn": (1,)}
    assert names_of(FLUX) == ["0.0", "0.1", "single_transformer_blocks.0.0", "single_transformer_blocks.0.1"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("2.0", UnknownNameError, "has no block '2'; it has 0, 1"),
        ("0.2", UnknownNameError, "blocks.0.attn1 has the heads 0 to 1"),
        ("0.1-2", UnknownNameError, "has the heads 0 to 1"),
        ("0.1-0", UnknownNameError, "has the heads 0 to 1"),
        ("single.0.1", UnknownNameError, "has no block 'single.0'"),
        ("blocks.1.attn3:0", UnknownNameError, "has no attention module 'blocks.1.attn3'; it has blocks.1.attn2"),
        ("5", ConfigError, "'5' names no attention head; wanted \"5.3\""),
        ("a.b.c", ConfigError, "names no attention head"),
        ("", ConfigError, "wanted one or more attention heads, got none"),
    ],
)
def test_names_that_match_nothing(name: str, error: type[DiffsparseError], message: str) -> None:
    with pytest.raises(error, match=message.replace("[", r"\[")):
        diffsparse.guide(WAN, name)
    assert not [m for m in WAN.modules() if "_diffsparse" in vars(m) or m._forward_hooks or m._forward_pre_hooks]
    with pytest.raises(error):
        diffsparse.guide(WAN, [name, "0.0"] if name else [])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.layout])
def test_every_head_has_one_name(name: str) -> None:
    model = build(name)
    names = names_of(model)
    assert len(names) == len(set(names)) > 1
    found = [(path, head) for n in names for path, heads in resolve([n], model).items() for head in heads]
    assert len(found) == len(set(found)) == len(names)


def test_the_pool_can_be_narrowed() -> None:
    assert names_of(WAN, ["1.*"]) == ["1.0", "1.1"]
    assert names_of(WAN, ["*.1", "0.0"]) == ["0.0", "0.1", "1.1"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"head_strength": 1.1}, r"strength wants a number in \[0, 1\]; got 1.1"),
        ({"head_strength": -0.1}, "strength wants"),
        ({"head_strength": float("nan")}, "strength wants"),
        ({"head_scale": -1.0}, "scale wants a finite number of at least 0"),
        ({"head_scale": float("inf")}, "scale wants"),
        ({"rescale": 2.0}, "rescale wants"),
        ({"start": 1.5}, "start wants a whole number of steps such as 3, or a fraction"),
        ({"stop": -1}, "stop wants"),
        ({"kind": "blur"}, "kind wants one of identity, self, uniform, query-mean, zero; got 'blur'"),
        ({"branch": "both"}, "branch wants one of extra, uncond"),
        ({"kind": "self", "text": True}, "kind 'self' keeps the text"),
    ],
)
def test_values_out_of_range(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        diffsparse.guide(WAN, "0.0", **knobs)


def test_presets_are_saved_and_loaded(tmp_path: Path) -> None:
    models = fingerprints(models_of(WAN))
    preset = Preset(("1.0", "0.1"), 0.25, 2.0, "uniform", models=models, about={"objective": "sharpness"})
    preset.save(tmp_path / "heads.json")
    again = Preset.load(tmp_path / "heads.json")
    assert again == preset
    assert again.about == preset.about
    assert Preset.read(tmp_path / "heads.json", head_strength=0.5).head_strength == 0.5
    assert Preset.read("1.0").heads == Preset.read(["1.0"]).heads == ("1.0",)
    with diffsparse.guide(WAN, str(tmp_path / "heads.json")) as handle:
        assert handle.preset == preset


def test_a_preset_of_another_model(tmp_path: Path) -> None:
    preset = Preset(("0.0",), models=fingerprints(models_of(FLUX)))
    with pytest.raises(PlanError, match=r"made for FluxTransformer2DModel:\w+; got WanTransformer3DModel"):
        diffsparse.guide(WAN, preset)


def with_(**values: Any) -> str:
    return json.dumps({"diffsparse": "heads", "heads": ["0.0"], **values})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken", "can't read the preset"),
        ("[]", "wanted a JSON object; got list"),
        ("[" * 100_000, "no JSON that is ours"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"heads": ["0.0"]}', 'no entry "diffsparse": "heads"'),
        ('{"diffsparse": "heads"}', "heads wants a list of names; got None"),
        (with_(power=3), "strange entries power"),
        (with_(heads=[]), "got none"),
        (with_(heads="0.0"), "heads wants a list of names"),
        (with_(heads=[0.0]), "heads wants a list of names"),
        (with_(heads=["0." + "9" * 5000]), "names no attention head"),
        (with_(head_strength=2), "strength wants"),
        (with_(strength=2), "strength wants"),
        (with_(strength=0.5, head_strength=0.5), "strange entries strength"),
        (with_(strength="1"), "strength wants"),
        (with_(scale=10**400), "scale wants a finite number of at least 0"),
        (with_(kind=["identity"]), "kind wants one of"),
        (with_(branch=None), "branch wants one of"),
        (with_(start="soon"), "start wants"),
        (with_(text=1), "text wants True or False"),
        (with_(models=["a"]), "models wants a fingerprint for each name"),
        (with_(models={"transformer": None}), "models wants a fingerprint for each name"),
        (with_(about="me"), "about wants a dictionary"),
        (with_(format="1"), "no version of its format"),
        (with_(format=3), r"of a later release \(format 3, here it is 2\); update diffsparse"),
        (with_(digest="0" * 64), "was changed since it was written"),
    ],
)
def test_files_that_are_no_presets(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text(text)
    with pytest.raises(PlanError, match=message):
        Preset.load(file)
    with pytest.raises(InputFileError, match="can't read the preset"):
        Preset.load(tmp_path / "none.json")
    with pytest.raises(InputFileError, match="larger than 16 MiB"):
        Preset.load("/dev/zero")


def test_a_preset_that_was_changed(tmp_path: Path) -> None:
    """By accident it is told; by hand it goes without its digest."""
    file = tmp_path / "heads.json"
    Preset(("0.0",), head_strength=0.5, about={"score": {"all": 1.5}}).save(file)
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "head_strength": 0.25}))
    with pytest.raises(PlanError, match='one changed by hand goes without its entry "digest"'):
        Preset.load(file)
    del values["digest"]
    file.write_text(json.dumps({**values, "head_strength": 0.25}))
    assert Preset.load(file).head_strength == 0.25


def test_files_of_the_first_format(tmp_path: Path) -> None:
    """They call two knobs by other names, sealed or by hand; what is written has today's."""
    file = tmp_path / "heads.json"
    values = {"heads": ["0.0"], "strength": 0.5, "scale": 2.0, "kind": "uniform", "models": {}, "about": {"k": 1}}
    want = Preset(("0.0",), 0.5, 2.0, "uniform")
    for first in (values, sealed.seal(values, version=1)):
        file.write_text(json.dumps({"diffsparse": "heads", **first}))
        assert Preset.load(file) == want
    assert Preset.load(file).about == {"k": 1}
    want.save(file)
    written = json.loads(file.read_text())
    assert written["format"] == 2
    assert (written["head_strength"], written["head_scale"]) == (0.5, 2.0)
    assert not written.keys() & {"strength", "scale"}


def test_presets_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder, and over the hub."""
    import huggingface_hub

    preset, kept = Preset(("0.0",), 0.5, about={"k": 1}), dict[str, bytes]()
    preset.save_pretrained(tmp_path)
    assert Preset.from_pretrained(tmp_path) == preset
    assert (tmp_path / "heads.json").read_bytes() == preset.to_bytes()

    class Hub:
        def __init__(self, token: str | None) -> None:
            assert token is None

        def create_repo(self, name: str, **_: Any) -> Any:
            return type("Repository", (), {"repo_id": name})

        def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> str:
            kept[f"{repo_id}/{path_in_repo}"] = path_or_fileobj
            return "address"

    def download(name: str, file: str) -> str:
        (tmp_path / "cached").write_bytes(kept[f"{name}/{file}"])
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert preset.push_to_hub("me/heads") == "address"
    assert Preset.from_pretrained("me/heads") == preset
    monkeypatch.undo()
    with pytest.raises(InputFileError, match="no folder 'not/a/repository/at/all', and no such preset on the hub"):
        Preset.from_pretrained("not/a/repository/at/all")


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    Preset(("0.0",)).save(tmp_path / "a.json")
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["heads"] == ["0.0"]
    assert values["diffsparse"] == "heads"

"""Plans: whole files, for one model and one layout, and a clear word where anything is amiss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import diffsparse
from diffsparse import PARO, AdaSpa, Layout, Schedule, SparseVDiT
from diffsparse.errors import ConfigError, InputFileError, PlanError
from diffsparse.plans import sealed
from diffsparse.plans.plan import Plan, fingerprints
from diffsparse.strategies import parse
from diffsparse.strategies.paro.strategy import pack
from diffsparse.strategies.planned import FILE
from support.tiny_transformers import build, inputs, tensors

LAYOUT = Layout(2, 6, 6)
ALWAYS = Schedule(dense_first=0)


def plan_of(model: torch.nn.Module, layout: Layout = LAYOUT, **over: Any) -> Plan:
    layers = [name for name, module in model.named_modules() if name.endswith("attn1")]
    n = layout.blocks(8)
    parts: dict[str, torch.Tensor] = {}
    for layer in layers:
        parts[f"transformer.{layer}.masks"] = pack(torch.ones(1, 2, n, n, dtype=torch.bool).tril())
        parts[f"transformer.{layer}.orders"] = torch.zeros(2, dtype=torch.uint8)
    settings = {"sparsity": 0.5, "block": 8, "groups": 1, "orders": ["HWF"]}
    known = {"strategy": "paro", "models": fingerprints({"transformer": model}), "layout": layout}
    return Plan(**{**known, "settings": settings, "tensors": parts, **over})


@pytest.fixture
def model() -> torch.nn.Module:
    return build("WanTransformer3DModel")


def layout_of(model: torch.nn.Module) -> Layout:
    seen = []

    class Watched(AdaSpa):
        def attend(self, q, k, v, site):  # type: ignore[no-untyped-def]
            seen.append(site.layout)
            return site.dense(q, k, v)

    with diffsparse.apply(model, Watched(), schedule=ALWAYS):
        tensors(model, inputs("WanTransformer3DModel"))
    layout: Layout = seen[0]
    return layout


def test_there_and_back(model: torch.nn.Module, tmp_path: Path) -> None:
    plan = plan_of(model)
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert again == plan
    assert hash(again) == hash(plan)
    assert again != plan_of(model, settings={**plan.settings, "block": 4})
    assert repr(plan).startswith("Plan('paro', 2x6x6 = 72 tokens, ")
    strategy = PARO(plan)
    strategy.save_pretrained(tmp_path / "folder")
    assert PARO.from_pretrained(tmp_path / "folder") == strategy
    assert parse(f"adaspa,paro:{tmp_path / 'plan.safetensors'}", block=32) == [AdaSpa(block=32), strategy]


def test_it_runs_on_its_model_and_layout_only(model: torch.nn.Module) -> None:
    layout = layout_of(model)
    with diffsparse.apply(model, PARO(plan_of(model, layout)), schedule=ALWAYS) as handle:
        tensors(model, inputs("WanTransformer3DModel"))
    assert handle.report().sparse_calls > 0
    other = PARO(plan_of(model, Layout(layout.frames, layout.width, layout.height + 1)))
    with diffsparse.apply(model, other, schedule=ALWAYS), pytest.raises(PlanError, match="Calibrate at this size"):
        tensors(model, inputs("WanTransformer3DModel"))
    stranger = build("HunyuanVideoTransformer3DModel")
    with pytest.raises(PlanError, match="was made for transformer WanTransformer3DModel"):
        diffsparse.apply(stranger, PARO(plan_of(model)))
    whole = plan_of(model, layout).tensors
    partial = plan_of(model, layout, tensors={name: x for name, x in whole.items() if ".blocks.0." in name})
    with (
        diffsparse.apply(model, PARO(partial), schedule=ALWAYS),
        pytest.raises(PlanError, match="made for another model, or not to the end"),
    ):
        tensors(model, inputs("WanTransformer3DModel"))


def test_what_was_applied_stays_if_the_next_plan_does_not_fit(model: torch.nn.Module) -> None:
    handle = diffsparse.apply(model, AdaSpa(block=8), schedule=ALWAYS)
    with pytest.raises(PlanError):
        diffsparse.apply(model, PARO(plan_of(model, models={"transformer": "Other:0"})))
    tensors(model, inputs("WanTransformer3DModel"))
    assert handle.report().sparse_calls + handle.report().dense_calls > 0
    handle.remove()


def test_broken_files(model: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    plan_of(model).save(path)
    whole = path.read_bytes()
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(PlanError, match="can't read the plan"):
            PARO.load(path)
    path.write_bytes(b"x" * 1000)
    with pytest.raises(PlanError, match="can't read the plan"):
        PARO.load(path)
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputFileError, match="can't read the plan"):
            PARO.load(missing)
    with pytest.raises(InputFileError, match="no folder"):
        PARO.from_pretrained("not/a/repository/at/all")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(PlanError, match="can't read the plan"):
        PARO.load(path)


def test_nan_and_other_strategies(model: torch.nn.Module) -> None:
    with pytest.raises(PlanError, match="NaN or infinity"):
        plan_of(model, tensors={"transformer.blocks.0.attn1.widths": torch.tensor([1.0, torch.nan])})
    with pytest.raises(PlanError, match="wanted a plan of strategy 'paro'"):
        PARO(plan_of(model, strategy="sparse-vdit"))
    with pytest.raises(PlanError, match="wanted a plan of strategy 'sparse-vdit'"):
        SparseVDiT(plan_of(model))


FIRST = "transformer.blocks.0.attn1"
NONSENSE: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor | None], str]] = {
    "a setting missing": ({"block": ...}, {}, "lacks settings 'block'"),
    "a setting of a later release": ({"power": 3}, {}, "strange settings 'power'"),
    "block 0": ({"block": 0}, {}, "block wants a number of tokens from 1 to 4096"),
    "a block of text": ({"block": "8"}, {}, "block wants"),
    "a block beyond all use": ({"block": 10**400}, {}, "block wants"),
    "a block that the masks were not made for": (
        {"block": 4},
        {},
        r"masks' wants torch.uint8 1xheadsx41; got .* 1x2x11",
    ),
    "all blocks dropped": ({"sparsity": 1.0}, {}, "sparsity wants"),
    "no sparsity": ({"sparsity": None}, {}, "sparsity wants"),
    "more groups than masks": ({"groups": 2}, {}, "masks' wants torch.uint8 2xheads"),
    "orders as one text": ({"orders": "HWF"}, {}, "orders wants a list"),
    "an order that nobody knows": ({"orders": ["zigzag"]}, {}, "order wants one of"),
    "an order with a number beyond all use": ({"orders": ["tile" + "9" * 30 + "x1x1"]}, {}, "order wants one of"),
    "bits": ({"bits": 16.0}, {}, "bits wants one of 16, 8, 4"),
    "an order out of range": (
        {},
        {"orders": torch.tensor([0, 6], dtype=torch.uint8)},
        "numbers from 0 to 0; got 0 to 6",
    ),
    "negative orders": ({}, {"orders": torch.tensor([0, -1])}, "of torch.int64, which no plan holds"),
    "orders in between": ({}, {"orders": torch.tensor([0.0, 0.5])}, "orders' wants torch.uint8 heads"),
    "an order as one number": ({}, {"orders": torch.tensor(0, dtype=torch.uint8)}, "got torch.uint8 one number"),
    "no heads": ({}, {"orders": torch.zeros(0, dtype=torch.uint8)}, "orders' wants"),
    "three heads": ({}, {"orders": torch.zeros(3, dtype=torch.uint8)}, "differ in their heads"),
    "no masks": ({}, {"masks": None}, "lacks masks of 'transformer.blocks.0.attn1'"),
    "a tensor that nobody knows": ({}, {"widths": torch.zeros(2)}, "is none of orders, masks, incoherence"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_values_that_make_no_sense(name: str, model: torch.nn.Module) -> None:
    knobs, tensors, message = NONSENSE[name]
    plan = plan_of(model)
    settings = {key: value for key, value in {**plan.settings, **knobs}.items() if value is not ...}
    changed = {**plan.tensors, **{f"{FIRST}.{what}": tensor for what, tensor in tensors.items()}}
    with pytest.raises(PlanError, match=message):
        PARO(plan_of(model, settings=settings, tensors={n: x for n, x in changed.items() if x is not None}))


def test_modes_that_make_no_sense(model: torch.nn.Module) -> None:
    vdit = {"strategy": "sparse-vdit", "settings": {"sparsity": 0.5, "block": 8, "groups": None}}
    modes, columns = torch.tensor([[0, 5]], dtype=torch.uint8), torch.rand(2, 9)
    for parts, message in (
        ({"modes": modes, "columns": columns}, r"attn1.modes' wants numbers from 0 to 4"),
        ({"modes": modes % 5, "columns": -columns}, "columns' wants numbers from 0"),
        (
            {"modes": modes % 5, "columns": columns[:, :8]},
            "columns' wants torch.float32 headsx9; got torch.float32 2x8",
        ),
        ({"modes": modes[:0], "columns": columns}, "modes' wants torch.uint8 anyxheads"),
        ({}, "holds no tensors"),
    ):
        with pytest.raises(PlanError, match=message):
            SparseVDiT(plan_of(model, **vdit, tensors={f"{FIRST}.{what}": x for what, x in parts.items()}))
    right = {"modes": modes % 5, "columns": columns}
    SparseVDiT(plan_of(model, **vdit, tensors={f"{FIRST}.{what}": x for what, x in right.items()}))
    with pytest.raises(PlanError, match="lacks settings 'sparsity'"):
        SparseVDiT(plan_of(model, strategy="sparse-vdit", settings={"block": 8}))


def test_a_plan_for_heads_that_the_model_lacks(model: torch.nn.Module) -> None:
    plan = plan_of(model)
    more = {name: torch.cat([x, x], dim=x.ndim - 1 if "orders" in name else 1) for name, x in plan.tensors.items()}
    with pytest.raises(PlanError, match=r"has 4 heads in 'transformer.blocks.0.attn1', where the model has 2"):
        diffsparse.apply(model, PARO(plan_of(model, tensors=more)))
    blocks: Any = model.blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")
    with pytest.raises(PlanError, match=r"has 4 heads in 'transformer.blocks.0.attn1', where the model has 2"):
        diffsparse.apply(model, PARO(plan_of(model, tensors=more)))


def test_later_and_earlier_releases(model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.safetensors"
    monkeypatch.setattr(sealed, "FORMAT", 2)
    plan_of(model).save(path)
    monkeypatch.undo()
    with pytest.raises(PlanError, match=r"of a later release \(format 2, here it is 1\); update diffsparse"):
        PARO.load(path)
    from safetensors.torch import save_file

    header = {"strategy": "paro", "models": {}, "layout": vars(LAYOUT), "settings": {}}
    save_file({"a": torch.zeros(1)}, path, metadata={"diffsparse": json.dumps(header)})
    with pytest.raises(PlanError, match=r"no version of its format; .*calibrate again"):
        PARO.load(path)


def test_every_bit_counts(model: torch.nn.Module, tmp_path: Path) -> None:
    """All bits of all tensors, and the values of the header one by one."""
    path, plan = tmp_path / "plan.safetensors", plan_of(model)
    plan.save(path)
    data = path.read_bytes()
    start = len(data) - sum(x.numel() for x in plan.tensors.values())
    for place in range(start, len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(PlanError, match="was changed since it was written"):
            PARO.load(path)
    path.write_bytes(data.replace(b"0.5", b"0.6"))
    with pytest.raises(PlanError, match="was changed since it was written"):
        PARO.load(path)


def test_names_with_and_without_plans() -> None:
    with pytest.raises(ConfigError, match="wants a plan, as in paro:plan"):
        parse("paro")
    with pytest.raises(ConfigError, match="'adaspa' takes no plan"):
        parse("adaspa:plan.safetensors")


def test_sharing_on_the_hub(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    kept: dict[str, bytes] = {}

    class Hub:
        def __init__(self, token: str | None) -> None:
            assert token == "secret"

        def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> Any:
            assert (private, exist_ok) == (True, True)
            return type("Repository", (), {"repo_id": name})

        def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> str:
            kept[f"{repo_id}/{path_in_repo}"] = path_or_fileobj
            return "address"

    def download(name: str, file: str, **more: Any) -> str:
        assert more == {"revision": "main"}
        (tmp_path / "cached").write_bytes(kept[f"{name}/{file}"])
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    strategy = PARO(plan_of(model))
    assert strategy.push_to_hub("me/plan", private=True, token="secret") == "address"
    assert set(kept) == {f"me/plan/{FILE}"}
    assert PARO.from_pretrained("me/plan", revision="main") == strategy

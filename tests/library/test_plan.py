"""Plans: whole files, for one model and one layout, and a clear word where anything is amiss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import diffsparse
from diffsparse import PARO, AdaSpa, Layout, Schedule, SparseVDiT
from diffsparse.errors import ConfigError, InputFileError, PlanError
from diffsparse.plan import FILE, Plan, fingerprints
from diffsparse.strategies import parse
from diffsparse.strategies.paro import pack
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
    partial = plan_of(model, layout, tensors={})
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
        with pytest.raises(InputFileError, match="can't read the plan"):
            PARO.load(path)
    path.write_bytes(b"x" * 1000)
    with pytest.raises(InputFileError, match="can't read the plan"):
        PARO.load(path)
    with pytest.raises(InputFileError, match="can't read the plan"):
        PARO.load(tmp_path / "none.safetensors")
    with pytest.raises(InputFileError, match="no folder"):
        PARO.from_pretrained("not/a/repository/at/all")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputFileError, match="can't read the plan"):
        PARO.load(path)


def test_nan_and_other_strategies(model: torch.nn.Module) -> None:
    with pytest.raises(PlanError, match="NaN or infinity"):
        plan_of(model, tensors={"transformer.blocks.0.attn1.widths": torch.tensor([1.0, torch.nan])})
    with pytest.raises(PlanError, match="wanted a plan of strategy 'paro'"):
        PARO(plan_of(model, strategy="sparse-vdit"))
    with pytest.raises(PlanError, match="wanted a plan of strategy 'sparse-vdit'"):
        SparseVDiT(plan_of(model))


def test_values_that_make_no_sense(model: torch.nn.Module) -> None:
    with pytest.raises(PlanError, match="lacks the settings block, orders"):
        PARO(plan_of(model, settings={"sparsity": 0.5, "groups": 1}))
    with pytest.raises(PlanError, match="lacks the settings sparsity"):
        SparseVDiT(plan_of(model, strategy="sparse-vdit", settings={"block": 8}))
    wild = {"transformer.blocks.0.attn1.orders": torch.tensor([0, 6], dtype=torch.uint8)}
    with pytest.raises(PlanError, match=r"attn1.orders' holds numbers above 0"):
        PARO(plan_of(model, tensors=wild))
    wild = {"transformer.blocks.0.attn1.modes": torch.tensor([[0, 5]], dtype=torch.uint8)}
    with pytest.raises(PlanError, match=r"attn1.modes' holds numbers above 4"):
        SparseVDiT(plan_of(model, strategy="sparse-vdit", tensors=wild))


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

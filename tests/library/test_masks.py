"""Masks over any token, in any order of the tokens, sample by sample; and what a mask is taken for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffsparse
from diffsparse import AdaSpa, Compensated, Digest, Layout, Random, Schedule
from diffsparse.plans.sums import Sums
from diffsparse.seam.masks import Masks
from diffsparse.site.compute import DenseBackend
from diffsparse.site.timing import Reading
from diffsparse.strategies.base import in_order
from diffsparse.strategies.paro import PAROSearch
from diffsparse.strategies.sparse_vdit import SparseVDiTSearch
from support import exact
from support.sites import site
from support.strategies import BLOCK, HEADS, NAMES, every
from support.tiny_transformers import build, inputs, tensors

DIM = 16
edges, texts = st.integers(1, 5), st.integers(0, 11)


def run(strategy: Any, qkv: tuple[Tensor, ...], layout: Layout, keys: Tensor, steps: int = 4) -> list[Tensor]:
    """Outputs of a few steps, as a run calls a strategy: the first dense, with a search if there is one."""
    memory: dict[str, Any] = {}
    outs = []
    for step in range(steps):
        masked = partial(F.scaled_dot_product_attention, attn_mask=keys[:, None, None])
        here = replace(site(layout, step, steps, memory, key_mask=keys), dense_backend=DenseBackend("native", masked))
        method = getattr(strategy, "observe", None) if step == 0 else None
        outs.append(in_order(strategy, method or strategy.attend, qkv, here))
    return outs


@pytest.mark.parametrize("limit", [1.0, 0.0], ids=["sparse", "dense above the break-even"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_dropped_is_dense(name: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: whatever the order of the tokens and the mask over them, each sample's outputs are dense attention's."""
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: limit)

    @settings(deadline=None, max_examples=8, derandomize=True)
    @given(edges, edges, edges, texts, texts, st.integers(0, 2**16), st.sampled_from((0.3, 0.8, 1.1)), st.booleans())
    def holds(f: int, h: int, w: int, before: int, after: int, seed: int, share: float, added: bool) -> None:
        layout, lot = Layout(f, h, w, before, after), torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(3, 2, HEADS, layout.tokens, DIM, generator=lot)
        keys = torch.rand(2, layout.tokens, generator=lot) < share
        keys[:, seed % layout.tokens] = True
        if added:
            keys = torch.randn(keys.shape, generator=lot).masked_fill(~keys, -torch.inf)
        want, _ = exact.softmax_attention(q, k, v, keys[:, None, None], DIM**-0.5)
        bound = 2 * exact.tolerance(want, exact.eager(q, k, v, keys[:, None, None], DIM**-0.5))
        for step, out in enumerate(run(every(layout, 0.0)[name], (q, k, v), layout, keys)):
            error = (out.double() - want).abs().max().item()
            assert error <= bound, f"step {step}"

    holds()


def two(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of two samples that differ."""
    return {name: torch.cat([x, x.flip(-1)]) if torch.is_tensor(x) and x.ndim else x for name, x in kwargs.items()}


def padded(name: str, *masks: str) -> dict[str, Any]:
    """The second of two prompts is the shorter one."""
    kwargs = two(inputs(name))
    for mask in masks:
        kwargs[mask] = kwargs[mask].clone()
        kwargs[mask][1, 3:] = 0
    return kwargs


def ernie() -> dict[str, Any]:
    return {**two(inputs("ErnieImageTransformer2DModel")), "text_lens": torch.tensor([6, 3])}


def krea() -> dict[str, Any]:
    kwargs = inputs("Krea2Transformer2DModel")
    return {**kwargs, "encoder_attention_mask": torch.arange(6)[None] < 4}


def z_image() -> dict[str, Any]:
    kwargs, lot = inputs("ZImageTransformer2DModel"), torch.Generator().manual_seed(1)
    prompts = [torch.randn(length, 16, generator=lot) for length in (70, 9)]
    return {"x": [kwargs["x"][0], kwargs["x"][0].flip(-1)], "cap_feats": prompts, "t": torch.zeros(2)}


def omnigen_model() -> torch.nn.Module:
    torch.manual_seed(0)
    rope = {"long_factor": [1, 2], "short_factor": [1, 2]}
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32}
    knobs = {"num_layers": 2, "pad_token_id": 0, "vocab_size": 50, "in_channels": 4, "time_step_dim": 4}
    return diffusers.OmniGenTransformer2DModel(**sizes, **knobs, rope_scaling=rope).eval()


def omnigen() -> dict[str, Any]:
    """A word sees those before it, the image all but the padding of the second prompt."""
    words, image, lot = 9, 16, torch.Generator().manual_seed(1)
    tokens = words + 1 + image  # one of them is the time
    mask = torch.ones(2, tokens, tokens).tril()
    mask[:, words + 1 :] = 1
    mask[1, :, 1:3] = 0
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=lot),
        "timestep": torch.rand(2, generator=lot),
        "input_ids": torch.randint(0, 50, (2, words), generator=lot),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(tokens)[None].expand(2, -1),
    }


FAMILIES = {
    "ErnieImageTransformer2DModel": ernie,
    "HunyuanVideo15Transformer3DModel": partial(
        padded, "HunyuanVideo15Transformer3DModel", "encoder_attention_mask", "encoder_attention_mask_2"
    ),
    "HunyuanVideoTransformer3DModel": partial(padded, "HunyuanVideoTransformer3DModel", "encoder_attention_mask"),
    "Krea2Transformer2DModel": krea,
    "Lumina2Transformer2DModel": partial(padded, "Lumina2Transformer2DModel", "encoder_attention_mask"),
    "OmniGenTransformer2DModel": omnigen,
    "QwenImageTransformer2DModel": partial(padded, "QwenImageTransformer2DModel", "encoder_hidden_states_mask"),
    "ZImageTransformer2DModel": z_image,
}
KEEP_ALL = (
    Random(0.0, block=BLOCK, order="WHF"),
    AdaSpa(0.0, (), BLOCK, head_adaptive=False, order="auto"),
    Digest(0.0, BLOCK),
    Compensated(Random(0.0, block=BLOCK, order="hilbert"), "tail"),
)


class Hidden:
    """Runs dense and counts the keys that are hidden."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        self.counts.append(0 if site.key_mask is None else int((~site.key_mask).sum()))
        return site.dense(q, k, v)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_unlike_length(name: str) -> None:
    model, kwargs = omnigen_model() if "OmniGen" in name else build(name), FAMILIES[name]()
    want, hidden = tensors(model, kwargs), Hidden()
    with diffsparse.apply(model, hidden, schedule=Schedule(dense_first=0)):
        tensors(model, kwargs)
    assert sum(hidden.counts), "the mask hides something"
    for strategy in KEEP_ALL:
        with diffsparse.apply(model, strategy, schedule=Schedule(dense_first=0), strict=True) as handle:
            outs = [tensors(model, kwargs) for _ in range(2)]
            assert handle.report().sparse_calls
        for out in outs:
            torch.testing.assert_close(out, want, msg=lambda text, s=strategy: f"{s}: {text}")


LAYOUT = Layout(2, 3, 4, text_before=2)
N = LAYOUT.tokens
PADDING = torch.arange(N).expand(2, 1, N, N) < N - 3
CAUSAL = torch.ones(2, 1, N, N, dtype=torch.bool).tril()
DIFFERS = "a mask that differs between video rows"


def late(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Reading], list[Reading]]:
    """Readings of a device that is slow to answer: those that were waited for, and those that have arrived."""
    waits: list[Reading] = []
    here: list[Reading] = []

    class Late(Reading):
        def value(self) -> float | None:
            return super().value() if self in here else None

        def wait(self) -> float:
            waits.append(self)
            return super().wait()

    monkeypatch.setattr("diffsparse.seam.masks.Reading", Late)
    return waits, here


@pytest.mark.parametrize("slow", [False, True])
def test_a_layer_with_a_mask_of_its_own_falls_back_alone(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of two layers are alike in shape and dtype, and not in what they mean."""
    if slow:
        late(monkeypatch)
    name = "HunyuanVideoTransformer3DModel"
    model, kwargs = build(name), FAMILIES[name]()

    def causal(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        n = kwargs["hidden_states"].shape[1] + kwargs["encoder_hidden_states"].shape[1]
        return args, {**kwargs, "attention_mask": torch.ones(2, 1, n, n, dtype=torch.bool).tril()}

    def padding(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        n = kwargs["attention_mask"].shape[-1]
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"].expand(-1, -1, n, -1)}

    layers = [block.attn for block in model.transformer_blocks] + [b.attn for b in model.single_transformer_blocks]
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(causal if i else padding, with_kwargs=True)
    want = tensors(model, kwargs)
    with diffsparse.apply(model, Random(0.0, block=BLOCK), schedule=Schedule(dense_first=0)) as handle:
        for _ in range(2):
            torch.testing.assert_close(tensors(model, kwargs), want)
        report = handle.report()
    assert report.fallbacks == {DIFFERS: len(report.calls) - report.sparse_calls}
    assert report.sparse_calls == len(report.calls) // len(layers)


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_is_looked_at_anew(inference: bool) -> None:
    """Where it is another tensor, at the place of one that is gone or not; where it was changed since the last step."""
    with torch.inference_mode(inference):
        masks, mask = Masks(), PADDING.clone()

        def obstacle(layer: int, step: int, mask: Tensor) -> str | None:
            return masks.read(mask, 2, LAYOUT, (layer, 0, "cond"), (0, step, "cond"))[1]

        assert obstacle(0, 0, mask) is None
        assert obstacle(1, 0, CAUSAL.clone()) == DIFFERS
        assert [obstacle(2, 0, x.clone()) for x in (PADDING, CAUSAL, PADDING)] == [None, DIFFERS, None]
        assert obstacle(0, 1, CAUSAL) == DIFFERS
        mask.copy_(CAUSAL)
        assert obstacle(0, 2, mask) == DIFFERS
        keys, none = masks.read(torch.where(PADDING, 0.0, -1e9)[:1], 2, LAYOUT, (0, 0, "cond"), (0, 3, "cond"))
        assert none is None
        assert keys is not None
        assert torch.equal(keys.keys, PADDING[:, 0, 0])
        keys, none = masks.read(PADDING.float(), 2, LAYOUT, (0, 0, "cond"), (0, 4, "cond"))
        assert none is None
        assert keys is not None
        assert torch.equal(keys.keys, PADDING[:, 0, 0].float()), "ones are added, zeros hide nothing"
        assert obstacle(0, 4, PADDING.repeat(1, 2, 1, 1)) == "a mask that differs by head"
        assert obstacle(0, 4, PADDING.expand(-1, 2, -1, -1)) is None


def test_no_step_but_the_first_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that answers late: the mask is what it was until the answer is here, and a wrong guess is told."""
    waits, here = late(monkeypatch)
    masks = Masks()

    def step(number: int, mask: Tensor) -> list[str | None]:
        moment = (0, number, "cond")
        return [masks.read(mask.clone(), 2, LAYOUT, (layer, 0, "cond"), moment)[1] for layer in range(3)]

    assert step(0, PADDING) == [None] * 3
    assert len(waits) == 3
    assert step(1, PADDING) == [None] * 3
    assert step(2, CAUSAL) == [None] * 3, "not known yet"
    here += [reading for *_, reading in masks._pending]
    with pytest.warns(UserWarning, match=f"changed its kind .* from padding to {DIFFERS}"):
        assert step(3, CAUSAL) == [DIFFERS] * 3
    assert len(waits) == 3
    layers = [masks.read(PADDING, 2, LAYOUT, (layer, 1, "cond"), (0, 4, "cond"))[1] for layer in range(3)]
    assert layers == [None] * 3
    assert len(set(waits[3:])) == 1, "layers that get the same tensor share one look"
    assert masks.read(PADDING[:, :, :1], 2, LAYOUT, (0, 2, "cond"), (0, 4, "cond"))[1] is None
    assert len(waits) == 6, "one row of yes and no needs none"


SEARCHES = {
    "paro, recall": PAROSearch(0.5, block=8),
    "paro, the paper's metric": PAROSearch(0.5, metric="paper", block=8),
    "sparse-vdit": SparseVDiTSearch(0.5, block=8),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_hidden_has_no_say_in_a_plan(name: str) -> None:
    """Searches find the same, whatever the keys and values are that nobody sees."""
    layout = Layout(3, 4, 4, text_before=3)
    q, k, v, others = torch.randn(4, 2, HEADS, layout.tokens, DIM)
    keys = torch.rand(2, layout.tokens) < 0.7

    def found(k: Tensor, v: Tensor) -> tuple[Any, dict[str, Tensor]]:
        sums = Sums()
        for number in range(SEARCHES[name].passes):
            for step in range(4):
                here = site(layout, step, 4, key_mask=keys)
                SEARCHES[name].watcher(number, sums).attend(q, k, v, here)
        return SEARCHES[name].plan(sums)[1], sums.tensors

    hide = partial(torch.where, keys[:, None, :, None], other=5 * others)
    for want, got in zip(found(k, v), found(hide(k), hide(v)), strict=True):
        assert want
        torch.testing.assert_close(got, want)

"""`Dense()` changes no bit: on classes, on pipelines, at every call, and nothing is left behind."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers
import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import Dense, DiffsparseError, Random
from diffsparse.errors import DenseFallbackError, UnsupportedModelError
from diffsparse.seam.targets import attentions
from support import tiny_transformers
from support.oracle import ALWAYS, LEFT_ALONE, left_as_it_was, processors, same
from support.tiny_pipelines import BUILDERS, run
from support.tiny_transformers import CASES, OTHER, Shape, build, case_of, inputs, tensors

# Classes that stay dense, and what each of their calls is told.
UNTOUCHED: dict[str, str] = {
    "WanAnimate2Transformer3DModel": "the processor computes attention without scaled_dot_product_attention",
}
FIXED_SIZE = {"HunyuanDiT2DModel", "LatteTransformer3DModel", "LuminaNextDiT2DModel"}


@pytest.mark.filterwarnings("ignore:.*none of its attention was recognised")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", CASES)
def test_transformers(name: str) -> None:
    """`test_walk.py` compares one model with itself; here is a second one of its class beside it."""
    model, twin = build(name), build(name)
    want, before = tensors(model, inputs(name)), processors(model)
    with diffsparse.apply(model, Dense(), schedule=ALWAYS) as handle:
        assert same(tensors(model, inputs(name)), want)
        assert set(handle.report().fallbacks) == ({UNTOUCHED[name]} if name in UNTOUCHED else set())
        assert same(tensors(twin, inputs(name)), want), "a second model of the class"
        assert [cls for _, cls in processors(twin)] == [cls for _, cls in before]
    left_as_it_was(model, before)


class Spy:
    """Runs dense and remembers where the tokens were, and the keys of the first call of each layer."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[Any, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        self.calls.setdefault(site.layer, (site.layout, k.clone()))
        return site.dense(q, k, v, reason="watched")


def watch(name: str, kwargs: dict[str, Any]) -> dict[str, tuple[Any, Tensor]]:
    model, spy = build(name), Spy()
    with diffsparse.apply(model, spy, schedule=ALWAYS):
        tensors(model, kwargs)
    return spy.calls


@pytest.mark.parametrize("shape", [Shape(), OTHER], ids=["small", "large"])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].layout])
def test_layouts(name: str, shape: Shape) -> None:
    """Joint layers are read as the table of this test has it; other layers see the same grid without text."""
    shape = Shape() if name in FIXED_SIZE else shape
    want = CASES[name].layout(shape)  # type: ignore[misc]
    found = {
        (x.frames, x.height, x.width, x.text_before, x.text_after) for x, _ in watch(name, inputs(name, shape)).values()
    }
    assert want in found
    assert found <= {want, (*want[:3], 0, 0)}


# Mochi pools its text into the modulation of all tokens: there the words are everywhere.
JOINT = [
    name
    for name in CASES
    if (layout := CASES[name].layout) and sum(layout(Shape())[3:]) and name != "MochiTransformer3DModel"
]


@pytest.mark.parametrize("name", JOINT)
def test_text_is_where_the_layout_says(name: str) -> None:
    """Other words change the keys of the first joint layer in its text rows, and in no other."""
    first, other, text = inputs(name), inputs(name), case_of(name).text
    torch.manual_seed(1)
    other[text] = torch.randn_like(first[text]) if first[text].is_floating_point() else first[text] + 1
    a, b = watch(name, first), watch(name, other)
    layer = next(layer for layer, (layout, _) in a.items() if layout.text_before + layout.text_after)
    layout, keys = a[layer]
    changed = (keys != b[layer][1]).flatten(3).any(-1).any(1)[0].nonzero().flatten()
    text = [*range(layout.text_before), *range(layout.tokens - layout.text_after, layout.tokens)]
    assert len(changed)
    assert set(changed.tolist()) <= set(text)


@pytest.mark.parametrize("name", BUILDERS)
def test_pipelines(name: str) -> None:
    pipe, call = BUILDERS[name]()
    want = run(pipe, call)
    again = run(pipe, call)
    assert same(again, want), "the untouched pipeline repeats itself"
    handle = diffsparse.apply(pipe, Dense(), schedule=ALWAYS)
    assert same(run(pipe, call), want)
    assert handle.report().dense_calls > 0
    assert same(run(pipe, call), want), "second call"
    handle.remove()
    assert same(run(pipe, call), want), "after removal"


def test_nothing_to_adopt_is_an_error_that_lists_what_is_supported() -> None:
    with pytest.raises(DiffsparseError, match=r"Wanted: a pipeline .*Wan, HunyuanVideo"):
        diffsparse.apply(torch.nn.Linear(2, 2), Dense())
    with pytest.raises(DiffsparseError, match="holds no transformer"):
        diffsparse.apply(object(), Dense())


@pytest.mark.filterwarnings("ignore:.*none of its attention was recognised")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", CASES)
def test_no_call_is_dense_or_unseen_without_a_reason(name: str) -> None:
    model = build(name)
    with diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS) as handle:
        tensors(model, inputs(name))
        report = handle.report()
    seen = {call.layer for call in report.calls}
    assert not [path for path, _ in attentions(model) if path not in seen and not LEFT_ALONE.search(path)]
    assert set(report.fallbacks) == ({UNTOUCHED[name]} if name in UNTOUCHED else set())
    assert report.sparse_calls + sum(report.fallbacks.values()) == len(report.calls) > 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", CASES)
def test_strict_raises_for_each_call_that_would_be_dense(name: str) -> None:
    model = build(name)
    with diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS, strict=True) as handle:
        if name in UNTOUCHED:
            with pytest.raises(DenseFallbackError, match=UNTOUCHED[name]):
                tensors(model, inputs(name))
        else:
            tensors(model, inputs(name))
            assert handle.report().dense_calls == 0


@pytest.mark.skipif(not hasattr(diffusers, "BriaFibo2Transformer2DModel"), reason="a later Diffusers has it")
def test_layers_of_no_known_order_are_counted() -> None:
    """Bria Fibo 2: before or after the image stand tokens that it makes of texts, and it says nowhere where."""
    name = "BriaFibo2Transformer2DModel"
    model, kwargs = build(name), inputs(name)
    text = kwargs["encoder_hidden_states"]
    kwargs |= {key: torch.cat([kwargs[key]] * 2) for key in ("hidden_states", "timestep", "encoder_hidden_states")}
    kwargs["encoder_attention_mask"] = torch.ones(2, text.shape[2], dtype=torch.bool)
    with diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS) as handle:
        with pytest.warns(UserWarning, match="none of its attention was recognised"):
            tensors(model, kwargs)
        report = handle.report()
    assert report.fallbacks == {"the order of the tokens is not known": 3}
    assert {c.layer for c in report.calls} == {"noise_refiner.0.attention", "layers.0.attention", "layers.1.attention"}
    with diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS, strict=True), pytest.raises(DenseFallbackError):
        tensors(model, kwargs)


def test_a_mask_of_ones_is_added() -> None:
    """Chroma's pipeline makes its mask in the model's dtype: to SDPA that is a bias of 0 or 1, by row and column."""
    name = "ChromaTransformer2DModel"
    model, kwargs = build(name), inputs(name)
    mask = torch.ones(1, kwargs["txt_ids"].shape[0] + kwargs["hidden_states"].shape[1])
    mask[:, 4] = 0
    kwargs["attention_mask"] = mask
    want = tensors(model, kwargs)
    with diffsparse.apply(model, Dense(), schedule=ALWAYS):
        assert same(tensors(model, kwargs), want)
    with diffsparse.apply(model, Random(0.0, block=8), schedule=ALWAYS, strict=True) as handle:
        for x, y in zip(tensors(model, kwargs), want, strict=True):
            torch.testing.assert_close(x, y)
        assert handle.report().sparse_calls == len(handle.report().calls) > 0
        kwargs["attention_mask"] = None
        assert not torch.allclose(tensors(model, kwargs)[0], want[0], rtol=1e-3, atol=1e-3), "the mask matters"


def test_attention_that_goes_another_way_is_counted() -> None:
    """A processor may have a kernel of its own, or a mask that only flex attention reads."""
    name = "WanTransformer3DModel"
    model = build(name)

    class OnesOwn:
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden_states

    model.blocks[0].attn1.processor = OnesOwn()  # type: ignore[index, union-attr]
    with diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS) as handle:
        tensors(model, inputs(name))
        report = handle.report()
    assert report.fallbacks == {"the processor computes attention without scaled_dot_product_attention": 1}
    assert report.sparse_calls == 1
    with (
        diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS, strict=True),
        pytest.raises(DenseFallbackError, match=r"blocks.0.attn1.*without scaled_dot_product_attention"),
    ):
        tensors(model, inputs(name))


def test_attention_that_is_not_recognised_is_told() -> None:
    """Silence would look like a speed-up of one."""
    model, kwargs = build("AceStepTransformer1DModel"), inputs("AceStepTransformer1DModel")
    with diffsparse.apply(model, Dense()):
        with pytest.warns(UserWarning, match="none of its attention was recognised"):
            tensors(model, kwargs)
        tensors(model, kwargs)  # once is enough


def test_a_pass_that_fails_says_nothing_about_the_model() -> None:
    name = "WanTransformer3DModel"
    model, kwargs = build(name), inputs(name)
    with diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS, strict=True) as handle:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                tensors(model, {**kwargs, "encoder_hidden_states": torch.randn(1, 4, 3)})
        tensors(model, kwargs)
        assert handle.report().sparse_calls == 2


def far(own: bool) -> torch.nn.Module:
    model = build("AnyFlowFARTransformer3DModel")
    if own:
        from diffusers.models.transformers.transformer_anyflow_far import AnyFlowAttnProcessor

        model.blocks[0].attn1.set_processor(AnyFlowAttnProcessor())  # type: ignore[index, union-attr]
    return model


def test_processors_that_insist_on_a_backend_are_left_alone() -> None:
    with pytest.raises(UnsupportedModelError, match="nor AnyFlowCausalAttnProcessor"):
        diffsparse.apply(far(own=False), Dense())
    model = far(own=True)
    before = processors(model)
    with pytest.warns(UserWarning, match="AnyFlowCausalAttnProcessor runs on one backend only"):
        handle = diffsparse.apply(model, Dense())
    left: Any = model.blocks[1].attn1.processor  # type: ignore[index, union-attr]
    assert (type(left).__name__, left._attention_backend) == ("AnyFlowCausalAttnProcessor", "flex")
    assert handle.report().modules == 3
    handle.remove()
    assert processors(model) == before


@pytest.mark.parametrize("several", [False, True])
def test_controlnets_run_by_the_strategy_too(several: bool) -> None:
    """They have a run of their own beside the transformer's, and are given back with it."""
    name = "SD3Transformer2DModel"
    model, kwargs = build(name), inputs(name)
    nets = [
        diffusers.SD3ControlNetModel.from_transformer(model, num_layers=1, num_extra_conditioning_channels=0).eval()
        for _ in range(1 + several)
    ]
    controlnet = diffusers.SD3MultiControlNetModel(nets) if several else nets[0]

    class Pipe:
        components: ClassVar[dict[str, Any]] = {"transformer": model, "controlnet": controlnet, "tokenizer": None}

    def run() -> list[Tensor]:
        cond = [kwargs["hidden_states"]] * len(nets) if several else kwargs["hidden_states"]
        more = {"controlnet_cond": cond, "conditioning_scale": [1.0] * len(nets) if several else 1.0}
        return [*tensors(controlnet, {**kwargs, **more}), *tensors(model, kwargs)]

    before = processors(controlnet)
    want = run()
    with diffsparse.apply(Pipe(), Dense(), schedule=ALWAYS):
        assert same(run(), want)
    with diffsparse.apply(Pipe(), Random(0.5, block=8), schedule=ALWAYS, strict=True) as handle:
        assert not same(run(), want)
        assert handle.report().sparse_calls == len(handle.report().calls) == 3 + 2 * len(nets)
        assert handle.report().notes == []
    assert same(run(), want), "after removal"
    assert processors(controlnet) == before


def test_controlnets_of_other_kinds_are_named() -> None:
    """They run dense beside the transformer."""
    blocks = {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    sizes = {"layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16}
    controlnet = diffusers.ControlNetModel(**blocks, **sizes)
    model = build("SD3Transformer2DModel")

    class Pipe:
        components: ClassVar[dict[str, Any]] = {"transformer": model, "controlnet": controlnet}

    with diffsparse.apply(Pipe(), Random(0.5, block=8), schedule=ALWAYS) as handle:
        assert handle.report().notes == [
            "controlnet (ControlNetModel) runs dense: the order of its tokens is not known"
        ]


def test_inputs_are_reproducible() -> None:
    """The oracle of this file compares calls: their inputs must be the same."""
    for name in ("WanTransformer3DModel", "FluxTransformer2DModel"):
        a, b = tiny_transformers.inputs(name), tiny_transformers.inputs(name)
        assert all(torch.equal(x, b[key]) for key, x in a.items() if torch.is_tensor(x))

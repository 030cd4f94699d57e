"""The models of 2026, and others by name, in all their modes: what is dropped, what is kept, and guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import diffsparse
from diffsparse import GNA, AdaSpa, DiffsparseError, Digest, Layout, Schedule, Strategy
from diffsparse.site.record import CallRecord
from diffsparse.strategies.base import Wrapper
from diffsparse_kernels.masks import each_head
from support.exact import eager, softmax_attention, tolerance
from support.sites import row_share
from support.tiny_newer import CASES as NEWER
from support.tiny_newer import MODES, h3_inputs, qwen21_inputs
from support.tiny_transformers import OTHER, Inputs, build, case_of, inputs, made, tensors

ALWAYS, BLOCK = Schedule(dense_first=0), 8
OLDER = (
    "ChromaTransformer2DModel",
    "Flux2Transformer2DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "Ideogram4Transformer2DModel",
    "LTXVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel",
    "LuminaNextDiT2DModel",
    "NucleusMoEImageTransformer2DModel",
    "PRXTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SkyReelsV2Transformer3DModel",
)
NAMES = [*OLDER, *(name for name in NEWER if name != "WanAnimate2Transformer3DModel"), *MODES]
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def model_and_inputs(name: str) -> tuple[torch.nn.Module, Inputs]:
    if name not in MODES:
        return build(name), inputs(name, OTHER) if name != "LuminaNextDiT2DModel" else inputs(name)
    mode = MODES[name]
    model = made(mode.name, {**case_of(mode.name).config, **mode.config})
    mode.prepare(model)
    torch.manual_seed(0)
    return model, mode.inputs(OTHER)


def exact(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
) -> Tensor:
    """SDPA in float64."""
    wide = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.double()
    own = torch._C._nn.scaled_dot_product_attention
    return own(query.double(), key.double(), value.double(), wide, *rest, **more).to(query.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_dropped_is_dense(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the sparse kernel; as near as two dense kernels are to each other."""
    model, kwargs = model_and_inputs(name)
    want = tensors(model, kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", exact)
        best = tensors(model, kwargs)
    with diffsparse.apply(model, AdaSpa(0.0, block=BLOCK), schedule=ALWAYS, strict=True) as handle:
        tensors(model, kwargs)
        found = tensors(model, kwargs)
        assert handle.report().sparse_calls > 0
    for got, dense, ideal in zip(found, want, best, strict=True):
        if dense.numel():  # a model with sound may be asked for none
            most = 4 * (dense - ideal).abs().max() + 8 * torch.finfo(dense.dtype).eps * dense.abs().max()
            assert (got - ideal).abs().max() <= most


class Watched(Wrapper):
    """Remembers where each call was, and what was recorded of it."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.calls: list[tuple[Layout, CallRecord]] = []
        self.__post_init__()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        self.calls.append((site.layout, site.record))
        return self.strategy.attend(q, k, v, site)


STRATEGIES: dict[str, Strategy] = {
    "AdaSpa": AdaSpa(0.6, block=BLOCK, head_adaptive=False),
    "Digest": Digest(0.4, block=BLOCK),
    "GNA": GNA(sparsity=0.5, block=BLOCK),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", STRATEGIES)
def test_density_is_as_asked(name: str, method: str) -> None:
    model, kwargs = model_and_inputs(name)
    strategy = Watched(STRATEGIES[method])
    with diffsparse.apply(model, strategy, schedule=ALWAYS, strict=True):
        for _ in range(2):
            assert all(x.isfinite().all() for x in tensors(model, kwargs))
    found = [(layout, record) for layout, record in strategy.calls if record.kind == "sparse"]
    assert found
    for layout, record in found:
        if method == "AdaSpa":
            assert float(record.density) == pytest.approx(row_share(layout, 0.6, BLOCK), rel=1e-5)
        assert 0 < float(record.density) <= 1 + BLOCK / layout.tokens * 3


@pytest.mark.parametrize("name", NAMES)
def test_guidance_acts_or_refuses(name: str) -> None:
    model, kwargs = model_and_inputs(name)
    want = tensors(model, kwargs)
    try:
        handle = diffsparse.guide(model, "0.1", head_scale=2.0)
    except DiffsparseError:
        return
    with handle:
        found = tensors(model, kwargs)
        assert handle.report().perturbed > 0
    assert all(x.isfinite().all() for x in found)
    assert any(not torch.equal(x, y) for x, y in zip(found, want, strict=True))
    again = tensors(model, kwargs)
    assert all(torch.equal(x, y) for x, y in zip(again, want, strict=True)), "after removal"


class Compared(Watched):
    """Compares the rows that are always computed with dense attention."""

    rows: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        out = super().attend(q, k, v, site)
        layout = site.layout
        others = torch.ones(layout.tokens, dtype=torch.bool)
        others[layout.span] = False
        for span in layout.spans:
            others[span.start : span.stop] = span.kind == "audio"
        allowed = each_head(site.key_mask)[:, :, None]
        want, _ = softmax_attention(q, k, v, allowed, site.scale_of(q))
        most = tolerance(want, eager(q, k, v, allowed, site.scale_of(q)))
        assert (out[:, :, others].double() - want[:, :, others]).abs().max() <= most
        self.rows += int(others.sum())
        return out


@pytest.mark.parametrize(("frames", "kind"), [(6, "condition"), (2, "reference")])
@pytest.mark.parametrize("method", STRATEGIES)
def test_text_and_audio_of_h3_are_exact(method: str, frames: int, kind: str) -> None:
    """Two samples of which one is padded, a key frame, which beside a long video is a sink, and sound."""
    name = "MiniMaxH3Transformer3DModel"
    model, kwargs = build(name), h3_inputs(OTHER._replace(frames=frames), conditions=1, audio=6)
    kwargs |= {key: torch.cat([x, x.flip(-1)]) for key, x in kwargs.items() if key.endswith("hidden_states")}
    tokens = len(kwargs["position_ids"])
    seen = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    seen[1, ..., kwargs["text_indices"][-3:]] = False
    for block in model.transformer_blocks:  # the model itself takes no mask; processors of one's own may
        block.attn.register_forward_pre_hook(lambda _, args: (*args[:2], seen))
    dense = tensors(model, kwargs)
    strategy = Compared(STRATEGIES[method])
    with diffsparse.apply(model, strategy, schedule=ALWAYS, strict=True):
        found = tensors(model, kwargs)
        tensors(model, kwargs)
    assert strategy.rows > 0
    assert any(not torch.equal(x, y) for x, y in zip(found, dense, strict=True))
    layout, record = strategy.calls[-1]
    assert [span.kind for span in layout.spans] == [kind, "audio"]
    if method == "AdaSpa":
        assert float(record.density) == pytest.approx(row_share(layout, 0.6, BLOCK), rel=1e-5)


@pytest.mark.parametrize("text", [9, 60])
@pytest.mark.parametrize("conditions", [0, 1, 2])
def test_only_the_target_of_qwen_is_over_the_grid(text: int, conditions: int) -> None:
    """Neither words nor conditions among themselves, be they as many as the image's tokens or more."""
    name = "QwenImage21Transformer2DModel"
    shape = OTHER._replace(text=text)
    torch.manual_seed(0)
    model, kwargs = build(name), qwen21_inputs(shape, conditions)
    strategy = Watched(AdaSpa(0.5, block=BLOCK))
    with diffsparse.apply(model, strategy, schedule=ALWAYS, strict=True) as handle:
        tensors(model, kwargs)
        assert len(handle.report().calls) == len(strategy.calls) == 2, "one for each block"
    for layout, _ in strategy.calls:
        assert layout.queries == layout.video
        assert layout.asked == ((layout.text_before, layout.tokens),)

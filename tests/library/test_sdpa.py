"""Users who put a function of their own in place of `F.scaled_dot_product_attention`, and `torch.autocast`."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

import diffsparse
from diffsparse import GNA, AdaSpa, Compensated, Dense, DiffsparseError, Digest, Random, Schedule, Tangent
from diffsparse.errors import DenseFallbackError
from diffsparse.guidance.perturb import KINDS
from diffsparse.seam.call import Call
from diffsparse.seam.hooks import run_of
from diffsparse.seam.sdpa import OWN
from support.tiny_transformers import build, inputs, tensors

NAMES = ["WanTransformer3DModel", "SD3Transformer2DModel"]  # by Diffusers' dispatcher, and directly
ALWAYS = Schedule(dense_first=0)


@pytest.fixture(autouse=True)
def _own_function() -> Iterator[None]:
    yield
    F.scaled_dot_product_attention = OWN


class Theirs:
    """A function of the user's: a wrapper of torch's, or one that has nothing to do with it. It counts its calls."""

    def __init__(self, wraps: bool) -> None:
        self.wraps, self.calls = wraps, 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **rest: Any) -> Tensor:
        self.calls += 1
        if self.wraps:
            return OWN(query, key, value, attn_mask=attn_mask, **rest)
        scores = query @ key.mT * (rest.get("scale") or query.shape[-1] ** -0.5)
        return (scores if attn_mask is None else scores.masked_fill(~attn_mask, -torch.inf)).softmax(-1) @ value


def passes(model: Any, name: str) -> list[Tensor]:
    return [tensors(model, inputs(name))[0] for _ in range(2)]


@pytest.mark.parametrize("wraps", [True, False], ids=["wrapper", "another"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_sparse_acts_and_dense_calls_are_theirs(name: str, when: str, wraps: bool) -> None:
    model, theirs = build(name), Theirs(wraps)
    strategy = Random(0.5, block=8)
    with diffsparse.apply(model, strategy, schedule=ALWAYS) as handle:
        want, expected = passes(model, name), handle.report()
    if when == "before":
        F.scaled_dot_product_attention = theirs
    with diffsparse.apply(model, strategy, schedule=ALWAYS) as handle:
        F.scaled_dot_product_attention = theirs
        for a, b in zip(passes(model, name), want, strict=True):
            torch.testing.assert_close(a, b)
        assert handle.report().sparse_calls == expected.sparse_calls > 0
        assert F.scaled_dot_product_attention is theirs
        sparse_calls, theirs.calls = theirs.calls, 0
    assert F.scaled_dot_product_attention is theirs, "removal leaves it in place"
    dense = passes(model, name)
    untouched_calls, theirs.calls = theirs.calls, 0
    assert sparse_calls == untouched_calls - expected.sparse_calls, "cross-attention is theirs, and once"
    with diffsparse.apply(model, Dense(), schedule=ALWAYS):
        assert all(map(torch.equal, passes(model, name), dense))
        assert theirs.calls == untouched_calls
    assert F.scaled_dot_product_attention is theirs


def test_it_is_the_function_as_it_stands_at_the_moment() -> None:
    model, first, second = build(NAMES[0]), Theirs(True), Theirs(False)
    with diffsparse.apply(model, Dense(), schedule=ALWAYS):
        F.scaled_dot_product_attention = first
        passes(model, NAMES[0])
        counted = first.calls
        F.scaled_dot_product_attention = second
        passes(model, NAMES[0])
        F.scaled_dot_product_attention = OWN
        passes(model, NAMES[0])
    assert first.calls == counted == second.calls > 0


def test_replaced_before_the_import() -> None:
    code = f"""
import torch, torch.nn.functional as F
own = F.scaled_dot_product_attention
F.scaled_dot_product_attention = theirs = lambda *a, **k: own(*a, **k)
import diffsparse
from support.tiny_transformers import build, inputs, tensors
model = build({NAMES[0]!r})
with diffsparse.apply(model, diffsparse.Random(0.5, block=8), schedule=diffsparse.Schedule(0)) as handle:
    tensors(model, inputs({NAMES[0]!r}))
    print(handle.report().sparse_calls)
assert F.scaled_dot_product_attention is theirs
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.strip() == "2", done.stderr


def test_a_function_that_knows_no_masks_is_not_asked_for_one() -> None:
    """SageAttention's third argument by position is no mask, and it has no flag for grouped heads."""

    def fast(q: Tensor, k: Tensor, v: Tensor, layout: str = "HND", is_causal: bool = False) -> Tensor:
        assert layout == "HND"
        return OWN(q, k, v, is_causal=is_causal)

    model = build(NAMES[0])
    want = passes(model, NAMES[0])
    with diffsparse.apply(model, Dense(), schedule=ALWAYS):
        for layer in run_of(model).layers:  # type: ignore[union-attr]
            F.scaled_dot_product_attention = fast
            call = Call(*torch.randn(3, 1, 2, 8, 4).unbind(0))
            assert torch.equal(call.dense(layer.user_backend()), OWN(call.query, call.key, call.value))
            F.scaled_dot_product_attention = OWN
        assert all(map(torch.equal, passes(model, NAMES[0]), want))


def test_threads_do_not_see_each_others_redirects() -> None:
    """While one thread runs an adopted processor, another's own calls go to the user's function."""
    model, theirs, inside, go_on = build(NAMES[0]), Theirs(True), threading.Event(), threading.Event()

    class Waits:
        def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
            inside.set()
            assert go_on.wait(30)
            return site.dense(q, k, v)

    F.scaled_dot_product_attention = theirs
    with diffsparse.apply(model, Waits(), schedule=ALWAYS):
        thread = threading.Thread(target=tensors, args=(model, inputs(NAMES[0])))
        thread.start()
        assert inside.wait(30)
        before = theirs.calls
        x = torch.randn(1, 2, 8, 4)
        assert torch.equal(F.scaled_dot_product_attention(x, x, x), OWN(x, x, x))
        assert theirs.calls == before + 1
        go_on.set()
        thread.join()
    assert F.scaled_dot_product_attention is theirs


def test_modes_of_others_see_what_they_saw() -> None:
    seen = []

    class Watches(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model, theirs = build(NAMES[0]), Theirs(False)
    F.scaled_dot_product_attention = theirs
    with diffsparse.apply(model, Dense(), schedule=ALWAYS) as handle, Watches():
        tensors(model, inputs(NAMES[0]))
        assert theirs.calls == 4, "self- and cross-attention of two blocks"
        assert handle.report().dense_calls == 2
    assert seen


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wraps", [True, False], ids=["wrapper", "another"])
def test_compiled(wraps: bool) -> None:
    """The same number of graphs as without a function of the user's, and the eager result."""
    name = NAMES[0]

    def replaced(query: Tensor, key: Tensor, value: Tensor, scale: Any = None, **_: Any) -> Tensor:
        if wraps:
            return OWN(query, key, value, scale=scale)
        return (query @ key.mT * (scale or query.shape[-1] ** -0.5)).softmax(-1) @ value

    def compiled(replace: bool) -> tuple[list[Tensor], int, int]:
        torch._dynamo.reset()
        model, counter = build(name), CompileCounterWithBackend("eager")
        F.scaled_dot_product_attention = replaced if replace else OWN
        with diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS) as handle:
            model.compile(backend=counter, fullgraph=True)
            outs = passes(model, name)
            assert F.scaled_dot_product_attention is (replaced if replace else OWN)
            return outs, counter.frame_count, handle.report().sparse_calls

    plain, other = compiled(replace=False), compiled(replace=True)
    assert plain[1:] == other[1:]
    for a, b in zip(plain[0], other[0], strict=True):
        torch.testing.assert_close(a, b)


# --- torch.autocast ---------------------------------------------------------------------------------------------------

EVERYTHING = {  # nothing dropped: then it is dense attention
    "adaspa": AdaSpa(0.0, block=16, head_adaptive=False),
    "adaspa-auto": AdaSpa(0.0, block=16, head_adaptive=False, order="auto"),
    "digest": Digest(0.0, block=16),
    "tangent": Tangent(0.0, block=(32, 16)),
    "random": Random(0.0, block=16),
    "compensated": Compensated(Random(0.0, block=16)),
}


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("strategy", EVERYTHING.values(), ids=list(EVERYTHING))
@pytest.mark.parametrize("name", NAMES)
def test_strategies_under_autocast(name: str, strategy: Any) -> None:
    model = build(name)
    exact = tensors(model, inputs(name))[0]
    with autocast():
        want = tensors(model, inputs(name))[0]
        with diffsparse.apply(model, strategy, schedule=Schedule(dense_first=1)) as handle:
            outs = [tensors(model, inputs(name))[0] for _ in range(4)]
            assert handle.report().sparse_calls
            assert not handle.report().fallbacks
    error = (want.float() - exact).abs().max()  # what half precision costs by itself
    for out in outs:
        assert out.dtype == want.dtype
        assert (out.float() - want.float()).abs().max() <= 2 * error


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("strategy", [GNA(block=16, sparsity=0.8), AdaSpa(block=16), Digest(block=16)], ids=type)
@pytest.mark.parametrize("name", NAMES)
def test_dropping_blocks_under_autocast(name: str, strategy: Any) -> None:
    model = build(name)
    with autocast(), diffsparse.apply(model, strategy, schedule=Schedule(dense_first=1)) as handle:
        want, *_, got = [tensors(model, inputs(name))[0] for _ in range(4)]
        assert handle.report().sparse_calls
    assert got.dtype == want.dtype
    assert got.isfinite().all()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("kind", KINDS)
def test_guidance_under_autocast(kind: str) -> None:
    """The perturbed heads are those of the dtype that attention runs in."""
    model = build(NAMES[1])
    with autocast(), diffsparse.guide(model, "0.1", kind=kind, head_scale=1.0):
        out = tensors(model, inputs(NAMES[1]))[0]
    with diffsparse.guide(model, "0.1", kind=kind, head_scale=1.0):
        exact = tensors(model, inputs(NAMES[1]))[0]
    torch.testing.assert_close(out.float(), exact, atol=0.1 * float(exact.abs().max()), rtol=0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_strategies_see_one_dtype_and_no_autocast() -> None:
    seen = set()

    class Sees:
        def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
            seen.add((q.dtype, k.dtype, v.dtype, torch.is_autocast_enabled("cpu")))
            return site.dense(q, k, v)

    for name in NAMES:
        model = build(name)
        with autocast():
            want = tensors(model, inputs(name))[0]
            with diffsparse.apply(model, Sees(), schedule=ALWAYS):
                assert torch.equal(tensors(model, inputs(name))[0], want)
    assert seen == {(torch.bfloat16,) * 3 + (False,)}


def mixed() -> tuple[Any, Any]:
    """A model whose processor mixes dtypes without autocast."""
    model = build(NAMES[0])
    processor = model.blocks[0].attn1.processor  # type: ignore[index, union-attr]

    class Mixes(type(processor)):  # type: ignore[misc]
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = hidden_states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            out = F.scaled_dot_product_attention(x, x, x.bfloat16())
            return out.transpose(1, 2).flatten(2)

    model.blocks[0].attn1.processor = Mixes()  # type: ignore[index, union-attr]
    return model, inputs(NAMES[0])


def test_mixed_dtypes_without_autocast_raise_what_they_raise_untouched() -> None:
    model, kwargs = mixed()
    with pytest.raises(RuntimeError) as want:
        tensors(model, kwargs)
    with diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS), pytest.raises(RuntimeError) as got:
        tensors(model, kwargs)
    assert str(got.value) == str(want.value)
    assert not isinstance(got.value, DiffsparseError)
    with (
        diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS, strict=True),
        pytest.raises(DenseFallbackError, match="different dtypes"),
    ):
        tensors(model, kwargs)

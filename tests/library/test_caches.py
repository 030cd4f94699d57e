"""Step caches under sparse attention: same bits, true counts, kept budgets; and the one line that puts both on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import diffusers as d
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import HookRegistry
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diffsparse
from diffsparse import AdaSpa, Dense, Digest, Layout, Schedule, Tangent
from diffsparse.errors import ConfigError, UnknownNameError, UnsupportedModelError
from diffsparse.schedule import resolve
from diffsparse.seam.accelerate import SPEEDS
from diffsparse.seam.added import caches_of
from diffsparse.seam.caches import Passes, StepCache, cache_on
from diffsparse.seam.caching import BLOCKS, CACHES, Caching
from diffsparse.seam.copies import REGISTRY
from diffsparse.seam.hooks import HOOK
from diffsparse.seam.targets import attentions, models_of
from support.methods import METHODS
from support.tiny_pipelines import BUILDERS
from support.tiny_transformers import build, inputs, tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")  # FasterCache calls it as it no longer should be
ALWAYS = Schedule(dense_first=0)
STEPS, OTHER = 8, 10
# Clips of several blocks of 16 tokens.
SIZES: dict[str, dict[str, int]] = {
    "wan": {"height": 96, "width": 96},
    "wan22": {"height": 96, "width": 96},
    "hunyuan_video": {"height": 64, "width": 64},
    "cogvideox": {"height": 96, "width": 96},
    "ltx": {},
    "mochi": {"height": 96, "width": 96},
    "flux": {"height": 24, "width": 24},
    "sd3": {"height": 12, "width": 12},
    "qwen_image": {"height": 96, "width": 96},
}
ONE_BATCH = ("cogvideox", "ltx", "mochi", "sd3")  # both guidance branches in one pass


@dataclass(frozen=True)
class Cache:
    """A step cache, and why not on a family: there it fails or does nothing by itself."""

    on: Callable[[Any], None]
    off: Callable[[Any], None]
    title: str
    without: dict[str, str] = field(default_factory=dict)


def of_diffusers(title: str, caching: Caching, **without: str) -> Cache:
    def on(pipe: Any) -> None:
        for model in models_of(pipe).values():
            model.enable_cache(caching.config(model, lambda: pipe._current_timestep))

    def off(pipe: Any) -> None:
        for model in models_of(pipe).values():
            model.disable_cache()

    return Cache(on, off, title, {"sd3": "its transformer takes no caches of Diffusers", **without})


def of_cache_dit(**without: str) -> Cache:
    def on(pipe: Any) -> None:
        dit = pytest.importorskip("cache_dit")
        settled = dit.DBCacheConfig(
            Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=9.0, max_continuous_cached_steps=2
        )
        dit.enable_cache(pipe, cache_config=settled)

    def off(pipe: Any) -> None:
        pytest.importorskip("cache_dit").disable_cache(pipe)

    return Cache(on, off, "cache-dit", without)


def without(reason: str, *families: str) -> dict[str, str]:
    return dict.fromkeys(families, reason)


TWO_CALLS = [name for name in BUILDERS if name not in ONE_BATCH]
KNOWS = {
    "taylor": of_diffusers("TaylorSeer", Caching("taylor-seer", interval=2, warm_up=3)),
    "mag": of_diffusers("MagCache", Caching("mag", steps=STEPS, ratios=[1.0, 0.98, 1.01, 0.97], threshold=0.05)),
    "pyramid": of_diffusers("PyramidAttentionBroadcast", Caching("pab", range=2, timesteps=(100, 900))),
}
CACHED: dict[str, Cache] = {
    **KNOWS,
    "lite": of_diffusers("TaylorSeer", Caching("taylor-seer", interval=3, warm_up=2, use_lite_mode=True)),
    "broad": of_diffusers("PyramidAttentionBroadcast", Caching("pab", range=3, timesteps=(-1, 2000))),
    "silent": of_diffusers("PyramidAttentionBroadcast", Caching("pab", range=2, timesteps=(-1, 2000))),
    "first-block": of_diffusers("FirstBlockCache", Caching("first-block", threshold=0.6)),
    "faster": of_diffusers(
        "FasterCache",
        Caching("faster", range=2, timesteps=(-1, 2000), unconditional_batch_timestep_skip_range=(-1, 2000)),
        **without("it halves the batch of each pass, which holds one sample", *TWO_CALLS),
        **without("it wants latents with a height and a width", "ltx"),
    ),
    "faster-distilled": of_diffusers(
        "FasterCache",
        Caching("faster", range=2, timesteps=(-1, 700), is_guidance_distilled=True),
        **without("it skips the first step and has nothing yet", "mochi"),
    ),
    "sea": of_diffusers(
        "SeaCache",
        Caching("sea", threshold=0.5),
        **without("it reads no latents of it and runs in full", *(x for x in BUILDERS if not x.startswith("wan"))),
    ),
    "cache-dit": of_cache_dit(hunyuan_video="lists of one block each, which it always computes"),
}
VARIANTS = {"lite", "broad", "silent"}  # on a few families
FEW = {"wan", "wan22", "cogvideox", "flux"}
PAIRS = [
    (kind, name)
    for kind, cache in CACHED.items()
    for name in BUILDERS
    if name not in cache.without and (kind not in VARIANTS or name in FEW)
]


class Run:
    """A pipeline, and a count of the attention that its transformers compute."""

    def __init__(self, name: str, **over: Any) -> None:
        self.name = name
        self.pipe, call = BUILDERS[name]()
        self.pipe.set_progress_bar_config(disable=True)
        self.call = {**call, **SIZES[name], **over}
        self.step, self.passes = 0, 0
        self.reached: list[tuple[str, int, int]] = []  # layer, step, products
        self.layers: list[str] = []
        for model_name, model in models_of(self.pipe).items():
            model.register_forward_pre_hook(self._began)
            for layer, module in attentions(model):
                if not layer.endswith("attn2") and "refiner" not in layer:
                    self.layers.append(f"{model_name}.{layer}")
                    module.to_q.register_forward_pre_hook(functools.partial(self._reached, self.layers[-1]))
        scheduler = self.pipe.scheduler
        scheduler.step = self._counting(scheduler.step)

    def _began(self, *_: object) -> None:
        self.passes += 1

    def _reached(self, layer: str, _: object, args: tuple[Tensor, ...]) -> None:
        self.reached.append((layer, self.step, args[0].shape[0] if self.name == "mochi" else 1))

    def _counting(self, step: Any) -> Any:
        @functools.wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.step += 1
            return step(*args, **kwargs)

        return counted

    def __call__(self, steps: int = STEPS) -> Tensor:
        self.step, self.passes = 0, 0
        self.reached.clear()
        generator = torch.Generator().manual_seed(0)
        call = {**self.call, "num_inference_steps": steps, "generator": generator, "output_type": "latent"}
        out: Tensor = self.pipe(**call)[0]
        return out

    @property
    def calls(self) -> int:
        return sum(products for _, _, products in self.reached)

    @property
    def skipped_calls(self) -> int:
        most = max(products for _, _, products in self.reached)
        layers = len(self.layers) // len(models_of(self.pipe))
        return (self.passes * layers - len(self.reached)) * most

    @property
    def steps(self) -> set[int]:
        return {step for _, step, _ in self.reached}


@contextmanager
def caching(cache: Cache, pipe: Any) -> Iterator[None]:
    cache.on(pipe)
    try:
        yield
    finally:
        cache.off(pipe)


@functools.cache
def plain(name: str) -> Tensor:
    return Run(name)()


@functools.cache
def layout_of(name: str) -> Layout:
    found: list[Layout] = []

    class Looks:
        def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
            found.append(site.layout)
            return site.dense(q, k, v)  # type: ignore[no-any-return]

    run = Run(name)
    with diffsparse.apply(run.pipe, Looks(), schedule=ALWAYS):
        run(2)
    return found[0]


# --- the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_dense_attention_changes_no_bit_of_a_cached_run(kind: str, name: str) -> None:
    """Cache first, or while applied, or taken off while applied; again, with other steps, and after removal."""
    run, cache = Run(name), CACHED[kind]
    with caching(cache, run.pipe):
        want, other = run(), run(OTHER)
        assert run.skipped_calls, "the cache acts"
        handle = diffsparse.apply(run.pipe, Dense(), schedule=ALWAYS)
        assert all(torch.equal(run(), want) for _ in range(2))
        assert torch.equal(run(OTHER), other)
        assert handle.report().cache == cache.title
    assert torch.equal(run(), plain(name))
    report = handle.report()
    assert (report.cache, report.skipped_steps, report.skipped_calls) == (None, 0, 0)
    with caching(cache, run.pipe):
        assert torch.equal(run(), want)
        handle.remove()
        assert torch.equal(run(), want)


@pytest.mark.filterwarnings("ignore:NucleusMoEImageTransformer2DModel ran")
def test_a_cache_of_text_keys_skips_no_attention() -> None:
    """It is for NucleusMoE alone, whose queries are of other tokens than its keys: nothing is sparse there."""
    name = "NucleusMoEImageTransformer2DModel"
    model, kwargs = build(name), inputs(name)
    model.enable_cache(d.TextKVCacheConfig())
    want = [tensors(model, kwargs)[0] for _ in range(3)]
    model._reset_stateful_cache()
    with diffsparse.apply(model, Dense(), schedule=ALWAYS) as handle:
        got = [tensors(model, kwargs)[0] for _ in range(3)]
        report = handle.report()
    assert all(map(torch.equal, got, want))
    assert (report.cache, report.skipped_calls, report.sparse_calls) == (None, 0, 0)
    assert report.dense_calls == 3 * len(list(attentions(model)))


# --- sparse steps beside skipped ones -----------------------------------------------------------------------------

SPARSE = ("Digest", "Tangent", "AdaSpa", "GNA", "PARO")


@functools.cache
def density_without(name: str, method: str) -> float:
    run = Run(name)
    with METHODS[method].put(run.pipe, layout_of(name), strict=False) as handle:
        run()
        return handle.report().sparse_density  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_reports_count_what_a_cache_leaves_to_attention(kind: str, name: str) -> None:
    run = Run(name)
    with caching(CACHED[kind], run.pipe):
        for method in SPARSE:
            with METHODS[method].put(run.pipe, layout_of(name), strict=False) as handle:
                assert run().isfinite().all(), method
                report = handle.report()
            assert report.sparse_calls, method
            assert report.dense_calls + report.sparse_calls == run.calls, method
            assert report.skipped_calls == run.skipped_calls > 0, method
            assert (report.steps, report.skipped_steps) == (len(run.steps), STEPS - len(run.steps)), method
            assert report.sparse_density == pytest.approx(density_without(name, method), abs=0.05), method


# --- budgets ------------------------------------------------------------------------------------------------------

CLIP = {"guidance_scale": 1.0, "negative_prompt": None, "num_frames": 13, "height": 192, "width": 192}
RATIOS = [1.0, 0.99, 0.98, 0.97]
BUDGETS: dict[str, Callable[[int], Cache]] = {
    "none": lambda steps: Cache(lambda pipe: None, lambda pipe: None, ""),
    "taylor 2": lambda steps: of_diffusers("", Caching("taylor-seer", interval=2, warm_up=3)),
    "taylor 4": lambda steps: of_diffusers("", Caching("taylor-seer", interval=4, warm_up=3)),
    "mag": lambda steps: of_diffusers("", Caching("mag", steps=steps, ratios=RATIOS, threshold=0.1)),
    "pyramid": lambda steps: of_diffusers("", Caching("pab", range=2, timesteps=(100, 900))),
    "first-block 0.03": lambda steps: of_diffusers("", Caching("first-block", threshold=0.03)),
    "first-block 0.06": lambda steps: of_diffusers("", Caching("first-block", threshold=0.06)),
    "faster": lambda steps: of_diffusers(
        "", Caching("faster", range=2, timesteps=(-1, 870), is_guidance_distilled=True)
    ),
    "sea": lambda steps: of_diffusers("", Caching("sea", threshold=0.1)),
    "cache-dit": lambda steps: of_cache_dit(),
}


def spent(run: Run, strategy: Any, steps: int, of: str) -> dict[str, list[float]]:
    """Of each layer: what its calls took after the dense first ones."""
    with diffsparse.apply(run.pipe, strategy) as handle:
        run(steps)
        calls = handle.report().calls
    found: dict[str, list[float]] = {}
    for call in calls:
        if call.layer in found or call.kind == "sparse":
            found.setdefault(call.layer, []).append(float(getattr(call, of)))
    return found


@pytest.mark.parametrize("kind", BUDGETS)
def test_a_budget_is_kept_of_the_steps_that_a_cache_leaves(kind: str) -> None:
    run = Run("wan", **CLIP)
    cases = [(Digest(0.8, 16), "work", (15, 50, 80)), (Tangent(0.8, 16), "work", (15,))]
    for strategy, of, lengths in [*cases, (AdaSpa(0.8, block=16), "density", (15, 50))]:
        for steps in lengths:
            with caching(BUDGETS[kind](steps), run.pipe):
                layers = spent(run, strategy, steps, of)
            assert layers, "the run ended dense"
            for name, shares in layers.items():
                mean = sum(shares) / len(shares)
                assert mean == pytest.approx(0.2, abs=0.01), (strategy, steps, name, len(shares))


def test_long_runs_renew_in_dense_steps_beside_a_cache() -> None:
    run = Run("wan", **CLIP)
    with caching(BUDGETS["taylor 2"](80), run.pipe), diffsparse.apply(run.pipe, Digest(0.8, 16)) as handle:
        run(80)
        calls = [call for call in handle.report().calls if call.layer == "blocks.0.attn1"]
    assert [call.reason for call in calls if call.kind == "dense"].count("renewal") == 2


# --- rules --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Notes the steps that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.reached = (0, ""), list[tuple[int, str]]()

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.reached.append(self.now)
        return 1.1 * hidden_states


TransformerBlockRegistry.register(Block, TransformerBlockMetadata(return_hidden_states_index=0))


class Blocks(nn.Module, d.CacheMixin):
    """Two blocks, run as a pipeline runs a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def reached(self, steps: int, branches: int = 1, branch: int = 0, begin: Callable[[int], None] = id) -> list[int]:
        for step in range(steps):
            begin(step)
            for number in range(branches):
                for block in self.blocks:
                    block.now = (step, str(number))
                _set_cache_context(self, CacheContext(str(number)))
                self(torch.ones(1, 2, 3))
        found = [[s for s, name in block.reached if name == str(branch)] for block in self.blocks]
        assert found[0] == found[1]
        return found[0]

    @property
    def cache(self) -> StepCache:
        found = [cache_on((block, self)) for block in self.blocks]
        assert found[0] is not None
        assert found[1] is not None
        return found[1]


few = settings(max_examples=100, deadline=None)


@few
@given(st.integers(1, 6), st.integers(1, 5), st.none() | st.integers(0, 30), st.integers(1, 30), st.integers(1, 2))
def test_steps_of_taylor_seer(interval: int, warm_up: int, after: int | None, steps: int, branches: int) -> None:
    model = Blocks()
    knobs = {"cache_interval": interval, "disable_cache_before_step": warm_up, "disable_cache_after_step": after}
    model.enable_cache(d.TaylorSeerCacheConfig(**knobs, cache_identifiers=[r"blocks\.\d"]))
    want = model.reached(steps, branches, branches - 1)
    assert sorted(model.cache.executed(Passes(steps, branches, branches - 1)) or ()) == want
    assert model.cache.warm_up == warm_up


@few
@given(
    st.lists(st.integers(80, 120).map(lambda x: x / 100), min_size=1, max_size=12),
    st.integers(0, 30).map(lambda x: x / 100),  # met to the last bit at times
    st.integers(0, 5),
    st.sampled_from([0, 0.1, 0.2, 0.5, 1]),
    st.integers(1, 20),
    st.integers(1, 45),
    st.booleans(),
)
def test_steps_of_mag_cache(
    ratios: list[float], threshold: float, most: int, retained: float, known: int, steps: int, calibrates: bool
) -> None:
    """In a run of more steps than it was told, it starts over."""
    model = Blocks()
    model.enable_cache(d.MagCacheConfig(threshold, most, retained, known, mag_ratios=ratios, calibrate=calibrates))
    assert list(model.cache.executed(Passes(steps)) or ()) == model.reached(steps)


@few
@given(
    st.integers(1, 5),
    st.tuples(st.integers(-1, 500), st.integers(400, 1100)),
    st.lists(st.integers(0, 1000), min_size=1, max_size=25, unique=True),
    st.integers(1, 3),
    st.data(),
)
def test_steps_of_pyramid_attention_broadcast(
    interval: int, within: tuple[int, int], timesteps: list[int], branches: int, data: Any
) -> None:
    """It counts the passes of all guidance branches together."""
    branch, model, now = data.draw(st.integers(0, branches - 1)), Blocks(), [0]
    timesteps.sort(reverse=True)
    for block in model.blocks:
        hook = PyramidAttentionBroadcastHook(within, interval, lambda: now[0])
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, "pyramid")
    want = model.reached(len(timesteps), branches, branch, lambda step: now.__setitem__(0, timesteps[step]))
    assert model.cache.counts_branches
    assert [model.cache.reads(now[0] + more) for more in (0.0, 1.0)] == [True, False]
    assert model.cache.executed(Passes(len(timesteps), branches, branch)) is None
    told = Passes(len(timesteps), branches, branch, tuple(map(float, timesteps)))
    assert list(model.cache.executed(told) or ()) == want


class Foresees:
    """Dense, and notes how many of the steps to come it was told that it will miss."""

    def __init__(self) -> None:
        self.told: dict[tuple[str, str, str], list[tuple[int, int, int]]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        calls = self.told.setdefault((site.model, site.layer, site.branch), [])
        calls.append((site.step, site.skipped, site.to_skip))
        return site.dense(q, k, v)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in PAIRS if kind in (*KNOWS, *VARIANTS)])
def test_what_known_caches_will_skip_is_known(kind: str, name: str) -> None:
    """From the second step on: in the first the number of branches is unknown."""
    run, sees = Run(name), Foresees()
    with caching(CACHED[kind], run.pipe), diffsparse.apply(run.pipe, sees, schedule=ALWAYS):
        run(OTHER)
    for (model, *_), calls in sees.told.items():
        reached = sorted({step for step, _, _ in calls})
        if (name, model) == ("wan22", "transformer"):
            continue  # it does not know where the other expert takes over
        begin = min(step for (other, *_), calls in sees.told.items() if other == model for step, _, _ in calls)
        for step, skipped, to_skip in calls:
            assert skipped == step - begin - sum(s < step for s in reached)
            if (kind, name) == ("pyramid", "mochi"):  # it is told other timesteps than the scheduler's
                assert skipped or not to_skip
            elif step > begin:
                assert to_skip == OTHER - 1 - step - sum(s > step for s in reached), (step, reached)


# --- guidance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_guidance_acts_and_leaves_a_cache_as_it_is(kind: str, name: str) -> None:
    """At a scale of nearly nothing all extra passes run, and no bit of the others changes."""
    run = Run(name)
    with caching(CACHED[kind], run.pipe):
        want = run()
        last = "single.0.1" if name in ("flux", "hunyuan_video") else "1.1"
        with diffsparse.guide(run.pipe, last, head_scale=1e-30) as handle:
            assert torch.equal(run(), want)
            assert handle.report().passes
            assert set(handle.report().whole) == {"a step cache is on"}
        with diffsparse.guide(run.pipe, "0.1", head_scale=3.0):
            guided = run()
        assert guided.isfinite().all()
        assert not torch.equal(guided, want)
        assert torch.equal(run(), want)


def outputs(run: Run) -> list[Tensor]:
    """Of the transformer in a run of two steps, in order, as the pipeline gets them."""
    outs: list[Tensor] = []
    hook = run.pipe.transformer.register_forward_hook(lambda _, __, out: outs.append(out[0].clone()))
    run(2)
    hook.remove()
    return outs


def test_guidance_is_the_same_in_a_pass_that_a_cache_answers() -> None:
    """Every second pass is answered: all unconditional ones. Else guidance would come out several times as strong."""
    run, cache = Run("wan"), of_diffusers("", Caching("pab", range=2, timesteps=(-1, 2000)))
    with caching(cache, run.pipe):
        c, u, *_ = outputs(run)
        assert {step for _, step, _ in run.reached} == {0, 1}
        assert len(run.reached) == 2 * len(run.layers)
        with diffsparse.guide(run.pipe, "0.1", head_scale=3.0):
            _, guided_c, guided_u, *_ = outputs(run)
    assert not torch.equal(guided_c, c)
    torch.testing.assert_close(guided_u - u, guided_c - c)


# --- the one line -------------------------------------------------------------------------------------------------

ACCELERATED = [name for name in BUILDERS if name != "sd3"]
LONG = 12  # enough for `accelerate` to put a cache on


def names(pipe: Any) -> set[str]:
    """Of all that the modules have of their own."""
    return {
        f"{at}.{path} {name}"
        for at, model in models_of(pipe).items()
        for path, module in model.named_modules()
        for name in vars(module)
    }


def configs(pipe: Any) -> list[Any]:
    return [model._cache_config for model in models_of(pipe).values()]


@pytest.mark.parametrize("name", ACCELERATED)
def test_accelerating_is_undone_to_the_last_bit_and_name(name: str) -> None:
    run = Run(name)
    untouched = names(run.pipe)
    diffsparse.accelerate(run.pipe).remove()
    assert names(run.pipe) == untouched
    want, before = run(LONG), names(run.pipe)
    with diffsparse.accelerate(run.pipe, block=16) as handle:
        got, report = run(LONG), handle.report()
    assert got.isfinite().all()
    assert not torch.equal(got, want)
    assert (report.cache, report.steps, report.skipped_steps) == ("TaylorSeer", len(run.steps), LONG - len(run.steps))
    assert report.skipped_calls == run.skipped_calls > 0
    assert report.sparse_calls
    assert torch.equal(run(LONG), want)
    assert names(run.pipe) == before


@pytest.mark.parametrize("name", ACCELERATED)
def test_patterns_that_fit_nothing_leave_nothing_behind(name: str) -> None:
    run = Run(name)
    want, before = run(), names(run.pipe)
    nothing = d.TaylorSeerCacheConfig(cache_identifiers=["nothing"])
    with pytest.raises(UnsupportedModelError, match="its patterns fit no module there"):
        diffsparse.accelerate(run.pipe, cache=nothing)
    assert names(run.pipe) == before
    assert torch.equal(run(), want)


@pytest.mark.parametrize("kind", ["first-block", "pyramid", "sea", "cache-dit"])
def test_a_cache_of_the_user_stays_on(kind: str) -> None:
    run, cache = Run("wan"), CACHED[kind]
    with caching(cache, run.pipe):
        want, settled, before = run(), configs(run.pipe), names(run.pipe)
        with diffsparse.accelerate(run.pipe, block=16) as handle:
            run()
            report = handle.report()
        assert f"{cache.title} was on already and stays as it is" in report.notes
        assert report.cache == cache.title
        assert configs(run.pipe) == settled
        assert names(run.pipe) == before
        assert torch.equal(run(), want)


def test_a_cache_that_is_put_on_over_an_accelerated_pipeline_stays_too() -> None:
    run = Run("wan")
    handle = diffsparse.accelerate(run.pipe)
    run.pipe.transformer.disable_cache()
    CACHED["first-block"].on(run.pipe)
    want = configs(run.pipe)
    handle.remove()
    assert configs(run.pipe) == want
    assert list(caches_of(models_of(run.pipe))) == ["FirstBlockCache"]


@pytest.mark.parametrize("name", ["wan", "wan22", "flux"])
def test_accelerating_again_replaces_the_cache_too(name: str) -> None:
    run = Run(name)
    want, before = run(LONG), names(run.pipe)
    first = diffsparse.accelerate(run.pipe, "quality", block=16)
    second = diffsparse.accelerate(run.pipe, "fast", block=16)
    interval = dict(SPEEDS["fast"].cache.knobs)["interval"]
    assert [config.cache_interval for config in configs(run.pipe)] == [interval] * len(models_of(run.pipe))
    first.remove()
    assert [config.cache_interval for config in configs(run.pipe)] == [interval] * len(models_of(run.pipe))
    run(LONG)
    assert second.report().skipped_calls == run.skipped_calls > 0
    second.remove()
    assert names(run.pipe) == before
    assert torch.equal(run(LONG), want)


def test_applying_over_an_accelerated_pipeline_takes_its_cache_off() -> None:
    run = Run("wan")
    want, before = run(LONG), names(run.pipe)
    accelerated = diffsparse.accelerate(run.pipe, block=16)
    handle = diffsparse.apply(run.pipe, Dense(), schedule=ALWAYS)
    assert torch.equal(run(LONG), want)
    accelerated.remove()
    assert handle.report().dense_calls
    handle.remove()
    assert names(run.pipe) == before


def test_accelerating_over_an_applied_pipeline_replaces() -> None:
    run = Run("wan")
    want, before = run(LONG), names(run.pipe)
    applied = diffsparse.apply(run.pipe, Tangent(0.5, 16))
    with diffsparse.accelerate(run.pipe, block=16) as handle:
        applied.remove()
        run(LONG)
        assert handle.report().skipped_steps
    assert names(run.pipe) == before
    assert torch.equal(run(LONG), want)


def test_a_block_whose_strategy_was_replaced_says_so() -> None:
    run = Run("wan")
    want, before = run(LONG), names(run.pipe)
    outer = diffsparse.apply(run.pipe, Tangent(0.5, 16)).__enter__()
    with diffsparse.accelerate(run.pipe, block=16) as inner:
        run(LONG)
    assert torch.equal(run(LONG), want)
    assert "notes              replaced by a later apply or accelerate" in str(outer.report())
    assert "replaced" not in str(inner.report())
    outer.__exit__(KeyError, KeyError(), None)  # an error is not hidden by a warning
    with pytest.warns(UserWarning, match="Tangent was replaced by a later apply or accelerate within its block"):
        outer.__exit__(None, None, None)
    assert names(run.pipe) == before


def test_guidance_outlives_what_accelerates() -> None:
    run = Run("wan")
    with diffsparse.guide(run.pipe, "1.1", head_scale=3.0):
        want = run(LONG)
        with diffsparse.accelerate(run.pipe, block=16) as handle:
            assert run(LONG).isfinite().all()
            assert handle.report().skipped_calls
        assert torch.equal(run(LONG), want)


def test_knobs_reach_the_cache_and_the_strategy() -> None:
    run = Run("wan")
    knobs = {"interval": 4, "max_order": 2, "warm_up": 2, "sparsity": 0.6, "block": 16, "probes": False}
    with diffsparse.accelerate(run.pipe, "quality", **knobs) as handle:
        config = run.pipe.transformer._cache_config
        assert (config.cache_interval, config.max_order, config.disable_cache_before_step) == (4, 2, 2)
        assert handle.strategy == Digest(0.6, 16, probes=False)
    with diffsparse.accelerate(run.pipe, cache="first-block:threshold=0.3", block=16):
        assert run.pipe.transformer._cache_config == d.FirstBlockCacheConfig(threshold=0.3)
    with diffsparse.accelerate(run.pipe, cache=None, strategy=Tangent(0.5)) as handle:
        assert (configs(run.pipe), handle.strategy) == ([None], Tangent(0.5))


@pytest.mark.parametrize("name", ["wan", "wan22", "flux"])
def test_a_warm_up_that_is_a_share_follows_the_length_of_the_run(name: str) -> None:
    """In runs of few steps nothing is skipped."""
    run = Run(name)
    experts = len(models_of(run.pipe))
    with diffsparse.accelerate(run.pipe, warm_up=0.4, interval=3, block=16) as handle:
        for steps in (20, 9, 12):
            run(steps)
            report = handle.report()
            assert report.skipped_calls == run.skipped_calls
            assert ("the step cache skips nothing in a run of 9 steps" in str(report)) == (steps == 9)
            assert ("skips nothing" in str(report)) == (steps == 9)
            if experts == 1:
                first = steps if steps < 10 else resolve(0.4, steps)
                assert run.steps == {s for s in range(steps) if s < first or (s - first - 1) % 3 == 0}
        assert report.skipped_steps


@pytest.mark.parametrize("kind", [kind for kind in CACHES if kind not in ("mag", "text-kv", "faster")])
def test_every_cache_by_name(kind: str) -> None:
    run = Run("wan")
    before = names(run.pipe)
    with diffsparse.accelerate(run.pipe, cache=kind, block=16) as handle:
        assert run().isfinite().all()
        assert handle.report().cache
    assert names(run.pipe) == before


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "knob": ({"intervall": 2}, ConfigError, "accelerate has no intervall here"),
    "knob of another cache": ({"cache": "first-block", "interval": 2}, ConfigError, "accelerate has no interval here"),
    "knob beside a strategy": ({"strategy": Tangent(), "sparsity": 0.5}, ConfigError, "accelerate has no sparsity"),
    "value": ({"sparsity": 2.0}, ConfigError, "sparsity"),
    "knob in the name": ({"cache": "taylor-seer:speed=2"}, ConfigError, "has no 'speed'"),
    "no value in the name": ({"cache": "taylor-seer:speed"}, ConfigError, "wanted knob=value"),
    "nothing to go by": ({"cache": "mag"}, ConfigError, "mag_ratios"),
    "cache": ({"cache": "taylor"}, UnknownNameError, "no step cache is called 'taylor'"),
    "speed": ({"speed": "faster"}, UnknownNameError, "no speed is called 'faster'"),
    "cache of others": ({"cache": "text-kv"}, UnsupportedModelError, "skips nothing of WanTransformer3DModel"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_accelerate_refuses_leaves_nothing_behind(case: str) -> None:
    run = Run("wan")
    before = names(run.pipe)
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        diffsparse.accelerate(run.pipe, **arguments)
    assert names(run.pipe) == before


class StopError(Exception):
    pass


def test_a_run_that_was_cut_off_leaves_nothing_to_the_next_one() -> None:
    run = Run("wan")

    def stop(pipe: Any, step: int, *_: Any) -> Any:
        if step == 8:
            raise StopError
        return {}

    with diffsparse.accelerate(run.pipe, block=16) as handle:
        want, counts = run(LONG), (handle.report().steps, handle.report().dense_steps)
        with pytest.raises(StopError):
            run.pipe(**{**run.call, "num_inference_steps": 20, "callback_on_step_end": stop})
        assert torch.equal(run(LONG), want)
        assert (handle.report().steps, handle.report().dense_steps) == counts


@pytest.mark.parametrize("name", ["wan", "flux", "cogvideox"])
def test_pipelines_that_name_no_branches_are_served_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of Diffusers open a context around the passes of a transformer."""
    run = Run(name)
    with diffsparse.accelerate(run.pipe, "quality", block=16) as handle:
        want, answered = run(LONG), handle.report().skipped_calls
        monkeypatch.setattr(run.pipe.transformer, "cache_context", lambda *_, **__: nullcontext())
        assert torch.equal(run(LONG), want)
        assert handle.report().skipped_calls == answered > 0


def test_a_loop_over_a_transformer_names_its_branches_and_resets() -> None:
    name = "WanTransformer3DModel"
    model, given = build(name), inputs(name)

    def loop() -> list[Tensor]:
        outs = []
        for step in range(12):
            with model.cache_context("cond", step_index=step, num_inference_steps=12):
                outs.append(tensors(model, given)[0])
        return outs

    with torch.no_grad(), diffsparse.accelerate(model, warm_up=3, interval=2, block=8) as handle:
        with pytest.raises(ConfigError, match="wants to know the guidance branch of a pass outside of a pipeline"):
            tensors(model, given)
        handle.reset()
        want = loop()
        assert handle.report().skipped_steps
        handle.reset()
        assert all(map(torch.equal, loop(), want))


@pytest.mark.parametrize("kind", ["first-block", "sea"])
def test_a_cache_that_refuses_a_class_leaves_it_as_it_was(kind: str) -> None:
    name = "BriaTransformer2DModel"
    model, given = build(name), inputs(name)
    want, before = tensors(model, given), [set(vars(module)) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match="is not for BriaTransformer2DModel"):
        diffsparse.accelerate(model, cache=kind)
    assert [set(vars(module)) for module in model.modules()] == before
    assert all(map(torch.equal, tensors(model, given), want))


def test_a_wrong_call_leaves_what_was_put_on_before() -> None:
    run = Run("wan")
    with diffsparse.accelerate(run.pipe, block=16) as handle:
        settled = configs(run.pipe)
        for wrong in ({"cache": "mag"}, {"cache": 5}, {"sparsity": 7}, {"intervall": 2}):
            with pytest.raises(ConfigError):
                diffsparse.accelerate(run.pipe, **wrong)
        assert configs(run.pipe) == settled
        run(LONG)
        assert handle.report().skipped_calls


def test_a_cache_of_the_user_that_skips_nothing_stays_and_is_named() -> None:
    run = Run("wan")
    run.pipe.transformer.enable_cache(d.TaylorSeerCacheConfig())
    with diffsparse.accelerate(run.pipe, block=16) as handle:
        assert "TaylorSeerCacheConfig was on already and stays as it is" in handle.report().notes
    assert run.pipe.transformer.is_cache_enabled


def test_a_knob_has_one_name() -> None:
    assert Caching("taylor-seer", disable_cache_before_step=4) == Caching("taylor-seer", warm_up=4)
    assert Caching.parse("taylor-seer:cache-interval=3") == Caching("taylor-seer", interval=3)
    assert Caching.parse("taylor-seer:use_lite_mode=false:taylor_factors_dtype=bfloat16") == Caching(
        "taylor-seer", use_lite_mode=False, taylor_factors_dtype=torch.bfloat16
    )


@pytest.mark.parametrize(
    "text",
    [
        *("taylor-seer:interval=0", "taylor-seer:interval=x", "taylor-seer:interval=2.5", "taylor-seer:order=-1"),
        *("taylor-seer:warm_up=0", "taylor-seer:warm_up=1.5", "first-block:threshold=abc", "pab:range=0"),
        *("taylor-seer:warm_up=0.0", "taylor-seer:use_lite_mode=banana", "taylor-seer:taylor_factors_dtype=int8"),
        *("taylor-seer:cache_identifiers=5", "pab:timesteps=5", "pab:cross_attention_block_skip_range=0"),
        *(
            "pab:current_timestep_callback=5",
            "mag:steps=0",
            "mag:ratios=abc",
            "mag:ratios=0.5",
            "faster:timesteps=1x2x3",
        ),
    ],
)
def test_knobs_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="wants"):
        Caching.parse(text)


def test_knobs_of_several_numbers_are_read_as_they_are_told() -> None:
    for text in ("pab:range=2:timesteps=100x900", "mag:steps=3:ratios=1x0.99x1.02", "pab:timesteps=-1x2000"):
        assert str(Caching.parse(text)) == text
    assert Caching.parse("pab:timesteps=100x900") == Caching("pab", timesteps=(100, 900))
    with pytest.raises(ConfigError, match="wants numbers"):
        Caching("mag", ratios=[])


def test_the_order_is_that_of_the_tokens() -> None:
    run = Run("wan")
    with diffsparse.accelerate(run.pipe, "quality", order="hilbert", block=16) as handle:
        assert handle.strategy == Digest(0.8, 16, order="hilbert")
        assert run.pipe.transformer._cache_config.max_order == 1
        assert run(LONG).isfinite().all()


@pytest.mark.parametrize(
    ("knobs", "kept"),
    [
        ({"skip_predict_identifiers": (r"blocks\.0",), "cache_identifiers": (r"blocks\.1",)}, [r"blocks\.1"]),
        ({"cache_identifiers": (r"blocks\.1",)}, [r"blocks\.1"]),
        ({"skip_predict_identifiers": (r"blocks\.0\.attn1",)}, None),
        ({"use_lite_mode": False}, [r"blocks\.1"]),  # its default: the patterns are ours
    ],
)
def test_patterns_of_the_user_are_kept(knobs: dict[str, Any], kept: list[str] | None) -> None:
    made = Caching("taylor-seer", **knobs).config(Run("wan").pipe.transformer)
    assert made.cache_identifiers == kept
    if "skip_predict_identifiers" in knobs:
        assert made.skip_predict_identifiers == list(knobs["skip_predict_identifiers"])


@pytest.mark.parametrize(
    "config",
    [
        d.TaylorSeerCacheConfig(cache_identifiers=["(?!proj_out).*", "["]),
        d.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_block_identifiers=None,
            is_guidance_distilled=True,
            attention_weight_callback=lambda module: 0.5,
        ),
    ],
    ids=["a pattern that is none", "no patterns"],
)
def test_a_configuration_that_fails_leaves_no_hook(config: Any) -> None:
    run = Run("wan")
    want, before = run(LONG), names(run.pipe)
    with pytest.raises(UnsupportedModelError, match="is not for WanTransformer3DModel"):
        diffsparse.accelerate(run.pipe, cache=config)
    assert names(run.pipe) == before
    assert torch.equal(run(LONG), want)


class Counting(ModelHook):
    """A hook of the accelerate library."""

    calls = 0

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        return args, kwargs


def hooked(model: Any) -> set[tuple[str, str]]:
    """Modules and names of the hooks that Diffusers has there, without ours."""
    found = ((name, module._diffusers_hook) for name, module in model.named_modules() if hasattr(module, REGISTRY))
    return {(name, hook) for name, registry in found for hook in registry.hooks} - {("", HOOK)}


@pytest.mark.parametrize("what", ["block_level", "leaf_level", "casting"])
def test_what_the_user_puts_on_while_accelerated_stays(what: str) -> None:
    run, twin = Run("wan"), Run("wan")

    def put(model: Any) -> None:
        if what == "casting":
            model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        else:
            cpu = torch.device("cpu")
            number = {"num_blocks_per_group": 1} if what == "block_level" else {}
            model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=what, **number)

    put(twin.pipe.transformer)
    with diffsparse.accelerate(run.pipe, block=16):
        put(run.pipe.transformer)
        assert run(LONG).isfinite().all()
    assert hooked(run.pipe.transformer) == hooked(twin.pipe.transformer)
    assert torch.equal(run(LONG), twin(LONG))


def test_a_hook_of_the_accelerate_library_stays() -> None:
    run, hook = Run("wan"), Counting()
    with diffsparse.accelerate(run.pipe, block=16):
        add_hook_to_module(run.pipe.transformer, hook)
        run(LONG)
    seen = hook.calls
    assert seen
    run(LONG)
    assert hook.calls == 2 * seen


@pytest.mark.parametrize("cached", [False, True])
def test_steps_before_it_was_put_on_are_not_taken_for_skipped(cached: bool) -> None:
    run, handles = Run("wan"), list[diffsparse.Handle]()

    def put_on(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 3:
            sparse = Tangent(0.5, block=16)
            handles.append(diffsparse.accelerate(pipe, block=16) if cached else diffsparse.apply(pipe, sparse))
        return {}

    run.call["callback_on_step_end"] = put_on
    run(LONG)
    report = handles[0].report()
    assert bool(report.skipped_steps) == cached
    assert report.steps + report.skipped_steps == LONG - 4
    handles[0].remove()


def test_nothing_is_left_where_the_user_took_the_cache_off() -> None:
    run = Run("wan")
    want, before = run(LONG), names(run.pipe)
    with diffsparse.accelerate(run.pipe, block=16):
        run.pipe.transformer.disable_cache()
    assert names(run.pipe) == before
    assert torch.equal(run(LONG), want)


def test_a_class_without_patterns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("wan")
    before = names(run.pipe)
    monkeypatch.delitem(BLOCKS, "WanTransformer3DModel")
    with pytest.raises(UnsupportedModelError, match="no patterns are proven for WanTransformer3DModel"):
        diffsparse.accelerate(run.pipe)
    assert names(run.pipe) == before


def test_a_class_without_caches_is_refused() -> None:
    run = Run("sd3")
    before = names(run.pipe)
    with pytest.raises(UnsupportedModelError, match="no patterns are proven for SD3Transformer2DModel"):
        diffsparse.accelerate(run.pipe)
    with pytest.raises(UnsupportedModelError, match="takes no step cache of Diffusers"):
        diffsparse.accelerate(run.pipe, cache=d.FirstBlockCacheConfig())
    assert names(run.pipe) == before
    with diffsparse.accelerate(run.pipe, cache=None, block=16) as handle:
        run(LONG)
        assert handle.report().sparse_calls


class Passed(NamedTuple):
    outs: list[Tensor]
    computed: list[int]  # blocks, in each pass


def predicted(name: str, config: d.TaylorSeerCacheConfig | None) -> Passed:
    """Passes over ever other inputs of one shape."""
    model, computed = build(name), [0]
    for blocks in BLOCKS[name]:
        for block in getattr(model, blocks):
            norm = next(module for module in block.modules() if isinstance(module, nn.Linear))
            norm.register_forward_pre_hook(lambda *_: computed.__setitem__(-1, computed[-1] + 1))
    if config is not None:
        model.enable_cache(config)
    outs = []
    for seed in range(6):
        computed.append(0)
        with model.cache_context("cond"):
            outs.append(tensors(model, inputs(name, seed=seed))[0])
    return Passed(outs, computed[1:])


@pytest.mark.parametrize("name", BLOCKS)
def test_the_last_block_stands_for_all(name: str) -> None:
    """Extrapolating its output and computing no other gives bit for bit what extrapolating every block gives."""
    last = Caching("taylor-seer", interval=2, warm_up=2).config(build(name))
    count = len(last.cache_identifiers) + len(last.skip_predict_identifiers)
    every = [*last.cache_identifiers, *last.skip_predict_identifiers]
    knobs = {"cache_interval": 2, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
    got, want = predicted(name, last), predicted(name, d.TaylorSeerCacheConfig(**knobs, cache_identifiers=every))
    alone = predicted(name, None)
    assert all(map(torch.equal, got.outs, want.outs))
    assert alone.computed == [count] * 6
    assert got.computed == want.computed == [count, count, 0, count, 0, count]
    assert [torch.equal(a, b) for a, b in zip(got.outs, alone.outs, strict=True)] == [
        True,
        True,
        False,
        True,
        False,
        True,
    ]

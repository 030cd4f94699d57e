"""Head-level perturbation guidance as a guider of Modular Diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import PerturbedAttentionGuidance
from torch import Tensor

from diffsparse.guidance.heads import Heads, resolve
from diffsparse.guidance.perturb import perturbed
from diffsparse.guidance.preset import Preset
from diffsparse.orders.layout import Layout
from diffsparse.plans.sealed import Values
from diffsparse.seam.call import Call
from diffsparse.seam.clock import Moment
from diffsparse.seam.patch import attach, detach, guidance_of
from diffsparse.seam.run import Layer, Perturber, Run
from diffsparse.seam.targets import DEFAULT_NAME
from diffsparse.wrappers import unwrapped

_FIRST_NAMES = {"strength": "head_strength", "perturbed_guidance_scale": "head_scale"}


class HeadGuidance(PerturbedAttentionGuidance):  # type: ignore[misc]
    """Classifier-free guidance, and guidance away from a pass with some heads perturbed, for modular pipelines.

    A step gives u + g (c - u) + s (c - p). The model is touched for the perturbed pass alone, and works under
    `diffsparse.apply`.

    Args:
        heads: names of heads (`diffsparse.Preset`).
        head_strength: how far they are perturbed, in [0, 1].
        kind: what they do instead of attending, see `Preset`.
        text: perturb the rows of text in joint attention too.
        guidance_scale: g, of classifier-free guidance; 1 is none.
        head_scale: s; 0 leaves the perturbed pass out.
        perturbed_guidance_start: where the perturbed passes start, as a share of the run.
        perturbed_guidance_stop: where they end.
        guidance_rescale: as in Diffusers' guiders; so are all that follow.
        use_original_formulation: of classifier-free guidance.
        start: of all guidance, as a share of the run.
        stop: of all guidance.
        enabled: whether there is any.

    Raises:
        ConfigError: heads or a strength that make no sense.
        UnknownNameError: when called, a model without such heads.

    Examples:
        >>> from diffsparse import HeadGuidance
        >>> modular.update_components(guider=HeadGuidance(["1.0"], guidance_scale=5.0, head_scale=3.0))
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        heads: list[str] | tuple[str, ...],
        head_strength: float = 1.0,
        kind: str = "identity",
        text: bool = False,
        guidance_scale: float = 7.5,
        head_scale: float = 3.0,
        perturbed_guidance_start: float = 0.0,
        perturbed_guidance_stop: float = 1.0,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super(PerturbedAttentionGuidance, self).__init__(start, stop, enabled)  # the parent's own wants layers
        self.guidance_scale = guidance_scale
        self.skip_layer_guidance_scale = head_scale
        self.skip_layer_guidance_start = perturbed_guidance_start
        self.skip_layer_guidance_stop = perturbed_guidance_stop
        self.guidance_rescale = guidance_rescale
        self.use_original_formulation = use_original_formulation
        self.preset = Preset(tuple(heads), head_strength, head_scale, kind, text=text)
        self._pass: tuple[_Pass, Perturber | None] | None = None

    @classmethod
    def extract_init_dict(cls, config_dict: Values, **kwargs: object) -> tuple[Values, Values, Values]:
        """Read configurations that an earlier release has saved too: there two of the knobs have other names."""
        renamed = {_FIRST_NAMES.get(name, name): value for name, value in config_dict.items()}
        parts: tuple[Values, Values, Values] = super().extract_init_dict(renamed, **kwargs)
        return parts

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Called ahead of each pass: perturbs the last of a step."""
        self.cleanup_models(denoiser)  # of a pass that was cut off
        self._count_prepared += 1
        if not self._is_slg_enabled() or self._count_prepared != self.num_conditions:
            return
        before = guidance_of(denoiser)
        heads = resolve(self.preset.heads, unwrapped(denoiser))
        perturbing = _Pass(self.preset, heads, lambda: self.cleanup_models(denoiser))
        attach(DEFAULT_NAME, denoiser, perturbing, None)
        run = perturbing.run
        now = run.clock.now or Moment(0, 0, None, "cond")
        run.extra_pass = now._replace(step=self._step, steps=self._num_inference_steps, branch="cond+perturbed")
        self._pass = perturbing, before

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Called after each pass: leaves the model as it was."""
        if self._pass is None:
            return
        (perturbing, before), self._pass = self._pass, None
        perturbing.run.extra_pass = None
        if before is None:
            detach(denoiser, perturbing)
        elif perturbing.run.guidance is perturbing:  # back on the same run, whose clock goes on
            attach(DEFAULT_NAME, denoiser, before, None)

    @property
    def is_conditional(self) -> bool:
        """Whether the pass that was prepared last has the prompt."""
        return self._count_prepared != 2 or not self._is_cfg_enabled()

    def _is_slg_enabled(self) -> bool:
        if not self._enabled or self.preset.head_strength == 0 or math.isclose(self.skip_layer_guidance_scale, 0.0):
            return False
        if self._num_inference_steps is None:
            return True
        first, stop = (
            int(share * self._num_inference_steps)
            for share in (self.skip_layer_guidance_start, self.skip_layer_guidance_stop)
        )
        step: int = self._step
        return first <= step < stop


class _Pass:
    """Perturbs every chosen layer for one pass; a layer that runs a second time shows that this one was cut off."""

    run: Run

    def __init__(self, preset: Preset, heads: Heads, end: Callable[[], None]) -> None:
        self.preset, self.heads, self._end = preset, heads, end
        self._seen: set[tuple[int, int]] = set()

    def perturb(self, out: Tensor, layer: Layer, call: Call, layout: Layout, moment: Moment, number: int) -> Tensor:
        """The output [B, H, N, D] of a self-attention call, perturbed if its layer is named."""
        heads, how, place = self.heads.get(layer.name), self.preset, (layer.index, number)
        if place in self._seen:
            self._end()
            return out
        self._seen.add(place)
        if heads is None:
            return out
        heads = layer.run.shard.own_numbers(heads, call.query.shape[1])
        return perturbed(out, call.ungrouped(), heads, layout, kind=how.kind, strength=how.head_strength, text=how.text)

    def unhook(self) -> None:
        """There are no hooks."""

"""The eight recipes: which future tokens are visible at training step t, and at inference.

Seven are those of A.4, hybrid by segment is from Sec. 1.

Shapes: B batch, L length, d hidden size. A recipe returns a visibility (see ``masks``) and holds whatever it
learns or freezes as parameters and buffers, so that its state travels with every checkpoint. To add one,
subclass ``Recipe``, write ``visibility`` and put the class into ``RECIPES``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ggsm_core import ablation, guidance, masks
from ggsm_core.sections import Guidance, HybridMlp, NoParameters, Scheduler, Section
from ggsm_core.template import MODALITIES, SEGMENTS

Tower = Literal["user", "answer"]
GLOBAL_SEGMENT = len(SEGMENTS)  # the global query's own segment, beside those of the template


class RecipeError(ValueError):
    """A recipe that doesn't exist, or is asked for what it does not have."""


@dataclass(frozen=True)
class View:
    """All that a recipe may look at.

    valid: Bool[B, L]. segments: Long[B, L], ids of ``template.SEGMENTS``. hidden: Float[B, L, d], what enters
    the first decoder block. step: t, or None at inference. weights: Float[B, L], guidance weights of this
    batch, for recipes that asked for them.
    """

    valid: Tensor
    segments: Tensor
    hidden: Tensor
    step: int | None
    tower: Tower = "user"
    weights: Tensor | None = None

    @property
    def history(self) -> Tensor:
        """Bool[B, L]: tokens of the six modalities, their tags included."""
        return (self.segments < len(MODALITIES)) & self.valid


class Recipe(nn.Module):
    """Base of all recipes.

    Args:
        options: the recipe's own section of the profile, of type ``section``.
        total_steps: T_total.
        hidden_size: d.
        max_length: longest user sequence in tokens.
    """

    name = "recipe"
    section: type[Section] = NoParameters
    #: a learnable token Float[1, d] that the model puts in front of the user's sequence, or None
    prefix: nn.Parameter | None

    def __init__(self, options: Section, total_steps: int, hidden_size: int, max_length: int) -> None:
        super().__init__()
        self.register_parameter("prefix", None)
        self.options: Any = options
        self.total_steps = total_steps
        self.max_length = max_length

    def visibility(self, view: View) -> Tensor:
        """Float[B, L] or Float[B, L, L]: how visible each future key is."""
        raise NotImplementedError


class Causal(Recipe):
    """No future key, as in pre-training."""

    def visibility(self, view: View) -> Tensor:
        return masks.causal(view.valid)


class Bidirectional(Recipe):
    """Every future key from the first step on (A.4, bidirectional a)."""

    def visibility(self, view: View) -> Tensor:
        return masks.bidirectional(view.valid)


class HybridSegment(Recipe):
    """Bidirectional within the user's history, causal after it (Sec. 1). Answers have no history: causal."""

    def visibility(self, view: View) -> Tensor:
        return masks.segment(view.history)


class ScheduledOpening(Recipe):
    """A deterministic path from causal to bidirectional (A.4, bidirectional b); bidirectional at inference.

    ``soft_linear`` raises the weight of every future key as t / T; the span schedules let query i see up to
    min(i + Delta(t), L), with Delta growing linearly or as a half cosine. All reach full visibility at T, of
    sequences below L the span schedules sooner.
    """

    section = Scheduler

    def visibility(self, view: View) -> Tensor:
        share = 1.0 if view.step is None else min(view.step / self.total_steps, 1.0)
        if self.options.schedule == "soft_linear":
            return masks.bidirectional(view.valid) * share
        if self.options.schedule == "span_cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return masks.span(view.valid, delta=round(share * (self.max_length - 1)))


class MlpOpening(Recipe):
    """An MLP of h_i and the relative position opens the mask (A.4, hybrid b).

    w_ij = sigma(MLP(h_i) . phi(j - i) + b), with phi sines and cosines of the distance, so any length works,
    and h_i what enters the first decoder block, so one mask serves every block. It is used as trained at
    inference. The MLP starts at w = 0.12 everywhere, near causal.
    """

    section = HybridMlp

    def __init__(self, options: Section, total_steps: int, hidden_size: int, max_length: int) -> None:
        super().__init__(options, total_steps, hidden_size, max_length)
        self.width = 2 * math.ceil(self.options.width / 2)
        self.mlp = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, self.width),
            nn.GELU(),
            last := nn.Linear(self.width, self.width),
        )
        self.bias = nn.Parameter(torch.tensor(-2.0))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def visibility(self, view: View) -> Tensor:
        length = view.valid.shape[1]
        coefficients = self.mlp(view.hidden.to(self.bias.dtype))  # [B, L, width]
        distance = torch.arange(length, device=view.valid.device, dtype=self.bias.dtype)
        octaves = torch.arange(self.width // 2, device=distance.device, dtype=distance.dtype)
        angle = distance[:, None] * math.pi / (2 * self.max_length) ** (octaves / max(self.width // 2 - 1, 1))
        phi = torch.cat([angle.sin(), angle.cos()], dim=1)  # [L, width]
        by_distance = coefficients @ phi.T + self.bias  # [B, L, L]: query i, distance
        position = view.valid.long().cumsum(1)
        ahead = (position[:, None, :] - position[:, :, None]).clamp(min=0)
        return torch.sigmoid(by_distance.gather(2, ahead))


class GlobalQuery(Recipe):
    """A learnable global token sees the whole history; all else is causal (A.4, hybrid c).

    The token stands in front of the sequence, so every later token reads the summary it gathers: one hop to
    the future through a bottleneck, and generation stays causal. Answers carry no global token.
    """

    def __init__(self, options: Section, total_steps: int, hidden_size: int, max_length: int) -> None:
        super().__init__(options, total_steps, hidden_size, max_length)
        self.prefix = nn.Parameter(torch.randn(1, hidden_size) * 0.02)

    def visibility(self, view: View) -> Tensor:
        is_global = view.segments == GLOBAL_SEGMENT
        return (is_global[:, :, None] & view.history[:, None, :]).float()


class Guided(Recipe):
    """Gradient-guided weights during warm-up, then frozen: what hybrid_mask and ggsm share (Eq. 5, A.4 a).

    The trainer asks ``wants_probe`` and ``wants_norms``, hands over gradient norms, and passes the weights
    that ``weigh`` or ``recall`` return back in through ``View.weights``. ``frozen_*`` are the state after
    warm-up: NaN until then.
    """

    section = Guidance
    frozen_position: Tensor
    frozen_segment: Tensor
    frozen_mean: Tensor
    previous_norms: Tensor

    def __init__(self, options: Section, total_steps: int, hidden_size: int, max_length: int) -> None:
        super().__init__(options, total_steps, hidden_size, max_length)
        # T_warm = 0 leaves nothing to measure: weights 0, which makes ggsm the soft linear scheduler.
        unknown = torch.nan if self.options.warm_steps else 0.0
        self.register_buffer("frozen_position", torch.full((max_length,), unknown))
        self.register_buffer("frozen_segment", torch.full((len(SEGMENTS),), unknown))
        self.register_buffer("frozen_mean", torch.tensor(unknown))
        self.register_buffer("previous_norms", torch.full((max_length,), torch.nan))

    def warm(self, step: int) -> bool:
        """Is step t inside the warm-up?"""
        return step < self.options.warm_steps

    def wants_probe(self, step: int) -> bool:
        """Does step t need a probe pass: in warm-up (two_pass), or after it by the frozen tower?"""
        return self.options.probes(step)

    def wants_norms(self, step: int) -> bool:
        """Are the gradient norms of step t's own training pass used later (previous_step)?"""
        return self.options.estimator == "previous_step" and self.warm(step)

    def remember(self, norms: Tensor, valid: Tensor) -> None:
        """Keep the norms of a training pass, mean per position, for the next step (previous_step)."""
        self.previous_norms.copy_(guidance.by_position(norms, valid, self.max_length))

    def weigh(self, norms: Tensor, valid: Tensor, step: int) -> Tensor:
        """Float[B, L]: weights from the norms of a probe pass at step t."""
        weights = guidance.token_weights(norms, valid, self.options.normalise)
        weights = ablation.SOURCES[self.options.source](weights, valid)
        if self.options.ramp and self.warm(step):
            weights = weights * ((step + 1) / self.options.warm_steps)  # beta_t, 1 at the last warm-up step
        return weights

    def recall(self, valid: Tensor, segments: Tensor, step: int | None) -> Tensor:
        """Float[B, L]: weights without a probe: last step's norms in warm-up, the frozen ones after it."""
        if step is not None and self.warm(step):
            if step == 0:
                return masks.causal(valid)  # no step before: pre-training's mask
            return self.weigh(guidance.from_position(self.previous_norms, valid), valid, step)
        if self.options.freeze == "segment":
            return guidance.from_segment(self._known(self.frozen_segment), valid, segments)
        return guidance.from_position(self._known(self.frozen_position), valid)

    def _known(self, frozen: Tensor) -> Tensor:
        if torch.isnan(frozen).any():
            raise RecipeError(
                f"frozen weights: asked for before warm-up ended (warm_steps = {self.options.warm_steps})"
            )
        return frozen

    def freeze(self, weights: Tensor, valid: Tensor, segments: Tensor) -> None:
        """Keep the weights Float[B, L] of the last warm-up batch."""
        self.frozen_position.copy_(guidance.by_position(weights, valid, self.max_length))
        self.frozen_segment.copy_(guidance.by_segment(weights, valid, segments, len(SEGMENTS)))
        self.frozen_mean.copy_(weights[valid].mean())

    def weights(self, view: View) -> Tensor:
        """The weights of this batch before any opening; answers get the scalar mean of the left tower's."""
        if view.weights is not None:
            return view.weights
        if view.tower == "answer":
            return masks.bidirectional(view.valid) * self._known(self.frozen_mean)
        return self.recall(view.valid, view.segments, view.step)


class HybridMask(Guided):
    """GG-SM's weights without the scheduler (A.4, hybrid a); inference keeps the frozen weights.

    With ``freeze: tower`` each training batch is scored by the frozen tower; inference has no loss to score
    with and takes that tower's mean weight per position.
    """

    def visibility(self, view: View) -> Tensor:
        return self.weights(view)


class GradientGuidedSoftMask(Guided):
    """GG-SM (Eq. 5, 15): guided warm-up, then linearly to full visibility; bidirectional at inference."""

    def visibility(self, view: View) -> Tensor:
        if view.step is None:
            return masks.bidirectional(view.valid)
        return guidance.open_linearly(
            self.weights(view), view.step, self.options.warm_steps, self.total_steps
        )


RECIPES: dict[str, type[Recipe]] = {
    "causal": Causal,
    "hybrid_segment": HybridSegment,
    "hybrid_mask": HybridMask,
    "hybrid_mlp": MlpOpening,
    "hybrid_gq": GlobalQuery,
    "bidirectional": Bidirectional,
    "scheduler": ScheduledOpening,
    "ggsm": GradientGuidedSoftMask,
}


def build(
    name: str, options: Section | None, *, total_steps: int, hidden_size: int, max_length: int
) -> Recipe:
    """The recipe of that name; ``options`` None stands for its defaults.

    Raises ``RecipeError`` for an unknown name, or options of another recipe.
    """
    if name not in RECIPES:
        raise RecipeError(f"recipe: {name!r} is unknown; known: {', '.join(RECIPES)}")
    kind = RECIPES[name]
    options = kind.section() if options is None else options
    if type(options) is not kind.section:
        raise RecipeError(
            f"options: {name} takes {kind.section.__name__}, got {type(options).__name__} {options!r}"
        )
    # What a recipe draws for itself must not change what is drawn later: with one seed, all start alike.
    with torch.random.fork_rng(devices=[]):
        recipe = kind(options, total_steps, hidden_size, max_length)
    recipe.name = name
    return recipe

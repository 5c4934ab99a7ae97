"""The visibility player: one sequence's mask, its tokens' weights and the loss, step by step through a run.

``film`` reads from a run what a recipe showed of a sequence while it was trained; ``show`` makes one page of
one or several films: plain HTML with its own style and script, nothing loaded from anywhere. In print, and
where scripts are off, a few still pictures stand in its place.

Shapes: F frames, T training steps, L length.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from string import Template
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ggsm_core import figures, guidance
from ggsm_core.collation import Batch
from ggsm_core.recipes import Guided, Recipe, View
from ggsm_core.story import Page
from ggsm_core.template import SEGMENTS

FRAMES = 41
BEFORE, AFTER = -2, -1
"""Steps of the first and last frame: the causal mask of pre-training, and the mask of inference."""


class PlayerError(ValueError):
    """A run or sequences that the player can't show."""


@dataclass(frozen=True)
class Film:
    """What one recipe showed of one sequence during training, and the loss of that run."""

    steps: np.ndarray  # Int[F], from BEFORE to AFTER
    visibility: np.ndarray  # Float[F, L] where it depends on the key alone, else Float[F, L, L]
    loss: np.ndarray  # Float[T]
    segments: np.ndarray  # Int[L]
    warm_steps: int

    @property
    def weights(self) -> np.ndarray:
        """Float[F, L]: mean visibility of each key to the queries before it, nan for the first key.

        Where a recipe weighs keys alone this is the weight itself.
        """
        if self.visibility.ndim == 2:
            weights = self.visibility.copy()
        else:
            future = np.triu(np.ones(self.visibility.shape[1:]), 1)
            weights = (self.visibility * future).sum(1) / np.maximum(future.sum(0), 1)
        weights[:, 0] = np.nan
        return weights

    @property
    def openness(self) -> np.ndarray:
        """Float[F]: mean visibility of all future pairs of the sequence; 0 causal, 1 bidirectional."""
        length = len(self.segments)
        share = np.arange(length) / max(length * (length - 1) / 2, 1)  # key j has j queries before it
        return np.nansum(self.weights * share, axis=1)


def film(recipe: Recipe, metrics: pl.DataFrame, batch: Batch, frames: int = FRAMES) -> Film:
    """What ``recipe`` showed of the one sequence in ``batch``: before a run, at its steps, and after it.

    Recipes without guidance are asked anew and say exactly what they said in training. Guided ones are given
    the weights that the run logged, the mean over each batch by distance from ``<USER>``: exact for frozen
    weights (by position or segment), but in warm-up a batch's mean and not this user's own weights.

    Args:
        recipe: of the trained encoder, so that what it has frozen is there.
        metrics: one row a step, from ``Run.metrics()`` of that encoder's run.
        batch: one sequence of L tokens without padding.
        frames: how many steps are shown, evenly spaced, besides those where warm-up ends.

    Raises:
        PlayerError: more than one sequence, or a recipe that learns its mask, which no run logs.
    """
    if batch.valid.shape[0] != 1 or not bool(batch.valid.all()):
        raise PlayerError(
            f"batch: expected one sequence without padding, got valid {tuple(batch.valid.shape)}"
        )
    if any(True for _ in recipe.parameters()):
        raise PlayerError(
            f"recipe: {recipe.name} learns its mask, and a run logs no more than its mean; "
            "show a recipe whose visibility follows from the step"
        )
    total = len(metrics)
    warm = recipe.options.warm_steps if isinstance(recipe, Guided) else 0
    kept = {*np.linspace(0, total - 1, min(frames, total)).round().astype(int).tolist()}
    steps = sorted(kept | ({warm - 1, warm} if warm else set()))
    logged = metrics.select(pl.col("^weights_by_.*$"))

    def visibility(step: int | None) -> torch.Tensor:
        weights = None
        if isinstance(recipe, Guided) and step is not None:
            weights = _logged(recipe, logged.row(step, named=True), batch, step)
        hidden = torch.zeros(*batch.valid.shape, 1)
        view = View(batch.valid, batch.segments, hidden, step, weights=weights)
        return recipe.visibility(view)[0].detach()

    shown = [visibility(step) for step in [*steps, None]]
    return Film(
        np.array([BEFORE, *steps, AFTER]),
        torch.stack([torch.zeros_like(shown[0]), *shown]).numpy().astype(float),
        metrics["loss"].to_numpy(),
        batch.segments[0].numpy(),
        warm,
    )


def _logged(recipe: Guided, row: Mapping[str, list[float]], batch: Batch, step: int) -> torch.Tensor:
    """Float[1, L]: the weights that a run logged at ``step``, laid on this sequence."""
    if recipe.options.freeze == "segment" and not recipe.warm(step):
        return guidance.from_segment(torch.tensor(row["weights_by_segment"]), batch.valid, batch.segments)
    profile = torch.tensor(row["weights_by_position"])
    missing = max(batch.valid.shape[1] - len(profile), 0)  # this batch had no sequence as long
    return guidance.from_position(torch.cat([profile, profile[-1:].expand(missing)]), batch.valid)


def show(films: Mapping[str, Film], words: Sequence[str], *, caption: str) -> Page:
    """The player: a slider over steps, and for each name its mask [L, L], its tokens' weights and its loss.

    ``words`` are the L tokens as a reader should see them (``workbench.words``); ``caption`` says whose
    sequence it is. Films of one run length share the slider.

    Raises ``PlayerError`` for films of another length, or another number of words.
    """
    total, length = len(next(iter(films.values())).loss), len(words)
    for name, one in films.items():
        if (len(one.loss), len(one.segments)) != (total, length):
            raise PlayerError(
                f"{name}: {len(one.loss)} steps and {len(one.segments)} tokens, not {total} and {length}; "
                "show films of one profile and one sequence, and that sequence's words"
            )
    steps = sorted({int(step) for one in films.values() for step in one.steps if step >= 0})
    curve = figures.curves({name: (range(total), one.loss) for name, one in films.items()}, label="loss")
    segments = next(iter(films.values())).segments
    data = {
        "last": total - 1,
        "steps": [BEFORE, *steps, AFTER],
        "now": [None, *_places(curve, steps), None],
        "palette": [to_hex(plt.get_cmap(figures.VISIBILITY)(shade)) for shade in np.linspace(0, 1, 101)],
        "margin": [_colour(kind) for kind in segments],
        "films": [_frames(one, steps) for one in films.values()],
    }
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    name = f"player-{hashlib.sha256((packed + caption).encode()).hexdigest()[:10]}"
    names = " and ".join(films)
    return Page(
        _template("player.html").substitute(
            id=name,
            style=_template("player.css").template,
            script=_template("player.js").template,
            caption=html.escape(caption),
            curve=_picture(curve, f"Training loss over steps: {names}."),
            stills=_picture(_stills(films), f"Masks of {names} at four moments of training."),
            films="".join(_stage(name, words, segments) for name in films),
            data=packed,
        )
    )


def _template(name: str) -> Template:
    return Template(files(__name__).joinpath(name).read_text(encoding="utf-8"))


def _colour(kind: int) -> str:
    return figures.SEGMENT_COLOURS[list(SEGMENTS)[kind]]


def _frames(one: Film, steps: Sequence[int]) -> dict[str, Any]:
    """One film for the script: weights in thousandths, and masks that depend on the query, run by run."""
    at = np.searchsorted(one.steps[:-1], steps, side="right") - 1  # a step that it lacks shows the one before
    rows = [0, *at.tolist(), len(one.steps) - 1]
    frames: dict[str, Any] = {
        "weights": (np.nan_to_num(one.weights[rows]) * 1000).round().astype(int).tolist(),
        "open": one.openness[rows].round(4).tolist(),
        "loss": [None, *(round(float(one.loss[step]), 3) for step in steps), None],
        "warm": one.warm_steps,
    }
    if one.visibility.ndim == 3:
        upper = np.triu_indices(one.visibility.shape[1], 1)
        frames["masks"] = [_runs((frame[upper] * 100).round().astype(int)) for frame in one.visibility[rows]]
    return frames


def _runs(values: np.ndarray) -> list[int]:
    """[value, how often, value, how often, ...]: masks are mostly runs of one value."""
    return [number for value, run in groupby(values.tolist()) for number in (value, len(list(run)))]


def _stage(name: str, words: Sequence[str], segments: np.ndarray) -> str:
    """One film's place: its mask, what is seen now, and its tokens."""
    tokens = "".join(
        f'<li style="border-color:{_colour(kind)}"><span>{html.escape(word)}</span> <b></b></li>'
        for word, kind in zip(words, segments, strict=True)
    )
    side = len(words) + 2  # two pixels of margin in the colours of the segments
    return _template("film.html").substitute(name=html.escape(name), side=side, tokens=tokens)


def _places(curve: Figure, steps: Sequence[int]) -> list[float]:
    """Where each step lies in the picture of the curve, in percent of its width."""
    curve.draw_without_rendering()  # settles the layout
    pixels = curve.axes[0].transData.transform([(step, 0) for step in steps])[:, 0]
    return (100 * pixels / curve.bbox.width).round(2).tolist()


def _stills(films: Mapping[str, Film]) -> Figure:
    """Masks at four moments: before, at the first step, halfway, after; a row for each film."""
    moments: dict[str, ArrayLike] = {}
    for name, one in films.items():
        last = len(one.steps) - 1
        for frame, when in (
            (0, "before"),
            (1, "t=0"),
            (last // 2, f"t={one.steps[last // 2]}"),
            (last, "after"),
        ):
            moments[f"{name}, {when}"] = one.visibility[frame]
    return figures.masks(moments, next(iter(films.values())).segments)


def _picture(figure: Figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'

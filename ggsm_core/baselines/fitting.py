"""How every trained baseline is trained: AdamW, stopped early on households that it does not train on.

The held-out households are those of the training period; the probe's folds are never looked at.
"""

from __future__ import annotations

import copy
import json
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from ggsm_core.baselines.base import SYSTEM, Baseline, BaselineError, Histories, Train, Users
from ggsm_core.baselines.visits import Batch, Visits, Vocabulary
from ggsm_core.progress import Progress

if TYPE_CHECKING:
    from ggsm_core.intervals import Floats, Ints

Loss = Callable[["Ints", np.random.Generator], Tensor]
"""Rows of the training samples, and the source of whatever the objective draws -> scalar."""


@dataclass(frozen=True)
class Fitted:
    """How a fit went: ``epochs`` run, of which ``best_epoch`` (from 1) was kept."""

    epochs: int
    best_epoch: int
    stopped_early: bool
    parameters: int


class Log:
    """metrics.jsonl, a line an epoch, and progress."""

    def __init__(self, out: Path, total: int, progress: Progress) -> None:
        self._file, self._total, self._progress = out / "metrics.jsonl", total, progress

    def __call__(self, **metrics: Any) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        self._progress(metrics["step"], self._total, f"loss {metrics['loss']:.3f}")


def split(users: Ints, share: float) -> tuple[Ints, Ints]:
    """Rows to train on, and rows of the ``share`` of the households that are held out: the same for all."""
    households = np.random.default_rng(0).permutation(np.unique(users))
    held = np.isin(users, households[: max(round(share * len(households)), 1)])
    if held.all():
        raise BaselineError(f"users: {len(households)} household(s); stopping early needs some held out")
    return np.flatnonzero(~held), np.flatnonzero(held)


def fit(
    model: nn.Module, loss_of: Loss, users: Ints, settings: Any, seed: int, log: Callable[..., None]
) -> Fitted:
    """Train ``model`` until the loss of the held-out households has not fallen for ``patience`` epochs.

    Args:
        model: ends with the parameters of its best epoch.
        loss_of: the objective on some rows.
        users: Int[n], the household of each training sample.
        settings: params.peers.
        seed: of the batches and of what the objective draws.
        log: called after each epoch with step, loss, held_out_loss, seconds.

    Raises:
        BaselineError: a loss that is not finite.
    """
    train, held = split(users, settings.held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    rng = np.random.default_rng(seed)
    best, best_epoch, kept = np.inf, 0, copy.deepcopy(model.state_dict())
    epoch = 0
    for epoch in range(1, settings.epochs + 1):
        began = time.monotonic()
        model.train()
        losses = []
        for rows in _batches(rng.permutation(train), settings.batch_size):
            loss = loss_of(rows, rng)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
        model.eval()
        same = np.random.default_rng(0)  # the same draws every epoch, so that epochs can be compared
        with torch.no_grad():
            after = float(np.mean([float(loss_of(r, same)) for r in _batches(held, settings.batch_size)]))
        if not np.isfinite(after):
            raise BaselineError(f"loss: {after} in epoch {epoch}; lower peers.learning_rate")
        seconds = round(time.monotonic() - began, 3)
        log(step=epoch, loss=float(np.mean(losses)), held_out_loss=after, seconds=seconds)
        if after < best:
            best, best_epoch, kept = after, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= settings.patience:
            break
    model.load_state_dict(kept)
    model.eval()
    stopped = epoch - best_epoch >= settings.patience
    return Fitted(epoch, best_epoch, stopped, sum(p.numel() for p in model.parameters()))


def _batches(rows: Ints, size: int) -> list[Ints]:
    """Cut into batches of equal size, give or take one: a last batch of one has no negatives."""
    return np.array_split(rows, max(round(len(rows) / size), 1))


def learn(
    system: Baseline[Train, Users], train: Train, users: Callable[[], tuple[Ints, Users]], out: Path
) -> None:
    """Fit, embed, and write embeddings.safetensors (embeddings Float32[n, k], sample) and ``SYSTEM``.

    ``users`` returns samples Int[n] and users; it is called after the fit, so that nothing of the probe split
    is in memory before that ends.
    """
    began = time.monotonic()
    system.fit(train)
    fitted = time.monotonic()
    samples, probed = users()
    read = time.monotonic()
    embeddings = system.embed(probed)
    seconds = {"fit_seconds": round(fitted - began, 2), "embed_seconds": round(time.monotonic() - read, 2)}
    how = getattr(system, "fitted", None)
    description = {"name": system.name, "dimension": embeddings.shape[1], **seconds}
    description |= asdict(how) if how is not None else {}
    save_file(
        {"embeddings": embeddings.astype(np.float32), "sample": samples}, out / "embeddings.safetensors"
    )
    (out / SYSTEM).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


@torch.inference_mode()
def in_batches(embed: Callable[[Ints], Tensor], n: int, size: int = 512) -> Any:
    """Float64[n, k]: ``embed`` over all rows, a batch at a time."""
    return torch.cat([embed(rows) for rows in np.array_split(np.arange(n), -(-n // size))]).double().numpy()


class SequenceBaseline(Baseline[Histories, Histories]):
    """A baseline that reads visits; a subclass says what its model is, minimises and reads out.

    Args:
        settings: params.peers.
        seed: of weights, batches and draws.
        log: called after each epoch, as ``fit`` says.
    """

    def __init__(self, settings: Any, seed: int, log: Callable[..., None]) -> None:
        self.settings, self.seed, self.log = settings, seed, log

    def fit(self, train: Histories) -> Self:
        """Learn the vocabulary and the model from the training period."""
        self.vocabulary = Vocabulary(train, self.settings.vocabulary)
        visits = Visits(train, self.vocabulary, self.settings.visits)
        torch.manual_seed(self.seed)
        self.model = self.build()
        loss_of = self.objective(train, visits)
        self.fitted = fit(self.model, loss_of, train.users, self.settings, self.seed, self.log)
        return self

    def embed(self, users: Histories) -> Floats:
        """Float[n, d]."""
        visits = Visits(users, self.vocabulary, self.settings.visits)
        vectors: Floats = in_batches(lambda rows: self.vectors(visits.batch(rows)), len(users.samples))
        return vectors

    @abstractmethod
    def build(self) -> Any:
        """The model, once the vocabulary is known."""

    @abstractmethod
    def objective(self, train: Histories, visits: Visits) -> Loss:
        """The loss on rows of the training samples."""

    @abstractmethod
    def vectors(self, batch: Batch) -> Tensor:
        """Float[B, d]: user embeddings."""

"""The contrastive loop: batches, guidance, large cached batches, checkpoints (Sec. 4-5).

One step: choose B pairs, ask the recipe for guidance weights, encode both towers, gather all embeddings,
InfoNCE over the global batch, one gradient synchronisation, AdamW. Batches are a pure function of
(seed, step), so a resumed run sees what an undisturbed one would have seen.

    python -m ggsm_core.training --profile params/quick.yaml --recipe ggsm --seed 0

Shapes: B global batch, b this process's share of it, L length, d hidden size.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.numpy import load_file as load_numpy
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ggsm_core import checkpoints, guidance, masks, recipes
from ggsm_core.loss import Negatives, info_nce_rows
from ggsm_core.model import Output, UserEncoder, load_decoder
from ggsm_core.template import SEGMENTS, Batch, collate
from ggsm_core.tokens import Progress, Sequences


class TrainingError(RuntimeError):
    """Training that can't start, or must not go on."""


@dataclass(frozen=True)
class PairBatch:
    """b pairs: both towers' sequences, and who may not be a negative of whom (Long[b])."""

    user: Batch
    answer: Batch
    user_ids: Tensor
    answer_ids: Tensor


class Pairs:
    """The training pairs, and which of them make batch t."""

    def __init__(self, tokens: Path, texts: Path, batch_size: int, seed: int) -> None:
        self.users, self.answers = (
            Sequences.load(tokens, "train_users"),
            Sequences.load(tokens, "train_answers"),
        )
        index = pl.read_parquet(tokens / "pairs.parquet").with_row_index("row")
        self.user_ids, self.answer_ids = index["user_id"].to_numpy(), index["answer_id"].to_numpy()
        self._of_sample = [
            np.array(rows) for rows in index.group_by("sample", maintain_order=True).agg("row")["row"]
        ]
        self.feature_of = features(texts)
        self.batch_size, self.seed = batch_size, seed
        if len(self._of_sample) < batch_size:
            raise TrainingError(
                f"training.batch_size: {batch_size} is above the {len(self._of_sample)} training samples"
            )

    def rows(self, step: int) -> np.ndarray:
        """Int64[B]: the pairs of batch ``step``. Every sample comes once an epoch, with one of its answers.

        One granularity a batch: with several, InfoNCE is soon solved by telling kinds of answers apart. A
        batch that begins in one epoch and ends in the next may hold a sample twice; its rows share the user
        and are no negatives of each other.
        """
        count = len(self._of_sample)
        chosen = []
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, offset = divmod(place, count)
            sample = self._order(epoch)[offset]
            options = self._of_sample[sample]
            # Shifted every epoch, so that a sample meets all its answers however many steps an epoch has.
            chosen.append(options[(step + epoch) % len(options)])
        return np.array(chosen)

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_cached", (None,))[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self._of_sample))
            self._cached = (epoch, order)
        return self._cached[1]

    def batch(self, rows: np.ndarray, pad_id: int) -> PairBatch:
        """Collate the pairs in ``rows``."""
        return PairBatch(
            collate([self.users[i] for i in rows], pad_id, self.feature_of),
            collate([self.answers[i] for i in rows], pad_id),
            torch.from_numpy(self.user_ids[rows]),
            torch.from_numpy(self.answer_ids[rows].astype(np.int64)),
        )


def features(texts: Path) -> Callable[[str], np.ndarray]:
    """Record text -> Float[F], from the run that encoded them."""
    names = json.loads((texts / "texts.json").read_text(encoding="utf-8"))
    table = load_numpy(texts / "texts.safetensors")["features"]
    index = {name: i for i, name in enumerate(names)}
    return lambda text: table[index[text]]


def feature_size(texts: Path) -> int:
    """F."""
    return int(load_numpy(texts / "texts.safetensors")["features"].shape[1])


def build_encoder(params: Any, inputs: dict[str, Path]) -> UserEncoder:
    """The encoder of this recipe before contrastive training, seeded by ``params.seed``."""
    torch.manual_seed(params.seed)
    decoder = load_decoder(inputs["pretrain"], params.backbone.attention)
    recipe = recipes.build(
        params.recipe,
        params.options,
        total_steps=params.training.total_steps,
        hidden_size=decoder.config.hidden_size,
        max_length=params.template.max_user_tokens,
    )
    adapter = params.template.modality_input == "adapter"
    return UserEncoder(
        decoder,
        PreTrainedTokenizerFast.from_pretrained(inputs["pretrain"]),
        recipe,
        features=feature_size(inputs["texts"]) if adapter else None,
        lora=params.lora,
        answer_mask=params.training.answer_mask,
        template=params.template,
    )


class Towers(nn.Module):
    """Both towers in one forward pass, so that data parallelism synchronises once."""

    def __init__(self, encoder: UserEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, pairs: PairBatch, step: int, weights: Tensor | None, site: str | None, causal: bool
    ) -> tuple[Output, Output]:
        """User and answer outputs of b pairs."""
        level = None
        if weights is not None:
            # Answers have no weights of their own: the scalar mean of the left tower's (reading note 7).
            level = weights[pairs.user.valid].mean() * torch.ones_like(
                pairs.answer.valid, dtype=weights.dtype
            )
        return (
            self.encoder(pairs.user, tower="user", step=step, weights=weights, site=site, causal=causal),
            self.encoder(pairs.answer, tower="answer", step=step, weights=level, causal=causal),
        )


class Trainer:
    """Contrastive training of one encoder under one recipe."""

    def __init__(self, encoder: UserEncoder, pairs: Pairs, params: Any) -> None:
        self.params, self.pairs = params, pairs
        self.accelerator = Accelerator(
            mixed_precision="bf16" if params.training.precision == "bf16" else "no",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        if params.training.batch_size % world:
            raise TrainingError(
                f"training.batch_size: {world} processes can't share {params.training.batch_size} evenly"
            )
        share = params.training.batch_size // world
        self.own = slice(rank * share, (rank + 1) * share)
        self.encoder = encoder
        decay = [p for p in encoder.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in encoder.parameters() if p.requires_grad and p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": params.training.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=params.training.learning_rate,
            betas=(0.9, params.training.adam_beta2),
        )
        self.towers = self.accelerator.prepare(Towers(encoder))
        self.frozen_tower: UserEncoder | None = None
        self.step = 0

    # ------------------------------------------------------------------ one step

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        begin, step = time.monotonic(), self.step
        self.encoder.train()
        pairs = self._batch(step)
        weights, diagnosis = self._guide(pairs, step)
        recipe = self.encoder.recipe
        learner = recipe if isinstance(recipe, recipes.Guided) and recipe.wants_norms(step) else None
        user, answer = self.towers(pairs, step, weights, learner and learner.options.grad_site, False)
        if learner:
            user.site.retain_grad()
        loss, negatives, similarity = self._loss(user.embedding, answer.embedding, pairs, step)
        if not math.isfinite(float(loss.detach())):
            raise TrainingError(f"loss: {float(loss.detach())} at step {step}; lower training.learning_rate")
        self.optimizer.zero_grad()
        # DDP averages over processes; every process holds the whole loss with gradient for its own rows only.
        self.accelerator.backward(loss * self.accelerator.num_processes)
        if learner:
            norms = guidance.norms_of(user.site.grad) / self.accelerator.num_processes
            learner.remember(*self._everyones(norms, pairs.user.valid))
            self._freeze(learner, learner.weigh(norms, pairs.user.valid, step), pairs, step)
        norm = self.accelerator.clip_grad_norm_(self.encoder.parameters(), self.params.training.max_grad_norm)
        rate = self._learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        seconds = time.monotonic() - begin
        tokens = int(pairs.user.valid.sum() + pairs.answer.valid.sum()) * self.accelerator.num_processes
        return {
            "step": step,
            "loss": float(loss.detach()),
            "positive": similarity[0],
            "negative": similarity[1],
            "true_negatives": negatives.kept,
            "masked_user_answer": negatives.masked_user_answer,
            "masked_user_user": negatives.masked_user_user,
            "masked_answer_answer": negatives.masked_answer_answer,
            "visibility": masks.mean_visibility(user.visibility, user.valid),
            "gradient_norm": float(norm),
            "learning_rate": rate,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            **diagnosis,
        }

    def _batch(self, step: int) -> PairBatch:
        pairs = self.pairs.batch(self.pairs.rows(step)[self.own], self.encoder.ids["<pad>"])
        device = self.accelerator.device
        return PairBatch(
            pairs.user.to(device),
            pairs.answer.to(device),
            pairs.user_ids.to(device),
            pairs.answer_ids.to(device),
        )

    def _loss(
        self, user: Tensor, answer: Tensor, pairs: PairBatch, step: int
    ) -> tuple[Tensor, Negatives, tuple[float, float]]:
        """The loss of the global batch, with gradient for this process's rows.

        Every process computes all B rows (a B x B product is cheap), so the gradient of other rows' terms
        with respect to ours needs no communication.
        """
        objective = self.params.objective
        user_all, answer_all = self._with_gradient(user), self._with_gradient(answer)
        rows, negatives = info_nce_rows(
            user_all,
            answer_all,
            temperature=objective.temperature,
            margin=objective.margin if step >= objective.margin_from else None,
            same_side=objective.same_side,
            answer_ids=self.accelerator.gather(pairs.answer_ids),
            user_ids=self.accelerator.gather(pairs.user_ids),
        )
        with torch.no_grad():
            cosine = user_all @ answer_all.T
            positive = float(cosine.diagonal().mean())
            negative = float((cosine.sum() - cosine.diagonal().sum()) / (cosine.numel() - len(cosine)))
        return rows.mean(), negatives, (positive, negative)

    def _with_gradient(self, own: Tensor) -> Tensor:
        """Float[B, d] from Float[b, d]: everyone's rows, ours still attached to their graph."""
        if self.accelerator.num_processes == 1:
            return own
        everyone = self.accelerator.gather(own.detach())
        return torch.cat([everyone[: self.own.start], own, everyone[self.own.stop :]])

    def _everyones(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Gather Float/Bool/Long[b, L] over processes, padded to one length on the right."""
        # accelerate makes int64 of a bool that it pads, and pads on the process with the shorter batch alone.
        padded = [
            self.accelerator.pad_across_processes(t.contiguous(), dim=1, pad_index=0).to(t.dtype)
            for t in tensors
        ]
        return tuple(self.accelerator.gather(t) for t in padded)

    def _learning_rate(self, step: int) -> float:
        training = self.params.training
        warm = training.lr_warm_share * training.total_steps
        if step < warm:
            return training.learning_rate * (step + 1) / (warm + 1)
        share = (step - warm) / max(training.total_steps - warm, 1)
        return training.learning_rate * (1 + math.cos(math.pi * share)) / 2

    # ------------------------------------------------------------------ guidance

    def _guide(self, pairs: PairBatch, step: int) -> tuple[Tensor | None, dict[str, Any]]:
        """Guidance weights Float[b, L] of this batch, for recipes that use them, and what they look like."""
        recipe = self.encoder.recipe
        if not isinstance(recipe, recipes.Guided):
            return None, {}
        valid, segments = pairs.user.valid, pairs.user.segments
        norms = None
        if recipe.wants_probe(step):
            norms = self._probe(pairs, step)
            weights = recipe.weigh(norms, valid, step)
        else:
            weights = recipe.recall(valid, segments, step)
        if norms is not None:
            self._freeze(recipe, weights, pairs, step)
        everyones, all_valid, all_segments = self._everyones(weights, valid, segments)
        seen = guidance.diagnose(weights if norms is None else norms, weights, valid)
        length = int(all_valid.sum(1).max())
        return weights, {
            "guidance_mean": seen.mean,
            "guidance_spread": seen.spread,
            "guidance_silent": seen.silent_share if norms is not None else None,
            "weights_by_position": _rounded(guidance.by_position(everyones, all_valid, length)),
            "weights_by_segment": _rounded(
                guidance.by_segment(everyones, all_valid, all_segments, len(SEGMENTS))
            ),
        }

    def _freeze(self, recipe: recipes.Guided, weights: Tensor, pairs: PairBatch, step: int) -> None:
        """At t = T_warm - 1 keep the weights Float[b, L] of L_warm, from all processes."""
        if step != recipe.options.warm_steps - 1:
            return
        recipe.freeze(*self._everyones(weights, pairs.user.valid, pairs.user.segments))
        if recipe.options.freeze == "tower":
            self.frozen_tower = self._snapshot()

    def _probe(self, pairs: PairBatch, step: int) -> Tensor:
        """Float[b, L]: gradient norms of a pass under the causal mask (reading note 3).

        In warm-up the encoder itself is probed; after it, with ``freeze: tower``, the frozen snapshot.
        Random state is forked, so that the training pass does not depend on whether it was probed.
        """
        recipe = self.encoder.recipe
        if recipe.options.source == "attention":
            with torch.random.fork_rng(), torch.no_grad(), self.accelerator.autocast():
                return (self.frozen_tower or self.encoder).attention_of_read_out(pairs.user)
        towers = Towers(self.frozen_tower or self.encoder)
        # The training pass runs in autocast by itself: accelerate wraps it. This one does not go through it.
        with torch.random.fork_rng(), self.accelerator.autocast():
            user, answer = towers(pairs, step, None, recipe.options.grad_site, True)
        loss, _, _ = self._loss(user.embedding, answer.embedding, pairs, step)
        return guidance.gradient_norms(loss, user.site)

    def _snapshot(self) -> UserEncoder:
        """A frozen copy of the encoder at the end of warm-up."""
        return copy.deepcopy(self.encoder).eval()

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, Tensor]:
        """All that a resume needs, as tensors."""
        state = {f"encoder.{k}": v for k, v in self.encoder.trained_state().items()}
        state |= {f"optimizer.{k}": v for k, v in checkpoints.optimizer_tensors(self.optimizer).items()}
        if self.frozen_tower is not None:
            state |= {f"frozen_tower.{k}": v for k, v in self.frozen_tower.trained_state().items()}
        return state | {"random": torch.get_rng_state(), "step": torch.tensor(self.step)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.encoder.load_trained_state(part("encoder."))
        checkpoints.load_optimizer_tensors(self.optimizer, part("optimizer."))
        if frozen := part("frozen_tower."):
            self.frozen_tower = self._snapshot()
            self.frozen_tower.load_trained_state(frozen)
        torch.set_rng_state(state["random"])
        self.step = int(state["step"])


def _rounded(values: Tensor) -> list[float]:
    return [round(float(v), 5) for v in values]


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``contrast``: train under ``params.recipe`` and save the encoder.

    ``out`` may hold the checkpoints of an interrupted run; training goes on from the last whole one.
    """
    training = params.training
    pairs = Pairs(inputs["tokens"], inputs["texts"], training.batch_size, params.seed)
    trainer = Trainer(build_encoder(params, inputs), pairs, params)
    main = trainer.accelerator.is_main_process
    store = checkpoints.Store(out / "checkpoints", keep=training.keep_checkpoints)
    resumed = store.latest()
    if resumed is not None:
        trainer.load_state(resumed)
        progress(trainer.step, training.total_steps, f"resumed at step {trainer.step}")
    log = out / "metrics.jsonl"
    if main:
        checkpoints.keep_lines(log, trainer.step)
    while trainer.step < training.total_steps:
        metrics = trainer.train_step()
        if main:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            progress(trainer.step, training.total_steps, f"loss {metrics['loss']:.3f}")
            if trainer.step % training.checkpoint_every == 0 and trainer.step < training.total_steps:
                store.save(trainer.step, trainer.state())
    if main:
        trainer.encoder.save(out)
        store.remove()


if __name__ == "__main__":
    import sys

    from ggsm_core.worker import command_line

    sys.exit(command_line("contrast"))

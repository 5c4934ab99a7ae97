"""The contrastive loop: batches, guidance, large cached batches, checkpoints (Sec. 4-5).

One step: choose B pairs, ask the recipe for guidance weights, encode both towers, gather all embeddings,
InfoNCE over the global batch, one gradient synchronisation, AdamW. Batches are a pure function of (seed,
step) and dropout of (seed, step, row), so a resumed run, one in micro-batches and one on another number of
processes are the same run. There is no short last batch: one that begins in an epoch's last samples ends in
the next epoch's first.

    python -m ggsm_core.training --profile params/quick.yaml --recipe ggsm --seed 0

Shapes: B global batch, b this process's share of it, L length, d hidden size.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from ggsm_core import checkpoints, gradcache, guidance, masks, recipes, telemetry
from ggsm_core.batches import Chunk, PairBatch, Pairs, chunks, split
from ggsm_core.distributed import Shares, TrainingError, answered, joined
from ggsm_core.loss import LossError, centred, info_nce_rows
from ggsm_core.model import NotFinite, Output, UserEncoder
from ggsm_core.progress import Progress
from ggsm_core.template import PAD_TOKEN, SEGMENTS
from ggsm_core.towers import Towers, build_encoder


class Diverged(TrainingError):
    """A loss or gradient that is not finite, or a loss that has exploded."""


@dataclass
class Guide:
    """Guidance of a batch: weights Float[., L] of each micro-batch, their mean over B, and how they look."""

    weights: list[Tensor | None]
    level: Tensor | None
    diagnosis: dict[str, Any]


class Trainer:
    """Contrastive training of one encoder under one recipe."""

    def __init__(self, encoder: UserEncoder, pairs: Pairs, params: Any) -> None:
        self.params, self.pairs = params, pairs
        seconds = params.training.timeout_seconds
        with answered(seconds):
            self.accelerator = Accelerator(
                mixed_precision="bf16" if params.training.precision == "bf16" else "no",
                kwargs_handlers=[
                    DistributedDataParallelKwargs(find_unused_parameters=True),
                    InitProcessGroupKwargs(timeout=timedelta(seconds=seconds)),
                ],
            )
        self.shares = Shares(self.accelerator, params.training.batch_size)
        self.encoder = encoder
        decay = [p for p in encoder.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in encoder.parameters() if p.requires_grad and p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": params.training.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=params.training.learning_rate,
            betas=(0.9, params.training.adam_beta2),
        )
        # Together: FSDP2 puts sharded parameters in the place of those that the optimizer holds.
        self.towers, self.optimizer = self.accelerator.prepare(Towers(encoder, params.seed), optimizer)
        if self.accelerator.is_fsdp2 and getattr(params.options, "freeze", None) == "tower":
            raise TrainingError(
                "freeze: tower keeps a whole copy of the encoder, which FSDP2 has no place for; use DDP, or "
                "freeze: position or segment"
            )
        if self.accelerator.is_fsdp2 and getattr(params.options, "source", None) == "attention":
            raise TrainingError(
                "source: attention asks the encoder past its forward pass, and FSDP2 gathers the weights for "
                "that alone; use DDP, or another source"
            )
        self.frozen_tower: UserEncoder | None = None
        self.step = 0

    # ------------------------------------------------------------------ one step

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics.

        Raises:
            Diverged: the loss or a gradient isn't finite, or the loss has exploded. Nothing is updated.
            TrainingError: another process is gone or hangs.
        """
        try:
            with answered(self.params.training.timeout_seconds):
                return self._train_step()
        except (NotFinite, LossError, guidance.GuidanceError) as problem:
            raise Diverged(f"step {self.step}: {problem}") from problem

    def _train_step(self) -> dict[str, Any]:
        begin, step = time.monotonic(), self.step
        self.encoder.train()
        parts = self._chunks(step)
        guide = self._guide(parts, step)
        recipe = self.encoder.recipe
        learner = recipe if isinstance(recipe, recipes.Guided) and recipe.wants_norms(step) else None
        site = learner.options.grad_site if learner else None

        def encode(chunk: Chunk) -> tuple[Output, Output]:
            return self.towers(chunk.pairs, step, guide.weights[chunk.number], guide.level, site, False)

        passes = gradcache.TwoPasses(encode, parts)
        gradients, metrics = self._objective(*self._in_order(parts, passes.first()), step)
        self.optimizer.zero_grad()
        norms: list[Tensor] = []
        seen: list[tuple[float, ...]] = []
        for chunk in parts:
            with self._synchronised(chunk is parts[-1]):
                user, answer = passes.second(chunk)
                if learner:
                    assert user.site is not None
                    user.site.retain_grad()
                loss = gradcache.surrogate((user, answer), self._of(chunk, gradients))
                loss = loss + self._beside(chunk, step)
                # DDP averages over processes; each goes backwards from its own rows of the whole loss.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            if learner:
                norms.append(guidance.norms_of(_gradient(user.site)) / self.accelerator.num_processes)
            seen.append(_seen(user, answer))
        if learner:
            weights = [learner.weigh(n, c.layout[0], step) for n, c in zip(norms, parts, strict=True)]
            every_norm, every_weight, valid, segments = self._everyones(parts, norms, weights)
            learner.remember(every_norm, valid)
            self._freeze(learner, every_weight, valid, segments, step)
        metrics |= self._update(step)
        self.step += 1
        return {"step": step, **metrics, **self._speed(seen, begin), **guide.diagnosis}

    def _chunks(self, step: int) -> list[Chunk]:
        """This process's rows of batch ``step``, in micro-batches."""
        rows = self.pairs.rows(step)

        def lengths(own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return self.pairs.users.lengths_of(rows[own]), self.pairs.answers.lengths_of(rows[own])

        def load(users: np.ndarray, answers: np.ndarray) -> PairBatch:
            pairs = self.pairs.batch(rows, self.encoder.ids[PAD_TOKEN], users, answers)
            return pairs.to(self.accelerator.device)

        return chunks(self.shares.own, self.params.training.micro_batch, lengths, load)

    def _in_order(self, parts: list[Chunk], towers: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Both towers' embeddings Float[b, d] from the order of the micro-batches to that of the pairs."""
        users, answers = (np.concatenate([getattr(c, name) for c in parts]) for name in ("users", "answers"))
        return towers[0][np.argsort(users)], towers[1][np.argsort(answers)]

    def _objective(
        self, user: Tensor, answer: Tensor, step: int
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Gradients Float[b, d] of the global batch's loss in this process's embeddings, and its metrics.

        Every process computes all B rows (a B x B product is cheap), so the gradient of other rows' terms
        with respect to ours needs no communication. With micro-batches the rows are taken as many at a time.
        """
        objective, rows = self.params.objective, self.pairs.rows(step)
        users, answers = (self.shares.gather(own).requires_grad_() for own in (user, answer))  # Float[B, d]
        user_ids, answer_ids = (ids.to(users.device) for ids in self.pairs.identities(rows))
        seen = (users, answers)
        total, counted = 0.0, np.zeros(4)
        for part in split(slice(0, len(rows)), self.params.training.micro_batch):
            if objective.centre:  # once a part: its backward pass takes the graph with it
                seen = (centred(users), centred(answers))
            losses, negatives = info_nce_rows(
                *seen,
                temperature=objective.temperature,
                margin=objective.margin if step >= objective.margin_from else None,
                same_side=objective.same_side,
                answer_ids=answer_ids,
                user_ids=user_ids,
                rows=part,
            )
            loss = losses.sum() / len(rows)
            loss.backward()
            total += float(loss.detach())
            counted += np.array(dataclasses.astuple(negatives)) * len(losses) / len(rows)
        self._check_loss(total, len(rows))
        names = ("true_negatives", "masked_user_answer", "masked_user_user", "masked_answer_answer")
        return (_gradient(users)[self.shares.own], _gradient(answers)[self.shares.own]), {
            "loss": total,
            **_similarities(*(side.detach() for side in seen)),
            **dict(zip(names, counted.tolist(), strict=True)),
        }

    def _check_loss(self, loss: float, batch: int) -> None:
        """Raise ``Diverged`` for a loss that no training on its way down has.

        Cosines bound it by 2 / tau + log(3B), so a loss above that is none. Half of the way, 1 / tau +
        log(3B), means that negatives lie nearer than the positives by a cosine of 1: training runs against
        its objective. A pre-trained decoder may begin there (all users in one direction, all answers in
        another), so that this counts once the learning rate has risen. With the margin mask no negative is
        that near, the loss is below margin / tau + log(3B), and only what is no number is caught here.
        """
        training = self.params.training
        share = 1 if self.step >= training.lr_warm_share * training.total_steps else 2
        limit = share / self.params.objective.temperature + math.log(3 * batch)
        if not loss <= limit:
            raise Diverged(
                f"step {self.step}: loss {loss:.4g} is not below {limit:.4g} ({share} / tau + log 3B); "
                "lower training.learning_rate"
            )

    def _update(self, step: int) -> dict[str, Any]:
        """Clip, set the learning rate, step."""
        norm = float(
            self.accelerator.clip_grad_norm_(self.encoder.parameters(), self.params.training.max_grad_norm)
        )
        if not math.isfinite(norm):
            raise Diverged(f"step {step}: gradient norm {norm}; lower training.learning_rate")
        rate = self._learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return {"gradient_norm": norm, "learning_rate": rate}

    def _speed(self, seen: list[tuple[float, ...]], begin: float) -> dict[str, Any]:
        """Mean visibility, and how fast the step was, over all processes."""
        shown, future, tokens, rows = self.shares.total(*np.sum(seen, axis=0))
        seconds, device = time.monotonic() - begin, self.accelerator.device
        config, decoder = self.encoder.decoder.config, self.encoder.decoder
        flops = telemetry.training_flops(decoder, config, int(tokens), tokens / rows)
        kind = torch.bfloat16 if self.params.training.precision == "bf16" else torch.float32
        peak = telemetry.matmul_flops(device, kind) * self.accelerator.num_processes
        return {
            "visibility": shown / max(future, 1.0),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": round(flops / seconds / peak, 4),
            "peak_memory_mib": telemetry.peak_memory_mib(device),
        }

    def _beside(self, chunk: Chunk, step: int) -> Tensor | float:
        """A further loss of a micro-batch, for a trainer that adds one; it isn't part of the logged loss."""
        return 0.0

    def _of(self, chunk: Chunk, gradients: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The rows Float[m, d] of ``chunk`` in this process's Float[b, d]."""
        first = self.shares.own.start
        return gradients[0][chunk.users - first], gradients[1][chunk.answers - first]

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are summed over processes once a step, after the last micro-batch."""
        return nullcontext() if last else self.accelerator.no_sync(self.towers)

    def _learning_rate(self, step: int) -> float:
        training = self.params.training
        warm = training.lr_warm_share * training.total_steps
        if step < warm:
            return training.learning_rate * (step + 1) / (warm + 1)
        share = (step - warm) / max(training.total_steps - warm, 1)
        return training.learning_rate * (1 + math.cos(math.pi * share)) / 2

    # ------------------------------------------------------------------ guidance

    def _guide(self, parts: list[Chunk], step: int) -> Guide:
        """Guidance weights of this batch, for recipes that use them, and what they look like."""
        recipe = self.encoder.recipe
        if not isinstance(recipe, recipes.Guided):
            return Guide([None] * len(parts), None, {})
        if probed := recipe.wants_probe(step):
            norms = self._probe(parts, step)
            own = [recipe.weigh(n, c.layout[0], step) for n, c in zip(norms, parts, strict=True)]
        else:
            own = [recipe.recall(*chunk.layout, step) for chunk in parts]
            norms = own
        every_norm, weights, valid, segments = self._everyones(parts, norms, own)
        if probed:
            self._freeze(recipe, weights, valid, segments, step)
        seen = guidance.diagnose(every_norm, weights, valid)
        by_position = guidance.by_position(weights, valid, int(valid.sum(1).max()))
        return Guide(
            [*own],
            weights[valid].mean(),
            {
                "guidance_mean": seen.mean,
                "guidance_spread": seen.spread,
                "guidance_silent": seen.silent_share if probed else None,
                "weights_by_position": _rounded(by_position),
                "weights_by_segment": _rounded(guidance.by_segment(weights, valid, segments, len(SEGMENTS))),
            },
        )

    def _everyones(self, parts: list[Chunk], *own: list[Tensor]) -> tuple[Tensor, ...]:
        """[B, L] each: ``own`` of this process's micro-batches, then ``valid`` and ``segments``."""
        layout = zip(*(chunk.layout for chunk in parts), strict=True)
        return tuple(self.shares.gather(joined(list(rows))) for rows in (*own, *layout))

    def _freeze(
        self, recipe: recipes.Guided, weights: Tensor, valid: Tensor, segments: Tensor, step: int
    ) -> None:
        """At t = T_warm - 1 keep the weights Float[B, L] of L_warm."""
        if step != recipe.options.warm_steps - 1:
            return
        recipe.freeze(weights, valid, segments)
        if recipe.options.freeze == "tower":
            self.frozen_tower = self._snapshot()

    def _probe(self, parts: list[Chunk], step: int) -> list[Tensor]:
        """Gradient norms Float[., L] of a pass under the causal mask, as ``estimator`` asks.

        In warm-up the encoder itself is probed; after it, with ``freeze: tower``, the frozen snapshot. In
        micro-batches the guidance gradient is that of the second pass: the surrogate makes it the loss's own.
        What the probe drops, the training pass drops.
        """
        # Past DDP, which would await a backward pass; through FSDP2, which alone can gather its weights.
        sharded = self.accelerator.is_fsdp2
        towers = self.towers if sharded else Towers(self.frozen_tower or self.encoder, self.params.seed)
        options = self.encoder.recipe.options
        if options.source == "attention":
            with torch.no_grad(), self.accelerator.autocast():
                return [towers.attention(chunk.pairs, step) for chunk in parts]

        def encode(chunk: Chunk) -> tuple[Output, Output]:
            # The training pass runs in autocast by itself: accelerate wraps it. This one goes past it.
            with self.accelerator.autocast():
                return towers(chunk.pairs, step, None, None, options.grad_site, True)

        passes = gradcache.TwoPasses(encode, parts)
        gradients, _ = self._objective(*self._in_order(parts, passes.first()), step)

        def norms_of(chunk: Chunk) -> Tensor:
            # A function of its own: the graph that it leaves behind goes before the next micro-batch comes.
            outputs = passes.second(chunk)
            loss = gradcache.surrogate(outputs, self._of(chunk, gradients))
            assert outputs[0].site is not None
            return guidance.gradient_norms(loss, outputs[0].site)

        return [norms_of(chunk) for chunk in parts]

    def _snapshot(self) -> UserEncoder:
        """A frozen copy of the encoder at the end of warm-up."""
        return copy.deepcopy(self.encoder).eval()

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, Tensor]:
        """All that a resume needs, as tensors. No random state: a draw is a function of (seed, step, row).

        The controls that draw (``ablation``) are no such function; a profile whose checkpoints would lie
        within their warm-up is refused.

        Under FSDP2 the processes gather it, so all must ask.
        """
        state = {f"encoder.{k}": v for k, v in self.encoder.trained_state().items()}
        state |= {f"optimizer.{k}": v for k, v in checkpoints.optimizer_tensors(self.optimizer).items()}
        if self.frozen_tower is not None:
            state |= {f"frozen_tower.{k}": v for k, v in self.frozen_tower.trained_state().items()}
        return state | {"step": torch.tensor(self.step)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.encoder.load_trained_state(part("encoder."))
        checkpoints.load_optimizer_tensors(self.optimizer, part("optimizer."))
        if frozen := part("frozen_tower."):
            self.frozen_tower = self._snapshot()
            self.frozen_tower.load_trained_state(frozen)
        self.step = int(state["step"])

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to be this run's."""
        encoder, config = self.encoder, self.encoder.decoder.config
        names = sorted(encoder.tokenizer.get_vocab().items())
        return {
            "recipe": encoder.recipe.name,
            "options": encoder.recipe.options.model_dump(mode="json"),
            "seed": self.params.seed,
            "vocabulary": hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12],
            "shape": [config.num_hidden_layers, config.hidden_size, config.vocab_size, encoder.features],
            "lora": encoder.lora.model_dump() if encoder.lora is not None else None,
        }

    def keep_batch(self, folder: Path, reason: str) -> None:
        """Write this process's rows of the batch of the present step, and which samples they are."""
        rows, own = self.pairs.rows(self.step), np.arange(self.shares.own.start, self.shares.own.stop)
        pairs = self.pairs.batch(rows, self.encoder.ids[PAD_TOKEN], own)
        samples = self.pairs.samples(rows[own])
        told = {"step": self.step, "reason": reason, "rows": own.tolist(), "samples": samples}
        telemetry.save_batch(folder, {"user": pairs.user, "answer": pairs.answer}, told)


def _gradient(tensor: Tensor | None) -> Tensor:
    assert tensor is not None and tensor.grad is not None
    return tensor.grad


def _similarities(user: Tensor, answer: Tensor) -> dict[str, float]:
    """Mean cosine of the positives, and of all other pairs of a user and an answer."""
    positive, batch = float((user * answer).sum()), len(user)
    every = float(user.sum(0) @ answer.sum(0))
    return {"positive": positive / batch, "negative": (every - positive) / max(batch * (batch - 1), 1)}


def _seen(user: Output, answer: Output) -> tuple[float, float, float, int]:
    """Of one micro-batch: visibility summed over future pairs, their number, tokens, sequences."""
    count = user.valid.sum(1)
    future = float((count * (count - 1) // 2).sum())
    shown = masks.mean_visibility(user.visibility, user.valid) * future
    return shown, future, float(user.valid.sum() + answer.valid.sum()), 2 * len(count)


def _rounded(values: Tensor) -> list[float]:
    return [round(float(v), 5) for v in values]


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``contrast``: train under ``params.recipe`` and save the encoder.

    ``out`` may hold the checkpoints of an interrupted run; training goes on from the last whole one. Over
    several machines it lies in a folder that all of them see.

    Raises:
        Diverged: with the batch kept in ``out/diverged``.
        checkpoints.CheckpointError: a checkpoint of another run, or no room for one.
        TrainingError: a process that is gone, hangs or sees another folder; more processes than pairs.
    """
    training = params.training
    pairs = Pairs(inputs["tokens"], inputs["texts"], training.batch_size, params.seed, training.qa_share)
    trainer = Trainer(build_encoder(params, inputs), pairs, params)
    main, rank = trainer.accelerator.is_main_process, trainer.accelerator.process_index
    store = checkpoints.Store(out / "checkpoints", training.keep_checkpoints, trainer.identity())
    resumed = store.latest()
    if resumed is not None:
        trainer.load_state(resumed)
        progress(trainer.step, training.total_steps, f"resumed at step {trainer.step}")
    with answered(training.timeout_seconds):
        trainer.shares.agree(trainer.step, "checkpoints: step to resume at")
    log = telemetry.Log(out, trainer.step) if main else None
    with telemetry.tracing(rank) as advance:
        while trainer.step < training.total_steps:
            try:
                metrics = trainer.train_step()
            except Diverged as problem:
                folder = out / "diverged" / f"rank-{rank}"
                trainer.keep_batch(folder, str(problem))
                raise Diverged(f"{problem}; its batch is kept in {folder}") from problem
            advance()
            if log is not None:
                log.write(metrics)
                progress(trainer.step, training.total_steps, f"loss {metrics['loss']:.3f}")
            if trainer.step % training.checkpoint_every == 0 and trainer.step < training.total_steps:
                state = trainer.state()
                if main:
                    store.save(trainer.step, state)
    state = trainer.encoder.trained_state()
    if log is not None:
        log.close()
        trainer.encoder.save(out, state)


if __name__ == "__main__":
    import sys

    from ggsm_core.worker import command_line

    sys.exit(command_line("contrast"))

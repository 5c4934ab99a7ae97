"""The sections of a profile: every number that a stage depends on, with its meaning, unit and bounds.

A stage is given the sections that it names and no others (``ggsm_core.stages``), so a change in one of them
makes the runs anew that depend on it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ggsm_core import provenance
from ggsm_core.template import KEPT

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Section(BaseModel):
    """One block of a profile: unknown keys are errors, values never coerced between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def field(default: Any, description: str, unit: str = "", **bounds: Any) -> Any:
    """A field with its meaning, unit and bounds."""
    return Field(default, description=description, json_schema_extra={"unit": unit}, **bounds)


AnswerMask = Literal["same", "causal", "bidirectional"]


class Data(Section):
    """Which events, windows and samples."""

    households: int | None = field(
        None, "use only this many households, drawn with seed 0; null for all", "households", ge=40
    )
    history_days: int = field(90, "length of the history window [a - history, a)", "days", ge=1)
    breakdowns: bool = field(
        False, "tabular also holds purchases by group (department) and visits by part of the week"
    )
    future_days: int = field(30, "length of the future window [a, a + future)", "days", ge=1)
    train_anchors: list[int] = field(
        [90, 120, 150, 180, 210], "anchor days of pre-training and training pairs", "days since 2017-01-01"
    )
    probe_anchors: list[int] = field(
        [240, 270, 300, 330], "anchor days of the linear probes", "days since 2017-01-01"
    )
    protocol: Literal["temporal", "new_users"] = field(
        "temporal", "new_users also removes the probed households from all training"
    )
    search: Literal["empty", "simulated"] = field("empty", "the modality this data lacks")

    @model_validator(mode="after")
    def _no_leak(self) -> Data:
        if not self.train_anchors or not self.probe_anchors:
            raise ValueError("train_anchors and probe_anchors need at least one day each")
        for name, days in (("train_anchors", self.train_anchors), ("probe_anchors", self.probe_anchors)):
            if len(set(days)) < len(days):
                raise ValueError(f"{name}: {days} names a day twice")
        if max(self.train_anchors) + self.future_days > min(self.probe_anchors):
            raise ValueError(
                f"train_anchors: the future window of anchor {max(self.train_anchors)} ends on day "
                f"{max(self.train_anchors) + self.future_days}, after the first probe anchor "
                f"{min(self.probe_anchors)}; the last train anchor may be at most "
                f"{min(self.probe_anchors) - self.future_days}"
            )
        return self


class Template(Section):
    """How a user becomes a sequence (Fig. 4, Eq. 9-10)."""

    modality_input: Literal["adapter", "text"] = field(
        "adapter", "each record as one soft token (Fig. 1), or as plain tokens (Fig. 4)"
    )
    bill: int = field(24, "records kept", "records", ge=0, le=KEPT)
    minipro: int = field(4, "records kept", "records", ge=0, le=KEPT)
    spm: int = field(6, "records kept", "records", ge=0, le=KEPT)
    app: int = field(6, "records kept", "records", ge=0, le=KEPT)
    search: int = field(4, "records kept", "records", ge=0, le=KEPT)
    tabular: int = field(10, "records kept", "records", ge=0, le=KEPT)
    query: str | None = field(
        None, "asked about every user who is embedded; training pairs bring their own; null for none"
    )
    max_user_tokens: int = field(96, "user & query, at most", "tokens", ge=16)
    max_answer_tokens: int = field(32, "answer with <EOS>, at most", "tokens", ge=4)

    @model_validator(mode="after")
    def _one_decoder(self) -> Template:
        counts = (self.bill, self.minipro, self.spm, self.app, self.search, self.tabular)
        if not any(counts):
            raise ValueError(
                "bill, minipro, spm, app, search, tabular: all 0; a user needs records to be read"
            )
        if self.max_answer_tokens > self.max_user_tokens:
            raise ValueError(
                f"max_answer_tokens: {self.max_answer_tokens} is above max_user_tokens = "
                f"{self.max_user_tokens}, for which the recipe is built; both towers are one decoder"
            )
        return self


class Pairs(Section):
    """Rule-based behaviour pairs (Sec. 3.1)."""

    granularities: list[Literal["categories", "visits", "weeks", "offers", "whole"]] = field(
        ["categories", "visits", "weeks", "offers"],
        "how the future window is aggregated into an answer",
        min_length=1,
    )
    facts: int = field(6, "facts sampled into one sentence", "facts", ge=1)
    seed: int = field(0, "of the sampling", ge=0)


class Synthesis(Section):
    """Query-answer pairs that a language model writes (Sec. 3.2)."""

    server: Literal["local", "environment"] = field(
        "local", "SmolLM2-135M served on this machine, or what OPENAI_BASE_URL and OPENAI_API_KEY name"
    )
    model: str | None = field(None, "the model's name there, for server: environment")
    records: int = field(6, "records of each modality that the model is shown", "records", ge=1, le=KEPT)
    new_scenarios: int = field(300, "scenarios that the model adds to the pool", "scenarios", ge=0)
    duplicate: float = field(0.8, "cosine from which two scenarios are one", gt=0.0, le=1.0)
    shortlist: int = field(30, "nearest scenarios that the model puts in order", "scenarios", ge=1)
    retrieved: int = field(10, "scenarios of a user (Eq. 1)", "scenarios", ge=1)
    pairs_per_user: int = field(5, "pairs asked for a user, each on another scenario", "pairs", ge=1)
    calibration: int = field(1000, "N, the pairs of the calibration set D_c", "pairs", ge=1)
    threshold: float | None = field(None, "T_filter as a value of S_d", ge=0.0, le=2.0)
    quantile: float | None = field(0.7, "T_filter as a quantile of S_d over D_c", ge=0.0, le=1.0)
    rules: int = field(5, "rules induced from the hard pairs, at most", "rules", ge=0)
    scaled: int = field(10000, "pairs asked for under the rules", "pairs", ge=1)
    temperature: float = field(0.7, "of the sampling", ge=0.0)
    top_p: float = field(1.0, "of the sampling", gt=0.0, le=1.0)
    max_tokens: int = field(256, "an answer's length, at most", "tokens", ge=8)
    attempts: int = field(2, "at an answer that follows the schema", "answers", ge=1)
    retries: int = field(5, "after a failure of the network or the server", ge=0)
    timeout: float = field(120.0, "for one answer", "seconds", gt=0.0)
    concurrency: int = field(4, "questions under way at once", "questions", ge=1)
    budget_tokens: int | None = field(None, "prompts and answers together; null for no limit", "tokens", ge=1)
    budget_dollars: float | None = field(None, "null for no limit", "dollars", gt=0.0)
    prompt_price: float = field(0.0, "of prompts", "dollars per million tokens", ge=0.0)
    completion_price: float = field(0.0, "of answers", "dollars per million tokens", ge=0.0)
    seed: int = field(0, "of draws and of the model's sampling", ge=0)

    @model_validator(mode="after")
    def _possible(self) -> Synthesis:
        if (self.server == "environment") != (self.model is not None):
            raise ValueError(
                f"model: {self.model!r} goes with server: environment, and server is {self.server!r}"
            )
        if (self.threshold is None) == (self.quantile is None):
            raise ValueError("threshold, quantile: T_filter is one of the two; set the other to null")
        if self.budget_dollars is not None and not self.prompt_price + self.completion_price:
            raise ValueError(
                f"budget_dollars: {self.budget_dollars:g} would never be reached, for prompt_price and "
                "completion_price are 0; give the server's prices"
            )
        if self.pairs_per_user > self.retrieved or self.retrieved > self.shortlist:
            raise ValueError(
                f"pairs_per_user, retrieved, shortlist: {self.pairs_per_user}, {self.retrieved}, "
                f"{self.shortlist} must not fall"
            )
        return self


class Backbone(Section):
    """The decoder."""

    kind: Literal["scratch", "smollm2", "pretrained"] = field(
        "scratch", "a small Qwen2 trained here, SmolLM2-135M from its package, or a folder or hub name"
    )
    path: str | None = field(None, "folder or hub name, for kind: pretrained")
    layers: int = field(4, "decoder blocks, for kind: scratch", "blocks", ge=1)
    hidden: int = field(128, "hidden size d, for kind: scratch", ge=8)
    heads: int = field(4, "attention heads, for kind: scratch", "heads", ge=1)
    intermediate: int = field(384, "width of the MLP, for kind: scratch", ge=8)
    vocab: int = field(4096, "BPE vocabulary, for kind: scratch", "tokens", ge=512)
    attention: Literal["sdpa", "eager"] = field("sdpa", "attention backend")
    dropout: float = field(0.0, "attention dropout, for kind: scratch", ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _shape(self) -> Backbone:
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden: {self.hidden} is not a multiple of 2 x heads = {2 * self.heads} (rotary pairs)"
            )
        if (self.kind == "pretrained") != (self.path is not None):
            raise ValueError(f"path: {self.path!r} goes with kind: pretrained, and kind is {self.kind!r}")
        return self

    @property
    def source(self) -> str | None:
        """``path`` for a library: a folder (a relative one lies below the project's root) or a hub's name."""
        folder = provenance.ROOT / self.path if self.path is not None else None
        return str(folder) if folder is not None and folder.is_dir() else self.path


class Lora(Section):
    """Low-rank adaptation of the decoder."""

    rank: int = field(64, "rank r", ge=1)
    alpha: int = field(64, "scaling numerator", ge=1)
    dropout: float = field(0.0, "on the low-rank branch", ge=0.0, lt=1.0)
    targets: list[str] = field(list(LORA_TARGETS), f"linear layers, of {', '.join(LORA_TARGETS)}")

    @model_validator(mode="after")
    def _known(self) -> Lora:
        unknown = sorted(set(self.targets) - set(LORA_TARGETS))
        if unknown or not self.targets:
            raise ValueError(
                f"targets: {unknown or '[]'} not in the decoder; allowed: {', '.join(LORA_TARGETS)}"
            )
        return self


class Pretraining(Section):
    """The causal language model that contrastive training starts from (kind: scratch)."""

    steps: int = field(100, "optimizer steps", "steps", ge=1)
    batch_size: int = field(16, "sequences a step", "sequences", ge=1)
    sequence_tokens: int = field(256, "history and answer together, at most", "tokens", ge=16)
    adapter_steps: int = field(
        100,
        "further steps, on soft tokens: the adapters learn to be read",
        "steps",
        ge=1,
    )
    adapter_batch_size: int = field(64, "sequences of such a step", "sequences", ge=1)
    learning_rate: float = field(2e-3, "peak of either part, one-cycle cosine", gt=0.0)
    seed: int = field(0, "of weights and batches", ge=0)


class Objective(Section):
    """InfoNCE (Eq. 6-8)."""

    temperature: float = field(0.05, "tau", gt=0.0)
    margin: float | None = field(0.1, "c_margin of Eq. 8; null switches the margin mask off", ge=0.0)
    margin_from: int = field(0, "step from which the margin mask acts", "steps", ge=0)
    same_side: bool = field(True, "user-user and answer-answer negatives of Eq. 7")
    centre: bool = field(
        False,
        "our extension: cosines of directions from each side's mean, so that not all can move to one point",
    )


class Training(Section):
    """The contrastive loop."""

    total_steps: int = field(60, "T_total", "steps", ge=1)
    batch_size: int = field(192, "global batch B, over all processes", "pairs", ge=2)
    micro_batch: int | None = field(
        None,
        "encode so many pairs at a time (GradCache), for a batch larger than memory; null: all",
        "pairs",
        ge=1,
    )
    learning_rate: float = field(1e-3, "peak, cosine decay to 0", gt=0.0)
    lr_warm_share: float = field(0.1, "share of steps with linearly rising learning rate", ge=0.0, lt=1.0)
    weight_decay: float = field(0.01, "AdamW", ge=0.0)
    adam_beta2: float = field(
        0.95,
        "AdamW's second-moment decay; the large first gradients are forgotten in 20 steps",
        gt=0.0,
        lt=1.0,
    )
    max_grad_norm: float = field(1.0, "gradient clipping", gt=0.0)
    checkpoint_every: int = field(20, "steps between checkpoints", "steps", ge=1)
    keep_checkpoints: int = field(2, "the last K are kept", "checkpoints", ge=1)
    timeout_seconds: int = field(600, "an unanswered process ends the run after", "seconds", ge=1)
    precision: Literal["fp32", "bf16"] = field("fp32", "autocast precision")
    answer_mask: AnswerMask = field(
        "same",
        "mask of the answer tower; same: the recipe's own (guided: at the mean of the left tower's weights)",
    )
    qa_share: float = field(
        0.0, "share of steps whose batch comes from D_qa, the rest from D_behavior", ge=0.0, lt=1.0
    )


class Guidance(Section):
    """Gradient guidance (Eq. 5, 15), read by ggsm and hybrid_mask."""

    warm_steps: int = field(6, "T_warm", "steps", ge=0)
    grad_site: Annotated[str, Field(pattern=r"^(embeddings|final|layer:\d+)$")] = field(
        "embeddings", "which hidden state is h_j: embeddings, layer:<k>, final"
    )
    normalise: Literal["none", "zscore", "rank"] = field("none", "of the norms before the sigmoid")
    estimator: Literal["two_pass", "previous_step"] = field("two_pass", "where the gradient comes from")
    freeze: Literal["position", "tower", "segment"] = field("position", "what is frozen after warm-up")
    ramp: bool = field(False, "our extension: weights times beta_t = (t + 1) / T_warm in warm-up")
    source: Literal["gradient", "constant", "random", "shuffled", "position", "attention"] = field(
        "gradient", "what the weights are made from; all but gradient are controls, see ggsm_core.ablation"
    )

    def probes(self, step: int) -> bool:
        """Does step t need a probe pass: in warm-up (two_pass), or after it by the frozen tower?"""
        if step < self.warm_steps:
            return self.estimator == "two_pass"
        return self.freeze == "tower" and self.warm_steps > 0

    @model_validator(mode="after")
    def _measured(self) -> Guidance:
        if self.source == "attention" and self.estimator != "two_pass":
            raise ValueError(
                f"source: attention is measured by a probe pass; estimator is {self.estimator!r}"
            )
        return self


class NoParameters(Section):
    """A recipe without parameters of its own."""


class Scheduler(Section):
    """Scheduler (A.4, bidirectional b)."""

    schedule: Literal["soft_linear", "span_linear", "span_cosine"] = field(
        "soft_linear", "a growing weight, or a growing span"
    )


class HybridMlp(Section):
    """Hybrid (b): an MLP opens the mask."""

    width: int = field(32, "hidden units of the MLP", ge=1)


class Peers(Section):
    """The other trained systems of Table 2: one size, one budget and one rule to stop for all of them."""

    hidden: int = field(64, "width, and size of the embedding", ge=8)
    layers: int = field(2, "transformer blocks of one4all, msdp and found", "blocks", ge=1)
    heads: int = field(4, "attention heads", "heads", ge=1)
    visits: int = field(64, "steps of a sequence, the last ones", "visits", ge=4)
    vocabulary: int = field(512, "kinds of event with a code of their own", "kinds", ge=16)
    epochs: int = field(12, "at most", "epochs", ge=1)
    patience: int = field(2, "epochs without a lower validation loss before training stops", "epochs", ge=1)
    held_out: float = field(0.1, "share of the training households that training stops by", gt=0.0, le=0.5)
    batch_size: int = field(128, "samples a step", "samples", ge=8)
    learning_rate: float = field(1e-3, "AdamW, constant", gt=0.0)

    @model_validator(mode="after")
    def _heads(self) -> Peers:
        if self.hidden % self.heads:
            raise ValueError(f"hidden: {self.hidden} is not a multiple of heads = {self.heads}")
        return self


class TextModels(Section):
    """General text embeddings of Table 2: frozen, from a folder or a hub; MiniLM lies in its package."""

    max_tokens: int = field(512, "a user's text, at most", "tokens", ge=16)
    qwen3_embedding: str = field("Qwen/Qwen3-Embedding-0.6B", "folder or hub name")
    kalm: str = field("tencent/KaLM-Embedding-Gemma3-12B-2511", "folder or hub name")
    nemotron: str = field("nvidia/llama-embed-nemotron-8b", "folder or hub name")


class Evaluation(Section):
    """Linear probe and uncertainty."""

    folds: int = field(5, "folds, grouped by household", "folds", ge=3)
    seed: int = field(0, "of folds and bootstrap", ge=0)
    bootstrap: int = field(1000, "household resamples", "resamples", ge=100, le=100_000)

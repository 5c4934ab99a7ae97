"""Typed profiles: every number a run depends on, with its meaning, unit and bounds.

A profile is a YAML file in ``params/``. It may name another file in ``extends`` and then states only what
differs. ``load`` merges, checks and returns it, or raises ``ProfileError`` that names the field, the value
and what is allowed. ``python -m ggsm_core.params params/quick.yaml`` prints the merged profile.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

RECIPE_NAMES = (
    "causal",
    "hybrid_segment",
    "hybrid_mask",
    "hybrid_mlp",
    "hybrid_gq",
    "bidirectional",
    "scheduler",
    "ggsm",
)
FEATURE_BASELINES = ("rfm", "handmade")
SEQUENCE_BASELINES = ("cpc", "coles", "msdp", "one4all")
LANGUAGE_BASELINES = ("found", "instructue")
TEXT_BASELINES = ("minilm", "qwen3_embedding", "kalm", "nemotron")
JOINED = "handmade+"
"""Prefix of a row that has the hand-made features beside another row's embedding: ``handmade+ggsm``."""
BASELINE_NAMES = (
    *FEATURE_BASELINES,
    "oracle",
    *SEQUENCE_BASELINES,
    *LANGUAGE_BASELINES,
    *TEXT_BASELINES,
    *(JOINED + row for row in (*RECIPE_NAMES, *SEQUENCE_BASELINES, *LANGUAGE_BASELINES)),
)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ProfileError(ValueError):
    """A profile that can't be honoured. The message names field, value and mend."""


class Section(BaseModel):
    """One block of a profile: unknown keys are errors, values never coerced between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _field(default: Any, description: str, unit: str = "", **bounds: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"unit": unit}, **bounds)


class Data(Section):
    """Which events, windows and samples."""

    source: Literal["complete_journey"] = _field("complete_journey", "the event log")
    households: int | None = _field(
        None, "use only this many households, drawn with seed 0; null for all", "households", ge=40
    )
    history_days: int = _field(90, "length of the history window [a - history, a)", "days", ge=1)
    future_days: int = _field(30, "length of the future window [a, a + future)", "days", ge=1)
    train_anchors: list[int] = _field(
        [90, 120, 150, 180, 210], "anchor days of pre-training and training pairs", "days since 2017-01-01"
    )
    probe_anchors: list[int] = _field(
        [240, 270, 300, 330], "anchor days of the linear probes", "days since 2017-01-01"
    )
    protocol: Literal["temporal", "new_users"] = _field(
        "temporal", "new_users also removes the probed households from all training"
    )
    search: Literal["empty", "simulated"] = _field("empty", "the modality this data lacks")

    @model_validator(mode="after")
    def _no_leak(self) -> Data:
        if not self.train_anchors or not self.probe_anchors:
            raise ValueError("train_anchors and probe_anchors need at least one day each")
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

    modality_input: Literal["adapter", "text"] = _field(
        "adapter", "each record as one soft token (Fig. 1), or as plain tokens (Fig. 4)"
    )
    bill: int = _field(24, "records kept", "records", ge=0)
    minipro: int = _field(4, "records kept", "records", ge=0)
    spm: int = _field(6, "records kept", "records", ge=0)
    app: int = _field(6, "records kept", "records", ge=0)
    search: int = _field(4, "records kept", "records", ge=0)
    tabular: int = _field(10, "records kept", "records", ge=0)
    max_user_tokens: int = _field(96, "user & query, at most", "tokens", ge=16)
    max_answer_tokens: int = _field(32, "answer with <EOS>, at most", "tokens", ge=4)


class Pairs(Section):
    """Rule-based behaviour pairs (Sec. 3.1)."""

    query: bool = _field(True, "training pairs carry the query of their granularity; false leaves it out")
    granularities: list[Literal["categories", "visits", "weeks", "offers"]] = _field(
        ["categories", "visits", "weeks", "offers"], "how the future window is aggregated into an answer"
    )
    facts: int = _field(6, "facts sampled into one answer", "facts", ge=1)
    seed: int = _field(0, "of the sampling", ge=0)


class Synthesis(Section):
    """Query-answer pairs that a language model writes (Sec. 3.2)."""

    server: Literal["local", "environment"] = _field(
        "local", "SmolLM2-135M served on this machine, or what OPENAI_BASE_URL and OPENAI_API_KEY name"
    )
    model: str | None = _field(None, "the model's name there, for server: environment")
    records: int = _field(6, "records of each modality that the model is shown", "records", ge=1)
    new_scenarios: int = _field(300, "scenarios that the model adds to the pool", "scenarios", ge=0)
    duplicate: float = _field(0.8, "cosine from which two scenarios are one", gt=0.0, le=1.0)
    shortlist: int = _field(30, "nearest scenarios that the model puts in order", "scenarios", ge=1)
    retrieved: int = _field(10, "scenarios of a user (Eq. 1)", "scenarios", ge=1)
    pairs_per_user: int = _field(5, "pairs asked for a user, each on another scenario", "pairs", ge=1)
    calibration: int = _field(1000, "N, the pairs of the calibration set D_c", "pairs", ge=1)
    threshold: float | None = _field(None, "T_filter as a value of S_d", ge=0.0, le=2.0)
    quantile: float | None = _field(0.7, "T_filter as a quantile of S_d over D_c", ge=0.0, le=1.0)
    rules: int = _field(5, "rules induced from the hard pairs, at most", "rules", ge=0)
    scaled: int = _field(10000, "pairs asked for under the rules", "pairs", ge=1)
    temperature: float = _field(0.7, "of the sampling", ge=0.0)
    top_p: float = _field(1.0, "of the sampling", gt=0.0, le=1.0)
    max_tokens: int = _field(256, "an answer's length, at most", "tokens", ge=8)
    attempts: int = _field(2, "at an answer that follows the schema", "answers", ge=1)
    retries: int = _field(5, "after a failure of the network or the server", ge=0)
    timeout: float = _field(120.0, "for one answer", "seconds", gt=0.0)
    concurrency: int = _field(4, "questions under way at once", "questions", ge=1)
    budget_tokens: int | None = _field(
        None, "prompts and answers together; null for no limit", "tokens", ge=1
    )
    budget_dollars: float | None = _field(None, "null for no limit", "dollars", gt=0.0)
    prompt_price: float = _field(0.0, "of prompts", "dollars per million tokens", ge=0.0)
    completion_price: float = _field(0.0, "of answers", "dollars per million tokens", ge=0.0)
    seed: int = _field(0, "of draws and of the model's sampling", ge=0)

    @model_validator(mode="after")
    def _possible(self) -> Synthesis:
        if (self.server == "environment") != (self.model is not None):
            raise ValueError(
                f"model: {self.model!r} goes with server: environment, and server is {self.server!r}"
            )
        if (self.threshold is None) == (self.quantile is None):
            raise ValueError("threshold, quantile: T_filter is one of the two; set the other to null")
        if self.pairs_per_user > self.retrieved or self.retrieved > self.shortlist:
            raise ValueError(
                f"pairs_per_user, retrieved, shortlist: {self.pairs_per_user}, {self.retrieved}, "
                f"{self.shortlist} must not fall"
            )
        return self


class Backbone(Section):
    """The decoder."""

    kind: Literal["scratch", "smollm2", "pretrained"] = _field(
        "scratch", "a small Qwen2 trained here, SmolLM2-135M from its package, or a folder or hub name"
    )
    path: str | None = _field(None, "folder or hub name, for kind: pretrained")
    layers: int = _field(4, "decoder blocks, for kind: scratch", "blocks", ge=1)
    hidden: int = _field(128, "hidden size d, for kind: scratch", ge=8)
    heads: int = _field(4, "attention heads, for kind: scratch", "heads", ge=1)
    intermediate: int = _field(384, "width of the MLP, for kind: scratch", ge=8)
    vocab: int = _field(4096, "BPE vocabulary, for kind: scratch", "tokens", ge=512)
    attention: Literal["sdpa", "eager"] = _field("sdpa", "attention backend")
    dropout: float = _field(0.0, "attention dropout, for kind: scratch", ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _shape(self) -> Backbone:
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden: {self.hidden} is not a multiple of 2 x heads = {2 * self.heads} (rotary pairs)"
            )
        if (self.kind == "pretrained") != (self.path is not None):
            raise ValueError(f"path: {self.path!r} goes with kind: pretrained, and kind is {self.kind!r}")
        return self


class Lora(Section):
    """Low-rank adaptation of the decoder."""

    rank: int = _field(64, "rank r", ge=1)
    alpha: int = _field(64, "scaling numerator", ge=1)
    dropout: float = _field(0.0, "on the low-rank branch", ge=0.0, lt=1.0)
    targets: list[str] = _field(list(LORA_TARGETS), f"linear layers, of {', '.join(LORA_TARGETS)}")

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

    steps: int = _field(100, "optimizer steps", "steps", ge=1)
    batch_size: int = _field(16, "sequences a step", "sequences", ge=1)
    sequence_tokens: int = _field(256, "tokens of a packed sequence", "tokens", ge=16)
    learning_rate: float = _field(2e-3, "peak, one-cycle cosine", gt=0.0)
    seed: int = _field(0, "of weights and batches", ge=0)


class Objective(Section):
    """InfoNCE (Eq. 6-8)."""

    temperature: float = _field(0.05, "tau", gt=0.0)
    margin: float | None = _field(0.1, "c_margin of Eq. 8; null switches the margin mask off", ge=0.0)
    margin_from: int = _field(0, "step from which the margin mask acts", "steps", ge=0)
    same_side: bool = _field(True, "user-user and answer-answer negatives of Eq. 7")


class Training(Section):
    """The contrastive loop."""

    total_steps: int = _field(60, "T_total", "steps", ge=1)
    batch_size: int = _field(192, "global batch B, over all processes", "pairs", ge=2)
    micro_batch: int | None = _field(
        None,
        "encode so many pairs at a time (GradCache), for a batch larger than memory; null: all",
        "pairs",
        ge=1,
    )
    learning_rate: float = _field(1e-3, "peak, cosine decay to 0", gt=0.0)
    lr_warm_share: float = _field(0.1, "share of steps with linearly rising learning rate", ge=0.0, lt=1.0)
    weight_decay: float = _field(0.01, "AdamW", ge=0.0)
    adam_beta2: float = _field(
        0.95,
        "AdamW's second-moment decay; the large first gradients are forgotten in 20 steps",
        gt=0.0,
        lt=1.0,
    )
    max_grad_norm: float = _field(1.0, "gradient clipping", gt=0.0)
    checkpoint_every: int = _field(20, "steps between checkpoints", "steps", ge=1)
    keep_checkpoints: int = _field(2, "the last K are kept", "checkpoints", ge=1)
    timeout_seconds: int = _field(600, "an unanswered process ends the run after", "seconds", ge=1)
    precision: Literal["fp32", "bf16"] = _field("fp32", "autocast precision")
    answer_mask: Literal["same", "causal", "bidirectional"] = _field(
        "same", "mask of the answer tower; same = the scalar mean of the left tower's weights"
    )
    qa_share: float = _field(
        0.0, "share of steps whose batch comes from D_qa, the rest from D_behavior", ge=0.0, lt=1.0
    )


class Guidance(Section):
    """Gradient guidance (Eq. 5, 15), read by ggsm and hybrid_mask."""

    warm_steps: int = _field(6, "T_warm", "steps", ge=0)
    grad_site: Annotated[str, Field(pattern=r"^(embeddings|final|layer:\d+)$")] = _field(
        "embeddings", "which hidden state is h_j: embeddings, layer:<k>, final"
    )
    normalise: Literal["none", "zscore", "rank"] = _field("none", "of the norms before the sigmoid")
    estimator: Literal["two_pass", "previous_step"] = _field("two_pass", "where the gradient comes from")
    freeze: Literal["position", "tower", "segment"] = _field("position", "what is frozen after warm-up")
    ramp: bool = _field(False, "our extension: weights times beta_t, 0 to 1 over warm-up")
    source: Literal["gradient", "constant", "random", "shuffled", "position", "attention"] = _field(
        "gradient", "what the weights are made from; all but gradient are controls, see ggsm_core.ablation"
    )

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
    """Scheduler (A.4 b)."""

    schedule: Literal["soft_linear", "span_linear", "span_cosine"] = _field(
        "soft_linear", "a growing weight, or a growing span"
    )


class HybridMlp(Section):
    """Hybrid (b): an MLP opens the mask."""

    width: int = _field(32, "hidden units of the MLP", ge=1)


class Recipes(Section):
    """The parameters of each recipe. A recipe set to null is not run."""

    causal: NoParameters | None = NoParameters()
    hybrid_segment: NoParameters | None = NoParameters()
    hybrid_mask: Guidance | None = Guidance()
    hybrid_mlp: HybridMlp | None = HybridMlp()
    hybrid_gq: NoParameters | None = NoParameters()
    bidirectional: NoParameters | None = NoParameters()
    scheduler: Scheduler | None = Scheduler()
    ggsm: Guidance | None = Guidance()

    @property
    def active(self) -> list[str]:
        """Names of the recipes that run, in the order of Table 2."""
        return [name for name in RECIPE_NAMES if getattr(self, name) is not None]


class Variant(Section):
    """A recipe once more as a row of its own, with another option or objective and all else equal."""

    recipe: Literal[
        "causal",
        "hybrid_segment",
        "hybrid_mask",
        "hybrid_mlp",
        "hybrid_gq",
        "bidirectional",
        "scheduler",
        "ggsm",
    ]
    options: dict[str, Any] = _field({}, "replace those of the recipe's own section")
    objective: dict[str, Any] = _field({}, "replace those of the profile's objective")


class Tuned(Section):
    """What tuning chose for a row, as multiples of what the profile says for all (``ggsm_core.tuning``)."""

    rate: float = _field(1.0, "times the learning rate", gt=0.0)
    length: float = _field(1.0, "times the steps or epochs, and a recipe's warm-up with them", gt=0.0)


class Peers(Section):
    """The other trained systems of Table 2: one size, one budget and one rule to stop for all of them."""

    hidden: int = _field(64, "width, and size of the embedding", ge=8)
    layers: int = _field(2, "transformer blocks of one4all, msdp and found", "blocks", ge=1)
    heads: int = _field(4, "attention heads", "heads", ge=1)
    visits: int = _field(64, "steps of a sequence, the last ones", "visits", ge=4)
    vocabulary: int = _field(512, "kinds of event with a code of their own", "kinds", ge=16)
    epochs: int = _field(12, "at most", "epochs", ge=1)
    patience: int = _field(2, "epochs without a lower validation loss before training stops", "epochs", ge=1)
    held_out: float = _field(0.1, "share of the training households that training stops by", gt=0.0, le=0.5)
    batch_size: int = _field(128, "samples a step", "samples", ge=8)
    learning_rate: float = _field(1e-3, "AdamW, constant", gt=0.0)

    @model_validator(mode="after")
    def _heads(self) -> Peers:
        if self.hidden % self.heads:
            raise ValueError(f"hidden: {self.hidden} is not a multiple of heads = {self.heads}")
        return self


class TextModels(Section):
    """General text embeddings of Table 2: frozen, from a folder or a hub; MiniLM lies in its package."""

    max_tokens: int = _field(512, "a user's text, at most", "tokens", ge=16)
    qwen3_embedding: str = _field("Qwen/Qwen3-Embedding-0.6B", "folder or hub name")
    kalm: str = _field("tencent/KaLM-Embedding-Gemma3-12B-2511", "folder or hub name")
    nemotron: str = _field("nvidia/llama-embed-nemotron-8b", "folder or hub name")


class Evaluation(Section):
    """Linear probe and uncertainty."""

    folds: int = _field(5, "folds, grouped by household", "folds", ge=3)
    seed: int = _field(0, "of folds and bootstrap", ge=0)
    bootstrap: int = _field(1000, "household resamples", "resamples", ge=100)


class Row(NamedTuple):
    """What one row of the table trains with; ``options`` None for rows that are no recipe."""

    recipe: str
    options: Section | None
    objective: Objective
    training: Training
    peers: Peers


class Profile(Section):
    """Everything a run depends on."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$", description="also the folder of results")]
    data: Data = Data()
    template: Template = Template()
    pairs: Pairs = Pairs()
    synthesis: Synthesis | None = None
    backbone: Backbone = Backbone()
    lora: Lora | None = None
    pretraining: Pretraining | None = Pretraining()
    objective: Objective = Objective()
    training: Training = Training()
    recipes: Recipes = Recipes()
    variants: dict[str, Variant] = _field({}, "more rows: name -> recipe, and what differs")
    tuned: dict[str, Tuned] = _field({}, "row -> its pace; a variant has its recipe's")
    evaluation: Evaluation = Evaluation()
    seeds: list[int] = _field([0], "one training run per recipe and seed")
    baselines: list[str] = _field(
        ["rfm", "handmade", "oracle"],
        f"rows beside the recipes, of {', '.join(name for name in BASELINE_NAMES if JOINED not in name)}, "
        f"{JOINED}<trained row>",
    )
    peers: Peers = Peers()
    text_models: TextModels = TextModels()

    @property
    def trained(self) -> list[str]:
        """Rows of contrastive training: the recipes that run, then the variants."""
        return [*self.recipes.active, *self.variants]

    def row(self, name: str) -> Row:
        """What a trained row trains with: a recipe, a variant or a peer."""
        variant = self.variants.get(name)
        recipe = name if variant is None else variant.recipe
        own: Section | None = getattr(self.recipes, recipe, None)
        objective = self.objective
        if variant is not None:
            default: Section = Recipes.model_fields[recipe].default
            own = _changed(own or default, variant.options)
            objective = _changed(objective, variant.objective)
        pace = self.tuned.get(recipe, Tuned())
        if isinstance(own, Guidance) and pace.length != 1:
            own = own.model_copy(update={"warm_steps": _times(own.warm_steps, pace.length)})
        training = self.training.model_copy(
            update={
                "learning_rate": self.training.learning_rate * pace.rate,
                "total_steps": max(_times(self.training.total_steps, pace.length), 1),
            }
        )
        peers = self.peers.model_copy(
            update={
                "learning_rate": self.peers.learning_rate * pace.rate,
                "epochs": max(_times(self.peers.epochs, pace.length), 1),
            }
        )
        return Row(recipe, own, objective, training, peers)

    @model_validator(mode="after")
    def _possible(self) -> Profile:
        for name in self.trained:
            recipe, guidance, objective, training, _ = self._checked_row(name)
            total = training.total_steps
            where = f"variants.{name}.options" if name in self.variants else f"recipes.{name}"
            if objective.margin_from > 0 and objective.margin is None:
                raise ValueError(f"{name}: objective.margin_from needs objective.margin, which is null")
            if not isinstance(guidance, Guidance):
                continue
            if guidance.warm_steps >= total:
                raise ValueError(
                    f"{where}.warm_steps: {guidance.warm_steps} must be below training.total_steps = {total}"
                )
            if recipe == "hybrid_mask" and guidance.warm_steps < 1:
                raise ValueError(f"{where}.warm_steps: 0 leaves no weights to freeze; at least 1")
            site = re.fullmatch(r"layer:(\d+)", guidance.grad_site)
            if site and self.backbone.kind == "scratch" and int(site[1]) >= self.backbone.layers:
                raise ValueError(
                    f"{where}.grad_site: {site[0]!r}, but the decoder has layers "
                    f"0 to {self.backbone.layers - 1}"
                )
        if unknown := [name for name in self.baselines if name not in BASELINE_NAMES]:
            raise ValueError(f"baselines: {unknown} unknown; allowed: {', '.join(BASELINE_NAMES)}")
        paced = {*RECIPE_NAMES, *SEQUENCE_BASELINES, *LANGUAGE_BASELINES}
        if unknown := sorted(set(self.tuned) - paced):
            raise ValueError(f"tuned: {unknown} are not trained; allowed: {', '.join(sorted(paced))}")
        trained = {*self.trained, *self.baselines}
        for name in self.baselines:
            if (row := name.removeprefix(JOINED)) not in trained:
                raise ValueError(f"baselines: {name!r} needs the row {row!r}, which this profile leaves out")
        if self.training.qa_share > 0 and self.synthesis is None:
            raise ValueError("training.qa_share: needs the pairs of synthesis, which is null")
        if (self.backbone.kind == "scratch") != (self.pretraining is not None):
            raise ValueError(
                f"pretraining: goes with backbone.kind: scratch, and kind is {self.backbone.kind!r}; "
                "set pretraining to null for a pretrained decoder"
            )
        return self

    def _checked_row(self, name: str) -> Row:
        if name in self.variants and (
            name in RECIPE_NAMES or name in BASELINE_NAMES or not re.fullmatch(r"[a-z0-9_]+", name)
        ):
            raise ValueError(f"variants.{name}: is the name of another row, or not of a-z, 0-9 and _")
        try:
            return self.row(name)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(str(part) for part in problem["loc"])
            raise ValueError(
                f"variants.{name}: {field}: {problem['input']!r} refused: {problem['msg']}"
            ) from None


_Kind = TypeVar("_Kind", bound=Section)


def _changed(section: _Kind, changes: dict[str, Any]) -> _Kind:
    return type(section).model_validate(section.model_dump() | changes)


def _times(count: int, factor: float) -> int:
    return round(count * factor)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if not path.is_file():
        raise ProfileError(f"{path}: no such profile; profiles are YAML files in params/")
    if path.resolve() in seen:
        raise ProfileError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ProfileError(f"{path}: not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ProfileError(f"{path}: a profile is a mapping of fields, not {type(raw).__name__}")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    return _merge(_read(path.parent / str(parent), (*seen, path.resolve())), raw)


def _explain(error: ValidationError, path: Path) -> str:
    lines = [f"{path}: {error.error_count()} problem(s)"]
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "profile"
        if problem["type"] == "extra_forbidden":
            lines.append(
                f"  {where}: unknown field (value {problem['input']!r}); allowed: {_allowed(problem['loc'])}"
            )
        elif problem["type"] == "value_error":
            lines.append(f"  {where}: {problem['ctx']['error']}")
        else:
            lines.append(f"  {where}: {problem['input']!r} refused: {problem['msg']}")
    return "\n".join(lines)


def _allowed(location: tuple[int | str, ...]) -> str:
    section: Any = Profile
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return ", ".join(section.model_fields)


def load(path: str | Path) -> Profile:
    """Read, merge and check a profile.

    Raises ``ProfileError`` naming the field, the value and what is allowed.
    """
    path = Path(path)
    try:
        return Profile.model_validate(_read(path))
    except ValidationError as error:
        raise ProfileError(_explain(error, path)) from None


def describe(section: Section, indent: str = "") -> list[str]:
    """The merged profile as lines ``field: value  # meaning [unit]``."""
    lines, dump = [], section.model_dump(mode="json")
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            lines += [f"{indent}{name}:  # {(type(value).__doc__ or '').splitlines()[0]}"]
            lines += describe(value, indent + "  ")
            continue
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        unit = f" [{extra['unit']}]" if extra.get("unit") else ""
        meaning = f"  # {info.description}{unit}" if info.description else ""
        lines.append(f"{indent}{name}: {json.dumps(dump[name])}{meaning}")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ggsm_core.params FILE")
    try:
        print("\n".join(describe(load(sys.argv[1]))))
    except ProfileError as problem:
        sys.exit(str(problem))

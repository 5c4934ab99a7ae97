"""Profiles: which rows a table has, and the sections that each of them is made from.

A profile is a YAML file in ``params/``. It may name another file in ``extends`` and then states only what
differs. ``load`` merges, checks and returns it, or raises ``ProfileError`` that names the field, the value
and what is allowed. ``python -m ggsm_core.params params/quick.yaml`` prints the merged profile.
"""

from __future__ import annotations

import json
import re
import sys
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from ggsm_core.sections import (
    Backbone,
    Data,
    Evaluation,
    Guidance,
    HybridMlp,
    Lora,
    NoParameters,
    Objective,
    Pairs,
    Peers,
    Pretraining,
    Scheduler,
    Section,
    Synthesis,
    Template,
    TextModels,
    Training,
    field,
)

RecipeName = Literal[
    "causal",
    "hybrid_segment",
    "hybrid_mask",
    "hybrid_mlp",
    "hybrid_gq",
    "bidirectional",
    "scheduler",
    "ggsm",
]
RECIPE_NAMES: tuple[RecipeName, ...] = get_args(RecipeName)
FEATURE_BASELINES = ("rfm", "handmade", "handmade_linear", "handmade_128")
SEQUENCE_BASELINES = ("cpc", "coles", "msdp", "one4all")
LANGUAGE_BASELINES = ("found", "instructue")
TEXT_BASELINES = ("minilm", "qwen3_embedding", "kalm", "nemotron")
RECORD_BASELINES = ("records",)
ORACLE = "oracle"
"""The row of the decoder before contrastive training: read under the causal mask, without a contrast run."""
PEERS = (*SEQUENCE_BASELINES, *LANGUAGE_BASELINES)
"""The other trained systems, which one section and one rule to stop serve."""
JOINED = "handmade+"
"""Prefix of a row that has the hand-made features beside another row's embedding: ``handmade+ggsm``."""
BASELINE_NAMES = (
    *FEATURE_BASELINES,
    ORACLE,
    *PEERS,
    *TEXT_BASELINES,
    *RECORD_BASELINES,
    *(JOINED + row for row in (*RECIPE_NAMES, *PEERS)),
)


class ProfileError(ValueError):
    """A profile that can't be honoured. The message names field, value and mend."""


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
    """A recipe once more as a row of its own, with something changed and all else equal."""

    recipe: RecipeName
    options: dict[str, Any] = field({}, "replace those of the recipe's own section")
    objective: dict[str, Any] = field({}, "replace those of the profile's objective")
    training: dict[str, Any] = field({}, "replace those of the profile's training")


class Tuned(Section):
    """What tuning chose for a row, as a multiple of what the profile says for all (``ggsm_core.tuning``)."""

    rate: float = field(1.0, "times the learning rate", gt=0.0, le=1000.0)


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
    variants: dict[str, Variant] = field({}, "more rows: name -> recipe, and what differs")
    tuned: dict[str, Tuned] = field({}, "row -> its pace; a variant has its recipe's")
    evaluation: Evaluation = Evaluation()
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = field(
        [0], "one training run per recipe and seed", min_length=1
    )
    baselines: list[str] = field(
        ["rfm", "handmade", ORACLE],
        f"rows beside the recipes, of {', '.join(name for name in BASELINE_NAMES if JOINED not in name)}, "
        f"{JOINED}<trained row>",
    )
    peers: Peers = Peers()
    text_models: TextModels = TextModels()

    @property
    def trained(self) -> list[str]:
        """Rows of contrastive training: the recipes that run, then the variants."""
        return [*self.recipes.active, *self.variants]

    @property
    def unseeded(self) -> tuple[str, ...]:
        """Rows that draw nothing by a training seed: a second one would be the first again.

        A published decoder comes without adapters: those of its ``oracle`` are drawn, and not trained.
        """
        drawn = self.backbone.kind != "scratch" and self.template.modality_input == "adapter"
        found = (*FEATURE_BASELINES, *TEXT_BASELINES, *RECORD_BASELINES)
        return found if drawn else (ORACLE, *found)

    @property
    def mixes(self) -> bool:
        """Whether a row of contrastive training takes pairs of D_qa."""
        return any(self.row(name).training.qa_share > 0 for name in self.trained)

    def row(self, name: str) -> Row:
        """What a trained row trains with: a recipe, a variant or a peer."""
        variant = self.variants.get(name)
        recipe = name if variant is None else variant.recipe
        own: Section | None = getattr(self.recipes, recipe, None)
        objective, training = self.objective, self.training
        if variant is not None:
            default: Section = Recipes.model_fields[recipe].default
            own = _changed(own or default, variant.options)
            objective = _changed(objective, variant.objective)
            training = _changed(training, variant.training)
        rate = self.tuned.get(recipe, Tuned()).rate
        training = training.model_copy(update={"learning_rate": training.learning_rate * rate})
        peers = self.peers.model_copy(update={"learning_rate": self.peers.learning_rate * rate})
        return Row(recipe, own, objective, training, peers)

    @model_validator(mode="after")
    def _possible(self) -> Profile:
        for name in self.trained:
            recipe, guidance, objective, training, _ = self._checked_row(name)
            total = training.total_steps
            where = f"variants.{name}.options" if name in self.variants else f"recipes.{name}"
            if objective.margin_from > 0 and objective.margin is None:
                raise ValueError(f"{name}: objective.margin_from needs objective.margin, which is null")
            if objective.margin_from >= total:
                raise ValueError(
                    f"{name}: objective.margin_from = {objective.margin_from} is not below "
                    f"training.total_steps = {total}, so the margin never acts; set objective.margin to null"
                )
            self._check_batch(name, training)
            if not isinstance(guidance, Guidance):
                continue
            if guidance.warm_steps >= total:
                raise ValueError(
                    f"{where}.warm_steps: {guidance.warm_steps} must be below training.total_steps = {total}"
                )
            if recipe == "hybrid_mask" and guidance.warm_steps < 1:
                raise ValueError(f"{where}.warm_steps: 0 leaves no weights to freeze; at least 1")
            if guidance.source in ("random", "shuffled") and (
                guidance.warm_steps > training.checkpoint_every or guidance.freeze == "tower"
            ):
                raise ValueError(
                    f"{where}.source: {guidance.source} draws anew after a resume, so no checkpoint may lie "
                    "within warm-up: training.checkpoint_every at least warm_steps, and freeze not tower"
                )
            if guidance.source in ("random", "position") and training.micro_batch is not None:
                raise ValueError(
                    f"{where}.source: {guidance.source} needs the whole batch at once; leave "
                    "training.micro_batch out"
                )
            site = re.fullmatch(r"layer:(\d+)", guidance.grad_site)
            if site and self.backbone.kind == "scratch" and int(site[1]) >= self.backbone.layers:
                raise ValueError(
                    f"{where}.grad_site: {site[0]!r}, but the decoder has layers "
                    f"0 to {self.backbone.layers - 1}"
                )
        for where, values in (("seeds", self.seeds), ("baselines", self.baselines)):
            if twice := [value for at, value in enumerate(values) if value in values[:at]]:
                raise ValueError(f"{where}: {twice[0]!r} stands there twice")
        probed = self.data.households and self.data.households // (1 + (self.data.protocol == "new_users"))
        if probed is not None and self.evaluation.folds > probed:
            raise ValueError(
                f"evaluation.folds: {self.evaluation.folds} of {probed} households; a fold needs at least one"
            )
        if unknown := [name for name in self.baselines if name not in BASELINE_NAMES]:
            raise ValueError(f"baselines: {unknown} unknown; allowed: {', '.join(BASELINE_NAMES)}")
        paced = {*RECIPE_NAMES, *PEERS}
        if unknown := sorted(set(self.tuned) - paced):
            raise ValueError(f"tuned: {unknown} are not trained; allowed: {', '.join(sorted(paced))}")
        trained = {*self.trained, *self.baselines}
        for name in self.baselines:
            if (row := name.removeprefix(JOINED)) not in trained:
                raise ValueError(f"baselines: {name!r} needs the row {row!r}, which this profile leaves out")
        if self.backbone.kind != "scratch" and (wide := set(self.baselines) & set(RECORD_BASELINES)):
            raise ValueError(
                f"baselines: {', '.join(wide)} has as many dimensions as backbone.hidden, which only "
                f"kind: scratch has, and kind is {self.backbone.kind!r}"
            )
        if self.mixes and self.synthesis is None:
            raise ValueError("training.qa_share: needs the pairs of synthesis, which is null")
        if (self.backbone.kind == "scratch") != (self.pretraining is not None):
            raise ValueError(
                f"pretraining: goes with backbone.kind: scratch, and kind is {self.backbone.kind!r}; "
                "set pretraining to null for a pretrained decoder"
            )
        return self

    def _check_batch(self, name: str, training: Training) -> None:
        """A batch takes a sample once: more samples than there can be would be refused hours later."""
        most: dict[str, int] = {}
        if self.data.households is not None:
            halved = self.data.protocol == "new_users"
            taught = ceil(self.data.households / (1 + halved))
            most["data"] = taught * len(self.data.train_anchors)
        if training.qa_share > 0 and self.synthesis is not None:
            most["synthesis"] = ceil(self.synthesis.scaled / self.synthesis.pairs_per_user)
        for source, samples in most.items():
            if training.batch_size > samples:
                raise ValueError(
                    f"{name}: training.batch_size = {training.batch_size}, and {source} gives {samples} "
                    "training samples at most; a batch takes each of them once"
                )

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


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands in a mapping twice, where YAML would keep the last and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's, once all keys are found to be different."""
        keys = set[str]()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands here a second time", key.start_mark
                )
            keys |= {key.value} if isinstance(key.value, str) else set()
        return super().construct_mapping(node, deep)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if not path.is_file():
        raise ProfileError(f"{path}: no such profile; profiles are YAML files in params/")
    if path.resolve() in seen:
        raise ProfileError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that is none
        raise ProfileError(f"{path}: not YAML in UTF-8: {error}") from None
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
        if get_origin(section) is dict:  # the part is a key of its own, of variants or tuned
            section = get_args(section)[1]
            continue
        annotation = section.model_fields[str(part)].annotation
        options = [annotation, *get_args(annotation)]
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        section = annotation if get_origin(annotation) is dict else models[0]
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

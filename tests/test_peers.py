"""The trained systems of Table 2: their objectives against slow references, their training, their stages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from strategies import properties
from test_baselines import PEERS, event, habit, log, write
from torch import Tensor, nn

from ggsm_core import params, sections
from ggsm_core.baselines import instructue, joined, language, text_embeddings
from ggsm_core.baselines.answered import Answered
from ggsm_core.baselines.base import BaselineError, Histories
from ggsm_core.baselines.coles import coles_loss
from ggsm_core.baselines.cpc import cpc_loss
from ggsm_core.baselines.fitting import fit, split
from ggsm_core.baselines.found import Model
from ggsm_core.baselines.instructue import answer_loss
from ggsm_core.baselines.msdp import Msdp, distribution_loss
from ggsm_core.baselines.visits import NUMBERS, Visits, Vocabulary
from ggsm_core.batches import Pairs
from ggsm_core.codehash import closure
from ggsm_core.data import windows
from ggsm_core.order import QA
from ggsm_core.params import Profile, ProfileError
from ggsm_core.runs import Store
from ggsm_core.sections import Evaluation
from ggsm_core.stages import GRAPH, Plan
from ggsm_core.template import RECORD_TOKEN, render
from ggsm_core.towers import build_encoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of sentence-transformers' own imports
]
QUICK = Path(__file__).resolve().parents[1] / "params" / "quick.yaml"


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps the precision of the first Accelerator of a process."""
    yield
    AcceleratorState._reset_state(True)


# --- objectives -----------------------------------------------------------------------------------------


@properties
@given(st.integers(0, 10_000), st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_cpc_loss_is_that_of_its_definition(seed: int, lengths: list[int]) -> None:
    """Against Eq. 4 of its paper, term by term.

    pytorch-lifestream 0.7.0, which implements CPC and CoLES, does not install beside this project: it pins
    spacy 3.7.4, whose thinc wants numpy < 2. Its two losses were compared with these by hand instead, on
    sequences without padding, which it averages over: equal to 1e-6.
    """
    rng = torch.Generator().manual_seed(seed)
    batch, longest, ahead, width = len(lengths), max(lengths), 2, 3
    z = torch.randn(batch, longest, width, generator=rng)
    guess = torch.randn(ahead, batch, longest, width, generator=rng)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    pool = torch.from_numpy(np.flatnonzero(valid.numpy()))
    allowed = torch.arange(batch)[:, None] != (pool // longest)[None]
    if longest < 2:
        return
    per_distance = []
    for k in range(1, ahead + 1):
        terms = []
        for b, length in enumerate(lengths):
            for t in range(length - k):
                right = float(guess[k - 1, b, t] @ z[b, t + k])
                wrong = [
                    float(guess[k - 1, b, t] @ z[o, i])
                    for o in range(batch)
                    if o != b
                    for i in range(lengths[o])
                ]
                terms.append(np.logaddexp.reduce([right, *wrong]) - right)
        if terms:
            per_distance.append(np.mean(terms))
    got = cpc_loss(z, guess, valid, pool, allowed)
    assert float(got) == pytest.approx(np.mean(per_distance), abs=1e-4)
    moved = torch.where(valid[..., None], z, 99.0)
    assert float(cpc_loss(moved, guess, valid, pool, allowed)) == pytest.approx(float(got), abs=1e-5)


@properties
@given(st.integers(0, 10_000), st.lists(st.integers(0, 3), min_size=3, max_size=9), st.integers(1, 4))
def test_coles_loss_is_that_of_its_definition(seed: int, owners: list[int], hardest: int) -> None:
    """All positive pairs, and for each vector its nearest of other owners, pair by pair."""
    x = nn.functional.normalize(
        torch.randn(len(owners), 4, generator=torch.Generator().manual_seed(seed)), dim=1
    )
    d = [[float((a - b).norm()) for b in x] for a in x]
    everyone = range(len(owners))
    terms = [d[i][j] ** 2 for i in everyone for j in range(i + 1, len(owners)) if owners[i] == owners[j]]
    for i in everyone:
        others = sorted(d[i][j] for j in everyone if owners[i] != owners[j])
        terms += [max(0.0, 0.5 - distance) ** 2 for distance in others[:hardest]]
    got = coles_loss(x, torch.tensor(owners), margin=0.5, hardest=hardest)
    assert float(got) == pytest.approx(np.mean(terms), abs=1e-4)


def test_distribution_loss_is_kl_but_for_a_constant() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.softmax(torch.arange(20.0).view(4, 5), 1)
    kl = nn.functional.kl_div(logits.log_softmax(1), target, reduction="batchmean")
    entropy = -(target * target.log()).sum(1).mean()
    assert float(distribution_loss(logits, target)) == pytest.approx(float(kl + entropy), abs=1e-5)


def test_what_is_to_come_is_counted_by_hand(tmp_path: Path) -> None:
    rows = [row for row in log() if row[0] != "u00"]
    rows.append(event("u00", 85.5, "bill", "beef (meat)", 1.0))
    rows += [event("u00", 90 + d, "bill", "beef (meat)", 1.0) for d in (0.1, 0.2, 2.9, 3.0, 29.9)]
    rows.append(event("u00", 92.5, "bill", "roses (floral)", 1.0))
    train = Histories.read(write(tmp_path / "w", rows), "train", 90, 30)
    system = Msdp(PEERS, 0, lambda **metrics: None)
    system.vocabulary = Vocabulary(train, 512)
    beef, roses = (
        system.vocabulary.kinds.index(f"bill: {name}") for name in ("beef (meat)", "roses (floral)")
    )
    for days, shares in {1: (1, 0), 3: (3 / 4, 1 / 4), 30: (5 / 6, 1 / 6)}.items():
        ahead = system._ahead(train, days)
        assert ahead[0, [beef, roses]] == pytest.approx(shares)
        assert ahead.sum(1) == pytest.approx(1.0)
    nothing = Histories(train.samples, train.users, train.events, 90, train.future.clear())
    assert system._ahead(nothing, 7)[:, -1].tolist() == [1.0] * 60
    with pytest.raises(BaselineError, match="future_days"):
        system.fit(nothing)


@torch.no_grad()
def test_an_answer_is_written_after_its_user() -> None:
    """One row at a time and without padding, with the loss that transformers computes for labels."""
    encoder = tiny.encoder("causal", layers=2, features=tiny.FEATURES)
    user, answer = tiny.users([4, 1, 2]), tiny.answers(["frozen pizza", "a visit on a weekday", "homeowner"])
    total, count = 0.0, 0
    for row in range(3):
        hidden = torch.cat(
            [
                encoder.embed_tokens(user)[row][user.valid[row]],
                encoder.embed_tokens(answer)[row][answer.valid[row]],
            ]
        )
        states = encoder.decoder(inputs_embeds=hidden[None]).last_hidden_state[0]
        logits = states @ encoder.decoder.get_input_embeddings().weight.T
        said = answer.input_ids[row][answer.valid[row]]
        total += float(nn.functional.cross_entropy(logits[-len(said) - 1 : -1], said, reduction="sum"))
        count += len(said)
    assert float(answer_loss(encoder, user, answer)) == pytest.approx(total / count, rel=1e-4)


# --- sequences ------------------------------------------------------------------------------------------


def test_a_history_becomes_facts_visits_and_an_anchor(tmp_path: Path) -> None:
    rows = [
        ("u00", None, "tabular", "homeowner", None, None, False),
        event("u00", 240 - 10 + 0.5, "bill", "beef (meat)", 3.0),
        event("u00", 240 - 10 + 0.5, "bill", "beef (meat)", 4.0),
        event("u00", 240 - 10 + 0.5, "app", "visit to store 1", 1.0),
        event("u00", 240 - 4 + 0.25, "bill", "roses (floral)", 1.0),
    ]
    users = Histories.read(write(tmp_path / "w", rows, users=2), "probe", 90)
    vocabulary = Vocabulary(users, 512)
    batch = Visits(users, vocabulary, 64).batch(np.array([0, 1]))
    assert batch.valid.tolist() == [[True] * 4, [True] + [False] * 3]  # u01 has the anchor alone
    numbers = dict(zip(NUMBERS, batch.numbers.numpy().T, strict=True))
    assert np.expm1(numbers["log_amount"]) == pytest.approx([0, 7, 1, 0, 0])
    assert np.expm1(numbers["log_items"]) == pytest.approx([1, 3, 1, 0, 0])
    assert np.expm1(numbers["log_gap"]) == pytest.approx([0, 80, 6, 4, 90])
    assert numbers["cos_hour"] == pytest.approx([0, -1, 0, 0, 0], abs=1e-6)
    assert numbers["anchor"].tolist() == [0, 0, 0, 1, 1]
    seen = np.expm1(batch.counts(len(vocabulary)).numpy())
    assert seen[1, vocabulary.kinds.index("bill: beef (meat)")] == pytest.approx(2)
    assert seen.sum(1) == pytest.approx([1, 3, 1, 0, 0])
    short = Visits(users, vocabulary, 1).batch(np.array([0]))
    assert short.valid.sum() == 3, "facts, the last visit and the anchor"


# --- training -------------------------------------------------------------------------------------------


class Scripted(nn.Module):
    """A model whose held-out loss follows a script; it remembers the epoch in its one parameter."""

    def __init__(self, script: list[float]) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))
        self.script, self.seen = script, set[int]()

    def loss(self, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        if self.training:
            self.seen |= set(rows.tolist())
            return -self.value
        self.epoch = getattr(self, "epoch", -1) + 1
        return torch.tensor(self.script[self.epoch])


def test_training_stops_early_and_keeps_the_best_epoch() -> None:
    users = np.repeat(np.arange(20), 2)
    train, held = split(users, 0.1)
    assert not set(users[train]) & set(users[held]) and len(set(users[held])) == 2
    model, lines = Scripted([3.0, 1.0, 2.0, 2.0, 0.0]), []
    settings = PEERS.model_copy(update={"epochs": 9, "patience": 2, "batch_size": 64, "held_out": 0.1})
    done = fit(
        model,
        model.loss,
        users,
        settings,
        0,
        lambda **line: lines.append((line["step"], float(model.value.detach()))),
    )
    assert (done.epochs, done.best_epoch, done.stopped_early) == (4, 2, True)
    assert float(model.value.detach()) == dict(lines)[2] != dict(lines)[4]
    assert model.seen == set(train.tolist()), "the held-out households are never trained on"


def test_a_loss_that_is_not_finite_is_named() -> None:
    model = Scripted([1.0, float("nan")])
    settings = PEERS.model_copy(update={"epochs": 3})
    with pytest.raises(BaselineError, match=r"nan in epoch 2; lower peers\.learning_rate"):
        fit(model, model.loss, np.arange(40), settings, 0, lambda **line: None)
    with pytest.raises(BaselineError, match="1 household"):
        split(np.zeros(5, np.int64), 0.1)


# --- language models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of tokens, texts and pretrain, tiny; the training users are probed too."""
    folder = tmp_path_factory.mktemp("corpus")
    inputs = tiny.corpus(folder) | {"pretrain": folder / "pretrain"}
    tiny.decoder(layers=1).save_pretrained(inputs["pretrain"])
    tiny.tokenizer().save_pretrained(inputs["pretrain"])
    for shard in sorted(inputs["tokens"].glob("train_users-*")):
        shard.with_name(shard.name.replace("train", "probe")).write_bytes(shard.read_bytes())
    pl.DataFrame({"sample": range(24)}).write_parquet(inputs["tokens"] / "probe.parquet")
    return inputs


def declared(name: str, **template: object) -> SimpleNamespace:
    """What the stage language sees of a profile."""
    return SimpleNamespace(
        recipe=name,
        seed=0,
        data=sections.Data(),
        template=sections.Template(max_user_tokens=tiny.LONGEST, **template),
        backbone=sections.Backbone(),
        lora=None,
        objective=sections.Objective(temperature=0.5),
        training=sections.Training(total_steps=8, batch_size=6, learning_rate=1e-2),
        peers=PEERS.model_copy(update={"epochs": 8, "patience": 8, "learning_rate": 1e-2}),
    )


@pytest.mark.parametrize("name", params.LANGUAGE_BASELINES)
def test_a_language_model_learns_and_embeds(name: str, corpus: dict[str, Path], tmp_path: Path) -> None:
    results = []
    for run in ("first", "second"):
        out = tmp_path / run
        out.mkdir()
        language.run(declared(name), corpus, out, lambda *_: None)
        results.append((out / "embeddings.safetensors").read_bytes())
    losses = pl.read_ndjson(out / "metrics.jsonl")["loss"]
    assert len(losses) == 8 and losses[-3:].mean() < losses[:3].mean()
    assert results[0] == results[1], "one seed, one result"
    how = json.loads((out / "system.json").read_text())
    assert how["dimension"] == (PEERS.hidden if name == "found" else tiny.HIDDEN) and how["parameters"] > 0


def test_a_decoder_that_writes_with_other_weights_is_refused(
    corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def untied(*given: Any) -> Any:
        encoder = build_encoder(*given)
        encoder.decoder.config.tie_word_embeddings = False
        return encoder

    monkeypatch.setattr(instructue, "build_encoder", untied)
    with pytest.raises(BaselineError, match="an output layer of its own"):
        instructue.InstructUe(declared("instructue"), corpus, lambda **_: None)


def test_the_written_answers_weigh_as_much_in_micro_batches(corpus: dict[str, Path]) -> None:
    given = declared("instructue")
    given.recipe, given.options, weights = "causal", None, []
    for micro_batch in (None, 3, 2):
        given.training = given.training.model_copy(update={"micro_batch": micro_batch})
        pairs = Pairs(corpus["tokens"], corpus["texts"], 6, 0)
        trainer = instructue._Trainer(build_encoder(given, corpus), pairs, given)
        parts = trainer._chunks(0)
        assert len(parts) == (1 if micro_batch is None else 6 // micro_batch)
        weights.append(sum(trainer._beside(part, 0).item() for part in parts))
    # Other rows are written in each case; untrained, all cost about as much.
    assert weights[1:] == pytest.approx([weights[0]] * 2, rel=0.2)


def test_found_learns_from_behaviour_alone(tmp_path: Path) -> None:
    tokens = tiny.corpus(tmp_path, kinds=("visits", QA))["tokens"]
    read = Answered.read(tokens, tiny.feature_of)
    kinds = pl.read_parquet(tokens / "pairs.parquet")["granularity"].to_numpy()
    assert {kinds[row] for rows in read.of_sample for row in rows} == {"visits"}


def test_found_reads_records_and_nothing_else() -> None:
    """Padding, tags and the query do not move a user; one more record does."""
    torch.manual_seed(0)
    record = tiny.tokenizer().convert_tokens_to_ids(RECORD_TOKEN)
    model = Model(tiny.FEATURES, len(tiny.tokenizer()), record, PEERS).eval()
    alone, padded, asked = tiny.users([3]), tiny.users([3, 9]), tiny.users([3], query=tiny.QUERY)
    assert torch.allclose(model.user(alone)[0], model.user(padded)[0], atol=1e-6)
    assert torch.allclose(model.user(alone)[0], model.user(asked)[0], atol=1e-6)
    assert not torch.allclose(model.user(alone)[0], model.user(tiny.users([4]))[0], atol=1e-3)


def test_found_needs_records_as_vectors(corpus: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match=r"template\.modality_input: 'text'"):
        language.run(declared("found", modality_input="text"), corpus, tmp_path, lambda *_: None)


# --- frozen text ----------------------------------------------------------------------------------------


def test_minilm_embeds_each_text_by_itself() -> None:
    pytest.importorskip("sentence_transformers")
    source = text_embeddings.folder_of("minilm", sections.TextModels())
    system = text_embeddings.FrozenText("minilm", source, 32, lambda *_: None)
    texts = ["soft drinks (grocery), 5 times", "<bill> beef", "a visit on a weekday " * 3]
    got = system.embed(texts)
    assert got.shape == (3, 384)
    assert got == pytest.approx(np.stack([system.embed([text])[0] for text in texts]), abs=1e-5)
    cut = system.embed(["beef " * 500, "beef " * 100])
    assert cut[0] == pytest.approx(cut[1], abs=1e-5), "cut at max_tokens"


def test_the_stage_embeds_the_probe_split_as_the_template_writes_it(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = write(tmp_path / "w", log(8), users=8)
    events, samples = (pl.read_parquet(folder / f"{name}.parquet") for name in ("events", "samples"))
    records = windows.history(events, samples, 90)
    records.write_parquet(folder / "records.parquet")
    asked = SimpleNamespace(
        recipe="minilm", template=sections.Template(), text_models=sections.TextModels(max_tokens=48)
    )
    text_embeddings.run(asked, {"windows": folder}, tmp_path, lambda *_: None)
    stored = load_file(tmp_path / "embeddings.safetensors")
    assert stored["sample"].tolist() == samples.filter(pl.col("split") == "probe")["sample"].to_list()
    texts = {sample: render(user) for sample, user in windows.users(records, asked.template)}
    source = text_embeddings.folder_of("minilm", asked.text_models)
    system = text_embeddings.FrozenText("minilm", source, 48, lambda *_: None)
    assert stored["embeddings"][3] == pytest.approx(
        system.embed([texts[int(stored["sample"][3])]])[0], abs=1e-4
    )


def test_a_text_encoder_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    placed: list[torch.device] = []
    monkeypatch.setattr(
        library.SentenceTransformer, "to", lambda self, place: placed.append(torch.device(place))
    )
    source = text_embeddings.folder_of("minilm", sections.TextModels())
    text_embeddings.FrozenText("minilm", source, 32, lambda *_: None)
    assert [place.type for place in placed] == ["cuda"]


@pytest.mark.parametrize("name", ["qwen3_embedding", "kalm", "nemotron"])
def test_a_model_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    settings = sections.TextModels(**{name: str(tmp_path / "nowhere")})
    assert text_embeddings.folder_of(name, settings) == str(tmp_path / "nowhere")
    with pytest.raises(text_embeddings.MissingModel, match=rf"text_models\.{name}: .*nowhere"):
        text_embeddings.FrozenText(name, str(tmp_path / "nowhere"), 32, lambda *_: None)


# --- rows -----------------------------------------------------------------------------------------------


def plan(tmp_path: Path, **more: object) -> Plan:
    raw = params.load(QUICK).model_dump(mode="json") | more
    return Plan(GRAPH, Profile.model_validate(raw), Store(tmp_path))


def test_a_row_runs_with_every_seed_that_can_matter(tmp_path: Path) -> None:
    names = ["rfm", "oracle", "cpc", "found", "minilm", "records", "handmade+ggsm", "handmade+cpc"]
    labels = {node.label: node for node in plan(tmp_path, seeds=[0, 1], baselines=names).all()}
    for row in ("cpc", "found"):
        assert {f"probe-{row}-s0", f"probe-{row}-s1"} <= labels.keys()
    for row in ("minilm", "oracle", "records"):
        assert f"probe-{row}-s0" in labels and f"probe-{row}-s1" not in labels
    assert "baseline-rfm" in labels and "baseline-handmade" not in labels
    assert labels["probe-cpc-s1"].inputs.keys() == {"sequence", "windows"}
    assert labels["joined-handmade+ggsm-s1"].inputs["embed"] is labels["embed-ggsm-s1"]
    assert labels["joined-handmade+cpc-s0"].inputs["sequence"] is labels["sequence-cpc-s0"]
    rows = {key for key in labels["compare"].inputs if key != "windows"}
    assert {"joined:handmade+ggsm:1", "probe:minilm:0", "baseline:rfm", "probe:oracle:0"} <= rows
    assert not {row for row in rows if row.startswith(("embed", "sequence", "language", "text"))}


def test_the_probe_is_not_part_of_a_trained_baseline(tmp_path: Path) -> None:
    """What is expensive does not run again when the probe changes, and counts are no part of a sequence."""
    for stage in ("sequence", "language", "text", "records"):
        behind = closure([GRAPH.stages[stage].module], GRAPH.package)
        assert not behind.keys() & {"ggsm_core.evaluation", "ggsm_core.comparison", "ggsm_core.baselines.rfm"}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["rfm", "cpcc"], "cpcc"),
        (["handmade+rfm"], "handmade+rfm"),
        (["handmade+cpc"], "needs the row 'cpc'"),
    ],
)
def test_a_row_that_can_not_be_is_refused(names: list[str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nbaselines: {json.dumps(names)}\n")
    with pytest.raises(ProfileError) as problem:
        params.load(path)
    assert words in str(problem.value)


def test_joined_puts_both_side_by_side(tmp_path: Path) -> None:
    """An embedding that holds the label lifts the row to 1; one of other samples is refused."""
    from safetensors.numpy import save_file

    folder, other = habit(tmp_path / "w", 200), tmp_path / "embed"
    other.mkdir()
    labels = pl.read_parquet(folder / "labels.parquet")
    samples = (
        pl.read_parquet(folder / "samples.parquet").filter(pl.col("split") == "probe")["sample"].to_numpy()
    )
    known = labels["task"].to_numpy()[samples].astype(np.float32)
    shuffled = np.random.default_rng(0).permutation(len(samples))
    stored = {"embeddings": known[shuffled, None] * np.ones((1, 3), np.float32), "sample": samples[shuffled]}
    save_file(stored, other / "embeddings.safetensors")
    asked = SimpleNamespace(
        recipe="handmade+cpc", seed=2, data=sections.Data(), evaluation=Evaluation(bootstrap=100)
    )
    joined.run(asked, {"windows": folder, "sequence": other}, tmp_path, lambda *_: None)
    table = pl.read_csv(tmp_path / "auc.csv")
    assert table.select("recipe", "seed").rows() == [("handmade+cpc", 2)] and table["auc"][0] == 1.0
    save_file({name: array[1:] for name, array in stored.items()}, other / "embeddings.safetensors")
    with pytest.raises(BaselineError, match="89, w has 90"):
        joined.run(asked, {"windows": folder, "sequence": other}, tmp_path, lambda *_: None)

"""An exported folder is read by sentence-transformers alone and embeds the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
import torch
from transformers import AutoModel

from ggsm_core import collation, export, model, recipes, sections, template

sentence_transformers = pytest.importorskip("sentence_transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of sentence-transformers' own imports
]

PLAIN = ("causal", "bidirectional", "scheduler", "ggsm")


def saved(
    folder: Path, name: str, architecture: str = "qwen2", **more: Any
) -> tuple[model.UserEncoder, Path]:
    """An encoder for text, and where it is saved."""
    encoder = tiny.encoder(name, architecture, layers=2, **more)
    if more.get("lora"):
        tiny.decoder(architecture, layers=2).save_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in encoder.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(0)
                    )
    encoder.save(folder / "saved")
    return encoder, folder / "saved"


def texts_and_ours(encoder: model.UserEncoder) -> tuple[list[str], np.ndarray]:
    """Users with and without query, one too long to keep all its records; and answers."""
    users = [tiny.user(n, seed=n) for n in (1, 2, 9)]
    queries = [None, tiny.QUERY, None]
    encoded = [
        template.encode_user(u, encoder.tokenizer, q, modality_input="text", max_tokens=tiny.LONGEST)
        for u, q in zip(users, queries, strict=True)
    ]
    assert encoded[2].dropped > 0
    answers = ["frozen pizza, 12 times", "it's <b>bold</b>"]
    embedded = [
        encoder.embed(collation.collate(encoded, tiny.pad_id())),
        encoder.embed(tiny.answers(answers), "answer"),
    ]
    texts = [
        export.text_of(u, encoder.tokenizer, q, max_tokens=tiny.LONGEST)
        for u, q in zip(users, queries, strict=True)
    ]
    return texts + [export.answer_text(a) for a in answers], torch.cat(embedded).numpy()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("name", PLAIN)
def test_the_folder_embeds_the_same(name: str, architecture: str, tmp_path: Path) -> None:
    encoder, folder = saved(tmp_path, name, architecture)
    export.export(folder, tmp_path / "out")
    reader = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    texts, ours = texts_and_ours(encoder)
    np.testing.assert_allclose(reader.encode(texts), ours, atol=export.TOLERANCE)
    alone = np.concatenate([reader.encode([text]) for text in texts])
    np.testing.assert_allclose(alone, ours, atol=export.TOLERANCE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["is_causal"] == (name == "causal") and "auto_map" not in config
    assert not list((tmp_path / "out").rglob("*.py")) and not list((tmp_path / "out").rglob("*.jinja"))


def test_the_wrong_attention_would_show(tmp_path: Path) -> None:
    """Negative control of the test above, and of the comparison that `export` itself makes."""
    encoder, folder = saved(tmp_path, "bidirectional")
    export.export(folder, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_causal": True}))
    reader = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    texts, ours = texts_and_ours(encoder)
    assert np.abs(reader.encode(texts) - ours).max() > 0.01
    with pytest.raises(export.ExportError, match="differ by"):
        export._compare(encoder, reader)


def test_an_export_that_embeds_otherwise_is_removed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved(tmp_path, "bidirectional")
    write = export._write

    def wrong(encoder: model.UserEncoder, causal: bool, out: Path) -> Any:
        return write(encoder, True, out)

    with monkeypatch.context() as changed, pytest.raises(export.ExportError, match="differ by"):
        changed.setattr(export, "_write", wrong)
        export.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export.export(folder, tmp_path / "out")  # and nothing is in the way of another try


def test_another_way_to_split_text_would_show(tmp_path: Path) -> None:
    """Negative control: AutoTokenizer, left to itself, gives Qwen2 another pre-tokenizer than ours."""
    encoder, folder = saved(tmp_path, "causal", "qwen2")
    export.export(folder, tmp_path / "out")
    path = tmp_path / "out" / "sentence_bert_config.json"
    described = json.loads(path.read_text())
    del described["processor_kwargs"]
    path.write_text(json.dumps(described))
    reader = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    with pytest.raises(export.ExportError, match="differ by"):
        export._compare(encoder, reader)


def test_lora_is_merged_and_the_chat_template_left_out(tmp_path: Path) -> None:
    encoder, folder = saved(tmp_path, "ggsm", lora=sections.Lora(rank=4, alpha=8))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<bill>{{ m.content }}{% endfor %}")
    assert model.UserEncoder.load(folder, base=tmp_path / "base").tokenizer.chat_template is not None
    export.export(folder, tmp_path / "out", base=tmp_path / "base")
    reader = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    texts, ours = texts_and_ours(encoder)
    np.testing.assert_allclose(reader.encode(texts), ours, atol=export.TOLERANCE)
    assert reader.tokenizer.chat_template is None
    assert not any("lora" in key for key in AutoModel.from_pretrained(tmp_path / "out").state_dict())


@pytest.mark.parametrize("name", [n for n in recipes.RECIPES if n not in PLAIN])
def test_a_hybrid_recipe_is_refused(name: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, name)
    with pytest.raises(export.ExportError, match=f"recipe: {name}"):
        export.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_and_full_folders_are_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "ggsm", features=tiny.FEATURES)
    with pytest.raises(export.ExportError, match="modality_input: adapter"):
        export.export(folder, tmp_path / "out")
    _, folder = saved(tmp_path, "causal")
    with pytest.raises(export.ExportError, match=r"out: .* holds files"):
        export.export(folder, tmp_path / "saved")


def test_the_model_card_states_data_recipe_metrics_and_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = saved(tmp_path, "ggsm")
    row = {"seed": 0, "task": "next_month", "auc": 0.7512, "ci_low": 0.7401, "ci_high": 0.7623, "n": 4200}
    auc = pl.DataFrame([{"recipe": "ggsm", **row}, {"recipe": "causal", **row, "task": "of another"}])
    auc.write_csv(tmp_path / "auc.csv")
    arguments = [
        "--model",
        folder,
        "--out",
        tmp_path / "out",
        "--auc",
        tmp_path / "auc.csv",
        "--data",
        "A log.",
    ]
    assert export.main([str(a) for a in arguments]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("A log.", "recipe ggsm", "| next_month | 0 | 0.751 | 0.740 to 0.762 | 4200 |", "## Limits"):
        assert words in card
    assert "of another" not in card
    assert export.main([str(a) for a in arguments]) == 1
    assert "holds files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("", r"auc\.csv: not a table"),
        ("recipe,seed,task,auc,ci_low,ci_high\nggsm,0,a,.7,.6,.8\n", "no column 'n'"),
        ("recipe,seed,task,auc,ci_low,ci_high,n\n", "no row of recipe 'ggsm', there is none at all"),
        ("recipe,seed,task,auc,ci_low,ci_high,n\ncausal,0,a,.7,.6,.8,9\n", "'ggsm', there is causal;"),
        (
            "recipe,seed,task,auc,ci_low,ci_high,n\nggsm,0,a,.7,.6,.8,9\nggsm,0,b,,.6,.8,9\n",
            "auc: None in row 2",
        ),
        ("recipe,seed,task,auc,ci_low,ci_high,n\nggsm,0,a,.7,low,.8,9\n", "ci_low: 'low' in row 1"),
    ],
)
def test_metrics_that_can_not_be_told_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str, said: str
) -> None:
    _, folder = saved(tmp_path, "ggsm")
    (tmp_path / "auc.csv").write_text(table)
    given = {"model": folder, "out": tmp_path / "out", "auc": tmp_path / "auc.csv"}
    assert export.main([f"--{name}={value}" for name, value in given.items()]) == 1
    assert re.search(said, capsys.readouterr().err) and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # mteb calls a renamed method
def test_mteb_evaluates_the_folder(tmp_path: Path) -> None:
    """Through mteb's own interface, on a task made from local data: which users bought pizza?"""
    mteb = pytest.importorskip("mteb", reason="needs pip install mteb")
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    _, folder = saved(tmp_path, "ggsm")
    export.export(folder, tmp_path / "out")

    class Pizza(AbsTaskClassification):
        metadata = TaskMetadata(
            name="Pizza",
            dataset={"path": "local", "revision": "1"},
            description="Which users bought pizza?",
            type="Classification",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
        )

        def load_data(self, **_: Any) -> None:
            kinds = ("frozen pizza", "soft drinks")
            users = [
                template.User({"bill": [template.Record(kinds[i % 2])] * (1 + i % 3)}) for i in range(40)
            ]
            texts = [export.text_of(u, tiny.tokenizer(), max_tokens=tiny.LONGEST) for u in users]
            both = Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(40)]})
            self.dataset = DatasetDict({"train": both.select(range(20)), "test": both.select(range(20, 40))})
            self.data_loaded = True

    reader = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    result = mteb.evaluate(reader, Pizza(), cache=None)
    assert result.task_results[0].get_score() > 0.9

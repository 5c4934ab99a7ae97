"""A trained encoder as a folder that ``SentenceTransformer(folder)`` loads, with no code of ours.

    python -m ggsm_core.export --model runs/contrast-ggsm-s0-... --out exported [--base FOLDER] [--auc FILE]

What can be said in a plain folder: text in, a decoder that is causal or bidirectional as a whole, the last
token's state, normalised. A hybrid mask or adapters can't, and are refused. After writing, the folder is
loaded and compared with the encoder it came from.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from ggsm_core.collation import collate
from ggsm_core.model import UserEncoder
from ggsm_core.recipes import View
from ggsm_core.template import EOS_TOKEN, PAD_TOKEN, SEGMENTS, Record, User, encode_user, render, sanitise

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TOLERANCE = 1e-4
"""Largest difference of a coordinate between the encoder and its export, fp32."""


class ExportError(ValueError):
    """An encoder that a sentence-transformers folder can't express, or that came out different."""


def export(
    folder: Path, out: Path, *, base: Path | None = None, data: str = "", auc: pl.DataFrame | None = None
) -> None:
    """Write the encoder saved in ``folder`` to the new folder ``out``, with a model card.

    Args:
        folder: what ``UserEncoder.save`` wrote.
        out: must not exist or be empty.
        base: the decoder's folder, for an encoder with LoRA; the update is merged in fp32.
        data: what the encoder was trained on, for the card.
        auc: rows of ``auc.csv`` for the card, some of them of the encoder's recipe: recipe, seed, task, auc,
            ci_low, ci_high, n.

    Raises:
        ExportError: the recipe or an input stands against it, or what was written embeds otherwise and is
            removed again.
    """
    encoder = UserEncoder.load(folder, base=base)
    metrics = "None given." if auc is None else _table(auc, encoder.recipe.name)
    causal = _is_causal(encoder)
    if out.exists() and any(out.iterdir()):
        raise ExportError(f"out: {out} holds files already; give a new folder")
    if encoder.lora is not None:
        encoder = encoder.merged()
    encoder.float()
    model = _write(encoder, causal, out)
    try:
        _compare(encoder, model)
    except ExportError:
        shutil.rmtree(out)
        raise
    (out / "README.md").write_text(_card(encoder, causal, data, metrics), encoding="utf-8")


def text_of(
    user: User, tokenizer: PreTrainedTokenizerFast, query: str | None = None, *, max_tokens: int
) -> str:
    """What an exported encoder is given for a user: ``template.render``, cut as ``encode_user`` cuts.

    Raises what ``encode_user`` raises.
    """
    encoded = encode_user(user, tokenizer, query, modality_input="text", max_tokens=max_tokens)
    return str(tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False))


def answer_text(answer: str) -> str:
    """The text that an exported encoder is given for an answer."""
    return f"{sanitise(answer)}{EOS_TOKEN}"


def _is_causal(encoder: UserEncoder) -> bool:
    """Is the mask of inference causal (True) or bidirectional (False) as a whole? Raises ``ExportError``."""
    name = encoder.recipe.name
    if encoder.features is not None:
        raise ExportError(
            "modality_input: adapter; a sentence-transformers folder takes text alone. Train with "
            "template.modality_input: text to export"
        )
    length = encoder.recipe.max_length
    parameter = next(encoder.parameters())
    every = torch.ones(1, length, dtype=torch.bool, device=parameter.device)
    view = View(
        valid=every,
        segments=(torch.arange(length, device=parameter.device) % len(SEGMENTS))[None],
        hidden=torch.randn(1, length, encoder.hidden_size).to(parameter),
        step=None,
    )
    seen = encoder.recipe.visibility(view).detach().expand(1, length, length)[0]
    future = seen[torch.ones_like(seen, dtype=torch.bool).triu(1)]
    causal, bidirectional = bool((future == 0).all()), bool((future == 1).all())
    if encoder.recipe.prefix is not None or not (causal or bidirectional):
        raise ExportError(
            f"recipe: {name} has a mask of its own at inference, and a sentence-transformers folder knows "
            "causal and bidirectional only; export causal, bidirectional, scheduler or ggsm, or embed with "
            "ggsm_core.embed"
        )
    return causal


def _write(encoder: UserEncoder, causal: bool, out: Path) -> SentenceTransformer:
    """Fill the folder and load it again as its users will."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ModuleNotFoundError as error:
        raise ExportError(
            "sentence-transformers: not installed; pip install 'sentence-transformers>=6.2'"
        ) from error
    config = encoder.decoder.config
    config.is_causal = causal
    config.architectures = [type(encoder.decoder).__name__]
    tokenizer = _plain(encoder.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        encoder.decoder.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        # The tokenizer class of this type takes tokenizer.json as it is. Left to itself, AutoTokenizer goes
        # by the decoder's type, and for Qwen2 replaces how text is split before the vocabulary is looked up.
        faithful = {"tokenizer_type": "granite"}
        decoder = Transformer(scratch, processor_kwargs=dict(faithful))
        pooling = Pooling(config.hidden_size, pooling_mode="lasttoken")
        SentenceTransformer(modules=[decoder, pooling, Normalize()]).save(str(out), create_model_card=False)
    settings = out / "sentence_bert_config.json"
    described = json.loads(settings.read_text(encoding="utf-8")) | {"processor_kwargs": faithful}
    settings.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return SentenceTransformer(str(out), device="cpu", local_files_only=True)


def _plain(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that does to text what ``encode_user`` does: no chat template, no tokens of its own."""
    plain = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token,
        additional_special_tokens=[t for t in tokenizer.all_special_tokens if t != tokenizer.eos_token],
        truncation_side="left",  # should a text ever exceed the decoder's positions, <USER> stays
    )
    plain.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # adds no tokens
    return plain


def _compare(encoder: UserEncoder, model: SentenceTransformer) -> None:
    """Raises ``ExportError`` unless both embed the same, alone and in a batch."""
    encoder.cpu().eval()
    limit = encoder.recipe.max_length
    # Short enough for any limit, and full of what tokenizers disagree on.
    users = [
        User({"bill": [Record("12 cans, 45-54")]}),
        User({"bill": [Record("it's 45")], "app": [Record("12")]}),
    ]
    encoded = [
        encode_user(user, encoder.tokenizer, modality_input="text", max_tokens=limit) for user in users
    ]
    ours = encoder.embed(collate(encoded, encoder.ids[PAD_TOKEN]))
    texts = [text_of(user, encoder.tokenizer, max_tokens=limit) for user in users]
    theirs = torch.from_numpy(model.encode(texts, show_progress_bar=False))
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE:
        raise ExportError(
            f"export: embeddings differ by {difference:.2g}, more than {TOLERANCE}; the installed "
            "sentence-transformers or transformers reads the folder in another way than it was written"
        )


def _card(encoder: UserEncoder, causal: bool, data: str, metrics: str) -> str:
    recipe = encoder.recipe
    options = ", ".join(f"{name}: {value}" for name, value in recipe.options.model_dump().items())
    example = render(User({"bill": [Record("soft drinks (grocery)", (2.5, 1.8, 0.1, 0.5, 0.7, 0.0))]}))
    both = encoder.answer_mask == "same" or (encoder.answer_mask == "causal") == causal
    answers = (
        f"An answer is embedded as its text followed by `{EOS_TOKEN}`."
        if both
        else f"Answers can't be embedded with it: their tower was trained under a {encoder.answer_mask} mask."
    )
    attention = "causal" if causal else "bidirectional"
    warning = (
        "Bidirectional by `is_causal: false`, which transformers before 5.2 ignores: it would embed wrongly."
    )
    return f"""---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags: [user-embeddings, {recipe.name}]
---
# User embeddings, recipe {recipe.name}

A {encoder.decoder.config.model_type} decoder with {attention} attention that turns a user's tagged history
into one L2-normalised vector of {encoder.hidden_size} numbers: the state at the last token, `<USER>`.

```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("this folder")
model.encode([{example!r}])
```

The text is what `ggsm_core.export.text_of` gives; up to {recipe.max_length} tokens were trained. {answers}
{"" if causal else warning}

## Data
{data or "Not stated by whoever exported it."}

## Recipe
{recipe.name}, {recipe.total_steps} steps; {options or "no options"}; answer tower: {encoder.answer_mask}.

## Metrics
{metrics}

## Limits
It represents users like those it was trained on, in that language and that template; other logs need their
own training. An embedding of a person's purchases is personal data: it can carry age, income or family and
name none of them. It was not built for decisions about single persons.
"""


def _table(auc: pl.DataFrame, recipe: str) -> str:
    """The rows of ``recipe`` for the card. Raises ``ExportError`` for none, or one with a value missing."""
    from ggsm_core.evaluation import AUC_COLUMNS  # scikit-learn behind it, for the card alone

    if lacking := [name for name in AUC_COLUMNS if name not in auc.columns]:
        raise ExportError(f"auc: no column {lacking[0]!r}; give a run's auc.csv")
    typed = auc.select(pl.col(name).cast(kind, strict=False) for name, kind in AUC_COLUMNS.items())
    for name in AUC_COLUMNS:
        if (empty := typed[name].is_null()).any():
            row = int(empty.arg_true()[0])
            raise ExportError(f"auc: {name}: {auc[name][row]!r} in row {row + 1}; give a run's auc.csv")
    rows = typed.filter(pl.col("recipe") == recipe).sort("task", "seed").rows(named=True)
    if not rows:
        there = ", ".join(typed["recipe"].unique().sort()) or "none at all"
        raise ExportError(
            f"auc: no row of recipe {recipe!r}, there is {there}; give the auc.csv of its own run"
        )
    lines = ["Linear probe on frozen embeddings, AUC with its interval over households:", ""]
    lines += ["| task | seed | AUC | interval | n |", "| --- | --- | --- | --- | --- |"]
    lines += [
        "| {task} | {seed} | {auc:.3f} | {ci_low:.3f} to {ci_high:.3f} | {n} |".format(**row) for row in rows
    ]
    return "\n".join(lines)


def _read(file: Path) -> pl.DataFrame:
    try:
        return pl.read_csv(file)
    except pl.exceptions.PolarsError as error:
        raise ExportError(f"auc: {file}: not a table ({error}); give a run's auc.csv") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ggsm_core.export", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained encoder")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--base", type=Path, help="folder of the decoder, for an encoder with LoRA")
    parser.add_argument("--data", default="", help="what it was trained on, for the model card")
    parser.add_argument("--auc", type=Path, help="auc.csv with its metrics, for the model card")
    given: Any = parser.parse_args(arguments)
    try:
        auc = _read(given.auc) if given.auc else None
        export(given.model, given.out, base=given.base, data=given.data, auc=auc)
    except (ValueError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    print(f"written and compared: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Stage ``mix``: D_behavior and D_qa in one table of pairs, for training that draws from both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
from transformers import PreTrainedTokenizerFast

from ggsm_core.order import QA
from ggsm_core.progress import Progress
from ggsm_core.template import AnswerTooLong, QueryTooLong, Record, User, encode_answer, encode_user


def misfit(query: str, answer: str, tokenizer: PreTrainedTokenizerFast, template: Any) -> str | None:
    """Why a pair does not fit the template's lengths, or None. Nothing is ever cut to fit."""
    someone = User({"bill": [Record("anything")]})
    try:
        encode_user(
            someone,
            tokenizer,
            query,
            modality_input=template.modality_input,
            max_tokens=template.max_user_tokens,
        )
        encode_answer(answer, tokenizer, max_tokens=template.max_answer_tokens)
    except (QueryTooLong, AnswerTooLong) as problem:
        return str(problem)
    return None


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Writes pairs.parquet, with the columns of stage ``pairs``, and left_out.parquet: what does not fit."""
    behaviour = pl.read_parquet(inputs["pairs"] / "pairs.parquet")
    qa = pl.read_parquet(inputs["synthesis"] / "pairs.parquet").select("sample", "query", "answer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(inputs["pretrain"])
    why = [misfit(query, answer, tokenizer, params.template) for _, query, answer in qa.iter_rows()]
    judged = qa.with_columns(why=pl.Series(why, dtype=pl.String))
    fitting = judged.filter(pl.col("why").is_null()).select(
        "sample", "query", "answer", granularity=pl.lit(QA)
    )
    columns = ["sample", "granularity", "query", "answer"]
    both = pl.concat([behaviour.select(columns), fitting.select(columns)]).sort("sample", maintain_order=True)
    both.with_columns(answer_id=pl.col("answer").rank("dense").cast(pl.Int64) - 1).write_parquet(
        out / "pairs.parquet"
    )
    judged.filter(pl.col("why").is_not_null()).write_parquet(out / "left_out.parquet")
    progress(
        1, 1, f"{len(fitting)} pairs of D_qa beside {len(behaviour)}, {len(qa) - len(fitting)} do not fit"
    )

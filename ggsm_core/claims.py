"""What the paper says that this data can speak to, and how each sentence is measured.

A claim is quoted, a measurement belongs to it, and a verdict follows from the published tables by rule:

- better: "X is better than Y" for a family of pairs (``verdicts.judge``, Holm within the claim).
- marginal: the differences are smaller than ``SPAN``, the paper's whole span from causal to GG-SM:
  supported if every interval lies within it, contradicted if one lies wholly outside.
- steadier: a smaller spread over training seeds, by the F distribution of a ratio of variances.
- order: Kendall's tau with the paper's printed column; supported if its interval is above 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.stats import f as f_distribution

from ggsm_core import printed, story, verdicts
from ggsm_core.comparison import MEAN
from ggsm_core.data.tasks import DOMAINS, TASKS
from ggsm_core.evidence import Evidence, EvidenceError
from ggsm_core.params import ORACLE
from ggsm_core.printed import SPAN
from ggsm_core.verdicts import CONTRADICTED, NOT_SHOWN, SUPPORTED, UNMEASURED

Tables = Mapping[str, Evidence]
"""Profile -> its published tables."""
HYBRIDS = ("hybrid_mask", "hybrid_gq", "hybrid_mlp", "hybrid_segment")
MASKS = ("causal", *HYBRIDS, "bidirectional", "scheduler")
PRINTED = ("causal", *HYBRIDS[:3], "bidirectional", "scheduler", "ggsm")
"""The masks of Table 2."""
TRADITIONAL = ("msdp", "one4all", "cpc")
LANGUAGE = ("found", "instructue")
GRADIENT = "ggsm_embeddings_rank"
"""The variant whose weights differ most between tokens: what the controls are controls of."""
CONTROLS = ("ggsm_constant", "ggsm_random", "ggsm_shuffled", "ggsm_position", "ggsm_attention")
SPREAD_SEEDS = 5
"""So many seeds a claim about the spread over seeds needs."""
OF_PAPER = {task.stands_for.removeprefix("User "): task.name for task in TASKS}


class Measured(NamedTuple):
    """What was found: in words, as a number with its interval, on how many seeds."""

    what: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    seeds: int | None
    verdict: str


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper, where it stands, and its measurement."""

    where: str
    said: str  # "" where the paper says it with a table
    measure: Callable[[Tables], Measured]
    note: str = ""  # ours, outside the quotation marks: how the sentence is read here


def better(
    profile: str,
    pairs: Sequence[tuple[str, str]],
    tasks: Sequence[str] = (MEAN,),
    *,
    one_is_enough: bool = False,
    beside: tuple[str, str] | None = None,
) -> Callable[[Tables], Measured]:
    """Each pair's first row is better than its second on each of ``tasks``: one family.

    Shown is the pair that is least favourable for its uncertainty (most, if ``one_is_enough``), which is the
    one that decides, with its p after Holm's correction within the family, and what it all is worse than.
    ``beside`` is a pair that is told with it and decides nothing.
    """

    def measure(tables: Tables) -> Measured:
        planned = len(pairs) * len(tasks)
        if profile not in tables:
            return _nothing(f"results/{profile} is not published")
        table = verdicts.family(tables[profile], pairs, tasks)
        if table.is_empty():
            return _nothing(f"no row of it is in results/{profile}")
        width = (pl.col("ci_high") - pl.col("ci_low")).clip(lower_bound=1e-12)
        line = table.sort(pl.col("difference") / width, descending=one_is_enough).row(0, named=True)
        on = "" if line["task"] == MEAN else f" on {line['task']}"
        which = "most favourable" if one_is_enough else "least favourable"
        gap = f"{line['row']} − {line['reference']}{on}"
        what = f"{which} of {planned}: {gap}" if planned > 1 else gap
        lacking = planned - len(table)
        what += f"; p {line['p_holm']:.3f}"
        if planned > 1:
            worse = list(dict.fromkeys(table.filter(verdict="worse")["reference"]))
            what += f"; {verdicts.counted(table)}" + (f"; worse than {', '.join(worse)}" if worse else "")
        for other in verdicts.gaps(tables[profile], [beside] if beside else []).iter_rows(named=True):
            gap = story.signed(other["difference"], other["ci_low"], other["ci_high"])
            what += f"; beside it {other['row']} − {other['reference']}: {gap}"
        what += f"; {lacking} without numbers" if lacking else ""
        verdict = verdicts.judge(table, planned, one_is_enough=one_is_enough)
        return _of(what, line, verdict)

    return measure


def marginal(profile: str, pairs: Sequence[tuple[str, str]]) -> Callable[[Tables], Measured]:
    """No pair differs by more than ``SPAN``. The number shown is the largest difference."""

    def measure(tables: Tables) -> Measured:
        if profile not in tables:
            return _nothing(f"results/{profile} is not published")
        table = verdicts.family(tables[profile], pairs, (MEAN,))
        if table.is_empty():
            return _nothing(f"no row of it is in results/{profile}")
        line = table.sort(pl.col("difference").abs(), descending=True).row(0, named=True)
        outside = ((table["ci_low"] > SPAN) | (table["ci_high"] < -SPAN)).any()
        inside = verdicts.reach(table) <= SPAN and len(table) == len(pairs)
        verdict = CONTRADICTED if outside else SUPPORTED if inside else NOT_SHOWN
        what = f"largest of {len(table)}: {line['row']} − {line['reference']}, against ±{SPAN}"
        return _of(what, line, verdict)

    return measure


def steadier(profile: str, row: str, reference: str) -> Callable[[Tables], Measured]:
    """The mean AUC of ``row`` spreads less over training seeds than that of ``reference``.

    Below ``SPREAD_SEEDS`` seeds nothing is shown: two or three values may lie close by luck.
    """

    def measure(tables: Tables) -> Measured:
        found = tables.get(profile)
        if found is None or len(found.has(row, reference)) < 2:
            return _nothing(f"rows {row}, {reference} are not in results/{profile}")
        mean = found.auc.filter(pl.col("task") == MEAN)
        one, other = (mean.filter(pl.col("recipe") == name)["auc"].to_numpy() for name in (row, reference))
        if min(len(one), len(other)) < 2:
            return _nothing("one seed has no spread")
        ratio = float(one.std(ddof=1) / other.std(ddof=1))
        free = len(one) - 1, len(other) - 1
        low, high = (ratio / np.sqrt(f_distribution.ppf(q, *free)) for q in (0.975, 0.025))
        seeds = min(len(one), len(other))
        apart = SUPPORTED if high < 1 else CONTRADICTED if low > 1 else NOT_SHOWN
        verdict = apart if seeds >= SPREAD_SEEDS else NOT_SHOWN
        what = f"ratio of standard deviations over seeds, {row} / {reference}"
        return Measured(what, ratio, float(low), float(high), seeds, verdict)

    return measure


def ordered(profile: str, rows: Sequence[str] | None = None) -> Callable[[Tables], Measured]:
    """The rows (all that the paper prints, or ``rows``) stand in the paper's order."""

    def measure(tables: Tables) -> Measured:
        if profile not in tables:
            return _nothing(f"results/{profile} is not published")
        known = printed.by_row()
        chosen = {row: known[row] for row in rows or known}
        try:
            tau = verdicts.agreement(tables[profile], chosen)
        except EvidenceError as problem:
            return _nothing(str(problem))
        verdict = SUPPORTED if tau.ci_low > 0 else CONTRADICTED if tau.ci_high < 0 else NOT_SHOWN
        drawn = [row for row in tables[profile].has(*chosen) if row not in tables[profile].profile.unseeded]
        seeds = min((tables[profile].seeds[row] for row in drawn), default=1)
        what = f"Kendall's τ of {tau.n} rows"
        if ORACLE in tables[profile].has(*chosen) and tau.n > 3:
            less = verdicts.agreement(tables[profile], {k: v for k, v in chosen.items() if k != ORACLE})
            what += f"; without {ORACLE} {story.signed(less.tau, less.ci_low, less.ci_high, 2)}"
        return Measured(what, tau.tau, tau.ci_low, tau.ci_high, seeds, verdict)

    return measure


def _of(what: str, line: Mapping[str, float], verdict: str) -> Measured:
    return Measured(what, line["difference"], line["ci_low"], line["ci_high"], int(line["seeds"]), verdict)


def _nothing(why: str) -> Measured:
    return Measured(why, None, None, None, None, UNMEASURED)


def _over(row: str, references: Sequence[str]) -> list[tuple[str, str]]:
    return [(row, reference) for reference in references]


def _each(rows: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    return [(row, reference) for row in rows for reference in references]


CLAIMS = (
    Claim(
        "Abstract",
        "higher-quality bidirectional representations compared with causal, hybrid, and scheduler-only "
        "baselines",
        better("study", _over("ggsm", ("causal", *HYBRIDS, "scheduler"))),
    ),
    Claim(
        "Abstract",
        "more stable training",
        steadier("study", "ggsm", "scheduler"),
        "read as: its mean AUC depends less on the seed than that of the scheduler; the paper says it of "
        "causal and hybrid masks too, and shows curves of the loss",
    ),
    Claim(
        "Sec. 1",
        "the training transition from causal to bidirectional attention is a key factor affecting … "
        "representation quality",
        better("study", _each(("scheduler", "ggsm"), ("bidirectional",)), one_is_enough=True),
    ),
    Claim(
        "Sec. 2",
        "bidirectional masking yields the highest representational quality",
        better("study", _over("bidirectional", ("causal", *HYBRIDS))),
    ),
    Claim(
        "Sec. 6",
        "Standard Causal masks (Oracle) are too restrictive for representation tasks",
        better("study", _over("bidirectional", ("causal", ORACLE))),
        "read as: worse than an open mask, trained or not; our Oracle was pre-trained on the training pairs",
    ),
    Claim(
        "Table 2",
        "",
        better("study", [(mask, ORACLE) for mask in PRINTED]),
        "every trained mask is far above Oracle, the decoder before contrastive training; ours has learned "
        "the answers of the same pairs in pre-training, the paper's has not",
    ),
    Claim(
        "Sec. 6",
        "Hybrid strategies … provide only marginal gains",
        marginal("study", _each(HYBRIDS[:3], ("causal",))),
    ),
    Claim(
        "Sec. 6",
        "GG-SM outperforms both naive Bidirectional and Scheduler-based methods",
        better("study", _over("ggsm", ("bidirectional", "scheduler"))),
    ),
    Claim(
        "Sec. 6",
        "using instantaneous gradient norms as a dynamic signal for token importance",
        better("controls", _over(GRADIENT, CONTROLS)),
        "by rank within a sequence; as published, weights barely differ (chapter 11)",
    ),
    Claim(
        "Sec. 4",
        "during warmup … tokens that strongly influence the loss receive higher visibility",
        better("controls", [("ggsm", "ggsm_constant")]),
        "as published, against one half for every token",
    ),
    Claim(
        "Sec. 1",
        "a gradient-informed pre-warmup … leads to stronger final bidirectional representations",
        better("study", [("ggsm", "scheduler")]),
        "without a pre-warmup GG-SM is the scheduler",
    ),
    Claim(
        "Sec. 4",
        "To mitigate the effect of false negatives, we … introduce a mask factor",
        better("schedule", [(row, f"{row}_no_margin") for row in ("ggsm", "bidirectional")]),
        "margin mask on against off; who collapses without it keeps the AUC of the decoder (chapter 11)",
    ),
    Claim(
        "Sec. 6",
        "consistently outperforming massive general-purpose embeddings",
        better("study", [("ggsm", "minilm")], beside=(ORACLE, "minilm")),
        "here: a small one, MiniLM; massive ones need a hub",
    ),
    Claim(
        "Sec. 6",
        "a decisive performance gap between traditional user modeling and LLM-based approaches",
        better("study", _each(("ggsm", *LANGUAGE), TRADITIONAL)),
    ),
    Claim(
        "Sec. 6",
        "MSDP, One4all, and CPC excel in specific tasks like Achiev.",
        better("study", _each(TRADITIONAL, ("ggsm",)), (OF_PAPER["Achiev."],)),
    ),
    Claim(
        "Sec. 6",
        "they struggle with tasks requiring global contextual transfer, such as Food or Movie",
        better("study", _over("ggsm", TRADITIONAL), (OF_PAPER["Food"], OF_PAPER["Movie"])),
    ),
    Claim(
        "Sec. 6",
        "Comparing … against recent LLM-based baselines like FOUND and InstructUE, … GG-SM provides more "
        "consistent gains",
        better("study", _over("ggsm", LANGUAGE)),
    ),
    Claim(
        "Sec. 6",
        "As evidenced by the Behavior Preference results, … significantly sharper separation of user "
        "interests compared to static masking recipes",
        better(
            "study", _over("ggsm", ("causal", "hybrid_segment", "hybrid_gq", "bidirectional")), (DOMAINS[1],)
        ),
        "static: what is visible depends on neither gradient, content nor step",
    ),
    Claim(
        "Sec. 6",
        "its consistent lead across three distinct domains",
        better("study", _over("ggsm", (*MASKS, *TRADITIONAL, *LANGUAGE)), DOMAINS),
    ),
    Claim(
        "Sec. 6",
        "in the Marketing Sensitivity domain … GG-SM achieves peak AUC",
        better("study", _over("ggsm", (*MASKS, *TRADITIONAL, *LANGUAGE)), (DOMAINS[2],)),
    ),
    Claim(
        "Sec. 6",
        "captures more transferable user traits than manually engineered data augmentations or fixed "
        "architectural modifications",
        better("study_new_users", _over("ggsm", ("causal", *HYBRIDS, "bidirectional"))),
        "here: on households that no training has seen, against the fixed masks and the hybrids; rows with "
        "augmentations are not trained there",
    ),
    Claim(
        "Table 2",
        "",
        ordered("study", PRINTED),
        "the order of the masks, which lie within 0.0039",
    ),
    Claim("Table 2", "", ordered("study"), "the order of all rows"),
)


def audit(tables: Tables) -> pl.DataFrame:
    """Every claim with its measurement: claim, where, said, note and the fields of ``Measured``."""
    lines = [
        (number, one.where, one.said, one.note, *one.measure(tables))
        for number, one in enumerate(CLAIMS, start=1)
    ]
    types = (pl.Int64, *[pl.String] * 4, *[pl.Float64] * 3, pl.Int64, pl.String)
    columns = ("claim", "where", "said", "note", *Measured._fields)
    return pl.DataFrame(lines, schema=dict(zip(columns, types, strict=True)), orient="row")


def gradient_verdict(controls: Evidence, ablation: Evidence | None = None) -> str:
    """Markdown: whether weights from the gradient beat their controls, and by how much at most.

    With ``ablation`` in more words: also GG-SM as published against the other masks, and where it comes from.
    """
    table = verdicts.gaps(controls, _over(GRADIENT, CONTROLS))
    verdict = verdicts.judge(table, len(CONTROLS))
    if table.is_empty():
        told = "" if ablation is None else f" {controls.told()}"
        return f"**That the gradient matters: {verdict}.**{told}"
    fewest = table["seeds"].to_list()
    seeds = f"{min(fewest)} training seed{'s' if min(fewest) != 1 else ''}"
    said = [
        f"**That the gradient matters: {verdict}.** Weights from the gradient against {len(table)} of "
        f"{len(CONTROLS)} controls, on {seeds}: {verdicts.counted(table)}. "
        f"Their intervals, each for itself, lie within ±{verdicts.reach(table):.4f} of mean AUC, "
        f"{verdicts.reach(table) / SPAN:.1f} times the paper's whole span from causal to GG-SM."
    ]
    if ablation is None:
        return said[0]
    whole = verdicts.gaps(ablation, _over("ggsm", ("bidirectional", "scheduler", "causal")))
    for line in whole.iter_rows(named=True):
        gap = story.signed(line["difference"], line["ci_low"], line["ci_high"])
        said.append(f"- `ggsm` as published against `{line['reference']}`: {gap}, **{line['verdict']}**")
    return "\n".join([said[0], "", *said[1:], "", controls.told(), "", ablation.told()])

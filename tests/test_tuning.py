"""Tuning: the same budget for every row, and nothing of the probe period in any trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ggsm_core import params, tuning
from ggsm_core.params import PEERS, Profile, ProfileError, Tuned
from ggsm_core.runs import Store
from ggsm_core.stages import GRAPH, Plan

QUICK = Path(__file__).resolve().parents[1] / "params" / "quick.yaml"


def profile(**more: Any) -> Profile:
    return Profile.model_validate(params.load(QUICK).model_dump(mode="json") | more)


def configs(of: Profile, folder: Path) -> dict[str, dict[str, Any]]:
    return {node.label: node.config for node in Plan(GRAPH, of, Store(folder)).all()}


def test_no_trial_sees_the_probe_period_or_trains_on_who_it_probes(tmp_path: Path) -> None:
    asked = profile(baselines=["rfm", "minilm", *PEERS, "handmade+ggsm"], seeds=[3, 4])
    for pace in tuning.TRIALS:
        trial = tuning.validation(asked, pace)
        data = trial.data
        assert max(data.probe_anchors) + data.future_days <= min(asked.data.probe_anchors)
        assert set(data.probe_anchors) <= set(asked.data.train_anchors) and data.protocol == "new_users"
        assert trial.seeds == [3] and set(trial.baselines) == set(PEERS)
        assert trial.recipes == asked.recipes and trial.objective == asked.objective


def test_every_row_has_the_same_trials(tmp_path: Path) -> None:
    asked = profile(baselines=list(PEERS))
    rows = {*asked.recipes.active, *PEERS}
    assert len(set(map(str, tuning.TRIALS))) == len(tuning.TRIALS) and tuning.TRIALS[0] == Tuned()
    for pace in tuning.TRIALS:
        trial = tuning.validation(asked, pace)
        probed = {node.row for node in Plan(GRAPH, trial, Store(tmp_path)).of_stage("probe")}
        assert probed == rows and {name: trial.tuned[name] for name in rows} == dict.fromkeys(rows, pace)


def test_some_rows_alone_can_be_tuned(tmp_path: Path) -> None:
    asked = profile(baselines=list(PEERS))
    trial = tuning.validation(asked, tuning.TRIALS[1], ["ggsm", "cpc"])
    assert {node.row for node in Plan(GRAPH, trial, Store(tmp_path)).of_stage("probe")} == {"ggsm", "cpc"}
    with pytest.raises(tuning.TuningError, match="'rfm' is not trained"):
        tuning.validation(asked, tuning.TRIALS[1], ["rfm"])


def test_a_pace_reaches_its_row_and_no_other(tmp_path: Path) -> None:
    names = {"baselines": ["cpc", "found", "instructue"]}
    before = configs(profile(**names), tmp_path)
    pace = {"rate": 3.0}
    after = configs(profile(**names, tuned={"ggsm": pace, "cpc": pace, "instructue": pace}), tmp_path)
    touched = {label for label in before if before[label] != after[label]}
    own = {f"{stage}-ggsm-s0" for stage in ("contrast", "embed", "probe")}
    own |= {"sequence-cpc-s0", "probe-cpc-s0", "language-instructue-s0", "probe-instructue-s0", "compare"}
    assert touched == own
    for label, section in (("contrast-ggsm-s0", "training"), ("sequence-cpc-s0", "peers")):
        old, new = (one[label]["sections"][section]["learning_rate"] for one in (before, after))
        assert new == pytest.approx(old * 3.0)


def test_a_variant_keeps_the_pace_of_its_recipe(tmp_path: Path) -> None:
    asked = profile(
        variants={"mine": {"recipe": "ggsm", "options": {"normalise": "rank"}}}, tuned={"ggsm": {"rate": 3.0}}
    )
    both = configs(asked, tmp_path)
    assert both["contrast-mine-s0"]["sections"] == both["contrast-ggsm-s0"]["sections"]


def test_the_best_trial_is_chosen_and_the_first_of_equals() -> None:
    trials = pl.DataFrame(
        {
            "row": ["ggsm", "cpc", "ggsm", "cpc"],
            "rate": [1.0, 1.0, 3.0, 3.0],
            "auc": [0.7, 0.6, 0.8, 0.6],
        }
    )
    chosen = tuning.choose(trials)
    assert chosen["chosen"].to_list() == [False, True, True, False]
    assert tuning.as_yaml(chosen) == "tuned:\n  ggsm: {rate: 3.0}"
    assert tuning.as_yaml(chosen.filter(pl.col("row") == "cpc")) == "tuned: {}"


def test_rows_tuned_later_stand_beside_the_earlier_ones(tmp_path: Path) -> None:
    def trials(row: str, *auc: float) -> pl.DataFrame:
        table = {"row": row, "rate": [1.0, 0.2], "auc": auc, "run": "probe", "commit": "c"}
        return tuning.choose(pl.DataFrame(table))

    out = tmp_path / "tuning.csv"
    assert tuning.merged(trials("ggsm", 0.7, 0.6), out).height == 2
    pl.concat([trials("ggsm", 0.7, 0.6), trials("cpc", 0.5, 0.6)]).write_csv(out)
    both = tuning.merged(trials("ggsm", 0.6, 0.8), out)
    assert both.filter("chosen").select("row", "rate").rows() == [("cpc", 0.2), ("ggsm", 0.2)]
    assert both.height == 4


def test_nothing_to_tune_on_is_named() -> None:
    data = params.load(QUICK).data.model_dump() | {"train_anchors": [200, 210]}
    with pytest.raises(tuning.TuningError, match="probe, 210"):
        tuning.validation(profile(data=data), Tuned())


@pytest.mark.parametrize("tuned", [{"rfm": {}}, {"ggsm": {"rate": 0.0}}])
def test_a_pace_that_can_not_be_is_refused(tuned: Any, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "extends": str(QUICK), "tuned": tuned}))
    with pytest.raises(ProfileError, match=r"tuned"):
        params.load(path)

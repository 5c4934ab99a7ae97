"""Profiles: what is wrong is refused before anything runs, naming field, value and what is allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ggsm_core import params
from ggsm_core.params import Profile, ProfileError
from ggsm_core.template import MODALITIES

ROOT = Path(__file__).resolve().parents[1]
PROFILES = sorted((ROOT / "params").glob("*.yaml"))


def load(folder: Path, raw: Any) -> Profile:
    path = folder / "mine.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return params.load(path)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_loads_and_is_named_after_its_file(path: Path) -> None:
    assert params.load(path).name == path.stem


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"name": "mine", "trainin": {}}, ["trainin", "unknown", "training"]),
        ({"name": "mine", "training": {"stepz": 3}}, ["training.stepz", "3", "total_steps"]),
        (
            {"name": "mine", "recipes": {"ggsm": {"warmsteps": 3}}},
            ["recipes.ggsm.warmsteps", "3", "warm_steps"],
        ),
        ({"name": "mine", "recipes": {"gg_sm": {}}}, ["recipes.gg_sm", "ggsm"]),
        ({"name": "mine", "training": {"total_steps": "60"}}, ["training.total_steps", "'60'", "integer"]),
        ({"name": "mine", "training": {"total_steps": 60.5}}, ["training.total_steps", "60.5", "integer"]),
        ({"name": "mine", "training": {"total_steps": True}}, ["training.total_steps", "True", "integer"]),
        ({"name": "mine", "training": {"total_steps": 0}}, ["training.total_steps", "0", "1"]),
        ({"name": "mine", "training": {"total_steps": 6}}, ["warm_steps", "6", "total_steps"]),
        (
            {"name": "mine", "recipes": {"ggsm": {"warm_steps": 60}}},
            ["recipes.ggsm.warm_steps", "60", "below"],
        ),
        ({"name": "mine", "recipes": {"ggsm": {"grad_site": "layer:4"}}}, ["grad_site", "layer:4", "0 to 3"]),
        ({"name": "mine", "recipes": {"ggsm": {"grad_site": "middle"}}}, ["grad_site", "middle", "layer"]),
        ({"name": "mine", "recipes": {"ggsm": {"normalise": "softmax"}}}, ["normalise", "softmax", "zscore"]),
        ({"name": "mine", "lora": {"targets": ["q_proj", "c_attn"]}}, ["lora", "c_attn", "gate_proj"]),
        ({"name": "mine", "backbone": {"hidden": 100, "heads": 8}}, ["hidden", "100", "16"]),
        ({"name": "mine", "backbone": {"kind": "pretrained"}}, ["path", "None", "pretrained"]),
        ({"name": "mine", "backbone": {"kind": "smollm2"}}, ["pretraining", "smollm2", "null"]),
        ({"name": "mine", "data": {"probe_anchors": [200]}}, ["train_anchors", "210", "170"]),
        ({"name": "mine", "objective": {"margin": None, "margin_from": 5}}, ["margin_from", "margin"]),
        ({"name": "mine", "objective": {"margin_from": 60}}, ["margin_from", "60", "never acts"]),
        (
            {"name": "mine", "data": {"households": 40}, "training": {"batch_size": 201}},
            ["training.batch_size = 201", "data gives 200"],
        ),
        (
            {
                "name": "mine",
                "synthesis": {"scaled": 50, "pairs_per_user": 5},
                "training": {"qa_share": 0.5, "batch_size": 11},
            },
            ["training.batch_size = 11", "synthesis gives 10"],
        ),
        ({"name": "mine", "objective": {"temperature": float("inf")}}, ["objective.temperature", "finite"]),
        ({"name": "mine", "template": {"max_answer_tokens": 97}}, ["max_answer_tokens", "97", "96"]),
        (
            {"name": "mine", "backbone": {"kind": "smollm2"}, "pretraining": None, "baselines": ["records"]},
            ["baselines", "records", "smollm2"],
        ),
        ({"name": "mine", "variants": {"a": {"recipe": "ggsm", "foo": 1}}}, ["variants.a.foo", "options"]),
        ({"name": "mine", "tuned": {"ggsm": {"foo": 1}}}, ["tuned.ggsm.foo", "rate"]),
        ({"name": "mine", "tuned": {"ggsm": {"rate": float("inf")}}}, ["tuned.ggsm.rate", "inf"]),
        ({"name": "mine", "seeds": []}, ["seeds", "at least 1"]),
        ({"name": "mine", "seeds": [0, -1]}, ["seeds.1", "-1"]),
        ({"name": "mine", "seeds": [10**26]}, ["seeds.0"]),
        ({"name": "mine", "seeds": [3, 4, 3]}, ["seeds", "3", "twice"]),
        ({"name": "mine", "baselines": ["rfm", "rfm"]}, ["baselines", "'rfm'", "twice"]),
        ({"name": "mine", "data": {"households": 40}, "evaluation": {"folds": 41}}, ["folds", "41 of 40"]),
        ({"name": "mine", "synthesis": {"budget_dollars": 5.0}}, ["budget_dollars: 5", "prompt_price", "0"]),
        ({"name": "mine", "data": {"train_anchors": [90, 90]}}, ["train_anchors", "twice"]),
        ({"name": "mine", "template": dict.fromkeys(MODALITIES, 0)}, ["template", "all 0"]),
        ({"name": "mine", "template": {"bill": 100}}, ["template.bill", "100", "64"]),
        ({"name": "mine", "synthesis": {"records": 100}}, ["synthesis.records", "100", "64"]),
        ({"name": "mine", "pairs": {"granularities": []}}, ["pairs.granularities", "at least 1"]),
        ({"name": "mine", "evaluation": {"bootstrap": 10**12}}, ["evaluation.bootstrap", "100000"]),
        (
            "name: mine\ntraining: {batch_size: 8}\nseeds: [0]\ntraining: {}\n",
            ["'training'", "line 4", "second"],
        ),
        ("name: mine\nseeds: [2017-13-45]\n", ["not YAML", "month"]),
        ({"name": "My Profile"}, ["name", "My Profile"]),
        ({}, ["name"]),
        ("- a\n- b\n", ["mapping", "list"]),
        ("name: [\n", ["not YAML"]),
        ({"name": "mine", "extends": "nowhere.yaml"}, ["nowhere.yaml", "no such profile"]),
        ({"name": "mine", "extends": "mine.yaml"}, ["extends itself"]),
    ],
)
def test_what_can_not_be_honoured_is_refused(tmp_path: Path, raw: Any, words: list[str]) -> None:
    with pytest.raises(ProfileError) as problem:
        load(tmp_path, raw)
    missing = [word for word in words if word not in str(problem.value)]
    assert not missing, str(problem.value)


def test_a_profile_states_only_what_differs(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({"name": "base", "training": {"total_steps": 80, "batch_size": 8}})
    )
    child = load(
        tmp_path,
        {"extends": "base.yaml", "name": "mine", "training": {"batch_size": 16}, "recipes": {"ggsm": None}},
    )
    assert (child.training.total_steps, child.training.batch_size) == (80, 16)
    assert "ggsm" not in child.recipes.active and "causal" in child.recipes.active


def test_the_refusal_comes_before_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: bad\ntraining:\n  total_step: 3\n")
    done = subprocess.run(
        [sys.executable, "-m", "ggsm_core.pipeline", "--profile", str(path)],
        cwd=ROOT,
        env=os.environ | {"GGSM_RUNS": str(tmp_path / "runs")},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and not (tmp_path / "runs").exists() and not (ROOT / "build" / "bad").exists()
    assert "training.total_step" in done.stderr and "Traceback" not in done.stderr


def test_make_params_prints_every_field_with_its_meaning() -> None:
    lines = params.describe(params.load(ROOT / "params" / "quick.yaml"))
    assert len(lines) > 50
    # A whole section that is switched off has no field to explain.
    assert all("  # " in line for line in lines if not line.endswith(": null"))
    assert any("learning_rate" in line for line in lines) and any("[steps]" in line for line in lines)


@settings(deadline=None, max_examples=30)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda s: st.dictionaries(st.text(max_size=5), s, max_size=3),
    )
)
def test_no_content_makes_it_fall_over(tmp_path_factory: pytest.TempPathFactory, raw: Any) -> None:
    try:
        load(tmp_path_factory.mktemp("profile"), {"name": "mine", "training": raw})
    except ProfileError:
        pass


@pytest.mark.parametrize(
    ("options", "training", "words"),
    [
        ({"source": "random", "warm_steps": 30}, {"checkpoint_every": 20}, "draws anew after a resume"),
        ({"source": "shuffled", "freeze": "tower"}, {}, "draws anew after a resume"),
        ({"source": "random"}, {"micro_batch": 8}, "needs the whole batch"),
        ({"source": "position"}, {"micro_batch": 8}, "needs the whole batch"),
    ],
)
def test_a_control_that_could_not_be_honoured_is_refused(
    options: dict[str, Any], training: dict[str, Any], words: str
) -> None:
    quick = params.load(ROOT / "params" / "quick.yaml").model_dump()
    variant = {"recipe": "ggsm", "options": options, "training": training}
    with pytest.raises(ValueError, match=rf"variants\.one\.options\.source: {options['source']} {words}"):
        params.Profile.model_validate(quick | {"variants": {"one": variant}})
    allowed = variant | {"options": options | {"source": "gradient"}}
    assert params.Profile.model_validate(quick | {"variants": {"one": allowed}})


def test_the_oracle_of_a_published_decoder_has_seeds() -> None:
    """Its adapters are drawn; those of a decoder made here are trained before, and text needs none."""
    quick, gpu = (params.load(ROOT / "params" / f"{name}.yaml") for name in ("quick", "gpu"))
    text = gpu.model_copy(update={"template": gpu.template.model_copy(update={"modality_input": "text"})})
    assert [params.ORACLE in profile.unseeded for profile in (quick, gpu, text)] == [True, False, True]
    assert set(quick.unseeded) - set(gpu.unseeded) == {params.ORACLE}

"""One recipe under several mixes of D_behavior and D_qa, as rows of one table.

Each share is the profile with another ``training.qa_share``, so its runs are cached like all others; the
table is made by the comparison itself, with the plain rows that it measures against.

    python -m ggsm_core.mixes --profile params/quick.yaml --recipe ggsm --shares 0 0.25 0.5
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

from ggsm_core import comparison, params, provenance, runs
from ggsm_core.jobs import exit_status
from ggsm_core.params import Profile


def variants(profile: Profile, shares: Iterable[float]) -> dict[float, Profile]:
    """Share of D_qa -> the profile with that share, checked as any other profile."""
    dump = profile.model_dump(mode="json")
    return {
        share: Profile.model_validate(dump | {"training": dump["training"] | {"qa_share": float(share)}})
        for share in shares
    }


def row(recipe: str, share: float) -> str:
    """The name of a mix in the table: ``ggsm qa 25 %``."""
    return f"{recipe} qa {share:.0%}".replace("%", " %")


def compare(profile: Profile, recipe: str, shares: Sequence[float], out: Path) -> None:
    """Train, probe and compare; writes auc.csv and differences.csv of stage ``compare`` into ``out``.

    The rows of ``comparison.REFERENCES`` that the profile has stand beside the mixes, trained without D_qa.
    """
    plain = variants(profile, [0.0])[0.0]
    inputs = {"windows": runs.ensure(plain, "windows").folder}
    for name in comparison.REFERENCES:
        if name in plain.baselines:
            inputs[f"baseline:{name}"] = runs.ensure(plain, "baseline", name).folder
        elif name in plain.recipes.active:
            for seed in plain.seeds:
                inputs[f"probe:{name}:{seed}"] = runs.ensure(plain, "probe", name, seed).folder
    for share, variant in variants(profile, shares).items():
        for seed in variant.seeds:
            inputs[f"probe:{row(recipe, share)}:{seed}"] = runs.ensure(variant, "probe", recipe, seed).folder
    out.mkdir(parents=True, exist_ok=True)
    comparison.run(
        SimpleNamespace(evaluation=profile.evaluation), inputs, out, lambda done, total, what: None
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ggsm_core.mixes",
        description="Compare mixes of behaviour pairs and synthesised pairs.",
    )
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--recipe", default="ggsm")
    parser.add_argument("--shares", type=float, nargs="+", required=True, help="of D_qa, each in [0, 1)")
    arguments = parser.parse_args(argv)

    def action() -> int:
        profile = params.load(arguments.profile)
        out = provenance.ROOT / "build" / profile.name / "mixes"
        compare(profile, arguments.recipe, arguments.shares, out)
        print(f"{out.relative_to(provenance.ROOT)}/auc.csv and differences.csv: a row for each mix")
        return 0

    return exit_status(action)


if __name__ == "__main__":
    sys.exit(main())

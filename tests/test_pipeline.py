"""The scheduler, the notebooks and the book, on the toy graph; and the notebooks in git."""

from __future__ import annotations

import html
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import published
import pytest
import yaml
from toygraph import Toy, small

from ggsm_core import notebooks, pipeline, provenance
from ggsm_core.notebooks import NotebookError
from ggsm_core.params import RECIPE_NAMES, Profile
from ggsm_core.scheduler import Job, JobFailed, Scheduler

ROOT = Path(__file__).resolve().parents[1]


def job(folder: Path, name: str, code: str, *, needs: Iterable[str] = (), **more: Any) -> Job:
    return Job(
        name,
        name,
        [sys.executable, "-c", code],
        folder / f"{name}.json",
        folder / f"{name}.log",
        frozenset(needs),
        **more,
    )


def nap(folder: Path, name: str, seconds: float) -> str:
    return f"import time; open({str(folder / 'order.txt')!r}, 'a').write('{name} '); time.sleep({seconds})"


def test_jobs_run_after_their_needs_and_the_longest_chain_first(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "short", nap(tmp_path, "short", 0.3), seconds=1),
        job(tmp_path, "last", nap(tmp_path, "last", 0), needs={"first"}, seconds=50),
        job(tmp_path, "first", nap(tmp_path, "first", 0.3), seconds=1),
    ]
    Scheduler(jobs, 1, tmp_path, lambda line: None).run()
    assert (tmp_path / "order.txt").read_text().split() == ["first", "last", "short"]


def test_as_many_at_a_time_as_there_are_workers(tmp_path: Path) -> None:
    """Four wait until all four are there; three that need all workers find nobody else."""
    meet = (
        "import pathlib, time; folder = pathlib.Path({folder!r}); (folder / 'meet-{i}').touch()\n"
        "end = time.monotonic() + 120\n"
        "while len(list(folder.glob('meet-*'))) < 4:\n"
        "    assert time.monotonic() < end; time.sleep(0.02)"
    )
    few = [job(tmp_path, f"j{i}", meet.format(folder=str(tmp_path), i=i)) for i in range(4)]
    Scheduler(few, 4, tmp_path, lambda line: None).run()
    alone = (
        f"import os, time; path = {str(tmp_path / 'busy')!r}\n"
        "os.close(os.open(path, os.O_CREAT | os.O_EXCL)); time.sleep(0.3); os.unlink(path)"
    )
    wide = [job(tmp_path, f"w{i}", alone, threads=4) for i in range(3)]
    Scheduler(wide, 4, tmp_path, lambda line: None).run()


def test_lines_of_progress_say_how_far_and_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggsm_core.scheduler.EVERY", 0.3)
    code = (
        "import json, sys, time\nfor i in range(1, 5):\n"
        "    report = json.dumps(dict(done=i, total=4, message=f'step {i}'))\n"
        f"    open({str(tmp_path / 'long.json')!r}, 'w').write(report)\n"
        "    time.sleep(0.4)"
    )
    lines: list[str] = []
    after = job(tmp_path, "after", "", needs={"long"}, seconds=2)
    Scheduler([job(tmp_path, "long", code, seconds=2), after], 2, tmp_path, lines.append).run()
    assert any("25% done, 0 of 2 steps whole" in line and "long 50% (step 2)" in line for line in lines)
    assert all("left; now:" in line or "whole: " in line for line in lines)
    assert len(lines) >= 5 and not any(str(tmp_path) in line for line in lines)


def test_the_first_failure_ends_the_rest(tmp_path: Path) -> None:
    jobs = [
        job(
            tmp_path,
            "bad",
            "import pathlib, time\n"
            f"while not pathlib.Path({str(tmp_path / 'pid')!r}).exists(): time.sleep(0.05)\n"
            "raise RuntimeError('no')",
        ),
        job(
            tmp_path,
            "slow",
            f"import os, time; path = {str(tmp_path / 'pid')!r}\n"
            "open(path + '~', 'w').write(str(os.getpid())); os.rename(path + '~', path); time.sleep(600)",
        ),
        job(tmp_path, "after", nap(tmp_path, "after", 0), needs={"bad"}),
    ]
    with pytest.raises(JobFailed, match=r"bad failed(.|\n)*RuntimeError: no"):
        Scheduler(jobs, 2, tmp_path, lambda line: None).run()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not (tmp_path / "order.txt").exists()


def test_children_use_their_share_of_the_cores_and_no_launchers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code = f"import os, json; open({str(tmp_path / 'env.json')!r}, 'w').write(json.dumps(dict(os.environ)))"
    Scheduler([job(tmp_path, "one", code, threads=8)], 2, tmp_path, lambda line: None).run()
    seen = json.loads((tmp_path / "env.json").read_text())
    assert seen["OMP_NUM_THREADS"] == "2" and not seen.keys() & {"WORLD_SIZE", "RANK"}


# ------------------------------------------------------------------------------ notebooks


def write_notebook(
    path: Path,
    *cells: str,
    recipes: Any = (),
    baselines: Any = (),
    parameters: bool = True,
    **declared: Any,
) -> Path:
    """A notebook with a heading, the parameters cell, and these code cells."""
    first = {
        "cell_type": "code",
        "source": 'profile = "params/quick.yaml"',
        "metadata": {"tags": ["parameters"] if parameters else []},
    }
    code = [{"cell_type": "code", "source": source, "metadata": {}} for source in cells]
    for cell in [first, *code]:
        cell |= {"outputs": [], "execution_count": None}
    content = {
        "cells": [{"cell_type": "markdown", "source": f"# {path.stem}", "metadata": {}}, first, *code],
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "ggsm": {
                "recipes": recipes if recipes == "all" else list(recipes),
                "baselines": baselines if baselines == "all" else list(baselines),
                **declared,
            },
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    for number, cell in enumerate(content["cells"]):
        cell["id"] = f"c{number}"  # type: ignore[index]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def key_of(toy: Toy, profile: Profile | None = None) -> str:
    (page,) = notebooks.discover(toy.folder / "notebooks")
    return notebooks.key(page, toy.plan(profile))


def with_recipes(**options: Any) -> Profile:
    return small(recipes=small().recipes.model_dump() | options)


def test_a_notebooks_key_covers_what_it_declares_and_nothing_else(toy: Toy) -> None:
    path = toy.folder / "notebooks" / "04_ggsm.ipynb"
    write_notebook(path, "from ggsm_core import masks", recipes=["ggsm"])
    key = key_of(toy)
    assert key_of(toy, with_recipes(bidirectional={})) == key  # another recipe
    assert key_of(toy, small(baselines=[])) == key
    assert key_of(toy, with_recipes(ggsm={"warm_steps": 3})) != key
    assert key_of(toy, small(evaluation={"bootstrap": 200})) != key
    assert (
        key_of(toy, small(objective={"margin": None})) != key
    )  # it may show a field that no toy stage reads
    toy.edit("shared.py", "2 * x", "3 * x")
    assert key_of(toy) != key
    toy.edit("shared.py", "3 * x", "2 * x")
    assert key_of(toy) == key
    folded = json.loads(path.read_text(encoding="utf-8"))
    folded["cells"][-1]["metadata"] = {"tags": ["hide-cell"]}  # the page shows it otherwise
    path.write_text(json.dumps(folded), encoding="utf-8")
    assert key_of(toy) != key
    write_notebook(path, "from ggsm_core import loss", recipes=["ggsm"])
    assert key_of(toy) != key


def test_modules_named_in_cells_and_commands_count(toy: Toy) -> None:
    path = write_notebook(
        toy.folder / "notebooks" / "01_a.ipynb", "%matplotlib inline\nfrom ggsm_core.masks import causal",
        "!python -m ggsm_core.training --profile x", "# nothing",
    )  # fmt: skip
    (page,) = notebooks.discover(path.parent)
    assert {"ggsm_core.masks", "ggsm_core.training"} <= page.modules()


def test_a_notebook_may_read_what_it_declares(toy: Toy) -> None:
    write_notebook(toy.folder / "notebooks" / "01_a.ipynb", recipes=["ggsm", "scheduler"])
    write_notebook(toy.folder / "notebooks" / "02_b.ipynb", recipes="all", baselines="all")
    one, every = notebooks.discover(toy.folder / "notebooks")
    assert [node.label for node in one.reads(toy.plan())] == ["windows", "contrast-ggsm-s0", "probe-ggsm-s0"]
    assert "compare" in [node.label for node in every.reads(toy.plan())]


@pytest.mark.parametrize(
    ("ggsm", "words"),
    [
        (None, "metadata.ggsm"),
        ({"recipes": []}, "metadata.ggsm"),
        ({"recipes": ["ggsmm"], "baselines": []}, "ggsmm"),
        ({"recipes": [], "baselines": [], "stages": ["tokens"]}, "stages.*synthesis"),
        ({"recipes": [], "baselines": [], "results": ["quick"]}, "results.*study"),
    ],
)
def test_a_bad_declaration_is_refused(tmp_path: Path, ggsm: Any, words: str) -> None:
    path = write_notebook(tmp_path / "01_a.ipynb")
    content = json.loads(path.read_text())
    content["metadata"]["ggsm"] = ggsm
    path.write_text(json.dumps(content))
    with pytest.raises(NotebookError, match=rf"01_a\.ipynb.*{words}"):
        notebooks.discover(tmp_path)


def test_a_notebook_that_the_profile_would_not_reach_is_refused(tmp_path: Path) -> None:
    write_notebook(tmp_path / "01_a.ipynb", parameters=False)
    with pytest.raises(NotebookError, match="parameters"):
        notebooks.discover(tmp_path)


@pytest.mark.parametrize(
    ("output", "fit"),
    [
        (
            {
                "output_type": "stream",
                "name": "stdout",
                "text": ["fine 1/2 and/or https://example.org/home/x"],
            },
            True,
        ),
        ({"output_type": "stream", "name": "stderr", "text": "warning"}, False),
        ({"output_type": "stream", "name": "stdout", "text": "wrote /tmp/x.csv"}, False),
        ({"output_type": "stream", "name": "stdout", "text": f"wrote {ROOT}/x"}, False),
        ({"output_type": "execute_result", "data": {"text/plain": ["PosixPath('/home/somebody/x')"]}}, False),
        (
            {"output_type": "display_data", "data": {"image/png": "aa/tmp/bb", "text/plain": ["<Figure>"]}},
            True,
        ),
        ({"output_type": "display_data", "data": {"text/html": "<table><tr><td>1</td></tr></table>"}}, True),
    ],
)
def test_what_a_page_may_not_show_is_found(output: dict[str, Any], fit: bool) -> None:
    content = {"cells": [{"source": "# note\nshow(x)", "outputs": [output]}]}
    problems = list(notebooks.unfit(content, (str(ROOT),)))
    assert (not problems) == fit
    assert all("cell 0 ('show(x)')" in problem for problem in problems)


@pytest.fixture
def project(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A whole project around the toy graph: notebooks, prose, profile."""
    monkeypatch.setattr(provenance, "ROOT", toy.folder)
    monkeypatch.setattr(pipeline, "GRAPH", toy.graph)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(toy.folder), str(ROOT)]))
    monkeypatch.setenv("GGSM_RUNS", str(toy.folder / "runs"))
    (toy.folder / "params").mkdir()
    (toy.folder / "params" / "toy.yaml").write_text(yaml.safe_dump(small().model_dump(mode="json")))
    write_notebook(
        toy.folder / "notebooks" / "01_first.ipynb",
        "from ggsm_core import params\nprint(params.load(profile).recipes.active)",
        recipes=["ggsm"],
    )
    book = toy.folder / "book"
    book.mkdir()
    (book / "_config.yml").write_text(
        "title: Toy\nauthor: nobody\nexecute:\n  execute_notebooks: 'off'\nonly_build_toc_files: true\n"
    )
    (book / "_toc.yml").write_text(
        "format: jb-book\nroot: intro\nchapters:\n- file: notebooks/01_first\n- file: status\n- file: api\n"
    )
    (book / "intro.md").write_text("# Toy\n\n![AUC of all rows](_static/result.png)\n")
    for name in ("status", "api"):  # what every page links to
        (book / f"{name}.md").write_text(f"# {name}\n\nNothing.\n")
    return toy


def make(project: Toy, target: str = "book") -> list[str]:
    lines: list[str] = []
    pipeline.make(project.folder / "params" / "toy.yaml", target, lines.append)
    return lines


def test_the_book_is_made_once_and_again_only_where_something_changed(project: Toy) -> None:
    make(project)
    pages = project.folder / "build" / "toy" / "book" / "_build" / "html"
    page = (pages / "notebooks" / "01_first.html").read_text()
    assert "['ggsm']" in html.unescape(re.sub(r"<[^>]*>", "", page))  # what it declares and no other
    assert "injected" not in page and ".keys" not in page
    told = json.loads((project.folder / "results" / "toy" / "provenance.json").read_text())
    assert len(told["runs"]) == 7 and told["data"] and told["params"] and told["machine"]["cores"]
    assert (project.folder / "results" / "toy" / "auc.csv").read_text().count("\n") == 4
    assert (pages / "_images" / "result.png").stat().st_size > 1000  # the page shows this build's own results

    def made() -> tuple[dict[Path, bytes], dict[Path, int]]:
        files = [path for path in (project.folder / "results").rglob("*") if path.is_file()]
        written = {path: path.stat().st_mtime_ns for path in pages.rglob("*.html")}
        return {path: path.read_bytes() for path in files}, written

    before = made()
    lines = make(project)
    assert "whole and current" in lines[0] and not any("steps to make" in line for line in lines)
    assert made() == before

    (project.folder / "book" / "intro.md").write_text("# Toy\n\nA better page.\n")
    lines = make(project)
    assert [line.split("] ")[-1].split(" (")[0] for line in lines if "whole: " in line] == ["whole: book"]
    assert "better" in (pages / "intro.html").read_text()


def test_a_warning_fails_the_book_and_fails_it_again(project: Toy) -> None:
    (project.folder / "book" / "intro.md").write_text("# Toy\n\n[nowhere](nowhere.md)\n\n{ref}`nothing`\n")
    for _ in range(2):
        with pytest.raises(JobFailed, match="book failed"):
            make(project)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("toy", {"recipes": dict.fromkeys(RECIPE_NAMES), "baselines": []}, "not one row"),
        ("mine", {"training": {"learning_rate": 0.5}}, "'toy' is that of params/toy.yaml"),
    ],
)
def test_a_profile_that_would_mislead_is_refused(project: Toy, name: str, change: Any, words: str) -> None:
    raw = small().model_dump(mode="json") | change
    (project.folder / "params" / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=words):
        pipeline.make(project.folder / "params" / f"{name}.yaml", "results", print)


def test_a_failed_cell_is_named_and_earlier_outputs_stay(project: Toy) -> None:
    write_notebook(
        project.folder / "notebooks" / "01_first.ipynb",
        "print('earlier')",
        "# a comment\nvalue = 1 / 0",
        "print('later')",
    )
    with pytest.raises(JobFailed) as problem:
        make(project)
    message = str(problem.value)
    assert "01_first.ipynb, cell 3 ('value = 1 / 0') failed: ZeroDivisionError" in message
    folder = project.folder / "build" / "toy" / "notebooks"
    kept = (folder / "01_first.ipynb").read_text()
    assert "earlier\\n" in kept and "later\\n" not in kept
    assert "ZeroDivisionError" in (folder / "01_first.log").read_text()
    assert not (project.folder / "build" / "toy" / "book").exists()


def test_a_notebook_that_writes_to_stderr_is_refused(project: Toy) -> None:
    write_notebook(
        project.folder / "notebooks" / "01_first.ipynb", "import warnings\nwarnings.warn('beware')"
    )
    with pytest.raises(JobFailed, match=r"01_first\.ipynb: cell 3 .* wrote to stderr: .*beware"):
        make(project, "notebooks")


def test_a_book_that_would_execute_notebooks_itself_is_refused(project: Toy) -> None:
    (project.folder / "book" / "_config.yml").write_text("title: Toy\nexecute:\n  execute_notebooks: force\n")
    with pytest.raises(ValueError, match=r"execute_notebooks is 'force'"):
        make(project)


@pytest.fixture
def study(project: Toy) -> Toy:
    """The project with a published study, and a page that reads nothing else."""
    profile = small(name="study").model_dump(mode="json")
    (project.folder / "params" / "study.yaml").write_text(yaml.safe_dump(profile))
    published.publish(project.folder, "study", {"causal": 1, "ggsm": 2, "oracle": 1})
    second = write_notebook(
        project.folder / "notebooks" / "02_second.ipynb", "print([2 * 21])", results=["study"]
    )
    content = json.loads(second.read_text())
    content["cells"][0]["source"] += '\n\nAs in "the [first\nchapter](01_first.ipynb)" it says.'
    second.write_text(json.dumps(content))
    toc = project.folder / "book" / "_toc.yml"
    toc.write_text(toc.read_text() + "- file: notebooks/02_second\n")
    (project.folder / "book" / "intro.md").write_text(
        "# Toy\n\n[The first](notebooks/01_first.ipynb), [the second](notebooks/02_second.ipynb).\n"
    )
    return project


def test_a_published_book_is_made_from_its_tables_without_a_run(study: Toy) -> None:
    before = {path: path.read_bytes() for path in (study.folder / "results").rglob("*.*")}
    lines: list[str] = []
    pipeline.make(study.folder / "params" / "study.yaml", "book", lines.append)
    assert not list((study.folder / "runs").glob("[!.]*"))
    assert before == {path: path.read_bytes() for path in (study.folder / "results").rglob("*.*")}
    pages = study.folder / "build" / "study" / "book" / "_build" / "html"
    assert not (pages / "notebooks" / "01_first.html").exists()
    page = (pages / "notebooks" / "02_second.html").read_text()
    assert "42" in page and "first\nchapter” it says" in page
    intro = (pages / "intro.html").read_text()
    assert "The first, <a" in intro and 'href="notebooks/02_second.html"' in intro
    make(study)  # the other book has both
    html = study.folder / "build" / "toy" / "book" / "_build" / "html" / "notebooks"
    assert {path.name for path in html.glob("0*.html")} == {"01_first.html", "02_second.html"}


def test_a_published_book_without_its_tables_says_how_to_get_them(study: Toy) -> None:
    (study.folder / "results" / "study" / "rows.csv").unlink()
    with pytest.raises(ValueError, match=r"results/study/rows\.csv is missing; publish it again: `\.venv"):
        pipeline.make(study.folder / "params" / "study.yaml", "book", print)


def test_a_page_follows_the_tables_that_it_reads(study: Toy) -> None:
    first, second = notebooks.discover(study.folder / "notebooks")
    assert (first.published, second.published) == (False, True)
    assert second.reads(study.plan()) == []
    keys = [notebooks.key(page, study.plan()) for page in (first, second)]
    with (study.folder / "results" / "study" / "labels.csv").open("a") as file:
        file.write("ggsm,1,mean,1.0,0.7,10\n")
    assert notebooks.key(first, study.plan()) == keys[0]
    assert notebooks.key(second, study.plan()) != keys[1]


def test_results_alone(project: Toy) -> None:
    make(project, "results")
    assert (project.folder / "results" / "toy" / "auc.csv").exists()
    assert not list((project.folder / "build" / "toy").rglob("*.ipynb"))


# --------------------------------------------------------------------------------- in git


def test_every_notebook_declares_what_it_reads() -> None:
    assert len(notebooks.discover(ROOT / "notebooks")) == len(list((ROOT / "notebooks").glob("*.ipynb")))

"""The documents keep their word: examples run, links resolve, and nothing names a machine."""

import re
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from opd_bench import leaderboard, report
from opd_bench.bench import Bench
from opd_bench.config import load, tiers
from opd_bench.evaluate import load_suite
from opd_bench.flops import FlopCount
from opd_bench.ledger import Ledger
from opd_bench.methods import Method, designs, find, shipped
from opd_bench.privilege import told
from opd_bench.resources import TASKS
from opd_bench.trace import Counter, largest_batch, worst_case
from opd_bench.train import train

ROOT = Path(__file__).parents[1]
GKD = ROOT / "docs/examples/gkd.py"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("tasks/*/*.md")])
STUDENT, TEACHER = FlopCount(1_000, 8), FlopCount(5_000, 16)
COUNTER = Counter(max_prompt=20, max_response=50, max_check=30, question_tokens=5, student_flops=STUDENT, teacher_flops=TEACHER)


def gkd(**options) -> Method:
    return find(str(GKD)).build(options)


def test_example_method_is_short_and_charged_for_both_sources():
    assert len(GKD.read_text(encoding="utf-8").splitlines()) < 60
    spent = worst_case(gkd(on_policy=0.25), 8, COUNTER).by_kind()
    assert spent == {
        "student_sample": 2 * STUDENT.sample(20, 50),
        "teacher_generate": 6 * TEACHER.sample(20, 50),
        "teacher_score": 8 * TEACHER.score(70),
        "student_update": 8 * STUDENT.update(70),
    }


@pytest.mark.parametrize(("share", "absent"), [(0.0, "student_sample"), (1.0, "teacher_generate")])
def test_example_method_at_its_ends_uses_one_source(share, absent):
    assert absent not in worst_case(gkd(on_policy=share), 8, COUNTER).by_kind()


def test_example_method_spends_its_budget_and_no_more():
    method = gkd(batch=8)
    limit = 40 * worst_case(method, 8, COUNTER).spent + 12_345
    bench = Bench(COUNTER, Ledger(limit), STUDENT, TEACHER, batch=0)
    train(method, bench, COUNTER, cooldown=0.3, on_step=lambda progress: None)
    assert 0.99 <= bench.ledger.share <= 1
    assert largest_batch(method, COUNTER, bench.ledger.left) == 0 or bench.ledger.share >= 0.995


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/examples/privileged_*.yaml")), ids=lambda path: path.stem)
def test_examples_of_a_privileged_teacher_need_no_models_but_the_tiers(path):
    config = load("smol", [yaml.safe_load(path.read_text(encoding="utf-8"))])
    assert config.built_folder == load("smol", []).built_folder
    doc = next(iter(load_suite(["opd_bench_gcd"], [], TASKS).docs("train")))[1]
    assert told(str(config.privileged), "What?", doc).startswith("What?\n")


def test_example_configurations_build():
    text = (ROOT / "docs/adding-a-method.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert blocks
    for name, options in (item for block in blocks for item in yaml.safe_load(block)["methods"].items()):
        method = options.pop("method", name)
        find(str(ROOT / method) if method.endswith(".py") else method).build(options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_is_short_and_its_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    if page.parent.name == "docs":
        assert len(text.splitlines()) < 120
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_documents_name_no_path_of_a_machine():
    files = [*PAGES, ROOT / "CITATION.cff", ROOT / ".ci/run", *ROOT.glob("docs/examples/*"), *ROOT.glob("benchmarks/*.py")]
    for path in files:
        found = re.findall(r"(?<![\w.])/(?:tmp|root|home|work|opt|mnt|Users)\b\S*", path.read_text(encoding="utf-8"))
        assert not found, f"{path.name} names {found}"


def test_commands_in_documents_name_existing_options_methods_and_tiers():
    from typer.main import get_command

    from opd_bench.cli import app

    commands = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    known = {name: {flag for option in command.params for flag in option.opts} for name, command in commands.items()}
    for page in PAGES:
        for line in re.findall(r"^ *opd-bench (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            verb, *words = line.split("#")[0].split()
            assert verb in known, f"{page.name}: opd-bench {line}"
            assert {word for word in words if word.startswith("--")} <= known[verb], f"{page.name}: opd-bench {line}"
            for flag, value in pairwise(words):
                if flag == "--tier":
                    assert value in tiers()
                if flag == "--methods":
                    names = [part.partition(":")[0] for name in value.split(",") for part in name.split("+")]
                    assert all(name in {**shipped(), **designs()} or "/" in name for name in names)


def test_citation_is_yaml_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in project
    assert f'license = "{citation["license"]}"' in project
    assert f"## {citation['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_licence_is_the_full_apache_text():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Copyright 2026 the opd-bench authors" in text


def test_time_of_a_comparison_is_accounted_for_whole():
    script = runpy.run_path(str(ROOT / "benchmarks/compare_embedded.py"))
    arms = [
        {
            "wall_s": 10.0,
            "spent": {"seconds": {"student_sample": 2.0, "student_update": 3.0}},
            "seconds": {"train": 8.0, "evaluation": 1.5, "exposure": 0.5},
        },
        {
            "wall_s": 6.0,
            "spent": {"seconds": {"teacher_generate": 2.0, "student_update": 1.5}},
            "seconds": {"train": 5.0, "branches": 0.5, "evaluation": 1.0, "points": 0.25},
        },
    ]
    places = script["breakdown"](arms, corpus_s=1.75)
    assert places["teacher, generate"] == 1.75  # once, not what each arm was charged for it
    assert (places["update"], places["branches"]) == (4.5, 0.5)
    assert places["harness"] == pytest.approx(16 - (2 + 1.75 + 4.5 + 0.5 + 2.5 + 0.25 + 0.5))
    assert sum(places.values()) == pytest.approx(16)
    assert "| charged compute + evaluation | 11.5 | 71.9% |" in script["table"](places)


def mean(cell: str) -> str:
    """An estimate without its interval."""
    return cell.split(" [")[0]


def test_the_table_on_the_front_page_is_that_of_the_committed_leaderboard():
    board = leaderboard.read(ROOT / "results/embedded/leaderboard.json")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"`{board.command}`" in text
    scores, gaps = report.score_rows(board)[1:-1], report.exposure_rows(board)[:-1]
    for method, (rank, name, score, sampled, *_), (_, regret, per_step, excess, exaccerr, saw) in zip(
        board.methods, scores, gaps, strict=True
    ):
        cells = [rank, name, score, report.percent(method.recovered), sampled, mean(regret), mean(per_step), excess, mean(exaccerr), saw]
        assert f"\n| {' | '.join(cells)} |\n" in text


def test_what_the_front_page_says_of_the_factorial_is_in_its_leaderboard():
    board = leaderboard.read(ROOT / "results/factorial/leaderboard.json")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text.split("### Which part of on-policy")[1].split("\n### ")[0]
    cells = {method.name: method for method in board.methods}
    for label, whose in (("teacher's prefixes", "teacher"), ("own prefixes", "student")):
        row = next(line for line in part.splitlines() if line.startswith(f"| **{label}**"))
        for cell, of in zip(row.split("|")[2:4], ("fkl", "rkl"), strict=True):
            method = cells[f"{whose}_{of}"]
            assert method.exposure
            assert cell.strip() == f"{report.number(method.score.mean, 3)}, gap {report.number(method.exposure.excess.mean, 2)} nats"
    said = {(of.name, of.family): of for of in board.contrasts}
    for name, family, words in (
        ("reverse − forward KL", "score", "+{} [{}, {}]"),
        ("interaction", "score", "+{} [{}, {}]"),
        ("interaction", "excess", "{} nats [{}, {}]"),
        ("student prefixes − teacher prefixes", "excess", "{} nats\n  [{}, {}]"),
    ):
        found, digits = said[name, family], 3 if family == "score" else 2
        assert words.format(*(report.number(value, digits) for value in (found.difference, found.low, found.high))) in part, name
        assert found.claimed == ("not claimable" not in part.split(report.number(found.difference, digits))[1][:40]), name

"""Tuning is equal and apart: as many trials for each method, on items and a seed that no leaderboard has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from test_compare import SMALL, in_this_process, models

from opd_bench import tune as module
from opd_bench.config import load
from opd_bench.errors import UserError
from opd_bench.evaluate import load_suite
from opd_bench.methods import find, space
from opd_bench.resources import TASKS

MINE = '''
from opd_bench.losses import cross_entropy
from opd_bench.methods import Method, tunable


class Mine(Method):
    """SFT under another name, with a knob."""

    class Config(Method.Config):
        batch: int = 4
        knob: int = tunable(1, [1, 2, 3])

    def step(self, bench):
        bench.update(bench.teacher_corpus(), cross_entropy)
'''


def run(config, out):
    with in_this_process() as done:
        recipe = module.tune(config, 2, out, "opd-bench tune", 1, Console(quiet=True))
    return recipe, done


@pytest.fixture(scope="module")
def tuned(pair_folders, tmp_path_factory):
    """The configuration, the folder, and the recipe of a small tuning of two methods, one of them from a file."""
    out = tmp_path_factory.mktemp("tuned")
    (out / "mine.py").write_text(MINE)
    methods = {"sft": {"epochs": 1}, str(out / "mine.py"): {}}
    config = load("embedded", [SMALL, models(pair_folders), {"methods": methods}])
    recipe, done = run(config, out / "out")
    assert len([label for label in done if "seed" in label]) == 4
    return config, out / "out", recipe


@pytest.mark.parametrize("name", ["sft", "offline_kd", "opd", "opd_rlaif", "rlaif"])
def test_every_method_gets_as_many_different_settings_of_what_it_declares(name: str):
    chosen = module.drawn(name, name, 7)
    assert len(chosen) == len({json.dumps(one) for one in chosen}) == 7
    declared = space(find(name).cls)
    assert {"lr", "batch"} <= declared.keys()
    assert all(one.keys() == declared.keys() and all(value in declared[option] for option, value in one.items()) for one in chosen)
    assert chosen == module.drawn(name, name, 8)[:7]


def test_what_a_comparison_declares_of_its_methods_is_none_of_a_tunings():
    config = load("embedded", [{"contrasts": {"x": {"opd": 1, "sft": -1}}, "notes": ["Of opd."]}])
    trials = module.comparison(config, module.trials_of(config, 2))
    assert (trials.contrasts, trials.notes) == ({}, [])


def test_more_trials_than_settings_are_refused():
    with pytest.raises(UserError, match="method opd declares 15 settings to try, fewer than 16 trials"):
        module.drawn("opd", "opd", 16)


def test_trials_never_meet_a_test_item_nor_a_seed_of_a_leaderboard(tuned):
    _, out, _ = tuned
    scored = {json.loads(line)["doc"] for path in out.glob("trials/arms/*/seed-*/items.jsonl") for line in path.read_text().splitlines()}
    assert scored
    manifest = json.loads((out / "trials/manifest.json").read_text())
    assert {job["seed"] for job in manifest["jobs"] if job["method"]} == {module.SEED}
    suite = load_suite(["opd_bench_stem"], ["opd_bench_coding"], TASKS)
    validation = load_suite(["opd_bench_stem"], ["opd_bench_coding"], TASKS, "validation")
    for name, task in validation.tasks.items():
        development, test = ({row["identity"] for row in of.eval_docs} for of in (task, suite.tasks[name]))
        assert development.isdisjoint(test)


def test_the_recipe_is_the_best_trial_of_each_method_and_lies_over_the_tier(tuned):
    config, out, recipe = tuned
    rows = json.loads((out / "trials.json").read_text())["trials"]
    assert [row["method"] for row in rows] == ["sft", "sft", "mine", "mine"]
    for name, options in recipe.items():
        best = max((row for row in rows if row["method"] == name), key=lambda row: (row["score"], row["sampled"]))
        assert {"method": name, **options} == best["options"]
    assert recipe["sft"]["epochs"] in (1, 2)
    assert recipe["mine"]["method"].endswith("mine.py")
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert load("embedded", [written]).methods == {**written["methods"]} == recipe
    assert written["tier"] == config.tier
    total = json.loads((out / "trials.json").read_text())["flops"]
    assert 0 < total <= 4 * config.limit


def test_the_same_tuning_again_trains_nothing(tuned):
    config, out, recipe = tuned
    before = (out / "trials.json").read_bytes()
    again, done = run(config, out)
    assert (again, done) == (recipe, [])
    assert (out / "trials.json").read_bytes() == before


def test_a_task_without_development_items_cannot_be_tuned_on(tmp_path):
    (tmp_path / "plain.yaml").write_text(
        "task: plain\ndataset_path: json\ndataset_kwargs: {data_files: {test: x.jsonl}}\ntest_split: test\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\noutput_type: generate_until\n"
    )
    (tmp_path / "x.jsonl").write_text('{"q": "1", "a": "1"}\n')
    text = (tmp_path / "plain.yaml").read_text().replace("x.jsonl", str(tmp_path / "x.jsonl"))
    (tmp_path / "plain.yaml").write_text(text)
    with pytest.raises(UserError, match="'plain' has no validation split"):
        load_suite(["plain"], [], tmp_path, "validation")


def test_the_tier_ships_what_the_committed_tuning_chose():
    committed = Path(__file__).parents[1] / "results/tuning"
    rows = json.loads((committed / "trials.json").read_text())["trials"]
    shipped = load("embedded", []).methods
    assert len(rows) == 15 * len(shipped)
    assert load("embedded", [yaml.safe_load((committed / "recipe.yaml").read_text())]).methods == shipped
    for name, options in shipped.items():
        best = max((row for row in rows if row["method"] == name), key=lambda row: (row["score"], row["sampled"]))
        assert best["options"] == {"method": name, **options}

"""`opd-bench power`: variance components, the power they promise, and what the command says and refuses."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from opd_bench.errors import UserError
from opd_bench.power import ENOUGH, Components, components, plan_power, read_scores, size
from opd_bench.statistics import claims, paired_difference

ONE = {"task": 1.0}
TWO = {"a": 0.5, "b": 0.5}


def rng() -> np.random.Generator:
    return np.random.default_rng(11)


# ---- components -------------------------------------------------------------------------------------------------------------------


def test_components_of_seeds_alone_and_of_items_alone():
    seed_S, item_N = rng().normal(size=5), rng().normal(size=40)
    by_seed = {task: np.repeat(seed_S[:, None], 40, axis=1) for task in TWO}
    by_item = {task: np.repeat(item_N[None], 5, axis=0) for task in TWO}
    found = components(by_seed, TWO)
    assert (found.seed, found.item, found.residual) == pytest.approx((seed_S.var(ddof=1), 0, 0), abs=1e-12)
    found = components(by_item, TWO)
    assert (found.seed, found.item, found.residual) == pytest.approx((0, item_N.var(ddof=1) / 2, 0), abs=1e-12)  # items are per task


def test_components_by_hand():
    found = components({"task": np.array([[3.0, 0.0], [0.0, -1.0]])}, ONE)
    # means .5; seeds ±1, items ±1, and ±.5 is left: residual 4 · .25 / (1 · 1) = 1; item 2 − 1/2; seed 2 − 1/2
    assert (found.seed, found.item, found.residual) == pytest.approx((1.5, 1.5, 1))


def test_components_are_unbiased():
    draw, true = rng(), Components(0.04, 0.5, 1.5)
    tables = (
        {"task": draw.normal(0, 0.2, (6, 1)) + draw.normal(0, 0.5**0.5, (1, 30)) + draw.normal(0, 1.5**0.5, (6, 30))} for _ in range(2000)
    )
    found = np.mean([(parts.seed, parts.item, parts.residual) for parts in (components(table, ONE) for table in tables)], axis=0)
    assert found[1:] == pytest.approx([true.item, true.residual], rel=0.02)
    assert found[0] == pytest.approx(true.seed, rel=0.15)  # negative estimates are set to 0, so a little above


def test_one_seed_has_no_variance():
    with pytest.raises(UserError, match="two seeds"):
        components({"task": np.ones((1, 5))}, ONE)


# ---- power ------------------------------------------------------------------------------------------------------------------------


def test_without_noise_power_is_what_the_exact_test_allows():
    clear = Components(1e-6, 1e-6, 1e-6)
    assert size(clear, 0.02, seeds=8, items=100, pairs=6, rng=rng()).power == 1
    assert size(clear, 0.02, seeds=7, items=100, pairs=6, rng=rng()).power == 0
    assert size(clear, 0.02, seeds=6, items=100, pairs=1, rng=rng()).power == 1
    assert size(clear, 0.02, seeds=5, items=100, pairs=1, rng=rng()).power == 0


def test_without_a_difference_power_is_an_error_rate():
    assert size(Components(1.0, 0.0, 0.0), 0.0, seeds=8, items=100, pairs=1, rng=rng(), draws=4000).power < 0.03  # one of two sides


def test_half_width_is_t_times_the_standard_error():
    found = size(Components(0.0, 1.0, 0.0), 0.5, seeds=8, items=100, pairs=1, rng=rng())
    assert found.half_width == pytest.approx(2.364624251592785 * 0.1)  # items alone: nothing to estimate from seeds


def test_promised_power_is_what_the_claims_of_whole_leaderboards_do():
    parts, difference, seeds, items, boards = Components(0.02**2, 0.3**2, 0.4**2), 0.08, 8, 100, 800
    draw, hits, halves = rng(), 0, []
    for _ in range(boards):
        shape = (seeds, items)
        gap_SN = draw.normal(0, 0.02, (seeds, 1)) + draw.normal(0, 0.3, (1, items)) + draw.normal(0, 0.4, shape) + difference
        scores = {"a": {"task": gap_SN}, "b": {"task": np.zeros(shape)}}
        (claim,) = claims("score", scores, ONE)
        hits += claim.claimed and claim.a == "a"
        halves.append(claim.high - claim.difference if claim.high is not None else np.nan)
    promised = size(parts, difference, seeds, items, pairs=1, rng=draw, draws=4000)
    assert 0.2 < promised.power < 0.8
    assert hits / boards == pytest.approx(promised.power, abs=3 * (0.25 / boards) ** 0.5)
    assert np.mean(halves) == pytest.approx(promised.half_width, rel=0.03)


# ---- a run's folder ---------------------------------------------------------------------------------------------------------------


def scores(seeds: int = 8, items: int = 40) -> dict[str, dict[str, np.ndarray]]:
    draw = rng()
    return {
        method: {task: (draw.random((seeds, items)) < rate).astype(float) for task in ("algebra", "logic", "code")}
        for method, rate in (("alpha", 0.5), ("beta", 0.6), ("gamma", 0.7))
    }


def written(folder: Path, tables: dict[str, dict[str, np.ndarray]], share: bool = True) -> Path:
    """A results folder, its items out of order and among rows that do not count."""
    folder.mkdir(exist_ok=True)
    board = {"tasks": {"stem": ["algebra", "logic"], "coding": ["code"]}, "methods": [{"name": method} for method in tables]}
    (folder / "leaderboard.json").write_text(json.dumps(board), encoding="utf-8")
    rows = [
        (method, seed, 0, part, decoding, task, f"doc{n:03}", 2, score if decoding == "greedy" and part == 1 else 1 - score)
        for method, by_task in tables.items()
        for task, scores_SN in by_task.items()
        for (seed, n), score in np.ndenumerate(scores_SN)
        for part, decoding in ((0.5, "greedy"), (1.0, "greedy"), (1.0, "sampled"))
        if share or part == 1
    ]
    rows += [("teacher", 0, 0, 0.0, "greedy", "algebra", "doc000", 2, 1.0)]
    rng().shuffle(rows)
    with (folder / "items.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("method", "seed", "start", *(["share"] if share else []), "decoding", "task", "doc", "steps", "score"))
        table.writerows(row if share else row[:3] + row[4:] for row in rows)
    return folder


@pytest.mark.parametrize("share", [True, False])
def test_the_scores_of_a_folder_are_those_that_were_written(tmp_path, share):
    tables, weights = read_scores(written(tmp_path, scores(seeds=2), share))
    assert weights == {"algebra": 0.25, "logic": 0.25, "code": 0.5}
    assert tables.keys() == scores().keys()
    for method, by_task in scores(seeds=2).items():
        for task, scores_SN in by_task.items():
            assert (tables[method][task] == scores_SN).all()


def test_a_plan_is_of_the_pairs_it_compares():
    weights = {"algebra": 0.25, "logic": 0.25, "code": 0.5}
    plan = plan_power(scores(), weights, 0.3, ["alpha", "gamma"])
    assert plan.pairs == {"alpha − gamma": plan.pooled}
    assert (plan.seeds, plan.items) == (8, 40)
    assert (40 in {found.items for found in plan.sizes}, 6 in {found.seeds for found in plan.sizes}) == (True, True)
    assert plan.smallest is not None
    assert plan.smallest == min((found for found in plan.sizes if found.power >= ENOUGH), key=lambda found: (found.seeds, found.items))
    assert plan.smallest.seeds == 6  # the fewest that can claim one pair
    here = next(found for found in plan.sizes if (found.seeds, found.items) == (8, 40))
    observed = paired_difference(scores()["alpha"], scores()["gamma"], weights)
    assert observed.high is not None
    assert here.half_width == pytest.approx(observed.high - observed.mean, rel=0.3)  # the run's own interval, on average


def test_table_and_json_say_the_same(program, tmp_path):
    code, out, err = program("power", written(tmp_path, scores()), "--difference", 0.1)
    assert (code, err) == (0, "")
    plan = json.loads(program("power", tmp_path, "--difference", 0.1, "--json")[1])
    assert re.search(r"alpha − beta +[.\d]+ +[.\d]+ +[.\d]+ *\n", out)
    for seeds in {found["seeds"] for found in plan["sizes"]}:
        (line,) = re.findall(rf"^ *{seeds} +(\d+%.*?) *$", out, re.MULTILINE)
        assert re.findall(r"\d+%", line) == [f"{found['power']:.0%}" for found in plan["sizes"] if found["seeds"] == seeds]
    smallest = plan["smallest"]
    assert f"{smallest['seeds']} seeds and {smallest['items']} items per task have {smallest['power']:.0%} power." in out
    assert "Testing 3 pairs, nothing can be claimed with fewer than 7 seeds." in out


def test_a_difference_too_small_for_the_grid_says_so(program, tmp_path):
    _, out, _ = program("power", written(tmp_path, scores()), "--difference", 0.001)
    assert re.search(r"No size here has 80% power; \d+ seeds and \d+ items per task have \d+%\.", out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--difference", "0"], r"--difference 0: give a difference"),
        (["--difference", "-0.1"], r"--difference -0\.1: give a difference"),
        (["--difference", "nan"], r"--difference nan: give a difference"),
        (["--difference", "2"], r"--difference 2: give a difference"),
        (["--methods", "alpha,bta"], r"no method 'bta' in this run \(did you mean 'beta'\?\)"),
        (["--methods", "alpha"], "takes two methods"),
    ],
)
def test_a_bad_command_line_is_one_line(program, tmp_path, arguments, said):
    code, out, err = program("power", written(tmp_path, scores(seeds=2, items=5)), *arguments)
    assert re.fullmatch(rf"error: [^\n]*{said}[^\n]*\n", err), err
    assert (code, out) == (2, "")


def damaged(folder: Path, how: str) -> None:
    board, items = folder / "leaderboard.json", folder / "items.csv"
    text = items.read_text(encoding="utf-8")
    if how == "no leaderboard":
        board.unlink()
    elif how == "no items":
        items.unlink()
    elif how == "foreign leaderboard":
        board.write_text("[]", encoding="utf-8")
    elif how == "foreign items":
        items.write_text("a,b\n1,2\n", encoding="utf-8")
    elif how == "an item missing":
        items.write_text(re.sub(r"beta,1,0,1\.0,greedy,code,doc003[^\n]*\n", "", text), encoding="utf-8")
    elif how == "no number":
        items.write_text(re.sub(r"(beta,1,0,1\.0,greedy,code,doc003,2),[^\r\n]*", r"\1,x", text), encoding="utf-8")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no leaderboard", r"cannot read .*leaderboard\.json"),
        ("no items", r"cannot read .*items\.csv: .*name the folder of a finished comparison"),
        *(
            (how, "damaged or do not fit.*run the comparison again")
            for how in ("foreign leaderboard", "foreign items", "an item missing", "no number")
        ),
    ],
)
def test_a_folder_that_holds_no_finished_run_is_one_line(program, tmp_path, how, said):
    damaged(written(tmp_path, scores(seeds=2, items=5)), how)
    code, out, err = program("power", tmp_path)
    assert re.fullmatch(rf"error: [^\n]*{said}[^\n]*\n", err), err
    assert (code, out) == (2, "")


def test_a_run_of_one_seed_is_refused(program, tmp_path):
    code, _, err = program("power", written(tmp_path, scores(seeds=1)))
    assert (code, err) == (2, "error: variances need a run of at least two seeds, and two items per task\n")

"""What may stand in a leaderboard, and what withholds a rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opd_bench.assemble import assemble
from opd_bench.errors import RunError, UserError
from opd_bench.exposure import Divergences, Recording
from opd_bench.leaderboard import SCHEMA_FILE, Leaderboard, json_schema, read, write
from opd_bench.records import ArmRecord, CurvePoint, Run
from opd_bench.report import markdown

STEM, CODING = ["arithmetic", "trace"], ["functions"]
ITEMS, PROMPTS, LENGTH = 40, 8, 6
COLD = {"cold_start_student": 3e13, "cold_start_teacher": 2e12}


def items(rate: float) -> dict[str, np.ndarray]:
    """The same share of solved items in every task."""
    return {task: (np.arange(ITEMS) < round(rate * ITEMS)).astype(float) for task in STEM + CODING}


def divergences(student: float, teacher: float) -> Divergences:
    """``student`` and ``teacher`` nats at each of LENGTH positions; every rollout ends before the length limit."""
    alive_NT = np.tile(np.arange(LENGTH + 1) < LENGTH, (PROMPTS, 1))
    return Divergences(np.full(alive_NT.shape, student), alive_NT, np.full(alive_NT.shape, teacher), alive_NT)


def run_of(seeds: int) -> Run:
    return Run(
        tier="embedded",
        command=f"opd-bench run embedded --seeds {seeds}",
        commit="0123abc",
        axis="FLOPs",
        limit=1e12,
        seeds=list(range(seeds)),
        stem=STEM,
        coding=CODING,
        teacher=items(0.95),
        teacher_sampled=items(0.9),
        cold_starts=[items(0.5)],
        cold_starts_sampled=[items(0.25)],
        cold_starts_recordings=[Recording({"forward_kl": divergences(0.3, 0.2)}, {})],
        teacher_recording=None,
        cold_start_flops={},
        overlap=dict.fromkeys(STEM + CODING, 0.0),
        steps={task: np.arange(ITEMS) % 4 + 2.0 for task in STEM + CODING},
    )


def arm(method: str, seed: int, rate: float, gap: Divergences | None = None) -> ArmRecord:
    return ArmRecord(
        method=method,
        seed=seed,
        start=0,
        share_spent=0.995,
        unit_share=0.001,
        wall_s=31.0,
        saw=["teacher text"],
        sampled=items(rate - 0.25),
        curve=[
            CurvePoint(
                1.0,
                *({"student_update": amount} for amount in (7 * 10**11, 10**6, 30.0)),
                items(rate),
                Recording({"forward_kl": gap or divergences(0.3, 0.2)}, {}),
            )
        ],
    )


def arms_of(rates: dict[str, float], seeds: int) -> list[ArmRecord]:
    return [arm(method, seed, rate) for method, rate in rates.items() for seed in range(seeds)]


def ranks(board: Leaderboard) -> dict[str, int | None]:
    return {method.name: method.rank for method in board.methods}


def test_shipped_schema_is_the_models_schema():
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == json_schema()


def test_what_is_written_is_read_back(tmp_path: Path):
    board = assemble(run_of(2), arms_of({"opd": 0.75, "sft": 0.7}, 2))
    write(board, tmp_path / "leaderboard.json")
    assert read(tmp_path / "leaderboard.json") == board
    assert json.loads((tmp_path / "leaderboard.json").read_text(encoding="utf-8"))["schema"] == "opd-bench/leaderboard/1"


def test_macro_score_is_the_mean_of_the_stem_and_the_coding_mean():
    arms = arms_of({"opd": 0.5}, 2)
    solved = {"arithmetic": np.ones(ITEMS), "trace": np.zeros(ITEMS), "functions": np.ones(ITEMS)}
    arms = [replace(arm, curve=[replace(arm.end, greedy=solved)]) for arm in arms]
    (method,) = assemble(run_of(2), arms).methods
    assert method.score.mean == pytest.approx(0.75)
    assert method.stem
    assert method.stem.mean == pytest.approx(0.5)
    assert method.coding
    assert method.coding.mean == pytest.approx(1.0)
    assert method.score_by_seed == pytest.approx([0.75, 0.75])


def test_exposure_is_summed_over_positions():
    (method,) = assemble(run_of(2), arms_of({"opd": 0.5}, 2)).methods
    assert method.exposure
    assert method.exposure.exaccerr
    assert method.exposure.regret.mean == pytest.approx(0.3 * LENGTH)
    assert method.exposure.per_step.mean == pytest.approx(0.2 * LENGTH)
    assert method.exposure.excess.mean == pytest.approx(0.1 * LENGTH)
    assert method.exposure.exaccerr.mean == pytest.approx(50.0)


def test_undefined_numbers_are_null_in_the_file(tmp_path: Path):
    arms = [arm("opd", 0, 0.7, divergences(0.0, 0.0))]
    write(assemble(run_of(1), arms), tmp_path / "leaderboard.json")
    text = (tmp_path / "leaderboard.json").read_text(encoding="utf-8")
    method = json.loads(text)["methods"][0]
    assert method["exposure"]["exaccerr"] is None
    assert method["score"]["low"] is None
    assert method["score"]["mean"] == pytest.approx(0.7)
    assert "NaN" not in text


def test_not_a_number_becomes_null():
    board = assemble(run_of(1), arms_of({"opd": 0.7}, 1)).model_dump(by_alias=True)
    board["teacher"]["score"]["low"] = float("nan")
    assert Leaderboard.model_validate(board).teacher.score.low is None


@pytest.mark.parametrize("text", ["{", '{"schema": "opd-bench/leaderboard/1"}', "NaN", None])
def test_a_file_that_is_no_leaderboard_is_refused_in_one_line(tmp_path: Path, text: str | None):
    path = tmp_path / "leaderboard.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert "leaderboard.json" in str(error.value)


def test_nan_in_a_file_is_refused_instead_of_read_as_null(tmp_path: Path):
    write(assemble(run_of(1), arms_of({"opd": 0.7}, 1)), tmp_path / "leaderboard.json")
    text = (tmp_path / "leaderboard.json").read_text(encoding="utf-8")
    (tmp_path / "leaderboard.json").write_text(text.replace('"low": null', '"low": NaN', 1), encoding="utf-8")
    with pytest.raises(UserError, match="NaN is not JSON"):
        read(tmp_path / "leaderboard.json")


def test_an_unknown_field_is_refused(tmp_path: Path):
    write(assemble(run_of(1), arms_of({"opd": 0.7}, 1)), tmp_path / "leaderboard.json")
    document = json.loads((tmp_path / "leaderboard.json").read_text(encoding="utf-8"))
    document["methods"][0]["score"]["median"] = 0.5
    (tmp_path / "leaderboard.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(UserError, match="median"):
        read(tmp_path / "leaderboard.json")


def test_identical_methods_are_never_claimed_and_share_rank_1():
    board = assemble(run_of(8), arms_of({"opd": 0.7, "sft": 0.7}, 8))
    assert ranks(board) == {"opd": 1, "sft": 1}
    assert len(board.claims) == 2
    assert not any(claim.claimed for claim in board.claims)


def test_a_method_better_on_every_item_and_seed_is_claimed_at_8_seeds():
    arms = arms_of({"sft": 0.6, "opd": 0.7}, 8)
    worst = {task: np.zeros(ITEMS) for task in STEM + CODING}
    best = {task: np.ones(ITEMS) for task in STEM + CODING}
    arms = [replace(arm, curve=[replace(arm.end, greedy=best if arm.method == "opd" else worst)]) for arm in arms]
    board = assemble(run_of(8), arms)
    assert ranks(board) == {"opd": 1, "sft": 2}
    assert [method.name for method in board.methods] == ["opd", "sft"]
    (claim,) = [claim for claim in board.claims if claim.family == "score"]
    assert claim.claimed
    assert (claim.a, claim.b, claim.difference) == ("opd", "sft", 1.0)
    assert claim.p == pytest.approx(2 / 256)


def test_the_lower_excess_is_the_better_one():
    small = [arm("opd", seed, 0.7, divergences(0.2, 0.2)) for seed in range(8)]
    large = [arm("sft", seed, 0.7, divergences(0.4, 0.2)) for seed in range(8)]
    board = assemble(run_of(8), small + large)
    (claim,) = [claim for claim in board.claims if claim.family == "excess"]
    assert claim.claimed
    assert (claim.a, claim.b) == ("opd", "sft")
    assert claim.difference == pytest.approx(-0.2 * LENGTH)
    assert ranks(board) == {"opd": 1, "sft": 1}  # ranks come from the score alone


@pytest.mark.parametrize(("seeds", "methods", "needed"), [(2, 2, 6), (7, 4, 8), (1, 3, 7)])
def test_too_few_seeds_are_named_with_how_many_it_takes(seeds: int, methods: int, needed: int):
    rates = {f"method{i}": 0.5 + i / 10 for i in range(methods)}
    (note,) = [note for note in assemble(run_of(seeds), arms_of(rates, seeds)).notes if "Nothing can be claimed" in note]
    assert f"it takes {needed} seeds" in note


def test_enough_seeds_leave_only_the_scope():
    run = replace(run_of(8), cold_start_flops=COLD)
    (note,) = assemble(run, arms_of({"opd": 0.7, "sft": 0.6}, 8)).notes
    assert note.startswith("Claims hold for this student")


@pytest.mark.parametrize("share", [0.98, 1.001])
def test_an_arm_outside_its_budget_withholds_rank_and_claims(share: float):
    arms = arms_of({"opd": 0.9, "kd": 0.7, "sft": 0.6}, 8)
    arms[0] = replace(arms[0], share_spent=share)
    board = assemble(run_of(8), arms)
    assert ranks(board)["opd"] is None
    assert ranks(board)["kd"] == 1
    assert board.methods[-1].name == "opd"
    assert not any(claim.claimed for claim in board.claims if "opd" in (claim.a, claim.b))
    assert [gate.name for gate in board.gates if gate.held is False] == ["budget"]


@pytest.mark.parametrize("teacher", [0.5, 0.4])
def test_without_teacher_headroom_nobody_is_ranked(teacher: float):
    board = assemble(replace(run_of(8), teacher=items(teacher)), arms_of({"opd": 0.7, "sft": 0.6}, 8))
    assert set(ranks(board).values()) == {None}
    assert [gate.name for gate in board.gates if gate.held is False] == ["headroom"]


def test_a_missing_seed_is_named():
    with pytest.raises(UserError, match=r"opd has no finished arm for seeds \[1\]"):
        assemble(run_of(2), arms_of({"opd": 0.7}, 1))


def test_a_score_that_is_not_finite_is_refused():
    broken = arm("opd", 0, 0.7)
    broken.greedy["trace"][3] = np.nan
    with pytest.raises(RunError, match=r"opd with seed 0 lacks .* trace"):
        assemble(run_of(1), [broken])


def test_without_coding_tasks_stem_is_the_score():
    board = assemble(replace(run_of(2), coding=[]), arms_of({"opd": 0.7}, 2))
    assert board.methods[0].coding is None
    assert board.methods[0].score == board.methods[0].stem


def test_several_cold_starts_are_averaged_and_each_claim_says_its_difference_from_each():
    run = replace(run_of(4), cold_starts=[items(0.4), items(0.6)], cold_starts_sampled=[items(0.2), items(0.3)], cold_starts_recordings=[])
    rates = {"opd": (0.8, 0.6), "sft": (0.5, 0.6)}
    arms = [replace(arm(method, seed, rates[method][seed % 2]), start=seed % 2) for method in rates for seed in range(4)]
    board = assemble(run, arms)
    assert board.cold_start.score.mean == pytest.approx(0.5)
    assert board.cold_start.sampled.mean == pytest.approx(0.25)
    assert board.cold_start.exposure is None
    (claim,) = [claim for claim in board.claims if claim.family == "score"]
    assert claim.by_start == pytest.approx([0.3, 0.0])
    assert claim.difference == pytest.approx(0.15)
    assert any(note.endswith("the mean of these 2 cold starts.") for note in board.notes)


@pytest.mark.parametrize(("auroc", "rank"), [(0.52, None), (0.97, 1), (None, 1)])
def test_a_judge_without_skill_costs_its_method_the_rank_and_no_other(auroc: float | None, rank: int | None):
    judged, plain = arms_of({"opd_rlaif": 0.7}, 2), arms_of({"opd": 0.6}, 2)
    board = assemble(run_of(2), [*(replace(one, judge_auroc=auroc, saw=["judge"]) for one in judged), *plain])
    assert ranks(board) == {"opd_rlaif": rank, "opd": 1}
    assert [method.judge_auroc for method in board.methods if method.name == "opd_rlaif"] == [auroc]


def rising(method: str, rates: tuple[float, ...], seeds: int = 2) -> list[ArmRecord]:
    """Arms scored at equal steps of the budget, at the given rates."""
    found = []
    for one in arms_of({method: rates[-1]}, seeds):
        shares = [(place + 1) / len(rates) for place in range(len(rates))]
        curve = [replace(one.end, share=share, greedy=items(rate)) for share, rate in zip(shares, rates, strict=True)]
        found.append(replace(one, curve=[replace(one.end, share=0.0, flops={}, greedy=items(0.5)), *curve]))
    return found


def test_the_share_recovered_is_of_the_gap_between_cold_start_and_teacher():
    (method,) = assemble(run_of(2), arms_of({"opd": 0.7}, 2)).methods
    assert method.recovered
    assert method.recovered.mean == pytest.approx(0.2 / 0.45)
    (method,) = assemble(replace(run_of(2), teacher=items(0.5)), arms_of({"opd": 0.7}, 2)).methods
    assert method.recovered is None


def test_a_curve_has_a_score_and_a_gap_at_every_budget_and_ends_at_the_ranked_score():
    (method,) = assemble(run_of(2), rising("opd", (0.6, 0.7, 0.8))).methods
    assert [point.share for point in method.curve] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [point.score.mean for point in method.curve] == pytest.approx([0.6, 0.7, 0.8])
    assert method.curve[-1].score == method.score
    assert method.curve[-1].exposure == method.exposure


def test_a_method_that_starts_behind_and_ends_ahead_crosses_between():
    board = assemble(run_of(2), [*rising("opd", (0.5, 0.9)), *rising("sft", (0.7, 0.7))])
    (crossing,) = board.crossings
    assert (crossing.a, crossing.b, crossing.a_ahead) == ("opd", "sft", True)
    assert crossing.budget == pytest.approx(1e12 / 2**0.5)  # half-way in the logarithm
    assert board.profile
    assert board.profile.solved["opd"][-1] == 1.0
    assert board.profile.solved["sft"][-1] < 1.0
    assert board.profile.targets["trace"] == pytest.approx([0.59, 0.68, 0.77])
    assert board.profile.times["opd"]["trace"] == pytest.approx([0.5e12 * 2 ** ((target - 0.5) / 0.4) for target in (0.59, 0.68, 0.77)])
    assert board.profile.times["sft"]["trace"] == [pytest.approx(0.5e12), pytest.approx(0.5e12), None]


def test_one_budget_has_no_crossing_and_no_profile():
    board = assemble(run_of(2), arms_of({"opd": 0.7, "sft": 0.6}, 2))
    assert (board.crossings, board.profile) == ([], None)


def test_other_ledgers_are_read_and_the_first_is_that_of_the_budget():
    board = assemble(run_of(2), [*rising("opd", (0.6, 0.8)), *rising("sft", (0.7, 0.7))])
    assert [reading.ledger for reading in board.readings] == ["data charged", "data free", "teacher scoring free", "wall clock"]
    assert board.readings[0].order == ["opd", "sft"]
    assert any("cold starts cost is not known" in note for note in board.notes)


def test_from_scratch_adds_what_a_cold_start_costs_to_every_arm_and_turns_no_order_around():
    arms = [*rising("opd", (0.6, 0.8)), *rising("sft", (0.7, 0.7))]
    board = assemble(replace(run_of(2), cold_start_flops=COLD), arms)
    free, scratch, charged = (
        next(one for one in board.readings if one.ledger == name)
        for name in ("data free", "from scratch, data free", "from scratch, data charged")
    )
    assert free.cost
    assert (scratch.cost, charged.cost) == (free.cost + 3e13, free.cost + 3e13 + 2e12)
    assert scratch.score == pytest.approx(free.score)
    assert scratch.order == free.order
    assert not any("not known" in note for note in board.notes)


# ---- contrasts --------------------------------------------------------------------------------------------------------------------

EFFECT = {"own text": {"opd": 1.0, "kd": -0.5, "sft": -0.5}}


def contrasted_arms(seeds: int = 8) -> list[ArmRecord]:
    """A gap of .3 nats less for opd, at .2 of the score more."""
    rates, gaps = {"opd": 0.9, "kd": 0.8, "sft": 0.6}, {"opd": 0.2, "kd": 0.25, "sft": 0.25}
    return [arm(name, seed, rate, divergences(gaps[name], 0.1)) for name, rate in rates.items() for seed in range(seeds)]


def contrasts_of(board: Leaderboard) -> dict[str, bool]:
    return {contrast.family: contrast.claimed for contrast in board.contrasts}


def test_a_declared_contrast_is_tested_on_score_sampled_and_gap(tmp_path: Path):
    board = assemble(replace(run_of(8), contrasts=EFFECT), contrasted_arms())
    score, sampled, excess = board.contrasts
    assert [(one.name, one.weights) for one in board.contrasts] == [("own text", EFFECT["own text"])] * 3
    assert (score.difference, sampled.difference, excess.difference) == pytest.approx((0.2, 0.2, -0.05 * LENGTH))
    assert score.by_start == pytest.approx([0.2])
    assert excess.p == excess.p_holm == 2 / 256  # a family of one
    write(board, tmp_path / "leaderboard.json")
    assert read(tmp_path / "leaderboard.json").contrasts == board.contrasts


def test_a_gate_withholds_the_contrasts_of_its_method_and_no_other():
    two = {**EFFECT, "without opd": {"kd": 1.0, "sft": -1.0}}
    arms = contrasted_arms()
    assert all(contrasts_of(assemble(replace(run_of(8), contrasts=EFFECT), arms)).values())
    arms[0] = replace(arms[0], share_spent=0.9)
    board = assemble(replace(run_of(8), contrasts=two), arms)
    assert {(one.name, one.claimed) for one in board.contrasts if one.family == "score"} == {("own text", False), ("without opd", True)}


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (9, ["Nothing can be claimed with 9 seeds and 21 pairs; it takes 10 seeds."]),
        (1, [f"Nothing can be claimed with 1 seed and {family} seeds." for family in ("21 pairs; it takes 10", "6 contrasts; it takes 8")]),
        (10, []),
    ],
)
def test_pairs_and_contrasts_are_told_apart_where_seeds_are_too_few(seeds: int, said: list[str]):
    rates = {f"method{i}": 0.5 + i / 20 for i in range(7)}
    declared = {str(i): {"method0": 1.0, f"method{i}": -1.0} for i in range(1, 7)}
    board = assemble(replace(run_of(seeds), contrasts=declared), arms_of(rates, seeds))
    assert [note for note in board.notes if "Nothing" in note] == said


def test_what_a_configuration_wants_said_is_said():
    assert "As declared." in assemble(replace(run_of(2), notes=["As declared."]), arms_of({"opd": 0.7}, 2)).notes


def test_a_held_out_task_is_shown_and_changes_no_score():
    plain, arms = assemble(run_of(2), arms_of({"opd": 0.7, "sft": 0.6}, 2)), arms_of({"opd": 0.7, "sft": 0.6}, 2)
    word = {"words": np.arange(ITEMS) < 10.0}
    for one in arms:
        one.greedy.update(word)
    run = run_of(2)
    run = replace(run, held_out={"words": "retention"}, teacher={**run.teacher, **word}, cold_starts=[{**run.cold_starts[0], **word}])
    board = assemble(run, arms)
    assert [method.held_out["words"].mean for method in board.methods] == [0.25, 0.25]
    assert board.teacher.held_out["words"].mean == board.cold_start.held_out["words"].mean == 0.25
    assert [(method.name, method.score, method.rank) for method in board.methods] == [
        (method.name, method.score, method.rank) for method in plain.methods
    ]
    assert all(not method.held_out for method in plain.methods)
    assert (board.tasks.held_out, board.tasks.retention) == ([], ["words"])
    assert "| words (retention) |" in markdown(board)
    assert "words" not in markdown(plain)


def test_what_was_worn_away_is_the_mean_over_seeds_and_texts():
    def with_retention(kl: float):
        return [replace(one, retention={"kl": np.array([kl, 3 * kl]), "gain": np.array([-kl, -kl])}) for one in arms_of({"opd": 0.7}, 2)]

    (method,) = assemble(replace(run_of(2), teacher_retention={"kl": np.ones(4), "gain": np.zeros(4)}), with_retention(0.2)).methods
    assert method.retention is not None
    assert method.retention.kl.mean == pytest.approx(0.4)
    assert method.retention.gain.mean == pytest.approx(-0.2)
    board = assemble(run_of(2), with_retention(0.2)[:1] + arms_of({"opd": 0.7}, 2)[1:])
    assert board.methods[0].retention is None  # a seed without figures
    assert "KL from the start" not in markdown(board)

"""Recipes of stages: each takes its share of one budget, from the prompts of its own mix, and the student goes on."""

from __future__ import annotations

from collections import Counter as Count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import COUNTER, FLOPS, varied

from opd_bench.bench import Bench
from opd_bench.config import load, overlaid, selection
from opd_bench.errors import UserError
from opd_bench.ledger import Ledger
from opd_bench.methods import find
from opd_bench.plan import jobs
from opd_bench.prompts import Corpus, MixedStream, Stream
from opd_bench.stages import build, check_mix, digest, peak_lr, stages_of, written
from opd_bench.trace import worst_case
from opd_bench.train import require_one_step, train

SFT, OPD = {"method": "sft", "batch": 8}, {"method": "opd", "batch": 8}


def recipe(*stages: dict):
    return build("mine", {"stages": list(stages)})


def full_step(name: str) -> int:
    return int(worst_case(find(name).build({"batch": 8}), 8, COUNTER).spent)


def test_the_spelling_of_the_command_line_keeps_each_methods_options():
    _, above = selection("sft:0.3+opd:0.7,opd")
    assert overlaid({"methods": {"sft": {"lr": 5e-4}, "opd": {"batch": 16}}}, above)["methods"] == {
        "sft:0.3+opd:0.7": {"stages": [{"lr": 5e-4, "method": "sft", "share": 0.3}, {"batch": 16, "method": "opd", "share": 0.7}]},
        "opd": {"batch": 16},
    }
    _, above = selection("mixed:0.5+opd:0.5")
    staged = overlaid({"methods": {"mixed": {"method": "opd", "on_policy": 0.5}}}, above)["methods"]["mixed:0.5+opd:0.5"]["stages"]
    assert staged == [{"method": "opd", "on_policy": 0.5, "share": 0.5}, {"method": "opd", "share": 0.5}]
    assert written("path/to/mine.py:0.5+opd:5e-1") == (
        "mine:0.5+opd:0.5",
        {"stages": [{"method": "path/to/mine.py", "share": 0.5}, {"method": "opd", "share": 0.5}]},
    )
    assert written("opd") is None


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{**SFT, "share": 0.3}, {**OPD, "share": 0.6}], "sum to 0.9; they must sum to 1"),
        ([{**SFT, "share": 0.3}, {"share": 0.7}], "a stage's method: Field required"),
        ([{**SFT, "share": 0}, {**OPD, "share": 1}], "a stage's share"),
        ([{**SFT, "share": 0.5, "epoch": 2}, {**OPD, "share": 0.5}], "unknown key 'epoch', did you mean 'epochs'|unknown key 'epoch'"),
        ([{"method": "odp", "share": 1}], "unknown method 'odp'"),
        ([], "must be a list"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_in_one_line(stages: list, said: str):
    with pytest.raises(UserError, match=said):
        build("mine", {"stages": stages})


def test_options_beside_stages_and_shares_that_do_not_add_up_are_refused_when_a_configuration_is_planned():
    with pytest.raises(UserError, match="'lr' stands beside its stages"):
        build("mine", {"lr": 1e-3, "stages": [{**OPD, "share": 1}]})
    chosen = load("embedded", [selection("sft:0.3+opd:0.6")[1]])
    with pytest.raises(UserError, match=r"sum to 0\.9"):
        jobs(chosen)


def test_a_recipes_digest_changes_with_any_of_its_methods():
    kinds = [[("sft", 0.5), ("opd", 0.5)], [("opd", 0.5), ("sft", 0.5)], [("sft", 1.0)]]
    found = {digest("mine", {"stages": [{"method": name, "share": share} for name, share in kind]}) for kind in kinds}
    assert len(found) == 3


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 0.9), st.integers(60, 200))
def test_a_stage_ends_within_a_step_before_its_share_and_the_budget_is_spent(share: float, steps: int):
    stages = recipe({**SFT, "share": share}, {**OPD, "share": 1 - share})
    limit = steps * full_step("opd")
    bench = Bench(varied(), Ledger(limit), *FLOPS, batch=0)
    progress = []
    train(stages, bench, COUNTER, 0.3, progress.append)
    assert 0.99 <= bench.ledger.share <= 1
    of = Count()
    for charge in bench.ledger.charges:
        of[progress[charge.step - 1].stage if charge.step <= len(progress) else 1] += charge.flops
    assert share - full_step("sft") / limit <= of[0] / limit <= share
    kinds = [{charge.kind for charge in bench.ledger.charges if progress[charge.step - 1].stage == number} for number in (0, 1)]
    assert kinds == [{"teacher_generate", "student_update"}, {"student_sample", "teacher_score", "student_update"}]


def test_one_stage_of_the_whole_budget_is_the_method_itself(rig):
    def trained(what):
        built = rig(20 * full_step("opd"))
        train(what, built.bench, built.counter, 0.3, lambda progress: None)
        return torch.cat([weight.detach().flatten() for weight in built.engine.student.parameters()])

    assert torch.equal(trained(recipe({**OPD, "share": 1})), trained(find("opd").build({"batch": 8})))


def test_the_second_stage_goes_on_from_the_firsts_student_at_its_own_rate(rig):
    stages = recipe({**SFT, "share": 0.5, "lr": 0.0}, {**OPD, "share": 0.5, "lr": 1e-3})
    assert peak_lr(stages) == 1e-3
    built = rig(20 * full_step("opd"), lr=1e-3)
    first = {name: weight.clone() for name, weight in built.engine.student.named_parameters()}
    moved = []

    def on_step(progress):
        same = all(torch.equal(weight, first[name]) for name, weight in built.engine.student.named_parameters())
        moved.append((progress.stage, not same))

    train(stages, built.bench, built.counter, 0.0, on_step)
    assert (0, True) not in moved
    assert (1, False) not in moved
    assert {stage for stage, _ in moved} == {0, 1}


def test_a_stage_too_small_for_one_step_is_refused_beforehand():
    stages = recipe({**SFT, "share": 0.001}, {**OPD, "share": 0.999})
    with pytest.raises(UserError, match="too small for one step of SFT"):
        require_one_step(stages, COUNTER, 100 * full_step("opd"))
    require_one_step(recipe({**SFT, "share": 0.5}, {**OPD, "share": 0.5}), COUNTER, 100 * full_step("opd"))


SOURCES = [("sums", [2, number]) for number in range(2, 9)] + [("loops", [3, number]) for number in range(2, 6)]


@given(st.floats(0.05, 20), st.floats(0.05, 20), st.integers(1, 60))
def test_every_piece_of_a_mix_has_its_shares(one: float, other: float, count: int):
    met = MixedStream(SOURCES, 0, (("loops", one), ("sums", other)))(0, count)
    assert abs(met.tasks.count("loops") - count * one / (one + other)) <= 1
    for name in ("loops", "sums"):
        own = [ids for ids, task in zip(met.ids, met.tasks, strict=True) if task == name]
        assert own == Stream([pair for pair in SOURCES if pair[0] == name], 0)(0, len(own)).ids


def test_a_mixed_stream_is_the_same_from_wherever_it_is_read():
    mix = (("loops", 1.0), ("sums", 2.0))
    whole = MixedStream(SOURCES, 3, mix)(0, 30)
    late = MixedStream(SOURCES, 3, mix)(20, 10)
    assert whole.ids[20:] == late.ids


def test_stages_of_a_mix_train_on_its_prompts_alone_and_one_met_again_goes_on(rig, tmp_path):
    built = rig(40 * full_step("opd"))
    engine, bench = built.engine, built.bench

    def mixed(mix):
        stream = MixedStream(SOURCES, 0, mix) if mix else built.stream
        return stream, Corpus(engine.corpus.teachers, stream, engine.eos, engine.max_response, tmp_path / str(mix))

    engine.mixed = mixed
    met = []
    update = engine.update
    engine.update = lambda sequences, *a, **k: met.append([row[0] for row in sequences.ids_BT.tolist()]) or update(sequences, *a, **k)
    sums = {"sums": 1.0}
    stages = recipe({**SFT, "share": 0.3, "mix": sums}, {**OPD, "share": 0.3, "mix": {"loops": 1.0}}, {**OPD, "share": 0.4, "mix": sums})
    check_mix(stages, ["loops", "sums"])
    progress = []
    train(stages, bench, built.counter, 0.3, progress.append)
    for step, first in zip(progress, met, strict=False):
        assert set(first) == {3 if step.stage == 1 else 2}
    assert bench.positions.keys() == {(("sums", 1.0),), (("loops", 1.0),)}
    trained_on = [len(first) for step, first in zip(progress, met, strict=False)]
    assert bench.position >= sum(trained_on)


def test_a_mix_that_names_no_source_is_refused():
    stages = recipe({**OPD, "share": 1, "mix": {"sum": 1}})
    with pytest.raises(UserError, match=r"no prompts of 'sum'.*sums"):
        check_mix(stages, ["loops", "sums"])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_each_batch_is_the_students_own(share: float, rig, monkeypatch):
    built, met = rig(batch=8), []
    monkeypatch.setattr(built.engine, "update", lambda rows, *a, _u=built.engine.update, **k: met.append(rows) or _u(rows, *a, **k))
    find("opd").build({"batch": 8, "on_policy": share}).step(built.bench)
    by_kind = built.bench.ledger.by_kind("tokens")
    assert ("student_sample" in by_kind, "teacher_generate" in by_kind) == (share > 0, share < 1)
    (sequences,) = met
    assert len(sequences) == 8
    assert (sequences.updates is None) == (share < 1)  # the teacher's text is not taken for the student's
    own = round(8 * share)
    assert sequences[slice(own, 8)].ids_BT.shape[0] == 8 - own
    assert stages_of(find("opd").build({}))[0].share == 1

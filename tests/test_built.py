"""A tier's own models: made from worked solutions once, resumed where interrupted, found by what they were made from."""

import json
from itertools import islice

import pytest
import torch
from rich.console import Console

from opd_bench import built, supervised
from opd_bench.built import build, solved
from opd_bench.config import load
from opd_bench.errors import UserError
from opd_bench.evaluate import tasks_of
from opd_bench.models import cold_start_flops, load_model, load_tokenizer


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OPD_BENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def settings(pair_folders):
    """``settings(specialist=6)``: the embedded tier, whose models are to be built from a tiny untrained one."""

    def make(specialist=4, shares=None, **build):
        shares = shares or {}
        models = {
            "start": {"steps": 3, "shares": shares.get("start", {})},
            "specialist": {"after": "start", "steps": specialist, "shares": shares.get("specialist", {})},
        }
        own = {"base": str(pair_folders["student"]), "models": models, "batch_tokens": 512, "lr": 1e-3, **build}
        tasks = {"stem": ["opd_bench_arithmetic"], "coding": []}
        return load("embedded", [{"students": ["built/start"], "teacher": "built/specialist", "build": own, "tasks": tasks}])

    return make


def weights(folder):
    return torch.cat([parameter.detach().flatten() for parameter in load_model(folder).parameters()])


def test_start_and_specialist_go_on_from_each_other_and_say_what_they_cost(settings, pair_folders):
    chosen = settings()
    build(chosen, Console(quiet=True))
    base, start, specialist = (
        weights(folder) for folder in (str(pair_folders["student"]), *map(chosen.location, ("built/start", "built/specialist")))
    )
    assert 0 < (start - base).norm() < (specialist - base).norm()
    cost, more = (cold_start_flops(chosen.location(f"built/{name}")) for name in ("start", "specialist"))
    assert 0 < cost["cold_start_student"] < more["cold_start_student"]
    assert cost["cold_start_teacher"] == more["cold_start_teacher"] == 0


def test_two_models_may_go_on_from_one_and_neither_from_what_comes_later(settings):
    models = {"start": {"steps": 2}, "sums": {"after": "start", "steps": 2}, "other": {"after": "start", "steps": 3}}
    chosen = settings(models=models)
    build(chosen, Console(quiet=True))
    start, sums, other = (weights(chosen.built_folder / name) for name in models)
    assert len({tuple(found.tolist()) for found in (start, sums, other)}) == 3
    with pytest.raises(UserError, match="first goes on from 'second', which is not among the models before it"):
        settings(models={"first": {"after": "second", "steps": 1}, "second": {"steps": 1}})
    with pytest.raises(UserError, match="`build` makes no such model"):
        chosen.location("built/specialist")


def test_what_is_there_is_not_made_again(settings, monkeypatch):
    chosen = settings()
    build(chosen, Console(quiet=True))
    monkeypatch.setattr(built, "fit", lambda *_, **__: pytest.fail("trained again"))
    build(chosen, Console(quiet=True))


class PowerCutError(Exception):
    pass


def test_a_build_that_was_interrupted_ends_where_it_would_have(settings, monkeypatch, tmp_path):
    chosen = settings()
    build(chosen, Console(quiet=True))
    whole = weights(chosen.location("built/specialist"))
    monkeypatch.setenv("OPD_BENCH_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(built, "EVERY", 1)
    reached = []

    def cut(step, loss):
        reached.append(step)
        if len(reached) == 5:  # in the midst of the specialist
            raise PowerCutError

    fit = supervised.fit
    with monkeypatch.context() as patch:
        patch.setattr(built, "fit", lambda *args, **options: fit(*args, **options | {"report": cut}))
        with pytest.raises(PowerCutError):
            build(chosen, Console(quiet=True))
    build(chosen, Console(quiet=True))
    assert torch.equal(weights(chosen.location("built/specialist")), whole)


def test_other_settings_lie_in_another_folder(settings):
    assert settings().built_folder == settings().built_folder
    assert settings().built_folder != settings(specialist=5).built_folder


@pytest.mark.parametrize("what", ["before", "tasks", "trained_by"])
def test_models_of_other_tasks_of_another_base_or_by_other_code_are_made_anew(what, settings):
    chosen = settings()
    build(chosen, Console(quiet=True))
    path = chosen.built_folder / "start" / built.MADE_FROM
    path.write_text(json.dumps({**json.loads(path.read_text()), what: "another"}))
    calls = []
    fit = supervised.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(built, "fit", lambda *args, **options: calls.append(1) or fit(*args, **options))
        build(chosen, Console(quiet=True))
    assert calls


def test_the_loss_is_on_the_solution_and_its_end_alone(settings, pair_folders):
    tokenizer = load_tokenizer(str(pair_folders["student"]))
    suite = tasks_of(settings(), tokenizer)
    task, doc = suite.docs("train")[0]
    ids, weight = solved(suite, tokenizer)[task][0]
    prompt = len(tokenizer(suite.text(task, doc), add_special_tokens=False).input_ids)
    assert weight == [0.0] * prompt + [1.0] * (len(ids) - prompt)
    assert tokenizer.decode(ids) == doc["prompt"] + doc["solution"] + tokenizer.eos_token


def test_a_tier_without_models_of_its_own_is_refused():
    with pytest.raises(UserError, match="builds no models"):
        build(load("embedded", []), Console(quiet=True))


def test_a_model_that_is_not_there_yet_says_how_it_is_made(settings):
    with pytest.raises(UserError, match="opd-bench build-teacher"):
        settings().location("built/start")
    with pytest.raises(UserError, match="`build`"):
        load("embedded", []).location("built/start")


def test_documents_come_in_the_shares_that_are_asked_for():
    examples = {"a": [([1], [1.0])] * 50, "b": [([2], [1.0])] * 10, "c": [([3], [1.0])] * 40}
    drawn = [ids[0] for ids, _ in islice(built._drawn(examples, {"a": 0.1, "b": 0.6, "c": 0.3}, seed=0), 2000)]
    assert [drawn.count(token) / 2000 for token in (1, 2, 3)] == pytest.approx([0.1, 0.6, 0.3], abs=0.03)
    drawn = [ids[0] for ids, _ in islice(built._drawn(examples, {}, seed=0), 2000)]
    assert [drawn.count(token) / 2000 for token in (1, 2, 3)] == pytest.approx([0.5, 0.1, 0.4], abs=0.03)


def test_every_document_of_a_task_comes_before_any_comes_again():
    examples = {"a": [([number], [1.0]) for number in range(30)]}
    drawn = [ids[0] for ids, _ in islice(built._drawn(examples, {}, seed=1), 60)]
    assert sorted(drawn[:30]) == sorted(drawn[30:]) == list(range(30))


def test_a_task_without_a_share_is_left_out():
    examples = {"a": [([1], [1.0])], "b": [([2], [1.0])]}
    assert {ids[0] for ids, _ in islice(built._drawn(examples, {"b": 0.5}, seed=0), 50)} == {2}


def test_models_with_shares_serve_any_choice_of_tasks(settings):
    chosen = settings(
        shares={"start": {"opd_bench_arithmetic": 0.5, "opd_bench_functions": 0.5}, "specialist": {"opd_bench_functions": 1.0}}
    )
    build(chosen, Console(quiet=True))
    other = chosen.model_copy(update={"tasks": chosen.tasks.model_copy(update={"stem": [], "coding": ["opd_bench_trace"]})})
    assert weights(other.location("built/specialist")).isfinite().all()
    with pytest.raises(UserError, match=r"unknown task 'opd_bench_aritmetic'.*opd_bench_arithmetic"):
        build(settings(shares={"start": {"opd_bench_aritmetic": 1.0}, "specialist": {"opd_bench_arithmetic": 1.0}}), Console(quiet=True))

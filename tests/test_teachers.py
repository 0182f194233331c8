"""Several teachers: each writes and scores the prompts of its own tasks, and nobody else's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import EOS, RESPONSE, tiny_llama
from test_compare import SMALL, in_this_process, models, run

from opd_bench import store
from opd_bench.arm import workshop
from opd_bench.config import load
from opd_bench.continuations import joined
from opd_bench.embedded.fit import new_llama
from opd_bench.errors import UserError
from opd_bench.exposure import Divergences, Recording
from opd_bench.plan import jobs
from opd_bench.rollouts import sample
from opd_bench.scoring import ModelTeacher
from opd_bench.sequences import Prompts
from opd_bench.teachers import Teachers

PROMPTS = Prompts([[2, 3], [4, 5, 6], [7, 8], [3, 9], [5, 5, 5, 5]], ["sums", "code", "sums", "code", "other"])


@pytest.fixture
def two() -> tuple[Teachers, dict[str, object]]:
    one, coder = tiny_llama(2), tiny_llama(5)
    tasks = {tuple(ids): task for ids, task in zip(PROMPTS.ids, PROMPTS.tasks, strict=True)}
    return Teachers(one, {"code": coder}, tasks), {"sums": one, "code": coder, "other": one}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_one_teacher_writes_as_it_would_by_itself():
    alone = sample(tiny_llama(2), PROMPTS, max_response=RESPONSE, eos=EOS, generator=generator())
    texts = Teachers(tiny_llama(2)).write(PROMPTS, max_response=RESPONSE, eos=EOS, generator=generator())
    assert torch.equal(texts.ids_BT, alone.ids_BT)


def test_texts_come_in_the_order_of_their_prompts_each_by_its_own_teacher(two):
    teachers, by_task = two
    texts = teachers.write(PROMPTS, max_response=RESPONSE, eos=EOS, generator=generator())
    for row, (ids, task) in enumerate(zip(PROMPTS.ids, PROMPTS.tasks, strict=True)):
        part = texts[[row]]
        assert part.ids_BT[0, : len(ids)].tolist() == ids
        given_NV, _ = ModelTeacher(by_task[task])(part)[:]
        response = torch.tensor(part.response(0))
        said_N = part.logprob_BT[part.response_BT]
        assert torch.allclose(given_NV[torch.arange(len(response)), response], said_N, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_every_token_is_scored_by_its_prompts_teacher_however_positions_are_cut(two, size: int):
    teachers, by_task = two
    texts = sample(tiny_llama(1), PROMPTS, max_response=RESPONSE, eos=EOS, generator=generator())
    scores, count = teachers(texts), texts.response_tokens
    found_NV = torch.cat([scores[slice(at, min(at + size, count))][0] for at in range(0, count, size)])
    alone = [ModelTeacher(by_task[task])(texts[[row]])[:][0] for row, task in enumerate(PROMPTS.tasks)]
    assert torch.allclose(found_NV, torch.cat(alone), atol=1e-5)


def recording(count: int, value: float, temperature: float) -> Recording:
    side = np.full((count, 3), value), np.ones((count, 3), bool)
    return Recording({"forward_kl": Divergences(*side, *side)}, {"own 1": np.full(count, value)}, temperature)


def test_recordings_made_apart_are_joined_in_the_order_of_the_prompts():
    whole = joined([(recording(2, 1.0, 0.5), [0, 3]), (recording(1, 2.0, 0.8), [1]), (recording(1, 3.0, 1.1), [2])])
    assert whole.along["forward_kl"].student_NT[:, 0].tolist() == [1, 2, 3, 1]
    assert whole.continued["own 1"].tolist() == [1, 2, 3, 1]
    assert whole.temperature == pytest.approx((0.5 * 2 + 0.8 + 1.1) / 4)


def test_a_comparison_with_a_coding_teacher_scores_every_task_with_its_own(tmp_path, pair_folders):
    """The coder stands for the teacher's own twin, so the teachers' scores are those of one teacher, and the coder's work is the same."""
    overlay = {**SMALL, "methods": {"opd": {"batch": 8}, "sft": {"batch": 8}}}
    with in_this_process():
        one = run(load("embedded", [models(pair_folders), overlay]), tmp_path / "one")
        twin = run(
            load("embedded", [models(pair_folders), overlay, {"teachers": {"coding": str(pair_folders["teacher"])}}]), tmp_path / "twin"
        )
    assert one.teacher.score == twin.teacher.score
    ledgers = [store.read_jsonl(tmp_path / name / "ledger.jsonl") for name in ("one", "twin")]
    assert {row["kind"] for row in ledgers[0]} == {row["kind"] for row in ledgers[1]}


def test_each_tasks_teacher_writes_scores_and_is_measured(tmp_path, pair_folders, tokenizer):
    """A recipe with stages and mixes on the way: all of an arm's life, with a coder of other weights than the teacher's."""
    coder = tmp_path / "coder"
    new_llama(64, 1, tokenizer, seed=99).save_pretrained(coder)
    tokenizer.save_pretrained(coder)
    mixes = {"opd_bench_functions": 1}, {"opd_bench_functions": 1, "opd_bench_arithmetic": 1}
    stages = [{"method": name, "share": 0.5, "batch": 4, "mix": mix} for name, mix in zip(("sft", "opd"), mixes, strict=True)]
    overlay = {**SMALL, "seeds": 1, "methods": {"both": {"stages": stages}}, "teachers": {"coding": str(coder)}}
    config = load("embedded", [models(pair_folders), overlay])
    shop, (job,) = workshop(config.model_dump_json()), [job for job in jobs(config) if job.method]
    engine = shop.engine(job, shop.pair.student, 1e-3, tmp_path / "corpus")
    assert engine.teacher is shop.teachers
    assert shop.teachers.of("opd_bench_functions") is shop.teachers.of("opd_bench_trace") is not shop.teachers.default
    assert shop.teachers.of("opd_bench_arithmetic") is shop.teachers.default
    with in_this_process():
        board = run(config, tmp_path / "run")
    assert {method.name for method in board.methods} == {"both"}
    assert (tmp_path / "run" / "corpus" / "seed-0" / "exposure" / "1").is_dir()  # recorded beside the second teacher
    steps = store.read_jsonl(tmp_path / "run" / "arms" / "both" / "seed-0" / "steps.jsonl")
    assert {step["stage"] for step in steps} == {0, 1}
    with pytest.raises(UserError, match=r"no prompts of 'opd_bench_function'.*opd_bench_functions"):
        run(
            config.model_copy(update={"methods": {"both": {"stages": [{"method": "opd", "share": 1, "mix": {"opd_bench_function": 1}}]}}}),
            tmp_path / "bad",
        )


def test_a_teacher_for_nothing_and_one_of_another_shape_are_refused(tmp_path, pair_folders):
    def loaded(**teachers: str):
        workshop(load("embedded", [models(pair_folders), SMALL, {"teachers": teachers}]).model_dump_json())

    with pytest.raises(UserError, match=r"no group, task or source of prompts 'codin', did you mean 'coding'|'codin'"):
        loaded(codin=str(pair_folders["teacher"]))
    with pytest.raises(UserError, match="has another shape"):
        loaded(coding=str(pair_folders["student"]))
    with pytest.raises(UserError, match=r"several teachers need scoring\.by: model"):
        load("embedded", [{"teachers": {"coding": "embedded/teacher"}, "scoring": {"by": "cache"}}])

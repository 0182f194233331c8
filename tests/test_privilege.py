"""A privileged teacher does after the student's prompts what it would do after its own, is charged for reading them, and must teach."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import EOS, RESPONSE, tiny_llama
from test_leaderboard import arms_of, divergences, run_of

from opd_bench.arm import workshop
from opd_bench.bench import Bench
from opd_bench.config import load
from opd_bench.errors import UserError
from opd_bench.exposure import Recording
from opd_bench.flops import flop_count
from opd_bench.gates import Limits, check
from opd_bench.ledger import Ledger
from opd_bench.losses import reverse_kl
from opd_bench.plan import jobs
from opd_bench.privilege import Privilege, grant, privilege_of, told
from opd_bench.rollouts import sample
from opd_bench.scoring import ModelTeacher, response_hidden
from opd_bench.sequences import Prompts
from opd_bench.trace import Counter

PLAIN, SHOWN = [[3, 5, 7], [2, 9]], [[3, 5, 8, 8, 6, 7], [2, 4, 9]]
KNOWN = {tuple(plain): shown for plain, shown in zip(PLAIN, SHOWN, strict=True)}


@pytest.fixture
def teachers():
    """The same model twice, the second one privileged."""
    plain, privileged = tiny_llama(3).eval(), tiny_llama(3).eval()
    grant(privileged, Privilege(KNOWN))
    return plain, privileged


def written(model, ids, group=1):
    prompts = Prompts([list(each) for each in ids], [""] * len(ids))
    return sample(model, prompts, max_response=RESPONSE, eos=EOS, generator=torch.Generator().manual_seed(0), group=group)


@pytest.mark.parametrize("group", [1, 3])
def test_it_writes_after_the_plain_prompts_what_it_would_after_its_own(teachers, group):
    own, given = written(teachers[0], SHOWN, group), written(teachers[1], PLAIN, group)
    for row in range(2 * group):
        assert given.response(row) == own.response(row)
        assert given.ids_BT[row, : given.prompt_B[row]].tolist() == PLAIN[row // group]
        chances = [of.logprob_BT[row, of.prompt_B[row] : of.length_B[row]] for of in (own, given)]
        assert torch.equal(*chances)
    assert torch.equal(given.finished_B, own.finished_B)
    assert given.group == group


def test_it_scores_a_response_to_the_plain_prompt_as_one_to_its_own(teachers):
    rollouts = written(tiny_llama(9).eval(), PLAIN)
    shown = Privilege(KNOWN).sequences(rollouts)
    assert [shown.ids_BT[row, : shown.prompt_B[row]].tolist() for row in range(2)] == SHOWN
    assert [shown.response(row) for row in range(2)] == [rollouts.response(row) for row in range(2)]
    torch.testing.assert_close(response_hidden(teachers[1], rollouts), response_hidden(teachers[0], shown))


def test_a_prompt_that_is_not_known_is_left_and_one_that_goes_on_is_known_by_its_beginning():
    privilege = Privilege(KNOWN)
    assert privilege.ids([1, 2, 3]) == [1, 2, 3]
    assert privilege.ids([*PLAIN[0], 4, 4]) == [*SHOWN[0], 4, 4]
    assert privilege.extra_B(Prompts([*PLAIN, [1]], [""] * 3)).tolist() == [3, 1, 0]
    assert privilege.most_extra == 3


def test_a_model_without_privilege_and_a_copy_from_before_have_none(teachers):
    assert privilege_of(teachers[0]) is None


def test_what_it_reads_is_charged(rig, teachers):
    """Scoring and writing cost what they cost on the longer prompts, and a trace foresees the longest."""
    lent = rig()
    bench, lent.engine.teacher, lent.engine.privilege = lent.bench, ModelTeacher(teachers[1]), privilege_of(teachers[1])
    count, rollouts = flop_count(teachers[0].config), written(lent.engine.student, PLAIN)
    bench.update(rollouts, reverse_kl, signal=bench.teacher(rollouts))
    extra_B = torch.tensor([3, 1])
    assert bench.ledger.by_kind("flops")["teacher_score"] == count.score(rollouts.length_B + extra_B) > count.score(rollouts.length_B)

    counter = Counter(3, RESPONSE, 0, 0, count, count, most_extra=3)
    traced = Bench(counter, Ledger(None), count, count, batch=2)
    texts = traced.teacher_corpus()
    assert traced.ledger.by_kind("flops")["teacher_generate"] == count.sample(texts.prompt_B + 3, torch.full((2,), RESPONSE))


def test_a_column_that_no_document_has_is_named():
    assert told("{prompt} {solution}", "1+1", {"solution": "2", "prompt": "other"}) == "1+1 2"
    with pytest.raises(UserError, match=r"worked.*solution"):
        told("{prompt} {worked}", "1+1", {"solution": "2"})


def test_the_engine_knows_of_it_and_the_judge_is_shown_nothing(tmp_path):
    settings = load(
        "embedded", [{"privileged": "{prompt}Solution:\n{solution}\n", "tasks": {"stem": ["opd_bench_arithmetic"], "coding": []}}]
    )
    shop = workshop(settings.model_dump_json())
    privilege = privilege_of(shop.pair.teacher)
    assert privilege is not None
    assert all(tuple(ids) in privilege.shown for _, ids in shop.encoded)
    assert privilege_of(shop.judge.model) is None  # pyright: ignore[reportAttributeAccessIssue]
    doc = shop.suite.tasks["opd_bench_arithmetic"].training_docs()[0]
    shown = privilege.ids(shop.pair.tokenizer(doc["prompt"]).input_ids)
    assert shop.pair.tokenizer.decode(shown) == f"{doc['prompt']}Solution:\n{doc['solution']}\n"
    assert shop.counter.most_extra == max(len(more) - len(plain) for plain, more in privilege.shown.items())
    job = next(job for job in jobs(settings) if job.method)
    assert shop.engine(job, shop.pair.student, 1e-3, tmp_path).privilege is privilege
    workshop.cache_clear()


def gate(theirs: float, own: float, privileged: bool = True, least: float | None = 0.05):
    continued = {"teacher 0.5": np.array([theirs, theirs, np.nan]), "own 0.5": np.array([own, own, np.nan])}
    run = replace(run_of(2), cold_starts_recordings=[Recording({"forward_kl": divergences(0.3, 0.2)}, continued)], privileged=privileged)
    found = check(run, {"opd": arms_of({"opd": 0.7}, 2)}, Limits(taught=least))
    return next((each for each in found if each.name == "taught"), None)


def test_a_teacher_half_of_whose_solutions_helps_teaches_and_one_that_states_answers_does_not():
    taught, told_ = gate(0.7, 0.4), gate(0.4, 0.4)
    assert taught is not None
    assert told_ is not None
    assert (taught.held, told_.held) == (True, False)
    assert "+0.300" in taught.said
    assert "worked solutions, not answers" in told_.said
    assert told_.methods == ("opd",)


def test_the_gate_is_for_privileged_teachers_and_may_be_opened():
    assert gate(0.4, 0.4, privileged=False) is None
    opened = gate(0.4, 0.4, least=None)
    assert opened is not None
    assert opened.held is None

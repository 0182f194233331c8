"""A judge that solves the task itself: it agrees with itself, pays once per prompt, and never meets the truth."""

import pytest
import torch

from opd_bench.arm import workshop
from opd_bench.config import load
from opd_bench.evaluate import load_suite
from opd_bench.judge import Answer
from opd_bench.judge_solver import SolvingJudge
from opd_bench.ledger import Ledger
from opd_bench.models import eos_id, load_model, load_tokenizer
from opd_bench.resources import EMBEDDED, TASKS
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts

COUNT, LONGEST = 4, 96


@pytest.fixture(scope="module")
def suite():
    return load_suite(["opd_bench_arithmetic"], [], TASKS)


@pytest.fixture(scope="module")
def asked(suite):
    return [text for _, text in suite.asked("test")][:COUNT]


@pytest.fixture(scope="module")
def judge(suite, asked):
    model, tokenizer = load_model(str(EMBEDDED / "teacher")), load_tokenizer(str(EMBEDDED / "teacher"))
    return SolvingJudge(model, tokenizer, suite.put, suite.taken, dict.fromkeys(asked, "opd_bench_arithmetic"), eos_id(tokenizer), LONGEST)


@pytest.fixture(scope="module")
def solved(judge, asked):
    """The model's own greedy solutions."""
    prompts = Prompts([list(judge.tokenizer(text).input_ids) for text in asked], [""] * COUNT)
    written = sample(judge.model, prompts, max_response=LONGEST, eos=judge.eos, generator=None)
    return [judge.tokenizer.decode(written.response(row), skip_special_tokens=True) for row in range(COUNT)]


def test_it_agrees_with_its_own_solutions_and_with_whatever_ends_in_the_same_answer(judge, asked, solved):
    ends = ["#" + text.rsplit("#", 1)[1] for text in solved]
    for responses in (solved, ends):
        found = judge([Answer([], text, response) for text, response in zip(asked, responses, strict=True)])
        assert found.verdict_B.tolist() == [1.0] * COUNT
        assert not found.unreadable_B.any()


@pytest.mark.parametrize("response", ["#100", "", "no number"])
def test_another_answer_or_none_is_wrong(judge, asked, response):
    assert judge([Answer([], text, response) for text in asked]).verdict_B.tolist() == [0.0] * COUNT


def test_rollouts_to_one_prompt_share_a_solution_that_is_paid_for_once(judge, asked, solved):
    answers = [Answer([], text, response) for text in asked[:2] for response in ("#1", "#2", solved[0])]
    found, most = judge(answers), judge.most(answers)
    assert (found.usage.read_B > 0).tolist() == (most.read_B > 0).tolist() == [True, False, False] * 2
    assert found.usage.read_B.tolist() == most.read_B.tolist()
    assert (found.usage.written_B <= most.written_B).all()
    assert found.verdict_B[2] == 1
    alone = [judge([answer]).verdict_B.item() for answer in answers]
    assert found.verdict_B.tolist() == alone


def test_none_takes_more_than_is_foreseen(judge, asked):
    answers = [Answer(list(range(40)), text, "#1") for text in asked]
    worst, most = judge.worst(torch.tensor([40] * COUNT)), judge.most(answers)
    assert (most.read_B <= worst.read_B).all()
    assert (most.written_B <= worst.written_B).all()


def test_a_question_that_is_not_known_says_nothing(judge):
    found = judge([Answer([5], "Compute elsewhere\n", "#1")])
    assert (found.verdict_B.item(), found.unreadable_B.item(), found.usage.tokens) == (0.5, True, 0)


def test_a_model_that_says_nothing_gives_no_verdict(judge, asked):
    mute = SolvingJudge(judge.model, judge.tokenizer, judge.put, lambda task, texts: ["[invalid]"] * len(texts), judge.tasks, judge.eos, 2)
    assert mute([Answer([5], asked[0], "#1")]).unreadable_B.item()


def test_a_comparison_can_be_judged_by_it():
    settings = load("embedded", [{"judge": {"by": "solve"}, "tasks": {"stem": ["opd_bench_arithmetic"], "coding": []}}])
    shop = workshop(settings.model_dump_json())
    assert isinstance(shop.judge, SolvingJudge)
    assert {text for _, text in shop.suite.asked("test")} <= shop.judge.tasks.keys()
    ledger = Ledger(None, settings.axis)
    answers = [Answer([5] * 9, shop.suite.asked("train")[0][1], "#1")] * 3
    with ledger.reserve(
        "judge", shop.judge.flops.sample(*(getattr(shop.judge.most(answers), of) for of in ("read_B", "written_B"))), 0
    ) as bill:
        usage = shop.judge(answers).usage
        bill.settle(shop.judge.flops.sample(usage.read_B, usage.written_B), usage.tokens)
    assert ledger.spent == shop.judge.flops.sample(usage.read_B[:1], usage.written_B[:1])
    workshop.cache_clear()

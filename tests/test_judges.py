"""Local judges and the verifier: what they are asked, what they answer, and what that costs; whole comparisons with each."""

# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOperatorIssue=false
from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import EOS
from test_compare import configured, in_this_process, rows, run
from test_engine import sequences
from test_judge_endpoint import server  # noqa: F401

from opd_bench import arm
from opd_bench.config import load
from opd_bench.errors import UserError
from opd_bench.evaluate import load_suite
from opd_bench.flops import flop_count
from opd_bench.judge import Answer, Reader
from opd_bench.judge_model import BARE, RATING, YES_NO, CheckJudge, ReadJudge, rating, yes_or_no
from opd_bench.judge_verifier import Verifier
from opd_bench.ledger import Axis, Ledger
from opd_bench.models import load_model
from opd_bench.resources import TASKS, task_module

CHAT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<judge>"
ANSWERS = [Answer([7], "Compute 1+2\n", "1+2=3\n#3"), Answer([8], "Compute 9+9\n", ""), Answer([9], "Solve x+1=3\n", "x=2 {or} not")]


@pytest.fixture(scope="module")
def model(pair_folders):
    return load_model(str(pair_folders["teacher"]))


@pytest.fixture
def reading(model, tokenizer):
    return ReadJudge(model, tokenizer, YES_NO, yes_or_no(), yes_or_no(swapped=True))


def log_probs(model, tokenizer, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])).logits[0, -1].log_softmax(-1)


def test_yes_or_no_is_the_sigmoid_of_the_log_odds_at_one_position(model, tokenizer, reading):
    judgement = reading(ANSWERS)
    for row, answer in enumerate(ANSWERS):
        text = YES_NO.format(prompt=answer.prompt, response=answer.response, options="yes or no") + BARE
        log_prob_V = log_probs(model, tokenizer, text)
        yes, no = (tokenizer(word, add_special_tokens=False).input_ids for word in ("yes", "no"))
        assert len(yes) == len(no) == 1
        expected = torch.sigmoid(log_prob_V[yes[0]] - log_prob_V[no[0]])
        assert judgement.verdict_B[row].item() == pytest.approx(expected.item(), abs=1e-5)
        assert judgement.usage.read_B[row] == len(tokenizer(text, add_special_tokens=False).input_ids)
    assert judgement.usage.written_B.tolist() == [1, 1, 1]


def test_a_rating_is_the_mean_over_the_digits(model, tokenizer):
    judge = ReadJudge(model, tokenizer, RATING, rating(9), rating(9, swapped=True))
    text = RATING.format(prompt=ANSWERS[0].prompt, response=ANSWERS[0].response, options="from 1 (wrong) to 9 (right)") + BARE
    digits = [tokenizer(str(digit), add_special_tokens=False).input_ids[0] for digit in range(1, 10)]
    chance_D = log_probs(model, tokenizer, text)[digits].softmax(-1)
    expected = float((chance_D * torch.arange(9)).sum() / 8)
    assert judge(ANSWERS[:1]).verdict_B.item() == pytest.approx(expected, abs=1e-5)


def test_all_spellings_of_a_word_count(model, tokenizer, reading, monkeypatch):
    spelled = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("y", "Y", "n")]
    monkeypatch.setattr(ReadJudge, "_tokens", lambda self: [spelled[:2], spelled[2:]])
    log_prob_V = log_probs(model, tokenizer, reading.template.format(prompt="a", response="b", options="yes or no") + BARE)
    expected = torch.sigmoid(log_prob_V[spelled[:2]].logsumexp(0) - log_prob_V[spelled[2]])
    assert reading([Answer([1], "a", "b")]).verdict_B.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_batch_is_judged_as_its_answers_alone(reading, monkeypatch):
    together = reading(ANSWERS).verdict_B
    alone = torch.cat([reading([answer]).verdict_B for answer in ANSWERS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    monkeypatch.setattr("opd_bench.judge_model.MICRO_TOKENS", 1)
    torch.testing.assert_close(reading(ANSWERS).verdict_B, alone, rtol=0, atol=1e-5)


def test_a_chat_model_is_asked_in_its_own_template(reading, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    (ids,) = reading._asked(ANSWERS[:1])
    text = tokenizer.decode(ids)
    assert text.startswith("<user>Here is a task")
    assert text.endswith("yes or no.<judge>")
    assert ANSWERS[0].response in text


def test_swapped_the_options_change_places_and_a_rating_its_worth(model, tokenizer, reading):
    other = reading.swapped()
    assert other.options.said == "no or yes"
    assert other.swapped() == reading
    rates = ReadJudge(model, tokenizer, RATING, rating(9), rating(9, swapped=True)).swapped()
    assert rates.options.values == rating(9).values[::-1]
    assert replace(reading, template="{prompt}{response}").swapped() is None
    assert CheckJudge(model, [2], 4, 5, EOS, 3).swapped() is None


def test_what_does_not_fit_is_not_asked_and_costs_nothing(reading):
    long = Answer([1], "Compute 1+2\n", "1+2=3\n" * 400)
    judgement = reading([ANSWERS[0], long])
    assert judgement.usage.read_B.tolist()[1] == judgement.usage.written_B.tolist()[1] == 0
    assert (judgement.verdict_B[1].item(), judgement.unreadable_B[1].item()) == (0.5, True)
    assert reading.flops.sample(torch.tensor([0]), torch.tensor([0])) == 0


def test_a_word_without_a_token_of_its_own_is_refused(model, tokenizer):
    options = replace(yes_or_no(), words=("certainly", "no"))
    with pytest.raises(UserError, match="no spelling of 'certainly' is one token"):
        ReadJudge(model, tokenizer, YES_NO, options, options)


def test_a_reader_takes_the_tasks_own_text_and_leaves_out_special_tokens(tokenizer):
    prompt, response = (tokenizer(text, add_special_tokens=False).input_ids for text in ("<user>1+2\n", "3"))
    eos = tokenizer.eos_token_id
    batch = sequences((prompt, [*response, eos]), ([eos, *prompt], response))
    first, second = Reader(tokenizer, {tuple(prompt): "1+2\n"})(batch)
    assert (first.prompt, first.response, first.ids) == ("1+2\n", "3", prompt + response)
    assert (second.prompt, second.response) == ("<user>1+2\n", "3")  # unknown: decoded without what is special


def test_a_response_of_eos_alone_is_judged(rig, tokenizer):
    batch = sequences(([8, 9], [EOS]))
    (answer,) = Reader(tokenizer)(batch)
    assert answer.response == ""
    assert rig().engine.judge(batch).verdict_B.shape == (1,)


@pytest.mark.parametrize("kind", ["check", "yes_no"])
def test_a_judge_of_another_vocabulary_reads_the_text_anew_and_is_charged_its_own_tokens(rig, reading, model, tokenizer, kind):
    built = rig()
    if kind == "check":
        checking = CheckJudge.from_text(model, tokenizer, question="\nCheck:\n", yes="yes", no="no", max_check=4)
        judge = replace(checking, tokenizer=tokenizer, growth=4.0)
    else:
        judge = reading
    built.engine.judge_model, built.engine.reader = judge, Reader(tokenizer)
    rollouts = built.bench.sample(built.bench.prompts(5))
    most = built.engine.judge_most(rollouts)
    built.bench.judge(rollouts)
    (charge,) = [charge for charge in built.bench.ledger.charges if charge.kind == "judge"]
    ((_, judgement),) = built.engine.judged
    used = judgement.usage
    assert charge.tokens == used.tokens <= most.tokens
    assert charge.flops == flop_count(model.config).sample(used.read_B, used.written_B)
    assert torch.equal(used.read_B, most.read_B)
    assert judge.worst(rollouts.length_B).read_B.min() > rollouts.length_B.max()


def test_a_fork_keeps_its_verdicts_to_itself(rig):
    built = rig()
    branch = built.bench.fork(10**15)
    branch.judge(branch.sample(branch.prompts(2)))
    assert built.engine.judged == []


# ---- the verifier -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite():
    return load_suite(["opd_bench_stem"], ["opd_bench_coding"], TASKS)


def verifier_of(suite) -> Verifier:
    return arm._verifier(suite, suite.prompts("train"))


def test_training_answers_are_scored_by_the_tasks_own_scorers_code_too(suite):
    docs = {name: task.training_docs()[5] for name, task in suite.tasks.items()}
    good = [Answer([1], doc["prompt"], doc["solution"]) for doc in docs.values()]
    bad = [replace(answer, response="") for answer in good]
    assert verifier_of(suite).scores([*good, *bad, Answer([1], "no such prompt", "")]) == [1.0] * 4 + [0.0] * 4 + [None]


def test_tests_of_a_training_function_are_those_of_its_problem():
    problems = task_module("functions")
    problem = next(problems.problems("train", 3))
    assert problems.Problem.of(problem.identity).hidden_tests() == problem.hidden_tests()
    assert problems.Problem.of(problem.identity).identity == problem.identity


def test_one_document_that_cannot_be_scored_leaves_the_others_their_score():
    def score(task, docs, responses):
        if "bad" in docs:
            raise UserError("no tests")
        return [1.0] * len(docs)

    verifier = Verifier(score, {"a": ("t", 0), "b": ("t", 1)}, {"t": ["good", "bad"]})
    found = [Answer([1], "a", ""), Answer([1], "b", "")]
    assert verifier.scores(found) == [1.0, None]
    assert verifier(found).verdict_B.tolist() == [1.0, 0.5]
    assert verifier(found).unreadable_B.tolist() == [False, True]


@pytest.mark.parametrize("axis", [Axis(), load("embedded", [{"budget": {"axis": "wall-clock", "limit": 1}}]).axis])
def test_the_verifier_is_free_and_said(rig, axis):
    built = rig()
    built.engine.judge_model = Verifier(lambda task, docs, responses: [1.0] * len(docs), {}, {})
    built.bench.ledger = Ledger(10**12, axis)
    rollouts = built.bench.sample(built.bench.prompts(2))
    spent = built.bench.ledger.spent
    built.bench.judge(rollouts)
    assert built.bench.ledger.spent == spent
    assert built.bench.ledger.saw() == ["verifier"]
    assert built.bench.ledger.by_kind("flops")["verifier"] == 0


# ---- whole comparisons ------------------------------------------------------------------------------------------------------------

ONE = {"seeds": 1, "evaluation": {"limit": 2}, "budget": {"limit": 1e9, "points": []}, "methods": {"rlaif": {"batch": 4}}}


def compared(pair_folders, out, **changes):
    with in_this_process():
        return run(configured(pair_folders, **{**ONE, **changes}), out)


def test_a_comparison_with_a_local_judge_of_another_model_leaves_its_audit(pair_folders, tmp_path):
    judge = {"by": "rubric", "model": str(pair_folders["student"])}
    board = compared(pair_folders, tmp_path / "out", judge=judge, max_response=8, budget={"limit": 4e9, "points": [0.5]})
    (method,) = board.methods
    assert method.judge.shift is not None
    assert method.judge.cost["flops"] > 0
    assert {"judge.json", "judge.md", "reward_and_accuracy.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    steps = rows(tmp_path / "out/arms/rlaif/seed-0/steps.jsonl")
    assert all(step["judged"] == step["verifiable"] > 0 for step in steps)
    assert json.loads((tmp_path / "out/judge.json").read_text(encoding="utf-8"))["along"]["rlaif"][0]["verified"]


def test_an_arm_that_the_verifier_rewarded_is_marked_wherever_it_stands(pair_folders, tmp_path):
    contrast = {"contrasts": {"verified": {"rlaif": 1, "sft": -1}}, "methods": {"rlaif": {"batch": 4}, "sft": {"batch": 4, "epochs": 1}}}
    board = compared(pair_folders, tmp_path / "out", judge={"by": "verifier"}, **contrast)
    assert {method.name: method.saw for method in board.methods} == {"rlaif (RLVR)": ["verifier"], "sft": ["teacher text"]}
    assert {name for one in board.contrasts for name in one.weights} == {"rlaif (RLVR)", "sft"}
    text = (tmp_path / "out/leaderboard.md").read_text(encoding="utf-8")
    assert "| rlaif |" not in text
    assert "RLVR" in (tmp_path / "out/judge.md").read_text(encoding="utf-8")


def test_a_run_that_a_judges_purse_ended_resumes_and_pays_nothing_twice(pair_folders, tmp_path, server, monkeypatch):  # noqa: F811
    endpoint = {"url": f"http://127.0.0.1:{server.server_port}/v1", "dollars_per_million_read": 1e4, "max_read": 40, "max_written": 1}
    judge = {"by": "endpoint", "model": "org/judge", "parameters": 1e3}

    def changed(most: float) -> dict:
        return {"judge": {**judge, "endpoint": {**endpoint, "most_dollars": most}}}

    with pytest.raises(Exception, match="most_dollars"):
        compared(pair_folders, tmp_path / "out", **changed(6.0))
    assert 0 < len(server.script.bodies) <= 20
    board = compared(pair_folders, tmp_path / "out", **changed(1e4))
    asked = [json.dumps(body) for body in server.script.bodies]
    assert len(asked) == len(set(asked))
    server.script.bodies.clear()
    again = compared(pair_folders, tmp_path / "undisturbed", **changed(1e4))
    assert sorted(set(asked)) == sorted(json.dumps(body) for body in server.script.bodies)
    assert board.methods[0].score == again.methods[0].score
    assert board.methods[0].spent.tokens == again.methods[0].spent.tokens
    assert board.methods[0].judge.cost["dollars"] == pytest.approx(0.3)
    assert board.methods[0].judge.cost["tokens"] == 31


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"by": "endpoint"}, "need each other"),
        ({"by": "endpoint", "endpoint": {"url": "http://here/v1"}}, "judge.model must say"),
        ({"by": "endpoint", "model": "m", "endpoint": {"url": "http://here/v1"}}, "give judge.parameters, or match on dollars"),
        ({"by": "endpoint", "model": "m", "endpoint": {"url": "here"}}, "url"),
        ({"by": "rubric", "scale": 10}, "9 at most"),
        ({"by": "yes_no", "at_random": True}, "control for judge.by: check"),
        ({"by": "rubric", "template": "{prompt} {response} {"}, "braces"),
        ({"by": "rubric", "template": "{prompt}"}, "needs {prompt} and {response}"),
        ({"by": "rubric", "template": "{prompt} {response} {answer}"}, "braces"),
    ],
)
def test_a_judge_that_cannot_be_is_refused_in_one_line(judge: dict, said: str):
    with pytest.raises(UserError, match=said):
        load("embedded", [{"judge": judge}])


def test_another_axis_takes_an_endpoint_without_parameters():
    judge = {"by": "endpoint", "model": "m", "endpoint": {"url": "http://here/v1"}}
    assert load("embedded", [{"judge": judge, "budget": {"axis": "wall-clock", "limit": 10}}]).judge.parameters is None


def test_what_may_be_paid_may_change_between_runs_and_what_is_asked_may_not():
    def of(**changes):
        judge = {"by": "endpoint", "model": "m", "parameters": 1, "endpoint": {"url": "http://here/v1", **changes}}
        return load("embedded", [{"judge": judge}]).digest

    assert of() == of(most_dollars=3, per_minute=10, concurrency=1, timeout_s=5)
    assert of() != of(max_written=17)

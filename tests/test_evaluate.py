"""Evaluation: its scores are lm-eval's, and it leaves model, tasks, random states and terminal as they were."""

import ast
import functools
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import opd_bench
from opd_bench import evaluate as module
from opd_bench import sandbox
from opd_bench.embedded.corpus import tokenizer_texts
from opd_bench.embedded.fit import new_llama
from opd_bench.embedded.tokenizer import train_tokenizer
from opd_bench.errors import UserError
from opd_bench.evaluate import Item, TaskSuite, UncutHFLM, evaluate, load_suite, overlap, scores
from opd_bench.models import load_model
from opd_bench.resources import EMBEDDED, TASKS

LIMIT = 8


@pytest.fixture(scope="module")
def suite():
    return load_suite(["opd_bench_arithmetic"], ["opd_bench_functions"], TASKS)


@pytest.fixture(scope="module")
def stem():
    return load_suite(["opd_bench_arithmetic"], [], TASKS)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(tokenizer_texts())


@pytest.fixture(scope="module")
def model(tokenizer, stem):
    """A tiny Llama that knows by heart the answers to half of the first test items, and wrong ones to the others."""
    model = new_llama(32, 2, tokenizer, seed=0)
    rows = stem.tasks["opd_bench_arithmetic"].test_docs().select(range(LIMIT))
    answers = [row["answer"] if number % 2 else str(1000 + number) for number, row in enumerate(rows)]
    texts = [f"{row['prompt']}#{answer}<eos>" for row, answer in zip(rows, answers, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels_BT = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(**batch, labels=labels_BT).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def untrained(tokenizer):
    """A tiny Llama whose next token is nearly uniform."""
    return new_llama(32, 2, tokenizer, seed=0).eval()


def test_the_score_is_the_share_of_right_answers(model, tokenizer, stem):
    items = evaluate(model, tokenizer, stem, limit=LIMIT)
    rows = stem.tasks["opd_bench_arithmetic"].test_docs().select(range(LIMIT))
    assert [item.score for item in items] == [0.0, 1.0] * (LIMIT // 2)
    assert [item.response == f"#{row['answer']}" for item, row in zip(items, rows, strict=True)] == [False, True] * (LIMIT // 2)
    assert scores(items, stem) == {"stem": 0.5, "score": 0.5}


def test_items_come_in_order_with_distinct_documents(model, tokenizer, suite):
    items = evaluate(model, tokenizer, suite, limit=LIMIT, batch_size=3)
    assert [item.task for item in items] == ["opd_bench_arithmetic"] * LIMIT + ["opd_bench_functions"] * LIMIT
    assert len({item.doc for item in items}) == 2 * LIMIT
    rows = [row for task in suite.tasks.values() for row in task.test_docs().select(range(LIMIT))]
    assert [item.steps for item in items] == [row["steps"] for row in rows]
    fewer = evaluate(model, tokenizer, suite, limit=2)
    assert [item.doc for item in fewer] == [item.doc for item in [*items[:2], *items[LIMIT : LIMIT + 2]]]


def test_greedy_ignores_the_seed_and_sampling_follows_it(untrained, tokenizer, stem):
    run = functools.partial(evaluate, untrained, tokenizer, stem, limit=2)
    greedy = run()
    sampled = run(sampled=True, seed=1)
    assert sampled != greedy
    assert run(sampled=True, seed=1) == sampled
    assert run(sampled=True, seed=2) != sampled
    assert run(seed=2) == greedy  # also: sampling has left the tasks greedy


def test_sampling_is_from_the_models_full_distribution(untrained, tokenizer, stem):
    """A generation config that would cut the distribution to its mode does not reach the samples."""
    free = evaluate(untrained, tokenizer, stem, limit=2, sampled=True)
    before = untrained.generation_config.to_dict()
    untrained.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=1.5)
    try:
        assert evaluate(untrained, tokenizer, stem, limit=2, sampled=True) == free
    finally:
        untrained.generation_config.update(**before)


def test_evaluation_leaves_no_trace(model, tokenizer, stem, capfd):
    model.train()
    model.lm_head.eval()
    states = [torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()]
    capfd.readouterr()
    try:
        evaluate(model, tokenizer, stem, limit=2, sampled=True)
        modes = (model.training, model.model.training, model.lm_head.training)
    finally:
        model.eval()
    assert modes == (True, True, False)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    assert capfd.readouterr() == ("", "")


def test_the_score_is_the_mean_of_groups_and_a_group_the_mean_of_tasks():
    suite = TaskSuite({}, {"a": "stem", "b": "stem", "c": "coding"})
    items = [Item("a", "1", 1.0, ""), Item("b", "1", 0.0, ""), Item("b", "2", 0.0, ""), Item("b", "3", 1.0, ""), Item("c", "1", 0.0, "")]
    assert scores(items, suite) == {"stem": pytest.approx(2 / 3), "coding": 0.0, "score": pytest.approx(1 / 3)}


def test_prompts_of_both_splits(suite):
    train, test = suite.prompts("train"), suite.prompts("test")
    assert (len(train), len(test)) == (24_000, 500)
    assert not {text for _, text in train} & {text for _, text in test}
    assert train[0][0] == "opd_bench_arithmetic"
    assert train[0][1].startswith("Compute ")
    assert train[0][1].endswith("\n")


def test_what_our_sampler_writes_is_what_generate_writes(tokenizer, stem, monkeypatch):
    student = load_model(str(EMBEDDED / "student-0"))
    ours = evaluate(student, tokenizer, stem, limit=40)
    monkeypatch.setattr(module, "sample", None)
    with pytest.raises(TypeError):
        evaluate(student, tokenizer, stem, limit=40)
    monkeypatch.setattr(module.UncutHFLM, "_model_generate", module.HFLM._model_generate)
    assert evaluate(student, tokenizer, stem, limit=40) == ours
    assert {item.score for item in ours} == {0.0, 1.0}


def test_generate_itself_writes_where_something_bends_the_distribution_or_stops_a_response(untrained, tokenizer, stem, folder, monkeypatch):
    monkeypatch.setattr(module, "sample", None)
    for name, value in (("repetition_penalty", 1.5), ("eos_token_id", [tokenizer.eos_token_id, 9])):
        with monkeypatch.context() as bent:
            bent.setattr(untrained.generation_config, name, value)
            assert len(evaluate(untrained, tokenizer, stem, limit=2)) == 2
    (folder / "plain.yaml").write_text((folder / "plain.yaml").read_text().replace("until: []", "until: [x]"))
    assert len(evaluate(untrained, tokenizer, load_suite(["plain"], [], folder))) == 1


TASK = """
task: {name}
custom_dataset: !function data.load
test_split: test
output_type: {kind}
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: [], max_gen_toks: 8}}
unsafe_code: {unsafe}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
DATA = """
import datasets

def load(**_):
    return {"test": datasets.Dataset.from_list([{"question": "1+1=", "answer": "2"}])}
"""


@pytest.fixture
def folder(tmp_path):
    """A folder of foreign tasks: a plain one and one that would run code, neither with a training split."""
    (tmp_path / "data.py").write_text(DATA)
    for name, unsafe in (("plain", "false"), ("runs_code", "true")):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, kind="generate_until", unsafe=unsafe))
    return tmp_path


def test_foreign_tasks_are_evaluated(model, tokenizer, folder):
    suite = load_suite(["plain"], [], folder)
    (item,) = evaluate(model, tokenizer, suite)
    assert (item.task, item.score) == ("plain", 0.0)
    assert suite.prompts("test") == [("plain", "1+1=")]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"test": datasets.Dataset.from_dict({"question": [], "answer": []})}', "out of bounds for size 0"),
        ("1 / 0", "division by zero"),
        ("next(iter([]))", "StopIteration"),
    ],
)
def test_a_task_without_documents_is_refused(folder, body, said):
    (folder / "data.py").write_text(f"import datasets\n\ndef load(**_):\n    return {body}\n")
    with pytest.raises(UserError, match=f"cannot load the data of task 'plain', or there is none: .*{said}"):
        load_suite(["plain"], [], folder)


def test_a_task_without_training_split_gives_no_training_prompts(folder):
    with pytest.raises(UserError, match="'plain' has no training split"):
        load_suite(["plain"], [], folder).prompts("train")


def test_an_unknown_task_is_answered_with_the_nearest_name(monkeypatch):
    monkeypatch.setattr(module, "TaskManager", functools.partial(module.TaskManager, include_defaults=False))
    with pytest.raises(UserError, match=r"unknown task 'opd_bench_stm' \(did you mean 'opd_bench_stem'\?\)"):
        load_suite(["opd_bench_stm"], [], TASKS)


def test_a_task_counts_once():
    with pytest.raises(UserError, match="'opd_bench_arithmetic' is named twice"):
        load_suite(["opd_bench_stem"], ["opd_bench_arithmetic"], TASKS)
    with pytest.raises(UserError, match="no tasks"):
        load_suite([], [], TASKS)


@pytest.mark.parametrize(("context", "message"), [(100, "a prompt has"), (80, "generates up to 96 tokens")])
def test_nothing_is_cut_to_fit_the_context(model, tokenizer, stem, context, message):
    with pytest.raises(UserError, match=message):
        evaluate(model, tokenizer, stem, max_length=context)


def test_generated_code_is_never_run_without_isolation(model, tokenizer, suite, folder, monkeypatch):
    monkeypatch.delenv(sandbox.CONSENT, raising=False)

    def refuse():
        raise UserError("no isolation")

    def fail(*_, **__):
        raise AssertionError("generated before consent")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(UserError, match="'runs_code' runs generated code outside the sandbox"):
        evaluate(model, tokenizer, load_suite([], ["runs_code"], folder))
    monkeypatch.setattr(sandbox, "isolation", refuse)
    with pytest.raises(UserError, match="no isolation"):
        evaluate(model, tokenizer, suite, limit=1)


def test_lm_eval_is_imported_in_one_module():
    package = Path(opd_bench.__file__).parent
    importing = set()
    for path in package.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        if any(name.split(".")[0] == "lm_eval" for name in names):
            importing.add(path.name)
    assert importing == {"evaluate.py"}


@pytest.mark.slow
def test_the_stock_command_gives_the_same_items(model, tokenizer, tmp_path):
    stem = load_suite(["opd_bench_stem"], [], TASKS)
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'checkpoint'}"]
    command += ["--include_path", TASKS.name, "--tasks", "opd_bench_stem", "--batch_size", str(LIMIT), "--limit", str(2 * LIMIT)]
    command += ["--device", "cpu", "--log_samples", "--output_path", str(tmp_path / "results")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(command, cwd=TASKS.parent, env={**os.environ, **offline}, check=True, capture_output=True)

    items = evaluate(model, tokenizer, stem, limit=2 * LIMIT, batch_size=LIMIT)
    (report,) = (tmp_path / "results").rglob("results_*.json")
    rows = [json.loads(line) for path in (tmp_path / "results").rglob("samples_*.jsonl") for line in path.read_text().splitlines()]
    assert {row["doc_hash"]: (row["exact_match"], row["resps"][0][0]) for row in rows} == {
        item.doc: (item.score, item.response) for item in items
    }
    groups = json.loads(report.read_text())["groups"]
    assert groups["opd_bench_stem"]["exact_match,strict-match"] == scores(items, stem)["stem"] > 0


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


def test_with_a_chat_template_lm_eval_asks_what_the_arms_are_asked(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    chatting, asked = load_suite(["opd_bench_arithmetic"], [], TASKS, chat=tokenizer), []
    encode = UncutHFLM.tok_batch_encode
    monkeypatch.setattr(
        UncutHFLM, "tok_batch_encode", lambda lm, strings, *rest, **more: asked.extend(strings) or encode(lm, strings, *rest, **more)
    )
    evaluate(model, tokenizer, chatting, limit=LIMIT)
    given = [text for _, text in chatting.prompts("test")][:LIMIT]
    assert sorted(asked) == sorted(given)
    assert given[0].startswith("[user] Compute ")
    assert given[0].endswith("\n[assistant] ")


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    with pytest.raises(UserError, match="chat: false"):
        load_suite(["opd_bench_arithmetic"], [], TASKS, chat=tokenizer).prompts("test")


@dataclass
class Texts:
    """A task by its prompts, with an identity where one is given."""

    train: list[dict]
    test: list[dict]

    def has_training_docs(self):
        return True

    def training_docs(self):
        return self.train

    @property
    def eval_docs(self):
        return self.test

    def doc_to_text(self, doc):
        return doc["text"]


def overlap_of(train, test):
    return overlap(TaskSuite({"task": Texts(train, test)}, {"task": "stem"}))["task"]  # pyright: ignore[reportArgumentType]


def test_procedural_items_are_met_in_training_by_identity_whatever_their_text():
    train = [{"text": "Compute 1+2", "identity": "1+2"}]
    test = [{"text": text, "identity": identity} for text, identity in (("What is 1+2?", "1+2"), ("Compute 1+2", "2+1"))]
    assert overlap_of(train, test) == 0.5


@pytest.mark.parametrize(("shared", "met"), [(12, 0.0), (13, 1.0)])
def test_texts_are_met_in_training_by_thirteen_words_in_a_row(shared: int, met: float):
    words = [f"word{number}" for number in range(shared)]
    assert overlap_of([{"text": " ".join(["before", *words, "after"])}], [{"text": " ".join(["else", *words, "other"])}]) == met


def test_short_texts_are_met_in_training_only_whole():
    train = [{"text": "How much is  two and TWO"}]
    assert overlap_of(train, [{"text": "how much is two and two"}, {"text": "how much is two"}]) == 0.5


def test_no_shipped_test_item_is_met_in_training():
    suite = load_suite(["opd_bench_stem"], ["opd_bench_coding"], TASKS)
    assert overlap(suite) == dict.fromkeys(suite.tasks, 0.0)

"""Standard tasks: the catalogue is true of lm-eval, and its tasks load from local copies, score as they should and need no consent."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from datasets.exceptions import DatasetNotFoundError
from hub_copies import write_all
from lm_eval.tasks import TaskManager

from opd_bench import sandbox, standard
from opd_bench.code_eval import CodeEval
from opd_bench.config import Config, determining, load
from opd_bench.embedded.fit import new_llama
from opd_bench.errors import UserError
from opd_bench.evaluate import UncutHFLM, evaluate, load_suite, overlap, scores, tasks_of
from opd_bench.resources import TASKS
from opd_bench.standard import grouped

ROOM = 4096  # tokens of context


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """The folder of copies; what is made of them is kept beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
        patch.delenv(sandbox.CONSENT, raising=False)
        yield write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def suite(data):
    named = grouped(["gsm8k", "gsm8k_cot", "gpqa_diamond_cot_zeroshot", "humaneval", "humaneval_instruct", "mbpp", "mbpp_instruct"])
    return load_suite(named["stem"], named["coding"], TASKS, data_dir=data, retention=["arc_challenge"], robustness=["truthfulqa_gen"])


@pytest.fixture(scope="module")
def model(tokenizer):
    return new_llama(32, 1, tokenizer, seed=0).eval()


# ---- the catalogue ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    root = Path(lm_eval.tasks.__file__).parent
    folders = {str(root / known.folder) for known in standard.TASKS.values()}
    return TaskManager(include_path=sorted(folders), include_defaults=False).task_index


@pytest.mark.parametrize("name", standard.TASKS)
def test_the_catalogue_is_true_of_what_lm_eval_ships(shipped, name):
    known, leaves = standard.TASKS[name], [name]
    while any(shipped[leaf].cfg is None or isinstance(shipped[leaf].cfg["task"], list) for leaf in leaves):
        leaves = [below for leaf in leaves for below in (shipped[leaf].cfg["task"] if shipped[leaf].cfg else sorted(shipped[leaf].tags))]
    for leaf in leaves:
        told = shipped[leaf].cfg
        assert told["dataset_path"] == known.data
        assert (told["output_type"] != "generate_until") == (known.group == "retention")
        assert told.get("unsafe_code", False) == known.runs_code
        assert known.num_fewshot is None or not told.get("num_fewshot")
        assert known.filter in {None, *(one["name"] for one in told.get("filter_list", []))}
        assert known.metric in {None, *(one["metric"] for one in told["metric_list"])}


def test_presets_are_of_catalogued_tasks_of_their_group():
    assert set(standard.PRESETS) == {*standard.GROUPS, "retention", "robustness"}
    assert all(standard.TASKS[name].group == preset for preset, names in standard.PRESETS.items() for name in names)


def test_words_name_tasks_by_group():
    found = grouped(["gsm8k", "robustness", "ifeval", "held_out=gsm8k_cot", "coding=mine"])
    assert found == {
        "stem": ["gsm8k"],
        "coding": ["mine"],
        "held_out": ["gsm8k_cot"],
        "retention": [],
        "robustness": ["ifeval", "truthfulqa_gen"],
    }
    assert grouped(["mine", "humaneval"], "stem")["stem"] == ["mine"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("gsm8k_cto", r"'gsm8k_cto' is no standard task \(did you mean 'gsm8k_cot'\?\); for another .* stem=gsm8k_cto"),
        ("robustnes", r"did you mean 'robustness'\?"),
        ("stm=mine", r"no group 'stm' \(did you mean 'stem'\?\)"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest(word, said):
    with pytest.raises(UserError, match=said):
        grouped([word])


# ---- loaded from copies and evaluated ---------------------------------------------------------------------------------------------


def test_tasks_are_evaluated_by_their_stock_definitions_without_consent(suite, data, model, tokenizer):
    short = load_suite(["gsm8k"], ["humaneval", "mbpp"], TASKS, data_dir=data, retention=["arc_challenge"])
    for task in short.scored.values():
        task.set_config("generation_kwargs", {"max_gen_toks": 4}, update=True)  # a random model writes until it is stopped
    items = evaluate(model, tokenizer, short, limit=2, max_length=ROOM)
    assert [item.task for item in items] == [name for name in short.tasks for _ in range(2)]
    assert {item.score for item in items if item.task != "arc_challenge"} == {0.0}
    assert scores(items, short) == {"stem": 0.0, "coding": 0.0, "score": 0.0}  # whatever was retained
    assert {item.task for item in evaluate(model, tokenizer, short, limit=1, max_length=ROOM, sampled=True)} == set(short.scored)


def test_a_choice_too_long_for_the_context_is_refused(suite, data, model, tokenizer):
    choices = replace(suite, tasks={"arc_challenge": suite.tasks["arc_challenge"]})
    with pytest.raises(UserError, match="a prompt with its answer has"):
        evaluate(model, tokenizer, choices, limit=1, max_length=8)


GOOD = {
    "gsm8k": "7+8=15\n#### 15",
    "gsm8k_cot": " 7 + 8 = 15. The answer is 15.",
    "humaneval": "    return a + 7\n",
    "humaneval_instruct": "    return a + 7\n```\nThis adds.",
    "mbpp": "def times_18(a):\n    return a * 18\n[DONE] def times_18",
    "mbpp_instruct": "\ndef times_18(a):\n    return a * 18\n```\nThis multiplies.",
    "truthfulqa_gen": "There are 7 of them.",
}
BAD = {
    "gsm8k": ["#### 16", "15", "Question: #### 15"],
    "gsm8k_cot": [" The answer is 16."],
    "humaneval": ["    return 7\n", "    import sys; sys.exit(0)\n", "    return (\n", "\ndef check(_): pass\n"],
    "humaneval_instruct": ["    return 7\n```"],
    "mbpp": ["def times_18(a):\n    return 18\n[DONE]", ""],
    "mbpp_instruct": ["I would multiply."],
    "truthfulqa_gen": ["Nobody can ever know this."],
}


@pytest.mark.parametrize("name", GOOD)
def test_right_answers_score_and_wrong_ones_do_not(suite, name):
    doc = list(suite.tasks[name].eval_docs)[7]
    assert suite.score(name, [doc] * (1 + len(BAD[name])), [GOOD[name], *BAD[name]]) == [1.0, *[0.0] * len(BAD[name])]


def test_the_filter_of_the_catalogue_counts_and_shuffled_answers_stay_where_they_are(suite, data):
    name = "gpqa_diamond_cot_zeroshot"
    docs = list(suite.tasks[name].eval_docs)
    assert len({doc["answer"] for doc in docs}) > 1
    assert list(load_suite([name], [], TASKS, data_dir=data).tasks[name].eval_docs) == docs
    assert suite.score(name, docs, [f"Not (A), but {doc['answer']}!" for doc in docs]) == [1.0] * len(docs)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"])
def test_rollouts_are_recorded_on_the_prompts_that_are_scored(suite, model, tokenizer, monkeypatch, template):
    names = ("gsm8k", "mbpp_instruct")
    asking = replace(suite, tasks={name: suite.tasks[name] for name in names}, chat=tokenizer if template else None)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    encode, asked = UncutHFLM.tok_batch_encode, []

    def listening(lm, strings, *rest, **more):
        asked.extend(strings)
        return encode(lm, strings, *rest, **more)

    monkeypatch.setattr(UncutHFLM, "tok_batch_encode", listening)
    evaluate(model, tokenizer, asking, limit=2, max_length=ROOM)
    posed = asking.posed(asking.first_docs(2))
    assert sorted(text for _, text in posed) == sorted(asked)
    assert posed[0][1].count("####") == 5
    assert all(("[user]" in text) == bool(template) for _, text in posed)


def test_only_what_is_evaluated_apart_is_trained_on(suite, data):
    assert {name for name, task in suite.scored.items() if task.has_training_docs()} == {"gsm8k"}
    assert overlap(suite) == dict.fromkeys(suite.tasks, 0.0)
    with pytest.raises(UserError, match="'gpqa_diamond_cot_zeroshot' has no validation split"):
        load_suite(["gpqa_diamond_cot_zeroshot"], [], TASKS, "validation", data_dir=data)


def test_a_configuration_carries_the_copies_to_every_process_and_their_place_changes_no_result(data):
    named = {"tasks": {**grouped(["gsm8k", "arc_challenge"]), "data_dir": str(data)}}
    config = Config.model_validate_json(load("embedded", [named]).model_dump_json())
    suite = tasks_of(config, None)
    assert suite.groups == {"gsm8k": "stem", "arc_challenge": "retention"}
    assert list(suite.scored) == ["gsm8k"]
    assert determining(config.model_dump()) == determining(load("embedded", [named, {"tasks": {"data_dir": "elsewhere"}}]).model_dump())


# ---- what cannot be had -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", standard.GROUPS)
def test_multiple_choice_counts_for_no_score(data, group):
    with pytest.raises(UserError, match=r"'arc_challenge' compares the likelihoods .* put it under retention"):
        load_suite(**{"stem": [], "coding": [], group: ["arc_challenge"]}, include_path=TASKS, data_dir=data)


@pytest.mark.parametrize(
    ("name", "error", "folder", "said"),
    [
        (
            "sciq",
            ConnectionError("Couldn't reach it."),
            None,
            r"set allenai/sciq: Couldn't reach it; .* DIR/allenai/sciq, and give --data-dir DIR$",
        ),
        (
            "sciq",
            ConnectionError("Couldn't reach it."),
            "copies",
            r"run hf download allenai/sciq --repo-type dataset --local-dir \S*copies/allenai/sciq$",
        ),
        (
            "gpqa_diamond_zeroshot",
            ConnectionError("No."),
            None,
            r"gated: accept its licence at https://\S+/Idavidrein/gpqa and run hf auth login",
        ),
        ("winogrande", DatasetNotFoundError("It is a gated dataset."), None, "hf auth login"),
    ],
)
def test_a_missing_data_set_is_named_with_how_to_provide_it(monkeypatch, tmp_path, name, error, folder, said):
    def unreachable(path, *_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    (tmp_path / "copies").mkdir()
    with pytest.raises(UserError, match=said):
        load_suite([], [], TASKS, data_dir=folder and tmp_path / folder, retention=[name])


def test_a_damaged_copy_is_named_and_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder \S*dta of data sets"):
        load_suite(["gsm8k"], [], TASKS, data_dir=tmp_path / "dta")
    (tmp_path / "allenai/sciq").mkdir(parents=True)
    with pytest.raises(UserError, match=r"the copy of the data set allenai/sciq in .* cannot be read"):
        load_suite([], [], TASKS, data_dir=tmp_path, retention=["sciq"])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "antlr4", None)
    with pytest.raises(UserError, match=r"'minerva_math500' needs packages .* pip install 'lm-eval\[math\]'"):
        load_suite(["minerva_math500"], [], TASKS)


OWN = """
task: humaneval
custom_dataset: !function data.load
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
unsafe_code: true
"""


def test_a_task_of_the_users_own_is_not_trusted_for_its_name(tmp_path, model, tokenizer):
    (tmp_path / "mine.yaml").write_text(OWN)
    (tmp_path / "data.py").write_text(
        'import datasets\n\ndef load(**_):\n    return {"test": datasets.Dataset.from_list([{"question": "q", "answer": "a"}])}\n'
    )
    with pytest.raises(UserError, match="'humaneval' runs generated code outside the sandbox"):
        evaluate(model, tokenizer, load_suite([], ["humaneval"], tmp_path))


# ---- code_eval --------------------------------------------------------------------------------------------------------------------

RIGHT, WRONG = "def f(a):\n    return a + 1", "def f(a):\n    return a"


def test_pass_at_k_is_the_chance_that_one_of_k_is_right():
    found, results = CodeEval().compute(references=["assert f(1) == 2"] * 2, predictions=[[RIGHT, WRONG, WRONG], [RIGHT] * 3], k=[1, 2, 5])
    assert found == {"pass@1": pytest.approx((1 / 3 + 1) / 2), "pass@2": pytest.approx((2 / 3 + 1) / 2)}
    assert [one["passed"] for _, one in results[0]] == [True, False, False]


@pytest.mark.parametrize(
    "program", ["while True: pass", "import os\nos._exit(0)", "raise SystemExit", "def f(a:", RIGHT + "\nimport numpy"]
)
def test_a_program_that_does_not_get_through_its_tests_fails(program):
    found, results = CodeEval().compute(references=["assert f(1) == 2"], predictions=[[program]], k=[1], timeout=0.3)
    assert found == {"pass@1": 0.0}
    assert not results[0][0][1]["passed"]


def test_tests_that_the_sandbox_cannot_run_are_refused_and_not_failed():
    with pytest.raises(UserError, match="tests that import numpy"):
        CodeEval().compute(references=["import numpy as np\nassert f(1) == np.add(1, 1)"], predictions=[[RIGHT]])

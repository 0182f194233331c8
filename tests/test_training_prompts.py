"""Training prompts from data sets: what is kept of them, what is refused, and a comparison that trains on them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from datasets import config as datasets_config
from datasets.packaged_modules.json.json import Json
from huggingface_hub import errors
from pydantic import ValidationError
from test_compare import configured, in_this_process, rows, run
from test_evaluate import TEMPLATE, Texts

from opd_bench import evaluate, training_prompts
from opd_bench.arm import workshop
from opd_bench.config import load as load_config
from opd_bench.errors import UserError
from opd_bench.evaluate import TaskSuite, load_suite
from opd_bench.plan import jobs
from opd_bench.preflight import pinned
from opd_bench.privilege import privilege_of
from opd_bench.prompts import Stream
from opd_bench.resources import TASKS
from opd_bench.settings import PromptSource
from opd_bench.training_prompts import Pool, Prompt, load, said

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Compute 1+2\n"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "Compute 3+4\n"},
    {"role": "assistant", "content": "7"},
]


def jsonl(path, found: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return str(path)


def texts(*prompts: str) -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in prompts]


def source(data: str, **settings: Any) -> PromptSource:
    return PromptSource(data=data, **settings)


def questions(pool: Pool) -> list[str]:
    return [prompt.question for prompt in pool.prompts]


def complaint(data: str, **settings: Any) -> str:
    with pytest.raises(UserError) as raised:
        load([source(data, **settings)])
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- what is read -----------------------------------------------------------------------------------------------------------------


def test_files_of_either_format_and_folders_of_them_give_the_same_prompts(tmp_path):
    found = [{"question": f"What is {number}?", "other": number} for number in range(5)]
    lines = jsonl(tmp_path / "lines.jsonl", found)
    (tmp_path / "list.json").write_text(json.dumps(found))
    (tmp_path / "folder").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), tmp_path / "table.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), tmp_path / "folder/train-00000-of-00001.parquet")
    asked = {"columns": {"prompt": "question"}, "name": "all"}
    pools = [
        load([source(data, **asked)]) for data in (lines, *(str(tmp_path / name) for name in ("list.json", "table.parquet", "folder")))
    ]
    assert questions(pools[0]) == [row["question"] for row in found]
    assert len({pool.digest for pool in pools}) == 1
    assert [source(lines).called, source(str(tmp_path / "table.parquet")).called] == ["lines", "table"]


def test_what_is_kept_once_does_not_depend_on_the_order_of_rows(tmp_path):
    rng = random.Random(0)
    found = [rng.choice(("What is {}?", "WHAT is  {}?", " what is {}?\n")).format(rng.randrange(20)) for _ in range(60)]

    def kept(order: list[str]) -> set[str]:
        return {" ".join(text.lower().split()) for text in questions(load([source(jsonl(tmp_path / "a.jsonl", texts(*order)))]))}

    once = kept(found)
    for _ in range(3):
        assert kept(rng.sample(found, len(found))) == once
    pool = load([source(str(tmp_path / "a.jsonl"))])
    assert len(pool.prompts) == len(once)
    assert pool.counts["a"]["removed"] == {"met before": len(found) - len(once)}


def test_sources_make_one_pool_in_which_each_prompt_stands_once(tmp_path):
    one = source(jsonl(tmp_path / "one.jsonl", texts("A?", "B?", "", "C?")), most=2)
    other = source(jsonl(tmp_path / "other.jsonl", texts("b?", "D?")), name="mine")
    pool = load([one, other])
    assert [(prompt.source, prompt.question) for prompt in pool.prompts] == [("one", "A?"), ("one", "B?"), ("mine", "D?")]
    assert said(pool.counts) == ["one: 2 of 2 prompts", "mine: 1 of 2 prompts (1 met before)"]


def test_a_conversation_is_asked_up_to_its_last_answer_by_the_chat_template(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    data = jsonl(tmp_path / "chats.jsonl", [{"talk": CHAT, "steps": "3+4=7"}])
    (prompt,) = load([source(data, columns={"messages": "talk", "steps": "steps"})]).prompts
    asked = "[system] Be brief.\n[user] Compute 1+2\n\n[assistant] 3\n[user] {}\n[assistant] "
    assert prompt.given(tokenizer) == asked.format("Compute 3+4\n")
    assert prompt.given(tokenizer, "{prompt}{steps}") == asked.format("Compute 3+4\n3+4=7")
    assert prompt.question.endswith("assistant: 3\n\nuser: Compute 3+4\n")
    assert Prompt.of("mine", "Why?", {}).given(tokenizer) == "[user] Why?\n[assistant] "
    assert Prompt.of("mine", "Why?", {}).given(None) == "Why?"


def test_the_same_file_gives_the_same_stream_and_an_edited_one_another_run(tmp_path, pair_folders):
    data = jsonl(tmp_path / "mine.jsonl", texts(*(f"Compute {number}+1\n" for number in range(10))))
    tasks = {"stem": ["opd_bench_arithmetic"], "coding": []}
    config = configured(pair_folders, prompts=[{"data": data}], tasks=tasks)

    def stream():
        workshop.cache_clear()
        return Stream(workshop(config.model_dump_json()).encoded, seed=1)(0, 20)

    first, ids = stream(), [job.run_id for job in jobs(config)]
    assert first == stream()
    assert set(first.tasks) == {"mine"}
    moved = jsonl(tmp_path / "elsewhere.jsonl", rows(tmp_path / "mine.jsonl"))
    assert [job.run_id for job in jobs(configured(pair_folders, prompts=[{"data": moved, "name": "mine"}], tasks=tasks))] == ids
    jsonl(tmp_path / "mine.jsonl", [*rows(tmp_path / "mine.jsonl")[:-1], {"prompt": "Compute 9+2\n"}])
    assert not {job.run_id for job in jobs(config)} & set(ids)
    workshop.cache_clear()


# ---- what is kept apart -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "goes"), [(12, False), (13, True)])
def test_a_prompt_goes_that_contains_thirteen_words_of_any_tasks_evaluation(shared: int, goes: bool):
    words = " ".join(f"word{number}" for number in range(shared))
    tasks = {"scored": Texts([], [{"text": f"{words} scored"}]), "kept": Texts([], [{"text": f"held {words} out", "identity": "1"}])}
    suite: Any = TaskSuite(tasks, {"scored": "stem", "kept": "held_out"})  # pyright: ignore[reportArgumentType]
    assert evaluate.met(suite, [[f"before {words.upper()}\n after", "more"], ["another"]]) == [["kept", "scored"] if goes else [], []]


def test_what_went_is_counted_by_task_and_nothing_left_is_refused(tmp_path, tokenizer):
    suite = load_suite(["opd_bench_arithmetic"], [], TASKS)
    test_items = [text for _, text in suite.asked("test")][:3]
    pool = load([source(jsonl(tmp_path / "a.jsonl", texts("Why?", *test_items, "Because " * 50)))])
    why = [" and ".join(tasks) for tasks in evaluate.met(suite, [prompt.texts for prompt in pool.prompts])]
    left = pool.without("contaminated", why).fitting(tokenizer, None, None, room=20)
    assert questions(left) == ["Why?"]
    assert said(left.counts) == ["a: 1 of 5 prompts (1 too long for the context, 3 met in test items of opd_bench_arithmetic)"]
    assert said(pool.counts) == ["a: 5 of 5 prompts"]  # which stays as it was
    with pytest.raises(UserError, match=r"no prompts are left to train on: a: 0 of 5 prompts \(2 too long"):
        pool.without("contaminated", why).fitting(tokenizer, None, None, room=0)


# ---- what is refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "columns", "said_"),
    [
        (texts("Why?"), {"prompt": "promt"}, "no column 'promt' (did you mean 'prompt'?)"),
        ([{"id": 1, "x": "y"}], {"prompt": "question"}, "no column 'question' (known: id, x)"),
        (texts("Why?", 7), {"prompt": "prompt"}, "row 2: 'prompt' is of type int, not text; choose another column"),  # pyright: ignore
        ([{"prompt": CHAT}], {"prompt": "prompt"}, "row 1: 'prompt' is of type list, not text; map it as messages"),
        (texts("Why?"), {"messages": "prompt"}, "row 1: the messages are of type str"),
        ([{"m": [{"from": "human", "value": "Why?"}]}], {"messages": "m"}, "role and content, both text, and has from, value"),
        ([{"m": CHAT}, {"m": CHAT[:1]}], {"messages": "m"}, "row 2: no message of a user stands before the answer"),
        (texts("", " \n"), {"prompt": "prompt"}, "no prompts are left to train on: mine: 0 of 2 prompts (2 empty)"),
        ([], {"prompt": "prompt"}, "has no rows"),
    ],
)
def test_rows_that_are_no_prompts_are_one_line_of_advice(tmp_path, found, columns, said_):
    assert said_ in complaint(jsonl(tmp_path / "mine.jsonl", found), columns=columns)


def test_files_that_cannot_be_read_are_one_line_of_advice(tmp_path):
    assert "there is no missing.jsonl; prompts.data is" in complaint("missing.jsonl")
    assert "no hub id" not in complaint("nothing")
    broken = tmp_path / "broken.jsonl"
    for second, what in (('{"prompt": "B?"', "line 2 is not JSON"), ('"B?"', "line 2 is no JSON object"), ("B\xff", "line 2 is not JSON")):
        broken.write_bytes(f'{{"prompt": "A?"}}\n{second}\n'.encode("latin-1"))
        assert what in complaint(str(broken))
    for name, advice in (("a.txt", "is no file of prompts"), ("a.parquet", "cannot read")):
        (tmp_path / name).write_text("A?")
        assert advice in complaint(str(tmp_path / name))
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in complaint(str(tmp_path / "empty"))
    assert "test" in complaint(jsonl(tmp_path / "good.jsonl", texts("A?")), split="test")


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"streaming": True}, "streaming needs most"),
        ({"columns": {"messages": "a", "prompt": "b"}}, "either prompt"),
        ({"columns": {"solution": "a"}}, "either prompt"),
    ],
)
def test_a_source_that_contradicts_itself_is_refused(settings, advice):
    with pytest.raises(ValidationError, match=advice):
        source("mine.jsonl", **settings)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"prompts": [{"data": "a/mine.jsonl"}, {"data": "b/mine.json"}]}, "two sources of prompts are called 'mine'"),
        ({"prompts": [{"data": "mine.jsonl", "columns": {"messages": "m"}}]}, "messages need chat: true"),
        ({"prompts": [{"data": "mine.jsonl"}], "judge": {"by": "solve"}}, "judge.by: solve needs a prompt's task"),
        ({"prompts": [{"data": "mine.jsonl"}], "judge": {"by": "verifier"}}, "judge.by: verifier needs a prompt's task"),
        ({"prompts": [{"data": "mine.jsonl"}], "privileged": "{prompt}{solution}"}, "privileged names 'solution'"),
    ],
)
def test_what_needs_the_tasks_own_prompts_says_so(pair_folders, changes, advice):
    with pytest.raises(UserError, match=advice):
        configured(pair_folders, **changes)


def test_the_example_of_the_docs_is_a_configuration():
    page = (Path(__file__).parents[1] / "docs/use-your-own-data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    names = [found.called for found in load_config("smol", [yaml.safe_load(block), {"judge": {"by": "check"}}]).prompts]
    assert names == ["math", "chats"]


# ---- the hub, of which the client is real and the answers are not -----------------------------------------------------------------


def http(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=SimpleNamespace(url="http://127.0.0.1/data"))
    return kind("refused\nand more", response=response)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """No data set is in the cache, and none is remembered from another test."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    training_prompts._hub_builder.cache_clear()
    yield monkeypatch
    training_prompts._hub_builder.cache_clear()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (http(errors.GatedRepoError, 401), "is a gated dataset on the Hub"),
        (http(errors.GatedRepoError, 403), "accept its terms"),
        (http(errors.RepositoryNotFoundError, 404), "'owner/name' doesn't exist on the Hub or cannot be accessed; for a private one"),
        (http(errors.RevisionNotFoundError, 404), "Revision 'v2' doesn't exist for dataset 'owner/name'"),
        (errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
        (http(errors.HfHubHTTPError, 500), "cannot read owner/name@v2: refused"),
    ],
    ids=lambda of: type(of).__name__,
)
def test_what_the_hub_refuses_is_one_line_of_advice(hub, error, advice):
    def download(*_: Any, **__: Any) -> str:
        raise error

    hub.setattr(huggingface_hub.HfApi, "hf_hub_download", download)
    assert advice in complaint("owner/name@v2", streaming=True, most=3)


@pytest.mark.parametrize("settings", [{}, {"streaming": True, "most": 3}])
@pytest.mark.parametrize("asked", ["owner/name", "owner/name@v2", f"owner/name@{COMMIT}"])
def test_without_network_the_real_library_finds_what_its_cache_holds_and_it_is_pinned(hub, tmp_path, pair_folders, asked, settings):
    hub.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    data = jsonl(tmp_path / "mine.jsonl", texts(*"ABCDE"))
    made = Json(cache_dir=str(tmp_path), dataset_name="name", hash=COMMIT, data_files=data)
    made.download_and_prepare()
    (tmp_path / "cache/owner___name").mkdir(parents=True)
    Path(made.cache_dir).parents[1].rename(tmp_path / "cache/owner___name/default")  # where a data set of the hub would lie

    found = source(asked, **settings)
    pool = load([found])
    assert (questions(pool), pool.counts["name"]["data"]) == ([*"ABCDE"][: found.most], f"owner/name@{COMMIT}")
    (given,) = pinned(configured(pair_folders, prompts=[found.model_dump()])).prompts
    assert (given.data, given.called) == (f"owner/name@{COMMIT}", "name")
    assert load([given]).digest == pool.digest
    assert f"holds owner/name at {COMMIT}" in complaint(f"owner/name@{COMMIT[::-1]}")


# ---- from end to end --------------------------------------------------------------------------------------------------------------


def test_arms_train_on_a_data_set_and_the_leaderboard_says_what_was_taken_out(tmp_path, pair_folders):
    test_item = load_suite(["opd_bench_arithmetic"], [], TASKS).asked("test")[0][1]
    mine = [f"Compute {number}+{number}\n" for number in range(11, 31)]
    found = [{"q": text, "a": f"about {text}"} for text in (*mine, mine[0], test_item)]
    config = configured(
        pair_folders,
        prompts=[{"data": jsonl(tmp_path / "mine.jsonl", found), "columns": {"prompt": "q", "solution": "a"}}],
        privileged="{prompt}{solution}",
        tasks={"stem": ["opd_bench_arithmetic"], "coding": []},
        budget={"limit": 5e9, "points": []},
        methods={"opd_rlaif": {"batch": 4}},
        seeds=1,
    )
    with in_this_process():
        board = run(config, tmp_path / "out")
    shop = workshop(config.model_dump_json())
    assert {str(shop.pair.tokenizer.decode(ids)) for _, ids in shop.encoded} <= {*mine}
    privilege = privilege_of(shop.pair.teacher)
    assert privilege is not None
    assert shop.pair.tokenizer.decode(privilege.ids(shop.encoded[0][1])) == f"{mine[0]}about {mine[0]}"
    (line,) = (note for note in board.notes if note.startswith("Trained on"))
    assert line == "Trained on mine: 20 of 22 prompts (1 met before, 1 met in test items of opd_bench_arithmetic)."
    gate = next(gate for gate in board.gates if gate.name == "overlap")
    assert gate.held
    assert gate.said == "no test item is met in training; prompts taken out for that: opd_bench_arithmetic 1."
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    assert manifest["prompts"]["mine"]["contaminated"] == {"opd_bench_arithmetic": 1}
    assert manifest["train_test_overlap"] == {"opd_bench_arithmetic": 0.0}
    assert any(line.startswith("prompts mine: 20 of 22") for line in manifest["warnings"])
    workshop.cache_clear()


def test_tasks_without_a_training_split_can_be_scored(tmp_path, pair_folders, monkeypatch):
    suite = load_suite(["opd_bench_arithmetic"], [], TASKS)
    for task in suite.tasks.values():
        monkeypatch.setattr(task, "has_training_docs", lambda: False)
        monkeypatch.setattr(task, "training_docs", lambda: pytest.fail("read"))
    monkeypatch.setattr(evaluate, "tasks_of", lambda *_: suite)
    workshop.cache_clear()
    data = jsonl(tmp_path / "mine.jsonl", texts("Compute 11+11\n"))
    assert workshop(configured(pair_folders, prompts=[{"data": data}]).model_dump_json()).encoded[0][0] == "mine"
    workshop.cache_clear()

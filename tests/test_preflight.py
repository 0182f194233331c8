"""Before anything trains: versions, ends of texts, padding, and memory that cannot be enough."""

from __future__ import annotations

import json
import re
import shutil

import huggingface_hub
import pytest
from test_compare import configured
from transformers import GenerationConfig

from opd_bench import hub, preflight
from opd_bench.embedded.fit import new_llama
from opd_bench.errors import UserError
from opd_bench.evaluate import evaluate, load_suite, scores
from opd_bench.models import Pair, load_model, load_pairs, load_tokenizer
from opd_bench.preflight import FEW, GIB, examine, headroom, memory, named, parameters, pinned, sources
from opd_bench.resources import EMBEDDED, TASKS
from opd_bench.teachers import Teachers

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def config(pair_folders):
    return configured(pair_folders)


@pytest.fixture
def pair(pair_folders):
    return load_pairs([str(pair_folders["student"])], str(pair_folders["teacher"]))[0]


def test_a_pair_that_agrees_gives_no_warning_and_the_facts(config, pair):
    checked = examine(config, pair, 40)
    assert not checked.warnings
    said = "\n".join(checked.facts)
    assert "rollouts end with '<eos>'" in said
    assert "chat template: none" in said
    assert f"40 tokens; the models take {pair.student.config.max_position_embeddings}" in said


def test_a_model_that_ends_otherwise_than_its_tokenizer_is_warned_of(config, pair):
    pair.student.generation_config = GenerationConfig(eos_token_id=[0])
    (warning,) = examine(config, pair, 40).warnings
    assert re.search(r"the student's generation_config ends texts with '<pad>', and its tokenizer with '<eos>'", warning)
    pair.student.generation_config = GenerationConfig(eos_token_id=[pair.eos, 0])
    checked = examine(config, pair, 40)
    assert not checked.warnings
    assert any("ends texts with '<pad>', too" in fact for fact in checked.facts)


def test_padding_is_said(config, pair_folders, tokenizer, tmp_path):
    model = new_llama(32, 1, tokenizer, seed=0)
    model.resize_token_embeddings(len(tokenizer) + 3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (pair,) = load_pairs([str(tmp_path)], str(pair_folders["teacher"]))
    facts = examine(config, pair, 40).facts
    assert f"the student has {len(tokenizer) + 3} output columns for {len(tokenizer)} tokens" in "\n".join(facts)


def test_an_unpinned_hub_id_is_said_with_its_commit_and_pinned_for_workers(monkeypatch, pair_folders, pair, tmp_path):
    folder = tmp_path / COMMIT
    shutil.copytree(pair_folders["student"], folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **options: str(folder))
    hub._download.cache_clear()
    config = configured(pair_folders, students=["owner/model"])
    version = f"owner/model@{COMMIT}"
    assert sources(config)["owner/model"] == {"version": version}
    assert any(fact.startswith(f"owner/model is {version}; ") for fact in examine(config, pair, 40).facts)
    assert named(config, sources(config)) == {"student": [version], "teacher": [config.teacher]}
    assert pinned(config).students == [version]
    assert pinned(config).teacher == config.teacher
    exact = configured(pair_folders, students=[version])
    assert pinned(exact) == exact
    assert not any("write that name" in fact for fact in examine(exact, pair, 40).facts)
    hub._download.cache_clear()


def test_weights_of_a_pulled_model_are_called_what_they_are(pair_folders, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(pair_folders["student"], folder)
    source = {"name": "smollm2-135m", "from": "a package", "weights": "Q4_1-dequantised"}
    (folder / hub.SOURCE_FILE).write_text(json.dumps(source))
    config = configured(pair_folders, students=[str(folder)])
    assert named(config, sources(config)) == {"student": [f"{folder} (smollm2-135m, Q4_1-dequantised)"], "teacher": [config.teacher]}


def test_parameters_are_counted_from_headers(pair_folders):
    folder = str(pair_folders["teacher"])
    assert parameters(folder) == sum(weight.numel() for weight in load_model(folder).parameters())


def test_memory_that_cannot_be_enough_is_refused_with_advice(config, pair_folders, monkeypatch):
    monkeypatch.setattr(preflight, "parameters", lambda folder: 10**9)
    need = 4 + 4 + 4 + 12  # 1e9 bytes: both models, copy of the student, gradients and moments
    assert memory(config, 1, free=need * 10**9).startswith("memory: about")
    with pytest.raises(UserError, match=r"need 22\.4 GiB at least, and 22\.4 GiB are free; lower --jobs") as raised:
        memory(config, 1, free=need * 10**9 - 1)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="2 arms"):
        memory(config, 2, free=need * 10**9)
    monkeypatch.setattr(preflight.device, "places", lambda name, workers: ["0", "1", "0"])  # arms that share a GPU share its memory
    with pytest.raises(UserError, match="2 arms side by side"):
        memory(config, 3, free=2 * need * 10**9 - 1)
    assert "2 at once" in memory(config, 3, free=2 * need * 10**9)


def test_less_is_needed_with_adapters_or_a_narrow_teacher(pair_folders, monkeypatch):
    monkeypatch.setattr(preflight, "parameters", lambda folder: 10**9)
    free = 14 * 10**9  # enough for neither gradients nor moments of 1e9 weights
    with pytest.raises(UserError):
        memory(configured(pair_folders), 1, free=free)
    assert f"{free / GIB:.1f} GiB are free" in memory(configured(pair_folders, lora={"rank": 4}), 1, free=free)
    assert memory(configured(pair_folders, dtype="bfloat16", lora={"rank": 4}), 1, free=11 * 10**9)


def test_headroom_is_looked_for_on_a_few_items_before_anything_trains():
    suite = load_suite(["opd_bench_arithmetic"], [], TASKS)
    teacher, student = (load_model(str(EMBEDDED / name)) for name in ("teacher", "student-0"))
    pair = Pair(student, teacher, load_tokenizer(str(EMBEDDED / "teacher")))
    room = headroom(pair, Teachers(teacher), suite, 16)
    assert not room.warnings
    said = re.fullmatch(rf"on {FEW} items a task the teacher scores (1\.00|0\.9\d) and the first cold start (0\.\d\d)", room.facts[0])
    assert said
    items = evaluate(student, pair.tokenizer, suite, limit=FEW, batch_size=16)
    assert float(said[2]) == round(scores(items, suite)["score"], 2)
    (warning,) = headroom(pair, Teachers(student), suite, 16).warnings
    assert "nothing to distil" in warning

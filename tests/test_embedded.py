"""The embedded models and what they are made from."""

import json
import random
from itertools import islice

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from opd_bench.embedded import build, corpus, measures
from opd_bench.embedded.fit import batches, deepen, encode, fit, new_llama
from opd_bench.models import load_pair
from opd_bench.resources import EMBEDDED, task_module


@pytest.fixture(scope="module")
def pair():
    return load_pair(str(EMBEDDED / "student"), str(EMBEDDED / "teacher"))


def final_line(document):
    return "".join(text for text, _ in document).rsplit("\n", 1)[-1]


def test_shipped_models_stay_within_ten_megabytes_and_load_by_stock_classes():
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    assert any(path.suffix == ".safetensors" for path in files)
    assert isinstance(AutoTokenizer.from_pretrained(EMBEDDED / "student"), PreTrainedTokenizerFast)
    for name in ("student", "teacher"):
        assert type(AutoModelForCausalLM.from_pretrained(EMBEDDED / name)).__name__ == "LlamaForCausalLM"


def test_tokenizer_round_trips_any_printable_text(pair):
    text = "".join(map(chr, range(32, 127))) + "\n    def f(a):\n  return  12+34=46\n#46"
    assert pair.tokenizer.decode(pair.tokenizer(text).input_ids) == text


def test_the_student_stands_at_two_to_seven_tenths_of_the_teacher_on_every_task(pair):
    for task in ("arithmetic", "functions"):
        teacher = measures.accuracy(pair.teacher, pair.tokenizer, task)
        assert teacher >= 0.9
        assert 0.2 * teacher <= measures.accuracy(pair.student, pair.tokenizer, task) <= 0.7 * teacher


def test_the_teacher_recovers_and_judges_as_well_as_it_is_said_to(pair):
    said = json.loads((EMBEDDED / "measured.json").read_text())
    assert measures.recovery(pair.teacher, pair.tokenizer) == pytest.approx(said["recovery"]["arithmetic"], abs=0.03)
    for task, auroc in said["judge_auroc"].items():
        measured = measures.judge_auroc(pair.teacher, pair.student, pair.tokenizer, task)
        assert measured == pytest.approx(auroc, abs=0.05)
        assert measured > 0.7


def test_every_recovery_ends_right_and_carries_no_weight_on_unsupervised_errors():
    rng, weights = random.Random(0), set()
    for problem in islice(task_module("arithmetic").problems("train", 3), 200):
        document = corpus.recovery(problem, rng, wait_weight=3.0)
        assert final_line(document) == f"#{problem.answer}"
        assert ("wait\n", 3.0) in document
        wrong = [
            weight
            for text, weight in document
            if weight != 3.0 and not set(text.split("\n")) <= {*map(str, problem.steps), f"#{problem.answer}", ""}
        ]
        weights |= set(wrong)
    assert weights == {0.0, 1.0}  # most errors are masked, a few are the teacher's own


def test_verdicts_follow_the_answers_last_line_and_are_balanced():
    rng, verdicts = random.Random(0), []
    for problem in islice(task_module("arithmetic").problems("train", 4), 300):
        (answer, weight), _, (check, _), (verdict, _) = corpus.judged(problem, "arithmetic", rng, walks=0.7)
        assert weight == 0
        assert check == problem.solution + "\n"
        assert (verdict == corpus.YES) == (answer.rsplit("\n", 1)[-1] == f"#{problem.answer}")
        verdicts.append(verdict)
    assert 0.4 < verdicts.count(corpus.YES) / len(verdicts) < 0.6


def test_a_deeper_model_begins_as_the_same_function(pair):
    ids = pair.tokenizer("Compute 1+2+3\n1+2=3\n", return_tensors="pt").input_ids
    assert (deepen(pair.student)(ids).logits - pair.student(ids).logits).abs().max() < 1e-5


def test_weights_line_up_with_tokens(pair):
    ids, weights = encode("Compute 1+2+3\n", [("1+2=3\n", 0.0), ("3+3=6\n#6", 1.0)], pair.tokenizer)
    assert pair.tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight]) == "3+3=6\n#6<eos>"


def trained(tokenizer, steps, checkpoint=None):
    examples = (encode(prompt, document, tokenizer) for prompt, document in corpus.documents(0, corpus.SOLVING))
    model = new_llama(32, 1, tokenizer, seed=0)
    fit(model, batches(examples, 512, random.Random(0)), steps, 1e-3, checkpoint=checkpoint, every=2, constant=True)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_training_that_was_interrupted_ends_where_it_would_have(pair, tmp_path):
    trained(pair.tokenizer, 2, tmp_path / "checkpoint")
    assert torch.equal(trained(pair.tokenizer, 4, tmp_path / "checkpoint"), trained(pair.tokenizer, 4))


@pytest.mark.slow
def test_a_shortened_build_writes_what_the_package_ships(tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "PROBLEMS", 4)
    build.build(tmp_path, 0, Console(quiet=True), shorten=4000)
    shipped = sorted(path.relative_to(EMBEDDED) for path in EMBEDDED.rglob("*") if path.is_file())
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".checkpoint") == shipped
    ours, theirs = (load_pair(str(folder / "student"), str(folder / "teacher")) for folder in (tmp_path, EMBEDDED))
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert [ours.teacher.config.num_hidden_layers, ours.student.config.num_hidden_layers] == [
        theirs.teacher.config.num_hidden_layers,
        theirs.student.config.num_hidden_layers,
    ]

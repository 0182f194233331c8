"""The embedded models and what they are made from."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from itertools import chain, cycle, islice

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from opd_bench import supervised
from opd_bench.embedded import build, corpus, measures
from opd_bench.embedded.corpus import CHECK, NO, STEPWISE, TASKS, YES
from opd_bench.embedded.fit import encode, new_llama, optimizers
from opd_bench.embedded.tokenizer import CONTEXT
from opd_bench.errors import RunError, UserError
from opd_bench.flops import flop_count
from opd_bench.procedural import LIMIT
from opd_bench.readings import START
from opd_bench.resources import EMBEDDED, task_module
from opd_bench.sequences import Sequences
from opd_bench.supervised import PADDING, batches, fit

SHORTEN = build.STAGES[-1][0] // 2
FOLDERS = ("teacher", "student-0", "student-1", "student-2")


@dataclass(frozen=True)
class Shipped:
    """The models of the package, loaded by the stock classes, and what their build measured."""

    teacher: LlamaForCausalLM
    students: list[LlamaForCausalLM]
    tokenizer: PreTrainedTokenizerFast
    said: dict


@pytest.fixture(scope="module")
def shipped() -> Shipped:
    teacher, *students = (AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32) for name in FOLDERS)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "teacher")
    return Shipped(teacher, students, tokenizer, json.loads((EMBEDDED / "measured.json").read_text()))


def train_problems(task, count, seed=3):
    return islice(task_module(task).problems("train", seed), count)


def text_of(document):
    return "".join(text for text, _ in document)


def weighted_characters(document):
    """The document's text, and the weight of each of its characters."""
    return text_of(document), list(chain.from_iterable([weight] * len(text) for text, weight in document))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".checkpoint")


# --- the shipped models ---------------------------------------------------------------------------------------------


def test_shipped_models_stay_within_ten_megabytes_and_load_by_stock_classes(shipped):
    assert sorted(path.name for path in EMBEDDED.iterdir()) == sorted([*FOLDERS, "measured.json"])
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= 10e6
    for name in FOLDERS:
        assert (EMBEDDED / name / "model.safetensors").is_file()
        assert isinstance(AutoTokenizer.from_pretrained(EMBEDDED / name), PreTrainedTokenizerFast)
    assert {type(model) for model in (shipped.teacher, *shipped.students)} == {LlamaForCausalLM}


def test_the_shipped_tokenizer_is_the_one_a_build_trains(shipped):
    trained = build.train_tokenizer(corpus.tokenizer_texts())
    for name in FOLDERS:
        ours = AutoTokenizer.from_pretrained(EMBEDDED / name)
        assert ours.get_vocab() == trained.get_vocab()
        text = "Solve (x+3)*4-7=21\nx=7-3=4=4\n#4" + CHECK
        assert ours(text).input_ids == trained(text).input_ids


def test_the_shipped_students_have_one_shape_and_weights_of_their_own(shipped):
    first, *others = (student.state_dict() for student in shipped.students)
    for other in others:
        assert {name: weight.shape for name, weight in other.items()} == {name: weight.shape for name, weight in first.items()}
        assert not torch.equal(other["lm_head.weight"], first["lm_head.weight"])
    assert shipped.students[0].num_parameters() < 0.5 * shipped.teacher.num_parameters()


def test_measured_json_holds_what_the_embedded_tier_promises(shipped):
    said = shipped.said
    assert set(said) == {"teacher", "students", "recovery", "judge_auroc", "seed", "shortened"}
    assert said["shortened"] == 1
    assert len(said["students"]) == len(shipped.students)
    for figures in (said["teacher"], *said["students"]):
        assert set(figures) == {"greedy", "sampled"}
        assert set(figures["greedy"]) == set(figures["sampled"]) == set(said["judge_auroc"]) == set(TASKS)
    assert min(said["teacher"]["greedy"].values()) >= 0.97
    assert min(said["teacher"]["sampled"].values()) >= 0.85
    for student in said["students"]:
        assert all(0.2 <= student["greedy"][task] / said["teacher"]["greedy"][task] <= 0.7 for task in TASKS)
    assert set(said["recovery"]) == set(measures.INJECTIONS)
    assert set(said["recovery"]["result"]) == set(said["recovery"]["both"]) == set(STEPWISE)
    assert min(said["recovery"]["result"].values()) >= 0.8
    assert min(said["judge_auroc"][task] for task in ("arithmetic", "equations")) >= 0.95
    assert min(said["judge_auroc"].values()) >= 0.9


def test_the_shipped_models_solve_recover_and_judge_as_well_as_measured_json_says(shipped):
    teacher, tokenizer, said = shipped.teacher, shipped.tokenizer, shipped.said
    for model, figures in ((teacher, said["teacher"]), *zip(shipped.students, said["students"], strict=True)):
        greedy = {task: measures.accuracy(model, tokenizer, task) for task in TASKS}
        assert greedy == pytest.approx(figures["greedy"], abs=0.03)
    assert measures.recovery(teacher, tokenizer, "equations", "result") == pytest.approx(said["recovery"]["result"]["equations"], abs=0.03)
    for task in ("arithmetic", "functions"):  # solved again, read along
        auroc = measures.judge_auroc(teacher, shipped.students, tokenizer, task)
        assert auroc == pytest.approx(said["judge_auroc"][task], abs=0.03)


# --- the corpus -----------------------------------------------------------------------------------------------------


def test_the_tokenizer_round_trips_any_printable_text(tokenizer):
    text = "".join(map(chr, range(32, 127))) + "\n    def f(a):\n  return  12+34=46\n#46"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_slip_is_another_number_within_the_limit():
    rng = random.Random(0)
    for value in range(LIMIT + 1):
        slips = {corpus.wrong_number(value, rng) for _ in range(50)}
        assert value not in slips
        assert slips <= set(range(LIMIT + 1))
        assert len(slips) > 1


@pytest.mark.parametrize("task", STEPWISE)
def test_every_recovery_ends_right_and_only_its_wrong_results_carry_no_weight(task):
    rng, shapes = random.Random(0), Counter()
    for problem in train_problems(task, 400):
        text, weights = weighted_characters(corpus.recovery(problem, rng))
        *lines, last = text.split("\n")
        assert last == f"#{problem.answer}"
        expected = []
        for line, step in zip(lines, problem.steps, strict=True):
            assert line.startswith(step.calculation + "=")
            results = line[len(step.calculation) + 1 :].split("=")
            right = [result == str(step.result) for result in results]
            assert right[-2:] == [True, True]
            shapes["".join("wr"[good] for good in right)] += 1
            expected += [1.0] * len(step.calculation)
            for result, good in zip(results, right, strict=True):
                expected += [float(good)] * (1 + len(result))
            expected.append(1.0)
            assert not (right[0] is right[1] is False and results[0] == results[1])  # by protocol, two equal results are believed
        assert weights == expected + [1.0] * len(last)
    assert set(shapes) == {"rr", "wrr", "rwrr", "wwrr"}
    assert 1 - shapes["rr"] / shapes.total() == pytest.approx(corpus.INJECTED, abs=0.05)


def is_right(task, problem, answer):
    return answer == problem.solution if task == "functions" else answer.split("\n")[-1] == f"#{problem.answer}"


@pytest.mark.parametrize("task", TASKS)
def test_a_check_solves_again_or_reads_along_and_both_verdicts_are_as_common(task):
    rng, verdicts = random.Random(0), []
    for problem in train_problems(task, 400):
        document = corpus.judged(task, problem, rng)
        answer, question, check, newline, verdict = (text for text, _ in document)
        assert answer
        assert (question, newline) == (CHECK, "\n")
        if task == "functions":
            assert answer.startswith(check)
            assert problem.solution.startswith(check)
        else:
            assert check == problem.solution
        assert [weight for _, weight in document] == [0.0, 0.0, 1.0, corpus.VERDICT_WEIGHT, corpus.VERDICT_WEIGHT]
        assert verdict == (YES if is_right(task, problem, answer) else NO)
        verdicts.append(verdict)
    assert verdicts.count(YES) / len(verdicts) == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize(
    ("one", "other", "start"),
    [
        ("a = [x + 12]", "a = [x + 13]", "a = [x + 1"),
        ("a = sorted(a)", "a = sum(a)", "a ="),
        ("return a", "return a", "return a"),
        ("return", "return a", "return"),
        ("x", "y", ""),
    ],
)
def test_a_common_start_ends_between_words(one, other, start):
    assert corpus.common_start(one, other) == corpus.common_start(other, one) == start


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("right", [True, False])
def test_an_answer_is_right_or_wrong_as_asked(task, right):
    rng = random.Random(0)
    given = list(train_problems(task, 200))
    answers = [corpus.answer_to(task, problem, right, rng) for problem in given]
    assert all(is_right(task, problem, answer) is right for problem, answer in zip(given, answers, strict=True))
    assert all(corpus.is_right(task, problem, answer) is right for problem, answer in zip(given, answers, strict=True))
    if task in STEPWISE:
        well_formed = [answer.count("\n") == problem.length and "#" in answer for problem, answer in zip(given, answers, strict=True)]
        assert sum(well_formed) > 0.9 * len(given)
        astray = [answer != problem.solution for problem, answer in zip(given, answers, strict=True)]
        assert sum(astray) > 0.1 * len(given)


@pytest.mark.parametrize("shares", [corpus.TASKS, corpus.FINISH], ids=["all stages but the last", "last stage"])
def test_documents_are_of_every_kind_in_their_shares_and_fit_the_context(tokenizer, shares):
    count = 3000
    unseen = {problem.prompt for task in TASKS for split in ("validation", "test") for problem in islice(scored(task, split), 250)}
    first_words = {"Compute": "arithmetic", "Solve": "equations", "Write": "functions"}
    tasks, judged, recovered = Counter(), Counter(), 0
    for prompt, document in islice(corpus.documents(0, shares), count):
        assert prompt not in unseen
        ids, weights = encode(prompt, document, tokenizer)
        assert len(ids) == len(weights) <= CONTEXT
        task = first_words.get(prompt.split()[0], "trace")
        tasks[task] += 1
        judged[task] += CHECK in text_of(document)
        recovered += CHECK not in text_of(document) and 0.0 in [weight for _, weight in document]
    assert {task: tasks[task] / count for task in TASKS} == pytest.approx(shares, abs=0.03)
    assert {task: judged[task] / tasks[task] for task in TASKS} == pytest.approx(corpus.JUDGED, abs=0.05)
    assert recovered > 0.2 * count


def scored(task, split):
    module = task_module(task)
    return module.problems(split, module.SEEDS[split])


def test_documents_follow_from_the_seed():
    first, again, other = (list(islice(corpus.documents(seed), 50)) for seed in (0, 0, 1))
    assert first == again != other


def test_a_judge_has_room_for_the_longest_answer_and_the_check_of_it():
    tokenizer, check = build.train_tokenizer(corpus.tokenizer_texts()), 0
    for task in TASKS:
        given = [*train_problems(task, 2000), *islice(scored(task, "test"), 250)]
        prompt = max(map(len, tokenizer([problem.prompt for problem in given]).input_ids))
        assert prompt + measures.MAX_RESPONSE + len(tokenizer(CHECK).input_ids) + measures.MAX_CHECK <= CONTEXT
        check = max(check, *(map(len, tokenizer([f"{problem.solution}\n{NO}{tokenizer.eos_token}" for problem in given]).input_ids)))
    assert check <= measures.MAX_CHECK


# --- training -------------------------------------------------------------------------------------------------------


def test_weights_line_up_with_tokens(tokenizer):
    prompt, document = "Compute 1+2+3\n", [("1+2=", 1.0), ("4", 0.0), ("=3=3\n3+3=6=6\n", 1.0), ("#6", 8.0)]
    ids, weights = encode(prompt, document, tokenizer)
    assert tokenizer.decode(ids) == "Compute 1+2+3\n1+2=4=3=3\n3+3=6=6\n#6<eos>"
    of = {weight: tokenizer.decode([token for token, its in zip(ids, weights, strict=True) if its == weight]) for weight in set(weights)}
    assert of == {0.0: "Compute 1+2+3\n4", 1.0: "1+2==3=3\n3+3=6=6\n<eos>", 8.0: "#6"}


def test_batches_hold_every_example_once_and_say_what_is_padding(monkeypatch):
    monkeypatch.setattr(supervised, "POOL", 64)
    rng = random.Random(0)
    examples = [([number + 1] * length, [1.0 + number] * length) for number in range(64) for length in [rng.randint(2, 40)]]
    found, data = [], batches(iter(examples), 200, rng)
    while len(found) < len(examples):
        ids_BT, weights_BT = next(data)
        assert ids_BT.shape == weights_BT.shape
        assert ids_BT.numel() <= 200
        assert ids_BT.shape[1] % supervised.TILE == 0
        assert torch.equal(ids_BT == 0, weights_BT == PADDING)
        found += [(ids[ids > 0].tolist(), weights[weights > 0].tolist()) for ids, weights in zip(ids_BT, weights_BT, strict=True)]
    assert sorted(found) == sorted(examples)


class PowerCutError(Exception):
    pass


def trained(tokenizer, checkpoint=None, until=None):
    """The weights after six steps, or the exception after ``until`` of them."""

    def data():
        examples = (encode(prompt, document, tokenizer) for prompt, document in corpus.documents(0))
        for step, batch in enumerate(batches(examples, 512, random.Random(0))):
            if step == until:
                raise PowerCutError
            yield batch

    model = new_llama(32, 1, tokenizer, seed=0)
    fit(model, data(), 6, optimizers(model, 1e-3), cooldown=0.5, checkpoint=checkpoint, every=2)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_training_counts_the_flops_of_what_is_not_padding(tokenizer):
    model, rows = new_llama(32, 1, tokenizer, seed=0), [([3] * length, [1.0] * length) for length in (5, 40, 17)]
    flops = fit(model, batches(cycle(rows), 64, random.Random(0)), 4, optimizers(model, 1e-3))
    seen = [ids_BT for ids_BT, _ in islice(batches(cycle(rows), 64, random.Random(0)), 4)]
    lengths = torch.cat([(ids_BT == 3).sum(dim=1) for ids_BT in seen])
    assert set(lengths.tolist()) <= {5, 17, 40}
    assert sum(ids_BT.numel() for ids_BT in seen) > lengths.sum()
    assert flops == flop_count(model.config).update(lengths)


def test_training_that_was_interrupted_ends_where_it_would_have(tokenizer, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(PowerCutError):
        trained(tokenizer, checkpoint, until=5)
    assert torch.load(checkpoint, weights_only=True)["step"] == 4
    whole = trained(tokenizer)
    assert torch.equal(trained(tokenizer, checkpoint), whole)
    assert torch.equal(trained(tokenizer, checkpoint), whole)


# --- measures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", STEPWISE)
def test_a_corrupted_problem_is_right_up_to_one_wrong_result_at_its_end(task):
    rng, places = random.Random(0), set()
    for problem in train_problems(task, 200):
        steps = problem.steps
        for injection, times in (("result", 1), ("both", 2)):
            text = measures.corrupted(problem, injection, rng)
            assert text.startswith(problem.prompt)
            assert text.endswith("\n") is (injection == "both")
            lines = text.removeprefix(problem.prompt).removesuffix("\n").split("\n")
            place = len(lines) - 1
            assert lines[:-1] == [str(step) for step in steps[:place]]
            results = lines[-1].removeprefix(steps[place].calculation + "=").split("=")
            assert len(results) == times
            assert len(set(results)) == 1
            assert results[0] != str(steps[place].result)
            assert 0 <= int(results[0]) <= LIMIT
            places.add(place)
    assert places == set(range(max(task_module(task).STEPS)))


def responses(tokenizer, prompts, texts):
    """``texts`` as responses that end with EOS."""
    heads, tails = tokenizer(prompts).input_ids, tokenizer([text + tokenizer.eos_token for text in texts]).input_ids
    lengths = torch.tensor([len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)])
    ids_BT = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids_BT[row, : len(head) + len(tail)] = torch.tensor(head + tail)
    prompt_B, finished_B = torch.tensor(list(map(len, heads))), torch.ones(len(prompts), dtype=torch.bool)
    return Sequences(ids_BT, prompt_B, lengths, finished_B, torch.zeros(ids_BT.shape))


@pytest.mark.parametrize("task", TASKS)
def test_the_share_solved_counts_reference_solutions_and_no_other_answers(task, tokenizer, monkeypatch):
    monkeypatch.setattr(measures, "PROBLEMS", 40)
    given, rng = measures.problems(task), random.Random(0)
    truth = [number % 4 == 0 for number in range(40)]
    answers = [corpus.answer_to(task, problem, right, rng) for problem, right in zip(given, truth, strict=True)]
    written = responses(tokenizer, [problem.prompt for problem in given], answers)
    assert measures.verdicts(tokenizer, task, given, written) == truth
    monkeypatch.setattr(measures, "respond", lambda *_: written)
    assert measures.accuracy(None, tokenizer, task) == 0.25


def test_a_model_is_measured_on_validation_problems_only(monkeypatch):
    monkeypatch.setattr(measures, "PROBLEMS", 40)
    for task in TASKS:
        identities = {problem.identity for problem in measures.problems(task)}
        assert len(identities) == 40
        assert identities <= {problem.identity for problem in islice(task_module(task).problems("validation", 5), 40)}
        assert identities.isdisjoint(problem.identity for problem in train_problems(task, 1000))


# --- the build ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(tokenizer, monkeypatch):
    """``quick(scores)``: cold-start a student whose looks at itself give ``scores``; adds the tasks of each round to ``rounds``."""
    monkeypatch.setattr(build, "ROUND", 1)
    monkeypatch.setattr(build, "BATCH_TOKENS", 256)
    teacher = new_llama(32, 1, tokenizer, seed=1).eval()

    def run(scores, rounds):
        looks, texts = iter([score[task] for score in scores for task in TASKS]), {}

        def accuracy(model, tokenizer, task, count):
            return 1.0 if model is teacher else next(looks)

        def recorded_texts(teacher, tokenizer, task, seed, count, sampled=build.teacher_texts):
            texts[task], flops = sampled(teacher, tokenizer, task, seed, count)
            return texts[task], flops

        def recorded_batches(examples, tokens, rng):
            drawn = list(islice(examples, 60))
            rounds.append({task for task in TASKS if any(example in texts[task] for example in drawn)})
            return batches(chain(drawn, examples), tokens, rng)

        with monkeypatch.context() as patch:
            patch.setattr(measures, "accuracy", accuracy)
            patch.setattr(build, "teacher_texts", recorded_texts)
            patch.setattr(build, "batches", recorded_batches)
            found = build.cold_start(teacher, tokenizer, 0, 5)
        assert next(looks, None) is None
        return found

    return run


def test_a_student_is_trained_on_the_tasks_it_lacks_until_it_stands_within_bounds_on_all(quick, tokenizer):
    least, enough, most = build.COLD
    scores = [
        {"arithmetic": 0.0, "equations": least, "trace": 0.0, "functions": 0.0},
        {"arithmetic": enough, "equations": least - 0.01, "trace": most, "functions": least},
        {"arithmetic": 0.0, "equations": enough, "trace": enough, "functions": most},
        {"arithmetic": enough, "equations": enough, "trace": most + 0.01, "functions": enough},
        {"arithmetic": least, "equations": most, "trace": enough, "functions": least},
    ]
    student, flops, score = quick(scores, rounds := [])
    assert rounds == [set(TASKS), {"equations", "functions"}, {"arithmetic"}, {"arithmetic", "equations", "functions"}]
    assert score == scores[-1]
    assert list(flops) == list(START)
    assert min(flops.values()) > 0
    untouched = new_llama(build.STUDENT_WIDTH, build.STUDENT_LAYERS, tokenizer, 1)
    assert not torch.equal(student.lm_head.weight, untouched.lm_head.weight)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_student_that_never_stands_within_bounds_ends_the_build(quick, monkeypatch, share):
    monkeypatch.setattr(build, "MOST_ROUNDS", 2)
    with pytest.raises(RunError, match="never within"):
        quick([dict.fromkeys(TASKS, share)] * 2, [])


def test_teacher_texts_are_training_prompts_without_weight_and_responses_with(tokenizer):
    teacher = new_llama(32, 1, tokenizer, seed=1).eval()
    texts, flops = build.teacher_texts(teacher, tokenizer, "trace", 5, 20)
    assert (texts, flops) == build.teacher_texts(teacher, tokenizer, "trace", 5, 20)
    lengths = torch.tensor([len(ids) for ids, _ in texts])
    assert flops == flop_count(teacher.config).sample(torch.zeros(20, dtype=torch.int64), lengths)
    for problem, (ids, weights) in zip(train_problems("trace", 20, seed=1005), texts, strict=True):
        prompt = tokenizer(problem.prompt).input_ids
        assert ids[: len(prompt)] == prompt
        assert weights == [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt))
        assert len(prompt) < len(ids) <= len(prompt) + measures.MAX_RESPONSE


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """What a build writes with a teacher of a few steps, which solves nothing, so that any student is as good as it has to be."""
    out = tmp_path_factory.mktemp("rebuilt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "PROBLEMS", 4)
        build.build(out, 0, Console(quiet=True), shorten=SHORTEN)
    return out


@pytest.mark.slow
def test_a_shortened_build_writes_a_teacher_three_students_and_what_they_can_do(rebuilt):
    assert sorted(path.name for path in rebuilt.iterdir() if path.is_dir()) == sorted(FOLDERS)
    for name in FOLDERS:
        model = AutoModelForCausalLM.from_pretrained(rebuilt / name)
        assert isinstance(model, LlamaForCausalLM)
        assert model.dtype == torch.bfloat16
        assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(rebuilt / name))
    written = json.loads((rebuilt / "measured.json").read_text())
    assert (written["seed"], written["shortened"], len(written["students"])) == (0, SHORTEN, 3)
    for figures in (written["teacher"], *written["students"]):
        assert set(figures["greedy"]) == set(figures["sampled"]) == set(TASKS)
        assert all(0 <= share <= 1 for share in (*figures["greedy"].values(), *figures["sampled"].values()))


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "shorten"), [(1, SHORTEN), (0, 1)])
def test_a_folder_of_another_build_is_left_alone(rebuilt, seed, shorten):
    before = {name: (rebuilt / name).stat().st_mtime_ns for name in files(rebuilt)}
    with pytest.raises(UserError, match="another seed or size"):
        build.build(rebuilt, seed, Console(quiet=True), shorten)
    assert {name: (rebuilt / name).stat().st_mtime_ns for name in files(rebuilt)} == before


@pytest.mark.slow
def test_a_shortened_build_writes_what_the_package_ships(rebuilt, shipped):
    assert files(rebuilt) == sorted([*files(EMBEDDED), "build.json"])
    for name in FOLDERS:
        ours, theirs = (json.loads((folder / name / "config.json").read_text()) for folder in (rebuilt, EMBEDDED))
        assert {**ours, "transformers_version": ""} == {**theirs, "transformers_version": ""}
        assert AutoTokenizer.from_pretrained(rebuilt / name).get_vocab() == AutoTokenizer.from_pretrained(EMBEDDED / name).get_vocab()
    assert set(json.loads((rebuilt / "measured.json").read_text())) == set(shipped.said)

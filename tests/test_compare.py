"""A comparison from its configuration to its files, with the jobs in this process; `test_cli.py` starts the real workers."""

import csv
import json
import os
import shutil
import subprocess
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from opd_bench import arm, leaderboard, report, store
from opd_bench import compare as module
from opd_bench.config import load
from opd_bench.embedded.fit import new_llama
from opd_bench.errors import RunError, UserError
from opd_bench.plan import jobs
from opd_bench.teachers import Teachers
from opd_bench.trace import worst_case

METHODS = ("sft", "offline_kd", "opd", "opd_rlaif")
SMALL = {
    "seeds": 2,
    "max_response": 12,
    "budget": {"limit": 5e9, "points": [0.5]},
    "evaluation": {"limit": 4},
    "exposure": {"prompts": 2, "draws": 20},
    "judge": {"max_check": 4},
    "methods": {name: {"batch": 4} for name in METHODS} | {"sft": {"batch": 4, "epochs": 1}},
}
MINE = '''
from opd_bench.losses import cross_entropy
from opd_bench.methods import Method


class Mine(Method):
    """SFT under another name."""

    class Config(Method.Config):
        batch: int = 4

    def step(self, bench):
        bench.update(bench.teacher_corpus(), cross_entropy)
'''
LATE = MINE.replace("    def step(self, bench):\n", "    def step(self, bench):\n        if len(bench.losses) > 1:\n            [][7]\n")


@contextmanager
def in_this_process():
    """Jobs run here, one after the other, in place of the workers; yields the labels of those that were done."""
    done = []

    def carry_out(config, jobs, out, workers, console, finished):
        for job in jobs:
            arm.run(config, job, out, lambda stage, share: None)
            console.print(finished(job))
            done.append(job.label)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "carry_out", carry_out)
        yield done
    torch.set_num_threads(threads)


@pytest.fixture
def inline():
    with in_this_process() as done:
        yield done


def configured(pair_folders, **changes):
    return load("embedded", [SMALL, models(pair_folders), changes])


def models(pair_folders):
    return {"students": [str(pair_folders["student"])], "teacher": str(pair_folders["teacher"])}


def run(config, out):
    return module.compare(config, out, "opd-bench compare", 1, Console(quiet=True))


@pytest.fixture(scope="module")
def finished(pair_folders, tmp_path_factory):
    """The folder of a comparison of the four methods, done once."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with in_this_process():
        run(configured(pair_folders), out)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def result(out):
    """The leaderboard without what no rerun can repeat: the time it took, and the words of the command."""
    document = json.loads((out / "leaderboard.json").read_text(encoding="utf-8"))
    for method in document["methods"]:
        del method["wall_s"], method["spent"]["seconds"]
        if method["judge"]:
            del method["judge"]["cost"]["seconds"]
    document["readings"] = [reading for reading in document["readings"] if reading["unit"] != "seconds"]
    del document["command"]
    return document


def parts(out):
    return list(out.rglob(".*.part"))


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


PRICES = {"per_exaflop": 1e9, "per_million_tokens": {"teacher_generate": 100.0, "teacher_score": 10.0, "judge": 100.0}}


@pytest.mark.parametrize(
    ("budget", "unit"),
    [
        ({"axis": "student-tokens", "limit": 900}, "student tokens"),
        ({"axis": "teacher-tokens", "limit": 2500}, "teacher tokens"),
        ({"axis": "dollars", "limit": 3.0, "prices": PRICES}, "dollars"),
        ({"axis": "wall-clock", "limit": 0.3}, "seconds"),
    ],
)
def test_whatever_binds_the_methods_are_matched_on_it(pair_folders, tmp_path, inline, budget, unit):
    config = configured(pair_folders, budget=budget, methods={"sft": {"batch": 4}, "opd": {"batch": 4}})
    board = run(config, tmp_path / "out")
    assert (board.budget.axis, board.budget.limit) == (unit, budget["limit"])
    for method in board.methods:
        spent = sum(
            config.axis.of(kind, method.spent.tokens[kind], of, method.spent.seconds[kind]) for kind, of in method.spent.flops.items()
        )
        assert spent == pytest.approx(method.spent.share * budget["limit"], rel=0.02)
        assert method.spent.share > 0.8 or unit == "seconds"  # which are known only afterwards
        assert method.spent.share <= 1 or unit == "seconds"
    assert len({method.spent.flops["student_update"] for method in board.methods}) == 2  # so it is not FLOPs that bind
    assert board.readings[0].unit == ("seconds" if unit == "seconds" else "flops")


def test_a_run_leaves_every_file_and_a_valid_leaderboard(finished):
    board = json.loads((finished / "leaderboard.json").read_text(encoding="utf-8"))
    jsonschema.validate(board, json.loads(leaderboard.SCHEMA_FILE.read_text(encoding="utf-8")))
    assert {method["name"] for method in board["methods"]} == set(METHODS)
    assert all(name in (finished / "leaderboard.md").read_text(encoding="utf-8") for name in METHODS)
    exposed = json.loads((finished / "exposure.json").read_text(encoding="utf-8"))
    assert exposed["students"].keys() == {*METHODS, "cold start"}
    assert exposed["falsifiers"][0] == {**exposed["falsifiers"][0], "name": "teacher as student", "held": True}
    for method in board["methods"]:  # one gap, in both places
        assert exposed["students"][method["name"]]["gaps"]["forward_kl"]["zero"]["excess"]["mean"] == method["exposure"]["excess"]["mean"]
    manifest = json.loads((finished / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["command"] == board["command"] == "opd-bench compare"
    assert len(manifest["jobs"]) == 2 + 2 * len(METHODS)
    for name in report.FIGURES:
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert not parts(finished)


def test_the_item_table_holds_every_answer_of_every_model(finished):
    with (finished / "items.csv").open(encoding="utf-8", newline="") as file:
        counts = Counter((row["method"], row["share"], row["decoding"], row["task"]) for row in csv.DictReader(file))
    tasks = ("opd_bench_arithmetic", "opd_bench_equations", "opd_bench_functions", "opd_bench_trace")
    points = [(name, "0.0", how, 1) for name in ("teacher", "cold_start") for how in ("greedy", "sampled")]
    points += [(name, share, how, 2) for name in METHODS for share, how in (("0.5", "greedy"), ("1.0", "greedy"), ("1.0", "sampled"))]
    assert counts == {(name, share, how, task): 4 * seeds for name, share, how, seeds in points for task in tasks}


def test_ledger_sums_to_what_was_spent_and_every_arm_ends_one_percent_or_one_unit_below_its_budget(finished, pair_folders):
    charges = rows(finished / "ledger.jsonl")
    limit, config = SMALL["budget"]["limit"], configured(pair_folders)
    shop, built = arm.workshop(config.model_dump_json()), {job.name: job.build() for job in jobs(config) if job.method}
    for method in result(finished)["methods"]:
        own = [charge for charge in charges if charge["method"] == method["name"]]
        unit = worst_case(built[method["name"]], built[method["name"]].unit, shop.counter).spent
        for seed in (0, 1):
            left = limit - sum(charge["flops"] for charge in own if charge["seed"] == seed)
            assert 0 <= left <= max(0.01 * limit, unit)
        by_kind = Counter()
        for charge in own:
            by_kind[charge["kind"]] += charge["flops"]
        assert method["spent"]["flops"] == {kind: round(flops / 2) for kind, flops in by_kind.items()}
        assert method["spent"]["share"] * limit == pytest.approx(by_kind.total() / 2)


def test_a_student_with_the_teachers_weights_has_no_gap_in_a_precision_that_only_the_teacher_is_kept_in(pair_folders, tmp_path):
    teacher = str(pair_folders["teacher"])
    config = configured(pair_folders, students=[teacher], dtype="bfloat16")
    (start,) = (job for job in jobs(config) if job.name == "cold_start")
    arm.run(config, start, tmp_path, lambda stage, share: None)
    assert store.load_recording(start.folder(tmp_path) / "recording.npz").along["forward_kl"].student_NT.max() == 0
    shop = arm.workshop(config.model_dump_json())
    assert shop.pair.student.dtype == torch.float32
    as_it_trains = shop.record(Teachers(shop.pair.student), 0, tmp_path / "as it trains", full=False, continued=0)
    assert as_it_trains.along["forward_kl"].student_NT.max() > 0


def test_the_leaderboard_says_which_models_were_compared(finished, pair_folders):
    named = {role: [str(pair_folders[role])] for role in ("student", "teacher")}
    assert result(finished)["models"] == named
    text = (finished / "leaderboard.md").read_text(encoding="utf-8")
    assert all(f"- {role.capitalize()}: {names[0]}\n" in text for role, names in named.items())


def test_each_method_is_said_to_have_seen_what_it_was_charged_for(finished):
    saw = {method["name"]: set(method["saw"]) for method in result(finished)["methods"]}
    assert saw == {
        "sft": {"teacher text"},
        "offline_kd": {"teacher text", "teacher distributions"},
        "opd": {"teacher distributions"},
        "opd_rlaif": {"teacher distributions", "judge"},
    }


def test_a_finished_run_returns_at_once_and_touches_nothing(pair_folders, copy, inline, monkeypatch):
    monkeypatch.setattr(module, "preflight", lambda *_: pytest.fail("models were loaded"))
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    board = run(configured(pair_folders), copy)
    assert inline == []
    assert board == leaderboard.read(copy / "leaderboard.json")
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_only_what_is_missing_is_done_again_and_the_result_is_the_same(pair_folders, finished, copy, inline):
    shutil.rmtree(copy / "arms/opd_rlaif/seed-1")
    shutil.rmtree(copy / "arms/_cold_start-0")
    shutil.rmtree(copy / "corpus")
    scratch = copy / "arms/opd_rlaif/.seed-1.999999.part"
    scratch.mkdir()
    (scratch / "items.jsonl").write_text("{half a li")
    (copy / ".manifest.json.999999.part").write_text("{")
    run(configured(pair_folders), copy)
    assert sorted(inline) == ["cold start 0", "opd_rlaif seed 1"]
    assert result(copy) == result(finished)
    assert not parts(copy)


@pytest.mark.parametrize("content", [None, "", '{"schema": "opd-bench/leaderboard/0"}'])
def test_a_lost_or_damaged_leaderboard_is_made_anew_without_training(pair_folders, finished, copy, inline, content):
    (copy / "leaderboard.json").unlink()
    if content is not None:
        (copy / "leaderboard.json").write_text(content)
    run(configured(pair_folders), copy)
    assert inline == []
    assert (copy / "leaderboard.json").read_bytes() == (finished / "leaderboard.json").read_bytes()


def test_a_run_killed_before_its_manifest_was_whole_can_be_repeated(pair_folders, tmp_path, monkeypatch):
    (tmp_path / ".manifest.json.999999.part").write_text("{")
    monkeypatch.setattr(module, "carry_out", lambda *_: (_ for _ in ()).throw(RunError("reached the workers")))
    with pytest.raises(RunError, match="reached the workers"):
        run(configured(pair_folders), tmp_path)
    assert not parts(tmp_path)


def test_teacher_text_of_other_weights_is_not_used_again(pair_folders, copy, inline):
    manifest = copy / "manifest.json"
    document = json.loads(manifest.read_text(encoding="utf-8"))
    document["jobs"][0]["run_id"] = "other weights"
    manifest.write_text(json.dumps(document))
    shutil.rmtree(copy / "arms/sft/seed-0")
    chunk = copy / "corpus/seed-0/chunk-00000.pt"
    chunk.write_bytes(b"stale")
    run(configured(pair_folders), copy)
    assert chunk.read_bytes() != b"stale"


def test_the_results_of_another_configuration_are_refused_and_kept(pair_folders, copy, inline):
    before = (copy / "leaderboard.json").read_bytes()
    with pytest.raises(UserError, match="another configuration"):
        run(configured(pair_folders, max_response=13), copy)
    assert (copy / "leaderboard.json").read_bytes() == before


def test_a_folder_that_holds_something_else_is_refused(pair_folders, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not empty"):
        run(configured(pair_folders), tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(pair_folders, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write"):
            run(configured(pair_folders), out)


def test_a_fifth_method_takes_one_file_and_equals_the_method_it_copies(pair_folders, finished, tmp_path, inline):
    (tmp_path / "mine.py").write_text(MINE)
    out = tmp_path / "run"
    board = run(configured(pair_folders, seeds=1, methods={"sft": {}, str(tmp_path / "mine.py"): {}}), out)
    sft, mine = sorted(board.methods, key=lambda method: method.name, reverse=True)
    assert (sft.name, mine.name) == ("sft", "mine")
    assert (sft.spent.share, sft.spent.flops, sft.spent.tokens) == (mine.spent.share, mine.spent.flops, mine.spent.tokens)
    assert sft.score_by_seed == mine.score_by_seed
    assert [claim.claimed for claim in board.claims] == [False, False]
    assert any("Nothing can be claimed with 1 seed" in note for note in board.notes)


def test_one_method_alone_has_nothing_to_be_compared_with(pair_folders, tmp_path, inline):
    board = run(configured(pair_folders, seeds=1, methods={"sft": {}}), tmp_path / "run")
    assert board.claims == []
    assert "nothing to compare" in (tmp_path / "run/leaderboard.md").read_text(encoding="utf-8")


def test_a_method_with_a_schedule_of_its_own_trains_for_each_budget_separately_and_comes_to_the_same(
    pair_folders, finished, tmp_path, inline
):
    (tmp_path / "mine.py").write_text(MINE.replace("    class Config", "    own_schedule = True\n\n    class Config"))
    lr = configured(pair_folders).methods["sft"]["lr"]
    board = run(configured(pair_folders, seeds=1, methods={str(tmp_path / "mine.py"): {"lr": lr}}), tmp_path / "run")
    assert any("mine has a schedule of its own" in note for note in board.notes)
    own, branched = tmp_path / "run/arms/mine/seed-0", finished / "arms/sft/seed-0"
    for name in ("items.jsonl", "at-0.5/items.jsonl"):
        assert (own / name).read_bytes() == (branched / name).read_bytes()
    points = [json.loads((folder / "arm.json").read_text())["points"] for folder in (own, branched)]
    assert [point["spent"]["flops"] for point in points[0]] == [point["spent"]["flops"] for point in points[1]]
    whole = configured(pair_folders, seeds=1, budget={"points": []}, methods={str(tmp_path / "mine.py"): {"lr": lr}})
    assert not any("a schedule of its own" in note for note in run(whole, tmp_path / "whole").notes)  # there was no smaller budget


def test_a_method_that_fails_late_ends_the_run_and_finished_arms_are_kept(pair_folders, tmp_path, inline):
    (tmp_path / "late.py").write_text(LATE)
    out = tmp_path / "run"
    with pytest.raises(RunError, match=r"Mine\.step raised IndexError"):
        run(configured(pair_folders, seeds=1, methods={"sft": {}, str(tmp_path / "late.py"): {}}), out)
    assert inline == ["teacher", "cold start 0", "sft seed 0"]
    assert (out / "arms/sft/seed-0/arm.json").exists()
    assert not (out / "leaderboard.json").exists()
    assert not parts(out)


def test_a_student_that_is_its_teacher_has_no_divergence_and_an_undefined_ratio(pair_folders, tmp_path, inline):
    config = configured(pair_folders, seeds=1, students=[str(pair_folders["teacher"])], methods={"opd": {}, "offline_kd": {}})
    board = run(config, tmp_path / "run")
    for arm_or_start in (board.cold_start, *board.methods):
        gap = arm_or_start.exposure
        assert gap is not None
        assert (gap.regret.mean, gap.per_step.mean, gap.excess.mean) == (0, 0, 0)
        assert gap.exaccerr is None or gap.exaccerr.mean is None
        assert arm_or_start.score.mean == board.teacher.score.mean
    for method in ("opd", "offline_kd"):
        losses = [row["loss"] for row in rows(tmp_path / f"run/arms/{method}/seed-0/steps.jsonl")]
        assert losses == pytest.approx([0] * len(losses), abs=1e-6)


def test_a_full_disk_is_one_line_and_the_run_ends_as_ever_when_there_is_space(pair_folders, finished, tmp_path, inline):
    disk = tmp_path / "disk"
    disk.mkdir()
    sizes = ("24k", "160k", "512k", "900k")

    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", disk], capture_output=True).returncode == 0

    if os.geteuid() or not mount(f"size={sizes[0]}"):
        pytest.skip("only root may mount a small disk")
    try:
        for size in sizes:
            assert mount("remount", f"size={size}")
            with pytest.raises(UserError, match=r"^(\w+ seed \d: )?the disk is full"):
                run(configured(pair_folders), disk / "run")
            assert not parts(disk)
        assert mount("remount", "size=64m")
        run(configured(pair_folders), disk / "run")
        assert result(disk / "run") == result(finished)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_seeds_begin_from_the_cold_starts_in_turn(pair_folders, tokenizer, tmp_path, inline):
    other = tmp_path / "other"
    new_llama(32, 1, tokenizer, seed=99).save_pretrained(other)
    tokenizer.save_pretrained(other)
    config = configured(pair_folders, seeds=3, students=[str(pair_folders["student"]), str(other)], methods={"sft": {"lr": 0.0}})
    board = run(config, tmp_path / "run")
    assert [label for label in inline if label.startswith("cold")] == ["cold start 0", "cold start 1"]
    weights = [load_file(tmp_path / f"run/arms/sft/seed-{seed}/model.safetensors") for seed in range(3)]
    for seed, folder in enumerate((pair_folders["student"], other, pair_folders["student"])):
        start = load_file(Path(folder) / "model.safetensors")
        assert all(torch.equal(weights[seed][name], start[name]) for name in start)
    assert any("mean of these 2 cold starts" in note for note in board.notes)


def test_another_cold_start_retrains_only_the_seeds_that_begin_from_it(pair_folders, tokenizer, tmp_path):
    first, other = (
        jobs(configured(pair_folders, seeds=3, students=[str(pair_folders["student"]), second]))
        for second in (str(pair_folders["student"]), str(pair_folders["teacher"]))
    )
    changed = {job.label for job, new in zip(first, other, strict=True) if job.run_id != new.run_id}
    assert changed == {"cold start 1", *(f"{name} seed 1" for name in METHODS)}

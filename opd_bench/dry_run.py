"""What a comparison would do and cost, without training it: one step of every method is run to time it."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from opd_bench import arm, compare
from opd_bench.config import Config
from opd_bench.methods import Method, take_step
from opd_bench.plan import Job, jobs
from opd_bench.stages import stages_of
from opd_bench.trace import full_batch, worst_case


def show_plan(config: Config, out: Path, workers: int, console: Console) -> None:
    """Print every method's arms, the cost of its steps by kind of charge, and an estimate of the training time."""
    planned = jobs(config)
    found = compare.preflight(config, planned, workers, out)
    shop = arm.workshop(config.model_dump_json())
    arms = [job for job in planned if job.method]
    table = Table(
        title=f"{config.tier}: {len(arms)} arms of {config.limit:.2e} {config.axis.unit}, {len(arms) * config.limit:.2e} in all",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("method", "seeds", "batch", "FLOPs of a step\n(worst case)", "of which", "training time\nper arm"):
        table.add_column(heading)
    total = 0.0
    firsts = {job.name: job for job in arms}.values()
    for job, stage in [(first, stage) for first in firsts for stage in stages_of(first.build())]:
        method = stage.method
        worst = worst_case(method, full_batch(method), shop.counter)
        branches = 1 + config.cooldown * sum(config.budget.points)
        seconds = _seconds_per_unit(shop, job, method) * stage.share * config.limit * branches
        total += seconds * config.seeds
        most = sum(worst.by_kind().values())
        shares = "\n".join(f"{kind} {flops / most:.0%}" for kind, flops in worst.by_kind().items())
        name = job.name if stage.share == 1 else f"{job.name}, {type(method).__name__} for {stage.share:.0%}"
        table.add_row(name, str(config.seeds), str(method.config.batch), f"{most:.2e}", shares, f"about {seconds:.0f} s")
    console.print(table)
    if config.contrasts:
        console.print(f"Contrasts to be tested: {'; '.join(config.contrasts)}.", markup=False, highlight=False)
    items = config.evaluation.limit or "all"
    console.print(f"Evaluation, never charged: {items} items per task, greedy and sampled, for {len(planned)} models.")
    asked = config.exposure
    console.print(
        f"Exposure bias, never charged: {asked.prompts} prompts per task, {min(asked.continued, asked.prompts)} of them continued."
    )
    workers = min(workers, len(arms))
    console.print(f"Training: about {total / workers / 60:.1f} min with {workers} arms side by side.")
    for line in (*found["warnings"], *found["facts"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Results would go to {out}.", markup=False, highlight=False, soft_wrap=True)


def _seconds_per_unit(shop: arm.Workshop, job: Job, method: Method) -> float:
    """Of the budget's axis."""
    with tempfile.TemporaryDirectory() as folder:
        engine = shop.engine(job, copy.deepcopy(shop.pairs[job.start].student), method.config.lr, Path(folder) / "corpus")
        bench = shop.bench(engine, shop.config.limit)
        bench.batch = full_batch(method)
        start = time.perf_counter()
        with compare.step_errors(job):
            take_step(method, bench)
        charged = sum(bench.ledger.by_kind("seconds").values())
        return min(charged, time.perf_counter() - start) / bench.ledger.spent

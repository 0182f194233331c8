"""What an arm logs to TensorBoard, Weights & Biases or Trackio while it trains, as `log` of the configuration says.

    with closing(Log(config.log, job, out)) as log:
        log({"loss": 2.1, "share": 0.3}, step=7)
        log({"greedy/opd_bench_gcd": 0.6})     # at the last step

One run an arm, named after it and grouped by the comparison. An arm that begins again takes the place of its old run (Trackio: beside it).
It bears on no result: where a library fails, a line says so once and the arm goes on.
"""

from __future__ import annotations

import importlib
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opd_bench.errors import UserError
from opd_bench.plan import Job

Run = tuple[Callable[[dict[str, float], int], object], Callable[[], object]]  # writes the values of a step; ends
PROJECT, FOLDER = "opd-bench", "logs"  # the folder lies in that of the comparison
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def library(name: str) -> Any:
    """UserError where it is not installed."""
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        raise UserError(f"log: {name} is not installed ({error}): pip install 'opd-bench[{name}]'") from None


class Log:
    """Takes values until its library fails; without a ``name`` it takes them to nowhere."""

    def __init__(self, name: str | None, job: Job, out: Path) -> None:
        self.name, self.step, self.run = name, 0, None
        self.run: Run | None = self._tried(lambda: _begin(str(name), job, out)) if name else None

    def __call__(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        """What is None or not finite is left out."""
        self.step = self.step if step is None else step
        known = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        if self.run:
            write = self.run[0]
            self._tried(lambda: write(known, self.step))

    def close(self) -> None:
        if self.run:
            self._tried(self.run[1])

    def _tried(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # whatever a server, a disk or the library has to say
            said = (str(error).strip() or "no reason given").splitlines()[0]
            print(f"note: logging to {self.name} failed ({type(error).__name__}: {said}); the arm goes on without", file=sys.stderr)
            self.run = None


def _begin(name: str, job: Job, out: Path) -> Run:
    module, folder, group = library(name), out / FOLDER, out.resolve().name
    if name == "tensorboard":
        own = folder / job.name / f"seed-{job.seed}"
        shutil.rmtree(own, ignore_errors=True)
        writer = module.SummaryWriter(str(own))
        return lambda values, step: [writer.add_scalar(name, value, step) for name, value in values.items()], writer.close
    folder.mkdir(parents=True, exist_ok=True)
    only = {"id": re.sub(r"[^\w-]", "-", f"{group}-{job.run_id}")[-64:], "dir": str(folder)} if name == "wandb" else {}
    said = {"method": job.method, "seed": job.seed, "run_id": job.run_id, **dict(job.options)}
    run = module.init(project=PROJECT, group=group, name=job.label, config=said, **only)
    return lambda values, step: run.log(values, step=step), run.finish

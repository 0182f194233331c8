"""The training loop: steps until the budget is spent.

A step begins only if its worst case fits into what is left; where the full batch no longer fits, the largest that does
is taken and the learning rate is scaled by its share of the full one, so an arm ends just below its budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from opd_bench.bench import Bench
from opd_bench.errors import RunError, UserError
from opd_bench.ledger import OverBudgetError
from opd_bench.methods import Method, take_step
from opd_bench.trace import Counter, full_batch, largest_batch, worst_case

ENOUGH = 0.995  # a run this close to its budget stops instead of taking ever smaller steps


@dataclass(frozen=True)
class Progress:
    """One finished step: its number, the share of the budget spent, and the mean loss of its updates."""

    step: int
    share: float
    loss: float


def require_one_step(method: Method, counter: Counter, limit: int) -> None:
    """UserError unless the budget holds the worst case of one full step."""
    try:
        worst = worst_case(method, full_batch(method), counter, limit)
    except OverBudgetError as error:
        raise UserError(
            f"the budget of {limit:.2e} FLOPs is too small for one step of {type(method).__name__}: {error}; "
            "raise budget.limit or lower the method's batch"
        ) from None
    if worst.spent == 0:
        raise UserError(f"{type(method).__name__}.step charges nothing: it must use the bench (see docs/adding-a-method.md)")


def learning_rate_scale(share: float, cooldown: float) -> float:
    """Constant, then linear to 0 over the last ``cooldown`` of the budget."""
    return min(1.0, (1.0 - share) / cooldown) if cooldown else 1.0


def train(method: Method, bench: Bench, counter: Counter, cooldown: float, on_step: Callable[[Progress], None]) -> None:
    """Run ``method`` until the budget of ``bench`` is spent. RunError if the method raises or spends nothing."""
    ledger, full = bench.ledger, full_batch(method)
    while ledger.share < ENOUGH and (batch := largest_batch(method, counter, ledger.left)):
        ledger.step += 1
        spent, updates, scale = ledger.spent, len(bench.losses), learning_rate_scale(ledger.share, cooldown) * batch / full
        bench.batch, bench.lr_scale = batch, lambda scale=scale: scale
        try:
            take_step(method, bench)
        except OverBudgetError:
            return  # a step that outgrew its trace: the verb that did not fit was not run
        if ledger.spent == spent:
            raise RunError(f"{type(method).__name__}.step number {ledger.step} charged nothing; the run would never end")
        losses = bench.losses[updates:]
        on_step(Progress(ledger.step, ledger.share, sum(losses) / len(losses) if losses else float("nan")))

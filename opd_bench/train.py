"""The training loop: steps until the budget is spent, stage by stage where a recipe has several.

A step begins only if its worst case fits into what is left; where the full batch no longer fits, the largest that does
is taken and the learning rate is scaled by its share of the full one, so an arm ends just below its budget.

One run serves smaller budgets too. Up to where a smaller budget's cooldown begins, a run for it would take the same steps: from there
a copy, a *branch*, goes on with that budget, and its cooldown is charged to the branch alone (Hägele et al. 2024, arXiv 2405.18392).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd_bench.bench import Bench
from opd_bench.errors import RunError, UserError
from opd_bench.ledger import Axis, Ledger, OverBudgetError
from opd_bench.methods import Method, take_step
from opd_bench.stages import Recipe, peak_lr, stages_of
from opd_bench.trace import FLOPS, Counter, full_batch, largest_batch, worst_case

Branch = Callable[[Recipe, Bench], None]  # told of each branch when it has ended
ENOUGH = 0.995  # a run this close to its budget stops instead of taking ever smaller steps


@dataclass(frozen=True)
class Progress:
    """One finished step: its number, the share of the budget spent, the mean loss of its updates, and the recipe's stage."""

    step: int
    share: float
    loss: float
    stage: int = 0


def require_one_step(recipe: Recipe, counter: Counter, limit: float, axis: Axis = FLOPS) -> None:
    """UserError unless each stage's part of the budget holds the worst case of one full step, where that is known beforehand."""
    for stage in stages_of(recipe):
        _require_one_step(stage.method, counter, stage.share * limit, axis)


def _require_one_step(method: Method, counter: Counter, limit: float, axis: Axis) -> None:
    name = type(method).__name__
    try:
        worst = worst_case(method, full_batch(method), counter, limit, axis)
    except OverBudgetError as error:
        raise UserError(
            f"the budget of {limit:.2e} {axis.unit} is too small for one step of {name}: {error}; "
            "raise budget.limit or lower the method's batch"
        ) from None
    if not worst.charges:
        raise UserError(f"{name}.step charges nothing: it must use the bench (see docs/adding-a-method.md)")
    if axis.foreseen and not worst.spent:
        raise UserError(f"{name} spends no {axis.unit}, so it would never end; match the methods on another axis")


def learning_rate_scale(share: float, cooldown: float) -> float:
    """Constant, then linear to 0 over the last ``cooldown`` of the budget."""
    return min(1.0, (1.0 - share) / cooldown) if cooldown else 1.0


def train(
    recipe: Recipe,
    bench: Bench,
    counter: Counter,
    cooldown: float,
    on_step: Callable[[Progress], None],
    budgets: Sequence[float] = (),
    on_branch: Branch = lambda recipe, bench: None,
) -> None:
    """Carry out ``recipe`` until the budget of ``bench`` is spent, with a branch for each smaller one of ``budgets``.

    RunError if a method raises or spends nothing.
    """
    ledger, waiting, top = bench.ledger, sorted(budgets), peak_lr(recipe)
    for number, stage in enumerate(stages_of(recipe)):
        method, full, rate = stage.method, full_batch(stage.method), stage.method.config.lr / top if top else 1.0
        bench.enter(stage.mix)
        while ledger.share < ENOUGH * stage.until and (batch := largest_batch(method, counter, _left(ledger, stage.until), ledger.axis)):
            while waiting and _must_part(method, bench, counter, cooldown, waiting[0]):
                branch, own = bench.fork(waiting.pop(0)), copy.deepcopy(method)
                train(own, branch, counter, cooldown, lambda progress: None)
                on_branch(own, branch)
            ledger.step += 1
            spent, updates, scale = ledger.spent, len(bench.losses), rate * learning_rate_scale(ledger.share, cooldown) * batch / full
            bench.batch, bench.lr_scale = batch, lambda scale=scale: scale
            try:
                take_step(method, bench)
            except OverBudgetError:
                return  # a step that outgrew its trace: the verb that did not fit was not run
            if ledger.spent == spent:
                raise RunError(f"{type(method).__name__}.step number {ledger.step} charged nothing; the run would never end")
            losses = bench.losses[updates:]
            on_step(Progress(ledger.step, ledger.share, sum(losses) / len(losses) if losses else float("nan"), number))


def _left(ledger: Ledger, until: float) -> float:
    """Of the budget, up to the share at which a stage ends."""
    return ledger.left if until == 1 or ledger.limit is None else ledger.left - (1 - until) * ledger.limit


def _must_part(method: Method, bench: Bench, counter: Counter, cooldown: float, limit: float) -> bool:
    """Whether a run for ``limit`` would take another next step: its cooldown begins, or a full batch may not fit."""
    spent, axis = bench.ledger.spent, bench.ledger.axis
    return spent >= (1 - cooldown) * limit or largest_batch(method, counter, limit - spent, axis) < full_batch(method)

"""The ledger: every charge of a run, and the budget none of them may exceed.

    ledger = Ledger(limit=10**12)
    with ledger.reserve("student_sample", worst_case) as bill:   # raises OverBudgetError before anything runs
        ...
        bill.settle(flops, tokens)                               # at most the reserve; the rest is refunded

A verb that fails inside the block is charged its whole reserve: what ran was spent.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from opd_bench.errors import RunError

# What a method was allowed to see follows from what it was charged for.
SAW = {"teacher_generate": "teacher text", "teacher_score": "teacher distributions", "judge": "judge"}


class OverBudgetError(RunError):
    """A verb's worst case does not fit into what is left."""


@dataclass(frozen=True)
class Charge:
    """One verb's cost: tokens that are not padding, FLOPs, wall seconds."""

    kind: str
    step: int
    tokens: int
    flops: int
    seconds: float


@dataclass
class Bill:
    """What a running verb has settled of its reserve."""

    reserved: int
    flops: int | None = None
    tokens: int = 0
    seconds: float | None = None

    def settle(self, flops: int, tokens: int, seconds: float | None = None) -> None:
        """Charge ``flops``; ``seconds`` replaces the measured wall time (work done earlier and charged now)."""
        if flops > self.reserved:
            raise RunError(f"a verb spent {flops:.3e} FLOPs but had reserved {self.reserved:.3e}: the cost model is wrong")
        self.flops, self.tokens, self.seconds = flops, tokens, seconds


@dataclass
class Ledger:
    limit: int | None
    charges: list[Charge] = field(default_factory=list)
    step: int = 0
    spent: int = 0
    reserved: int = 0  # by verbs that are running
    refused: bool = False  # some verb did not fit

    @property
    def left(self) -> int:
        assert self.limit is not None
        return self.limit - self.spent - self.reserved

    @property
    def share(self) -> float:
        """Share of the budget that is spent."""
        return self.spent / self.limit if self.limit else 0.0

    def require(self, kind: str, worst_case: int) -> None:
        """OverBudgetError unless ``worst_case`` FLOPs fit into what is left."""
        if worst_case < 0:
            raise RunError(f"{kind} was asked for a negative number of tokens")
        if self.limit is not None and worst_case > self.left:
            self.refused = True
            raise OverBudgetError(f"{kind} may cost {worst_case:.3e} FLOPs and only {self.left:.3e} of {self.limit:.3e} are left")

    @contextmanager
    def reserve(self, kind: str, worst_case: int) -> Iterator[Bill]:
        """Raise OverBudgetError unless ``worst_case`` FLOPs fit; charge what the block settles. Reserving nothing charges nothing."""
        self.require(kind, worst_case)
        bill, start = Bill(worst_case), time.perf_counter()
        self.reserved += worst_case
        try:
            yield bill
        finally:
            flops = bill.reserved if bill.flops is None else bill.flops
            seconds = time.perf_counter() - start if bill.seconds is None else bill.seconds
            self.reserved -= worst_case
            self.spent += flops
            if worst_case:
                self.charges.append(Charge(kind, self.step, bill.tokens, flops, seconds))

    def by_kind(self, unit: str = "flops") -> dict[str, int | float]:
        """``unit`` (flops, tokens or seconds) summed by kind of charge, in order of first appearance."""
        totals: dict[str, int | float] = {}
        for charge in self.charges:
            totals[charge.kind] = totals.get(charge.kind, 0) + getattr(charge, unit)
        return totals

    def saw(self) -> list[str]:
        """What the run was shown, by what it paid for."""
        return [shown for kind, shown in SAW.items() if any(charge.kind == kind for charge in self.charges)]

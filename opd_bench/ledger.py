"""The ledger: every charge of a run, and the budget none of them may exceed.

    ledger = Ledger(limit=10**12)
    with ledger.reserve("student_sample", worst_case, most_tokens) as bill:   # raises OverBudgetError before anything runs
        ...
        bill.settle(flops, tokens)                                            # at most the reserve; the rest is refunded

A verb that fails inside the block is charged its whole reserve: what ran was spent. An *axis* says what of a charge counts
against the budget; FLOPs, tokens and seconds of all are written down whichever binds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from opd_bench.errors import RunError

# What a method was allowed to see follows from what it was charged for.
VERIFIER = "verifier"  # the task's own scorer as a reward: it costs nothing, and what it trains is RLVR
SAW = {"teacher_generate": "teacher text", "teacher_score": "teacher distributions", "judge": "judge", VERIFIER: VERIFIER}


STUDENT_TOKENS = ("student_update",)  # tokens the student is trained on
TEACHER_TOKENS = ("teacher_generate", "teacher_score", "judge")  # tokens the teacher writes, scores or judges with


class OverBudgetError(RunError):
    """A verb's worst case does not fit into what is left."""


@dataclass(frozen=True)
class Charge:
    """One verb's cost: tokens that are not padding, FLOPs, wall seconds, and what somebody else asked for it in dollars."""

    kind: str
    step: int
    tokens: int
    flops: int
    seconds: float
    dollars: float = 0.0


@dataclass
class Axis:
    """What of a charge counts against the budget: FLOPs, whatever the kind, unless a subclass says otherwise."""

    unit: str = "FLOPs"
    foreseen: ClassVar[bool] = True  # what a verb may come to is known before it has run once

    def of(self, kind: str, tokens: int, flops: int, seconds: float, dollars: float = 0.0) -> float:
        return flops

    def most(self, kind: str, tokens: int, flops: int, dollars: float = 0.0) -> float:
        """The most a verb can come to that may take so many tokens, FLOPs and dollars."""
        return self.of(kind, tokens, flops, 0.0, dollars)

    def traced(self) -> Axis:
        """The axis for a trace, whose verbs take no time."""
        return self


@dataclass
class Tokens(Axis):
    """The tokens of the charges of ``kinds``."""

    kinds: tuple[str, ...] = ()

    def of(self, kind: str, tokens: int, flops: int, seconds: float, dollars: float = 0.0) -> float:
        return tokens if kind in self.kinds else 0


@dataclass
class Dollars(Axis):
    """``token`` dollars per million tokens for the kinds that have such a price, ``exaflop`` dollars per 1e18 FLOPs for the others.

    What somebody else asked for, dollars of a charge itself, counts in their place.
    """

    token: dict[str, float] = field(default_factory=dict)
    exaflop: float = 0.0

    def of(self, kind: str, tokens: int, flops: int, seconds: float, dollars: float = 0.0) -> float:
        if dollars:
            return dollars
        return self.token[kind] * tokens / 1e6 if kind in self.token else self.exaflop * flops / 1e18


@dataclass
class Seconds(Axis):
    """Wall seconds of the verbs, ``each`` so many units. What one will take is unknown: FLOPs at the rate of all its kind so far, nothing
    at first. Where FLOPs are not known, tokens stand for them.
    """

    each: float = 1.0
    so_far: dict[str, tuple[float, int]] = field(default_factory=dict)  # seconds and FLOPs (or tokens) by kind
    foreseen: ClassVar[bool] = False

    def of(self, kind: str, tokens: int, flops: int, seconds: float, dollars: float = 0.0) -> float:
        before = self.so_far.get(kind, (0.0, 0))
        self.so_far[kind] = before[0] + seconds, before[1] + (flops or tokens)
        return self.each * seconds

    def most(self, kind: str, tokens: int, flops: int, dollars: float = 0.0) -> float:
        seconds, measured = self.so_far.get(kind, (0.0, 0))
        return self.each * (flops or tokens) * seconds / measured if measured else 0.0

    def traced(self) -> Axis:
        return _Expected(self.unit, self.each, self.so_far)


class _Expected(Seconds):
    """Seconds as expected, not as measured."""

    def of(self, kind: str, tokens: int, flops: int, seconds: float, dollars: float = 0.0) -> float:
        return self.most(kind, tokens, flops)


@dataclass
class Bill:
    """What a running verb has settled of its reserve."""

    reserved: int  # FLOPs
    flops: int | None = None
    tokens: int = 0
    seconds: float | None = None
    dollars: float = 0.0

    def settle(self, flops: int, tokens: int, seconds: float | None = None, dollars: float = 0.0) -> None:
        """Charge ``flops``; ``seconds`` replaces the measured wall time (work done earlier and charged now)."""
        if flops > self.reserved:
            raise RunError(f"a verb spent {flops:.3e} FLOPs but had reserved {self.reserved:.3e}: the cost model is wrong")
        self.flops, self.tokens, self.seconds, self.dollars = flops, tokens, seconds, dollars


@dataclass
class Ledger:
    limit: float | None
    axis: Axis = field(default_factory=Axis)
    charges: list[Charge] = field(default_factory=list)
    step: int = 0
    spent: float = 0
    reserved: float = 0  # by verbs that are running
    refused: bool = False  # some verb did not fit

    @property
    def left(self) -> float:
        assert self.limit is not None
        return self.limit - self.spent - self.reserved

    @property
    def share(self) -> float:
        """Share of the budget that is spent."""
        return self.spent / self.limit if self.limit else 0.0

    def require(self, needed: dict[str, tuple[int, int]], dollars: float = 0.0) -> float:
        """What verbs of these kinds may come to, given their most FLOPs and tokens and the dollars; OverBudgetError unless that is left."""
        if any(flops < 0 or tokens < 0 for flops, tokens in needed.values()):
            raise RunError(f"{' and '.join(needed)} was asked for a negative number of tokens")
        most = sum(self.axis.most(kind, tokens, flops, dollars) for kind, (flops, tokens) in needed.items())
        if self.limit is not None and most > self.left:
            self.refused = True
            said = f"may cost {most:.3e} {self.axis.unit} and only {self.left:.3e} of {self.limit:.3e} are left"
            raise OverBudgetError(f"{' and '.join(needed)} {said}")
        return most

    @contextmanager
    def reserve(self, kind: str, flops: int, tokens: int = 0, dollars: float = 0.0) -> Iterator[Bill]:
        """Raise OverBudgetError unless so much fits; charge what the block settles. Reserving neither FLOPs nor tokens charges nothing."""
        most = self.require({kind: (flops, tokens)}, dollars)
        bill, start = Bill(flops), time.perf_counter()
        self.reserved += most
        try:
            yield bill
        finally:
            self.reserved -= most
            seconds = time.perf_counter() - start if bill.seconds is None else bill.seconds
            charged = (tokens, flops) if bill.flops is None else (bill.tokens, bill.flops)
            charge = Charge(kind, self.step, *charged, seconds, dollars if bill.flops is None else bill.dollars)
            if flops or tokens:
                self.spent += self.axis.of(kind, charge.tokens, charge.flops, seconds, charge.dollars)
                self.charges.append(charge)

    def by_kind(self, unit: str = "flops") -> dict[str, int | float]:
        """``unit`` (flops, tokens or seconds) summed by kind of charge, in order of first appearance."""
        totals: dict[str, int | float] = {}
        for charge in self.charges:
            totals[charge.kind] = totals.get(charge.kind, 0) + getattr(charge, unit)
        return totals

    def saw(self) -> list[str]:
        """What the run was shown, by what it paid for."""
        return [shown for kind, shown in SAW.items() if any(charge.kind == kind for charge in self.charges)]

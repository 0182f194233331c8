"""No method, however it behaves, spends more than its budget; the shipped ones spend at least 99 % of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_bench.bench import Bench, Updated
from opd_bench.errors import RunError, UserError
from opd_bench.flops import FlopCount
from opd_bench.ledger import STUDENT_TOKENS, TEACHER_TOKENS, Axis, Dollars, Ledger, Seconds, Tokens
from opd_bench.losses import cross_entropy
from opd_bench.methods import Method, find
from opd_bench.sequences import Prompts, Sequences
from opd_bench.trace import Counter, full_batch, largest_batch, worst_case
from opd_bench.train import learning_rate_scale, require_one_step, train

METHODS = ("sft", "offline_kd", "opd", "opd_rlaif", "rlaif")
FLOPS = FlopCount(500, 8), FlopCount(2000, 16)
COUNTER = Counter(5, 12, 9, 3, *FLOPS)


@dataclass(frozen=True)
class Varied(Counter):
    """An engine that, like a real one and unlike the trace, meets prompts and responses of any length up to the limit."""

    scales: list[float] = field(default_factory=list)
    draw: torch.Generator = field(default_factory=torch.Generator)

    def prompts(self, start: int, count: int) -> Prompts:
        return Prompts([[0] * (1 + place % self.max_prompt) for place in range(start, start + count)], [""] * count)

    def teacher_text(self, rows: Sequence[int]) -> tuple[Sequences, float]:
        return self.sample(self.prompts(rows[0], len(rows)), 1), 0.0

    def sample(self, prompts: Prompts, group: int) -> Sequences:
        rollouts = super().sample(prompts, group)
        response_B = torch.randint(1, self.max_response + 1, (len(rollouts),), generator=self.draw)
        return Sequences(**{**vars(rollouts), "length_B": rollouts.prompt_B + response_B})

    def update(self, sequences, loss, *, teacher, weights_B, lr_scale):
        self.scales.append(lr_scale)
        return super().update(sequences, loss, teacher=teacher, weights_B=weights_B, lr_scale=lr_scale)


class Timed(Varied):
    """Every verb takes the same time, however much it does."""

    def teacher_text(self, rows: Sequence[int]) -> tuple[Sequences, float]:
        return super().teacher_text(rows)[0], 0.01

    def update(self, sequences, loss, *, teacher, weights_B, lr_scale):
        super().update(sequences, loss, teacher=teacher, weights_B=weights_B, lr_scale=lr_scale)
        return Updated(0.0, 0.01 if teacher else 0.0, 0.02)


def varied(engine: type[Varied] = Varied) -> Varied:
    return engine(**{name: getattr(COUNTER, name) for name in COUNTER.__dataclass_fields__})


def spend(method: Method, limit: int, cooldown: float = 0.0) -> tuple[Bench, Varied]:
    engine = varied()
    bench = Bench(engine, Ledger(limit), *FLOPS, batch=0)
    train(method, bench, COUNTER, cooldown, lambda progress: None)
    assert 0 <= bench.ledger.spent == sum(charge.flops for charge in bench.ledger.charges) <= limit
    assert bench.ledger.reserved == 0
    return bench, engine


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_is_spent_within_one_per_cent_and_never_exceeded(name: str):
    method = find(name).build({"batch": 8})
    step = worst_case(method, 8, COUNTER).spent
    for limit in (100 * step, 100 * step + step // 3, 173 * step):
        assert spend(method, limit)[0].ledger.share >= 0.99


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(METHODS), st.integers(1, 5_000_000), st.sampled_from([4, 8, 10]))
def test_small_budgets_are_never_exceeded_by_the_last_step(name: str, limit: int, batch: int):
    spend(find(name).build({"batch": batch}), limit)


@pytest.mark.parametrize("name", METHODS)
def test_real_models_stay_within_one_per_cent_below(name: str, rig):
    method = find(name).build({"batch": 8})
    limit = 60 * worst_case(method, 8, rig().counter).spent
    built = rig(limit)
    train(method, built.bench, built.counter, 0.3, lambda progress: None)
    assert 0.99 <= built.bench.ledger.share <= 1


@pytest.mark.parametrize(
    "axis",
    [
        Tokens("student tokens", STUDENT_TOKENS),
        Tokens("teacher tokens", TEACHER_TOKENS),
        Dollars("dollars", {"judge": 5.0, "student_sample": 1.0}, 1e9),
    ],
    ids=lambda axis: axis.unit,
)
@pytest.mark.parametrize("name", METHODS)
def test_a_budget_of_any_axis_is_spent_within_one_per_cent_and_never_exceeded(name: str, axis: Axis):
    method = find(name).build({"batch": 8})
    limit = 150 * worst_case(method, 8, COUNTER, axis=axis).spent
    require_one_step(method, COUNTER, limit, axis)
    bench = Bench(varied(), Ledger(limit, axis), *FLOPS, batch=0)
    train(method, bench, COUNTER, 0.3, lambda progress: None)
    assert 0.99 <= bench.ledger.share <= 1
    assert bench.ledger.spent == pytest.approx(sum(axis.of(c.kind, c.tokens, c.flops, c.seconds) for c in bench.ledger.charges))


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_of_seconds_is_met_within_one_per_cent(name: str, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("opd_bench.ledger.time.perf_counter", lambda: next(clock) / 100)
    bench = Bench(varied(Timed), Ledger(5.0, Seconds("seconds")), *FLOPS, batch=0)
    train(find(name).build({"batch": 8}), bench, COUNTER, 0.3, lambda progress: None)
    assert 0.99 <= bench.ledger.share <= 1.01


def test_a_method_that_spends_nothing_on_the_axis_is_refused_before_it_would_run_for_ever():
    class Alone(Method):
        def step(self, bench):
            bench.update(bench.sample(bench.prompts()), cross_entropy)

    with pytest.raises(UserError, match="Alone spends no teacher tokens"):
        require_one_step(Alone(Method.Config()), COUNTER, 1e9, Tokens("teacher tokens", TEACHER_TOKENS))


def weights(bench: Bench) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in bench.engine.student.parameters()])  # pyright: ignore[reportAttributeAccessIssue]


def amounts(bench: Bench) -> list[tuple]:
    return [(charge.kind, charge.step, charge.tokens, charge.flops) for charge in bench.ledger.charges]


@pytest.mark.parametrize("cooldown", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", METHODS)
def test_a_branch_is_what_a_run_of_its_own_budget_comes_to_and_leaves_the_run_as_it_was(name: str, cooldown: float, rig):
    def trained(limit: int, budgets: tuple[int, ...] = ()) -> tuple[Bench, list[Bench]]:
        built, branches = rig(limit), []
        method = find(name).build({"batch": 8})
        train(method, built.bench, built.counter, cooldown, lambda progress: None, budgets, lambda _, branch: branches.append(branch))
        return built.bench, branches

    step = worst_case(find(name).build({"batch": 8}), 8, rig().counter).spent
    budgets = 6 * step, 15 * step + step // 2
    whole, branches = trained(30 * step, budgets)
    for bench, limit in zip([*branches, whole], [*budgets, 30 * step], strict=True):
        alone, _ = trained(limit)
        assert amounts(bench) == amounts(alone)
        assert bench.losses == alone.losses
        assert torch.equal(weights(bench), weights(alone))


@pytest.mark.parametrize("name", METHODS)
def test_the_trace_bounds_every_real_step(name: str, rig):
    method, built = find(name).build({"batch": 4}), rig(batch=4)
    bound = worst_case(method, 4, built.counter).by_kind()
    for _ in range(3):
        before = built.bench.ledger.by_kind()
        method.step(built.bench)
        for kind, spent in built.bench.ledger.by_kind().items():
            assert 0 < spent - before.get(kind, 0) <= bound[kind]


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_below_one_step_is_refused_and_one_that_holds_it_is_not(name: str):
    method = find(name).build({"batch": 8})
    needed = worst_case(method, 8, COUNTER).spent
    require_one_step(method, COUNTER, needed)
    with pytest.raises(UserError, match="too small for one step"):
        require_one_step(method, COUNTER, needed - 1)


def test_the_largest_batch_is_the_largest_that_fits():
    method = find("opd_rlaif").build({"batch": 30, "group": 4})
    costs = {batch: worst_case(method, batch, COUNTER).spent for batch in range(4, 29, 4)}
    for batch, cost in costs.items():
        assert largest_batch(method, COUNTER, cost) == batch
        assert largest_batch(method, COUNTER, cost - 1) == batch - 4
    assert largest_batch(method, COUNTER, 10**12) == full_batch(method) == 28


def test_last_steps_scale_their_learning_rate_by_their_share_of_the_batch():
    method = find("opd_rlaif").build({"batch": 30, "group": 4})
    bench, engine = spend(method, 10 * worst_case(method, 28, COUNTER).spent)
    sizes = [scale * 28 for scale in engine.scales]
    assert sizes[0] == 28  # 30 holds seven groups: a full step, at the full rate
    assert sizes[-1] < 28
    assert all(size == pytest.approx(round(size / 4) * 4) for size in sizes)
    assert sum(sizes) / 4 == pytest.approx(bench.position)  # four rollouts per prompt


def test_the_learning_rate_falls_to_zero_over_the_cooldown():
    assert [learning_rate_scale(share, 0.5) for share in (0, 0.5, 0.75, 1)] == [1, 1, 0.5, 0]
    assert learning_rate_scale(0.99, 0) == 1
    engine = spend(find("sft").build({"batch": 8}), 50 * worst_case(find("sft").build({"batch": 8}), 8, COUNTER).spent, 0.3)[1]
    assert engine.scales[0] == 1
    assert engine.scales[-1] < 0.1


class _Hostile(Method):
    def __init__(self) -> None:
        super().__init__(Method.Config(batch=8))  # pyright: ignore[reportCallIssue]


class ManyPrompts(_Hostile):
    def step(self, bench):
        bench.sample(bench.prompts(10**9))


class HugeGroup(_Hostile):
    def step(self, bench):
        bench.sample(bench.prompts(), group=10**9)


class ExtraUpdates(_Hostile):
    """As many updates as the student's text has tokens: more than the trace, where it has none, can know."""

    def step(self, bench):
        rollouts = bench.sample(bench.prompts())
        for _ in range(1 if (rollouts.length_B - rollouts.prompt_B).min() == 12 else rollouts.response_tokens):
            bench.update(rollouts, cross_entropy)


class Deaf(_Hostile):
    """Goes on after every refusal."""

    def step(self, bench):
        for group in (1, -3, 0, 5, 10**9, 1):
            try:
                bench.update(bench.sample(bench.prompts(), group=group), cross_entropy)
            except RunError:
                continue


class Refund(_Hostile):
    """Hopes that a negative request earns something back."""

    def step(self, bench):
        for count in (-1, -(10**6)):
            try:
                bench.teacher_corpus(count)
            except RunError:
                continue
        bench.update(bench.teacher_corpus(), cross_entropy)


@pytest.mark.parametrize("method", [ExtraUpdates(), Deaf(), Refund()], ids=lambda method: type(method).__name__)
def test_a_hostile_method_stays_within_its_budget(method: Method):
    for limit in (10**5, 10**7, 10**7 + 12345):
        spend(method, limit)


@pytest.mark.parametrize("method", [ManyPrompts(), HugeGroup()], ids=lambda method: type(method).__name__)
def test_a_request_beyond_all_memory_ends_at_once(method: Method):
    with pytest.raises(RunError, match="sequences at once"):
        require_one_step(method, COUNTER, 10**9)


class UntilItEnds(_Hostile):
    def step(self, bench):
        while True:
            bench.update(bench.teacher_corpus(), cross_entropy)


def test_a_step_without_end_is_refused_before_training():
    with pytest.raises(UserError, match="too small for one step"):
        require_one_step(UntilItEnds(), COUNTER, 10**7)


class Stalls(_Hostile):
    """Charges in the trace, nothing when it matters."""

    def step(self, bench):
        if bench.ledger.step == 0:
            bench.sample(bench.prompts())


class Breaks(_Hostile):
    def step(self, bench):
        if bench.ledger.step == 2:
            raise KeyError("what")
        bench.sample(bench.prompts())


def test_a_step_that_charges_nothing_is_an_error_and_no_endless_loop():
    with pytest.raises(RunError, match="charged nothing"):
        spend(Stalls(), 10**7)


def test_a_step_that_raises_is_named_with_its_error():
    with pytest.raises(RunError, match=r"Breaks\.step raised KeyError"):
        spend(Breaks(), 10**7)


def test_the_trace_leaves_the_method_as_it_was():
    class Counts(_Hostile):
        steps = 0

        def step(self, bench):
            self.steps += 1
            bench.sample(bench.prompts())

    method = Counts()
    worst_case(method, 8, COUNTER)
    assert method.steps == 0

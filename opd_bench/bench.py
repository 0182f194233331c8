"""The metered bench: the only hands a method has. Every verb charges the ledger before its result can be used.

    rollouts = bench.sample(bench.prompts())                                  # the student writes
    bench.update(rollouts, reverse_kl, signal=bench.teacher(rollouts))        # the teacher corrects every token of it

Metering is reserve, run, refund: a verb reserves its worst case, runs, and gives back what it did not use, so no verb
can overspend. A method never holds a model: the engine behind the bench does, and `trace.py` puts one there that only
counts, to know what a step may cost before it begins.

Shapes: B sequences, N response tokens of a batch.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from opd_bench.errors import RunError
from opd_bench.flops import FlopCount
from opd_bench.ledger import VERIFIER, Ledger
from opd_bench.losses import Loss
from opd_bench.sequences import Mix, Prompts, Sequences

WINDOW = 512  # teacher texts that are passed over together when a method asks for several epochs
MOST = 65_536  # sequences a verb takes at once: more than any batch, few enough to be held in memory


@dataclass(frozen=True)
class Signal:
    """A promise of the teacher's distributions over ``sequences``; computed, and charged, when an update uses it."""

    sequences: Sequences


@dataclass(frozen=True)
class Usage:
    """Tokens that the judge read and wrote for each verdict, and what somebody asked for them all in dollars."""

    read_B: torch.Tensor
    written_B: torch.Tensor
    dollars: float = 0.0

    @property
    def tokens(self) -> int:
        return int((self.read_B + self.written_B).sum())


@dataclass(frozen=True)
class Judgement:
    """How probable the judge held each answer to be right, 0 to 1; ``unreadable_B`` where it gave no verdict, which then is 0.5."""

    verdict_B: torch.Tensor
    usage: Usage
    unreadable_B: torch.Tensor


@dataclass(frozen=True)
class Updated:
    """Mean loss over the response tokens, and the wall seconds that scoring and training took."""

    loss: float
    teacher_s: float
    student_s: float


class Engine(Protocol):
    """Who does the work: real models (`engine.py`) or a counter of worst cases (`trace.py`)."""

    @property
    def max_response(self) -> int: ...
    @property
    def judge_kind(self) -> str: ...
    @property
    def judge_flops(self) -> FlopCount: ...
    def enter(self, mix: Mix) -> None:
        """From now on prompts, and teacher text for them, come from the stream of ``mix``."""
        ...

    def prompts(self, start: int, count: int) -> Prompts: ...
    def extra_B(self, of: Prompts | Sequences) -> torch.Tensor:
        """Tokens that a privileged teacher reads beyond each prompt."""
        ...

    def teacher_text(self, rows: Sequence[int]) -> tuple[Sequences, float]: ...
    def sample(self, prompts: Prompts, group: int) -> Sequences: ...
    def judge_most(self, sequences: Sequences) -> Usage: ...
    def judge(self, sequences: Sequences) -> Judgement: ...
    def update(self, sequences: Sequences, loss: Loss, *, teacher: bool, weights_B: torch.Tensor | None, lr_scale: float) -> Updated: ...
    def fork(self) -> Engine: ...


@dataclass
class Bench:
    """Verbs for a method. ``batch`` is the number of sequences the present step may train on."""

    engine: Engine = field(repr=False)
    ledger: Ledger = field(repr=False)
    student_flops: FlopCount
    teacher_flops: FlopCount
    batch: int
    lr_scale: Callable[[], float] = lambda: 1.0
    seed: int = 0
    positions: dict[Mix, int] = field(default_factory=dict)  # how much is consumed of the seed's prompt stream of each mix
    mix: Mix = ()
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._window: list[int] = []
        self._replay: list[int] = []
        self._shuffle = random.Random(f"replay {self.seed}")

    def fork(self, limit: float) -> Bench:
        """A bench that goes on from here by itself, as far as ``limit``; this one is left as it is."""
        other = replace(
            self,
            engine=self.engine.fork(),
            ledger=replace(self.ledger, limit=limit, charges=[*self.ledger.charges]),
            losses=[*self.losses],
            positions={**self.positions},
        )
        other._window, other._replay, other._shuffle = [*self._window], [*self._replay], copy.deepcopy(self._shuffle)
        return other

    def enter(self, mix: Mix) -> None:
        """Draw prompts from the stream of ``mix`` from now on; texts that were to be passed over again are not, if it is another."""
        if mix != self.mix:
            self.engine.enter(mix)
            self.mix, self._window, self._replay = mix, [], []

    @property
    def position(self) -> int:
        """How many prompts are consumed, of all streams together."""
        return sum(self.positions.values())

    def _advance(self, count: int) -> int:
        start = self.positions.get(self.mix, 0)
        self.positions[self.mix] = start + count
        return start

    def prompts(self, count: int | None = None) -> Prompts:
        """The next ``count`` (default: ``batch``) prompts of the stream that all arms of a seed share. Free."""
        count = _allowed(self.batch if count is None else count)
        return self.engine.prompts(self._advance(count), count)

    def teacher_corpus(self, count: int | None = None, epochs: int = 1) -> Sequences:
        """Teacher text, sampled at temperature 1 and unfiltered, for the next ``count`` prompts of the stream.

        With ``epochs`` above 1 each window of 512 texts is passed over that often before new ones are bought; a text is
        charged once. At the end of a window fewer than ``count`` may come.
        """
        count = _allowed(self.batch if count is None else count)
        if self._replay:
            rows, self._replay = self._replay[:count], self._replay[count:]
            return self.engine.teacher_text(rows)[0]
        start = self._advance(count)
        rows = range(start, start + count)
        prompts = self.engine.prompts(start, count)
        extra_B = self.engine.extra_B(prompts)
        worst = self.teacher_flops.sample(prompts.lengths_B + extra_B, torch.tensor(self.engine.max_response))
        with self.ledger.reserve("teacher_generate", worst, count * self.engine.max_response) as bill:
            texts, seconds = self.engine.teacher_text(rows)
            bill.settle(_sampled(self.teacher_flops, texts, extra_B), texts.response_tokens, seconds)
        self._window += rows
        if len(self._window) >= WINDOW:
            for _ in range(epochs - 1):
                self._replay += self._shuffle.sample(self._window, len(self._window))
            self._window = []
        return texts

    def sample(self, prompts: Prompts, group: int = 1) -> Sequences:
        """``group`` rollouts of the student, at temperature 1 from the full distribution, to every prompt."""
        _allowed(len(prompts) * group)
        worst = group * self.student_flops.sample(prompts.lengths_B, torch.tensor(self.engine.max_response))
        with self.ledger.reserve("student_sample", worst, len(prompts) * group * self.engine.max_response) as bill:
            rollouts = self.engine.sample(prompts, group)
            bill.settle(_sampled(self.student_flops, rollouts), rollouts.response_tokens)
        return rollouts

    def teacher(self, sequences: Sequences) -> Signal:
        """The teacher's distribution at every response token of ``sequences``; lazy, charged when used."""
        return Signal(sequences)

    def judge(self, sequences: Sequences) -> torch.Tensor:
        """``verdict_B``: the judge's probability, 0 to 1, that each response is right.

        It never sees the ground truth, unless the configuration asks for the verifier itself: that is free, and then this is RLVR.
        """
        kind, flops, most = self.engine.judge_kind, self.engine.judge_flops, self.engine.judge_most(sequences)
        with self.ledger.reserve(kind, flops.sample(most.read_B, most.written_B), most.tokens, most.dollars) as bill:
            judgement = self.engine.judge(sequences)
            used = judgement.usage
            seconds = 0.0 if kind == VERIFIER else None
            bill.settle(flops.sample(used.read_B, used.written_B), used.tokens, seconds, used.dollars)
        return judgement.verdict_B

    def update(self, sequences: Sequences, loss: Loss, *, signal: Signal | None = None, weights: torch.Tensor | None = None) -> float:
        """One optimiser step on the mean of ``loss`` over all response tokens of ``sequences``.

        ``loss`` is a pure function ``(logits_NV, Tokens) -> loss_N`` (see `losses.py`); ``weights`` (B,) reaches it as
        ``Tokens.weight_N``. Returns the mean loss.
        """
        if signal is not None and signal.sequences is not sequences:
            raise RunError("the signal was asked for other sequences than those of the update")
        if weights is not None and weights.shape != (len(sequences),):
            raise RunError(f"weights have shape {tuple(weights.shape)}; one weight per sequence is needed, ({len(sequences)},)")
        training = self.student_flops.update(sequences.length_B)
        scoring = self.teacher_flops.score(sequences.length_B + self.engine.extra_B(sequences)) if signal else 0
        tokens = sequences.response_tokens
        seen = tokens if signal else 0
        self.ledger.require({"teacher_score": (scoring, seen), "student_update": (training, tokens)})  # both or neither
        with (
            self.ledger.reserve("teacher_score", scoring, seen) as scored,
            self.ledger.reserve("student_update", training, tokens) as trained,
        ):
            done = self.engine.update(sequences, loss, teacher=signal is not None, weights_B=weights, lr_scale=self.lr_scale())
            scored.settle(scoring, seen, done.teacher_s)
            trained.settle(training, tokens, done.student_s)
        self.losses.append(done.loss)
        return done.loss


def _allowed(count: int) -> int:
    if not 1 <= count <= MOST:
        raise RunError(f"a method asked for {count} sequences at once; it may ask for 1 to {MOST}")
    return count


def _sampled(flops: FlopCount, sequences: Sequences, extra_B: torch.Tensor | int = 0) -> int:
    """FLOPs of prefill and cached decoding of ``sequences``, whose prompts are longer by ``extra_B``."""
    return flops.sample(sequences.prompt_B + extra_B, sequences.length_B - sequences.prompt_B)

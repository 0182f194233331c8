"""A method under observation: what it does between the bench's verbs, and what it does to the sequences and losses it hands over.

    watch = Watch(path_of_the_method)
    sys.addaudithook(watch.hear)
    train(Watched(method, watch), bench, counter, cooldown, on_step)   # as any other method
    watch.seconds, watch.flops, watch.trespasses, watch.complaints

The method meets a ``Guard`` in place of the bench, in its steps and in their traces. What is not public is recorded and answered with a
copy, so that the run goes on as if it had not been touched and the other properties can still be judged.

Shapes: N response positions, V vocabulary.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_bench import trace
from opd_bench.bench import Bench, Signal
from opd_bench.losses import Loss, Tokens
from opd_bench.methods import Method
from opd_bench.resources import PACKAGE, TASKS
from opd_bench.sequences import Prompts, Sequences

PUBLIC = {"bench", "errors", "losses", "methods", "sequences"}  # the modules of this package that a method may import
KNOWING = ("lm_eval", "datasets")  # libraries through which test items can be had
EVENTS = {  # of Python's audit hooks (PEP 578), with what they amount to
    "open": "opens",
    "os.listdir": "lists",
    "os.scandir": "lists",
    "sqlite3.connect": "opens",
    "subprocess.Popen": "starts the process",
    "os.system": "starts the process",
    "os.exec": "starts the process",
    "os.posix_spawn": "starts the process",
    "os.fork": "forks a process",
    "socket.connect": "connects to a network",
    "socket.getaddrinfo": "connects to a network",
}
TOLERANCE = 1e-4  # between two float32 evaluations of a loss at the same position
NUDGE = 0.1  # of the teacher's logits, in either direction, from where a divergence is smallest


def foreign_imports(path: Path) -> list[str]:
    """What the file ``path`` imports, inside functions too, that a method has no business with."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "opd_bench" else [node.module]
    parts = [name.split(".") for name in names]
    return [".".join(part) for part in parts if part[0] in KNOWING or (part[0] == "opd_bench" and part[1:] and part[1] not in PUBLIC)]


def _closed_folders() -> dict[str, str]:
    """Folders that hold test items or lead to them, where nothing may be opened, with the library each belongs to, if any."""
    specs = {name: spec for name in KNOWING if (spec := importlib.util.find_spec(name))}
    places = {place: name for name, spec in specs.items() for place in spec.submodule_search_locations or []}
    return {f"{folder}{os.sep}": name for folder, name in ({PACKAGE: "", TASKS: ""} | places).items()}


@dataclass(eq=False)
class Watch:
    """What was seen of one method in this process. ``probing`` looks into its losses and counts its FLOPs, which costs time."""

    path: Path
    eos: int
    probing: bool = False
    retracing: trace.Counter | None = None  # trace every step once more before it is taken, and compare
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("harness", "method", "verb", "loss"), 0.0))  # of CPU
    flops: int = 0  # of matrix products in the method's own code, losses included
    idle: list[int] = field(default_factory=list)  # steps that charged nothing
    outgrown: list[str] = field(default_factory=list)
    trespasses: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    updates: int = 0
    ends: int = 0  # EOS positions met by probed losses
    first: tuple[tuple[int, ...], ...] = ()  # prompts of the arm's first update

    def __post_init__(self) -> None:
        self._place, self._since, self._meter = "harness", time.process_time(), None
        self._closed, self._draw = _closed_folders(), torch.Generator().manual_seed(0)
        self.begin_arm()

    def __deepcopy__(self, memo: dict) -> Watch:
        return self  # a traced copy of the method is watched by the same eyes

    def begin_arm(self) -> None:
        """Forget what an arm before this one was handed."""
        self.first, self._handed, self._prompts = (), Counter(), {}

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """CPU seconds of the block, and with ``probing`` the FLOPs of the method's own code, are put down to ``place``."""
        before = self._place
        self._move(place)
        try:
            yield
        finally:
            self._move(before)

    def _move(self, place: str) -> None:
        self.seconds[self._place] += time.process_time() - self._since
        if self._meter:
            self._meter.__exit__(None, None, None)
            self.flops += self._meter.get_total_flops()
            self._meter = None
        self._place = place
        if self.probing and place in ("method", "loss"):
            self._meter = FlopCounterMode(display=False)
            self._meter.__enter__()
        self._since = time.process_time()

    def note(self, where: list[str], what: str) -> None:
        if what not in where:
            where.append(what)

    def hear(self, event: str, arguments: tuple) -> None:
        """An audit hook: of the listed events, those for which the method's file stands nearer on the stack than the harness does."""
        if event not in EVENTS:
            return
        frame, importing = sys._getframe(1), False
        while frame and (file := frame.f_code.co_filename) != str(self.path):
            if file == __file__:
                return
            importing |= file.startswith("<frozen importlib")
            frame = frame.f_back
        if not frame:
            return
        subject = arguments[0] if arguments and isinstance(arguments[0], str | bytes | os.PathLike) else ""
        path = os.path.abspath(os.fsdecode(subject)) if subject else ""
        if event == "open" and (not path or path == str(self.path)):
            return
        if closed := [library for folder, library in self._closed.items() if path.startswith(folder)]:
            self.note(self.trespasses, f"{EVENTS[event]} {closed[0] or '/'.join(Path(path).parts[-2:])}")
        elif not importing and not (event == "open" and path.endswith((".py", ".pyc"))):  # a traceback reads its sources
            self.note(self.trespasses, f"{EVENTS[event]} {os.fsdecode(subject)}".strip())

    def hand_out(self, sequences: Sequences) -> None:
        if self.probing:
            for prompt, text in _texts(sequences):
                self._handed[text] += 1
                self._prompts.setdefault(text, set()).add(prompt)

    def take_in(self, sequences: Sequences) -> None:
        """Note the rows of an update that are not, from the first response token to the last, what a verb handed out."""
        self.updates += 1
        rows = _texts(sequences)
        self.first = self.first or tuple(text[:prompt] for prompt, text in rows)
        if not self.probing:
            return
        for (prompt, text), count in Counter(rows).items():
            if text in self._handed and prompt not in self._prompts[text]:
                self.note(self.complaints, "the response given to bench.update does not begin where the prompt ends")
            elif text not in self._handed and any(longer[: len(text)] == text for longer in self._handed):
                self.note(self.complaints, "a response was cut, its EOS with it, before it was given to bench.update")
            elif text not in self._handed:
                self.note(self.complaints, "bench.update was given a text that no verb had handed out")
            elif count > self._handed[text]:
                self.note(self.complaints, "bench.update was given a text more often than it was handed out")

    @torch.enable_grad()
    def probe(self, loss: Loss, logits_NV: torch.Tensor, tokens: Tokens) -> None:
        """Note where ``loss`` is not a function of each position alone, EOS included, or a divergence that does not vanish."""
        logits_NV = logits_NV.detach()
        given_N = loss(logits_NV, tokens).detach()
        rows = torch.randperm(len(given_N), generator=self._draw)[: max(1, len(given_N) // 2)]
        try:
            apart = not torch.allclose(loss(logits_NV[rows], _rows(tokens, rows)).detach(), given_N[rows], TOLERANCE, TOLERANCE)
        except (RuntimeError, IndexError, ValueError):
            apart = True
        if apart:
            self.note(self.complaints, "the loss of a position depends on other positions: given some of them in another order it differs")
            return
        end_N = tokens.ids_N == self.eos
        other = replace(tokens, ids_N=torch.where(end_N, self.eos + 1, tokens.ids_N))
        self.ends += int(end_N.sum())
        if (end_N & (_pull(loss, logits_NV, tokens) == 0) & (_pull(loss, logits_NV, other) > 0)).any():
            self.note(self.complaints, "EOS is masked: its positions have no gradient where any other token has one")
            return
        if tokens.teacher_NE is None:
            return
        plain = replace(tokens, weight_N=torch.ones_like(tokens.weight_N))
        moved = replace(plain, ids_N=(tokens.ids_N + 1) % logits_NV.shape[-1])
        if torch.equal(loss(logits_NV, plain).detach(), loss(logits_NV, moved).detach()):  # it reads no written token: a divergence
            teacher_NE = tokens.teacher_NE
            small_NV = NUDGE * torch.randn(teacher_NE.shape, generator=self._draw)
            least_N = loss(teacher_NE, plain).detach()
            if any(
                (loss(near_NV, plain).detach() < least_N - TOLERANCE).any() for near_NV in (teacher_NE + small_NV, teacher_NE - small_NV)
            ):
                self.note(self.complaints, "the divergence is not smallest, and its gradient not zero, where student and teacher agree")


def _texts(sequences: Sequences) -> list[tuple[int, tuple[int, ...]]]:
    """Length of the prompt, and all token ids, of every row."""
    lengths = zip(sequences.prompt_B.tolist(), sequences.length_B.tolist(), sequences.ids_BT.tolist(), strict=True)
    return [(prompt, tuple(ids[:length])) for prompt, length, ids in lengths]


def _rows(tokens: Tokens, rows: torch.Tensor) -> Tokens:
    teacher_NE = None if tokens.teacher_NE is None else tokens.teacher_NE[rows]
    return Tokens(tokens.ids_N[rows], teacher_NE, tokens.weight_N[rows])


def _pull(loss: Loss, logits_NV: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Size (N,) of the gradient at every position; 0 everywhere for a loss that does not depend on the logits."""
    leaf_NV = logits_NV.clone().requires_grad_()
    total = loss(leaf_NV, tokens).sum()
    if not total.requires_grad:
        return torch.zeros(len(leaf_NV))
    (gradient_NV,) = torch.autograd.grad(total, leaf_NV)
    return gradient_NV.abs().sum(-1)


class Guard:
    """The public part of a bench. Anything else is noted, and answered from a copy."""

    def __init__(self, bench: Bench, watch: Watch) -> None:
        vars(self).update(_Guard__bench=bench, _Guard__watch=watch)

    @property
    def batch(self) -> int:
        return self.__bench.batch

    @property
    def seed(self) -> int:
        return self.__bench.seed

    def prompts(self, count: int | None = None) -> Prompts:
        with self.__watch.at("verb"):
            return self.__bench.prompts(count)

    def teacher_corpus(self, count: int | None = None, epochs: int = 1) -> Sequences:
        with self.__watch.at("verb"):
            return self.__handed(self.__bench.teacher_corpus(count, epochs))

    def sample(self, prompts: Prompts, group: int = 1) -> Sequences:
        with self.__watch.at("verb"):
            return self.__handed(self.__bench.sample(prompts, group))

    def teacher(self, sequences: Sequences) -> Signal:
        with self.__watch.at("verb"):
            return self.__bench.teacher(sequences)

    def judge(self, sequences: Sequences) -> torch.Tensor:
        with self.__watch.at("verb"):
            return self.__bench.judge(sequences)

    def update(self, sequences: Sequences, loss: Loss, *, signal: Signal | None = None, weights: torch.Tensor | None = None) -> float:
        watch = self.__watch
        if not self.__traced:
            with watch.at("harness"):
                watch.take_in(sequences)

        def watched(logits_NV: torch.Tensor, tokens: Tokens) -> torch.Tensor:
            with watch.at("loss"):
                loss_N = loss(logits_NV, tokens)
            if watch.probing:
                with watch.at("harness"):
                    watch.probe(loss, logits_NV, tokens)
            return loss_N

        with watch.at("verb"):
            return self.__bench.update(sequences, watched, signal=signal, weights=weights)

    @property
    def __traced(self) -> bool:
        return isinstance(self.__bench.engine, trace.Counter)

    def __handed(self, sequences: Sequences) -> Sequences:
        if not self.__traced:
            with self.__watch.at("harness"):
                self.__watch.hand_out(sequences)
        return sequences

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(self.__bench, name):
            raise AttributeError(f"a bench has no {name!r}")
        with self.__watch.at("harness"):
            self.__watch.note(self.__watch.trespasses, f"reads bench.{name}")
            return getattr(self.__bench.fork(self.__bench.ledger.limit), name)  # pyright: ignore[reportArgumentType]

    def __setattr__(self, name: str, value: object) -> None:
        self.__watch.note(self.__watch.trespasses, f"sets bench.{name}")


class Watched(Method):
    """``inner`` as the harness takes it, and meeting a ``Guard`` in its steps and in their traces."""

    def __init__(self, inner: Method, watch: Watch) -> None:
        super().__init__(inner.config)
        self.inner, self.watch = inner, watch

    @property
    def unit(self) -> int:
        return self.inner.unit

    def step(self, bench: Bench) -> None:
        traced, watch, spent = isinstance(bench.engine, trace.Counter), self.watch, bench.ledger.spent
        bound = trace.worst_case(self, bench.batch, watch.retracing).spent if watch.retracing and not traced else None
        threads = threading.active_count()
        with watch.at("method"):
            self.inner.step(Guard(bench, watch))  # pyright: ignore[reportArgumentType]
        if threading.active_count() > threads:
            watch.note(watch.trespasses, "leaves a thread running")
        cost = bench.ledger.spent - spent
        if cost == 0 and not traced:
            watch.idle.append(bench.ledger.step)
        if bound is not None and cost > bound:
            watch.outgrown.append(f"step {bench.ledger.step} cost {cost:.3g} FLOPs and its trace {bound:.3g}")

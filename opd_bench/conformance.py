"""What a fair arm must satisfy, checked on a method from anywhere by running it: `opd-bench check path/to/method.py`.

    report = check("path/to/method.py", {})
    report.fair, [verdict.why for verdict in report.verdicts]

A method is trained on tiny random models under a budget of a few steps, five times, in a fresh process each: alone, alone again, after
other arms, with every step traced once more, and with its losses probed. A property is a function of what was seen there.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opd_bench.bench import Bench
from opd_bench.config import read_yaml
from opd_bench.engine import TorchEngine
from opd_bench.errors import RunError, UserError, did_you_mean
from opd_bench.flops import flop_count
from opd_bench.judge_model import CheckJudge
from opd_bench.ledger import Ledger, OverBudgetError
from opd_bench.methods import Method, Source, find, shipped
from opd_bench.prompts import Corpus, Stream
from opd_bench.scoring import ModelTeacher
from opd_bench.teachers import Teachers
from opd_bench.trace import Counter, full_batch, worst_case
from opd_bench.train import Progress, train
from opd_bench.watch import Watch, Watched, foreign_imports

VOCABULARY, EOS, YES, NO, QUESTION = 11, 1, 4, 5, [2, 3]  # token ids
RESPONSE, CHECK, CONTEXT = 8, 3, 64  # tokens
STEPS = 12  # the budget holds the worst case of this many
UNITS = 12  # groups in a batch, unless the options say otherwise: the last steps can then be cut finely
ENDLESS = 10**9  # FLOPs per sequence, some hundred verbs at their worst case: a step that may cost this has no end
SPENT = 0.99  # share of its budget an arm must spend to be ranked
OUTSIDE_FLOPS = 0.01  # of the FLOPs charged
OUTSIDE_SECONDS = 0.1  # of the CPU seconds in the verbs, which are short here; with real models the same code is a smaller share
KILLED_AFTER = 4  # steps
PATIENCE_S = 120  # for one trial
SHOWN = 8  # notes at most


class Property(StrEnum):
    CHARGES = "charges everything"
    BUDGET = "spends its budget"
    DETERMINISTIC = "deterministic per seed"
    STATELESS = "no state across arms"
    BLIND = "sees only the bench"
    ALIGNED = "masks and EOS"
    TRACEABLE = "traceable"


@dataclass(frozen=True)
class Verdict:
    """``held`` is None where the property could not be judged, because another one does not hold."""

    property: Property
    held: bool | None
    why: str
    mend: str = ""  # what to do about it


@dataclass(frozen=True)
class Report:
    method: str
    verdicts: list[Verdict]

    @property
    def fair(self) -> bool:
        return all(verdict.held for verdict in self.verdicts)


@dataclass(frozen=True)
class Arm:
    """How an arm ended. Arms are equal if they came to the same weights by the same charges."""

    weights: str
    charges: tuple[tuple[str, int, int, int], ...]  # kind, step, tokens, FLOPs
    prompts: tuple[tuple[int, ...], ...]  # of the first update
    limit: float
    unit: float  # worst case of one unit in FLOPs
    refused: bool

    @property
    def spent(self) -> int:
        return sum(flops for *_, flops in self.charges)


@dataclass(frozen=True)
class Trial:
    """A process of its own: ``arms`` one after the other, (seed, number of steps after which it is killed, or 0)."""

    method: str
    options: tuple[tuple[str, object], ...]
    arms: tuple[tuple[int, int], ...] = ((1, 0),)
    probing: bool = False
    retracing: bool = False


@dataclass(frozen=True)
class Record:
    """What was seen in one trial."""

    arms: list[Arm]
    watch: dict[str, list[str]]  # trespasses, complaints, outgrown
    idle: list[int]
    seconds: dict[str, float]
    flops: int
    updates: int
    ends: int


@dataclass(frozen=True)
class Evidence:
    alone: Record
    again: Record
    after_others: Record
    retraced: Record
    probed: Record

    @property
    def records(self) -> list[Record]:
        return [self.alone, self.again, self.after_others, self.retraced, self.probed]

    def noted(self, what: str) -> list[str]:
        return sorted({note for record in self.records for note in record.watch[what]})

    @property
    def idle(self) -> list[int]:
        """Steps that charged nothing; the harness ends the arm at the first."""
        return [step for record in self.records for step in record.idle]

    @property
    def deterministic(self) -> bool:
        return self.alone.arms[0] == self.again.arms[0]


class _KilledError(Exception):
    """Thrown out of an arm to end it half-way."""


def llama(seed: int, layers: int) -> LlamaForCausalLM:
    """Random weights over eleven tokens, with matrices large enough that no distribution is flat."""
    config = LlamaConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT},
        **{"eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None},
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(6)
    return model


def bench_of(method: Method, seed: int, folder: Path) -> tuple[Bench, Counter]:
    """A bench over tiny models with a budget for ``method``, and its counter; a seed determines prompts, cold start and teacher text."""
    draw = random.Random("prompts")
    encoded = [("task", [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(2, 5))]) for _ in range(100)]
    student, teacher, stream = llama(1, layers=1), llama(2, layers=2), Stream(encoded, seed)
    corpus = Corpus(Teachers(teacher), stream, EOS, RESPONSE, folder / f"seed-{seed}")
    judge = CheckJudge(teacher, QUESTION, YES, NO, EOS, max_check=CHECK)
    engine = TorchEngine(student, ModelTeacher(teacher), EOS, RESPONSE, stream, corpus, judge, method.config.lr, seed)
    counts = flop_count(student.config), flop_count(teacher.config)
    counter = Counter(stream.longest, RESPONSE, CHECK, len(QUESTION), *counts)
    endless = ENDLESS * full_batch(method)
    try:
        step = worst_case(method, full_batch(method), counter, endless).spent
    except OverBudgetError:
        raise RunError(f"a step of {type(method).__name__} has no end: its trace charges more than {endless:.0e} FLOPs") from None
    return Bench(engine, Ledger(max(STEPS * step, 1)), *counts, batch=0, seed=seed), counter


def record(trial: Trial) -> Record:
    """Carry out ``trial`` in this process, which should be a fresh one: audit hooks stay."""
    signal.alarm(PATIENCE_S)
    torch.set_num_threads(1)
    for module in (random, np.random):
        module.seed(None)  # a forked process begins with a copy of its parent's
    watch = Watch(Path(trial.method), EOS, trial.probing)
    with tempfile.TemporaryDirectory() as folder:
        sys.addaudithook(watch.hear)
        source = find(trial.method)
        watch.path = source.path
        for name in foreign_imports(source.path):
            watch.note(watch.trespasses, f"imports {name}")
        arms = [_train(trial, source, watch, seed, kill, Path(folder)) for seed, kill in trial.arms]
    notes = {what: getattr(watch, what) for what in ("trespasses", "complaints", "outgrown")}
    return Record(arms, notes, watch.idle, watch.seconds, watch.flops, watch.updates, watch.ends)


def _build(source: Source, options: dict) -> Method:
    method = source.build(options)
    return method if "batch" in options else source.build({**options, "batch": UNITS * method.unit})


def _train(trial: Trial, source: Source, watch: Watch, seed: int, kill: int, folder: Path) -> Arm:
    def on_step(progress: Progress) -> None:
        if progress.step == kill:
            raise _KilledError

    watch.begin_arm()
    torch.manual_seed(seed)
    with watch.at("method"):
        inner = _build(source, dict(trial.options))
    method = type(type(inner).__name__, (Watched,), {})(inner, watch)
    bench, counter = bench_of(method, seed, folder)
    watch.retracing = counter if trial.retracing else None
    try:
        train(method, bench, counter, 0.3, on_step)
    except _KilledError:
        pass
    except RunError:
        if not watch.idle:
            raise
    digest = hashlib.sha256()
    for weight in bench.engine.student.parameters():  # pyright: ignore[reportAttributeAccessIssue]
        digest.update(weight.detach().numpy().tobytes())
    charges = tuple((charge.kind, charge.step, charge.tokens, charge.flops) for charge in bench.ledger.charges)
    limit, refused = bench.ledger.limit or 0, bench.ledger.refused
    return Arm(digest.hexdigest(), charges, watch.first, limit, limit / STEPS * method.unit / full_batch(method), refused)


def charges_everything(seen: Evidence) -> Verdict:
    """Every step charges; matrix products and CPU seconds outside the verbs, traces included, are negligible."""
    verdict = partial(Verdict, Property.CHARGES)
    if seen.idle:
        return verdict(
            False, f"step {seen.idle[0]} charged nothing", "let every step use a verb that is charged: sample, teacher_corpus, update"
        )
    flops = seen.probed.flops / max(seen.probed.arms[0].spent, 1)
    # noise only ever adds, so the trial with the least is the truest
    seconds = min(
        each.seconds["method"] / (each.seconds["verb"] + each.seconds["loss"]) for each in seen.records if each is not seen.probed
    )
    measured = f"outside the verbs: {flops:.1%} of the FLOPs charged (at most {OUTSIDE_FLOPS:.0%})"
    measured += f" and {seconds:.0%} of the verbs' CPU seconds (at most {OUTSIDE_SECONDS:.0%})"
    if flops > OUTSIDE_FLOPS:
        return verdict(False, measured, "compute with the models through bench.sample, bench.teacher, bench.judge and bench.update alone")
    if seconds > OUTSIDE_SECONDS:
        return verdict(False, measured, "move the work into a verb, or make it cheaper: what step does by itself is not charged")
    return verdict(True, f"every step charged; {measured}")


def spends_its_budget(seen: Evidence) -> Verdict:
    """The budget is not passed, and met within one per cent, or within one unit where that is more."""
    arm, verdict = seen.alone.arms[0], partial(Verdict, Property.BUDGET)
    share, allowed = arm.spent / arm.limit, max((1 - SPENT) * arm.limit, arm.unit)
    if seen.idle:
        return verdict(None, "not judged: a step that charged nothing ended the run")
    reach = "1 %" if arm.unit <= (1 - SPENT) * arm.limit else f"one unit, {arm.unit / arm.limit:.1%}"
    if arm.spent > arm.limit:
        return verdict(False, f"spent {share:.1%} of its budget", "use the verbs alone; they refuse what does not fit")
    if arm.limit - arm.spent > allowed:
        mend = "follow bench.batch, not config.batch: the last steps are cut to fit"
        return verdict(False, f"ended at {share:.1%} of its budget, more than {reach} below it", mend)
    return verdict(True, f"ended at {share:.1%} of its budget, within {reach}")


def deterministic_per_seed(seen: Evidence) -> Verdict:
    """One seed twice gives the same weights and charges; another seed trains on other prompts."""
    verdict = partial(Verdict, Property.DETERMINISTIC)
    if not seen.deterministic:
        mend = "draw from a random.Random or torch.Generator that is seeded in __init__ and kept on self"
        return verdict(False, f"the same seed, twice, gave other {_difference(seen.alone.arms[0], seen.again.arms[0])}", mend)
    if seen.after_others.arms[0].prompts == seen.alone.arms[0].prompts:
        return verdict(False, "two seeds trained on the same prompts", "take prompts from bench.prompts or bench.teacher_corpus")
    return verdict(True, "the same seed gave the same weights and charges, another seed other prompts")


def keeps_no_state(seen: Evidence) -> Verdict:
    """An arm is the same in a fresh process, and where another seed's and itself were killed before it."""
    verdict, arm = partial(Verdict, Property.STATELESS), seen.after_others.arms[-1]
    if not seen.deterministic:
        return verdict(None, "not judged: the method is not deterministic")
    if arm != seen.alone.arms[0]:
        mend = "keep state on self, never on the class or the module: arms share a process and may be begun again"
        return verdict(False, f"run after other arms it came to other {_difference(seen.alone.arms[0], arm)} than in a fresh process", mend)
    return verdict(True, "the same after an arm of another seed and a killed one of its own as in a fresh process")


def sees_only_the_bench(seen: Evidence) -> Verdict:
    """No files, processes, network, foreign modules, nor anything of the bench that is not public."""
    if found := seen.noted("trespasses"):
        mend = "use bench.batch, bench.seed and the six verbs, and compute nothing from anything else"
        return Verdict(Property.BLIND, False, "the method " + ", ".join(found[:SHOWN]) + (" …" if found[SHOWN:] else ""), mend)
    return Verdict(Property.BLIND, True, "no file, process, module or part of the bench was touched that a method is not given")


def masks_and_eos(seen: Evidence) -> Verdict:
    """Updates take whole responses as handed out, once each; a loss is a function of each position alone and ignores no EOS."""
    verdict, probed = partial(Verdict, Property.ALIGNED), seen.probed
    if probed.watch["complaints"]:
        mend = "give bench.update whole rows as the verbs returned them, and let the loss treat every position alike and by itself"
        return verdict(False, probed.watch["complaints"][0], mend)
    if not probed.ends:
        return verdict(None, "not judged: no update with an EOS in it was seen")
    return verdict(True, f"{probed.updates} updates took whole responses, and the loss each position by itself, {probed.ends} EOS included")


def traceable(seen: Evidence) -> Verdict:
    """No step costs more than its trace, and another trace before each step changes nothing."""
    verdict, retraced = partial(Verdict, Property.TRACEABLE), seen.retraced
    mend = "let a step's verbs depend on state on self and on bench.batch, not on what the sequences say"
    if retraced.watch["outgrown"]:
        return verdict(False, retraced.watch["outgrown"][0], mend)
    if any(arm.refused for each in seen.records for arm in each.arms):
        return verdict(False, "a verb did not fit into the budget though its step's trace did", mend)
    if not seen.deterministic:
        return verdict(None, "not judged: the method is not deterministic")
    if retraced.arms[0] != seen.alone.arms[0]:
        mend = "keep state on self, where a trace works on a copy: not on the class, in the module or in torch's global generator"
        return verdict(
            False, f"traced once more before every step it came to other {_difference(retraced.arms[0], seen.alone.arms[0])}", mend
        )
    return verdict(True, "no step cost more than its trace, and tracing it once more changed nothing")


PROPERTIES: dict[Property, Callable[[Evidence], Verdict]] = {
    Property.CHARGES: charges_everything,
    Property.BUDGET: spends_its_budget,
    Property.DETERMINISTIC: deterministic_per_seed,
    Property.STATELESS: keeps_no_state,
    Property.BLIND: sees_only_the_bench,
    Property.ALIGNED: masks_and_eos,
    Property.TRACEABLE: traceable,
}


def _difference(one: Arm, other: Arm) -> str:
    return "charges" if one.charges != other.charges else "weights" if one.weights != other.weights else "prompts"


def options_in(config: Path, name: str) -> dict:
    """The options of ``name`` in a comparison's YAML, less what it takes from a tier; UserError if there are none."""
    methods = read_yaml(config).get("methods")
    if not isinstance(methods, dict) or name not in methods:
        raise UserError(f"{config} has no {name!r} under methods{did_you_mean(name, methods) if isinstance(methods, dict) else ''}")
    return {option: value for option, value in (methods[name] or {}).items() if option != "like"}


def check(name: str, options: dict) -> Report:
    """Run the method ``name`` and judge every property. ``options`` are as in a comparison: ``method`` among them names another one.

    UserError if it cannot be found or built, RunError if it raises.
    """
    options = dict(options)
    method = str(options.pop("method", name))
    method = str(Path(method).resolve() if method.endswith(".py") else shipped().get(method, method))
    trial = partial(Trial, method, tuple(options.items()))
    trials = [trial(), trial(), trial(arms=((0, KILLED_AFTER), (1, KILLED_AFTER), (1, 0))), trial(retracing=True), trial(probing=True)]
    # each in a process that has our imports and nothing else: forked from a server that did nothing but import them
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        try:
            seen = Evidence(*pool.map(record, trials))
        except BrokenProcessPool:
            raise RunError(f"the process that ran {name} died, or was ended after {PATIENCE_S} s") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return Report(Path(name).stem if name.endswith(".py") else name, [judge(seen) for judge in PROPERTIES.values()])


SIGN = {True: "✓", False: "✗", None: "–"}


def text(report: Report) -> str:
    """A line per property, with what to do under those that do not hold."""
    lines = [f"{report.method}: {'fair' if report.fair else 'not fair'}"]
    for verdict in report.verdicts:
        lines.append(f"  {SIGN[verdict.held]} {verdict.property:<24} {verdict.why}")
        lines += [f"    {'':<24} → {verdict.mend}"] if verdict.mend else []
    return "\n".join(lines)


def table(reports: list[Report]) -> str:
    """Methods × properties in Markdown."""
    rows = [["method", *Property], ["---"] * (len(Property) + 1)]
    rows += [[report.method, *(SIGN[verdict.held] for verdict in report.verdicts)] for report in reports]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

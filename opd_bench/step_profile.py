"""`opd-bench profile`: where the time and memory of a method's steps go, and which setting moves the largest part.

The steps are those of an arm: its engine, bench and training loop, on its number of threads, with nothing else beside it. FLOPs are the
analytic ones (`flops.py`) of what a part has to compute: no padding, the output head where a distribution is needed.

A part's share of the peak is its FLOPs per second over those of a large matrix product in its precision on as many threads.
"""

from __future__ import annotations

import copy
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from opd_bench import arm, backends, clock, compare
from opd_bench.advice import Row, Setup, bottleneck, group, percent
from opd_bench.bench import Judgement, Updated
from opd_bench.clock import Heard
from opd_bench.config import Config
from opd_bench.engine import TorchEngine
from opd_bench.errors import UserError
from opd_bench.flops import FlopCount
from opd_bench.judge_model import LocalJudge
from opd_bench.losses import Loss
from opd_bench.methods import Method
from opd_bench.plan import Job, jobs
from opd_bench.rollouts import ROWS
from opd_bench.sequences import Prompts, Sequences
from opd_bench.stages import Pipeline
from opd_bench.trace import full_batch, worst_case
from opd_bench.train import Progress, train

VERSIONS = ("opd-bench", "torch", "transformers")
PEAK_S = 0.5  # how long a matrix product is tried, before the steps and after them
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}
TEXT, HARNESS = "teacher text", "harness"
# Rows of the table, and what every step might have.
PARTS = ("weight sync", "prefill", "decode", "generate", TEXT, "judge", "teacher", "forward", "loss", "backward", "optimiser", HARNESS)
WITHIN = ("", ", weight sync", ", prefill", ", decode")
WRITING = {"prefill", "decode", "generate"}  # of rollouts, which may be in another precision
RUNNING = 0.9  # of the time; a thread that runs less waits for others' programs


@dataclass
class Work:
    """Of a part: tokens that went through it and FLOPs they need; None where these are spent elsewhere."""

    tokens: int = 0
    flops: int | None = 0

    def add(self, tokens: int, flops: int | None) -> None:
        self.tokens += tokens
        self.flops = None if flops is None or self.flops is None else self.flops + flops


@dataclass(frozen=True)
class Step:
    """A step's wall seconds, what the clock heard of them, and the work by part."""

    seconds: float
    heard: dict[str, Heard]
    work: dict[str, Work]
    text_s: float = 0.0  # charged for teacher text, whenever that was sampled
    running_s: float = 0.0  # that the thread which marks the parts was on a core


@dataclass(frozen=True)
class Profile:
    method: str
    rows: list[Row]
    seconds: list[float]  # of each step counted
    peak_flops_per_s: float  # in the models' precision
    running: float  # share of the time
    setup: Setup
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def step_s(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def absent(self) -> list[str]:
        """Parts that these steps don't have; "generate" is vLLM's prefill and decode in one."""
        here = {group(row.part) for row in self.rows}
        other = {"prefill", "decode"} if "generate" in here else {"generate"}
        return [part for part in PARTS if part not in here | other]

    def to_json(self) -> dict[str, Any]:
        def described(row: Row) -> dict[str, Any]:
            rates = {"tokens_per_s": row.tokens_per_s, "flops_per_s": row.flops_per_s, "share_of_peak": row.share_of_peak}
            return {**asdict(row), **rates}

        return {
            "schema": "opd-bench/profile/1",
            "method": self.method,
            **self.about,
            "setup": asdict(self.setup),
            "seconds_per_step": self.step_s,
            "steps": self.seconds,
            "peak_flops_per_s": self.peak_flops_per_s,
            "running": self.running,
            "parts": list(map(described, self.rows)),
            "absent": self.absent,
            "bottleneck": bottleneck(self.rows, self.setup),
        }


def profile(config: Config, method: str | None, steps: int, console: Console) -> Profile:
    """``steps`` steps of ``method`` after one that is not counted; by default of the configuration's first that samples from the student.

    UserError for an unknown method and whatever else `compare` would refuse; RunError where a step fails.
    """
    with console.status("loading models and tasks") as status, _threads(config.threads):
        job, shop = _chosen(config, method)
        built = _single(job)
        limit = float("inf")  # no budget cuts a step short
        with compare.step_errors(job):
            worst_case(built, full_batch(built), shop.counter)
        prompts = [ids for _, ids in shop.encoded]
        backends.check_sampler(config, shop.pair, prompts, shop.longest, workers=1)
        backends.check_teacher(config, shop.pair, prompts, shop.longest)
        model = shop.pair.student
        writes = model.dtype if config.rollouts.by == "server" else getattr(torch, config.rollouts.dtype)
        status.update("measuring the machine's matrix products")
        peaks = {dtype: matrix_product_rate(model.device, dtype) for dtype in {model.dtype, writes}}
        with tempfile.TemporaryDirectory() as folder:
            student = copy.deepcopy(shop.pairs[job.start].student)
            engine: Any = _Watched(shop.engine(job, student, built.config.lr, Path(folder) / "corpus"), shop)
            taken = []
            with clock.recording(model.device) as heard:
                begun, ran = time.perf_counter(), time.thread_time()

                def on_step(progress: Progress) -> None:
                    nonlocal begun, ran
                    seconds, running_s = time.perf_counter() - begun, time.thread_time() - ran
                    work, text_s = engine.take()
                    taken.append(Step(seconds, heard.take(), work, text_s, running_s))
                    if len(taken) > steps:
                        raise _EnoughError
                    status.update(f"{job.name}: step {len(taken)} of {steps}")
                    begun, ran = time.perf_counter(), time.thread_time()

                status.update(f"{job.name}: a step to warm up")
                with suppress(_EnoughError):
                    train(built, shop.bench(engine, limit), shop.counter, config.cooldown, on_step)
        status.update("measuring the machine's matrix products")
        peaks = {dtype: max(peak, matrix_product_rate(model.device, dtype)) for dtype, peak in peaks.items()}
        shape = min(full_batch(built), ROWS), model.config.hidden_size, 4 * model.config.hidden_size
        narrow = {dtype: matrix_product_rate(model.device, dtype, shape) for dtype in {writes, torch.bfloat16}}
    peak = peaks[model.dtype]
    with _threads(cores()):
        faster = matrix_product_rate(model.device, model.dtype) / peak if config.threads < cores() else 1.0
    counted = taken[1:]
    work = _work(counted)
    sequences = full_batch(built) * steps
    setup = Setup(
        batch=full_batch(built),
        update_tokens=work.get("forward", Work()).tokens / steps,
        response=work.get("loss", Work()).tokens / sequences,
        max_response=config.max_response,
        check=work.get("judge, decode", Work()).tokens / sequences,
        max_check=config.judge.max_check,
        on_policy=not {"prefill", "generate"}.isdisjoint(work),
        threads=config.threads,
        cores=cores(),
        all_cores=faster,
        bfloat16=narrow[torch.bfloat16] / narrow[writes],
        checkpointing=config.gradient_checkpointing,
        vocabulary=model.config.vocab_size,
        rollouts_by=config.rollouts.by,
        scoring_by=config.scoring.by,
        scoring_top=config.scoring.top,
        options=tuple(type(built.config).model_fields),
    )
    about = {
        "tier": config.tier,
        "config_hash": config.digest,
        "options": built.config.model_dump(mode="json"),
        "models": {
            "student": str(config.students[job.start]),
            "teacher": config.teacher,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        "machine": {"system": platform.system(), "processor": _processor(), "cores": cores()},
        "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
    }
    wall = [step.seconds for step in counted]
    running = sum(step.running_s for step in counted) / sum(wall)
    return Profile(job.name, table(taken[0], counted, peak, peaks[writes]), wall, peak, running, setup, about)


class _EnoughError(Exception):
    """Ends the training loop."""


def _chosen(config: Config, method: str | None) -> tuple[Job, arm.Workshop]:
    """The first arm of the method, and all it shares with others."""
    options = config.methods if method is None else {method: config.methods.get(method, {})}
    planned = jobs(config.model_copy(update={"methods": options, "contrasts": {}}))
    arms = [job for job in planned if job.method and job.seed == config.first_seed and (method or "stages" not in dict(job.options))]
    if not arms:
        raise UserError("all methods of the configuration have stages; name one with --method")
    shop = arm.workshop(config.model_dump_json())
    return next((job for job in arms if method or _samples(job, shop)), arms[0]), shop


def _samples(job: Job, shop: arm.Workshop) -> bool:
    """Whether a step samples from the student."""
    with compare.step_errors(job):
        method = _single(job)
        return "student_sample" in worst_case(method, full_batch(method), shop.counter).by_kind()


def _single(job: Job) -> Method:
    """UserError for a recipe of several stages."""
    method = job.build()
    if isinstance(method, Pipeline):
        raise UserError(f"{job.name} has stages; profile the method of each by itself, with --method")
    return method


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Watched:
    """An engine, and the work that goes through it by part."""

    def __init__(self, engine: TorchEngine, shop: arm.Workshop) -> None:
        self._engine, self._config = engine, shop.config
        self._student = _Cost.of(shop.pair.student, shop.counter.student_flops)
        self._teacher = _Cost.of(shop.pair.teacher, shop.counter.teacher_flops)
        self._work: dict[str, Work] = {}
        self._text_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def take(self) -> tuple[dict[str, Work], float]:
        """The work by part, and the seconds charged for teacher text, since this was last asked."""
        taken = self._work, self._text_s
        self._work, self._text_s = {}, 0.0
        return taken

    def teacher_text(self, rows: Sequence[int]) -> tuple[Sequences, float]:
        texts, seconds = self._engine.teacher_text(rows)
        self._text_s += seconds
        self._add(TEXT, texts.response_tokens, sum(flops for _, flops in self._teacher.sampled(texts.prompt_B, texts.length_B).values()))
        return texts, seconds

    def sample(self, prompts: Prompts, group: int) -> Sequences:
        rollouts = self._engine.sample(prompts, group)
        found = self._student.sampled(rollouts.prompt_B, rollouts.length_B)
        if self._config.rollouts.by != "model":
            here = self._config.rollouts.by == "vllm"
            self._add("generate", rollouts.response_tokens, sum(flops for _, flops in found.values()) if here else None)
        else:
            for part, work in found.items():
                self._add(part, *work)
        return rollouts

    def judge(self, sequences: Sequences) -> Judgement:
        judgement, judge = self._engine.judge(sequences), self._engine.judge_model
        read_B, written_B = judgement.usage.read_B, judgement.usage.written_B
        if not isinstance(judge, LocalJudge):
            self._add("judge", judgement.usage.tokens, None)
            return judgement
        for part, work in _Cost.of(judge.model, judge.flops).sampled(read_B, read_B + written_B).items():
            self._add(f"judge, {part}", *work)
        return judgement

    def update(self, sequences: Sequences, loss: Loss, *, teacher: bool, **options: Any) -> Updated:
        length_B, tokens, responses = sequences.length_B, int(sequences.length_B.sum()), sequences.response_tokens
        body, head = self._student.body, self._student.head
        if teacher:
            here = self._config.scoring.by == "model" or (self._config.scoring.by == "cache" and sequences.updates is not None)
            needed = self._teacher.body.score(length_B) + self._teacher.head.forward(responses, 0)
            self._add("teacher", tokens, needed if here else None)
        self._add("forward", tokens, body.score(length_B))
        self._add("loss", responses, head.forward(responses, 0) + head.backward(responses, 0))
        self._add("backward", tokens, body.update(length_B) - body.score(length_B))
        return self._engine.update(sequences, loss, teacher=teacher, **options)

    def _add(self, part: str, tokens: int, flops: int | None) -> None:
        self._work.setdefault(part, Work()).add(tokens, flops)


@dataclass(frozen=True)
class _Cost:
    """A model's FLOPs, its output head apart: that is applied where a distribution is needed, and not at every token."""

    body: FlopCount
    head: FlopCount

    @classmethod
    def of(cls, model: PreTrainedModel, whole: FlopCount) -> _Cost:
        head = model.config.hidden_size * model.config.vocab_size
        return cls(replace(whole, matmul_parameters=whole.matmul_parameters - head), FlopCount(head, 0))

    def sampled(self, prompt_B: torch.Tensor, length_B: torch.Tensor) -> dict[str, tuple[int, int]]:
        """Tokens and FLOPs of prefill and decoding; the last token of a text is not fed back."""
        prompts, fed = int(prompt_B.sum()), int((length_B - prompt_B).sum()) - len(prompt_B)
        plain = replace(self.body, adapter_parameters=0)  # adapters are merged to sample
        prefill = plain.score(prompt_B)
        decode = plain.score(length_B - 1) - prefill
        return {"prefill": (prompts, prefill + self.head.forward(len(prompt_B), 0)), "decode": (fed, decode + self.head.forward(fed, 0))}


def table(warm: Step, steps: Sequence[Step], peak: float, writing: float) -> list[Row]:
    """The mean of ``steps``, a row for each of its parts and one, the last, for the harness: the rest of the wall time.

    Teacher text is sampled in large chunks and kept, so a step's share of it is what is charged, in place of what was sampled in that step.
    ``peak`` and ``writing`` are FLOPs per second of large matrix products, in the models' precision and in that of the rollouts.
    """
    heard = _together([step.heard for step in steps])
    ever = _together([warm.heard, *(step.heard for step in steps)])
    sampled_s = sum(heard.pop(part).seconds for part in list(heard) if group(part) == TEXT)
    charged_s = sum(step.text_s for step in steps)
    wall, count = sum(step.seconds for step in steps) - sampled_s + charged_s, len(steps)
    work = _work(steps)
    if TEXT in work:
        own = [of for part, of in ever.items() if group(part) == TEXT]
        heard[TEXT] = Heard(count, charged_s)
        ever[TEXT] = Heard(peak=max(of.peak for of in own), growth=max(of.growth for of in own))

    def row(part: str, own: Heard) -> Row:
        of = work.get(part)
        tokens, flops = (of.tokens / count, of.flops and of.flops / count) if of else (None, None)
        most = (writing if part in WRITING else peak) if flops else None
        memory = ever[part].peak, ever[part].growth
        return Row(part, own.seconds / count, own.seconds / wall, own.calls / count, tokens, flops, *memory, most)

    known = [f"{part}{within}" for part in PARTS for within in WITHIN]
    rows = [row(part, heard[part]) for part in sorted(heard, key=lambda part: known.index(part) if part in known else len(known))]
    rest = wall - sum(of.seconds for of in heard.values())
    return [*rows, Row(HARNESS, rest / count, rest / wall, 1)]


def _work(steps: Sequence[Step]) -> dict[str, Work]:
    found: dict[str, Work] = {}
    for part, of in (item for step in steps for item in step.work.items()):
        found.setdefault(part, Work()).add(of.tokens, of.flops)
    return found


def _together(heard: Sequence[dict[str, Heard]]) -> dict[str, Heard]:
    found: dict[str, Heard] = {}
    for part, of in (item for step in heard for item in step.items()):
        old = found.get(part, Heard())
        found[part] = Heard(old.calls + of.calls, old.seconds + of.seconds, max(old.peak, of.peak), max(old.growth, of.growth))
    return found


def matrix_product_rate(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] | None = None) -> float:
    """FLOPs per second of a matrix product (rows, inner, columns), by default a large one, on the threads in use: the best of many."""
    rows, inner, columns = shape or (PEAK_SIDE.get(device.type, PEAK_SIDE["cuda"]),) * 3
    one = torch.randn(rows, inner, device=device, dtype=dtype)
    two = torch.randn(columns, inner, device=device, dtype=dtype).T  # as a layer's weights lie
    out, best, begun = torch.empty(rows, columns, device=device, dtype=dtype), float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begun < PEAK_S:
        start = time.perf_counter()
        torch.mm(one, two, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns / best


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """What the processor calls itself, where the system says so."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def show(found: Profile, console: Console) -> None:
    """Print the table, what does not occur, and the sentence."""
    setup, machine, models, versions = found.setup, *(found.about[key] for key in ("machine", "models", "versions"))

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    say(f"{found.method}: {models['student']} learns from {models['teacher']}, {models['dtype']}")
    say(f"{machine['processor']}, {setup.threads} of {setup.cores} cores, torch {versions['torch']}")
    say(f"matrix products reach {found.peak_flops_per_s / 1e9:.3g} GFLOP/s")
    counted, fastest, slowest = len(found.seconds), min(found.seconds), max(found.seconds)
    say(f"{found.step_s:.3g} s per step of {setup.batch} sequences ({counted} steps, {fastest:.3g} to {slowest:.3g} s)")
    view = Table(box=box.SIMPLE_HEAD)
    view.add_column("part")
    for heading in ("s/step", "share", "calls", "tokens", "tokens/s", "GFLOP", "GFLOP/s", "of peak", "peak MiB", "growth MiB"):
        view.add_column(heading, justify="right")
    for row in found.rows:
        view.add_row(
            row.part,
            f"{row.seconds:.4f}",
            f"{row.share:.1%}",
            f"{row.calls:.4g}",
            *(_figure(value) for value in (row.tokens, row.tokens_per_s)),
            *(_figure(value and value / 1e9) for value in (row.flops, row.flops_per_s)),
            percent(row.share_of_peak) if row.share_of_peak else "",
            *("" if value is None else f"{value / 2**20:.0f}" for value in (row.peak_bytes, row.growth_bytes)),
        )
    console.print(view)
    if found.absent:
        say(f"Not in these steps: {', '.join(found.absent)}.")
    if found.running < RUNNING and "server" not in (setup.rollouts_by, setup.scoring_by):
        say(f"The program had a core {found.running:.0%} of the time only: close others, or read shares and not seconds.")
    sentence = bottleneck(found.rows, setup)
    say(f"{sentence[0].upper()}{sentence[1:]}.")


def _figure(value: float | None) -> str:
    """Three digits; nothing for nothing."""
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

"""`opd-bench audit`: do these checkpoints drift on their own text, from where on, what does it cost, and does the teacher still guide them?

    found = audit(["runs/a", "runs/b"], "runs/teacher", settings, Path("audit"), console)
    found.words["a"]  # the answers in plain words

Nothing is trained. Every checkpoint is scored on the tasks, greedily, and its rollouts are recorded beside the teacher's, as those of an
arm are; the figures are those of the exposure-bias suite (`suite.py`). One checkpoint is one model: intervals speak of new prompts for this
very model, and a difference between two checkpoints says nothing about the methods that made them.

Where a student has another tokenizer than the teacher, their distributions cannot be compared token by token: it is scored, and the rest is
left out.

Shapes: N items of a task or prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_bench import continuations, evaluate, exposure, models, plan, plots, store, suite
from opd_bench.errors import UserError
from opd_bench.exposure import Recording
from opd_bench.page import html
from opd_bench.report import estimate, markdown_table, number, percent
from opd_bench.statistics import Array, Interval, macro_weights, over_items
from opd_bench.suite import Student

TEACHER = "teacher"


@dataclass(frozen=True)
class Settings:
    """What is asked of every checkpoint; ``prompts`` and ``limit`` are per task."""

    stem: list[str]
    coding: list[str]
    task_path: Path
    prompts: int = 100
    limit: int | None = None
    max_response: int | None = None  # tokens; default: the most that a task generates
    batch_size: int = 100
    seed: int = 0
    chat: bool = False  # every model is asked by the chat template of its own tokenizer
    dtype: Literal["float32", "bfloat16"] = "float32"  # of every model's weights
    remote_code: bool = False  # run what a model's repository brings
    data_dir: Path | None = None  # of copies of hub data sets
    device: str = "cpu"

    def model(self, location: str, tokenizer: PreTrainedTokenizerBase, role: str) -> PreTrainedModel:
        """Loaded and fitted to its tokenizer. UserError if it cannot be."""
        loaded = models.load_model(location, getattr(torch, self.dtype), device=self.device, remote_code=self.remote_code)
        return models.fitting(loaded, tokenizer, role)

    def tokenizer(self, location: str) -> PreTrainedTokenizerBase:
        return models.load_tokenizer(location, remote_code=self.remote_code)


@dataclass(frozen=True)
class Checkpoint:
    """One model on the tasks: greedy item scores (N) and steps (N) by task; ``recording`` is None where it could not be compared."""

    scores: dict[str, Array]
    steps: dict[str, Array]
    recording: Recording | None
    unmeasured: str = ""


@dataclass(frozen=True)
class Audit:
    """``score`` by name, the teacher's among them; ``words`` by student; ``pairs`` compares students item by item."""

    score: dict[str, Interval]
    words: dict[str, list[str]]
    pairs: list[str]
    suite: suite.Suite | None  # None where no student could be compared with the teacher


def names_of(locations: list[str]) -> dict[str, str]:
    """A short name for each location: its last part, or all of it where that is not the only one. UserError for a location given twice."""
    if len(set(locations)) < len(locations):
        raise UserError("a student is named twice; name each once")
    last = [Path(location).name for location in locations]
    return {
        name if last.count(name) == 1 and name != TEACHER else location: location for name, location in zip(last, locations, strict=True)
    }


def audit(students: list[str], teacher: str, settings: Settings, out: Path, console: Console) -> Audit:
    """Measure ``students`` against ``teacher`` and leave audit.json, audit.md, audit.html and figures in ``out``.

    UserError for a model or task that cannot be loaded.
    """
    named = names_of(students)
    tokenizer = settings.tokenizer(teacher)
    chat = tokenizer if settings.chat else None
    tasks = evaluate.load_suite(settings.stem, settings.coding, settings.task_path, chat=chat, data_dir=settings.data_dir)
    evaluate.consent(tasks)
    bench = Bench(tasks, settings, settings.model(teacher, tokenizer, "teacher"), tokenizer, models.weights_digest(teacher), out, console)
    ceiling = bench.measured(TEACHER, teacher)
    if ceiling.recording is None:
        raise UserError(f"the teacher cannot be measured: {ceiling.unmeasured}")
    found = {name: bench.measured(name, location) for name, location in named.items()}
    weights = _weights(tasks)
    score = {name: over_items(of.scores, weights) for name, of in {TEACHER: ceiling, **found}.items()}
    compared = {name: Student([of.recording], _rows(of.scores), of.steps) for name, of in found.items() if of.recording}
    whole = suite.suite(compared, ceiling.recording) if compared else None
    words = {name: _words(name, score, of, whole.students.get(name) if whole else None) for name, of in found.items()}
    result = Audit(score, words, _pairs(found, weights), whole)
    _write(result, list(found), out)
    return result


@dataclass(frozen=True)
class Bench:
    """What all checkpoints are measured with. What was measured lies under ``out`` and is taken from there by the same audit, run again."""

    tasks: evaluate.TaskSuite
    settings: Settings
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher_digest: str
    out: Path
    console: Console

    def measured(self, name: str, location: str) -> Checkpoint:
        """The checkpoint at ``location`` scored and recorded."""
        kept = self.out / "kept" / self._digest(self.teacher_digest)
        folder = kept / (TEACHER if name == TEACHER else self._digest(models.weights_digest(location)))
        model, tokenizer = self.teacher, self.tokenizer
        if name != TEACHER:
            tokenizer = self.settings.tokenizer(location)
            model = self.settings.model(location, tokenizer, "student")
        if not (folder / "items.jsonl").is_file():
            with self.console.status(f"{name}: scoring"):
                tasks = replace(self.tasks, chat=tokenizer) if self.settings.chat else self.tasks
                items = evaluate.evaluate(model, tokenizer, tasks, batch_size=self.settings.batch_size, limit=self.settings.limit)
            store.write_jsonl(folder / "items.jsonl", map(asdict, items))
        rows = store.read_jsonl(folder / "items.jsonl")
        scores, steps = ({task: _column(rows, task, of) for task in self.tasks.tasks} for of in ("score", "steps"))
        said = ", ".join(f"{task} {values.mean():.3f}" for task, values in scores.items())
        self.console.print(f"{name}: {said}", highlight=False, markup=False)
        try:
            models.agree(tokenizer, self.tokenizer)
            if not (folder / "recording.npz").is_file():
                with self.console.status(f"{name}: recording rollouts"):
                    store.save_recording(folder / "recording.npz", self._record(model, kept, None if name != TEACHER else 0))
        except UserError as error:
            return Checkpoint(scores, steps, None, str(error))
        return Checkpoint(scores, steps, store.load_recording(folder / "recording.npz"))

    def _record(self, model: PreTrainedModel, kept: Path, continued: int | None) -> Recording:
        count, most = self.settings.prompts, self.settings.max_response or longest(self.tasks)
        return continuations.record(
            model,
            self.teacher,
            self.tokenizer,
            self.tasks,
            count=count,
            max_response=most,
            seed=self.settings.seed,
            kept=kept,
            continued=continued,
        )

    def _digest(self, weights: str) -> str:
        settings = asdict(self.settings) | plan.code(self.settings.task_path) | {"task_path": "", "data_dir": "", "weights": weights}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def longest(tasks: evaluate.TaskSuite) -> int:
    """The most tokens any of ``tasks`` generates."""
    return max((task.config.generation_kwargs or {}).get("max_gen_toks", 256) for task in tasks.tasks.values())


def _column(rows: list[dict], task: str, of: str) -> Array:
    """N values of a task's items, NaN where there is none."""
    return np.array([np.nan if row[of] is None else row[of] for row in rows if row["task"] == task], float)


def _rows(scores: Mapping[str, Array]) -> dict[str, Array]:
    """One seed: 1N by task."""
    return {task: scores_N[None] for task, scores_N in scores.items()}


def _weights(tasks: evaluate.TaskSuite) -> dict[str, float]:
    groups = ([task for task, group in tasks.groups.items() if group == which] for which in evaluate.GROUPS)
    return macro_weights(*groups)


# ---- in words ---------------------------------------------------------------------------------------------------------------------


def _words(name: str, score: Mapping[str, Interval], of: Checkpoint, figures: suite.Figures | None) -> list[str]:
    """Whether a student drifts, from where, what that explains, and whether the teacher still guides."""
    said = [f"{name} solves {estimate(score[name])}, the teacher {estimate(score[TEACHER])}."]
    if figures is None:
        return [*said, f"Nothing that needs the teacher's distributions could be measured: {of.unmeasured}."]
    excess = figures.gaps["forward_kl"]["zero"]["excess"]
    nats = f"along its own text it is {estimate(excess, 2)} nats further from the teacher than along the teacher's"
    if excess is None or not excess.excludes_zero:
        said.append(f"No drift was seen: R − l·ε is {estimate(excess, 2)} nats, which cannot be told from 0.")
    elif excess.mean < 0:
        said.append(f"It does not drift: R − l·ε is {estimate(excess, 2)} nats, below 0.")
    else:
        place = "" if figures.drifts_from is None else f", clearly so from token {figures.drifts_from} of the response on"
        said.append(f"It drifts: {nats}{place}.{_matched(figures)}")
    said.append(_explained(figures))
    deepest = [(at, pair) for at, pair in figures.usefulness.items() if pair]
    if deepest:
        at, pair = deepest[-1]
        guides = pair.difference.excludes_zero and pair.difference.mean > 0
        there = f"From {float(at):.0%} of its own text the teacher solves {estimate(pair.a)} where it solves {estimate(pair.b)}"
        said.append(f"{there}: the teacher {'still guides' if guides else 'cannot be shown to guide any more'}.")
    return said


def _matched(figures: suite.Figures) -> str:
    """Whether the drift is only a matter of how sharply the student is sampled."""
    if "matched" not in figures.gaps or figures.temperature is None:
        return ""
    excess = figures.gaps["matched"]["zero"]["excess"]
    sampled = f" Sampled as sharply as the teacher, at temperature {figures.temperature:.2f},"
    if excess is None or not excess.excludes_zero:
        return f"{sampled} it shows none ({estimate(excess, 2)} nats): its sharpness is off, not what it knows."
    return f"{sampled} it is {estimate(excess, 2)} nats."


def _explained(figures: suite.Figures) -> str:
    decay = figures.decay
    if decay is None:
        return "The tasks do not say how many steps their problems need, so how much of its failure drift explains is not measured."
    if decay.share is None:
        return "It fails on no longer problem, so there is nothing for drift to explain."
    share = percent(decay.share)
    if not decay.share.excludes_zero or decay.share.mean < 0:
        return f"Its failures on longer problems are what errors that strike every step alike would give (surplus {share} of them)."
    return (
        f"Of its failures on longer problems {share} are more than errors that strike every step alike would give: drift's part, at most."
    )


def _pairs(found: Mapping[str, Checkpoint], weights: Mapping[str, float]) -> list[str]:
    """Every two students, item by item and prompt by prompt."""
    said = []
    for (a, one), (b, other) in combinations(found.items(), 2):
        solved = over_items({task: one.scores[task] - other.scores[task] for task in weights}, weights)
        line = f"{a} − {b}: score {_signed(solved, 3)}"
        if one.recording and other.recording:
            excess_N = [exposure.excess_matrix(of.along["forward_kl"]) for of in (one.recording, other.recording)]
            gap = over_items({"prompts": excess_N[0] - excess_N[1]}, {"prompts": 1.0})
            line += f", R − l·ε {_signed(gap, 2, ' nats')}"
        said.append(line + ".")
    return said


def _signed(value: Interval, digits: int, unit: str = "") -> str:
    """``+.034 [.010, .058]``, and whether it can be told from 0."""
    bounds = "" if value.low is None else f" [{number(value.low, digits)}, {number(value.high, digits)}]"
    return f"{number(value.mean, digits, sign=True)}{unit}{bounds} ({'clear' if value.excludes_zero else 'not clear'})"


# ---- files ------------------------------------------------------------------------------------------------------------------------


def _write(found: Audit, names: list[str], out: Path) -> None:
    with store.disk_errors():
        document = {"schema": "opd-bench/audit/1", **asdict(found)}
        store.write_text(out / "audit.json", suite.as_json(document))
        figures = plots.draw_exposure(found.suite, names, out) if found.suite else []
        text = markdown(found, [path.name for path in figures])
        store.write_text(out / "audit.md", text)
        store.write_text(out / "audit.html", html(text, "opd-bench audit", out))


def markdown(found: Audit, figures: list[str]) -> str:
    """The audit on one page: answers first, then figures, then the tables they come from."""
    parts = ["# Exposure-bias audit"]
    for name, words in found.words.items():
        parts += [f"## {name}", "\n".join(f"- {line}" for line in words)]
    if found.pairs:
        parts += ["## Compared", "\n".join(f"- {line}" for line in found.pairs), "Intervals speak of new items for these very checkpoints."]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures]
    parts += ["## Scores", "\n".join(markdown_table(["model", "greedy"], [[name, estimate(of)] for name, of in found.score.items()]))]
    if found.suite:
        parts.append(suite.markdown(found.suite).replace("\n## ", "\n### ").replace("# Exposure bias", "## Figures", 1))
    return "\n\n".join(parts).rstrip() + "\n"

"""From a configuration to the jobs that carry it out, each with an id of all that determines its result.

The id covers configuration, method and its source, seed, weights, tasks, and the source of the modules that compute a
result, but not the commit: an edit to the report does not throw away a day of training.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from opd_bench import stages, standard, training_prompts
from opd_bench.config import Config, determining
from opd_bench.errors import UserError
from opd_bench.methods import label
from opd_bench.models import weights_digest
from opd_bench.resources import PACKAGE

MODULES = (
    *(
        "arm",
        "backends",
        "behind",
        "bench",
        "checkpointing",
        "code_eval",
        "continuations",
        "decoder",
        "engine",
        "evaluate",
        "flops",
        "judge",
        "judge_endpoint",
        "judge_model",
        "judge_solver",
        "judge_verifier",
        "ledger",
        "lora",
        "losses",
        "measure",
        "methods",
        "mismatch",
        "models",
        "privilege",
        "prompts",
        "provision",
        "retention",
        "rollouts",
        "scoring",
        "stages",
    ),
    *("sandbox", "sandbox_worker", "sequences", "standard", "teacher_cache", "teacher_server", "teachers", "trace", "train"),
    *("training_prompts", "vllm_sampler", "vllm_server", "vllm_server_sampler", "vllm_worker"),
)
TEACHER, COLD_START = "teacher", "cold_start"


@dataclass(frozen=True)
class Job:
    """One arm (a method and a seed), or a reference that is only evaluated: the teacher, or a cold start."""

    name: str
    seed: int  # of a cold start: its place among the students
    start: int  # the student it begins from, or is
    method: str | None  # None for a reference
    options: tuple[tuple[str, object], ...]
    run_id: str

    @property
    def label(self) -> str:
        if self.method:
            return f"{self.name} seed {self.seed}"
        return self.name if self.name == TEACHER else f"cold start {self.start}"

    def folder(self, out: Path) -> Path:
        if self.method:
            return out / "arms" / self.name / f"seed-{self.seed}"
        return out / "arms" / (f"_{self.name}" if self.name == TEACHER else f"_{self.name}-{self.start}")

    def build(self) -> stages.Recipe:
        assert self.method
        return stages.build(self.method, dict(self.options))


def code(task_path: Path) -> dict[str, str]:
    """Hashes of the modules and of the tasks that determine what is measured."""
    return {
        "modules": digest_files([*(PACKAGE / f"{name}.py" for name in MODULES), standard.FILE]),
        "tasks": digest_files([path for path in task_path.rglob("*") if path.suffix in (".py", ".yaml")]),
    }


def digest_files(paths: list[Path]) -> str:
    """Of the files' names and contents."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def selected(config: Config) -> dict[str, tuple[str, dict]]:
    """Of every arm's name the method and its options. UserError for an unknown method, a bad method file, or bad options."""
    found: dict[str, tuple[str, dict]] = {}
    for name, options in config.methods.items():
        options = dict(options)
        method = options.pop("method", name)
        if label(name) in (*found, TEACHER, COLD_START):
            raise UserError(f"two arms are called {label(name)!r}; rename one")
        stages.build(method, options)
        found[label(name)] = method, options
    return found


def jobs(config: Config) -> list[Job]:
    """References first, then the arms, one method after the other: arms of a seed share teacher text already sampled.

    Raises UserError for an unknown method, a bad method file, or bad options.
    """
    if not config.task_path.is_dir():
        raise UserError(f"no task folder {config.task_path}")
    common = {
        "config": determining(
            config.model_dump(exclude={"tier", "seeds", "first_seed", "methods", "students", "prompts", "gates", "contrasts", "notes"})
        ),
        "teacher": weights_digest(config.location(config.teacher)),
        **({"teachers": {of: weights_digest(config.location(name)) for of, name in config.teachers.items()}} if config.teachers else {}),
        "prompts": training_prompts.load(config.prompt_sources).digest if config.prompts else None,
        **code(config.task_path),
    }

    students = [weights_digest(config.location(student)) for student in config.students]

    def job(name: str, seed: int, method: str | None, options: dict) -> Job:
        start = seed % len(students)
        source = stages.digest(method, options) if method else None
        own = {"name": name, "seed": seed, "student": students[start], "options": options, "source": source}
        identity = json.dumps({**common, **own}, sort_keys=True, default=str)
        return Job(name, seed, start, method, tuple(sorted(options.items())), hashlib.sha256(identity.encode()).hexdigest()[:16])

    seeds = range(config.first_seed, config.first_seed + config.seeds)
    used = range(max(seed % len(students) for seed in seeds) + 1)
    planned = [job(TEACHER, 0, None, {}), *(job(COLD_START, number, None, {}) for number in used)]
    for name, (method, options) in selected(config).items():
        planned += [job(name, seed, method, options) for seed in seeds]
    return planned


def describe(job: Job) -> dict:
    """The job as it stands in the manifest."""
    return {**asdict(job), "options": dict(job.options)}

"""Standard tasks by name: what each counts for, the settings and packages it needs, and presets of several.

    grouped(["gsm8k_cot", "retention", "held_out=my_task"])
    # {"stem": ["gsm8k_cot"], "coding": [], "held_out": ["my_task"], "retention": ["arc_challenge", "sciq", "hellaswag"], "robustness": []}

The catalogue is data, ``standard_tasks.yaml``; the tasks themselves are lm-eval's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from opd_bench.errors import UserError, did_you_mean
from opd_bench.resources import PACKAGE

GROUPS = ("stem", "coding")  # they make the score
BESIDE = ("held_out", "retention", "robustness")  # shown with their label; they count for no score and are never rolled out or trained on
FILE = PACKAGE / "standard_tasks.yaml"


@dataclass(frozen=True)
class Standard:
    """One task, or group of tasks, of lm-eval; a setting that is None is lm-eval's own."""

    group: str
    folder: str  # of its definition, below lm-eval's tasks
    data: str  # the hub data set that it reads
    gated: bool = False  # whose licence has to be accepted
    extra: str | None = None  # of lm-eval's optional packages
    nltk: str | None = None  # a resource of nltk that its scorer reads
    runs_code: bool = False  # generated programs; through `code_eval`, that is, in our sandbox
    num_fewshot: int | None = None
    max_gen_toks: int | None = None
    filter: str | None = None
    metric: str | None = None


_document = yaml.safe_load(FILE.read_text(encoding="utf-8"))
TASKS = {name: Standard(**entry) for name, entry in _document["tasks"].items()}
PRESETS: dict[str, list[str]] = _document["presets"]


def grouped(words: Sequence[str], default: str | None = None) -> dict[str, list[str]]:
    """Tasks by group: each word is a preset, a task of the catalogue, or ``group=task`` for any task; others count for ``default``.

    UserError for an unknown group or, without a default, an unknown task.
    """
    found: dict[str, list[str]] = {group: [] for group in (*GROUPS, *BESIDE)}
    for word in words:
        given, equals, name = word.rpartition("=")
        if equals and given not in found:
            raise UserError(f"{word}: there is no group {given!r}{did_you_mean(given, found)}")
        for task in [name] if equals else PRESETS.get(name, [name]):
            group = given or (TASKS[task].group if task in TASKS else default)
            if group is None:
                known = did_you_mean(task, [*TASKS, *PRESETS])
                raise UserError(f"{task!r} is no standard task{known}; for another say what it counts for, such as stem={task}")
            if task not in found[group]:
                found[group].append(task)
    return found

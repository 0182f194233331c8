"""What is published, ``leaderboard.json``: who is ranked where, by how much, how sure, and how much of it is exposure bias.

    write(board, folder / "leaderboard.json")  # validated against leaderboard.schema.json
    board = read(folder / "leaderboard.json")

It is put together by `assemble.py` and made readable by `report.py`. After an edit of the models,
``python -m opd_bench.leaderboard`` writes the shipped schema anew.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from opd_bench import judge_audit
from opd_bench.errors import UserError
from opd_bench.standard import BESIDE

SCHEMA_FILE = Path(__file__).with_name("leaderboard.schema.json")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]  # None where undefined


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, from_attributes=True)


class Estimate(_Model):
    """A mean with its 95 % interval; null where undefined (an interval over one seed)."""

    mean: Number
    low: Number
    high: Number


class Exposure(_Model):
    """R, l·ε and R − l·ε in nats and ExAccErr in percent (Arora et al. 2022), null where it is 0/0; see opd_bench.exposure."""

    regret: Estimate
    per_step: Estimate
    excess: Estimate
    exaccerr: Estimate | None


class Retention(_Model):
    """On general text that the cold start wrote, per token: KL from it in nats, and how much likelier its answers became."""

    kl: Estimate
    gain: Estimate


class Reference(_Model):
    """The teacher, or the mean of the cold starts; ``exposure`` and ``retention`` are null where not measured or undefined."""

    score: Estimate
    sampled: Estimate
    stem: Estimate | None
    coding: Estimate | None
    held_out: dict[str, Estimate]  # by task: all that count for no score
    exposure: Exposure | None
    retention: Retention | None


class Spent(_Model):
    """Mean per arm: share of the budget; FLOPs, tokens and seconds by kind of charge."""

    share: float
    flops: dict[str, int]
    tokens: dict[str, int]
    seconds: dict[str, float]


class CurvePoint(_Model):
    """A method at a share of the budget, after a cooldown of its own."""

    share: float
    score: Estimate
    exposure: Exposure


class Method(Reference):
    """One method over all its seeds; ``rank`` is null where a gate withholds it.

    ``recovered`` is the share of the gap between its cold starts and the teacher, null where that is not clearly above zero.
    """

    name: str
    version: str | None
    rank: int | None
    score_by_seed: list[float]
    recovered: Estimate | None
    curve: list[CurvePoint]
    spent: Spent
    wall_s: float
    saw: list[str]
    judge_auroc: Number
    judge: judge_audit.Audit | None = None


class Tested(_Model):
    """A difference; claimed iff p after Holm is below .05 (the interval then excludes 0) and no gate withholds one of its methods."""

    difference: Number
    low: Number
    high: Number
    p: float
    p_holm: float
    claimed: bool
    by_start: list[Number]  # the difference from each cold start


class Claim(Tested):
    """The difference a − b."""

    a: str
    b: str
    family: Literal["score", "excess"]


class Contrast(Tested):
    """Σ weight · score."""

    name: str
    weights: dict[str, float]  # by method; they sum to 0
    family: Literal["score", "sampled", "excess"]


class Gate(_Model):
    """What must hold before a rank is given; null where it could not be measured or was switched off. See opd_bench.gates."""

    name: str
    held: bool | None
    said: str
    methods: list[str]  # whose ranks and claims it withholds when it fails


class Reading(_Model):
    """The methods at the largest cost that all arms reached in another ledger; see opd_bench.readings."""

    ledger: str
    question: str
    unit: str
    cost: Number
    score: dict[str, Number]
    score_by_seed: dict[str, list[Number]]
    order: list[str]
    turned: list[tuple[str, str]]  # ahead by the budget's ledger, behind by this one


class Crossing(_Model):
    """Where the method ahead at the whole budget overtakes the other for good; see opd_bench.curves."""

    a: str
    b: str
    budget: Number
    low: Number
    high: Number
    a_ahead: bool | None


class Profile(_Model):
    """Share of the workloads (tasks × targets) that each method solves within τ times the best method's budget (AlgoPerf).

    ``times`` are the budgets at which the median seed reaches each target, by method and task; null for a miss.
    """

    targets: dict[str, list[float]]  # scores, by task
    times: dict[str, dict[str, list[Number]]]
    tau: list[float]
    solved: dict[str, list[float]]


class Budget(_Model):
    axis: str
    limit: float


class Tasks(_Model):
    stem: list[str]
    coding: list[str]
    held_out: list[str]
    retention: list[str] = []
    robustness: list[str] = []

    @property
    def beside(self) -> dict[str, str]:
        """The group of each task that counts for no score."""
        return {task: group for group in BESIDE for task in getattr(self, group)}


class Leaderboard(_Model):
    schema_: Literal["opd-bench/leaderboard/1"] = Field(alias="schema")
    tier: str
    command: str
    commit: str
    models: dict[Literal["student", "teacher"], list[str]]  # what each is called, with what it says of its weights
    budget: Budget
    seeds: list[int]
    tasks: Tasks
    teacher: Reference
    cold_start: Reference
    methods: list[Method]
    gates: list[Gate]
    claims: list[Claim]
    contrasts: list[Contrast]
    readings: list[Reading]
    crossings: list[Crossing]
    profile: Profile | None
    notes: list[str]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a leaderboard; the package ships it as leaderboard.schema.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Leaderboard.model_json_schema(mode="serialization")}


def _not_a_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check(document: Any, path: Path) -> None:
    validator = Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    error = best_match(validator.iter_errors(document))
    if error:
        raise UserError(
            f"{path} is no leaderboard of this version: {error.message} at {error.json_path}; run the command again to rebuild it"
        )


def write(board: Leaderboard, path: Path) -> None:
    """Write ``board`` as JSON; UserError if it does not fit the shipped schema."""
    document = board.model_dump(mode="json", by_alias=True)
    _check(document, path)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read(path: Path) -> Leaderboard:
    """The leaderboard in ``path``; UserError if it is missing, not JSON or does not fit the shipped schema."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_a_number)
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; run the benchmark first") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); run the command again to rebuild it") from error
    _check(document, path)
    return Leaderboard.model_validate(document)


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")

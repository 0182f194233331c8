"""Recipes of several stages, such as SFT and then OPD: methods one after the other, each for its share of one budget.

    sft:0.3+opd:0.7                                 # on the command line, each with the options it has in the configuration

    methods:                                        # in a configuration
      sft_opd:
        stages:
          - {method: sft, share: 0.3, lr: 5.0e-4, mix: {opd_bench_arithmetic: 1}}
          - {method: opd, share: 0.7}

Student, optimiser and the learning rate's one cooldown go on from stage to stage. A stage whose next step does not fit its share any more
leaves the rest to the next. ``mix`` says from which sources its prompts come and in which proportion; by default from all, as they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opd_bench.errors import UserError, did_you_mean
from opd_bench.methods import Method, describe, find, label
from opd_bench.sequences import Mix
from opd_bench.statistics import ROUNDING

WRITTEN = re.compile(r".+:[\d.eE-]+")  # METHOD:SHARE


@dataclass(frozen=True)
class Stage:
    """``method`` until the share ``until`` of the whole budget is spent."""

    method: Method
    share: float = 1.0
    until: float = 1.0
    mix: Mix = ()


@dataclass(frozen=True)
class Pipeline:
    """Two stages or more, or one with a mix of its own. Where a stage ends depends on the whole budget, so each budget is trained for."""

    stages: tuple[Stage, ...]
    own_schedule: bool = True


Recipe = Method | Pipeline


class _Settings(BaseModel):
    """A stage as it is written; what else stands there are options of its method."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str
    share: float = Field(gt=0, le=1)
    mix: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    return recipe.stages if isinstance(recipe, Pipeline) else (Stage(recipe),)


def peak_lr(recipe: Recipe) -> float:
    """The largest learning rate of a stage: the optimiser's, of which the others take a share."""
    return max(stage.method.config.lr for stage in stages_of(recipe))


def written(name: str) -> tuple[str, dict[str, Any]] | None:
    """What ``sft:0.3+opd:0.7`` stands for: the arms' label, and its stages; None for any other name."""
    parts = name.split("+")
    if not all(WRITTEN.fullmatch(part) for part in parts):
        return None
    try:
        stages = [{"method": method, "share": float(share)} for method, _, share in (part.rpartition(":") for part in parts)]
    except ValueError:
        raise UserError(f"{name}: write METHOD:SHARE for each stage, such as sft:0.3+opd:0.7") from None
    return "+".join(f"{label(stage['method'])}:{stage['share']:g}" for stage in stages), {"stages": stages}


def build(method: str, options: Mapping[str, Any]) -> Recipe:
    """The method with ``options``, or the pipeline that their ``stages`` say. UserError for what they must not say."""
    return find(method).build(dict(options)) if "stages" not in options else _pipeline(method, options)


def digest(method: str, options: Mapping[str, Any]) -> str:
    """Hash of the source of all methods that the recipe is made of."""
    if "stages" not in options:
        return find(method).digest
    found = [find(stage.method).digest for stage in _settings(method, options)]
    return hashlib.sha256("".join(found).encode()).hexdigest()[:16]


def _settings(name: str, options: Mapping[str, Any]) -> list[_Settings]:
    stages, others = options["stages"], [option for option in options if option != "stages"]
    if others:
        raise UserError(f"{name}: {others[0]!r} stands beside its stages; write it into each stage that it is for")
    if not (isinstance(stages, list) and stages and all(isinstance(stage, dict) for stage in stages)):
        raise UserError(f"{name}: stages must be a list, each of them with method and share")
    try:
        found = [_Settings(**stage) for stage in stages]
    except ValidationError as error:
        raise UserError(f"{name}: a stage's {describe(error, _Settings)}") from None
    if abs((total := sum(stage.share for stage in found)) - 1) > len(found) * ROUNDING:
        raise UserError(f"the shares of {name} sum to {total:g}; they must sum to 1")
    return found


def _pipeline(name: str, options: Mapping[str, Any]) -> Pipeline:
    settings = _settings(name, options)
    ends = [*list(accumulate(stage.share for stage in settings))[:-1], 1.0]
    methods = [find(stage.method).build(dict(stage.model_extra or {})) for stage in settings]
    return Pipeline(
        tuple(
            Stage(method, stage.share, end, tuple(sorted(stage.mix.items())))
            for method, stage, end in zip(methods, settings, ends, strict=True)
        )
    )


def check_mix(recipe: Recipe, known: list[str]) -> None:
    """UserError for a mix that names what is no source of prompts."""
    for stage in stages_of(recipe):
        if unknown := next((name for name, _ in stage.mix if name not in known), None):
            raise UserError(f"mix: there are no prompts of {unknown!r}{did_you_mean(unknown, known)}")

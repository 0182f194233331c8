"""The configuration of a comparison: a tier's YAML, then the user's, then the command line, each laid over the last.

config = load("embedded", overlays=[{"seeds": 2}])

below, above = selection("factorial")  # a design's settings, and its methods, contrasts and notes
config = load("embedded", overlays=[below, {"seeds": 12}, above])
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from string import Formatter
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from opd_bench.errors import UserError, did_you_mean
from opd_bench.gates import Limits
from opd_bench.gpus import Gpu
from opd_bench.hub import Source, cache_folder, locate, unpinned
from opd_bench.ledger import STUDENT_TOKENS, TEACHER_TOKENS, Axis, Dollars, Seconds, Tokens
from opd_bench.methods import Method, describe, designs, label
from opd_bench.resources import SIZES, TASKS, TIERS
from opd_bench.settings import (
    Budget,
    Build,
    Evaluation,
    Exposure,
    Judging,
    Lora,
    PromptSource,
    Retention,
    Rollouts,
    Scoring,
    Section,
    Tasks,
    Weight,
)
from opd_bench.stages import written
from opd_bench.statistics import ROUNDING

IDLE = ("log", "gpu")  # keys that bear on no result
PACE = ("most_dollars", "per_minute", "concurrency", "timeout_s")  # of an endpoint: they bear on no result


class Config(Section):
    tier: str
    students: list[str] = Field(min_length=1, description="cold starts of one architecture; seed k begins from the (k mod their number)-th")
    teacher: str
    tasks: Tasks
    teachers: dict[str, str] = Field(
        {}, description="specialists in the place of the teacher, by group (stem, coding), task, or source of prompts"
    )
    prompts: list[PromptSource] = Field([], description="what is trained on; default: the training splits of the tasks that count")
    privileged: str | None = Field(
        None,
        description="what the teacher is shown in place of a question: text with {prompt} and columns of its document, {solution}",
    )
    chat: bool = Field(False, description="put prompts to the models as a user's message, by the chat template of their tokenizer")
    eos: str | None = Field(None, description="token that ends texts of student and teacher; default: their tokenizers', which must agree")
    build: Build | None = None
    seeds: int = Field(8, ge=1)
    first_seed: int = Field(0, ge=0, description="tuning takes seeds that no leaderboard has")
    budget: Budget
    device: str = Field(
        "cpu", description="where models train and are measured, by torch's name of it: cpu, cuda; on another, last bits of results differ"
    )
    threads: int = Field(1, ge=1, description="CPU threads of an arm; another number may change the last bits of a result")
    trust_remote_code: bool = Field(False, description="run the code that a model's repository brings; read it first")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the teacher's weights, and of the student's when it is scored; bfloat16: of its products in training, too",
    )
    lora: Lora | None = Field(None, description="train low-rank adapters alone; default: all weights")
    gradient_checkpointing: bool = Field(False, description="less memory for a second forward pass of the layers, which is charged")
    cooldown: float = Field(0.3, ge=0, le=1, description="last share of the budget over which the learning rate falls to 0")
    max_response: int = Field(ge=1, description="tokens of a rollout")
    rollouts: Rollouts = Rollouts()  # pyright: ignore[reportCallIssue]
    scoring: Scoring = Scoring()  # pyright: ignore[reportCallIssue]
    judge: Judging
    evaluation: Evaluation = Evaluation()  # pyright: ignore[reportCallIssue]
    exposure: Exposure = Exposure()  # pyright: ignore[reportCallIssue]
    retention: Retention = Retention()  # pyright: ignore[reportCallIssue]
    gates: Limits = Limits()  # pyright: ignore[reportCallIssue]
    methods: dict[str, dict[str, Any]] = Field(min_length=1, description="name: options; `method` among them names another method or file")
    contrasts: dict[str, dict[str, Weight]] = Field({}, description="name: weight by method; a sum of methods that is tested like a pair")
    notes: list[str] = Field([], description="what the report must say of this comparison")
    log: Literal["tensorboard", "wandb", "trackio"] | None = Field(None, description="where arms log their steps; it bears on no result")
    gpu: Gpu | None = Field(None, description="what --dry-run estimates for where no step can be run; it bears on no result")

    @field_validator("contrasts")
    @classmethod
    def _contrasting(cls, contrasts: dict[str, dict[str, float]], info: ValidationInfo) -> dict[str, dict[str, float]]:
        known = [label(name) for name in info.data.get("methods", {})]
        for name, weights in contrasts.items():
            if unknown := next((method for method in weights if known and method not in known), None):
                raise ValueError(f"{name!r} names {unknown!r}, which is no method of this comparison{did_you_mean(unknown, known)}")
            if sum(weight != 0 for weight in weights.values()) < 2:
                raise ValueError(f"{name!r} compares nothing: give two methods or more a weight that is not 0")
            if abs(total := sum(weights.values())) > ROUNDING * sum(map(abs, weights.values())):
                raise ValueError(f"the weights of {name!r} sum to {total:g}; they must sum to 0")
        return {name: {method: weight for method, weight in weights.items() if weight} for name, weights in contrasts.items()}

    @model_validator(mode="after")
    def _private(self) -> Self:
        if self.privileged is not None and (self.scoring.by == "server" or "{prompt}" not in self.privileged):
            raise ValueError("privileged needs {prompt} in its text, and a teacher in this process (scoring.by: model or cache)")
        if self.teachers and (self.privileged is not None or self.scoring.by != "model"):
            raise ValueError("several teachers need scoring.by: model and no privilege: leave out scoring and privileged, or teachers")
        return self

    @model_validator(mode="after")
    def _sourced(self) -> Self:
        names = [source.called for source in self.prompts]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two sources of prompts are called {twice!r}; give each a name")
        if self.prompts and self.judge.by in ("solve", "verifier"):
            raise ValueError(
                f"judge.by: {self.judge.by} needs a prompt's task, which a data set's has not; set judge.by to another, such as check"
            )
        asked = {re.split(r"[.[]", field)[0] for _, field, _, _ in Formatter().parse(self.privileged or "") if field}
        for source in self.prompts:
            if "messages" in source.columns and not self.chat:
                raise ValueError(f"prompts {source.called}: messages need chat: true, and a tokenizer with a chat template")
            if lacking := sorted(asked - {"prompt", *source.columns}):
                raise ValueError(f"privileged names {lacking[0]!r}, which the columns of prompts {source.called} do not map")
        return self

    @model_validator(mode="after")
    def _chatting(self) -> Self:
        if self.retention.prompts and not self.chat:
            raise ValueError("retention.prompts needs chat: true, as the start writes the messages by its chat template")
        return self

    @model_validator(mode="after")
    def _countable(self) -> Self:
        if self.judge.by == "endpoint" and self.budget.axis == "flops" and self.judge.parameters is None:
            raise ValueError("the FLOPs of an endpoint are not known: give judge.parameters, or match on dollars, seconds or tokens")
        return self

    @property
    def limit(self) -> float:
        """Of the budget, in units of its axis."""
        return self.budget.limit

    @property
    def axis(self) -> Axis:
        """A new axis for an arm's ledger."""
        prices = self.budget.prices
        if self.budget.axis == "dollars" and prices:
            return Dollars("dollars", {**prices.per_million_tokens}, prices.per_exaflop)
        if self.budget.axis == "wall-clock":
            return Seconds("seconds")
        if self.budget.axis == "gpu-hours":
            return Seconds("GPU-hours", self.budget.gpus / 3600)
        kinds = {"student-tokens": STUDENT_TOKENS, "teacher-tokens": TEACHER_TOKENS}
        return Tokens(self.budget.axis.replace("-", " "), kinds[self.budget.axis]) if self.budget.axis in kinds else Axis()

    @property
    def budgets(self) -> dict[float, float]:
        """Budgets by share of the limit: the points, then the limit itself."""
        return {share: share * self.limit for share in (*self.budget.points, 1.0)}

    @property
    def models(self) -> list[str]:
        """All students and teachers, each once."""
        return list(dict.fromkeys((*self.students, self.teacher, *self.teachers.values())))

    @property
    def prompt_sources(self) -> list[PromptSource]:
        """`prompts`; a data set of the hub is read from its copy where ``tasks.data_dir`` holds one, like those of the tasks."""
        copies = Path(self.tasks.data_dir).expanduser() if self.tasks.data_dir else None
        return [source.at(copies / unpinned(source.data)) if copies else source for source in self.prompts]

    @property
    def task_path(self) -> Path:
        return Path(self.tasks.path) if self.tasks.path else TASKS

    @property
    def built_folder(self) -> Path:
        """Where the models of ``build`` lie."""
        made_from = self.model_dump(mode="json", include={"build", "chat"} | ({"eos"} if self.eos else set()))
        own = self.build and all(made.shares for made in self.build.models.values())
        named = {"stem", "coding", "held_out", "path"}
        made_from["tasks"] = self.tasks.path if own else self.tasks.model_dump(mode="json", include=named)
        return cache_folder() / "built" / f"{self.tier}-{digest(made_from)}"

    def source(self, model: str) -> Source:
        """The model that the configuration calls so; UserError where it is not to be had, or was to be built and is not there."""
        if not model.startswith("built/"):
            return locate(model, remote_code=self.trust_remote_code)
        folder = self.built_folder / model.removeprefix("built/")
        if self.build is None:
            raise UserError(f"{model}: this configuration has no `build` that says how to make it")
        if folder.name not in self.build.models:
            raise UserError(f"{model}: `build` makes no such model{did_you_mean(folder.name, self.build.models)}")
        if not folder.is_dir():
            raise UserError(f"{model} has not been made yet: run opd-bench build-teacher --tier {self.tier} first")
        return Source(model, folder)

    def location(self, model: str) -> str:
        """The folder of `source`."""
        return str(self.source(model).folder)

    @property
    def digest(self) -> str:
        """Hash of everything in the configuration that bears on results."""
        return digest(determining(self.model_dump(mode="json")))


def digest(document: dict[str, Any]) -> str:
    """Of a document that JSON can hold: 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]


def determining(document: dict[str, Any]) -> dict[str, Any]:
    """A configuration's document without what bears on no result, such as what may be paid: that may change when a run resumes."""
    document = {key: value for key, value in document.items() if key not in IDLE}
    if "tasks" in document:
        document = {**document, "tasks": {key: value for key, value in document["tasks"].items() if key != "data_dir"}}
    endpoint = (document.get("judge") or {}).get("endpoint")
    if not endpoint:
        return document
    kept = {key: value for key, value in endpoint.items() if key not in PACE}
    return {**document, "judge": {**document["judge"], "endpoint": kept}}


def tiers() -> list[str]:
    return sorted(path.stem for path in TIERS.glob("*.yaml"))


def size(name: str) -> dict:
    """What ``--smoke``, ``--quick`` and ``--controls`` lay over a tier."""
    return read_yaml(SIZES / f"{name}.yaml")


def selection(methods: str | None) -> tuple[dict, dict]:
    """What ``--methods`` lays right over the tier, and what over all else: a list of names has the latter only, a design both.

    UserError where a design stands beside another name.
    """
    if methods is None:
        return {}, {}
    names = [name.strip() for name in methods.split(",") if name.strip()]
    chosen = next((name for name in names if name in designs()), None)
    if chosen is None:
        return {}, {"methods": {name: {} for name in names}}
    if len(names) > 1:
        others = ", ".join(name for name in names if name != chosen) or chosen
        raise UserError(f"--methods {chosen} is a design with methods of its own; leave out {others}")
    document = read_yaml(designs()[chosen])
    above = {key: document.pop(key) for key in ("methods", "contrasts", "notes")}
    return document, above


def read_yaml(path: Path) -> dict:
    """A YAML file that holds a mapping. UserError if it cannot be read or is something else."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold a mapping of configuration keys")
    return document


def overlaid(base: dict, over: dict) -> dict:
    """``over`` laid over ``base``, mapping by mapping; ``methods`` replaces the whole selection but keeps options.

    UserError where a method is ``like`` one that ``base`` has not.
    """
    methods, below = over.get("methods"), base.get("methods")
    if isinstance(methods, dict):
        below = below if isinstance(below, dict) else {}
        methods = dict(_staged(name, options, below) or (name, _like(options, below)) for name, options in methods.items())
        over = {**over, "methods": methods}
    merged = {**base}
    for key, value in over.items():
        old = base.get(key)
        merged[key] = overlaid(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    if isinstance(methods, dict):
        merged["methods"] = {name: merged["methods"][name] or {} for name in methods}
    return merged


def _staged(name: str, options: Any, below: dict) -> tuple[str, dict[str, Any]] | None:
    """The label and the stages of a recipe of several, each with what ``below`` says of its method; None where there is one method."""
    label_, options = written(name) or (name, options)
    stages = options.get("stages") if isinstance(options, dict) else None
    if not isinstance(stages, list):
        return None
    return label_, {**options, "stages": [_known(stage, below) for stage in stages]}


def _known(stage: Any, below: dict) -> Any:
    """A stage with what ``below`` says of the method, or of the arm, that it names."""
    own = below.get(str(stage.get("method"))) if isinstance(stage, dict) else None
    return {**own, **stage, "method": own.get("method", stage["method"])} if isinstance(own, dict) else stage


def _like(options: Any, below: dict) -> Any:
    """``options`` with, in place of ``like: other``, what ``below`` says of the other's settings that every method has: lr and batch."""
    if not isinstance(options, dict) or "like" not in options:
        return options
    other = str(options["like"])
    if other not in below:
        raise UserError(f"configuration: methods: there is no {other!r} for another method to be like{did_you_mean(other, below)}")
    theirs = below[other] if isinstance(below[other], dict) else {}
    shared = {option: theirs[option] for option in Method.Config.model_fields if option in theirs}
    return {**shared, **{option: value for option, value in options.items() if option != "like"}}


def load(tier: str, overlays: list[dict]) -> Config:
    """The configuration of ``tier`` with ``overlays``. UserError for an unknown tier or key, a bad value, or an overlay of another tier."""
    if tier not in tiers():
        raise UserError(f"unknown tier {tier!r}{did_you_mean(tier, tiers())}")
    document = read_yaml(TIERS / f"{tier}.yaml")
    for overlay in overlays:
        if overlay.get("tier", tier) != tier:
            raise UserError(f"this configuration is for the tier {overlay['tier']}, not {tier}; give --tier {overlay['tier']}")
        document = overlaid(document, overlay)
    try:
        return Config(**document)
    except ValidationError as error:
        raise UserError(f"configuration: {describe(error, Config)}") from None


def model_location(name: str, *, remote_code: bool = False) -> str:
    """The folder of a model: one that travels with the package, a local or pulled one, or the hub's, which is downloaded (`hub.py`)."""
    return str(locate(name, remote_code=remote_code).folder)

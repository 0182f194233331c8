"""The configuration of a comparison: a tier's YAML, then the user's, then the command line, each laid over the last.

config = load("embedded", overlays=[{"seeds": 2}])

below, above = selection("factorial")  # a design's settings, and its methods, contrasts and notes
config = load("embedded", overlays=[below, {"seeds": 12}, above])
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from opd_bench.errors import UserError, did_you_mean
from opd_bench.gates import Limits
from opd_bench.gpus import Gpu
from opd_bench.hub import Source, cache_folder, locate
from opd_bench.ledger import STUDENT_TOKENS, TEACHER_TOKENS, Axis, Dollars, Seconds, Tokens
from opd_bench.methods import Method, describe, designs, label
from opd_bench.resources import SIZES, TASKS, TIERS
from opd_bench.statistics import ROUNDING


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tasks(_Part):
    """lm-eval tasks or groups; the score is the mean of the STEM mean and the coding mean."""

    stem: list[str] = []
    coding: list[str] = []
    held_out: list[str] = Field([], description="evaluated and shown; they count for no score and are never trained on")
    path: str | None = Field(None, description="folder of task YAML; default: the tasks shipped with the package")


ChargeKind = Literal["student_sample", "student_update", "teacher_generate", "teacher_score", "judge"]
Share = Annotated[float, Field(gt=0, le=0.9)]
Weight = Annotated[float, Field(allow_inf_nan=False)]


AxisName = Literal["flops", "wall-clock", "gpu-hours", "student-tokens", "teacher-tokens", "dollars"]


class Prices(_Part):
    """What an arm costs in money: a price per token where a kind of charge has one, else per FLOP."""

    per_exaflop: float = Field(0.0, ge=0, allow_inf_nan=False, description="dollars per 1e18 FLOPs")
    per_million_tokens: dict[ChargeKind, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}


class Budget(_Part):
    axis: AxisName = "flops"
    limit: float = Field(gt=0, allow_inf_nan=False, description="per arm, in FLOPs, seconds, hours, tokens or dollars, as the axis says")
    gpus: int = Field(1, ge=1, description="that an arm takes up, those of its servers among them: for gpu-hours")
    prices: Prices | None = None
    points: list[Share] = Field([], description="shares of it at which every arm is scored too, each after a cooldown of its own")

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if (self.axis == "dollars") != (self.prices is not None):
            raise ValueError("budget.prices and the axis dollars need each other: give both or neither")
        return self

    @field_validator("points")
    @classmethod
    def _in_order(cls, points: list[float]) -> list[float]:
        if sorted(set(points)) != points:
            raise ValueError("give each share once, the smallest first")
        return points


class Build(_Part):
    """Models that the tier makes for itself, ``built/start`` and ``built/specialist``, from worked solutions to its training problems."""

    base: str = Field(description="the model that both begin from")
    start: int = Field(gt=0, description="steps of the cold start, which is to know the form of an answer")
    specialist: int = Field(gt=0, description="steps of the teacher, which goes on from the cold start")
    shares: dict[Literal["start", "specialist"], dict[str, Annotated[float, Field(gt=0)]]] = Field(
        {}, description="of the documents that either is trained on, by task; default: all tasks of the comparison, as many as each has"
    )
    batch_tokens: int = Field(gt=0, description="tokens of a step, padding included")
    lr: float = Field(gt=0, allow_inf_nan=False)
    cooldown: float = Field(0.8, ge=0, le=1, description="last share of either training over which the learning rate falls to 0")


class Endpoint(_Part):
    """A judge behind a server that speaks OpenAI's chat completions."""

    url: str = Field(pattern=r"^https?://.*[^/]$", description="of the server, without the path chat/completions: http://127.0.0.1:8000/v1")
    key_variable: str | None = Field(None, description="environment variable that holds the key; no key is ever written down")
    answer: Literal["rating", "yes_no"] = Field("rating", description="what the template asks for")
    logprobs: bool = Field(True, description="ask for the probabilities of the answer's token; without them its text alone counts")
    max_read: int = Field(4096, ge=1, description="tokens that a question may come to, as the server counts; reserved for each verdict")
    max_written: int = Field(16, ge=1, description="tokens that the judge may write")
    dollars_per_million_read: float = Field(0.0, ge=0, allow_inf_nan=False)
    dollars_per_million_written: float = Field(0.0, ge=0, allow_inf_nan=False)
    most_dollars: float | None = Field(None, ge=0, allow_inf_nan=False, description="that all arms together may pay; may be raised later")
    per_minute: float | None = Field(None, gt=0, allow_inf_nan=False, description="requests of one process")
    concurrency: int = Field(8, ge=1, description="requests of one process under way at once")
    timeout_s: float = Field(120.0, gt=0, allow_inf_nan=False)


IDLE = ("log", "gpu")  # keys that bear on no result
PACE = ("most_dollars", "per_minute", "concurrency", "timeout_s")  # of an endpoint: they bear on no result


class Judging(_Part):
    """Who judges an answer, and how it is asked."""

    by: Literal["check", "solve", "yes_no", "rubric", "endpoint", "verifier"] = Field(
        "check",
        description="check: a model writes one, then yes or no; solve: it solves the task and compares; yes_no, rubric: its next token "
        "after a question; endpoint: a server of others; verifier: the tasks' own scorers, which makes it RLVR",
    )
    model: str | None = Field(None, description="who judges: a folder or hub id, default the teacher; for an endpoint its name there")
    template: str | None = Field(None, description="question of yes_no, rubric and endpoint, with {prompt}, {response} and {options}")
    scale: int = Field(9, ge=2, le=10, description="best rating; up to 9 each is one token and the mean of its distribution is taken")
    parameters: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="of an endpoint's model, those active per token: for FLOPs"
    )
    endpoint: Endpoint | None = None
    question: str = Field(description="of check: follows prompt and response")
    yes: str = Field(description="of check: how a verdict ends")
    no: str
    max_check: int = Field(gt=0, description="of check and solve: tokens the judge may write")
    at_random: bool = Field(False, description="of check, a control: the same checks at the same cost, verdicts drawn by lot")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.by == "endpoint") != (self.endpoint is not None):
            raise ValueError("judge.endpoint and judge.by: endpoint need each other: give both or neither")
        if self.by == "endpoint" and self.model is None:
            raise ValueError("judge.model must say what the endpoint calls its model")
        if self.by == "rubric" and self.scale > 9:
            raise ValueError(
                "judge.scale may be 9 at most where probabilities of digits are read, as 10 is two tokens in many vocabularies"
            )
        if self.at_random and self.by != "check":
            raise ValueError("judge.at_random is a control for judge.by: check")
        return self

    @field_validator("template")
    @classmethod
    def _fills(cls, template: str | None) -> str | None:
        if template is not None:
            try:
                template.format(prompt="", response="", options="")
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(f"{error} in the template: write braces that stand for themselves twice") from None
            if "{prompt}" not in template or "{response}" not in template:
                raise ValueError("the template needs {prompt} and {response}")
        return template


class Lora(_Part):
    """Low-rank adapters beside every linear map of every layer; they alone are trained (Hu et al., arXiv 2106.09685)."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0, allow_inf_nan=False, description="what the adapters say is multiplied by alpha / rank")


class Rollouts(_Part):
    """Who writes the student's rollouts: the model that trains, vLLM beside it, or a vLLM server."""

    by: Literal["model", "vllm", "server"] = "model"
    url: str | None = Field(None, description="of the server, such as http://127.0.0.1:8000")
    served: str | None = Field(None, description="what the server calls the student; default: as here")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights that write; the student trains in float32")
    staleness: Literal[0, 1] = Field(
        0, description="rounds that the weights which write rollouts lie behind; with 1, a GPU writes while it trains"
    )

    @model_validator(mode="after")
    def _addressed(self) -> Self:
        if (self.by == "server") != (self.url is not None):
            raise ValueError("rollouts.url and rollouts.by: server need each other: give both or neither")
        if self.by == "server" and self.dtype != "float32":
            raise ValueError("leave out rollouts.dtype: the server was started with one (--dtype)")
        return self


class Scoring(_Part):
    """Where the teacher's distributions come from: its model, what it said before of the same text, or a vLLM server."""

    by: Literal["model", "cache", "server"] = "model"
    top: int = Field(20, ge=1, description="tokens that a cache or server tells apart; all others are one event")
    url: str | None = Field(None, description="of the server, ending with /v1")
    served: str | None = Field(None, description="what the server calls the teacher; default: as here")

    @model_validator(mode="after")
    def _addressed(self) -> Self:
        if (self.by == "server") != (self.url is not None):
            raise ValueError("scoring.url and scoring.by: server need each other: give both or neither")
        return self


class Evaluation(_Part):
    split: Literal["test", "validation"] = Field("test", description="validation: development items, for tuning")
    batch_size: int = Field(250, ge=1)
    limit: int | None = Field(None, ge=1, description="items per task; default all")


class Exposure(_Part):
    prompts: int = Field(64, ge=2, description="per task; shared by all methods and by teacher and student")
    continued: int = Field(24, ge=0, description="of these prompts, per task: from pieces of their rollouts models go on")
    draws: int = Field(1000, ge=1, description="bootstrap draws")


class Retention(_Part):
    """General text that the start writes, on which arms are held against it; it needs a chat template."""

    prompts: int = Field(0, ge=0, description="messages that the start writes and answers; 0: nothing is measured")
    max_tokens: int = Field(96, ge=1, description="of a message, and of an answer")


class Config(_Part):
    tier: str
    students: list[str] = Field(min_length=1, description="cold starts of one architecture; seed k begins from the (k mod their number)-th")
    teacher: str
    tasks: Tasks
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
    def task_path(self) -> Path:
        return Path(self.tasks.path) if self.tasks.path else TASKS

    @property
    def built_folder(self) -> Path:
        """Where the models of ``build`` lie."""
        made_from = self.model_dump(mode="json", include={"build", "chat"} | ({"eos"} if self.eos else set()))
        made_from["tasks"] = self.tasks.path if self.build and self.build.shares else self.tasks.model_dump(mode="json")
        return cache_folder() / "built" / f"{self.tier}-{digest(made_from)}"

    def source(self, model: str) -> Source:
        """The model that the configuration calls so; UserError where it is not to be had, or was to be built and is not there."""
        if not model.startswith("built/"):
            return locate(model, remote_code=self.trust_remote_code)
        folder = self.built_folder / model.removeprefix("built/")
        if self.build is None:
            raise UserError(f"{model}: this configuration has no `build` that says how to make it")
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
        over = {**over, "methods": {name: _like(options, below) for name, options in methods.items()}}
    merged = {**base}
    for key, value in over.items():
        old = base.get(key)
        merged[key] = overlaid(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    if isinstance(methods, dict):
        merged["methods"] = {name: merged["methods"][name] or {} for name in methods}
    return merged


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

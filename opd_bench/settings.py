"""The sections of a configuration, each a mapping of its YAML: what they hold, and what must fit together within one.

    tasks = Tasks(stem=["opd_bench_stem"])      # pydantic's ValidationError for unknown keys and bad values

`config.py` has the whole, what must fit together across sections, and how files are laid over each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from opd_bench.hub import unpinned


class Section(BaseModel):
    """A mapping of known keys; any other is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tasks(Section):
    """lm-eval tasks or groups; the score is the mean of the STEM mean and the coding mean."""

    stem: list[str] = []
    coding: list[str] = []
    held_out: list[str] = Field([], description="evaluated and shown; they count for no score and are never trained on")
    retention: list[str] = Field([], description="as held_out: what the students could do before; multiple choice belongs here")
    robustness: list[str] = Field([], description="as held_out: whether robustness is bought or spent")
    path: str | None = Field(None, description="folder of task YAML; default: the tasks shipped with the package")
    data_dir: str | None = Field(None, description="folder of copies of hub data sets, each under its id; default: the hub and its cache")


class PromptSource(Section):
    """Prompts to train on: a file, a folder of files, or a data set of the hub."""

    data: str = Field(min_length=1, description=".jsonl, .json or .parquet, a folder of them, or a hub id: owner/name, owner/name@revision")
    name: str | None = Field(None, min_length=1, description="what the source is called; default: as the file, folder or data set")
    subset: str | None = Field(None, description="of a data set with several, what the hub calls a configuration")
    split: str = "train"
    columns: dict[str, str] = Field(
        {"prompt": "prompt"},
        description="the column that is the prompt (text) or the messages (conversations); others are for what privileged names",
    )
    streaming: bool = Field(False, description="read no more of the hub's data set than `most` takes, and keep none of it")
    most: int | None = Field(None, ge=1, description="prompts taken, the first of the split, each counted once; default: all")

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if ("prompt" in self.columns) == ("messages" in self.columns):
            raise ValueError("columns maps either prompt, to a column of text, or messages, to one of conversations")
        if self.streaming and self.most is None:
            raise ValueError("streaming needs most, the number of prompts after which to stop reading")
        return self

    def at(self, copy: Path) -> PromptSource:
        """Read from the folder ``copy``, if it is there; called what it was called."""
        return self.model_copy(update={"data": str(copy), "name": self.called}) if copy.is_dir() else self

    @property
    def called(self) -> str:
        return self.name or Path(unpinned(self.data)).name.removesuffix(".jsonl").removesuffix(".json").removesuffix(".parquet")


ChargeKind = Literal["student_sample", "student_update", "teacher_generate", "teacher_score", "judge"]
Share = Annotated[float, Field(gt=0, le=0.9)]
Weight = Annotated[float, Field(allow_inf_nan=False)]


AxisName = Literal["flops", "wall-clock", "gpu-hours", "student-tokens", "teacher-tokens", "dollars"]


class Prices(Section):
    """What an arm costs in money: a price per token where a kind of charge has one, else per FLOP."""

    per_exaflop: float = Field(0.0, ge=0, allow_inf_nan=False, description="dollars per 1e18 FLOPs")
    per_million_tokens: dict[ChargeKind, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}


class Budget(Section):
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


class Made(Section):
    """One of the models that a tier makes for itself."""

    after: str | None = Field(None, description="another of them, from which it goes on; default: the base")
    steps: int = Field(gt=0)
    shares: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="of the documents that it is trained on, by task; default: all tasks of the comparison, as many as each has"
    )


class Build(Section):
    """Models that the tier makes for itself, named as ``built/<name>``, from worked solutions to its training problems."""

    base: str = Field(description="the model that they begin from")
    models: dict[str, Made] = Field(min_length=1, description="by name, each after those it goes on from")
    batch_tokens: int = Field(gt=0, description="tokens of a step, padding included")
    lr: float = Field(gt=0, allow_inf_nan=False)
    cooldown: float = Field(0.8, ge=0, le=1, description="last share of each training over which the learning rate falls to 0")

    @field_validator("models")
    @classmethod
    def _in_order(cls, models: dict[str, Made]) -> dict[str, Made]:
        for place, (name, made) in enumerate(models.items()):
            if made.after is not None and made.after not in list(models)[:place]:
                raise ValueError(f"{name} goes on from {made.after!r}, which is not among the models before it")
        return models


class Endpoint(Section):
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


class Judging(Section):
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


class Lora(Section):
    """Low-rank adapters beside every linear map of every layer; they alone are trained (Hu et al., arXiv 2106.09685)."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0, allow_inf_nan=False, description="what the adapters say is multiplied by alpha / rank")


class Rollouts(Section):
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


class Scoring(Section):
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


class Evaluation(Section):
    split: Literal["test", "validation"] = Field("test", description="validation: development items, for tuning")
    batch_size: int = Field(250, ge=1)
    limit: int | None = Field(None, ge=1, description="items per task; default all")


class Exposure(Section):
    prompts: int = Field(64, ge=2, description="per task; shared by all methods and by teacher and student")
    continued: int = Field(24, ge=0, description="of these prompts, per task: from pieces of their rollouts models go on")
    draws: int = Field(1000, ge=1, description="bootstrap draws")


class Retention(Section):
    """General text that the start writes, on which arms are held against it; it needs a chat template."""

    prompts: int = Field(0, ge=0, description="messages that the start writes and answers; 0: nothing is measured")
    max_tokens: int = Field(96, ge=1, description="of a message, and of an answer")

"""What a user should know of student and teacher before anything trains: where they came from, where texts end, whether they fit in memory.

    checked = examine(config, pair, longest=400)
    checked.warnings, checked.facts
    headroom(pair, suite, batch_size=60)     # what the teacher and the first cold start solve of a few items
    memory(config, workers=4)                # "memory: about 1.9 GiB an arm, …"; UserError where it cannot be enough

Limits: memory is that of weights, gradients and optimiser, with neither activations nor caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

from opd_bench import device, store, training_prompts
from opd_bench.config import Config
from opd_bench.errors import UserError
from opd_bench.evaluate import TaskSuite, evaluate_each, scores
from opd_bench.flops import flop_count
from opd_bench.hub import SOURCE_FILE
from opd_bench.models import Pair, context, token_count
from opd_bench.scoring import output_head
from opd_bench.teachers import Teachers

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
FEW = 16  # items of a task on which headroom is looked for
LEAST_ROOM = 0.05  # of score
MOMENTS = 8  # bytes of AdamW's two moments for a trained weight


@dataclass(frozen=True)
class Checked:
    """Lines for the user: ``warnings`` are printed always, ``facts`` by ``--dry-run``; the manifest has both."""

    warnings: list[str]
    facts: list[str]


def sources(config: Config) -> dict[str, dict[str, Any]]:
    """Of every model of the configuration: the name that stands for this very version, and what a pulled one says of itself."""
    found = {}
    for name in config.models:
        source = config.source(name)
        path = source.folder / SOURCE_FILE
        found[name] = {"version": source.pinned, **({"source": store.read_json(path)} if path.is_file() else {})}
    return found


def named(config: Config, found: Mapping[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Student and teacher in words, by what `sources` ``found``: scores on four-bit weights are another model's, and say so."""

    def words(name: str) -> str:
        of = found[name]
        return f"{of['version']} ({of['source']['name']}, {of['source']['weights']})" if "source" in of else of["version"]

    teachers = dict.fromkeys((config.teacher, *config.teachers.values()))
    return {"student": list(map(words, config.students)), "teacher": list(map(words, teachers))}


def pinned(config: Config) -> Config:
    """``config`` with the versions of the hub's models and data that it stands for now: what workers are given, so that all use one."""
    names = {name: of["version"] for name, of in sources(config).items()}
    models = {
        "students": [names[name] for name in config.students],
        "teacher": names[config.teacher],
        "teachers": {of: names[name] for of, name in config.teachers.items()},
    }
    return config.model_copy(update={**models, "prompts": list(map(training_prompts.pinned, config.prompt_sources))})


def examine(config: Config, pair: Pair, longest: int) -> Checked:
    """What student and teacher say of themselves; ``longest``: tokens of the longest text that is trained on."""
    warnings, facts = [], []
    for name, of in sources(config).items():
        if of["version"] != name:
            facts.append(f"{name} is {of['version']}; to compare with the same weights later, write that name")
        if "source" in of:
            facts.append(f"{name} is from {of['source']['from']}; weights {of['source']['weights']}")
    tokens, end = token_count(pair.tokenizer), str(pair.tokenizer.eos_token)
    facts.append(f"rollouts end with {end!r} (token {pair.eos})")
    for role, model in (("student", pair.student), ("teacher", pair.teacher)):
        for where, ids in _ends(model):
            others = ", ".join(repr(pair.tokenizer.convert_ids_to_tokens(other)) for other in ids if other != pair.eos)
            if pair.eos not in ids:
                warnings.append(
                    f"the {role}'s {where} ends texts with {others}, and its tokenizer with {end!r}: here rollouts end with {end!r} alone; "
                    "where the model does not write that, they are cut at max_response (set eos: to a token that both write)"
                )
            elif others:
                facts.append(f"the {role}'s {where} ends texts with {others}, too; here that ends nothing")
        columns = len(output_head(model).weight)
        if columns > tokens:
            facts.append(f"the {role} has {columns} output columns for {tokens} tokens; those beyond are never sampled nor compared")
    facts.append(f"chat template: {'yes' if pair.tokenizer.chat_template else 'none; prompts are given as plain text'}")
    facts.append(f"the longest text has {longest} tokens; the models take {context(pair.student, pair.teacher)}")
    return Checked(warnings, facts)


def _ends(model: PreTrainedModel) -> Iterator[tuple[str, list[int]]]:
    """Where the model says what ends a text, and the ids."""
    for where in ("config", "generation_config"):
        said = getattr(getattr(model, where, None), "eos_token_id", None)
        if said is not None:
            yield where, said if isinstance(said, list) else [said]


def headroom(pair: Pair, teachers: Teachers, suite: TaskSuite, batch_size: int) -> Checked:
    """What teacher and student score, greedily, on a few items of each task that counts; a warning where the teacher is hardly ahead."""
    few = replace(suite, tasks=suite.scored)
    teacher, student = (
        scores(evaluate_each(own, pair.tokenizer, few, limit=FEW, batch_size=batch_size), few)["score"]
        for own in (teachers, Teachers(pair.student))
    )
    said = f"on {FEW} items a task the teacher scores {teacher:.2f} and the first cold start {student:.2f}"
    if teacher - student >= LEAST_ROOM:
        return Checked([], [said])
    return Checked(
        [f"{said}: there may be nothing to distil, and ranks will be withheld if so; choose a stronger teacher or other tasks"], []
    )


def parameters(folder: str) -> int:
    """Weights in the safetensors files of ``folder``, read from their headers."""
    count = 0
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def held(config: Config, student: int, teacher: int, trained: int) -> dict[str, int]:
    """Bytes that a process which trains holds, by part, given the weights of either model and how many of the student's are trained."""
    return {
        "models": len(config.students) * 4 * student + BYTES[config.dtype] * teacher,
        "a student with gradients and moments": 4 * student + (4 + MOMENTS) * trained,
        "weights that write rollouts": BYTES[config.rollouts.dtype] * student + 4 * student * config.rollouts.staleness,
        "a branch": (4 * (0 if config.lora else student) + (4 + MOMENTS) * trained) if config.budget.points else 0,
    }


def memory(config: Config, workers: int, free: int | None = None) -> str:
    """What those of ``workers`` arms need at least that share a device, and what is free there (bytes; default: as it is now).

    UserError where the weights, gradients and moments alone are more.
    """
    code = config.trust_remote_code
    folder = config.location(config.students[0])
    student, teacher = parameters(folder), (1 + len({*config.teachers.values()})) * parameters(config.location(config.teacher))
    trained = student
    if config.lora:
        said = AutoConfig.from_pretrained(folder, trust_remote_code=code)
        trained = flop_count(said, lora_rank=config.lora.rank, remote_code=code).adapter_parameters
    models, training, *others = held(config, student, teacher, trained).values()
    together = max(Counter(device.places(config.device, workers)).values())
    least, free = together * (models + training), device.free(config.device) if free is None else free
    if least > free:
        raise UserError(
            f"{together} arms side by side need {least / GIB:.1f} GiB at least, and {free / GIB:.1f} GiB are free; "
            "lower --jobs, set dtype: bfloat16 (the teacher's) or lora: {rank: 16}, name fewer students, or take smaller models"
        )
    arm = models + training + sum(others)
    return f"memory: about {arm / GIB:.2f} GiB an arm without activations, {together} at once; {free / GIB:.1f} GiB are free"

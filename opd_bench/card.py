"""The model card of a finished arm: a README.md that makes its folder a model repository of the hub.

    write(config, manifest, run, job, record, folder)

The front matter is the hub's (base model, library, tags, scores as a model index); the text states the recipe, what the budget went on, the
scores, the exposure-bias gap, where the weights came from and how to make them again. All figures are those of the arm's own files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from opd_bench import exposure, store
from opd_bench.config import Config
from opd_bench.hub import COMMIT, unpinned
from opd_bench.plan import Job
from opd_bench.records import ArmRecord, Run
from opd_bench.report import markdown_table, number

FILE = "README.md"


def write(config: Config, manifest: dict[str, Any], run: Run, job: Job, record: ArmRecord, folder: Path) -> None:
    """Leave the card in ``folder``, whole or not at all; nothing else there is touched."""
    store.write_text(folder / FILE, str(card(config, manifest, run, job, record)))


def card(config: Config, manifest: dict[str, Any], run: Run, job: Job, record: ArmRecord) -> ModelCard:
    student = config.students[job.start]
    version = manifest["models"][student]["version"]
    scores = {"greedy": record.greedy, "sampled": record.sampled}
    data = ModelCardData(
        base_model=unpinned(student) if COMMIT.fullmatch(version.rpartition("@")[2]) else None,  # the hub takes no folder there
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["opd-bench", "knowledge-distillation", job.name],
        model_name=job.label,
        eval_results=[
            EvalResult("text-generation", task, task, "score", float(of[task].mean()), metric_name=f"{decoding} score by opd-bench")
            for task in (*run.weights, *run.held_out)
            for decoding, of in scores.items()
            if task in of  # those that count for no score are not sampled
        ],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(config, manifest, run, job, record)}")


def _text(config: Config, manifest: dict[str, Any], run: Run, job: Job, record: ArmRecord) -> str:
    gap, end = exposure.gap(record.divergences), record.end
    versions = ", ".join(f"{name} {of}" for name, of in manifest["versions"].items())
    options = {name: value for name, value in job.options if value is not None}
    prompts = ", ".join(source.called for source in config.prompts) or f"training problems of {', '.join(run.weights)}"
    recipe = [
        ["method", f"{job.name}, {json.dumps(options)}; source and settings {job.run_id}"],
        ["was shown", ", ".join(record.saw) or "nothing of the teacher's"],
        ["teacher", ", ".join(run.models["teacher"])],
        ["began from", run.models["student"][job.start]],
        ["prompts", f"{prompts}, in the order of seed {job.seed}"],
        ["budget", f"{run.limit:g} {run.axis}, of which {record.share_spent:.2%} was spent"],
    ]
    spent = [[kind, f"{flops:.4g}", f"{end.tokens.get(kind, 0):,}", f"{end.seconds.get(kind, 0):.1f}"] for kind, flops in end.flops.items()]
    beside = {task: f" ({group.replace('_', ' ')})" for task, group in run.held_out.items()}
    tasks = [[task + beside.get(task, ""), str(record.greedy[task].size), *_means(record, task)] for task in (*run.weights, *run.held_out)]
    macro = ["mean of STEM and coding", "", *(number(run.macro(of), 3) for of in (record.greedy, record.sampled))]
    said = "\n".join(f"- {note}" for note in run.notes)
    return f"""# {job.label}

A student trained by opd-bench, one arm of the comparison `{run.tier}`. Load it with `AutoModelForCausalLM` and `AutoTokenizer`.

## Recipe

{_table(["", ""], recipe)}

## What the budget went on

{_table(["kind", "FLOPs", "tokens", "seconds"], spent)}

## Scores

{_table(["task", "items", "greedy", "temperature 1"], [*tasks, macro])}

By opd-bench's own runs of lm-eval ({config.evaluation.split} items, answers as its tasks take them), for comparing arms of one comparison:
not to be set beside figures of other harnesses.

## Exposure bias

R {number(gap.regret, 2)}, l·ε {number(gap.per_step, 2)}, R − l·ε {number(gap.excess, 2)} nats: KL(T‖S) summed along a response, on the
student's own prefixes, on the teacher's, and the difference ({len(record.divergences)} prompts, {gap.length} tokens at most).

## Made by

`{run.command}`, seed {job.seed}, configuration {manifest["config_hash"]}, code {run.commit}; {versions}.

{said}
"""


def _table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(markdown_table(columns, rows))


def _means(record: ArmRecord, task: str) -> list[str]:
    return [number(float(of[task].mean()), 3) if task in of else "" for of in (record.greedy, record.sampled)]

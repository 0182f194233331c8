"""Models a tier makes for itself from its training problems, such as a cold start and a specialist that went on from there.

    opd-bench build-teacher --tier smol

All are the base model, trained on worked solutions as a program writes them. A cold start has seen just enough of them to know the form
of an answer: no arm teaches what its start can't nearly do. They lie in the cache, in a folder named after a hash of all that the
configuration says of them. A build that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_bench import plan, store, supervised
from opd_bench.config import Config, digest
from opd_bench.errors import UserError
from opd_bench.evaluate import TaskSuite, load_suite, tasks_of
from opd_bench.hub import SOURCE_FILE
from opd_bench.models import COLD_START_FILE, cold_start_flops, load_model, load_tokenizer, weights_digest
from opd_bench.readings import START
from opd_bench.settings import Build
from opd_bench.supervised import Example, batches, fit

EVERY = 25  # steps between two checkpoints
MADE_FROM = "made_from.json"  # hashes of what a model depends on besides the configuration: the weights before it, the tasks, the code


def build(config: Config, console: Console) -> None:
    """Make what is missing of the tier's models. UserError where the tier makes none or a task has no solutions."""
    if config.build is None:
        raise UserError(f"the tier {config.tier} builds no models: its configuration has no `build`")
    base = config.location(config.build.base)
    tokenizer = load_tokenizer(base, eos=config.eos)
    examples = solved(_suite(config, tokenizer), tokenizer)
    for place, (name, made) in enumerate(config.build.models.items()):
        folder, before = config.built_folder / name, str(config.built_folder / made.after) if made.after else base
        trained_by = plan.digest_files([Path(supervised.__file__)])
        said = {"before": weights_digest(before), "tasks": plan.code(config.task_path)["tasks"], "trained_by": trained_by}
        if (folder / MADE_FROM).exists() and store.read_json(folder / MADE_FROM) == said:
            console.print(f"{name}: is there, {folder}", markup=False, highlight=False)
        else:
            model = load_model(before, device=config.device)
            checkpoint = config.built_folder / f"{name}-{digest(said)}.checkpoint"
            flops = _train(model, examples, config.build, name, 1 + place, checkpoint, console)
            total = {START[0]: flops + cold_start_flops(before).get(START[0], 0), START[1]: 0}
            with store.disk_errors(), store.whole_folder(folder) as part:
                model.bfloat16().save_pretrained(part)
                tokenizer.save_pretrained(part)
                store.write_json(part / COLD_START_FILE, total)
                store.write_json(part / MADE_FROM, said)
                if (Path(before) / SOURCE_FILE).is_file():
                    shutil.copy(Path(before) / SOURCE_FILE, part)
            console.print(f"{name}: {flops:.2e} FLOPs, {folder}", markup=False, highlight=False)


def _suite(config: Config, tokenizer: PreTrainedTokenizerBase) -> TaskSuite:
    """Tasks with a share in the training of a model, which a comparison need not have; where none has one, those of the comparison."""
    assert config.build
    named = list(dict.fromkeys(task for made in config.build.models.values() for task in made.shares))
    return load_suite(named, [], config.task_path, chat=tokenizer if config.chat else None) if named else tasks_of(config, tokenizer)


def solved(suite: TaskSuite, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Example]]:
    """Every training document as token ids, by task: what a model is asked, without weight, then the worked solution and EOS."""
    documents = suite.docs("train")
    if lacking := next((task for task, doc in documents if not doc.get("solution")), None):
        raise UserError(f"the training documents of task {lacking!r} have no `solution` to learn from")
    asked = tokenizer([suite.text(task, doc) for task, doc in documents], add_special_tokens=False).input_ids
    answered = tokenizer([doc["solution"] for _, doc in documents], add_special_tokens=False).input_ids
    found: dict[str, list[Example]] = {}
    for (task, _), prompt, answer in zip(documents, asked, answered, strict=True):
        example = (prompt + answer + [tokenizer.eos_token_id], [0.0] * len(prompt) + [1.0] * (len(answer) + 1))
        found.setdefault(task, []).append(example)
    return found


def _train(
    model: PreTrainedModel, examples: dict[str, list[Example]], how: Build, name: str, seed: int, checkpoint: Path, console: Console
) -> int:
    """Train ``model`` to become ``name``; its FLOPs."""
    steps = how.models[name].steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        shown = bar.add_task(name, total=steps)

        def report(step: int, loss: float) -> None:
            bar.update(shown, completed=step, description=f"{name}, loss {loss:.3f}")
            if not console.is_terminal:
                console.print(f"{name}: step {step} of {steps}, loss {loss:.3f}", highlight=False)

        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        data = batches(_drawn(examples, how.models[name].shares, seed), how.batch_tokens, random.Random(seed))
        flops = fit(model, data, steps, [optimizer], cooldown=how.cooldown, checkpoint=checkpoint, every=EVERY, report=report)
    checkpoint.unlink()
    return flops


def _drawn(examples: dict[str, list[Example]], shares: dict[str, float], seed: int) -> Iterator[Example]:
    """Endless documents of tasks in these shares, each task's in another order at every pass."""
    shares = shares or {task: len(own) for task, own in examples.items()}
    rng = random.Random(f"worked solutions {seed}")

    def passes(own: list[Example]) -> Iterator[Example]:
        while True:
            yield from rng.sample(own, len(own))

    streams = {task: passes(own) for task, own in examples.items() if task in shares}
    while True:
        (task,) = rng.choices(list(streams), [shares[task] for task in streams])
        yield next(streams[task])

"""Evaluation by lm-eval, in memory; the only module that imports ``lm_eval``.

    >>> suite = load_suite(["opd_bench_stem"], ["opd_bench_coding"], TASKS)
    >>> scores(evaluate(model, tokenizer, suite), suite)
    {'stem': 0.71, 'coding': 0.64, 'score': 0.675}

The score of a checkpoint equals what the stock ``lm_eval`` command prints for it at the same batch size; another batch
size may change greedy scores a little. Where a task has several filters or metrics, the first of each counts.
Limits: one process (no data parallelism), one response per document.

Shapes: B prompts, T tokens of the longest.
"""

import logging
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval import tasks as shipped
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models import huggingface
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_bench import sandbox, standard
from opd_bench.config import Config
from opd_bench.errors import UserError, did_you_mean
from opd_bench.models import chat_text
from opd_bench.provision import provided
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts
from opd_bench.standard import BESIDE, GROUPS
from opd_bench.teachers import Teachers

NGRAM = 13  # words in a row that two texts don't share by chance
HFLM: Any = huggingface.HFLM  # a decorator hides its type
NEUTRAL = {  # what may stand in a generation config without bending the distribution
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"),
    *("use_cache", "output_attentions", "output_hidden_states"),
}
# The model's own distribution, whatever its generation config says.
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Item:
    """One evaluated document; ``doc`` is lm-eval's ``doc_hash``, by which runs are joined."""

    task: str
    doc: str
    score: float
    response: str  # empty where the task compares likelihoods
    steps: int | None = None  # how many the document says its problem needs


@dataclass(frozen=True)
class TaskSuite:
    """Loaded tasks by name, and the group of each: ``stem`` and ``coding`` make the score, those of `standard.BESIDE` count for none."""

    tasks: dict[str, Task]
    groups: dict[str, str]
    chat: PreTrainedTokenizerBase | None = None  # whose template makes a document's text the message of a user; None: it stands as it is

    @property
    def scored(self) -> dict[str, Task]:
        """The tasks that count for the score, which are also those trained on."""
        return {name: task for name, task in self.tasks.items() if self.groups[name] in GROUPS}

    def docs(self, split: Literal["train", "test"]) -> list[tuple[str, Any]]:
        """``(task, document)`` of every training or evaluation document of the tasks that count.

        Raises UserError for a task without a training split.
        """
        pairs = []
        for name, task in self.scored.items():
            if split == "train" and not task.has_training_docs():
                raise UserError(
                    f"task {name!r} has no training split to draw prompts from; choose a task that has one, name a data set under prompts, "
                    "or, for models that a tier builds, tasks under build.shares"
                )
            pairs += [(name, doc) for doc in (task.training_docs() if split == "train" else task.eval_docs)]
        return pairs

    def asked(self, split: Literal["train", "test"]) -> list[tuple[str, str]]:
        """``(task, question)`` of every document in `docs`: the task's own text, without few-shot examples."""
        return [(task, str(self.tasks[task].doc_to_text(doc))) for task, doc in self.docs(split)]

    def put(self, text: str) -> str:
        """What a model is given for ``text``: the text itself, or a chat up to where the answer begins."""
        return text if self.chat is None else chat_text(self.chat, text)

    def text(self, task: str, doc: Any) -> str:
        """What a model is given for a training document."""
        return self.put(str(self.tasks[task].doc_to_text(doc)))

    def posed(self, chosen: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
        """``(task, prompt)`` of documents such as `first_docs`, as `evaluate` puts them: with examples and the beginning of the answer."""
        for name in {name for name, _ in chosen}:
            self.tasks[name].set_fewshot_seed(DEFAULT_OTHER_SEED)
        return [(name, self._posed(self.tasks[name], doc)) for name, doc in chosen]

    def _posed(self, task: Task, doc: Any) -> str:
        prefix, asked = task.doc_to_prefix(doc), {}
        if self.chat is not None:
            template = partial(self.chat.apply_chat_template, tokenize=False, continue_final_message=bool(prefix))
            asked = {"apply_chat_template": True, "chat_template": template}
        context: Any = task.fewshot_context
        return context(doc, task.config.num_fewshot or 0, gen_prefix=prefix, **asked)

    def prompts(self, split: Literal["train", "test"]) -> list[tuple[str, str]]:
        """``(task, prompt)`` of every document in `docs`, as a model is given it."""
        return [(task, self.put(text)) for task, text in self.asked(split)]

    def first_docs(self, count: int) -> list[tuple[str, Any]]:
        """``(task, document)`` of the first ``count`` evaluation documents of each task that counts."""
        return [(name, doc) for name, task in self.scored.items() for doc in islice(task.eval_docs, count)]

    def score(self, task: str, docs: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """The score of each response to its document, as ``evaluate`` would give it; for tasks that generate."""
        of = self.tasks[task]
        taken = self._filtered(task, docs, responses)
        found = [cast(dict[str, Any], of.process_results(doc, [text])) for doc, text in zip(docs, taken, strict=True)]
        metric = next((metric for metric in cast(dict[str, Any], of.aggregation()) if found and metric in found[0]), "")
        return [float(values[metric]) for values in found]

    def taken(self, task: str, responses: Sequence[str]) -> list[str]:
        """What the task's first filter takes from each response: the answer in it, or all of it."""
        return list(map(str, self._filtered(task, [{}] * len(responses), responses)))

    def _filtered(self, task: str, docs: Sequence[Any], responses: Sequence[str]) -> list[Any]:
        of = self.tasks[task]
        stops = (of.config.generation_kwargs or {}).get("until") or []
        of._instances = [
            Instance("generate_until", doc, ("", {}), row, metadata=(task, row, 1), resps=[_until(text, stops)])
            for row, (doc, text) in enumerate(zip(docs, responses, strict=True))
        ]
        if not of._instances:
            return []
        of.apply_filters()
        first = next(iter(of._instances[0].filtered_resps))
        return [each.filtered_resps[first] for each in of._instances]


def _until(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of ``stops``."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def unique_solution(task: Task) -> bool:
    """Whether the task says that the ``solution`` in its documents is the only one."""
    return bool((task.config.metadata or {}).get("unique_solution"))


def overlap(suite: TaskSuite) -> dict[str, float]:
    """By task, the share of its evaluation documents that are met among the training documents of any task.

    Documents with an ``identity`` (procedural problems) are the same where that is; texts where the prompt shares a run of
    ``NGRAM`` words with a training prompt, or is shorter and equal to one (as in Brown et al. 2020, arXiv 2005.14165, appendix C).
    """
    train: set[tuple[str, ...]] = set()
    for task in suite.scored.values():
        for doc in task.training_docs() if task.has_training_docs() else ():
            train |= _fingerprints(task, doc)
    return {name: fmean(not train.isdisjoint(_fingerprints(task, doc)) for doc in task.eval_docs) for name, task in suite.tasks.items()}


def met(suite: TaskSuite, texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """For the ``texts`` of each prompt, the tasks with an evaluation document that shares a run of words with one, as in `overlap`."""
    tasks: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name, task in suite.tasks.items():
        for doc in task.eval_docs:
            for run in _runs(str(task.doc_to_text(doc))):
                tasks[run].add(name)
    return [sorted({name for text in own for run in _runs(text) if run in tasks for name in tasks[run]}) for own in texts]


def _fingerprints(task: Task, doc: Any) -> set[tuple[str, ...]]:
    return {(str(doc["identity"]),)} if "identity" in doc else _runs(str(task.doc_to_text(doc)))


def _runs(text: str) -> set[tuple[str, ...]]:
    """Every run of ``NGRAM`` words, or all of a shorter text."""
    words = text.lower().split()
    return {tuple(words[start : start + NGRAM]) for start in range(max(1, len(words) - NGRAM + 1))}


def load_suite(
    stem: Sequence[str],
    coding: Sequence[str],
    include_path: Path,
    split: Literal["test", "validation"] = "test",
    chat: PreTrainedTokenizerBase | None = None,
    data_dir: Path | None = None,
    **beside: Sequence[str],
) -> TaskSuite:
    """Load tasks by the name of a task or group, from ``include_path`` first, else from those lm-eval ships.

    ``beside`` names, by the groups of `standard.BESIDE`, those that count for no score. ``data_dir`` holds copies of hub data sets
    (`provision.py`). Standard tasks get the settings of their catalogue. With ``split`` "validation" the evaluation documents are the
    development ones; the test documents and those beside the score are out of reach.

    Raises UserError for an unknown name, a task named twice, a split it does not have, a task that compares likelihoods and would count
    for the score, or data or packages that cannot be had.
    """
    tasks: dict[str, Task] = {}
    groups: dict[str, str] = {}
    named = {"stem": stem, "coding": coding, **(beside if split == "test" else {})}
    with quiet(), provided(data_dir):
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        manager = _manager(own, include_path, [name for names in named.values() for name in names])
        for group, names in named.items():
            for name in names:
                if name not in manager.task_index:
                    near = get_close_matches(name, manager.all_tasks, n=1) or own.all_tasks
                    raise UserError(f"unknown task {name!r}{did_you_mean(name, near)}")
                loaded = _loaded(manager, name, None if name in own.task_index else standard.TASKS.get(name))
                if twice := tasks.keys() & loaded.keys():
                    raise UserError(f"task {min(twice)!r} is named twice; name it once, in one group")
                tasks |= loaded
                groups |= dict.fromkeys(loaded, group)
    for name, task in tasks.items():
        if groups[name] in GROUPS and task.OUTPUT_TYPE != "generate_until":
            raise UserError(
                f"task {name!r} compares the likelihoods of given answers, so it cannot show exposure bias; put it under retention, "
                "where it is shown and counts for no score"
            )
        if split == "validation":
            if not (task.has_validation_docs() and task.has_test_docs()):
                raise UserError(f"task {name!r} has no validation split to tune on; choose a task that has one")
            task.config.test_split = None
        elif task.config.training_split == (task.config.test_split or task.config.validation_split):
            task.config.training_split = None  # what is evaluated on is not trained on
    suite = TaskSuite(tasks, groups, chat)
    if not suite.scored:
        raise UserError("no tasks to evaluate; name at least one under stem or coding")
    return suite


def _manager(own: TaskManager, include_path: Path, names: list[str]) -> TaskManager:
    """One that knows ``names``: ``own``, or with the folders of standard tasks, or, slowly, with all that lm-eval ships."""
    foreign = [name for name in names if name not in own.task_index]
    if not foreign:
        return own
    if any(name not in standard.TASKS for name in foreign):
        return TaskManager(include_path=str(include_path))
    folders = {str(Path(shipped.__file__).parent / standard.TASKS[name].folder) for name in foreign}
    return TaskManager(include_path=[*sorted(folders), str(include_path)], include_defaults=False)


def _loaded(manager: TaskManager, name: str, known: standard.Standard | None) -> dict[str, Task]:
    """The tasks of ``name``, with the settings of the catalogue where it is a standard one."""
    state = random.getstate()
    random.seed(DEFAULT_RANDOM_SEED)  # some shuffle answers; every process must do it alike, and as the stock command does
    try:
        loaded = manager.load(name)["tasks"]
        if known and known.nltk:
            import nltk

            nltk.data.find(known.nltk)
    except UserError as error:
        raise UserError(f"task {name!r}: {error}") from error
    except Exception as error:  # whatever a data set's loader or a task's own code raises
        if known and known.extra and isinstance(error, (ImportError, AssertionError)):
            raise UserError(f"task {name!r} needs packages that are not installed: run pip install 'lm-eval[{known.extra}]'") from error
        if known and known.nltk and isinstance(error, LookupError):
            resource = Path(known.nltk).name
            raise UserError(f"task {name!r} needs nltk's {resource}: run python -m nltk.downloader {resource}") from error
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load the data of task {name!r}, or there is none: {said}") from error
    finally:
        random.setstate(state)
    if known:
        for task in loaded.values():
            _settle(task, known)
    return loaded


def _settle(task: Any, known: standard.Standard) -> None:
    """Give ``task`` the settings of the catalogue; the first of its filters and of its metrics is the one that counts."""
    if known.num_fewshot is not None:
        task.set_config("num_fewshot", known.num_fewshot)
    if known.max_gen_toks is not None:
        task.set_config("generation_kwargs", {"max_gen_toks": known.max_gen_toks}, update=True)
    task._filters.sort(key=lambda one: one.name != known.filter)
    if known.metric is not None:
        task._aggregation_list = {known.metric: task._aggregation_list.pop(known.metric), **task._aggregation_list}
    if known.runs_code:
        task.config.metadata["sandboxed"] = True  # `provided` saw to it


def tasks_of(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> TaskSuite:
    """The tasks of ``config``, as its models with this tokenizer are asked; without one, as they stand."""
    tasks, chat = config.tasks, tokenizer if config.chat else None
    beside = {group: getattr(tasks, group) for group in BESIDE}
    data_dir = Path(tasks.data_dir).expanduser() if tasks.data_dir else None
    suite = load_suite(tasks.stem, tasks.coding, config.task_path, config.evaluation.split, chat, data_dir, **beside)
    for name, task in suite.scored.items():
        if config.privileged and (task.config.num_fewshot or task.config.gen_prefix):
            raise UserError(
                f"privileged needs tasks without few-shot examples and without a given beginning of the answer; leave out {name!r}"
            )
    return suite


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: TaskSuite,
    *,
    batch_size: int = 250,
    max_length: int | None = None,
    sampled: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> list[Item]:
    """Score ``model`` on the evaluation documents of ``suite``, in the order of tasks and documents.

    Responses are generated as each task says (greedily), or with ``sampled`` from the model's full distribution at
    temperature 1 under ``seed``, and only where a task counts for the score. ``max_length`` is the context in tokens (default: the
    model's), ``limit`` the number of documents per task. Leaves train mode and random states as they were.

    Raises UserError when generated code cannot be run safely, a prompt does not fit the context, or a metric has no
    value per document.
    """
    consent(suite)
    suite = replace(suite, tasks=suite.scored) if sampled else suite
    with quiet(), undisturbed(model, seed), decoding(suite, sampled):
        # The wrapper around `evaluate`, `simple_evaluate`, would also collect facts about the machine by subprocesses.
        lm = UncutHFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, enable_thinking=False)
        for name, task in suite.tasks.items():
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
            longest = (task.config.generation_kwargs or {}).get("max_gen_toks", lm.max_gen_toks)
            if task.OUTPUT_TYPE == "generate_until" and longest >= lm.max_length:
                raise UserError(
                    f"task {name!r} generates up to {longest} tokens, the model's context is {lm.max_length}; choose another task or model"
                )
        results = evaluator.evaluate(
            lm,
            {"tasks": suite.tasks},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            confirm_run_unsafe_code=True,
            apply_chat_template=suite.chat is not None,
        )
    samples = cast(dict[str, Any], results)["samples"]
    return [item for name, rows in samples.items() for item in first_metric(suite.tasks[name], name, rows)]


def evaluate_each(teachers: Teachers, tokenizer: PreTrainedTokenizerBase, suite: TaskSuite, **settings: Any) -> list[Item]:
    """`evaluate` of every task's own teacher."""
    items, names = [], list(suite.scored if settings.get("sampled") else suite.tasks)
    for model, places in teachers.groups(names):
        own = replace(suite, tasks={names[place]: suite.tasks[names[place]] for place in places})
        items += evaluate(model, tokenizer, own, **settings)
    return items


def scores(items: list[Item], suite: TaskSuite) -> dict[str, float]:
    """Means in 0..1: ``stem`` and ``coding`` over their tasks, ``score`` over the two; a group without tasks is left out."""
    by_task = defaultdict(list)
    for item in items:
        by_task[item.task].append(item.score)
    means = {group: [fmean(by_task[name]) for name in suite.groups if suite.groups[name] == group] for group in GROUPS}
    by_group = {group: fmean(values) for group, values in means.items() if values}
    return {**by_group, "score": fmean(by_group.values())}


def first_metric(task: Task, name: str, rows: list[dict[str, Any]]) -> list[Item]:
    """The rows of the task's first filter, with its first metric."""
    metric = next(metric for metric in cast(dict[str, Any], task.aggregation()) if metric in rows[0]["metrics"])
    chosen = [row for row in rows if row["filter"] == rows[0]["filter"]]
    if not np.isscalar(chosen[0][metric]):
        raise UserError(f"metric {metric!r} of task {name!r} has no value per document; choose another task")
    responses = [row["resps"][0][0] for row in chosen]
    return [
        Item(name, row["doc_hash"], float(row[metric]), response if isinstance(response, str) else "", row["doc"].get("steps"))
        for row, response in zip(chosen, responses, strict=True)
    ]


class UncutHFLM(HFLM):
    """Refuses a prompt too long for the context, where lm-eval would cut it from the left, and decodes faster where it may."""

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        ids_BT, mask_BT = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len and ids_BT.shape[1] > left_truncate_len:
            raise UserError(
                f"a prompt has {ids_BT.shape[1]} tokens, the context leaves {left_truncate_len} for it; choose another task or model"
            )
        return ids_BT, mask_BT

    def _loglikelihood_tokens(self, requests, *arguments, **options):
        longest = max((len(context) + len(answer) for _, context, answer in requests), default=0)
        if longest > self.max_length + 1:  # the last token is never read
            raise UserError(
                f"a prompt with its answer has {longest} tokens, the context is {self.max_length}; choose another task or model"
            )
        return super()._loglikelihood_tokens(requests, *arguments, **options)

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        """What ``generate`` would write, by our own sampler where a response ends at EOS alone and nothing else bends the distribution."""
        asked = {name: value for name, value in generation_kwargs.items() if name != "attention_mask"}
        sampled = asked == SAMPLED
        greedy = asked.keys() <= {"do_sample", "temperature"} and not asked.get("do_sample") and not asked.get("temperature")
        bending = self.model.generation_config.to_diff_dict().keys() - NEUTRAL - (SAMPLED.keys() - {"repetition_penalty"} | asked.keys())
        ends = self.model.generation_config.eos_token_id
        others = set(ends if isinstance(ends, list) else [ends]) - {self.eot_token_id, None}
        if set(stop) - {self.tokenizer.decode(self.eot_token_id)} or not (sampled or greedy) or bending or others:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        mask_BT = generation_kwargs["attention_mask"].bool()
        prompts = Prompts([ids_T[real_T].tolist() for ids_T, real_T in zip(context, mask_BT, strict=True)], [""] * len(context))
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()))) if sampled else None
        most = max_length - context.shape[1]
        rollouts = sample(self.model, prompts, max_response=most, eos=self.eot_token_id, generator=generator)
        written_BT = torch.full((len(context), most), self.eot_token_id)
        for row in range(len(rollouts)):
            response = rollouts.response(row)
            written_BT[row, : len(response)] = torch.tensor(response)
        return torch.cat([context, written_BT.to(context.device)], 1)


def consent(suite: TaskSuite) -> None:
    """Make sure that generated code runs in our sandbox, or that the user has agreed to run it without."""
    for name, task in suite.tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            if (task.config.metadata or {}).get("sandboxed"):
                sandbox.isolation()
            elif os.environ.get(sandbox.CONSENT) != "1":
                raise UserError(f"task {name!r} runs generated code outside the sandbox; pass --unsafe-code to allow it")


@contextmanager
def decoding(suite: TaskSuite, sampled: bool) -> Iterator[None]:
    """Generate as the tasks say, or by sampling for as long as this lasts."""
    configured = {name: task.config.generation_kwargs for name, task in suite.tasks.items()}
    try:
        for name, task in suite.tasks.items():
            if sampled and task.OUTPUT_TYPE == "generate_until":
                task.config.generation_kwargs = {**(configured[name] or {}), **SAMPLED}
        yield
    finally:
        for name, task in suite.tasks.items():
            task.config.generation_kwargs = configured[name]


@contextmanager
def undisturbed(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Seed everything, then put back each module's train mode and the random states."""
    training = {module: module.training for module in model.modules()}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    on_cuda = next(model.parameters()).device.type == "cuda"
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_cuda else []):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for module, mode in training.items():
                module.training = mode


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and of the libraries below only errors."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lm_eval", "transformers", "datasets", "huggingface_hub"))}
    initialise = tqdm.__init__

    def disabled(self, *args, **kwargs):
        initialise(self, *args, **{**kwargs, "disable": True})

    try:
        tqdm.__init__ = disabled
        for logger in levels:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        tqdm.__init__ = initialise
        for logger, level in levels.items():
            logger.setLevel(level)

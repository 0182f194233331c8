"""One arm from start to finish: train under the budget, evaluate, record rollouts, leave a folder of files.

The references (the teacher, and the student as it starts) are evaluated by the same code.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_bench import backends, continuations, evaluate, flops, lora, retention, store, training_prompts
from opd_bench.bench import Bench
from opd_bench.config import Config, digest
from opd_bench.engine import TorchEngine
from opd_bench.errors import UserError, did_you_mean
from opd_bench.exposure import Recording
from opd_bench.judge import Answer, Judge, Reader
from opd_bench.judge_verifier import Verifier
from opd_bench.ledger import Ledger
from opd_bench.models import Pair, context, load_pairs, load_specialist, token_count
from opd_bench.plan import TEACHER, Job
from opd_bench.privilege import Privilege, grant, privilege_of
from opd_bench.prompts import Corpus, MixedStream, Stream, encode_prompts
from opd_bench.rollouts import Sampler, converted
from opd_bench.sequences import Mix
from opd_bench.stages import Recipe, peak_lr, stages_of
from opd_bench.statistics import auroc
from opd_bench.teachers import Teachers
from opd_bench.trace import Counter, worst_case
from opd_bench.tracking import Log
from opd_bench.train import Progress, train
from opd_bench.training_prompts import Pool, Prompt

Report = Callable[[str, float], None]  # stage, share of it that is done


@dataclass(frozen=True)
class Workshop:
    """All that the arms of a configuration share, loaded once per process."""

    config: Config
    pairs: list[Pair]  # a cold start each; teacher and tokenizer are the same in all
    teachers: Teachers
    suite: evaluate.TaskSuite
    pool: Pool
    judge: Judge
    verifier: Verifier
    reader: Reader
    encoded: list[tuple[str, list[int]]]
    counter: Counter

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that can be trained on."""
        return self.counter.max_prompt + self.config.max_response

    @cached_property
    def sampler(self) -> Sampler:
        """Started where an arm trains, and nowhere else."""
        return backends.sampler_of(self.config, token_count(self.pair.tokenizer), self.longest)

    @property
    def pair(self) -> Pair:
        """For what does not depend on the cold start."""
        return self.pairs[0]

    def measured(self, model: PreTrainedModel) -> PreTrainedModel:
        """``model`` as it is scored and recorded: with its weights rounded to the precision of the teacher's."""
        dtype = getattr(torch, self.config.dtype)
        return model if model.dtype == dtype else converted(model, dtype)

    def record(self, models: Teachers, seed: int, corpus_folder: Path, *, full: bool, continued: int) -> Recording:
        """``models`` beside each task's teacher on the first evaluation prompts of every task, the same for all arms."""
        count, kept = self.config.exposure.prompts, corpus_folder / f"seed-{seed}" / "exposure"
        asked = [task for task, _ in self.suite.first_docs(count)]
        parts = [
            (
                continuations.record(
                    models.of(asked[rows[0]]),
                    teacher,
                    self.pair.tokenizer,
                    replace(self.suite, tasks={asked[row]: self.suite.tasks[asked[row]] for row in rows}),
                    count=count,
                    max_response=self.config.max_response,
                    seed=seed,
                    kept=kept / str(number) if number else kept,
                    full=full,
                    continued=continued,
                ),
                rows,
            )
            for number, (teacher, rows) in enumerate(self.teachers.groups(asked))
        ]
        return continuations.joined(parts)

    def items(self, models: Teachers, *, limit: int | None, sampled: bool = False, seed: int = 0) -> list[evaluate.Item]:
        size = self.config.evaluation.batch_size
        return evaluate.evaluate_each(models, self.pair.tokenizer, self.suite, batch_size=size, limit=limit, sampled=sampled, seed=seed)

    def engine(self, job: Job, student: PreTrainedModel, lr: float, corpus_folder: Path) -> TorchEngine:
        folder = corpus_folder / f"seed-{job.seed}"
        stream, corpus = self.texts(job.seed, folder, ())
        if self.config.lora:
            student = lora.adapted(student, rank=self.config.lora.rank, alpha=self.config.lora.alpha, seed=job.seed)
        return TorchEngine(
            student=student,
            teacher=backends.teacher_of(self.config, self.pair, self.teachers, self.longest, folder),
            sampler=backends.paced(self.config, self.sampler, student),
            eos=self.pair.eos,
            max_response=self.config.max_response,
            stream=stream,
            corpus=corpus,
            mixed=partial(self.texts, job.seed, folder),
            judge_model=backends.judge_in(self.judge, corpus_folder.parent),
            reader=self.reader,
            lr=lr,
            seed=job.seed,
            gradient_checkpointing=self.config.gradient_checkpointing,
            dtype=getattr(torch, self.config.dtype),
            privilege=privilege_of(self.pair.teacher),
        )

    def texts(self, seed: int, folder: Path, mix: Mix) -> tuple[Stream | MixedStream, Corpus]:
        """The seed's prompts in the proportions of ``mix``, and the teacher's text for them, which is kept in ``folder``."""
        stream = MixedStream(self.encoded, seed, mix) if mix else Stream(self.encoded, seed)
        kept = folder / f"mix-{digest(dict(mix))}" if mix else folder
        return stream, Corpus(self.teachers, stream, self.pair.eos, self.config.max_response, kept)

    def bench(self, engine: TorchEngine, limit: float) -> Bench:
        ledger = Ledger(limit, self.config.axis)
        return Bench(engine, ledger, self.counter.student_flops, self.counter.teacher_flops, batch=0, seed=engine.seed)


@lru_cache(maxsize=1)
def workshop(config_json: str) -> Workshop:
    """Load models and tasks. UserError where they do not fit together."""
    config = Config.model_validate_json(config_json)
    code = {"remote_code": config.trust_remote_code}
    folders = [config.location(name) for name in (*config.students, config.teacher)]
    pairs = load_pairs(folders[:-1], folders[-1], getattr(torch, config.dtype), device=config.device, eos=config.eos, **code)
    pair = pairs[0]
    suite = evaluate.tasks_of(config, pair.tokenizer)
    room = context(pair.student, pair.teacher) - config.max_response
    pool = _pool(config, suite, pair.tokenizer, room)
    asked = [prompt.question for prompt in pool.prompts]
    encoded = encode_prompts([(prompt.source, prompt.given(suite.chat)) for prompt in pool.prompts], pair.tokenizer, room)
    verifier = _verifier(suite, [] if config.prompts else [(prompt.source, prompt.question) for prompt in pool.prompts])
    judge = backends.judge_of(config, replace(pair, teacher=copy.copy(pair.teacher)), suite, asked, verifier)
    if config.privileged:
        privileged = [*pool.prompts, *_documents(suite, "test")]
        grant(pair.teacher, _privilege(privileged, suite.chat, pair.tokenizer, config.privileged, room))  # not to the judge
    counter = Counter(
        max_prompt=max(len(ids) for _, ids in encoded),
        max_response=config.max_response,
        max_check=0,
        question_tokens=0,
        student_flops=flops.flop_count(
            pair.student.config,
            lora_rank=config.lora.rank if config.lora else 0,
            checkpointing=config.gradient_checkpointing,
            **code,
        ),
        teacher_flops=flops.flop_count(pair.teacher.config, **code),
        most_extra=privilege.most_extra if (privilege := privilege_of(pair.teacher)) else 0,
        judge_model=judge,
    )
    longest = judge.worst(torch.tensor([counter.max_prompt + config.max_response])).tokens
    if judge.context is not None and longest > judge.context:
        said = f"the judge may need {longest} tokens and its context is {judge.context}"
        raise UserError(f"{said}; lower max_response{' or judge.max_check' * (config.judge.by == 'check')}")
    reader = Reader(pair.tokenizer, {tuple(ids): text for (_, ids), text in zip(encoded, asked, strict=True)})
    return Workshop(config, pairs, _teachers(config, pair, suite, encoded), suite, pool, judge, verifier, reader, encoded, counter)


def forget() -> None:
    """Let go of what `workshop` loaded, and of the memory it took."""
    workshop.cache_clear()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _teachers(config: Config, pair: Pair, suite: evaluate.TaskSuite, encoded: list[tuple[str, list[int]]]) -> Teachers:
    """The teacher, and specialists by task and source of prompts. UserError for one that nothing would go to."""
    models: dict[str, PreTrainedModel] = {}
    routed: dict[str, PreTrainedModel] = {}
    known = {*suite.tasks, *(source for source, _ in encoded)}
    for name, model in sorted(config.teachers.items(), key=lambda pair: pair[0] not in suite.groups.values()):  # groups first
        own = [task for task, group in suite.groups.items() if group == name] or [name]
        if unknown := next((task for task in own if task not in known), None):
            near = did_you_mean(unknown, [*evaluate.GROUPS, *known])
            raise UserError(f"teachers: there is no group, task or source of prompts {unknown!r}{near}")
        location = config.location(model)
        models[location] = models.get(location) or load_specialist(location, pair, eos=config.eos, remote_code=config.trust_remote_code)
        routed |= dict.fromkeys(own, models[location])
    return Teachers(pair.teacher, routed, {tuple(ids): source for source, ids in encoded} if routed else {})


def _documents(suite: evaluate.TaskSuite, split: Literal["train", "test"]) -> list[Prompt]:
    return [Prompt.of(task, str(suite.tasks[task].doc_to_text(doc)), doc) for task, doc in suite.docs(split)]


def _pool(config: Config, suite: evaluate.TaskSuite, tokenizer: PreTrainedTokenizerBase, room: int) -> Pool:
    """What is trained on: the tasks' own documents, or the prompts of data sets that meet no evaluation document and fit the context."""
    if not config.prompts:
        return Pool(_documents(suite, "train"), {})
    pool = training_prompts.load(config.prompt_sources)
    met = evaluate.met(suite, [prompt.texts for prompt in pool.prompts])
    return pool.without("contaminated", [" and ".join(tasks) for tasks in met]).fitting(tokenizer, suite.chat, config.privileged, room)


def _privilege(
    prompts: list[Prompt], chat: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase, template: str, room: int
) -> Privilege:
    """What the teacher is shown for each of ``prompts``."""
    plain, shown = ([(prompt.source, prompt.given(chat, form)) for prompt in prompts] for form in (None, template))
    pairs = zip(encode_prompts(plain, tokenizer, room), encode_prompts(shown, tokenizer, room), strict=True)
    return Privilege({tuple(ids): more for (_, ids), (_, more) in pairs})


def _verifier(suite: evaluate.TaskSuite, asked: list[tuple[str, str]]) -> Verifier:
    """Knows the training documents, whose questions are ``asked``, of the tasks that generate."""
    writing = {name: task for name, task in suite.scored.items() if asked and task.OUTPUT_TYPE == "generate_until"}
    seen: dict[str, int] = dict.fromkeys(suite.scored, -1)
    places: dict[str, tuple[str, int]] = {}
    for name, text in asked:
        seen[name] += 1
        if name in writing:
            places.setdefault(text, (name, seen[name]))
    return Verifier(suite.score, places, {name: _rows(task.training_docs()) for name, task in writing.items()})


def _rows(documents: Any) -> Any:
    return documents if hasattr(documents, "__getitem__") else list(documents)


def run(config: Config, job: Job, out: Path, report: Report) -> None:
    """Carry out ``job`` and leave its folder under ``out``. RunError if the method fails, UserError for a full disk."""
    shop = workshop(config.model_dump_json())
    logged = Log(config.log if job.method else None, job, out)
    with store.disk_errors(), closing(logged) as log, store.whole_folder(job.folder(out)) as folder:
        start = time.perf_counter()
        summary = {"run_id": job.run_id, "name": job.name, "seed": job.seed, "seconds": {}}
        if job.method is None:
            models = shop.teachers if job.name == TEACHER else Teachers(shop.measured(shop.pairs[job.start].student))
        else:
            models = Teachers(shop.measured(_train(shop, job, out, folder, summary, report, log)))
        apart = (summary["seconds"].get(stage, 0.0) for stage in ("points", "verification"))
        summary["seconds"]["train"] = time.perf_counter() - start - sum(apart)  # with branches
        rows, seconds = _measure(shop, job, models, out, folder, ("greedy", "sampled"), report)
        summary["seconds"] |= seconds
        log(_means(rows))
        if shop.config.retention.prompts and (job.method or job.name == TEACHER) and not models.routed:
            report("measuring retention", 0.8)
            summary["retention"] = _retention(shop, job, models.default, out)
        if "judge" in summary.get("saw", []):
            report("auditing the judge", 0.9)
            summary["judge_auroc"] = _audit(shop, rows, backends.judge_in(shop.judge, out), folder)
        summary["wall_s"] = time.perf_counter() - start
        store.write_json(folder / "arm.json", summary)
        report("done", 1.0)


def _means(rows: list[dict]) -> dict[str, float]:
    """Scores by decoding and task."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(f"{row['decoding']}/{row['task']}", []).append(row["score"])
    return {name: fmean(values) for name, values in found.items()}


def _train(shop: Workshop, job: Job, out: Path, folder: Path, summary: dict, report: Report, log: Log) -> PreTrainedModel:
    """Train ``job`` for its budget and for each smaller one; what those come to is scored at once, in a folder each."""
    budgets, cooldown, steps = shop.config.budgets, shop.config.cooldown, []
    smaller = [budgets[share] for share in shop.config.budget.points]
    summary |= {"points": [], "seconds": {"branches": 0.0, "points": 0.0, "verification": 0.0}}

    def start(limit: float) -> tuple[Recipe, Bench]:
        torch.manual_seed(job.seed)
        recipe, student = job.build(), copy.deepcopy(shop.pairs[job.start].student)
        return recipe, shop.bench(shop.engine(job, student, peak_lr(recipe), out / "corpus"), limit)

    def on_step(progress: Progress) -> None:
        begun = time.perf_counter()
        values = {**asdict(progress), **_verified(shop, _engine(bench))}
        steps.append({**values})
        values |= {"flops": sum(bench.ledger.by_kind().values()), "lr_scale": bench.lr_scale()}
        log(values, progress.step)
        summary["seconds"]["verification"] += time.perf_counter() - begun
        report("training", progress.share)

    def on_branch(_: Recipe, branch: Bench) -> None:
        begun, share = time.perf_counter(), shop.config.budget.points[len(summary["points"])]
        report("training, scoring on the way", share)
        summary["points"].append({"share": share, "spent": _spent(branch)})
        _measure(shop, job, Teachers(shop.measured(_student(branch))), out, store.point_folder(folder, share), ("greedy",))
        own = (charge for charge in branch.ledger.charges if charge.step > bench.ledger.step)
        summary["seconds"]["branches"] += sum(charge.seconds for charge in own if charge.kind != "teacher_generate")  # sampled once for all
        summary["seconds"]["points"] += time.perf_counter() - begun

    recipe, bench = start(budgets[1.0])
    if recipe.own_schedule:
        for limit in smaller:
            other, own = start(limit)
            train(other, own, shop.counter, cooldown, lambda progress: None)
            on_branch(other, own)
        smaller = []
    train(recipe, bench, shop.counter, cooldown, on_step, smaller, on_branch)
    last = stages_of(recipe)[-1].method
    summary |= {
        "share_spent": bench.ledger.share,
        "unit_share": worst_case(last, last.unit, shop.counter, axis=bench.ledger.axis).spent / budgets[1.0],
        "spent": _spent(bench),
        "saw": bench.ledger.saw(),
        "mismatch": {**asdict(mismatch), "mean": mismatch.mean} if (mismatch := _engine(bench).mismatch).tokens else None,
        "judge": _judge(bench, steps),
        "prompts": bench.position,
        "own_schedule": recipe.own_schedule and bool(summary["points"]),
    }
    store.write_jsonl(folder / "ledger.jsonl", (asdict(charge) for charge in bench.ledger.charges))
    store.write_jsonl(folder / "steps.jsonl", steps)
    student = _student(bench)
    student.save_pretrained(folder)
    shop.pair.tokenizer.save_pretrained(folder)
    return student


def _engine(bench: Bench) -> TorchEngine:
    assert isinstance(bench.engine, TorchEngine)
    return bench.engine


def _student(bench: Bench) -> PreTrainedModel:
    return _engine(bench).plain


def _spent(bench: Bench) -> dict[str, dict]:
    return {unit: bench.ledger.by_kind(unit) for unit in ("flops", "tokens", "seconds")}


def _measure(
    shop: Workshop, job: Job, models: Teachers, out: Path, folder: Path, decodings: tuple[str, ...], report: Report = lambda *_: None
) -> tuple[list[dict], dict[str, float]]:
    """Leave the item table and the recording of ``models`` in ``folder``; the rows, and the seconds it took by stage."""
    settings, begun, rows = shop.config.evaluation, time.perf_counter(), []
    for place, decoding in enumerate(decodings):
        report(f"evaluating ({decoding})", place / 3)
        items = shop.items(models, limit=settings.limit, sampled=decoding == "sampled", seed=job.seed)
        rows += [{"decoding": decoding, **asdict(item)} for item in items]
    store.write_jsonl(folder / "items.jsonl", rows)
    evaluated = time.perf_counter()
    report("measuring exposure bias", 2 / 3)
    whole = len(decodings) > 1
    continued = shop.config.exposure.continued if whole and (job.method or job.name != TEACHER) else 0  # the teacher stands beside itself
    store.save_recording(folder / "recording.npz", shop.record(models, job.seed, out / "corpus", full=whole, continued=continued))
    return rows, {"evaluation": evaluated - begun, "exposure": time.perf_counter() - evaluated}


def _retention(shop: Workshop, job: Job, model: PreTrainedModel, out: Path) -> dict[str, list[float]]:
    settings, start = shop.config.retention, shop.measured(shop.pairs[job.start].student)
    kept = out / "corpus" / f"retention-{job.start}.pt"
    texts = retention.written(start, shop.pair.tokenizer, count=settings.prompts, max_response=settings.max_tokens, kept=kept)
    return {name: of_N.tolist() for name, of_N in retention.measure(model, start, texts).items()}


def _verified(shop: Workshop, engine: TorchEngine) -> dict[str, Any]:
    """Mean verdict and length of what was judged since the last step, and how much of it the tasks' own scorers hold right.

    After the fact, for the report alone: no method sees it, and nobody is charged for it.
    """
    taken, engine.judged[:] = [*engine.judged], []
    answers = [answer for some, _ in taken for answer in some]
    if not answers:
        return {}
    known = [score for score in shop.verifier.scores(answers) if score is not None]
    return {
        "judged": len(answers),
        "verdict": torch.cat([judgement.verdict_B for _, judgement in taken]).mean().item(),
        "unreadable": sum(int(judgement.unreadable_B.sum()) for _, judgement in taken),
        "verified": sum(known) / len(known) if known else None,
        "verifiable": len(known),
    }


def _judge(bench: Bench, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the verdicts came to; None where no judge was asked."""
    engine = _engine(bench)
    charges = [charge for charge in bench.ledger.charges if charge.kind == engine.judge_kind]
    if not charges:
        return None
    verdicts = sum(step.get("judged", 0) for step in steps) + sum(len(answers) for answers, _ in engine.judged)  # of a step cut short
    totals = {name: sum(getattr(charge, name) for charge in charges) for name in ("tokens", "flops", "seconds", "dollars")}
    return {"name": engine.judge_model.name, "kind": engine.judge_kind, "verdicts": verdicts, **totals}


def _audit(shop: Workshop, rows: list[dict], judge: Judge, folder: Path) -> dict[str, float | None]:
    """Leave what the judge says of the arm's own sampled responses in ``folder``, with its options in either order; the AUROC by task.

    Taken on the first evaluation items of each task, as many as the exposure measurement takes; None where all are right or all wrong.
    """
    questions, table, found, swapped = shop.suite.asked("test"), [], {}, judge.swapped()
    for task in shop.suite.scored:
        written = [row for row in rows if row["decoding"] == "sampled" and row["task"] == task][: shop.config.exposure.prompts]
        asked = [text for name, text in questions if name == task][: len(written)]  # in the order of the items
        texts = [shop.suite.put(text) + row["response"] for text, row in zip(asked, written, strict=True)]
        ids = shop.pair.tokenizer(texts, add_special_tokens=False).input_ids
        answers = [Answer(list(own), prompt, row["response"]) for own, prompt, row in zip(ids, asked, written, strict=True)]
        lengths = [len(own) for own in shop.pair.tokenizer([row["response"] for row in written], add_special_tokens=False).input_ids]
        judgement = judge(answers)
        verdicts, right = judgement.verdict_B.tolist(), [row["score"] > 0.5 for row in written]
        others = swapped(answers).verdict_B.tolist() if swapped else [None] * len(answers)
        columns = (written, verdicts, others, right, lengths, judgement.unreadable_B.tolist())
        table += [
            {"task": task, "doc": row["doc"], "verdict": verdict, "swapped": other, "right": so, "tokens": length, "unreadable": unread}
            for row, verdict, other, so, length, unread in zip(*columns, strict=True)
        ]
        found[task] = auroc(verdicts, right)
    store.write_jsonl(folder / "judged.jsonl", table)
    return found

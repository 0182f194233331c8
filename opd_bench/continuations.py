"""How a solution goes on from a piece of a rollout: from the student's own, from the teacher's, and after something went wrong in it.

    recording = record(student, teacher, tokenizer, suite, count=48, max_response=96, seed=0, kept=folder / "exposure")
    recording.continued["own 0.5"]  # N scores

Every continuation is greedy and, with the piece before
it, at most as long as a rollout; the task itself scores it. The teacher's own from corrupted pieces depend on the seed alone and are kept.

A piece is *still right* where its task says that solutions are unique (``unique_solution`` among the metadata of its YAML, the text under
``solution`` in its documents) and it is the beginning of the solution, corrected slips included; elsewhere where the whole rollout ended
right. A wrong result can be placed in unique solutions whose lines say every result twice.

Shapes: N prompts, M of them continued.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_bench import procedural, store
from opd_bench.evaluate import TaskSuite, unique_solution
from opd_bench.exposure import FRACTIONS, INJECTIONS, Array, Divergences, Recording
from opd_bench.measure import Rollouts, along
from opd_bench.models import context, eos_id
from opd_bench.prompts import encode_prompts
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts, Sequences

WRONG_TOKENS = {"0 tokens": 0, "1 token": 1, "2 tokens": 2, "4 tokens": 4}
ROWS = 128  # continued together: pieces of like length, so that little is padding
Piece = list[int] | None  # the tokens of a response so far; None where there is none


def record(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: TaskSuite,
    *,
    count: int,
    max_response: int,
    seed: int,
    kept: Path,
    full: bool = True,
    continued: int | None = None,
) -> Recording:
    """``student`` beside ``teacher`` on the first ``count`` evaluation documents of each task.

    The first ``continued`` of them (default: all) are continued, too. ``kept`` is a folder for what depends on teacher and seed alone.
    Without ``full`` only KL(T‖S) is recorded. UserError for a prompt that leaves no room for a response.
    """
    chosen = suite.first_docs(count)
    encoded = encode_prompts(suite.posed(chosen), tokenizer, context(student, teacher) - max_response)
    prompts = Prompts([ids for _, ids in encoded], [task for task, _ in encoded])
    rollouts = Rollouts.of(student, teacher, prompts, max_response=max_response, eos=eos_id(tokenizer), seed=seed, kept=kept)
    values, temperature = along(rollouts, full, kept)
    rows = [row for row, task in enumerate(prompts.tasks) if continued is None or row - prompts.tasks.index(task) < continued]
    found = Continuations(tokenizer, suite, [chosen[row][1] for row in rows]).record(rollouts[rows], kept) if rows else {}
    return Recording(values, {kind: _spread(score_M, rows, len(prompts)) for kind, score_M in found.items()}, temperature)


def joined(parts: Sequence[tuple[Recording, Sequence[int]]]) -> Recording:
    """One recording of prompts that were recorded apart, beside teachers of their own, each with the places of its prompts.

    τ of "matched" is the mean over prompts.
    """
    if len(parts) == 1:
        return parts[0][0]
    places = np.concatenate([rows for _, rows in parts])
    found = [part for part, _ in parts]

    def side(name: str, of: str) -> Any:
        return np.concatenate([getattr(recording.along[name], of) for recording in found])[places.argsort()]

    along = {name: Divergences(*(side(name, of.name) for of in fields(Divergences))) for name in found[0].along}
    missing = [np.full(len(rows), np.nan) for _, rows in parts]
    kinds = dict.fromkeys(kind for of in found for kind in of.continued)
    continued = {
        kind: np.concatenate([of.continued.get(kind, none_N) for of, none_N in zip(found, missing, strict=True)])[places.argsort()]
        for kind in kinds
    }
    known = [(of.temperature, len(rows)) for of, rows in parts if of.temperature is not None]
    return Recording(along, continued, float(np.average([of for of, _ in known], weights=[count for _, count in known])) if known else None)


def _spread(score_M: Array, rows: list[int], count: int) -> Array:
    """The scores of ``rows`` among ``count`` prompts, the others NaN."""
    score_N = np.full(count, np.nan)
    score_N[rows] = score_M
    return score_N


@dataclass(frozen=True)
class Continuations:
    """``docs`` are the documents of the prompts, in their order."""

    tokenizer: PreTrainedTokenizerBase
    suite: TaskSuite
    docs: Sequence[Any]

    def record(self, of: Rollouts, kept: Path) -> dict[str, Array]:
        """All kinds of ``Recording.continued``; ``kept`` is the folder of the seed's rollouts."""
        tasks, ends = of.prompts.tasks, {"own": _responses(of.own, of.eos), "teacher": _responses(of.theirs, of.eos)}
        found = {f"{side} 1": self._scores(tasks, pieces) for side, pieces in ends.items()}
        cut: dict[str, list[Piece]] = {f"{side} {at:g}": [_first(ids, at) for ids in ends[side]] for at in FRACTIONS for side in ends}
        for kind, pieces in cut.items():
            side, at = kind.split()
            found[f"{side} right {at}"] = self._still_right(tasks, pieces, found[f"{side} 1"])
        broken = self._broken(of, ends["teacher"], found["teacher 1"])
        student = {**cut, **{f"student after {what}": pieces for what, pieces in broken.items()}}
        rescued = {kind.replace("own", "rescued"): pieces for kind, pieces in cut.items() if kind.startswith("own")}
        found |= self._go_on(of.student, of, student) | self._go_on(of.teacher, of, rescued)
        return found | self._kept(of, {f"teacher after {what}": pieces for what, pieces in broken.items()}, kept / "teacher_after.npz")

    def _kept(self, of: Rollouts, pieces: dict[str, list[Piece]], path: Path) -> dict[str, Array]:
        if (found := store.load_arrays(path)) is None:
            found = self._go_on(of.teacher, of, pieces)
            store.save_arrays(path, found)
        return found

    def _go_on(self, model: PreTrainedModel, of: Rollouts, pieces: dict[str, list[Piece]]) -> dict[str, Array]:
        """Scores of what ``model`` makes of each piece, by kind; equal pieces are continued once."""
        places = {(row, tuple(ids)) for every in pieces.values() for row, ids in enumerate(every) if ids is not None}
        order = sorted(places, key=lambda place: (len(of.prompts.ids[place[0]]) + len(place[1]), place))
        whole: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for part in (order[at : at + ROWS] for at in range(0, len(order), ROWS)):
            prompts = Prompts([[*of.prompts.ids[row], *ids] for row, ids in part], [of.prompts.tasks[row] for row, _ in part])
            most = max(1, of.max_response - min(len(ids) for _, ids in part))
            written = _responses(sample(model, prompts, max_response=most, eos=of.eos, generator=None), of.eos)
            whole |= {(row, ids): [*ids, *more][: of.max_response] for (row, ids), more in zip(part, written, strict=True)}
        texts = {kind: [None if ids is None else whole[row, tuple(ids)] for row, ids in enumerate(every)] for kind, every in pieces.items()}
        return {kind: self._scores(of.prompts.tasks, every) for kind, every in texts.items()}

    def _scores(self, tasks: Sequence[str], responses: Sequence[Piece]) -> Array:
        """N scores, NaN where there is no response."""
        score_N = np.full(len(tasks), np.nan)
        for task in dict.fromkeys(tasks):
            rows = [row for row, ids in enumerate(responses) if ids is not None and tasks[row] == task]
            score_N[rows] = self.suite.score(task, [self.docs[row] for row in rows], [self._text(responses[row]) for row in rows])
        return score_N

    def _still_right(self, tasks: Sequence[str], pieces: Sequence[Piece], ended_right_N: Array) -> Array:
        return np.array(
            [
                float(procedural.still_right(solution, self._text(ids))) if (solution := self._solution(task, doc)) else right
                for task, doc, ids, right in zip(tasks, self.docs, pieces, ended_right_N, strict=True)
            ]
        )

    def _broken(self, of: Rollouts, theirs: list[list[int]], right_N: Array) -> dict[str, list[Piece]]:
        """The teacher's right responses up to something wrong in them, by injection."""
        rng, tasks = random.Random(f"injections {of.seed}"), of.prompts.tasks
        written = {
            task: sorted({token for ids, other in zip(theirs, tasks, strict=True) if other == task for token in ids}) for task in tasks
        }
        found: dict[str, list[Piece]] = {what: [None] * len(theirs) for what in INJECTIONS}
        for row, (ids, task, doc) in enumerate(zip(theirs, tasks, self.docs, strict=True)):
            if right_N[row] != 1:
                continue
            for what, count in WRONG_TOKENS.items():
                at = len(ids) // 2
                if len(ids) >= at + count and len(written[task]) > 1:
                    wrong = [rng.choice([token for token in written[task] if token != meant]) for meant in ids[at : at + count]]
                    found[what][row] = ids[:at] + wrong
            solution = self._solution(task, doc)
            text = procedural.corrupted(solution, rng) if solution else None
            if text is not None:
                found["wrong result"][row] = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return found

    def _solution(self, task: str, doc: Any) -> str | None:
        return doc["solution"] if unique_solution(self.suite.tasks[task]) else None

    def _text(self, ids: Piece) -> str:
        return str(self.tokenizer.decode(ids or [], skip_special_tokens=True))


def _responses(rollouts: Sequences, eos: int) -> list[list[int]]:
    """The tokens of each response, its EOS left out."""
    responses = [rollouts.response(row) for row in range(len(rollouts))]
    return [ids[:-1] if ended else ids for ids, ended in zip(responses, rollouts.finished_B.tolist(), strict=True)]


def _first(ids: list[int], fraction: float) -> list[int]:
    """``fraction`` of a response, rounded down, but a token at least where it has one."""
    return ids[: max(1, int(fraction * len(ids)))]

"""Recording what exposure bias is estimated from: teacher and student side by side along both models' own rollouts.

    rollouts = Rollouts.of(student, teacher, prompts, max_response=96, eos=1, seed=0, kept=folder / "exposure")
    recording = Recording(along(rollouts, full=True), {})

The teacher's rollouts depend on the seed alone and are kept in a file: all methods of a seed meet the same ones. How a solution goes on
from a piece of either is recorded by `continuations.py`.

Shapes: N prompts, T response positions, M response tokens of all rollouts together, V vocabulary, G temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from opd_bench import store
from opd_bench.engine import micro_batches, response_log_probs
from opd_bench.exposure import Divergences
from opd_bench.losses import entropy, kl
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts, Sequences

TOP = 8  # next tokens whose agreement is the support overlap
TEMPERATURES = (
    *np.geomspace(0.02, 1.0, 18).tolist(),
    *np.geomspace(1.0, 4.0, 8)[1:].tolist(),
)  # at which the student's entropy is looked at
MICRO_TOKENS = 8192
Table = dict[str, np.ndarray]  # NT by measure


@dataclass(frozen=True)
class Rollouts:
    """One rollout of the student and one of the teacher to each prompt, at temperature 1."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    prompts: Prompts
    own: Sequences
    theirs: Sequences
    max_response: int
    eos: int
    seed: int

    @classmethod
    def of(
        cls, student: PreTrainedModel, teacher: PreTrainedModel, prompts: Prompts, *, max_response: int, eos: int, seed: int, kept: Path
    ) -> Rollouts:
        """``kept`` is a folder in which the teacher's rollouts lie once they are sampled."""
        theirs = store.load_sequences(kept / "teacher.pt")
        if theirs is None:
            theirs = _written(teacher, prompts, max_response, eos, 1000 * seed + 2), 0.0
            store.save_sequences(kept / "teacher.pt", *theirs)
        own = _written(student, prompts, max_response, eos, 1000 * seed + 1)
        return cls(student, teacher, prompts, own, theirs[0], max_response, eos, seed)

    def __getitem__(self, rows: list[int]) -> Rollouts:
        """Those to the prompts in ``rows``."""
        prompts = Prompts([self.prompts.ids[row] for row in rows], [self.prompts.tasks[row] for row in rows])
        return replace(self, prompts=prompts, own=self.own[rows], theirs=self.theirs[rows])


def _written(writer: PreTrainedModel, prompts: Prompts, max_response: int, eos: int, seed: int, temperature: float = 1.0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    return sample(writer, prompts, max_response=max_response, eos=eos, generator=generator, temperature=temperature)


def along(of: Rollouts, full: bool) -> tuple[dict[str, Divergences], float | None]:
    """What ``Recording.along`` holds, and τ of "matched"; only KL(T‖S) and no τ unless ``full``.

    τ makes the student's mean entropy on the teacher's prefixes the teacher's; it is read off the entropies at 25 temperatures, linearly in
    their logarithm, and lies within 0.02 to 4.
    """
    generator = torch.Generator().manual_seed(1000 * of.seed + 3)
    entropy_G = np.zeros(len(TEMPERATURES))
    sides = [
        by_position(of.student, of.teacher, texts, of.max_response, generator, full, entropies)
        for texts, entropies in ((of.own, None), (of.theirs, entropy_G))
    ]
    alive = [alive_NT(texts, of.max_response) for texts in (of.own, of.theirs)]
    found = {name: Divergences(sides[0][name], alive[0], sides[1][name], alive[1]) for name in sides[0]}
    if not full:
        return found, None
    wanted = float(sides[1]["teacher_entropy"].sum())
    temperature = float(np.exp(np.interp(wanted, entropy_G, np.log(TEMPERATURES))))
    own = _written(of.student, of.prompts, of.max_response, of.eos, 1000 * of.seed + 4, temperature)
    matched = [
        by_position(of.student, of.teacher, texts, of.max_response, generator, False, None, temperature) for texts in (own, of.theirs)
    ]
    found["matched"] = Divergences(matched[0]["forward_kl"], alive_NT(own, of.max_response), matched[1]["forward_kl"], alive[1])
    return found, temperature


def alive_NT(rollouts: Sequences, max_response: int) -> np.ndarray:
    """Where a rollout is alive, its EOS included, from the first response token on."""
    return (torch.arange(max_response) < (rollouts.length_B - rollouts.prompt_B)[:, None]).numpy()


def by_position(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rollouts: Sequences,
    max_response: int,
    generator: torch.Generator,
    full: bool,
    entropy_G: np.ndarray | None = None,
    temperature: float = 1.0,
) -> Table:
    """Every measure at every living position; 0 elsewhere. The student is taken at ``temperature``.

    Adds to ``entropy_G`` the student's entropy at each of ``TEMPERATURES``, summed over positions.
    """
    alive, found = torch.from_numpy(alive_NT(rollouts, max_response)), {}
    for rows in micro_batches(rollouts, MICRO_TOKENS):
        part = rollouts[rows]
        t_MV, s_MV = response_log_probs(teacher, part), response_log_probs(student, part)
        if temperature != 1:
            s_MV = torch.log_softmax(s_MV / temperature, -1)
        for name, values_M in (_measures(t_MV, s_MV, generator) if full else {"forward_kl": kl(t_MV, s_MV)}).items():
            table_NT = found.setdefault(name, torch.zeros(len(rollouts), max_response, dtype=torch.float64))
            table_NT[rows[:, None].expand(-1, max_response)[alive[rows]], alive[rows].nonzero()[:, 1]] = values_M.double().cpu()
        if full and entropy_G is not None:
            entropy_G += [float(entropy(torch.log_softmax(s_MV / at, -1)).double().sum()) for at in TEMPERATURES]
    return {name: table_NT.numpy() for name, table_NT in found.items()}


def _measures(t_MV: torch.Tensor, s_MV: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Each (M,), from the log-probabilities of teacher and student."""
    fresh_M1 = torch.multinomial(t_MV.exp().cpu(), 1, generator=generator).to(t_MV.device)
    ours_MK, theirs_MK = (log_probs_MV.topk(min(TOP, log_probs_MV.shape[1])).indices for log_probs_MV in (s_MV, t_MV))
    return {
        "forward_kl": kl(t_MV, s_MV),
        "reverse_kl": kl(s_MV, t_MV),
        "total_variation": (t_MV.exp() - s_MV.exp()).abs().sum(-1) / 2,
        "log_ratio": (t_MV - s_MV).gather(1, fresh_M1)[:, 0],
        "teacher_entropy": entropy(t_MV),
        "student_entropy": entropy(s_MV),
        "support": (ours_MK[:, :, None] == theirs_MK[:, None, :]).sum((1, 2)) / ours_MK.shape[1],
    }

"""Recording what exposure bias is estimated from: teacher–student divergence along both models' own rollouts.

Shapes: N prompts, T response positions, M response tokens of all rollouts together.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from opd_bench import store
from opd_bench.engine import micro_batches, response_log_probs
from opd_bench.exposure import Divergences
from opd_bench.losses import kl
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts, Sequences

TOP = 8  # next tokens whose agreement is the support overlap


def divergences(
    student: PreTrainedModel, teacher: PreTrainedModel, prompts: Prompts, *, max_response: int, eos: int, seed: int, kept: Path
) -> Divergences:
    """KL(T‖S) at every response position of one rollout of the student and one of the teacher to each of ``prompts``.

    The teacher's rollouts depend on ``seed`` alone and lie in the file ``kept`` once sampled: all methods of a seed meet the same ones.
    """

    def written(writer: PreTrainedModel, salt: int) -> Sequences:
        generator = torch.Generator().manual_seed(1000 * seed + salt)
        return sample(writer, prompts, max_response=max_response, eos=eos, generator=generator)

    own = written(student, 1)
    found = store.load_sequences(kept)
    if found is None:
        found = written(teacher, 2), 0.0
        store.save_sequences(kept, *found)
    (student_NT, student_alive_NT, support), (teacher_NT, teacher_alive_NT, _) = (
        divergence_by_position(student, teacher, texts, max_response) for texts in (own, found[0])
    )
    return Divergences(student_NT, student_alive_NT, teacher_NT, teacher_alive_NT, support)


def divergence_by_position(
    student: PreTrainedModel, teacher: PreTrainedModel, rollouts: Sequences, max_response: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """KL(T‖S) (N, T) from the first response token on, where a rollout is alive (its EOS included), and the support overlap.

    Support overlap is the share of the ``TOP`` likeliest next tokens that both models name, averaged over the living positions.
    """
    named = 0
    values_NT = torch.zeros(len(rollouts), max_response)
    response_N = (rollouts.length_B - rollouts.prompt_B)[:, None]
    alive_NT = torch.arange(max_response) < response_N
    for rows in micro_batches(rollouts, 8192):
        part = rollouts[rows]
        teacher_MV, student_MV = response_log_probs(teacher, part), response_log_probs(student, part)
        kl_M = kl(teacher_MV, student_MV).cpu()
        likeliest = [log_probs_MV.topk(TOP).indices for log_probs_MV in (teacher_MV, student_MV)]
        named += int((likeliest[0][:, :, None] == likeliest[1][:, None, :]).sum())
        values_NT[rows[:, None].expand(-1, max_response)[alive_NT[rows]], alive_NT[rows].nonzero()[:, 1]] = kl_M
    return values_NT.double().numpy(), alive_NT.numpy(), named / (TOP * rollouts.response_tokens)

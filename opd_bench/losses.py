"""Per-token losses of distillation, as pure functions: the student's logits at N positions in, one loss per position out.

    loss = divergence("reverse_kl")
    loss_N = loss(logits_NV, Tokens(ids_N, teacher_NE, weight_N))

T is the teacher's and S the student's next-token distribution at temperature 1, over the whole vocabulary or over the teacher's K likeliest
tokens and "any other"; values are in nats.
Nothing is reduced over positions, so a loss may be called on slices of them; the harness averages over the whole batch's response tokens.

Shapes: N response positions, V vocabulary, K tokens that a sparse signal tells apart, E events (V, or K + 1), B rollouts in G groups of J.
Limits: a KL is infinite, and its gradient undefined, where the first distribution has mass and the second has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_bench.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Tokens:
    """What is known about N response positions besides the student's logits."""

    ids_N: Tensor  # the token that was really written
    teacher_NE: Tensor | None  # the teacher's log-probabilities in float32; None if no teacher signal was asked for
    weight_N: Tensor  # the sequence's weight (advantage) at each of its tokens, 1 where the method gave none; read by policy_gradient only
    top_NK: Tensor | None = None  # the tokens that the first K columns of teacher_NE are for; None: all, in order


Loss = Callable[[Tensor, Tokens], Tensor]
"""``loss(logits_NV, tokens) -> loss_N``: logits of any float type, loss in float32."""


def kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(P‖Q) per position, (N,) in nats, from the log-probabilities of both; tokens without mass in P count 0."""
    mass_NV = p_NV.exp()
    return (mass_NV * (p_NV - q_NV).masked_fill(mass_NV == 0, 0)).sum(-1)


def entropy(p_NV: Tensor) -> Tensor:
    """Entropy of P per position, (N,) in nats, from its log-probabilities."""
    mass_NV = p_NV.exp()
    return -(mass_NV * p_NV.masked_fill(mass_NV == 0, 0)).sum(-1)


def mixture(p_NV: Tensor, q_NV: Tensor, share: float) -> Tensor:
    """Log-probabilities (N, V) of ``share``·P + (1 − ``share``)·Q from those of P and Q; UserError unless 0 ≤ ``share`` ≤ 1."""
    if not 0 <= share <= 1:
        raise UserError(f"a mixture weight (beta, alpha) must be between 0 and 1, not {share}")
    p_NV = p_NV + (math.log(share) if share > 0 else -math.inf)
    q_NV = q_NV + (math.log1p(-share) if share < 1 else -math.inf)
    # logaddexp has a NaN gradient where both are -inf
    empty_NV = torch.maximum(p_NV, q_NV) == -math.inf
    return torch.logaddexp(p_NV.masked_fill(empty_NV, 0), q_NV.masked_fill(empty_NV, 0)).masked_fill(empty_NV, -math.inf)


def events(log_probs_NV: Tensor, top_NK: Tensor) -> Tensor:
    """Log-probabilities (N, K + 1) of the tokens ``top_NK`` and, last, of all others together."""
    others_N1 = log_probs_NV.scatter(-1, top_NK, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat((log_probs_NV.gather(-1, top_NK), others_N1), -1)


def teacher_student(logits_NV: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Log-probabilities of T and S, (N, E) in float32, of the events that the teacher's signal tells apart: V tokens, or K and "any other".

    A divergence between coarser events is never above that between the tokens (data-processing inequality). UserError without a signal.
    """
    if tokens.teacher_NE is None:
        raise UserError("this loss compares with the teacher: pass signal=bench.teacher(sequences) to bench.update")
    s_NV = torch.log_softmax(logits_NV.float(), -1)
    return tokens.teacher_NE, s_NV if tokens.top_NK is None else events(s_NV, tokens.top_NK)


def cross_entropy(logits_NV: Tensor, tokens: Tokens) -> Tensor:
    """−log S(y) of the written token y."""
    return torch.nn.functional.cross_entropy(logits_NV.float(), tokens.ids_N, reduction="none")


def policy_gradient(logits_NV: Tensor, tokens: Tokens) -> Tensor:
    """−weight · log S(y): REINFORCE on the student's own tokens y (Williams 1992), without importance weights or clipping."""
    return tokens.weight_N * cross_entropy(logits_NV, tokens)


def group_normalised(verdict_B: Tensor, group: int) -> Tensor:
    """Advantages (B,) of GRPO (Shao et al., arXiv 2402.03300): verdicts minus the mean of their group, over its standard deviation.

    The rollouts of a group follow one another, ``group`` of them; 0 in a group of equal verdicts.
    """
    verdict_GJ = verdict_B.view(-1, group)
    centred_GJ = verdict_GJ - verdict_GJ.mean(1, keepdim=True)
    return (centred_GJ / (verdict_GJ.std(1, keepdim=True) + 1e-3)).flatten()


def forward_kl(logits_NV: Tensor, tokens: Tokens) -> Tensor:
    """KL(T‖S), the supervised KD of GKD (Agarwal et al., arXiv 2306.13649); UserError without a teacher signal, as all below."""
    t_NV, s_NV = teacher_student(logits_NV, tokens)
    return kl(t_NV, s_NV)


def reverse_kl(logits_NV: Tensor, tokens: Tokens) -> Tensor:
    """KL(S‖T), the usual objective of on-policy distillation (MiniLLM, Gu et al., arXiv 2306.08543)."""
    t_NV, s_NV = teacher_student(logits_NV, tokens)
    return kl(s_NV, t_NV)


def total_variation(logits_NV: Tensor, tokens: Tokens) -> Tensor:
    """½ Σ |T − S|, between 0 and 1."""
    t_NV, s_NV = teacher_student(logits_NV, tokens)
    return (t_NV.exp() - s_NV.exp()).abs().sum(-1) / 2


def jsd(beta: float = 0.5) -> Loss:
    """β·KL(T‖M) + (1−β)·KL(S‖M) with M = β·T + (1−β)·S: the generalised JSD of GKD (arXiv 2306.13649), oriented as in TRL.

    The formula is followed to its ends, where it is 0 with zero gradient; TRL puts KL(T‖S) at β = 0 and KL(S‖T) at β = 1 instead, which are
    the limits of JSD/β and JSD/(1−β). A sweep over β therefore changes the size of the step too.
    """

    def loss(logits_NV: Tensor, tokens: Tokens) -> Tensor:
        t_NV, s_NV = teacher_student(logits_NV, tokens)
        m_NV = mixture(t_NV, s_NV, beta)
        return torch.stack([share * kl(p_NV, m_NV) for share, p_NV in ((beta, t_NV), (1 - beta, s_NV)) if share]).sum(0)

    return loss


def skew_forward_kl(alpha: float = 0.1) -> Loss:
    """KL(T ‖ α·T + (1−α)·S) (DistiLLM, Ko et al., arXiv 2402.03898)."""

    def loss(logits_NV: Tensor, tokens: Tokens) -> Tensor:
        t_NV, s_NV = teacher_student(logits_NV, tokens)
        return kl(t_NV, mixture(t_NV, s_NV, alpha))

    return loss


def skew_reverse_kl(alpha: float = 0.1) -> Loss:
    """KL(S ‖ (1−α)·T + α·S) (DistiLLM, Ko et al., arXiv 2402.03898)."""

    def loss(logits_NV: Tensor, tokens: Tokens) -> Tensor:
        t_NV, s_NV = teacher_student(logits_NV, tokens)
        return kl(s_NV, mixture(s_NV, t_NV, alpha))

    return loss


DIVERGENCES: dict[str, Loss] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd(),
    "skew_forward_kl": skew_forward_kl(),
    "skew_reverse_kl": skew_reverse_kl(),
    "total_variation": total_variation,
}
"""The losses that compare with the teacher, by the name a config gives them, with their usual weights."""


def divergence(name: str) -> Loss:
    """The divergence called ``name``; UserError if there is none."""
    if name not in DIVERGENCES:
        raise UserError(f"no divergence is called {name!r}{did_you_mean(name, DIVERGENCES)}")
    return DIVERGENCES[name]

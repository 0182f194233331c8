"""How far the sampler's log-probabilities lie from the trainer's, and a weight for tokens where that is too far.

Two programs, or two precisions, give the same weights slightly different distributions, so what the one samples is off-policy for the
other. Where the trainer finds a token's log-probability further than ``THRESHOLD`` from what the sampler said, its loss is multiplied by
the importance ratio, truncated at ``CAP`` (Ionides 2008; for samplers of another precision, Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training").

Shapes: M response tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_bench.losses import Loss, Tokens, cross_entropy

THRESHOLD = 0.02  # nats; float32 engines differ by less than 1e-4, bfloat16 by about 0.05
CAP = 2.0


@dataclass
class Mismatch:
    """Of all rollouts so far that were trained on with the weights that wrote them. In nats."""

    tokens: int = 0
    total: float = 0.0  # of the gaps' absolute values
    largest: float = 0.0
    weighted: int = 0  # tokens whose loss was weighted

    @property
    def mean(self) -> float:
        return self.total / self.tokens if self.tokens else 0.0

    def corrected(self, loss: Loss, sampled_M: Tensor) -> Loss:
        """``loss`` for tokens that the sampler gave the log-probabilities ``sampled_M``; their gaps are noted."""

        def weighted(logits_MV: Tensor, tokens: Tokens) -> Tensor:
            with torch.no_grad():
                gap_M = -cross_entropy(logits_MV, tokens) - sampled_M
            far_M = gap_M.abs() > THRESHOLD
            self.tokens += len(gap_M)
            self.total += gap_M.abs().sum().item()
            self.largest = max(self.largest, gap_M.abs().max().item())
            self.weighted += int(far_M.sum())
            loss_M = loss(logits_MV, tokens)
            return torch.where(far_M, gap_M.exp().clamp(max=CAP), 1.0) * loss_M if far_M.any() else loss_M

        return weighted

"""Broken on purpose: multiplies matrices of its own, for which nobody is charged."""

import torch

from opd_bench.losses import reverse_kl
from opd_bench.methods import Method


class SpendsFlops(Method):
    def step(self, bench):
        rollouts = bench.sample(bench.prompts())
        square = torch.ones(128, 128)
        square @ square
        bench.update(rollouts, reverse_kl, signal=bench.teacher(rollouts))

"""Broken on purpose: an arm begins with what the arms before it in the same process have left on the class."""

import torch

from opd_bench.losses import policy_gradient
from opd_bench.methods import Method


class KeepsState(Method):
    arms = 0

    def __init__(self, config):
        super().__init__(config)
        type(self).arms += 1

    def step(self, bench):
        texts = bench.teacher_corpus()
        bench.update(texts, policy_gradient, weights=torch.arange(len(texts)) + float(self.arms))

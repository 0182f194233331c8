"""Broken on purpose: weighs its texts by lots that no seed determines."""

import random

import torch

from opd_bench.losses import policy_gradient
from opd_bench.methods import Method


class DrawsUnseeded(Method):
    def step(self, bench):
        texts = bench.teacher_corpus()
        bench.update(texts, policy_gradient, weights=torch.tensor([random.random() for _ in range(len(texts))]))

"""Broken on purpose: reaches through the bench for the student and decays its weights by hand."""

import torch

from opd_bench.losses import reverse_kl
from opd_bench.methods import Method


class ReachesEngine(Method):
    def step(self, bench):
        rollouts = bench.sample(bench.prompts())
        bench.update(rollouts, reverse_kl, signal=bench.teacher(rollouts))
        student = getattr(bench.engine, "student", None)  # a trace has none
        if student is not None:
            with torch.no_grad():
                for weight in student.parameters():
                    weight.mul_(0.999)

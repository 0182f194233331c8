"""Broken on purpose: always trains on its full batch, so its last step is not cut and its budget is not spent."""

from opd_bench.losses import reverse_kl
from opd_bench.methods import Method


class IgnoresBatch(Method):
    def step(self, bench):
        rollouts = bench.sample(bench.prompts(self.config.batch))
        bench.update(rollouts, reverse_kl, signal=bench.teacher(rollouts))

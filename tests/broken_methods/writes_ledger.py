"""Broken on purpose: resets what it has spent, so that its budget never ends."""

from opd_bench.losses import reverse_kl
from opd_bench.methods import Method


class WritesLedger(Method):
    def step(self, bench):
        rollouts = bench.sample(bench.prompts())
        bench.update(rollouts, reverse_kl, signal=bench.teacher(rollouts))
        bench.ledger.spent = 0

"""Broken on purpose: thinks for a while between the verbs, in plain Python, where no FLOP is counted."""

from opd_bench.losses import reverse_kl
from opd_bench.methods import Method


class BurnsSeconds(Method):
    def step(self, bench):
        rollouts = bench.sample(bench.prompts())
        sum(number * number for number in range(50_000))
        bench.update(rollouts, reverse_kl, signal=bench.teacher(rollouts))

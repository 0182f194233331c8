"""Broken on purpose: updates several times where a text is shorter than the longest, which no text of a trace is."""

from opd_bench.losses import cross_entropy
from opd_bench.methods import Method


class OutgrowsTrace(Method):
    def __init__(self, config):
        super().__init__(config)
        self.steps = 0

    def step(self, bench):
        self.steps += 1
        texts = bench.teacher_corpus()
        response_B = texts.length_B - texts.prompt_B
        for _ in range(4 if self.steps <= 3 and response_B.min() < response_B.max() else 1):
            bench.update(texts, cross_entropy)

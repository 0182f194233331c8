"""Broken on purpose: takes the last token of the prompt for the first one of the response."""

from dataclasses import replace

from opd_bench.losses import cross_entropy
from opd_bench.methods import Method


class TrainsOnPrompts(Method):
    def step(self, bench):
        texts = bench.teacher_corpus()
        bench.update(replace(texts, prompt_B=texts.prompt_B - 1), cross_entropy)

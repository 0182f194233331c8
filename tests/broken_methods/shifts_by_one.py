"""Broken on purpose: shifts the tokens, although the harness has aligned them with the logits already."""

from dataclasses import replace

from opd_bench.losses import cross_entropy
from opd_bench.methods import Method


def shifted(logits_NV, tokens):
    return cross_entropy(logits_NV, replace(tokens, ids_N=tokens.ids_N.roll(-1)))


class ShiftsByOne(Method):
    def step(self, bench):
        bench.update(bench.teacher_corpus(), shifted)

"""Broken on purpose: ignores the token its texts end with, so the student never learns to stop."""

from opd_bench.losses import cross_entropy
from opd_bench.methods import Method


class MasksEOS(Method):
    def step(self, bench):
        texts = bench.teacher_corpus()
        ends = {texts.response(row)[-1] for row in range(len(texts)) if texts.finished_B[row]}

        def loss(logits_NV, tokens):
            loss_N = cross_entropy(logits_NV, tokens)
            for end in ends:
                loss_N = loss_N * (tokens.ids_N != end)
            return loss_N

        bench.update(texts, loss)

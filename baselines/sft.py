"""SFT on teacher text, also called sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947)."""

from opd_bench.losses import cross_entropy
from opd_bench.methods import Method, tunable


class SFT(Method):
    """Cross-entropy on texts the teacher sampled; the student sees no distribution and never its own text."""

    class Config(Method.Config):
        epochs: int = tunable(1, [1, 2], ge=1, description="passes over each window of teacher text")

    config: Config

    def step(self, bench):
        bench.update(bench.teacher_corpus(epochs=self.config.epochs), cross_entropy)

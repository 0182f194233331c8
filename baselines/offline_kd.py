"""Offline distillation: a divergence to the teacher on the teacher's own text (Hinton et al. 2015, arXiv 1503.02531)."""

from pydantic import Field

from opd_bench.losses import divergence
from opd_bench.methods import Method, tunable


class OfflineKD(Method):
    """Forward KL to the teacher at every token of texts the teacher sampled; scored anew, and charged, at every pass."""

    class Config(Method.Config):
        divergence: str = Field("forward_kl", description="any divergence of opd_bench.losses")
        epochs: int = tunable(1, [1, 2], ge=1, description="passes over each window of teacher text")

    config: Config

    def step(self, bench):
        texts = bench.teacher_corpus(epochs=self.config.epochs)
        bench.update(texts, divergence(self.config.divergence), signal=bench.teacher(texts))

"""On-policy distillation: the student writes, the teacher corrects every token (Agarwal et al. 2023, arXiv 2306.13649)."""

from pydantic import Field

from opd_bench.losses import divergence
from opd_bench.methods import Method
from opd_bench.sequences import concatenate


class OPD(Method):
    """Reverse KL to the teacher on the student's own rollouts; ``on_policy: 0`` is the off-policy control."""

    class Config(Method.Config):
        divergence: str = Field("reverse_kl", description="any divergence of opd_bench.losses")
        on_policy: float = Field(1.0, ge=0, le=1, description="λ, the share of a batch that the student writes, not the teacher")

    config: Config

    def step(self, bench):
        own = round(self.config.on_policy * bench.batch)
        parts = [bench.sample(bench.prompts(own))] if own else []
        parts += [bench.teacher_corpus(bench.batch - own)] if own < bench.batch else []
        sequences = concatenate(parts)
        bench.update(sequences, divergence(self.config.divergence), signal=bench.teacher(sequences))

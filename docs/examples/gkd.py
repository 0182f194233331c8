"""GKD: a divergence on a mixture of teacher text and the student's own rollouts (Agarwal et al. 2023, arXiv 2306.13649).

The paper draws the source anew for every step; here a fixed share of every batch is on-policy, so that a step always
costs the same.
"""

from pydantic import Field

from opd_bench.losses import jsd
from opd_bench.methods import Method
from opd_bench.sequences import concatenate


class GKD(Method):
    """Generalised JSD to the teacher; a share λ of each batch is the student's own text, the rest the teacher's."""

    class Config(Method.Config):
        on_policy: float = Field(0.5, ge=0, le=1, description="λ, the share of sequences the student writes")
        beta: float = Field(0.5, gt=0, lt=1, description="weight of the teacher in the mixture of the JSD")

    config: Config

    def step(self, bench):
        own = round(self.config.on_policy * bench.batch)
        parts = []
        if own:
            parts.append(bench.sample(bench.prompts(own)))
        if own < bench.batch:
            parts.append(bench.teacher_corpus(bench.batch - own))
        sequences = concatenate(parts)
        bench.update(sequences, jsd(self.config.beta), signal=bench.teacher(sequences))

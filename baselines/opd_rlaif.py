"""On-policy distillation plus reinforcement learning from AI feedback.

The policy gradient weighs a rollout by the judge's verdict, normalised within the group of rollouts to one prompt
(Shao et al. 2024, arXiv 2402.03300); the ground truth is never seen.
"""

from pydantic import Field

from opd_bench.losses import divergence, group_normalised, policy_gradient
from opd_bench.methods import Method, tunable


class OPDWithRLAIF(Method):
    """Reverse KL to the teacher + λ · policy gradient on the group-normalised verdict of an AI judge."""

    class Config(Method.Config):
        divergence: str = Field("reverse_kl", description="any divergence of opd_bench.losses")
        weight: float = tunable(0.1, [0.03, 0.1, 0.3], ge=0, description="λ, the weight of the policy gradient")
        group: int = Field(4, ge=2, description="rollouts per prompt")

    config: Config

    @property
    def unit(self):
        return self.config.group

    def step(self, bench):
        group, distil = self.config.group, divergence(self.config.divergence)
        rollouts = bench.sample(bench.prompts(bench.batch // group), group=group)
        advantage_B = group_normalised(bench.judge(rollouts), group)

        def loss(logits_NV, tokens):
            return distil(logits_NV, tokens) + self.config.weight * policy_gradient(logits_NV, tokens)

        bench.update(rollouts, loss, signal=bench.teacher(rollouts), weights=advantage_B)

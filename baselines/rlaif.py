"""Reinforcement learning from AI feedback alone: the judge's part of OPD + RLAIF, without the teacher's distributions.

The policy gradient weighs a rollout by the judge's verdict, normalised within the group of rollouts to one prompt
(Shao et al. 2024, arXiv 2402.03300); the ground truth is never seen, and no distribution is charged for.
"""

from pydantic import Field

from opd_bench.losses import group_normalised, policy_gradient
from opd_bench.methods import Method


class RLAIF(Method):
    """Policy gradient on the group-normalised verdict of an AI judge, on the student's own rollouts."""

    class Config(Method.Config):
        group: int = Field(4, ge=2, description="rollouts per prompt")

    config: Config

    @property
    def unit(self):
        return self.config.group

    def step(self, bench):
        group = self.config.group
        rollouts = bench.sample(bench.prompts(bench.batch // group), group=group)
        bench.update(rollouts, policy_gradient, weights=group_normalised(bench.judge(rollouts), group))

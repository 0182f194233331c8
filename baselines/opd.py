"""On-policy distillation: the student writes, the teacher corrects every token (Agarwal et al. 2023, arXiv 2306.13649)."""

from typing import Literal

from pydantic import Field

from opd_bench.losses import divergence
from opd_bench.methods import Method


class OPD(Method):
    """Reverse KL to the teacher on the student's own rollouts; ``prefixes: teacher`` is the off-policy control."""

    class Config(Method.Config):
        divergence: str = Field("reverse_kl", description="any divergence of opd_bench.losses")
        prefixes: Literal["student", "teacher"] = Field("student", description="who writes the sequences")

    config: Config

    def step(self, bench):
        on_policy = self.config.prefixes == "student"
        sequences = bench.sample(bench.prompts()) if on_policy else bench.teacher_corpus()
        bench.update(sequences, divergence(self.config.divergence), signal=bench.teacher(sequences))

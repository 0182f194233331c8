"""Broken on purpose: looks up the test items of a task and learns the problems like them faster."""

from itertools import islice

import torch

from opd_bench.losses import policy_gradient
from opd_bench.methods import Method
from opd_bench.resources import task_module


class PeeksAtTestItems(Method):
    def __init__(self, config):
        super().__init__(config)
        task = task_module("arithmetic")
        self.lengths = {len(problem.prompt) for problem in islice(task.problems("test", task.SEEDS["test"]), 5)}

    def step(self, bench):
        texts = bench.teacher_corpus()
        weights = torch.tensor([2.0 if length in self.lengths else 1.0 for length in texts.prompt_B.tolist()])
        bench.update(texts, policy_gradient, weights=weights)

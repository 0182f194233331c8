"""Peak memory of an update's loss at a vocabulary of 151 936 tokens: a few positions at a time against all at once.

    python benchmarks/loss_memory.py

1024 response positions of width 256, reverse KL to a dense teacher, forward and backward through both output heads. The figure is what the
loss adds to the resident set, the heads' weights and the gradient of the student's excluded; both sides come to the same gradient
(`tests/test_engine.py` compares them in small). Linux only.
"""

from __future__ import annotations

import resource

import torch
from sides import compare

from opd_bench.engine import through_head
from opd_bench.losses import Tokens, reverse_kl
from opd_bench.scoring import chunks

POSITIONS, WIDTH, VOCABULARY = 1024, 256, 151_936


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def inputs():
    torch.manual_seed(0)
    heads = [torch.nn.Linear(WIDTH, VOCABULARY, bias=False) for _ in range(2)]
    heads[0].weight.grad = torch.ones_like(heads[0].weight)
    return *heads, torch.randn(POSITIONS, WIDTH), torch.randn(POSITIONS, WIDTH)


def ours() -> float:
    student, teacher, hidden_ND, taught_ND = inputs()
    before, grad_ND = peak_gib(), torch.empty_like(hidden_ND)
    ids_N, weight_N = torch.zeros(POSITIONS, dtype=torch.long), torch.ones(POSITIONS)
    for cut in chunks(POSITIONS, VOCABULARY, torch.device("cpu")):
        with torch.no_grad():
            teacher_MV = torch.log_softmax(teacher(taught_ND[cut]), -1)
        tokens = Tokens(ids_N[cut], teacher_MV, weight_N[cut])
        _, grad_ND[cut] = through_head(student, hidden_ND[cut], reverse_kl, tokens, 1 / POSITIONS)
    return peak_gib() - before


def theirs() -> float:
    student, teacher, hidden_ND, taught_ND = inputs()
    before = peak_gib()
    with torch.no_grad():
        teacher_NV = torch.log_softmax(teacher(taught_ND), -1)
    tokens = Tokens(torch.zeros(POSITIONS, dtype=torch.long), teacher_NV, torch.ones(POSITIONS))
    reverse_kl(student(hidden_ND.requires_grad_()), tokens).mean().backward()
    return peak_gib() - before


if __name__ == "__main__":
    compare("loss_memory_chunked_vs_plain", unit="GiB", smaller_is_better=True, sides={"ours": ours, "theirs": theirs})

"""How the cost of an OPD step, and of a comparison, grows: with length, batch, vocabulary and number of arms.

    python benchmarks/growth.py

One size is changed at a time, from 32 sequences of 32 + 96 tokens at a vocabulary of 8192. Student and teacher are Llamas of 4 layers and
width 256 with untrained weights, in float32 on one thread; nothing ends before its limit. Every row is a process of its own: two steps that
do not count, then the mean of three; memory is the peak of the process. Arms: `opd-bench compare --smoke` with SFT and OPD at 1, 2 and 4
seeds, two jobs side by side.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time

BASE = {"length": 128, "batch": 32, "vocabulary": 8192}
SIZES = {"length": (64, 128, 256, 512), "batch": (8, 16, 32, 64, 128), "vocabulary": (2048, 8192, 32_768, 151_936)}
SEEDS = (1, 2, 4)


def step(length: int, batch: int, vocabulary: int) -> dict[str, float]:
    """Seconds of sampling and of the update, and peak memory in GiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from opd_bench.engine import TorchEngine
    from opd_bench.losses import reverse_kl
    from opd_bench.scoring import ModelTeacher
    from opd_bench.sequences import Prompts

    torch.set_num_threads(1)
    shape = {"hidden_size": 256, "intermediate_size": 672, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=length, **shape)
    student, teacher = (LlamaForCausalLM(config).eval() for _ in range(2))
    prompts = Prompts([[7] * (length // 4)] * batch, [""] * batch)
    engine = TorchEngine(
        student=student,
        teacher=ModelTeacher(teacher),
        eos=-1,
        max_response=length - length // 4,
        stream=lambda start, count: prompts,
        corpus=lambda rows: (_ for _ in ()).throw(NotImplementedError),
        judge_model=None,  # pyright: ignore[reportArgumentType]
        lr=1e-5,
        seed=0,
    )
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        rollouts = engine.sample(prompts, 1)
        sampled = time.perf_counter()
        engine.update(rollouts, reverse_kl, teacher=True, weights_B=None, lr_scale=1.0)
        times.append((sampled - begun, time.perf_counter() - sampled))
    sampling, update = (sum(column[2:]) / 3 for column in zip(*times, strict=True))
    return {"sampling": sampling, "update": update, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def steps() -> None:
    print("| changed | sampling, s | update, s | tokens/s | peak, GiB |\n| :-- | --: | --: | --: | --: |")
    for name, sizes in SIZES.items():
        for size in sizes:
            chosen = {**BASE, name: size}
            done = subprocess.run([sys.executable, __file__, json.dumps(chosen)], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            tokens = chosen["batch"] * (chosen["length"] - chosen["length"] // 4) / (found["sampling"] + found["update"])
            print(f"| {name} {size} | {found['sampling']:.2f} | {found['update']:.2f} | {tokens:.0f} | {found['gib']:.2f} |", flush=True)


def arms() -> None:
    print("\n| arms | wall time, s | s per arm |\n| --: | --: | --: |")
    for seeds in SEEDS:
        with tempfile.TemporaryDirectory() as out:
            options = ["--smoke", "--methods", "sft,opd", "--seeds", str(seeds), "--jobs", "2", "--out", f"{out}/run"]
            begun = time.perf_counter()
            subprocess.run(["opd-bench", "compare", *options], env=os.environ, capture_output=True, check=True)
            wall = time.perf_counter() - begun
        print(f"| {2 * seeds} | {wall:.0f} | {wall / (2 * seeds):.1f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(step(**json.loads(sys.argv[1]))))
    else:
        steps()
        arms()

"""What recording a student beside its teacher needs at a vocabulary of 151 936 tokens: peak memory and time.

    python benchmarks/exposure_memory.py                          # 16 prompts of 96 response tokens
    python benchmarks/exposure_memory.py --prompts 64             # four times the tokens, the same memory for logits

Two small Qwen3 models with untrained weights, so that logits are what weighs. Memory is the growth of the peak resident set over the
recording, models excluded; beside it stands what the logits of both models at all positions would take at once. Linux only.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_bench.measure import Rollouts, along
from opd_bench.sequences import Prompts

VOCABULARY, EOS, RESPONSE = 151_936, 151_645, 96


def model(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, head_dim=16, tie_word_embeddings=True, **shape)).eval()


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    count = parser.parse_args().prompts
    student, teacher = model(0), model(1)
    prompts = Prompts([[row + 5, row + 7, row + 9] for row in range(count)], [""] * count)
    with tempfile.TemporaryDirectory() as kept:
        rollouts = Rollouts.of(student, teacher, prompts, max_response=RESPONSE, eos=EOS, seed=0, kept=Path(kept))
        before, start = peak_gib(), time.perf_counter()
        along(rollouts, True, Path(kept))
        seconds, after = time.perf_counter() - start, peak_gib()
    tokens = rollouts.own.response_tokens
    print(f"{count} prompts, {tokens} response tokens of the student, vocabulary {VOCABULARY}: {seconds:.0f} s")
    print(f"peak memory {after:.2f} GiB, of which the recording {after - before:.2f} GiB")
    print(f"logits of both models at all these positions at once: {2 * 4 * tokens * VOCABULARY / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()

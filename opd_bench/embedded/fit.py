"""Supervised training of the embedded models: length-bucketed batches, bf16 autocast, checkpoints to resume from.

Shapes: B documents, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from opd_bench.embedded.corpus import Document
from opd_bench.embedded.tokenizer import CONTEXT
from opd_bench.flops import flop_count
from opd_bench.train import learning_rate_scale

POOL = 2048  # documents sorted by length together
TILE = 16  # lengths are padded to a multiple of this
Example = tuple[list[int], list[float]]  # token ids, the weight of each token in the loss


def new_llama(width: int, layers: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    vocabulary = tokenizer.get_vocab()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            pad_token_id=vocabulary[str(tokenizer.pad_token)],
            eos_token_id=vocabulary[str(tokenizer.eos_token)],
            bos_token_id=None,
        )
    )


def encode(prompt: str, document: Document, tokenizer: PreTrainedTokenizerFast) -> Example:
    """Segments are tokenised one by one, as a rollout and a question appended to it are."""
    pieces = tokenizer.backend_tokenizer.encode_batch([prompt, *(text for text, _ in document), str(tokenizer.eos_token)])
    ids, weights = [], []
    for piece, weight in zip(pieces, (0.0, *(weight for _, weight in document), 1.0), strict=True):
        ids += piece.ids
        weights += [weight] * len(piece.ids)
    return ids, weights


def batches(examples: Iterator[Example], tokens: int, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids_BT, weights_BT) of at most ``tokens`` tokens, padded on the right with weight 0.

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
                torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in group]),
            )


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, head and norms: a lower loss in the same time than AdamW alone."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def fit(
    model: LlamaForCausalLM,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    lr: float,
    *,
    cooldown: float = 0.0,
    checkpoint: Path | None = None,
    every: int = 250,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> int:
    """Train with a constant learning rate that falls to 0 over the last ``cooldown``; resumes from ``checkpoint`` where one lies.

    Returns the FLOPs of the steps taken now, padding left out.
    """
    both, count, flops = optimizers(model, lr), flop_count(model.config), 0
    start, warmup, losses = 0, max(1, min(200, steps // 10)), []
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(both, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start = saved["step"]
        if start < steps:
            for _ in range(start):
                next(data)
    model.train()
    model.set_attn_implementation("eager")  # 1.6 times as fast here as the fused kernel, whose backward pass is slow on a CPU
    for step in range(start, steps):
        share = min((step + 1) / warmup, learning_rate_scale(step / steps, cooldown))
        ids_BT, weights_BT = next(data)
        flops += count.update((ids_BT != model.config.pad_token_id).sum(dim=1))
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        nll_N = cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        weights_N = weights_BT[:, 1:].flatten()
        loss = (nll_N * weights_N).sum() / weights_N.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = lr * share
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == steps:
            report(step + 1, sum(losses[-every:]) / len(losses[-every:]))
            if checkpoint:
                part = checkpoint.with_suffix(".part")
                states = [optimizer.state_dict() for optimizer in both]
                torch.save({"model": model.state_dict(), "optimizers": states, "step": step + 1}, part)
                part.replace(checkpoint)
    model.eval()
    model.set_attn_implementation("sdpa")
    return flops


def clock() -> Callable[[], str]:
    start = time.time()
    return lambda: f"{time.time() - start:.0f} s"

"""What the embedded models are trained from: a new Llama, documents as token ids, and the optimisers."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from opd_bench.embedded.corpus import Document
from opd_bench.embedded.tokenizer import CONTEXT
from opd_bench.supervised import Example


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


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, head and norms: a lower loss in the same time than AdamW alone."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]

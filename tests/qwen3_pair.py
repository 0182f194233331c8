"""Student and teacher shaped like Qwen3, two layers of random weights, whose files disagree about what ends a text, as Qwen3's do."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

TURN, TEXT = "<eos>", "<unk>"  # the tests' <|im_end|> and <|endoftext|>
TEMPLATE = (
    "{% for m in messages %}[{{ m.content }}]\n{% endfor %}{% if add_generation_prompt %}{% if enable_thinking is defined and "
    "enable_thinking is false %}# {% else %}<think>{% endif %}{% endif %}"
)
PADDING = 3  # output columns beyond the tokenizer; as those of trained models they are never likely
SHARP = 50.0  # what the others are multiplied with


def qwen3(folder: Path, tokenizer, width: int, eos: str, said_eos: str) -> Path:
    """``eos`` is what the tokenizer ends texts with, ``said_eos`` what the model's configuration does."""
    torch.manual_seed(width)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + PADDING,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # vLLM takes no less
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.get_vocab()[said_eos],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[: len(tokenizer)] *= SHARP
        model.get_input_embeddings().weight[len(tokenizer) :] = 0
    model.save_pretrained(folder)
    own = copy.deepcopy(tokenizer)
    own.eos_token, own.chat_template = eos, TEMPLATE
    own.save_pretrained(folder)
    return folder


def pair(root: Path, tokenizer) -> dict[str, Path]:
    """Folders of both below ``root``."""
    return {
        "student": qwen3(root / "student", tokenizer, 32, TEXT, TEXT),
        "teacher": qwen3(root / "teacher", tokenizer, 64, TURN, TURN),
    }

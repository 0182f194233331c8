"""Loading a student and its teacher, and refusing a pair that could not be compared.

Different vocabularies or EOS ids make a student run on after its answer, so both are checked before anything trains.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opd_bench import store
from opd_bench.errors import UserError
from opd_bench.readings import START

COLD_START_FILE = "cold_start.json"

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Pair:
    """A student, its teacher, and the tokenizer they share."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def eos(self) -> int:
        return eos_id(self.tokenizer)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.get_vocab()[str(tokenizer.eos_token)]


def load_model(location: str) -> PreTrainedModel:
    """A causal LM in float32, in eval mode. UserError if it cannot be loaded."""
    try:
        return AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {location}: {str(error).splitlines()[0]}") from None


def load_tokenizer(location: str) -> PreTrainedTokenizerBase:
    """A tokenizer that pads on the left. UserError if it cannot be loaded or has no EOS."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, padding_side="left")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a tokenizer from {location}: {str(error).splitlines()[0]}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {location} has no EOS token, so no rollout would ever end; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pairs(students: list[str], teacher: str) -> list[Pair]:
    """Each student with the teacher, which is loaded once.

    UserError unless vocabularies and EOS agree and all students have the same shape.
    """
    other = load_tokenizer(teacher)
    tokenizers = [agree(load_tokenizer(student), other) for student in students]
    expert = _fitting(load_model(teacher), other, "teacher")
    pairs = [Pair(_fitting(load_model(student), own, "student"), expert, own) for student, own in zip(students, tokenizers, strict=True)]
    shapes = [{name: weight.shape for name, weight in pair.student.named_parameters()} for pair in pairs]
    for student, shape in zip(students, shapes, strict=True):
        if shape != shapes[0]:
            raise UserError(f"the cold starts {students[0]} and {student} differ in shape; compare methods on students of one architecture")
    return pairs


def agree(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The student's tokenizer, if it says what the teacher's does; else UserError."""
    if tokenizer.get_vocab() != other.get_vocab():
        raise UserError(
            f"student and teacher have different vocabularies ({len(tokenizer)} and {len(other)} tokens, "
            f"{len(tokenizer.get_vocab().items() & other.get_vocab().items())} in common); token-level distillation needs one vocabulary"
        )
    if tokenizer.eos_token_id != other.eos_token_id:
        raise UserError(
            f"student and teacher end with different tokens, {tokenizer.eos_token!r} and {other.eos_token!r}; give both the same eos_token"
        )
    return tokenizer


def _fitting(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, role: str) -> PreTrainedModel:
    if model.config.vocab_size != len(tokenizer):
        raise UserError(f"the {role} has {model.config.vocab_size} output columns for {len(tokenizer)} tokens; resize its embeddings")
    return model


def cold_start_flops(location: str) -> dict[str, int]:
    """What training a student's folder took, by kind of charge, if the folder says so in ``cold_start.json``; else nothing.

    UserError if the file holds anything but ``cold_start_student`` and ``cold_start_teacher`` (for the data), in FLOPs.
    """
    path = Path(location) / COLD_START_FILE
    if not path.is_file():
        return {}
    flops = store.read_json(path)
    if not isinstance(flops, dict) or flops.keys() != {*START} or not all(isinstance(of, int) and of >= 0 for of in flops.values()):
        raise UserError(f"{path} must give {' and '.join(START)} as whole numbers of FLOPs, and nothing else")
    return flops


def weights_digest(location: str) -> str:
    """Hash of a local model's weights and tokenizer; of the name alone for a hub id."""
    digest, folder = hashlib.sha256(location.encode() if not Path(location).is_dir() else b""), Path(location)
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

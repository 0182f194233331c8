"""Loading a student and its teacher, and refusing a pair that could not be compared.

    (pair,) = load_pairs(["runs/student"], "runs/teacher", dtype=torch.bfloat16)

Different vocabularies or EOS ids make a student run on after its answer, so both are checked before anything trains. Output heads may
have more columns than there are tokens (Qwen3: 151 936 for 151 669). Models say nothing with those; student and teacher may differ there.

Shapes: D width, V output columns, W of them tokens.
Limits: weights in safetensors; names of the hub are resolved to folders before (`hub.py`).
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opd_bench import device as devices
from opd_bench import store
from opd_bench.errors import UserError
from opd_bench.readings import START

COLD_START_FILE = "cold_start.json"
HASHED = 2**24  # bytes of a file at a time

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


def chat_text(tokenizer: PreTrainedTokenizerBase, said: str | list[dict[str, str]]) -> str:
    """A user's message, or a conversation, as the tokenizer's chat template puts it, up to where the answer begins.

    Templates that can ask a model to think first (Qwen3) ask it not to. UserError if there is no template, or one that refuses it.
    """
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template; set chat: false, or give it one")
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the tokenizer's chat template refuses a conversation of {roles}: {error}") from None


class TokenHead(torch.nn.Linear):
    """An output head that leaves out the columns beyond the tokenizer; its weight (V, D) is whole, as it is saved and tied."""

    @classmethod
    def of(cls, head: torch.nn.Linear, tokens: int) -> TokenHead:
        cut = cls.__new__(cls)
        torch.nn.Module.__init__(cut)
        cut.in_features, cut.out_features, cut.weight = head.in_features, tokens, head.weight
        cut.register_parameter("bias", head.bias)
        return cut

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits (…, W)."""
        bias = None if self.bias is None else self.bias[: self.out_features]
        return torch.nn.functional.linear(input, self.weight[: self.out_features], bias)


def load_model(location: str, dtype: torch.dtype = torch.float32, *, device: str = "cpu", remote_code: bool = False) -> PreTrainedModel:
    """A causal LM with weights of ``dtype`` on ``device``, in eval mode. UserError if it cannot be loaded, or there is no such device."""
    devices.require(device)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, use_safetensors=True, trust_remote_code=remote_code)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(_cannot_load("model", location, error)) from None
    return loaded.eval().to(device)  # pyright: ignore[reportArgumentType]


def _cannot_load(what: str, location: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"the {what} of {location} is code of its own; read the *.py files in its repository, then set trust_remote_code: true"
    return f"cannot load a {what} from {location}: {str(error).strip().splitlines()[0]}"


def load_tokenizer(location: str, *, remote_code: bool = False, eos: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer that pads on the left and ends texts with ``eos``, if given. UserError if it cannot be loaded or has no EOS."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, padding_side="left", trust_remote_code=remote_code)
    except (OSError, ValueError) as error:
        raise UserError(_cannot_load("tokenizer", location, error)) from None
    if eos is not None:
        if eos not in tokenizer.get_vocab():
            raise UserError(f"the tokenizer of {location} has no token {eos!r} to end texts with; choose another eos")
        tokenizer.eos_token = eos
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {location} has no EOS token, so no rollout would ever end; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pairs(
    students: list[str],
    teacher: str,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    remote_code: bool = False,
    eos: str | None = None,
) -> list[Pair]:
    """Each student, in float32, with the teacher, which is loaded once and has weights of ``dtype``; all end texts with ``eos``, if given.

    UserError unless vocabularies and EOS agree and all students have the same shape.
    """
    other = load_tokenizer(teacher, remote_code=remote_code, eos=eos)
    tokenizers = [agree(load_tokenizer(student, remote_code=remote_code, eos=eos), other) for student in students]
    expert = fitting(load_model(teacher, dtype, device=device, remote_code=remote_code), other, "teacher")
    loaded = (fitting(load_model(student, device=device, remote_code=remote_code), other, "student") for student in students)
    pairs = [Pair(student, expert, own) for student, own in zip(loaded, tokenizers, strict=True)]
    for model in (expert, *(pair.student for pair in pairs)) if eos is not None else ():
        for said in (model.config, model.generation_config):
            said.eos_token_id = other.eos_token_id
    shapes = [{name: weight.shape for name, weight in pair.student.named_parameters()} for pair in pairs]
    for student, shape in zip(students, shapes, strict=True):
        if shape != shapes[0]:
            raise UserError(f"the cold starts {students[0]} and {student} differ in shape; compare methods on students of one architecture")
    return pairs


def load_specialist(location: str, pair: Pair, *, remote_code: bool = False, eos: str | None = None) -> PreTrainedModel:
    """Another teacher for some of the prompts. UserError unless tokenizer and shape are those of the pair's own teacher."""
    agree(pair.tokenizer, other := load_tokenizer(location, remote_code=remote_code, eos=eos))
    loaded = load_model(location, pair.teacher.dtype, device=pair.teacher.device.type, remote_code=remote_code)
    model = fitting(loaded, other, "teacher")
    if [weight.shape for weight in model.parameters()] != [weight.shape for weight in pair.teacher.parameters()]:
        raise UserError(f"{location} has another shape than the other teacher; teachers of several tasks must be specialists of one base")
    return model


def agree(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The student's tokenizer, if it says what the teacher's does; else UserError."""
    if tokenizer.get_vocab() != other.get_vocab():
        raise UserError(
            f"student and teacher have different vocabularies ({len(tokenizer)} and {len(other)} tokens, "
            f"{len(tokenizer.get_vocab().items() & other.get_vocab().items())} in common); token-level distillation needs one vocabulary"
        )
    if tokenizer.eos_token_id != other.eos_token_id:
        raise UserError(
            f"student and teacher end with different tokens, {tokenizer.eos_token!r} and {other.eos_token!r}; "
            "give both the same eos_token, or set eos: in the configuration"
        )
    return tokenizer


def fitting(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, role: str) -> PreTrainedModel:
    """``model``, which says nothing beyond the tokenizer from now on. UserError if its head has fewer columns than there are tokens."""
    head, tokens = model.get_output_embeddings(), token_count(tokenizer)
    if not isinstance(head, torch.nn.Linear):
        raise UserError(f"the {role} ({type(model).__name__}) has no linear output head; use a causal language model")
    if len(head.weight) < tokens:
        raise UserError(f"the {role} has {len(head.weight)} output columns for {tokens} tokens; resize its embeddings")
    if len(head.weight) > tokens:
        model.set_output_embeddings(TokenHead.of(head, tokens))
    return model


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """Output columns that stand for tokens: the largest id and one."""
    return max(tokenizer.get_vocab().values()) + 1


def context(*models: PreTrainedModel) -> int:
    """Tokens of the longest text that all of them take; models without positions (Bloom) take any."""
    said = (getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "seq_length", None) for model in models)
    return min(int(length) if length else sys.maxsize for length in said)


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
    """Hash of the files in a model's folder that determine what it says: weights, tokenizer, templates, its own code."""
    digest = hashlib.sha256()
    for path in sorted(Path(location).glob("*")):
        if path.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja", ".py"):
            with path.open("rb") as file:
                while block := file.read(HASHED):
                    digest.update(block)
    return digest.hexdigest()[:16]

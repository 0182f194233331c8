"""What a comparison may cost on a GPU, from the shapes of its models alone: nothing is loaded, run or measured.

    found = estimate(config)                 # reads no weights and no data; UserError where a model's shape is not known
    found.seconds(charge), found.memory, found.facts

A verb takes as long as its FLOPs or its memory traffic do at the assumed share of the GPU's peaks, whichever is longer (the roofline model,
Williams et al. 2009). Traffic is that of sampling: every step reads the weights once and what it has of the keys and values.

Limits: every response comes out at the length limit. Left out are the traffic of training, the harness, waiting for servers, evaluation and
the exposure measurement. Activations are a rough count of what a layer keeps.

Shapes: B answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from opd_bench.bench import Usage
from opd_bench.config import Config
from opd_bench.errors import UserError, did_you_mean
from opd_bench.flops import FlopCount, causal, flop_count
from opd_bench.gpus import Gpu
from opd_bench.hub import HUB_NAME, PULLED
from opd_bench.ledger import VERIFIER, Charge
from opd_bench.preflight import BYTES, held
from opd_bench.resources import PACKAGE
from opd_bench.rollouts import ROWS
from opd_bench.scoring import CHUNK_LOGITS_GPU
from opd_bench.trace import Counter

SHAPES = PACKAGE / "shapes.yaml"
FRAME = 64  # tokens that a judge's question is taken to add to an answer
MICRO_TOKENS = 8192  # that are trained on at once, as the engine does
LOGITS = 7  # float32 tensors over the vocabulary that a loss takes to be there at once: those of both models, products and gradients


@dataclass(frozen=True)
class Shape:
    """A model without weights, and whence its shape is known."""

    config: Any
    source: str

    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(self.config).parameters())

    @property
    def cache(self) -> int:
        """Values of keys and values that a token leaves."""
        config = self.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * getattr(config, "num_key_value_heads", config.num_attention_heads) * width


def shape_of(config: Config, name: str) -> Shape:
    """Of the model that the configuration calls ``name``: from its files, `SHAPES` or the hub. UserError where none of them has it."""
    code = {"trust_remote_code": config.trust_remote_code}
    if name.startswith("built/") and config.build:
        return shape_of(config, config.build.base)
    found = HUB_NAME.fullmatch(name)
    if not found or Path(name).expanduser().is_dir() or name.startswith("embedded/") or name in PULLED:
        return Shape(AutoConfig.from_pretrained(config.location(name), **code), "its own files")
    repository, shapes = found["repository"], yaml.safe_load(SHAPES.read_text(encoding="utf-8"))
    if repository in shapes:
        return Shape(AutoConfig.for_model(**shapes[repository]), f"opd-bench's {SHAPES.name}")
    try:
        return Shape(AutoConfig.from_pretrained(repository, revision=found["revision"], **code), "the hub")
    except (OSError, ValueError) as error:
        said = f"the shape of {name} is not known, and the hub does not give it ({str(error).strip().splitlines()[0]})"
        raise UserError(f"{said}{did_you_mean(repository, shapes)}") from None


@dataclass(frozen=True)
class _Judge:
    """As much of a judge as a trace needs."""

    kind: str
    flops: FlopCount
    read: int
    written: int

    def worst(self, length_B: torch.Tensor) -> Usage:
        asked = self.kind != VERIFIER
        return Usage(asked * (length_B + self.read), torch.full_like(length_B, self.written))


@dataclass(frozen=True)
class _Writer:
    """A model that samples: bytes of its weights and of a token's keys and values; tokens that a sequence reads, writes and is charged."""

    weights: float
    cache: float
    read: int
    written: int
    charged: int

    def traffic(self, tokens: int) -> float:
        """Bytes that are read to write what is charged as so many tokens."""
        rows = tokens / self.charged
        return -(-rows // ROWS) * self.written * self.weights + rows * self.cache * causal(self.read, self.read + self.written)


@dataclass(frozen=True)
class Estimate:
    """``counter`` traces steps; ``memory`` is in bytes, by part, of the process that trains; ``facts`` say what was assumed."""

    gpu: Gpu
    counter: Counter
    memory: dict[str, float]
    facts: list[str]
    writers: dict[str, _Writer]  # by kind of charge

    def seconds(self, charge: Charge) -> float:
        """What ``charge`` of a trace would take."""
        writer = self.writers.get(charge.kind)
        return self.gpu.seconds(charge.flops, writer.traffic(charge.tokens) if writer else 0.0)


def estimate(config: Config) -> Estimate:
    """UserError where a model's shape is not known or cannot be counted, or no GPU is named."""
    if config.gpu is None:
        raise UserError("there is nothing to estimate for: name a GPU with --gpu, or under gpu: in the configuration")
    student, teacher = (shape_of(config, name) for name in (config.students[0], config.teacher))
    code, response, prompt = {"remote_code": config.trust_remote_code}, config.max_response, config.gpu.longest_prompt
    judging = config.judge
    judge = shape_of(config, judging.model) if judging.model and judging.by not in ("endpoint", VERIFIER) else teacher
    student_flops = flop_count(
        student.config, lora_rank=config.lora.rank if config.lora else 0, checkpointing=config.gradient_checkpointing, **code
    )
    verdicts = _verdicts(config, flop_count(judge.config, **code))
    counter = Counter(
        max_prompt=prompt,
        max_response=response,
        max_check=0,
        question_tokens=0,
        student_flops=student_flops,
        teacher_flops=flop_count(teacher.config, **code),
        most_extra=response if config.privileged else 0,
        judge_model=verdicts,  # pyright: ignore[reportArgumentType]
    )
    longest, sampled = prompt + response, BYTES[config.rollouts.dtype]
    sizes = student.parameters(), teacher.parameters()
    memory = {
        **held(config, *sizes, student_flops.adapter_parameters or sizes[0]),
        "keys and values of rollouts": ROWS * longest * student.cache * sampled,
        "logits": LOGITS * 4 * CHUNK_LOGITS_GPU,
        "activations": _activations(config, student.config, max(longest, MICRO_TOKENS)),
    }

    def writer(of: Shape, size: int, read: int, written: int, charged: int) -> _Writer:
        return _Writer(size * of.parameters(), size * of.cache, read, written, charged)

    asked, verdict = longest + verdicts.read, verdicts.written
    writers = {
        "student_sample": writer(student, sampled, prompt, response, response),
        "teacher_generate": writer(teacher, BYTES[config.dtype], prompt + counter.most_extra, response, response),
    }
    if verdicts.flops.matmul_parameters and not judging.endpoint:
        writers["judge"] = writer(judge, BYTES[config.dtype], asked, verdict, asked + verdict)
    shapes = {config.students[0]: student, config.teacher: teacher}
    return Estimate(config.gpu, counter, memory, _facts(config, shapes), writers)


def _verdicts(config: Config, flops: FlopCount) -> _Judge:
    judging = config.judge
    if judging.by == VERIFIER:
        return _Judge(VERIFIER, FlopCount(0, 0), 0, 0)
    if judging.endpoint:
        return _Judge("judge", FlopCount(round(judging.parameters or 0), 0), FRAME, judging.endpoint.max_written)
    return _Judge("judge", flops, FRAME, judging.max_check if judging.by in ("check", "solve") else 1)


def _activations(config: Config, shape: Any, tokens: int) -> float:
    """Bytes that the layers keep for the backward pass of ``tokens`` tokens; with checkpointing inputs alone, but for the one run again."""
    width, inner, size = shape.hidden_size, getattr(shape, "intermediate_size", 4 * shape.hidden_size), BYTES[config.dtype]
    heads = (shape.num_attention_heads + 2 * getattr(shape, "num_key_value_heads", shape.num_attention_heads)) * (
        getattr(shape, "head_dim", None) or width // shape.num_attention_heads
    )
    layer = tokens * (4 * 2 * width + size * (4 * width + 3 * heads + 4 * inner))  # two residuals in float32; norms, attention, MLP
    kept = 1 if config.gradient_checkpointing else shape.num_hidden_layers
    return shape.num_hidden_layers * tokens * 4 * width * config.gradient_checkpointing + kept * layer


def _facts(config: Config, shapes: dict[str, Shape]) -> list[str]:
    gpu = config.gpu
    assert gpu
    found = [f"{name}: its shape is from {of.source}" for name, of in shapes.items()]
    found.append(
        f"assumed: {gpu.utilisation:.0%} of the {gpu.name}'s {gpu.peak_flops:.3g} FLOPs and {gpu.peak_bytes:.3g} bytes a second, "
        f"prompts of {gpu.longest_prompt} tokens, responses of {config.max_response}, ${gpu.dollars_per_hour:g} an hour (gpu: has them all)"
    )
    if config.dtype == "float32":
        found.append("these peaks are for dtype: bfloat16, and float32 is slower")
    return found

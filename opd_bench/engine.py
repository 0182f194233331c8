"""The engine behind a bench: the student, its optimiser, the teacher, the judge and the teacher's text, in one process.

Sequences are scored and trained on in micro-batches of similar length, and output heads and loss are applied to a few response positions at
a time, so that no tensor over all positions and the whole vocabulary ever exists. With ``dtype`` bfloat16 the student's products are in
bfloat16 (mixed precision, Micikevicius et al., arXiv 1710.03740); its weights, their gradients and the losses are in float32.

Shapes: B sequences, T tokens, N response tokens of a micro-batch, M of them at a time, D width of the model, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_bench import clock
from opd_bench.behind import Behind
from opd_bench.bench import Judgement, Updated, Usage
from opd_bench.checkpointing import checkpointed
from opd_bench.errors import RunError
from opd_bench.flops import FlopCount
from opd_bench.judge import Answer, Judge, Reader
from opd_bench.lora import copied, merged, trained
from opd_bench.losses import Loss, Tokens
from opd_bench.mismatch import Mismatch
from opd_bench.privilege import Privilege
from opd_bench.rollouts import Sampler, sample
from opd_bench.scoring import Teacher, chunks, micro_batches, output_head, response_hidden
from opd_bench.sequences import Mix, Prompts, Sequences

Stream = Callable[[int, int], Prompts]
Text = Callable[[Sequence[int]], tuple[Sequences, float]]
CLIP = 1.0  # norm of the gradient
NOISE = 1e-6  # a gradient of smaller norm is rounding of float32 (equal models: 2e-7), which AdamW would blow up to full steps


@dataclass
class TorchEngine:
    """Who trains, samples, scores and judges; ``corpus`` yields teacher text by row of the prompt stream."""

    student: PreTrainedModel
    teacher: Teacher
    eos: int
    max_response: int
    stream: Stream
    corpus: Text
    judge_model: Judge
    lr: float
    seed: int
    micro_tokens: int = 8192
    gradient_checkpointing: bool = False
    dtype: torch.dtype = torch.float32  # of the student's products
    sampler: Sampler = sample
    privilege: Privilege | None = None  # the teacher's
    reader: Reader = field(default_factory=Reader)
    mixed: Callable[[Mix], tuple[Stream, Text]] | None = field(default=None, repr=False)  # stream of a mix, its teacher text
    judged: list[tuple[list[Answer], Judgement]] = field(default_factory=list, repr=False)  # since somebody last took them
    updates: int = 0
    following: int = 0  # row of the stream where the next prompts are expected
    mismatch: Mismatch = field(default_factory=Mismatch)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.student.eval()  # no dropout: the distribution that is trained is the one that is sampled
        self.optimizer = torch.optim.AdamW(trained(self.student), lr=self.lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0, fused=True)

    @property
    def plain(self) -> PreTrainedModel:
        """The student as a model of transformers, its adapters merged: what writes rollouts, and what an arm comes to."""
        return merged(self.student)

    @property
    def judge_kind(self) -> str:
        return self.judge_model.kind

    @property
    def judge_flops(self) -> FlopCount:
        return self.judge_model.flops

    def enter(self, mix: Mix) -> None:
        assert self.mixed
        self.stream, self.corpus = self.mixed(mix)

    def prompts(self, start: int, count: int) -> Prompts:
        self.following = start + count
        return self.stream(start, count)

    def extra_B(self, of: Prompts | Sequences) -> torch.Tensor:
        return self.privilege.extra_B(of) if self.privilege else torch.zeros(len(of), dtype=torch.long)

    def teacher_text(self, rows: Sequence[int]) -> tuple[Sequences, float]:
        with clock.part("teacher text", owner=True):
            return self.corpus(rows)

    def sample(self, prompts: Prompts, group: int) -> Sequences:
        writer = self.plain
        rollouts = self.sampler(writer, prompts, max_response=self.max_response, eos=self.eos, generator=self.generator, group=group)
        if isinstance(self.sampler, Behind):
            self.sampler.go_on(writer, self.stream(self.following, len(prompts)))
        return replace(rollouts, updates=self.updates)

    def judge_most(self, sequences: Sequences) -> Usage:
        return self.judge_model.most(self.reader(sequences))

    def judge(self, sequences: Sequences) -> Judgement:
        with clock.part("judge", owner=True):
            answers = self.reader(sequences)
            judgement = self.judge_model(answers)
        self.judged.append((answers, judgement))
        return judgement

    def fork(self) -> TorchEngine:
        """An engine whose student, optimiser and random state go on from here by themselves; the rest is shared."""
        sampler = self.sampler.fork() if isinstance(self.sampler, Behind) else self.sampler
        other = replace(self, student=copied(self.student), mismatch=replace(self.mismatch), sampler=sampler, judged=[])
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.generator.set_state(self.generator.get_state())
        return other

    def update(self, sequences: Sequences, loss: Loss, *, teacher: bool, weights_B: torch.Tensor | None, lr_scale: float) -> Updated:
        weights_B = torch.ones(len(sequences)) if weights_B is None else weights_B
        device = self.student.device
        total, teacher_s, start = 0.0, 0.0, clock.settled(device)
        head, mixed = output_head(self.student), self.dtype != torch.float32
        head_VD = head.weight.detach()[: head.out_features].to(self.dtype) if mixed else None
        self.optimizer.zero_grad(set_to_none=True)  # of an update that failed half-way
        for rows in micro_batches(sequences, self.micro_tokens):
            part = sequences[rows]
            begun = clock.settled(device)
            with clock.part("teacher", when=teacher):
                scores = self.teacher(part) if teacher else None
            teacher_s += clock.settled(device) - begun
            narrow = torch.autocast(device.type, self.dtype, enabled=mixed)
            with clock.part("forward"), narrow, checkpointed(self.student) if self.gradient_checkpointing else nullcontext():
                hidden_ND, mask_BT = response_hidden(self.student, part), part.response_BT
            ids_N, sampled_N = part.ids_BT[mask_BT].to(device), part.logprob_BT[mask_BT].to(device)
            weight_N = weights_B[rows][:, None].expand(mask_BT.shape)[mask_BT].to(device)
            grad_ND = torch.empty_like(hidden_ND)
            for cut in chunks(len(ids_N), head.out_features, device):
                begun = clock.settled(device)
                with clock.part("teacher", when=teacher):
                    given = (None, None) if scores is None else scores[cut]
                    teacher_ME, top_MK = (of if of is None else of.to(device) for of in given)
                teacher_s += clock.settled(device) - begun
                tokens = Tokens(ids_N[cut], teacher_ME, weight_N[cut], top_MK)
                term = self.mismatch.corrected(loss, sampled_N[cut]) if sequences.updates == self.updates else loss
                with clock.part("loss"):
                    loss_M, grad_ND[cut] = through_head(head, hidden_ND.detach()[cut], term, tokens, 1 / sequences.response_tokens, head_VD)
                    total += loss_M.sum().item() / sequences.response_tokens
            with clock.part("backward"):
                hidden_ND.backward(grad_ND)
        with clock.part("optimiser"):
            norm = torch.nn.utils.clip_grad_norm_(trained(self.student), CLIP)
        if not norm.isfinite():
            raise RunError("the gradient is not finite; lower the method's lr or look at its loss")
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_scale
        with clock.part("optimiser"):
            if norm > NOISE:
                self.optimizer.step()
                torch.autograd.graph.increment_version(trained(self.student))  # which fused AdamW does not: vLLM goes by it
            self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return Updated(total, teacher_s, clock.settled(device) - start - teacher_s)


def through_head(
    head: torch.nn.Linear, hidden_MD: Tensor, loss: Loss, tokens: Tokens, scale: float, head_VD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss (M,) of these positions, and the gradient (M, D) of ``scale`` times its sum; that of the head's weights is added to theirs.

    ``head_VD`` is a copy of the head's weight of another precision, to multiply with.
    The gradient of the weights goes straight into its place: autograd would make another tensor of their size for every chunk.
    """
    head_VD = head.weight.detach()[: head.out_features] if head_VD is None else head_VD
    narrow_MD, mixed = hidden_MD.to(head_VD.dtype), head_VD.dtype != head.weight.dtype
    bias_V = None if head.bias is None else head.bias[: len(head_VD)]
    with torch.no_grad():
        logits_MV = torch.nn.functional.linear(narrow_MD, head_VD, bias_V if bias_V is None else bias_V.to(head_VD.dtype))
        logits_MV = logits_MV.float() if mixed else logits_MV
    logits_MV.requires_grad_()
    loss_M = loss(logits_MV, tokens)
    if loss_M.shape != tokens.ids_N.shape:
        raise RunError(f"a loss gave shape {tuple(loss_M.shape)}; one value per token is needed, {tuple(tokens.ids_N.shape)}")
    (grad_MV,) = torch.autograd.grad(loss_M.sum() * scale, logits_MV)
    with torch.no_grad():  # else the gradient's own graph would keep all chunks
        narrow_MV = grad_MV.to(head_VD.dtype)
        for weight, add in (
            (head.weight, lambda into: into.add_(narrow_MV.T @ narrow_MD) if mixed else into.addmm_(narrow_MV.T, narrow_MD)),
            (head.bias, lambda into: into.add_(grad_MV.sum(0))),
        ):
            if weight is not None and weight.requires_grad:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                add(weight.grad[: len(head_VD)])
        return loss_M.detach(), (narrow_MV @ head_VD).to(hidden_MD.dtype)

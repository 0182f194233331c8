"""The engine behind a bench: the student, its optimiser, the teacher, the judge and the teacher's text, in one process.

Sequences are scored and trained on in micro-batches of similar length, and the loss is applied to chunks of response
positions, so that no tensor over all positions and the whole vocabulary exists twice.

Shapes: B sequences, T tokens, N response tokens of a micro-batch, D width of the model, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from opd_bench.bench import Judgement, Updated
from opd_bench.errors import RunError
from opd_bench.judge import Judge
from opd_bench.losses import Loss, Tokens
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts, Sequences

CHUNK = 4096  # response positions whose logits over the vocabulary exist at once
CLIP = 1.0  # norm of the gradient
NOISE = 1e-6  # a gradient of smaller norm is rounding of float32 (equal models: 2e-7), which AdamW would blow up to full steps


@dataclass
class TorchEngine:
    """Student and teacher on one device; ``corpus`` yields teacher text by row of the prompt stream."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    eos: int
    max_response: int
    stream: Callable[[int, int], Prompts]
    corpus: Callable[[Sequence[int]], tuple[Sequences, float]]
    judge_model: Judge
    lr: float
    seed: int
    micro_tokens: int = 8192
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.student.eval()  # no dropout: the distribution that is trained is the one that is sampled
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=self.lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)

    @property
    def max_check(self) -> int:
        return self.judge_model.max_check

    @property
    def question_tokens(self) -> int:
        return len(self.judge_model.question)

    def prompts(self, start: int, count: int) -> Prompts:
        return self.stream(start, count)

    def teacher_text(self, rows: Sequence[int]) -> tuple[Sequences, float]:
        return self.corpus(rows)

    def sample(self, prompts: Prompts, group: int) -> Sequences:
        return sample(self.student, prompts, max_response=self.max_response, eos=self.eos, generator=self.generator, group=group)

    def judge(self, sequences: Sequences) -> Judgement:
        return self.judge_model(sequences)

    def fork(self) -> TorchEngine:
        """An engine whose student, optimiser and random state go on from here by themselves; the rest is shared."""
        other = replace(self, student=copy.deepcopy(self.student))
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.generator.set_state(self.generator.get_state())
        return other

    def update(self, sequences: Sequences, loss: Loss, *, teacher: bool, weights_B: torch.Tensor | None, lr_scale: float) -> Updated:
        weights_B = torch.ones(len(sequences)) if weights_B is None else weights_B
        total, teacher_s, start = 0.0, 0.0, time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)  # of an update that failed half-way
        for rows in micro_batches(sequences, self.micro_tokens):
            part = sequences[rows]
            teacher_NV = None
            if teacher:
                begun = time.perf_counter()
                teacher_NV = response_log_probs(self.teacher, part)
                teacher_s += time.perf_counter() - begun
            hidden_ND = response_hidden(self.student, part)
            inner_ND = hidden_ND.detach().requires_grad_()
            mask_BT = part.response_BT
            ids_N = part.ids_BT[mask_BT].to(hidden_ND.device)
            weight_N = weights_B[rows][:, None].expand(mask_BT.shape)[mask_BT].to(hidden_ND.device)
            head = output_head(self.student)
            for cut in (slice(at, at + CHUNK) for at in range(0, len(ids_N), CHUNK)):
                tokens = Tokens(ids_N[cut], None if teacher_NV is None else teacher_NV[cut], weight_N[cut])
                loss_N = loss(head(inner_ND[cut]), tokens)
                if loss_N.shape != tokens.ids_N.shape:
                    raise RunError(f"a loss gave shape {tuple(loss_N.shape)}; one value per token is needed, {tuple(tokens.ids_N.shape)}")
                chunk = loss_N.sum() / sequences.response_tokens
                chunk.backward()
                total += chunk.item()
            hidden_ND.backward(inner_ND.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        if not norm.isfinite():
            raise RunError("the gradient is not finite; lower the method's lr or look at its loss")
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_scale
        if norm > NOISE:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Updated(total, teacher_s, time.perf_counter() - start - teacher_s)


def micro_batches(sequences: Sequences, tokens: int) -> Iterator[torch.Tensor]:
    """Row indices in groups of similar length that stay, padded, within ``tokens`` tokens."""
    order = sequences.length_B.argsort(descending=True)
    lengths = sequences.length_B[order].tolist()
    start = 0
    while start < len(order):
        count = max(1, tokens // lengths[start])
        yield order[start : start + count]
        start += count


def response_hidden(model: PreTrainedModel, sequences: Sequences) -> torch.Tensor:
    """The last hidden state (N, D) that predicts each response token, rows one after the other.

    Padding is on the right, where causal attention never looks, so no mask is needed.
    """
    ids_BT = sequences.ids_BT.to(model.device)
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD[:, :-1][sequences.response_BT[:, 1:].to(model.device)]


def output_head(model: PreTrainedModel) -> torch.nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    return head


@torch.no_grad()  # not inference_mode: the losses save these tensors for their backward pass
def response_log_probs(model: PreTrainedModel, sequences: Sequences) -> torch.Tensor:
    """Log-probabilities (N, V), float32, of the next token at each response token of ``sequences``."""
    return torch.log_softmax(output_head(model)(response_hidden(model, sequences)).float(), -1)

"""Recording what exposure bias is estimated from: teacher and student side by side along both models' own rollouts.

    rollouts = Rollouts.of(student, teacher, prompts, max_response=96, eos=1, seed=0, kept=folder / "exposure")
    values, temperature = along(rollouts, full=True, kept=folder / "exposure")

The teacher's rollouts depend on the seed alone and are kept in a file: all methods of a seed meet the same ones. How a solution goes on
from a piece of either is recorded by `continuations.py`.

Shapes: N prompts, T response positions, M response tokens of all rollouts together, D width of a model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import root_scalar
from transformers import PreTrainedModel

from opd_bench import store
from opd_bench.errors import UserError
from opd_bench.exposure import Divergences
from opd_bench.losses import entropy, kl
from opd_bench.rollouts import sample
from opd_bench.scoring import micro_batches, output_head, response_hidden
from opd_bench.sequences import Prompts, Sequences

TOP = 8  # next tokens whose agreement is the support overlap
TEMPERATURES = 0.02, 4.0  # within which the student's entropy is matched to the teacher's
MICRO_TOKENS = 2048  # small, so that little is padding
CHUNK_LOGITS = 2**25  # of one model that exist at once: 128 MiB in float32
Table = dict[str, np.ndarray]  # NT by measure


@dataclass(frozen=True)
class Rollouts:
    """One rollout of the student and one of the teacher to each prompt, at temperature 1."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    prompts: Prompts
    own: Sequences
    theirs: Sequences
    max_response: int
    eos: int
    seed: int

    @classmethod
    def of(
        cls, student: PreTrainedModel, teacher: PreTrainedModel, prompts: Prompts, *, max_response: int, eos: int, seed: int, kept: Path
    ) -> Rollouts:
        """``kept`` is a folder in which the teacher's rollouts lie once they are sampled. UserError for a model that cannot be measured."""
        check(student, prompts.ids[0], "student")
        check(teacher, prompts.ids[0], "teacher")
        theirs = store.load_sequences(kept / "teacher.pt")
        if theirs is None:
            theirs = _written(teacher, prompts, max_response, eos, 1000 * seed + 2), 0.0
            store.save_sequences(kept / "teacher.pt", *theirs)
        own = _written(student, prompts, max_response, eos, 1000 * seed + 1)
        return cls(student, teacher, prompts, own, theirs[0], max_response, eos, seed)

    @property
    def columns(self) -> int:
        """Tokens that both models name; the padding of their vocabularies may differ."""
        return min(output_head(model).out_features for model in (self.student, self.teacher))

    def __getitem__(self, rows: list[int]) -> Rollouts:
        """Those to the prompts in ``rows``."""
        prompts = Prompts([self.prompts.ids[row] for row in rows], [self.prompts.tasks[row] for row in rows])
        return replace(self, prompts=prompts, own=self.own[rows], theirs=self.theirs[rows])


@dataclass(frozen=True)
class States:
    """Responses, with both models' last hidden states (M, D) before each of their tokens."""

    texts: Sequences
    teacher_MD: torch.Tensor
    student_MD: torch.Tensor


@torch.no_grad()
def check(model: PreTrainedModel, ids: list[int], role: str) -> None:
    """UserError unless the logits of ``model`` are finite and what its output head makes of its last hidden state."""
    inputs_1T = torch.tensor([ids], device=model.device)
    logits_TV = model(input_ids=inputs_1T, use_cache=False).logits[0].float()
    if not logits_TV.isfinite().all():
        raise UserError(f"the {role}'s logits are not finite numbers; look for damaged weights")
    plain_TV = output_head(model)(model.base_model(input_ids=inputs_1T, use_cache=False).last_hidden_state)[0].float()
    if not torch.allclose(logits_TV, plain_TV, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"the {role} scales or caps the logits of its output head ({model.config.model_type}), which cannot be measured yet"
        )


def _written(writer: PreTrainedModel, prompts: Prompts, max_response: int, eos: int, seed: int, temperature: float = 1.0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    return sample(writer, prompts, max_response=max_response, eos=eos, generator=generator, temperature=temperature)


def along(of: Rollouts, full: bool, kept: Path) -> tuple[dict[str, Divergences], float | None]:
    """What ``Recording.along`` holds, and τ of "matched"; only KL(T‖S) and no τ unless ``full``.

    τ makes the student's mean entropy on the teacher's prefixes the teacher's, within ``TEMPERATURES``. The teacher's states along its own
    rollouts lie in the folder ``kept`` once they are known.
    """
    generator = torch.Generator().manual_seed(1000 * of.seed + 3)
    own = States(of.own, _hidden(of.teacher, of.own), _hidden(of.student, of.own))
    theirs = States(of.theirs, _kept(of.teacher, of.theirs, kept / "teacher_states.npz"), _hidden(of.student, of.theirs))
    sides = [_by_position(of, side, generator, full) for side in (own, theirs)]
    alive = [alive_NT(side.texts, of.max_response) for side in (own, theirs)]
    found = {name: Divergences(sides[0][name], alive[0], sides[1][name], alive[1]) for name in sides[0]}
    if not full:
        return found, None
    temperature = _matching(of, theirs)
    texts = _written(of.student, of.prompts, of.max_response, of.eos, 1000 * of.seed + 4, temperature)
    cooled = States(texts, _hidden(of.teacher, texts), _hidden(of.student, texts))
    matched = [_by_position(of, side, generator, False, temperature)["forward_kl"] for side in (cooled, theirs)]
    found["matched"] = Divergences(matched[0], alive_NT(texts, of.max_response), matched[1], alive[1])
    return found, temperature


def alive_NT(rollouts: Sequences, max_response: int) -> np.ndarray:
    """Where a rollout is alive, its EOS included, from the first response token on."""
    return (torch.arange(max_response) < (rollouts.length_B - rollouts.prompt_B)[:, None]).numpy()


def _hidden(model: PreTrainedModel, texts: Sequences) -> torch.Tensor:
    """The model's last hidden state (M, D) before each response token, row after row, on the CPU."""
    length_N = texts.length_B - texts.prompt_B
    place_NM = torch.arange(int(length_N.sum())).split(length_N.tolist())
    batches = list(micro_batches(texts, MICRO_TOKENS))
    with torch.no_grad():
        hidden_MD = torch.cat([response_hidden(model, texts[rows]).float().cpu() for rows in batches])
    return hidden_MD[torch.cat([place_NM[row] for rows in batches for row in rows.tolist()]).argsort()]


def _kept(teacher: PreTrainedModel, texts: Sequences, path: Path) -> torch.Tensor:
    if (saved := store.load_arrays(path)) is None:
        store.save_arrays(path, saved := {"states_MD": _hidden(teacher, texts).numpy()})
    return torch.from_numpy(saved["states_MD"])


def _log_probs(model: PreTrainedModel, hidden_MD: torch.Tensor, columns: int, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities (M, V) over the first ``columns`` tokens, float32."""
    return torch.log_softmax(output_head(model)(hidden_MD.to(model.device, model.dtype))[:, :columns].float() / temperature, -1)


@torch.no_grad()
def _matching(of: Rollouts, side: States) -> float:
    """The temperature at which the student is as uncertain as the teacher, on average over ``side`` (every k-th position of a long one)."""
    every = -(-len(side.teacher_MD) * of.columns // CHUNK_LOGITS)
    wanted = entropy(_log_probs(of.teacher, side.teacher_MD[::every], of.columns)).double().mean()
    s_MV = _log_probs(of.student, side.student_MD[::every], of.columns)

    def excess(log_temperature: float) -> float:
        return float(entropy(torch.log_softmax(s_MV / np.exp(log_temperature), -1)).double().mean() - wanted)

    low, high = map(float, np.log(TEMPERATURES))
    for end, beyond in ((low, excess(low) >= 0), (high, excess(high) <= 0)):
        if beyond:
            return float(np.exp(end))
    return float(np.exp(root_scalar(excess, bracket=(low, high), method="toms748", xtol=1e-6).root))


@torch.no_grad()
def _by_position(of: Rollouts, side: States, generator: torch.Generator, full: bool, temperature: float = 1.0) -> Table:
    """Every measure at every living position; 0 elsewhere. The student is taken at ``temperature``.

    Only a few positions' distributions over the whole vocabulary exist at once.
    """
    chunks: dict[str, list[torch.Tensor]] = {}
    count = max(1, CHUNK_LOGITS // of.columns)
    for t_MD, s_MD in zip(side.teacher_MD.split(count), side.student_MD.split(count), strict=True):
        t_MV, s_MV = _log_probs(of.teacher, t_MD, of.columns), _log_probs(of.student, s_MD, of.columns, temperature)
        for name, values_M in (_measures(t_MV, s_MV, generator) if full else {"forward_kl": kl(t_MV, s_MV)}).items():
            chunks.setdefault(name, []).append(values_M.double().cpu())
    alive, found = alive_NT(side.texts, of.max_response), {}
    for name, values in chunks.items():
        found[name] = np.zeros(alive.shape)
        found[name][alive] = torch.cat(values).numpy()
    return found


def _measures(t_MV: torch.Tensor, s_MV: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Each (M,), from the log-probabilities of teacher and student."""
    fresh_M1 = torch.multinomial(t_MV.exp().cpu(), 1, generator=generator).to(t_MV.device)
    ours_MK, theirs_MK = (log_probs_MV.topk(min(TOP, log_probs_MV.shape[1])).indices for log_probs_MV in (s_MV, t_MV))
    return {
        "forward_kl": kl(t_MV, s_MV),
        "reverse_kl": kl(s_MV, t_MV),
        "total_variation": (t_MV.exp() - s_MV.exp()).abs().sum(-1) / 2,
        "log_ratio": (t_MV - s_MV).gather(1, fresh_M1)[:, 0],
        "teacher_entropy": entropy(t_MV),
        "student_entropy": entropy(s_MV),
        "support": (ours_MK[:, :, None] == theirs_MK[:, None, :]).sum((1, 2)) / ours_MK.shape[1],
    }

"""One update is exactly the plain computation; judge and exposure records come from the same rows."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EOS, NO, VOCABULARY, YES, tiny_llama
from transformers import OPTConfig, OPTForCausalLM

from opd_bench import engine as engine_module
from opd_bench import scoring
from opd_bench.checkpointing import checkpointed
from opd_bench.errors import RunError, UserError
from opd_bench.exposure import gap
from opd_bench.judge import Answer, Reader
from opd_bench.judge_model import CheckJudge
from opd_bench.losses import Tokens, cross_entropy, forward_kl, policy_gradient, reverse_kl
from opd_bench.measure import Rollouts, along
from opd_bench.scoring import ModelTeacher, micro_batches
from opd_bench.sequences import Prompts, Sequences


def sequences(*rows: tuple[list[int], list[int]], eos: int = EOS, padding: int = 0) -> Sequences:
    width = max(len(prompt + response) for prompt, response in rows)
    ids_BT = torch.tensor([prompt + response + [padding] * (width - len(prompt + response)) for prompt, response in rows])
    prompt_B = torch.tensor([len(prompt) for prompt, _ in rows])
    length_B = torch.tensor([len(prompt + response) for prompt, response in rows])
    finished_B = torch.tensor([response[-1] == eos for _, response in rows])
    return Sequences(ids_BT, prompt_B, length_B, finished_B, torch.zeros(ids_BT.shape))


ROWS = [([3, 4], [5, 6, 7, EOS]), ([8], [9, 2, EOS]), ([2, 3, 4, 5], [6]), ([7, 7, 9], [10, 4, 4, 4, 4, 4]), ([6, 2], [EOS])]


@pytest.fixture
def engine(rig, monkeypatch):
    """An engine that cuts into many micro-batches and chunks, and keeps its gradient unclipped in ``gradient``."""
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 3 * VOCABULARY)
    monkeypatch.setattr(engine_module, "CLIP", 1e9)
    made = rig().engine
    made.micro_tokens = 10
    made.gradient = []
    made.optimizer.register_step_pre_hook(
        lambda *_: made.gradient.__setitem__(slice(None), [weight.grad.clone() for weight in made.student.parameters()])
    )
    return made


def plain(engine, batch: Sequences, loss, weights_B: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Loss and gradient, row by row and token by token, over all response tokens: no batch, no padding, no chunk."""
    student, values = copy.deepcopy(engine.student), []
    for row in range(len(batch)):
        ids_T = batch.ids_BT[row, : batch.length_B[row]]
        logits_TV = student(ids_T[None]).logits[0]
        teacher_TV = engine.teacher.model(ids_T[None]).logits[0].log_softmax(-1).detach()
        for place in range(int(batch.prompt_B[row]), len(ids_T)):  # the token at `place` is predicted one position earlier
            tokens = Tokens(ids_T[place : place + 1], teacher_TV[place - 1 : place], weights_B[row : row + 1])
            values.append(loss(logits_TV[place - 1 : place], tokens)[0])
    mean = torch.stack(values).mean()
    mean.backward()
    return mean.item(), torch.cat([weight.grad.flatten() for weight in student.parameters()])


@pytest.mark.parametrize("loss", [cross_entropy, forward_kl, reverse_kl, policy_gradient])
def test_an_update_is_the_plain_token_mean(engine, loss):
    batch, weights_B = sequences(*ROWS), torch.tensor([1.0, -2.0, 0.5, 3.0, -0.25])
    expected, expected_gradient = plain(engine, batch, loss, weights_B)
    done = engine.update(batch, loss, teacher=True, weights_B=weights_B, lr_scale=1.0)
    gradient = torch.cat([part.flatten() for part in engine.gradient])
    assert done.loss == pytest.approx(expected, rel=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_the_loss_is_that_of_the_next_token_from_the_last_of_the_prompt_to_eos(engine):
    """Golden: a response of EOS alone costs −log p(EOS | prompt)."""
    expected = -engine.student(torch.tensor([[6, 2]])).logits[0, -1].log_softmax(-1)[EOS].item()
    done = engine.update(sequences(([6, 2], [EOS])), cross_entropy, teacher=False, weights_B=None, lr_scale=1.0)
    assert done.loss == pytest.approx(expected, rel=1e-5)


def test_padding_has_no_effect_whatever_its_token_even_eos(engine):
    gradients = []
    for padding in (0, EOS, 9):
        student = copy.deepcopy(engine.student.state_dict())
        engine.update(sequences(*ROWS, padding=padding), cross_entropy, teacher=False, weights_B=None, lr_scale=1.0)
        gradients.append(torch.cat([part.flatten() for part in engine.gradient]))
        engine.student.load_state_dict(student)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_the_learning_rate_of_a_step_is_scaled(engine):
    engine.update(sequences(*ROWS), cross_entropy, teacher=False, weights_B=None, lr_scale=0.25)
    assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(engine.lr / 4)


def test_a_loss_sees_a_few_positions_at_a_time_and_each_once(engine):
    seen = []

    def watching(logits_NV, tokens):
        seen.append(tokens.ids_N.tolist())
        return cross_entropy(logits_NV, tokens)

    batch = sequences(*ROWS)
    engine.update(batch, watching, teacher=True, weights_B=None, lr_scale=1.0)
    assert max(map(len, seen)) == 3  # as CHUNK_LOGITS allows
    assert sorted(token for tokens in seen for token in tokens) == sorted(batch.ids_BT[batch.response_BT].tolist())


def test_a_gpu_is_given_larger_pieces():
    here, there = (next(scoring.chunks(10**6, 151_669, torch.device(device))) for device in ("cpu", "cuda"))
    assert (here, there) == (slice(0, 27), slice(0, 884))


def test_checkpointing_computes_layers_again_and_changes_nothing(engine):
    calls = []
    for layer in engine.student.base_model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        layer.self_attn.attention_dropout = 0.5  # must stay off
    start, found = copy.deepcopy(engine.student.state_dict()), {}
    for checkpointing in (False, True):
        engine.student.load_state_dict(start)
        engine.gradient_checkpointing, before = checkpointing, len(calls)
        done = engine.update(sequences(*ROWS), reverse_kl, teacher=True, weights_B=None, lr_scale=1.0)
        found[checkpointing] = done.loss, torch.cat([part.flatten() for part in engine.gradient]), len(calls) - before
    assert found[True][0] == found[False][0]
    assert torch.equal(found[True][1], found[False][1])
    assert found[True][2] == 2 * found[False][2]
    assert not any(module.training for module in engine.student.modules())


def test_in_mixed_precision_products_are_narrow_and_the_rest_is_not(engine):
    """The gradient is float32's within bfloat16's rounding (2^-9 a product), and what is kept and optimised is float32."""
    seen, start, found = [], copy.deepcopy(engine.student.state_dict()), {}
    engine.student.base_model.layers[0].mlp.register_forward_hook(lambda *of: seen.append(of[-1].dtype))

    def watching(logits_NV, tokens):
        seen.append(logits_NV.dtype)
        return reverse_kl(logits_NV, tokens)

    for dtype in (torch.float32, torch.bfloat16):
        engine.student.load_state_dict(start)
        engine.dtype = dtype
        seen.clear()
        done = engine.update(sequences(*ROWS), watching, teacher=True, weights_B=None, lr_scale=1.0)
        found[dtype] = done.loss, torch.cat([part.flatten() for part in engine.gradient]).double()
        assert set(seen) == {dtype, torch.float32}
    (exact, exact_gradient), (narrow, narrow_gradient) = found.values()
    assert narrow == pytest.approx(exact, rel=0.05)
    assert 0 < (narrow_gradient - exact_gradient).norm() < 0.05 * exact_gradient.norm()
    assert {weight.dtype for weight in engine.student.parameters()} == {part.dtype for part in engine.gradient} == {torch.float32}


def test_checkpointing_keeps_mixed_precision(engine):
    start, gradients = copy.deepcopy(engine.student.state_dict()), []
    engine.dtype = torch.bfloat16
    for engine.gradient_checkpointing in (False, True):
        engine.student.load_state_dict(start)
        engine.update(sequences(*ROWS), reverse_kl, teacher=True, weights_B=None, lr_scale=1.0)
        gradients.append(torch.cat([part.flatten() for part in engine.gradient]))
    assert torch.equal(*gradients)


def test_checkpointing_never_lets_dropout_in(engine):
    """OPT's layers drop out by themselves, in training mode."""
    shape = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 32}
    model = OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, dropout=0.5, pad_token_id=0, eos_token_id=EOS, **shape)).eval()
    ids_BT = torch.tensor([[3, 4, 5]])
    with checkpointed(model):
        inside = model(ids_BT, use_cache=False).logits
    assert torch.equal(inside, model(ids_BT, use_cache=False).logits)


def test_what_a_chunk_gives_back_does_not_keep_its_logits(engine):
    hidden_MD, head = torch.ones(3, engine.student.config.hidden_size), engine.student.get_output_embeddings()
    tokens = Tokens(torch.tensor([3, 4, 5]), None, torch.ones(3))
    loss_M, grad_MD = engine_module.through_head(head, hidden_MD, cross_entropy, tokens, 1.0)
    assert loss_M.grad_fn is None
    assert grad_MD.grad_fn is None


def test_an_update_counts_in_the_version_of_every_weight(engine):
    """By which a sampler with weights of its own sees that it has to take new ones."""
    before = [weight._version for weight in engine.student.parameters()]
    engine.update(sequences(*ROWS), cross_entropy, teacher=False, weights_B=None, lr_scale=1.0)
    assert all(weight._version > old for weight, old in zip(engine.student.parameters(), before, strict=True))


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(engine, loss):
    engine.student.load_state_dict(tiny_llama(1, layers=1).state_dict())
    engine.teacher = ModelTeacher(copy.deepcopy(engine.student))
    before = copy.deepcopy(engine.student.state_dict())
    done = engine.update(sequences(*ROWS), loss, teacher=True, weights_B=None, lr_scale=1.0)
    assert abs(done.loss) < 1e-6
    assert all(torch.equal(before[name], weight) for name, weight in engine.student.state_dict().items())


def test_a_loss_that_is_reduced_or_not_finite_is_refused(engine):
    for loss, line in (
        (lambda logits_NV, tokens: cross_entropy(logits_NV, tokens).mean(), "one value per token"),
        (lambda logits_NV, tokens: cross_entropy(logits_NV, tokens) * float("nan"), "not finite"),
    ):
        before = copy.deepcopy(engine.student.state_dict())
        with pytest.raises(RunError, match=line):
            engine.update(sequences(*ROWS), loss, teacher=False, weights_B=None, lr_scale=1.0)
        assert all(torch.equal(before[name], weight) for name, weight in engine.student.state_dict().items())


def test_micro_batches_hold_every_row_once_within_their_size():
    batch = sequences(*ROWS)
    parts = list(micro_batches(batch, 10))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(ROWS)))
    assert all(len(rows) == 1 or len(rows) * int(batch.length_B[rows].max()) <= 10 for rows in parts)
    assert len(parts) < len(ROWS)


def test_scored_rows_come_in_the_order_of_response_tokens(engine):
    batch = sequences(*ROWS)
    together_NV, everything = engine.teacher(batch)[:]
    alone = [engine.teacher(batch[[row]])[:][0] for row in range(len(batch))]
    torch.testing.assert_close(together_NV, torch.cat(alone), rtol=0, atol=1e-5)
    assert together_NV.shape == (batch.response_tokens, VOCABULARY)
    assert everything is None


def test_a_judge_at_random_writes_the_same_checks_and_draws_each_verdict_from_the_text_alone(rig):
    engine = rig().engine
    batch = rig().bench.sample(Prompts([[3 + row % 8, row % 7 + 2] for row in range(200)], ["a"] * 200))
    by_lot = replace(engine.judge_model, at_random=True)
    first, again = by_lot(engine.reader(batch)), by_lot(engine.reader(batch))
    assert torch.equal(first.usage.written_B, engine.judge(batch).usage.written_B)
    assert torch.equal(first.verdict_B, again.verdict_B)
    assert len(set(first.verdict_B.tolist())) > 20
    assert 0.35 < first.verdict_B.mean() < 0.65


def divergences(student, teacher, prompts, *, max_response, eos, seed, kept):
    rollouts = Rollouts.of(student, teacher, prompts, max_response=max_response, eos=eos, seed=seed, kept=kept)
    return along(rollouts, False, kept)[0]["forward_kl"]


def test_a_model_does_not_diverge_from_itself(tmp_path):
    model = tiny_llama(4)
    record = divergences(
        model, copy.deepcopy(model), Prompts([[3, 4], [5]] * 8, ["task"] * 16), max_response=8, eos=EOS, seed=0, kept=tmp_path / "kept"
    )
    assert np.abs(record.student_NT).max() < 1e-6
    estimate = gap(record)
    assert (estimate.regret, estimate.per_step, estimate.exaccerr) == (0, 0, None)


def test_divergence_is_the_teachers_kl_along_both_models_own_rollouts(tmp_path):
    student, teacher = tiny_llama(4), tiny_llama(5)
    prompts = Prompts([[3, 4], [5], [6, 7, 8]] * 4, ["task"] * 12)
    record = divergences(student, teacher, prompts, max_response=8, eos=EOS, seed=3, kept=tmp_path / "kept")
    again = divergences(tiny_llama(6), teacher, prompts, max_response=8, eos=EOS, seed=3, kept=tmp_path / "kept")
    anew = divergences(student, teacher, prompts, max_response=8, eos=EOS, seed=3, kept=tmp_path / "other")
    assert np.array_equal(record.teacher_NT, anew.teacher_NT)  # kept or sampled anew, they are the same
    assert np.array_equal(record.teacher_alive_NT, again.teacher_alive_NT)  # all students of a seed meet the same teacher rollouts
    first = torch.tensor([[3, 4]])
    t_V, s_V = (model(first).logits[0, -1].log_softmax(-1) for model in (teacher, student))
    expected = (t_V.exp() * (t_V - s_V)).sum().item()
    assert record.student_NT[0, 0] == pytest.approx(expected, rel=1e-4)
    assert record.teacher_NT[0, 0] == pytest.approx(expected, rel=1e-4)
    assert record.student_alive_NT[:, 0].all()


class Scripted:
    """A judge model that writes one token per row, with a given probability, then EOS; it keeps what it was asked."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(num_hidden_layers=1, model_type="scripted")

    def __init__(self, script: list[tuple[int, float]]) -> None:
        self.script, self.asked = script, None

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        probability_RV = torch.full((len(self.script), VOCABULARY), 1e-9)
        if self.asked is None:
            self.asked = input_ids.tolist()
            for row, (token, probability) in enumerate(self.script):
                probability_RV[row] = (1 - probability) / (VOCABULARY - 1)
                probability_RV[row, token] = probability
        else:
            probability_RV[:, EOS] = 1
        return SimpleNamespace(logits=probability_RV.log()[:, None].expand(-1, input_ids.shape[1], -1))

    __call__ = forward


def judged(script: list[tuple[int, float]], batch: Sequences, question: list[int]):
    model = Scripted(script)
    return model, CheckJudge(model, question, YES, NO, EOS, max_check=4)(Reader()(batch))  # pyright: ignore[reportArgumentType]


def test_the_judge_reads_prompt_and_answer_without_eos_then_the_question():
    batch = sequences(([8, 9], [7, 6, EOS]), ([8], [9, 7, 6]))  # one finished, one cut
    model, judgement = judged([(YES, 0.9), (NO, 0.8)], batch, [2, 3])
    assert model.asked == [[8, 9, 7, 6, 2, 3]] * 2
    assert judgement.verdict_B.tolist() == pytest.approx([0.9, 0.2], abs=1e-5)
    assert (judgement.usage.read_B.tolist(), judgement.usage.written_B.tolist()) == ([6, 6], [2, 2])  # verdict and EOS
    assert not judgement.unreadable_B.any()


@pytest.mark.parametrize(("token", "verdict"), [(YES, 0.7), (NO, 0.3), (6, 0.5), (EOS, 0.5)])
def test_a_verdict_is_the_probability_of_yes_and_half_where_none_was_said(token: int, verdict: float):
    batch = sequences(([8, 9], [7, EOS]))
    for question in ([2, 3], [2, NO]):  # a question that ends with "no" says nothing itself
        assert judged([(token, 0.7)], batch, question)[1].verdict_B.item() == pytest.approx(verdict, abs=1e-5)


def test_a_verdict_comes_from_prompt_and_answer_alone(rig):
    """The task's name, the only other thing a prompt carries, changes nothing: there is no way to the ground truth."""
    batch = rig().bench.sample(Prompts([[3, 4, 5], [6]], ["a", "b"]))
    one = rig().engine.judge(batch).verdict_B
    assert torch.equal(one, rig().engine.judge(replace(batch, logprob_BT=batch.logprob_BT - 1)).verdict_B)
    assert set(CheckJudge.__dataclass_fields__) == {
        "model",
        "question",
        "yes",
        "no",
        "eos",
        "max_check",
        "at_random",
        "tokenizer",
        "growth",
    }
    assert set(Answer.__dataclass_fields__) == {"ids", "prompt", "response"}


def test_a_judge_whose_words_end_alike_is_refused(tokenizer):
    with pytest.raises(UserError, match="same token"):
        CheckJudge.from_text(tiny_llama(1), tokenizer, question="\nCheck:\n", yes="yes.", no="no.", max_check=4)

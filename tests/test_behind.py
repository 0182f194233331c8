"""Rollouts a round behind: what is written does not depend on when, and only the weights are older."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import EOS, RESPONSE, tiny_llama
from test_compare import configured, in_this_process, run

from opd_bench.behind import Behind
from opd_bench.errors import RunError
from opd_bench.losses import reverse_kl
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts


def rounds(engine, count: int, batches: tuple[int, ...] = (8,), start: int = 0) -> list[list]:
    """What the engine's student writes in each round; it trains in between. The prompts' numbers go round ``batches``."""
    written, row = [], start
    for number in range(count):
        size = batches[number % len(batches)]
        drawn = engine.sample(engine.prompts(row, size), 2)
        row += size
        engine.update(drawn, reverse_kl, teacher=True, weights_B=None, lr_scale=1.0)
        written.append([drawn.ids_BT.tolist(), drawn.logprob_BT.tolist()])
    return written


def behind(rig, *, overlap: bool, lr: float = 0.05):
    engine = rig(lr=lr).engine
    engine.sampler = Behind(sample, overlap)
    return engine


@pytest.mark.parametrize("batches", [(8,), (8, 8, 3)], ids=["foreseen", "not foreseen"])
def test_what_is_written_ahead_is_what_would_be_written_when_asked(rig, batches):
    assert rounds(behind(rig, overlap=True), 6, batches) == rounds(behind(rig, overlap=False), 6, batches)


def test_each_round_is_by_the_weights_of_the_round_before(rig):
    engine, older = behind(rig, overlap=False), None
    for number in range(4):
        prompts, state = engine.prompts(8 * number, 8), engine.generator.get_state()
        now = copy.deepcopy(engine.student)
        expected, other = (
            sample(model, prompts, max_response=RESPONSE, eos=EOS, generator=torch.Generator().set_state(state))
            for model in (older or now, now)
        )
        drawn = engine.sample(prompts, 1)
        assert torch.equal(drawn.ids_BT, expected.ids_BT)
        assert torch.equal(drawn.logprob_BT, expected.logprob_BT)
        assert (drawn.logprob_BT.tolist() == other.logprob_BT.tolist()) == (number == 0)
        engine.update(drawn, reverse_kl, teacher=True, weights_B=None, lr_scale=1.0)
        older = now


def test_staleness_is_seen_as_a_gap_and_weighted(rig):
    late, prompt = behind(rig, overlap=False), rig(lr=0.05).engine
    rounds(late, 4)
    rounds(prompt, 4)
    assert prompt.mismatch.largest < 1e-4 < 0.02 < late.mismatch.largest
    assert prompt.mismatch.weighted == 0 < late.mismatch.weighted


@pytest.mark.parametrize("overlap", [True, False])
def test_a_fork_goes_on_as_the_original(rig, overlap):
    engine = behind(rig, overlap=overlap)
    rounds(engine, 3)
    fork = engine.fork()
    assert rounds(fork, 3, start=24) == rounds(engine, 3, start=24)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_failure_while_writing_is_raised_where_rollouts_are_asked_for(overlap):
    def failing(model, prompts, **_):
        raise RunError("out of paper")

    sampler = Behind(failing, overlap)
    with pytest.raises(RunError, match="out of paper"):
        sampler(tiny_llama(1), Prompts([[3]], ["task"]), max_response=2, eos=EOS, generator=None)


def test_a_comparison_charges_stale_rollouts_alike_and_says_so(pair_folders, tmp_path):
    """With next to no learning rate weights do not age, so nothing else may differ."""
    boards = {}
    for staleness in (0, 1):
        config = configured(
            pair_folders, seeds=1, methods={"opd": {"lr": 1e-12}}, rollouts={"staleness": staleness}, budget={"points": [0.5]}
        )
        with in_this_process():
            boards[staleness] = run(config, tmp_path / str(staleness))
    prompt, late = boards[0].methods[0], boards[1].methods[0]
    assert prompt.spent.flops == late.spent.flops
    assert prompt.spent.tokens == late.spent.tokens
    assert [(point.share, point.score) for point in prompt.curve] == [(point.share, point.score) for point in late.curve]
    assert prompt.score == late.score
    assert [note for note in boards[1].notes if note not in boards[0].notes] == [
        "Rollouts lie a round behind: written with the weights of the round before, charged like any other (staleness 1)."
    ]

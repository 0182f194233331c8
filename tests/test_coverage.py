"""A small version of the coverage study: on simulated leaderboards the intervals hold the truth and the claims are not false."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks/coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_study", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_truth_of_a_simulation_is_the_mean_of_its_scores(script):
    """Ten thousand items and many seeds come close to what is said to be true, for students and shares alike."""
    board = script.simulate(script.TYPICAL, (0.0, 0.1), 300, 3000, np.random.default_rng(0))
    found = [sum(weight * scores[task].mean() for task, weight in script.WEIGHTS.items()) for scores in board.students]
    assert found == pytest.approx(board.true_M.tolist(), abs=0.02)
    for scores, true in zip(board.students, board.true_share_M, strict=True):
        share = script.recovered_share(scores, board.starts, board.teacher, script.WEIGHTS)
        assert share is not None
        assert share.mean == pytest.approx(true, abs=0.05)


@pytest.mark.parametrize("world", ["like the embedded run", "seeds vary"])
@pytest.mark.parametrize("seeds", [3, 8])
def test_intervals_cover_and_claims_hold(script, world, seeds):
    chosen = next(each for each in script.WORLDS if each.name == world)
    found = script.study(chosen, script.DIFFERENT, seeds, 50, 150, np.random.default_rng(1))
    assert min(found.score, found.difference, found.recovered) >= 0.93
    assert found.false_claims <= 0.05
    assert (found.power[0.1] > 0.25) == (seeds == 8)


def test_the_interval_of_a_crossing_covers(script):
    chosen = next(each for each in script.WORLDS if each.name == "seeds vary")
    assert script.crossing_study(chosen, 8, 250, 60, np.random.default_rng(2)) >= 0.93

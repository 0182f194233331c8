"""The configuration chooses who samples and who scores, and what does not fit is refused before anything trains."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from test_compare import configured, in_this_process, run

from opd_bench import backends
from opd_bench.config import model_location
from opd_bench.embedded.fit import new_llama
from opd_bench.errors import UserError
from opd_bench.models import load_pairs
from opd_bench.scoring import ModelTeacher
from opd_bench.teacher_cache import CachedTeacher
from opd_bench.teachers import Teachers

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15]]


@pytest.fixture
def pair(pair_folders):
    return load_pairs([str(pair_folders["student"])], model_location(str(pair_folders["teacher"])))[0]


def test_by_default_the_models_themselves_sample_and_score(pair_folders, pair, tmp_path):
    config = configured(pair_folders)
    assert backends.teacher_of(config, pair, alone := Teachers(pair.teacher), 40, tmp_path) == alone
    assert backends.sampler_of(config, 250, 40).func is backends.sample  # pyright: ignore[reportFunctionMemberAccess]
    assert backends.check_teacher(config, pair, PROMPTS, 40) is None


def test_a_sparse_signal_is_measured_against_the_teacher(pair_folders, pair):
    wide, narrow = (
        backends.check_teacher(configured(pair_folders, scoring={"by": "cache", "top": top}), pair, PROMPTS, 40) for top in (50, 2)
    )
    assert wide is not None
    assert narrow is not None
    assert 0 < wide["largest_gap"] < 0.01  # half precision
    assert narrow["other_mass"] > wide["other_mass"] > 0


def test_a_signal_of_other_weights_is_refused(pair_folders, pair, monkeypatch, tmp_path):
    other = new_llama(64, 1, pair.tokenizer, seed=9)
    other.get_output_embeddings().weight.data.mul_(30)
    monkeypatch.setattr(backends, "teacher_of", lambda *_: CachedTeacher(ModelTeacher(other), 4, tmp_path / "scores.sqlite"))
    with pytest.raises(UserError, match="serve the teacher that the configuration names"):
        backends.check_teacher(configured(pair_folders, scoring={"by": "cache"}), pair, PROMPTS, 40)


@pytest.mark.parametrize(
    ("scoring", "complaint"),
    [
        ({"by": "cache", "top": 100_000}, "some must be left"),
        ({"by": "server", "url": "http://127.0.0.1:9/v1"}, "does not answer"),
    ],
)
def test_scoring_that_cannot_be_is_one_line(pair_folders, pair, scoring, complaint):
    with pytest.raises(UserError, match=complaint):
        backends.check_teacher(configured(pair_folders, scoring=scoring), pair, PROMPTS, 40)


@pytest.mark.parametrize("part", ["rollouts", "scoring"])
@pytest.mark.parametrize("given", [{"by": "server"}, {"url": "http://127.0.0.1:8000/v1"}])
def test_a_server_and_its_address_need_each_other(pair_folders, part, given):
    with pytest.raises(UserError, match=rf"{part}\.url and {part}\.by: server need each other"):
        configured(pair_folders, **{part: given})


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_absent_is_one_line(pair_folders, pair):
    with pytest.raises(UserError, match=r"opd-bench\[vllm\]"):
        backends.check_sampler(configured(pair_folders, rollouts={"by": "vllm"}), pair, PROMPTS, 40, workers=2)


def test_a_comparison_by_cache_trains_states_its_signal_and_keeps_teacher_text_only(pair_folders, tmp_path):
    methods = {name: {"batch": 4} for name in ("sft", "offline_kd", "opd")}
    config = configured(pair_folders, seeds=1, methods=methods, scoring={"by": "cache", "top": 8}, budget={"points": []})
    with in_this_process():
        run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run/manifest.json").read_text())["teacher_signal"]["other_mass"] > 0
    assert (tmp_path / "run/corpus/seed-0/scores.sqlite").stat().st_size > 0
    mismatch = {name: json.loads((tmp_path / f"run/arms/{name}/seed-0/arm.json").read_text())["mismatch"] for name in methods}
    assert mismatch["sft"] is None
    assert mismatch["offline_kd"] is None
    assert 0 < mismatch["opd"]["mean"] <= mismatch["opd"]["largest"] < 1e-3
    assert mismatch["opd"]["weighted"] == 0

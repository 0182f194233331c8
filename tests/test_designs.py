"""Designs: a name that stands for methods, contrasts and what must be said of them; here `--methods factorial`, end to end."""

from __future__ import annotations

import json
import re

import pytest
from test_cli import written
from test_compare import SMALL, in_this_process, models, rows, run

from opd_bench.config import load, selection, size, tiers
from opd_bench.errors import UserError
from opd_bench.methods import designs
from opd_bench.plan import jobs
from opd_bench.statistics import seeds_needed

CELLS = {
    "teacher_fkl": {"on_policy": 0, "divergence": "forward_kl"},
    "teacher_rkl": {"on_policy": 0, "divergence": "reverse_kl"},
    "student_fkl": {"on_policy": 1, "divergence": "forward_kl"},
    "student_rkl": {"on_policy": 1, "divergence": "reverse_kl"},
}


def designed(*overlays: dict, tier: str = "embedded"):
    """The factorial design over ``tier``, with sizes and configurations between its two parts."""
    below, above = selection("factorial")
    return load(tier, [below, *overlays, above])


def shared(options: dict) -> tuple:
    return options["lr"], options["batch"]


@pytest.mark.parametrize("tier", tiers())
@pytest.mark.parametrize("name", designs())
def test_every_design_is_valid_over_every_tier_and_has_seeds_enough(name: str, tier: str):
    below, above = selection(name)
    own = {"students": ["embedded/student-0"], "teacher": "embedded/teacher", "prompts": []}  # a tier's may be yet to be built or fetched
    config = load(tier, [below, above, own])
    count = len(config.methods)
    assert config.seeds >= max(seeds_needed(count * (count - 1) // 2), seeds_needed(len(config.contrasts)))
    assert jobs(config)  # every method is found and takes its options


def test_the_cells_differ_in_their_factors_alone():
    config, tier = designed(), load("embedded", [])
    opd = tier.methods["opd"]
    assert {name: config.methods[name] for name in CELLS} == {name: {"method": "opd", **opd, **factors} for name, factors in CELLS.items()}
    assert config.methods["sft"] == {**opd, "epochs": 1}
    assert config.methods["opd_rlaif"] == tier.methods["opd_rlaif"]
    assert config.methods["rlaif"] == dict(zip(("lr", "batch"), shared(tier.methods["opd_rlaif"]), strict=True))


def test_effects_are_those_of_the_two_by_two():
    contrasts = designed().contrasts
    sign = {1: 1, 0: -1, "reverse_kl": 1, "forward_kl": -1}
    prefixes, divergence, interaction = list(contrasts.values())[:3]
    for name, factors in CELLS.items():
        one, other = sign[factors["on_policy"]], sign[factors["divergence"]]
        assert (prefixes[name], divergence[name], interaction[name]) == (one / 2, other / 2, one * other)


def test_cells_follow_what_a_configuration_says_of_opd():
    config = designed({"methods": {"opd": {"lr": 7e-4}, "sft": {"lr": 1e-2}, "opd_rlaif": {"batch": 8}}})
    batch = load("embedded", []).methods["opd"]["batch"]
    assert {shared(config.methods[name]) for name in (*CELLS, "sft")} == {(7e-4, batch)}
    assert config.methods["rlaif"]["batch"] == config.methods["opd_rlaif"]["batch"] == 8
    with pytest.raises(UserError, match="there is no 'opd' for another method to be like"):
        designed({"methods": {"sft": {}, "opd_rlaif": {}}})


def test_sizes_and_configurations_change_the_seeds_but_not_the_methods():
    assert designed().seeds == 10
    assert designed().budget.points == []
    assert designed(size("smoke")).seeds == 2
    assert designed(size("smoke")).methods == designed().methods
    own = {"seeds": 12, "contrasts": {"mine": {"sft": 1, "rlaif": -1}}}
    assert designed(own).seeds == 12
    assert designed(own).contrasts == {**own["contrasts"], **designed().contrasts}


def test_contrasts_and_notes_leave_the_arms_as_they_are():
    below, above = selection("factorial")
    plain = load("embedded", [below, {"methods": above["methods"]}])
    assert [job.run_id for job in jobs(plain)] == [job.run_id for job in jobs(designed())]
    assert plain.digest != designed().digest


def test_names_are_a_selection_and_no_name_is_none():
    assert selection(None) == ({}, {})
    assert selection("sft, path/to/mine.py") == ({}, {"methods": {"sft": {}, "path/to/mine.py": {}}})
    for names in ("factorial,opd", "opd,factorial", "factorial,factorial"):
        with pytest.raises(UserError, match="--methods factorial is a design"):
            selection(names)


def test_a_dry_run_prints_arms_and_contrasts(program, tmp_path, pair_folders):
    config = written(tmp_path, pair_folders)
    code, out, err = program("compare", "--config", config, "--methods", "factorial", "--seeds", 3, "--dry-run")
    assert (code, err) == (0, "")
    assert "21 arms of 5.00e+09 FLOPs" in out
    assert all(re.search(rf"^ *{name} +3 +4 ", out, re.MULTILINE) for name in designed().methods)
    assert "Contrasts to be tested: student prefixes − teacher prefixes; " in out


@pytest.mark.slow
def test_a_small_factorial_says_what_each_part_does_and_what_was_shared(pair_folders, tmp_path):
    config = designed(SMALL, models(pair_folders), {"seeds": 2, "budget": {"points": []}})
    with in_this_process():
        board = run(config, tmp_path / "run")
    assert {method.name for method in board.methods} == config.methods.keys()
    assert [contrast.name for contrast in board.contrasts] == [*config.contrasts] * 3
    assert [contrast.family for contrast in board.contrasts[:: len(config.contrasts)]] == ["score", "sampled", "excess"]
    mean = {method.name: method.score.mean or 0.0 for method in board.methods}
    for contrast in board.contrasts[: len(config.contrasts)]:
        assert contrast.difference == pytest.approx(sum(weight * mean[name] for name, weight in contrast.weights.items()), abs=1e-12)
    assert all(any(said in note for note in board.notes) for said in ("2 seeds and 21 pairs", "2 seeds and 6 contrasts"))
    text = (tmp_path / "run/leaderboard.md").read_text(encoding="utf-8")
    assert "| interaction | student_rkl − teacher_rkl − student_fkl + teacher_fkl |" in text
    assert all(note in text for note in config.notes)
    assert (tmp_path / "run/effects.png").read_bytes().startswith(b"\x89PNG")
    charged = {name: {row["kind"] for row in rows(tmp_path / "run/ledger.jsonl") if row["method"] == name} for name in config.methods}
    assert charged["rlaif"] == {"student_sample", "judge", "student_update"}
    assert charged["sft"] == {"teacher_generate", "student_update"}
    assert charged["teacher_fkl"] == charged["teacher_rkl"] == {"teacher_generate", "teacher_score", "student_update"}
    assert charged["student_fkl"] == charged["student_rkl"] == {"student_sample", "teacher_score", "student_update"}
    manifest = json.loads((tmp_path / "run/manifest.json").read_text(encoding="utf-8"))
    assert manifest["config"]["contrasts"] == config.contrasts

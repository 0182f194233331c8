"""A profile adds up to the step it is of, changes nothing in it, and names the part that takes most."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from test_compare import configured, in_this_process, models

from opd_bench import cli, clock
from opd_bench import step_profile as module
from opd_bench.advice import Row, Setup, bottleneck
from opd_bench.errors import UserError
from opd_bench.losses import reverse_kl
from opd_bench.step_profile import profile

OPD = {"weight sync", "prefill", "decode", "teacher", "forward", "loss", "backward", "optimiser", "harness"}
SETUP = Setup(
    batch=16,
    update_tokens=1200,
    response=40,
    max_response=96,
    check=3,
    max_check=20,
    on_policy=True,
    threads=1,
    cores=2,
    all_cores=1.9,
    bfloat16=1.0,
    checkpointing=False,
    vocabulary=300,
    rollouts_by="model",
    scoring_by="model",
    scoring_top=20,
    options=("lr", "batch"),
)


@pytest.fixture(scope="module", autouse=True)
def _brief():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "PEAK_S", 0.01)
        yield


@pytest.fixture(scope="module")
def found(pair_folders):
    """Profiles of single steps, by method."""
    methods = {name: {"batch": 4} for name in ("opd", "offline_kd")} | {"opd_rlaif": {"batch": 8}}
    with in_this_process():
        return {name: profile(configured(pair_folders, methods=methods), name, 1, cli.console) for name in methods}


def test_every_part_of_a_step_is_there_and_they_add_up_to_it(found):
    assert {row.part for row in found["opd"].rows} == OPD
    assert {"judge", *(f"judge, {part}" for part in ("weight sync", "prefill", "decode"))} == {
        row.part for row in found["opd_rlaif"].rows
    } - OPD
    assert {row.part for row in found["offline_kd"].rows} == OPD - {"weight sync", "prefill", "decode"} | {"teacher text"}
    for of in found.values():
        assert all(row.seconds >= 0 for row in of.rows)
        assert sum(row.share for row in of.rows) == pytest.approx(1)
        assert {row.part for row in of.rows} & set(of.absent) == set()
    (wall,) = found["opd"].seconds
    assert found["opd"].step_s == pytest.approx(wall)


def test_figures_of_a_part_agree_with_each_other(found):
    document = json.loads(json.dumps(found["opd"].to_json()))
    by_part = {row["part"]: row for row in document["parts"]}
    for row in by_part.values():
        if row["tokens"]:
            assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        if row["flops"]:
            assert row["share_of_peak"] == pytest.approx(row["flops"] / row["seconds"] / row["peak_flops_per_s"])
            assert 0 < row["share_of_peak"] < 1
    assert by_part["forward"]["tokens"] == by_part["teacher"]["tokens"] > by_part["loss"]["tokens"] > 0
    assert {row["peak_flops_per_s"] for row in by_part.values() if row["flops"]} == {document["peak_flops_per_s"]}
    assert by_part["backward"]["flops"] == pytest.approx(2 * by_part["forward"]["flops"], rel=0.01)
    assert document["bottleneck"]


def test_rollouts_are_held_against_the_peak_of_their_own_precision_and_layers_computed_again_are_counted(found, pair_folders):
    changes = {"methods": {"opd": {"batch": 4}}, "rollouts": {"dtype": "bfloat16"}, "gradient_checkpointing": True}
    with in_this_process():
        other = profile(configured(pair_folders, **changes), "opd", 1, cli.console)
    rows = {row.part: row for row in other.rows}
    assert rows["decode"].peak_flops_per_s == rows["prefill"].peak_flops_per_s != other.peak_flops_per_s
    assert rows["teacher"].peak_flops_per_s == rows["backward"].peak_flops_per_s == other.peak_flops_per_s
    assert rows["backward"].flops / rows["forward"].flops > 2.5
    assert other.setup.bfloat16 == 1


def test_listening_changes_nothing(rig):
    written = []
    for listening in (False, True):
        engine = rig(lr=0.01).engine
        with clock.recording() if listening else clock.part("nothing"):
            for row in (0, 8):
                drawn = engine.sample(engine.prompts(row, 8), 1)
                engine.update(drawn, reverse_kl, teacher=True, weights_B=None, lr_scale=1.0)
        written.append([drawn.ids_BT, *engine.student.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*written, strict=True))


@pytest.mark.parametrize(
    ("part", "change", "knob"),
    [
        ("decode", {}, "raise the method's batch, now 16"),
        ("decode", {"batch": 96}, "set rollouts.by: vllm"),
        ("decode", {"batch": 96, "bfloat16": 2.0}, "set rollouts.dtype: bfloat16"),
        ("backward", {"checkpointing": True}, "leave out gradient_checkpointing"),
        ("weight sync", {}, "raise the method's batch"),
        ("optimiser", {}, "raise the method's batch"),
        ("prefill", {}, "shorter prompts"),
        ("teacher", {}, "raise threads, now 1 on 2 cores"),
        ("teacher", {"threads": 2, "all_cores": 1.0}, "scoring.by: server"),
        ("teacher", {"on_policy": False}, "scoring.by: cache"),
        ("teacher", {"scoring_by": "server"}, "lower scoring.top, now 20"),
        ("teacher text", {"options": ("epochs",)}, "raise the method's epochs"),
        ("judge", {"check": 15}, "lower judge.max_check, now 20"),
        ("backward", {"update_tokens": 100}, "raise the method's batch"),
        ("loss", {"all_cores": 1.0, "response": 90}, "lower max_response, now 96"),
        ("harness", {}, "raise the method's batch"),
    ],
)
def test_the_sentence_names_the_largest_part_and_a_setting_that_moves_it(part, change, knob):
    rows = [Row(name, 6.0 if name == part else 0.5, 0.0, 1) for name in (*OPD, "judge", "teacher text")]
    said = bottleneck(rows, replace(SETUP, **change))
    assert said.startswith(f"{part} takes 5")
    assert knob in said


def test_a_judge_is_one_part_however_much_goes_on_within_it():
    rows = [
        Row("decode", 3.0, 0.3, 1),
        Row("judge, prefill", 2.0, 0.2, 1),
        Row("judge, decode", 2.0, 0.2, 1, flops=4e10, peak_flops_per_s=1e11),
    ]
    assert bottleneck(rows, SETUP).startswith("judge takes 57% of a step at 10% of the peak")


def test_an_unknown_method_is_one_line(pair_folders):
    with pytest.raises(UserError, match=r"unknown method 'odp'.*did you mean"):
        profile(configured(pair_folders), "odp", 1, cli.console)


def test_the_command_prints_a_table_and_writes_json(pair_folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text(json.dumps({**models(pair_folders), "methods": {"opd": {"batch": 4}}}), encoding="utf-8")
    options = ["--config", str(tmp_path / "mine.yaml"), "--steps", "1", "--json", str(tmp_path / "profile.json")]
    monkeypatch.setattr(sys, "argv", ["opd-bench", "profile", *options])
    cli.main()
    said = capsys.readouterr().out
    assert all(part in said for part in OPD)
    document = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
    assert document["bottleneck"][1:] in said
    assert document["method"] == "opd"

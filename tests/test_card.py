"""The model card beside a finished arm: stock transformers loads the folder, the hub's library the card, and its figures are the files'."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from huggingface_hub import ModelCard
from test_compare import configured, in_this_process, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_bench import card, exposure, store
from opd_bench.compare import records
from opd_bench.plan import jobs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ONE = {"seeds": 1, "budget": {"limit": 2e9, "points": []}, "methods": {"opd_rlaif": {"batch": 4}}}


@pytest.fixture(scope="module")
def config(pair_folders):
    return configured(pair_folders, **ONE)


@pytest.fixture(scope="module")
def out(config, tmp_path_factory):
    """The folder of a finished comparison of one arm."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with in_this_process():
        run(config, out)
    return out


@pytest.fixture
def folder(out):
    return out / "arms/opd_rlaif/seed-0"


def test_stock_libraries_load_the_folder_and_its_card(folder, pair_folders):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("x = 1", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**ids, max_new_tokens=2).shape[1] > ids.input_ids.shape[1]
    loaded = ModelCard.load(folder / card.FILE)
    assert (loaded.data.library_name, loaded.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"opd-bench", "opd_rlaif"} <= {*loaded.data.tags}
    assert loaded.data.base_model is None  # a folder, which the hub does not take
    assert str(pair_folders["student"]) in loaded.text
    assert not list(folder.glob(".*"))


def test_figures_of_the_card_are_those_of_the_files(folder, config):
    loaded = ModelCard.load(folder / card.FILE)
    rows, summary = store.read_jsonl(folder / "items.jsonl"), store.read_json(folder / "arm.json")
    found = {(of.dataset_type, of.metric_name.split()[0]): of.metric_value for of in loaded.data.eval_results}
    said = {
        (row["task"], row["decoding"]): fmean(of["score"] for of in rows if (of["task"], of["decoding"]) == (row["task"], row["decoding"]))
        for row in rows
    }
    assert found == pytest.approx(said)
    gap = exposure.gap(store.load_recording(folder / "recording.npz").along["forward_kl"])
    nats = re.search(r"R (\S+), l·ε (\S+), R − l·ε (\S+) nats", loaded.text)
    assert nats
    assert [float(of.replace("−", "-")) for of in nats.groups()] == pytest.approx([gap.regret, gap.per_step, gap.excess], abs=0.005)
    for kind, flops in summary["spent"]["flops"].items():
        assert f"| {kind} | {flops:.4g} | {summary['spent']['tokens'][kind]:,} |" in loaded.text
    assert f"{summary['share_spent']:.2%} was spent" in loaded.text
    for said in (config.teacher, summary["run_id"], config.digest, '"batch": 4', "opd-bench compare", "transformers"):
        assert said in loaded.text


def test_a_model_of_the_hub_is_named_as_the_base_and_held_out_tasks_are_marked(out, config):
    manifest, planned = store.read_json(out / "manifest.json"), jobs(config)
    whole, (arm,) = records(config, out, planned)
    name = f"owner/model@{COMMIT}"
    hub = config.model_copy(update={"students": [name]})
    manifest["models"] = {name: {"version": name}}
    kept = {"greedy": np.array([1.0, 0.0]), "sampled": np.array([0.25, 0.25])}
    arm.sampled["other"] = kept["sampled"]
    arm.greedy["other"] = kept["greedy"]
    made = card.card(
        hub, manifest, replace(whole, held_out={"other": "held_out"}, models={"student": [name], "teacher": ["a", "b"]}), planned[-1], arm
    )
    assert made.data.base_model == "owner/model"
    assert json.loads(json.dumps(made.data.to_dict()))["model-index"][0]["name"] == "opd_rlaif seed 0"
    assert "| teacher | a, b |" in made.text
    assert "| other (held out) | 2 | .500 | .250 |" in made.text

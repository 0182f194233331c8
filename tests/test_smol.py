"""The smol tier from end to end, with a tiny model of random weights in the place of SmolLM2."""

import json

import pytest
import yaml

from opd_bench.embedded.fit import new_llama

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture
def base(tokenizer, tmp_path, monkeypatch):
    """A folder of a chat model whose context holds the tier's prompts; the cache is empty."""
    monkeypatch.setenv("OPD_BENCH_CACHE", str(tmp_path / "cache"))
    model = new_llama(32, 1, tokenizer, seed=0)
    model.config.max_position_embeddings = 1024
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", TEMPLATE)
        patch.setattr(tokenizer, "model_max_length", 1024)
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.slow
def test_the_tier_builds_its_models_and_compares_methods_on_them(program, base, tmp_path):
    small = {
        "build": {"base": str(base), "models": {"start": {"steps": 2}, "specialist": {"steps": 2}}, "batch_tokens": 512},
        "tasks": {"stem": ["opd_bench_calendar_arithmetic"]},
        "seeds": 1,
        "threads": 1,
        "max_response": 16,
        "budget": {"limit": 4e8},
        "evaluation": {"limit": 4},
        "exposure": {"prompts": 2, "continued": 1, "draws": 20},
        "retention": {"prompts": 3, "max_tokens": 8},
        "gates": {"truncation": None},
        "privileged": "{prompt}\nSolution:\n{solution}",
        "methods": {"sft": {"batch": 4}, "opd": {"batch": 4}},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    options = ("--tier", "smol", "--config", "small.yaml")
    code, _, error = program("compare", *options, "--out", "run", "--jobs", 1)
    assert (code, "opd-bench build-teacher --tier smol" in error) == (2, True)

    assert program("build-teacher", *options)[0] == 0
    code, said, error = program("compare", *options, "--out", "run", "--jobs", 1)
    assert code == 0, error
    board = json.loads((tmp_path / "run" / "leaderboard.json").read_text())
    assert board["tasks"] == {
        "stem": ["opd_bench_calendar_arithmetic"],
        "coding": ["opd_bench_write_function"],
        "held_out": ["opd_bench_gsm_symbolic"],
        "retention": [],
        "robustness": [],
    }
    for model in [board["teacher"], board["cold_start"], *board["methods"]]:
        assert 0 <= model["held_out"]["opd_bench_gsm_symbolic"]["mean"] <= 1
    assert all(method["retention"]["kl"]["mean"] > 0 for method in board["methods"])
    assert "KL from the start" in said
    assert any(gate["name"] == "taught" for gate in board["gates"])
    assert any(note.startswith("The teacher was privileged") for note in board["notes"])
    assert {method["name"] for method in board["methods"]} == {"sft", "opd"}

"""What a comparison may cost where nothing can be run: from shapes alone, by arithmetic that can be done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_compare import configured

from opd_bench import arm, device, dry_run, store
from opd_bench.config import load, read_yaml
from opd_bench.errors import UserError
from opd_bench.estimate import MICRO_TOKENS, SHAPES, estimate, shape_of
from opd_bench.flops import causal
from opd_bench.gpus import GPUS, Gpu
from opd_bench.ledger import Charge
from opd_bench.preflight import held, parameters
from opd_bench.resources import TIERS
from opd_bench.rollouts import ROWS

ROOT = Path(__file__).parents[1]
H100 = GPUS["h100"]
PUBLISHED = {"0.6B": 596_049_920, "1.7B": 1_720_574_976, "4B": 4_022_468_096, "8B": 8_190_735_360}  # weights, shared ones once
ON_GPU = {"gpu": {**H100.model_dump(), "longest_prompt": 20}}


@pytest.fixture
def config():
    return load("qwen3", [])


@pytest.mark.parametrize("name", sorted(read_yaml(SHAPES)))
def test_shapes_that_travel_have_the_published_number_of_weights(config, name):
    shape = shape_of(config, name)
    assert shape.parameters() == PUBLISHED[name.removeprefix("Qwen/Qwen3-").removesuffix("-Base")]
    assert shape.config.head_dim == 128
    assert shape.config.max_position_embeddings == (32768 if name.endswith("-Base") else 40960)


def test_a_shape_is_a_models_own_where_it_has_files_and_one_line_where_nobody_knows_it(config, pair_folders, monkeypatch):
    folder = str(pair_folders["teacher"])
    shape = shape_of(config, folder)
    assert (shape.parameters(), shape.source) == (parameters(folder), "its own files")
    monkeypatch.setattr(
        "opd_bench.estimate.AutoConfig.from_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("no network\nat all"))
    )
    with pytest.raises(UserError, match=r"the shape of Qwen/Qwen3-3B is not known, .*\(no network\) \(did you mean 'Qwen/Qwen3-"):
        shape_of(config, "Qwen/Qwen3-3B")


def test_steps_are_counted_as_those_of_the_loaded_models(pair_folders):
    config = configured(pair_folders, **ON_GPU, gradient_checkpointing=True, lora={"rank": 4})
    shop, found = arm.workshop(config.model_dump_json()), estimate(config)
    assert (found.counter.student_flops, found.counter.teacher_flops) == (shop.counter.student_flops, shop.counter.teacher_flops)
    sizes = [parameters(str(pair_folders[role])) for role in ("student", "teacher")]
    assert found.memory.items() >= held(config, *sizes, found.counter.student_flops.adapter_parameters).items()


def test_a_verb_takes_as_long_as_its_arithmetic_or_its_traffic(config):
    found = estimate(config)
    busy = Charge("student_update", 1, 1000, 4 * 10**15, 0.0)
    assert found.seconds(busy) == pytest.approx(4e15 / (9.89e14 * 0.4))
    prompt, response, layers, rows = 512, 1024, 28, 64
    weights, cache = 2 * PUBLISHED["0.6B"], 2 * 2 * layers * 8 * 128
    traffic = response * weights + rows * cache * causal(prompt, prompt + response)
    one = found.seconds(Charge("student_sample", 1, rows * response, 1, 0.0))
    assert one == pytest.approx(traffic / (3.35e12 * 0.4))
    many = found.seconds(Charge("student_sample", 1, (ROWS + 1) * response, 1, 0.0))
    assert many * 3.35e12 * 0.4 == pytest.approx(2 * response * weights + (ROWS + 1) * cache * causal(prompt, prompt + response))
    assert found.seconds(Charge("student_sample", 1, rows * response, 10**18, 0.0)) == pytest.approx(1e18 / (9.89e14 * 0.4))


def test_checkpointing_lora_and_a_narrow_judge_show_in_what_is_estimated(config):
    whole = estimate(config)
    assert estimate(load("qwen3", [{"gradient_checkpointing": False}])).memory["activations"] > 5 * whole.memory["activations"]
    trained = "a student with gradients and moments"
    assert estimate(load("qwen3", [{"lora": {"rank": 16}}])).memory[trained] < whole.memory[trained] / 3
    assert whole.memory["keys and values of rollouts"] == ROWS * 1536 * 2 * 2 * 28 * 8 * 128
    assert "verifier" not in whole.writers
    free = estimate(load("qwen3", [{"judge": {"by": "verifier"}, "prompts": []}]))
    assert free.counter.judge_kind == "verifier"
    assert "judge" not in free.writers
    assert arm.TorchEngine.micro_tokens == MICRO_TOKENS


def test_the_tiers_dry_run_needs_neither_models_nor_gpu_nor_network(program, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = program("compare", "--tier", "qwen3", "--dry-run", "--out", "run")
    assert (code, err) == (0, "")
    assert "An estimate; no step was run and timed: device: cuda is not to be had here (" in out
    assert "about 64 GPU-hours of H100 80GB in all, $192." in out  # 4 methods, 2 seeds, 8 GPU-hours
    assert all(f"\n  {name} " in out for name in ("sft", "offline_kd", "opd", "opd_rlaif"))
    assert "Qwen/Qwen3-4B: its shape is from opd-bench's shapes.yaml" in out
    assert "it does not fit" not in out
    assert not list(tmp_path.iterdir())
    assert "it does not fit" in program("compare", "--tier", "qwen3", "--dry-run", "--config", _small_gpu(tmp_path))[1]


def _small_gpu(folder):
    store.write_text(folder / "small.yaml", "gpu: {memory: 24}\n")
    return folder / "small.yaml"


def test_a_bad_gpu_or_model_is_one_line(program, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = program("compare", "--dry-run", "--gpu", "h10")
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown GPU 'h10' (did you mean 'h100'?); one of a100, h100, h200")


def test_a_step_is_run_where_no_gpu_is_named_or_the_named_one_and_the_models_are_here(pair_folders, monkeypatch):
    assert dry_run._no_step(configured(pair_folders)) == ""
    assert dry_run._no_step(configured(pair_folders, **ON_GPU)) == "the configuration has device: cpu"
    named = configured(pair_folders, **ON_GPU, device="cuda")
    assert "device: cuda is not to be had here" in dry_run._no_step(named)
    monkeypatch.setattr(device, "require", lambda device: None)
    assert dry_run._no_step(named) == ""
    assert "nowhere" in dry_run._no_step(named.model_copy(update={"teacher": "nowhere"}))


def test_what_a_gpu_is_called_bears_on_no_result(pair_folders):
    assert configured(pair_folders, **ON_GPU).digest == configured(pair_folders).digest
    assert Gpu(**read_yaml(TIERS / "qwen3.yaml")["gpu"]) == H100


def test_the_larger_pair_is_the_tiers_but_for_models_and_budget(config):
    larger = load("qwen3", [read_yaml(ROOT / "docs/examples/qwen3_1.7b_from_8b.yaml")])
    changed = {key for key, value in larger.model_dump().items() if value != config.model_dump()[key]}
    assert changed == {"students", "teacher", "budget"}

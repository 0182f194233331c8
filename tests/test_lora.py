"""Adapters begin as nothing, are all that is trained, and leave a model like any other."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import EOS, VOCABULARY, tiny_llama
from test_compare import configured, in_this_process, run
from test_engine import ROWS, sequences
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from opd_bench import store
from opd_bench.flops import flop_count
from opd_bench.lora import adapted, copied, merged, trained
from opd_bench.losses import cross_entropy, reverse_kl

pytest.importorskip("peft")
IDS_BT = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]])


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    ends = {"eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, **ends)).eval()


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return tiny_llama(1) if request.param == "llama" else gpt2()


def moved(model, seed: int = 0):
    """``model`` with adapters that say something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trained(model):
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def test_new_adapters_change_nothing_and_stand_beside_every_linear_map(model):
    before = model(IDS_BT).logits
    maps = [module for name, module in model.named_modules() if "Linear" in str(type(module)) or "Conv1D" in str(type(module))]
    count = flop_count(model.config, lora_rank=2)
    student = adapted(model, rank=2, alpha=4, seed=0)
    assert torch.equal(student(IDS_BT).logits, before)
    assert len(trained(student)) == 2 * (len(maps) - 1)  # the output head has none
    assert sum(weight.numel() for weight in trained(student)) == count.adapter_parameters


def test_merged_weights_say_what_the_adapters_say(model):
    student = moved(adapted(model, rank=2, alpha=4, seed=0))
    plain, said = merged(student), student(IDS_BT).logits
    assert torch.allclose(plain(IDS_BT).logits, said, atol=1e-5)
    assert not torch.allclose(tiny_llama(1)(IDS_BT).logits, said, atol=1e-2)
    assert not any("lora" in name for name in plain.state_dict())
    assert torch.equal(student(IDS_BT).logits, said), "merging leaves the student as it was"
    assert plain.get_input_embeddings().weight is student.get_input_embeddings().weight


def test_a_merged_model_is_saved_like_any_other(model, tmp_path):
    plain = merged(moved(adapted(model, rank=2, alpha=4, seed=0)))
    plain.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert not list(tmp_path.glob("adapter*"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(stock(IDS_BT).logits, plain(IDS_BT).logits)


def test_without_adapters_the_model_itself_is_plain():
    model = tiny_llama(1)
    assert merged(model) is model
    assert len(trained(model)) == len(list(model.parameters()))
    assert not {id(weight) for weight in copied(model).parameters()} & {id(weight) for weight in model.parameters()}


def test_first_weights_follow_the_seed_alone():
    first, again, other = ([weight.clone() for weight in trained(adapted(tiny_llama(1), rank=2, alpha=4, seed=s))] for s in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


@pytest.fixture
def engine(rig):
    """An engine whose student has adapters."""
    made = rig(lr=1e-2).engine
    made.student = adapted(made.student, rank=2, alpha=4, seed=0)
    made.__post_init__()
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_trains_the_adapters_alone(engine, dtype, checkpointing):
    engine.dtype, engine.gradient_checkpointing = dtype, checkpointing
    before, loss = copy.deepcopy(engine.student.state_dict()), []
    for _ in range(5):
        loss.append(engine.update(sequences(*ROWS), cross_entropy, teacher=False, weights_B=None, lr_scale=1.0).loss)
    assert loss[-1] < loss[0]
    changed = {name for name, weight in engine.student.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert all(weight.grad is None for weight in engine.student.parameters())


def test_rollouts_are_those_of_the_merged_model(engine, rig):
    moved(engine.student)
    prompts = engine.stream(0, 8)
    drawn = engine.sample(prompts, 1)
    other = rig().engine
    other.student = merged(engine.student)
    plain = other.sample(prompts, 1)
    assert torch.equal(drawn.ids_BT, plain.ids_BT)
    assert torch.equal(drawn.logprob_BT, plain.logprob_BT)
    engine.update(drawn, reverse_kl, teacher=True, weights_B=None, lr_scale=1.0)
    assert engine.mismatch.largest < 1e-4


def test_a_fork_goes_on_as_the_original_and_by_itself(engine):
    def steps(of) -> list[float]:
        losses = []
        for _ in range(3):
            drawn = of.sample(of.stream(0, 8), 1)
            losses.append(of.update(drawn, reverse_kl, teacher=True, weights_B=None, lr_scale=1.0).loss)
        return losses

    steps(engine)
    fork = engine.fork()
    before = [weight.clone() for weight in trained(engine.student)]
    there = steps(fork)
    assert all(map(torch.equal, before, trained(engine.student)))
    assert steps(engine) == there


def test_an_arm_with_adapters_leaves_plain_models_of_its_own_weights(pair_folders, tmp_path):
    methods = {name: {"batch": 4, "lr": 1e-2} for name in ("sft", "opd")}
    config = configured(pair_folders, seeds=1, methods=methods, lora={"rank": 4, "alpha": 8}, budget={"points": [0.5]})
    with in_this_process():
        board = run(config, tmp_path / "out")
    assert {method.name for method in board.methods} == set(methods)
    start = AutoModelForCausalLM.from_pretrained(pair_folders["student"])
    for name in methods:
        folder = tmp_path / f"out/arms/{name}/seed-0"
        model = AutoModelForCausalLM.from_pretrained(folder)
        changed = {key for key, weight in model.state_dict().items() if not torch.equal(weight, start.state_dict()[key])}
        assert changed == {key for key in model.state_dict() if "proj" in key}
        assert store.read_json(folder / "arm.json")["share_spent"] > 0.9
        assert (folder / "at-0.5/items.jsonl").is_file()

"""A pair that could not be compared is refused in one line; one whose padding is EOS works."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from opd_bench.embedded.fit import new_llama
from opd_bench.engine import TorchEngine
from opd_bench.errors import UserError
from opd_bench.judge_model import CheckJudge
from opd_bench.losses import cross_entropy, kl, reverse_kl
from opd_bench.models import load_model, load_pairs, load_tokenizer, weights_digest
from opd_bench.rollouts import sample
from opd_bench.scoring import ModelTeacher
from opd_bench.sequences import Prompts

OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def changed(tokenizer: PreTrainedTokenizerFast, folder: Path, **tokens: str | None) -> str:
    """``tokenizer`` with other special tokens, saved in ``folder``."""
    given = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", **tokens}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **given).save_pretrained(folder)
    return str(folder)


def complaint(request) -> str:
    with pytest.raises(UserError) as raised:
        request()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_pair_loads_in_float32_with_one_tokenizer(pair_folders):
    (pair,) = load_pairs([str(pair_folders["student"])], str(pair_folders["teacher"]))
    assert pair.student.dtype == pair.teacher.dtype == torch.float32
    assert not pair.student.training
    assert pair.eos == pair.tokenizer.convert_tokens_to_ids("<eos>")
    assert pair.tokenizer.padding_side == "left"


def test_different_vocabularies_are_refused(pair_folders, tokenizer, tmp_path):
    bigger = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    bigger.save_pretrained(tmp_path)
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    other.add_tokens(["<another>"])
    other.save_pretrained(tmp_path)
    assert "different vocabularies" in complaint(lambda: load_pairs([str(pair_folders["student"])], str(tmp_path)))


def test_different_eos_tokens_are_refused(pair_folders, tokenizer, tmp_path):
    teacher = changed(tokenizer, tmp_path, eos_token="<unk>")
    assert "end with different tokens" in complaint(lambda: load_pairs([str(pair_folders["student"])], teacher))


def test_cold_starts_of_different_shapes_are_refused(pair_folders, tokenizer, tmp_path):
    new_llama(32, 2, tokenizer, seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    students = [str(pair_folders["student"]), str(tmp_path)]
    assert "differ in shape" in complaint(lambda: load_pairs(students, str(pair_folders["teacher"])))


def test_cold_starts_share_one_teacher(pair_folders):
    first, second = load_pairs([str(pair_folders["student"])] * 2, str(pair_folders["teacher"]))
    assert first.teacher is second.teacher
    assert first.student is not second.student


def test_a_tokenizer_without_eos_is_refused(tokenizer, tmp_path):
    assert "has no EOS token" in complaint(lambda: load_tokenizer(changed(tokenizer, tmp_path, eos_token=None)))


def padded(folder: Path, tokenizer: PreTrainedTokenizerFast, width: int, columns: int, loud: float = 0.0) -> str:
    """A model with other than a column for each token; those beyond the tokenizer have logits of ``loud`` times the others' scale."""
    model = new_llama(width, 1, tokenizer, seed=width)
    model.resize_token_embeddings(len(tokenizer) + columns, mean_resizing=False)
    if columns > 0:
        model.get_output_embeddings().weight.data[len(tokenizer) :] *= loud
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_fewer_output_columns_than_tokens_are_refused(pair_folders, tokenizer, tmp_path):
    student = padded(tmp_path, tokenizer, 32, -1)
    assert "output columns for" in complaint(lambda: load_pairs([student], str(pair_folders["teacher"])))


@pytest.fixture
def padded_pair(tokenizer, tmp_path):
    """Student and teacher padded differently, so loudly that a distribution with the padding in it would be all padding."""
    return load_pairs([padded(tmp_path / "s", tokenizer, 32, 3, 1e3)], padded(tmp_path / "t", tokenizer, 64, 7, 1e3))[0]


def test_columns_beyond_the_tokenizer_are_never_sampled(padded_pair):
    for model in (padded_pair.student, padded_pair.teacher):
        generator = torch.Generator().manual_seed(0)
        drawn = sample(model, Prompts([[2, 3, 4]] * 4, [""] * 4), max_response=20, eos=padded_pair.eos, generator=generator)
        assert int(drawn.ids_BT.max()) < len(padded_pair.tokenizer)
        logits_1TV = model(torch.tensor([[2, 3, 4]])).logits
        assert logits_1TV.shape[-1] == len(padded_pair.tokenizer)
        assert drawn.logprob_BT[0, 3].item() == pytest.approx(logits_1TV[0, -1].log_softmax(-1)[drawn.ids_BT[0, 3]].item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_students_and_teachers_may_be_padded_differently(padded_pair, dtype):
    """They meet in the common columns; what lies beyond gets no gradient and keeps its place in what is saved."""
    bench, tokens = engine_of(padded_pair, dtype), len(padded_pair.tokenizer)
    before = padded_pair.student.get_output_embeddings().weight.detach().clone()
    rollouts = bench.sample(Prompts([[2, 3, 4]] * 4, [""] * 4), 1)
    done = bench.update(rollouts, reverse_kl, teacher=True, weights_B=None, lr_scale=1.0)
    mask_BT = rollouts.response_BT
    own_NV, theirs_NV = (
        model(rollouts.ids_BT).logits[:, :-1][mask_BT[:, 1:]].log_softmax(-1) for model in (bench.start, padded_pair.teacher)
    )
    assert done.loss == pytest.approx(kl(own_NV, theirs_NV).mean().item(), rel=1e-4 if dtype == torch.float32 else 0.05)
    after = padded_pair.student.get_output_embeddings().weight
    assert torch.equal(after[tokens:], before[tokens:])
    assert not torch.equal(after[:tokens], before[:tokens])


def test_a_padded_student_is_saved_whole(padded_pair, tmp_path):
    padded_pair.student.save_pretrained(tmp_path / "saved")
    stock, own = AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), padded_pair.student
    assert len(stock.lm_head.weight) == len(padded_pair.tokenizer) + 3
    ids_1T = torch.tensor([[2, 3, 4]])
    assert torch.equal(stock(ids_1T).logits[..., : len(padded_pair.tokenizer)], own(ids_1T).logits)


def engine_of(pair, dtype: torch.dtype) -> Any:
    """An engine of the pair; ``start`` is the student as it was."""
    engine = TorchEngine(
        student=pair.student,
        teacher=ModelTeacher(pair.teacher),
        eos=pair.eos,
        max_response=20,
        stream=lambda start, count: pytest.fail("the prompts are given"),
        corpus=lambda rows: pytest.fail("no text of the teacher is needed"),
        judge_model=CheckJudge(pair.teacher, [2, 3], 4, 5, pair.eos, max_check=3),
        lr=1e-3,
        seed=0,
        dtype=dtype,
    )
    engine.start = copy.deepcopy(pair.student)  # pyright: ignore[reportAttributeAccessIssue]
    return engine


def test_the_teacher_takes_the_precision_asked_for_and_the_student_trains_in_float32(pair_folders):
    (pair,) = load_pairs([str(pair_folders["student"])], str(pair_folders["teacher"]), torch.bfloat16)
    assert (pair.student.dtype, pair.teacher.dtype) == (torch.float32, torch.bfloat16)


def test_code_of_a_models_own_needs_consent(pair_folders, tmp_path):
    shutil.copytree(pair_folders["student"], folder := tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto}))
    (folder / "own.py").write_text(OWN)
    assert "trust_remote_code: true" in complaint(lambda: load_model(str(folder)))
    assert type(load_model(str(folder), remote_code=True)).__name__ == "OwnModel"


def test_missing_and_damaged_models_are_one_line(pair_folders, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(pair_folders["student"], folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert "cannot load a model" in complaint(lambda: load_pairs([str(folder)], str(pair_folders["teacher"])))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "cannot load a tokenizer" in complaint(lambda: load_tokenizer(str(folder)))


def test_padding_with_eos_keeps_eos_in_the_loss(tokenizer, tmp_path, rig):
    loaded = load_tokenizer(changed(tokenizer, tmp_path, pad_token=None))
    assert loaded.pad_token_id == loaded.eos_token_id
    bench = rig().bench
    bench.engine.eos = 0  # the id that sequences are padded with
    rollouts = bench.sample(bench.prompts(60))
    assert rollouts.finished_B.any()
    expected = []
    for row in range(len(rollouts)):
        ids_T = rollouts.ids_BT[row, : rollouts.length_B[row]]
        assert (ids_T[-1] == 0) == rollouts.finished_B[row]
        logprob_TV = bench.engine.student(ids_T[None]).logits[0].log_softmax(-1)
        expected += [-logprob_TV[place - 1, ids_T[place]].item() for place in range(int(rollouts.prompt_B[row]), len(ids_T))]
    assert bench.update(rollouts, cross_entropy) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_a_digest_follows_the_weights(pair_folders, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(pair_folders["student"], folder)
    assert weights_digest(str(folder)) == weights_digest(str(pair_folders["student"]))
    assert weights_digest(str(folder)) != weights_digest(str(pair_folders["teacher"]))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    assert weights_digest(str(folder)) != weights_digest(str(pair_folders["student"]))

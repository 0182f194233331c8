"""A pair that could not be compared is refused in one line; one whose padding is EOS works."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from opd_bench.embedded.fit import new_llama
from opd_bench.errors import UserError
from opd_bench.losses import cross_entropy
from opd_bench.models import load_pairs, load_tokenizer, weights_digest


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


def test_output_columns_must_match_the_vocabulary(pair_folders, tokenizer, tmp_path):
    model = new_llama(32, 1, tokenizer, seed=0)
    model.resize_token_embeddings(len(tokenizer) + 1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "output columns" in complaint(lambda: load_pairs([str(tmp_path)], str(pair_folders["teacher"])))


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

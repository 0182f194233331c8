"""One stream of prompts per seed, and teacher text that is sampled once and read by all."""

from __future__ import annotations

import pytest
import torch
from conftest import EOS, tiny_llama

from opd_bench import prompts as prompts_module
from opd_bench import teachers
from opd_bench.errors import UserError
from opd_bench.prompts import Corpus, Stream, encode_prompts
from opd_bench.teachers import Teachers

ENCODED = [("task", [2 + row, 3]) for row in range(7)]


def test_every_pass_meets_every_prompt_once_in_another_order():
    stream = Stream(ENCODED, seed=0)
    passes = [stream(7 * number, 7).ids for number in range(3)]
    for ids in passes:
        assert sorted(ids) == sorted(ids for _, ids in ENCODED)
    assert passes[0] != passes[1] != passes[2]


def test_a_stream_is_its_seeds_own_and_does_not_depend_on_how_it_is_read():
    whole = Stream(ENCODED, seed=1)(0, 20).ids
    late = Stream(ENCODED, seed=1)
    assert late(13, 7).ids + late(0, 13).ids == whole[13:] + whole[:13]
    assert Stream(ENCODED, seed=2)(0, 20).ids != whole


def test_a_prompt_that_leaves_no_room_is_named(tokenizer):
    pairs = [("short", "Compute 1+2\n"), ("long", "Compute 1+2+3+4+5+6\n")]
    longest = len(tokenizer(pairs[1][1], add_special_tokens=False).input_ids)
    assert [task for task, _ in encode_prompts(pairs, tokenizer, longest)] == ["short", "long"]
    with pytest.raises(UserError, match="task long"):
        encode_prompts(pairs, tokenizer, longest - 1)


def test_teacher_text_is_sampled_once_and_is_the_same_however_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_module, "CHUNK", 4)
    teacher, stream = tiny_llama(2), Stream(ENCODED, seed=0)

    def corpus(folder: str) -> Corpus:
        return Corpus(Teachers(teacher), stream, EOS, 6, tmp_path / folder)

    texts, seconds = corpus("one")(range(10))
    assert seconds > 0
    for row, ids in enumerate(stream(0, 10).ids):
        assert texts.ids_BT[row, : texts.prompt_B[row]].tolist() == ids
    backwards, _ = corpus("two")([9, 4, 0])
    assert [backwards.response(place) for place in range(3)] == [texts.response(row) for row in (9, 4, 0)]
    monkeypatch.setattr(teachers, "sample", None)  # another arm finds the text on disk, and pays what it cost
    again, again_s = corpus("one")(range(10))
    assert torch.equal(again.ids_BT, texts.ids_BT)
    assert again_s == pytest.approx(seconds)


def test_seeds_have_their_own_teacher_text(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_module, "CHUNK", 4)
    one, other = (Corpus(Teachers(tiny_llama(2)), Stream(ENCODED[:1], seed), EOS, 6, tmp_path / str(seed))(range(4))[0] for seed in (0, 1))
    assert [one.response(row) for row in range(4)] != [other.response(row) for row in range(4)]

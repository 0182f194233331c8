"""Where models lie: another device changes no result, GPUs are shared out, and one that is not there is one line."""

from __future__ import annotations

import copy
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from elsewhere import elsewhere
from rich.console import Console
from test_compare import configured, in_this_process, run
from transformers import PreTrainedModel

from opd_bench import arm, device, launch, store
from opd_bench.errors import UserError
from opd_bench.models import load_model
from opd_bench.plan import jobs
from opd_bench.supervised import fit

SMALL = {
    "seeds": 1,
    "tasks": {"stem": ["opd_bench_arithmetic"], "coding": ["opd_bench_functions"]},
    "budget": {"limit": 2e9, "points": []},
    "methods": {name: {"batch": 4} for name in ("sft", "opd_rlaif")},
}


@pytest.fixture(scope="module")
def apart():
    """``apart(function, ...)``: its value from a process in which torch has met no other device before, as autograd wants it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def test_tensors_of_two_devices_are_refused_as_on_a_gpu(apart):
    assert apart(sums) == ([2, 2], "elsewhere", "Expected all tensors to be on the same device (aten.add.Tensor)")


def sums() -> tuple[list[float], str, str]:
    with elsewhere():
        one = torch.ones(2, device="elsewhere")
        with pytest.raises(RuntimeError) as refused:
            one + torch.ones(2)
        return (one + one).tolist(), (one + one).device.type, str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"lora": {"rank": 4}, "gradient_checkpointing": True, "methods": {"opd_rlaif": {"batch": 4}}}],
    ids=["in full", "lora"],
)
def test_arms_on_another_device_come_to_the_same_results(apart, pair_folders, tmp_path, changes):
    config = configured(pair_folders, **{**SMALL, **changes})
    there = config.model_copy(update={"device": "elsewhere"})
    with in_this_process():
        run(config, tmp_path / "cpu")
    apart(run_elsewhere, there, tmp_path / "elsewhere")
    for here, job in zip(jobs(config), jobs(there), strict=True):
        own, other = here.folder(tmp_path / "cpu"), job.folder(tmp_path / "elsewhere")
        assert list(store.read_jsonl(own / "items.jsonl")) == list(store.read_jsonl(other / "items.jsonl"))
        one, two = (store.load_arrays(folder / "recording.npz") for folder in (own, other))
        assert one
        assert two
        assert one.keys() == two.keys()
        for name in one:  # to the last bits, as kernels of attention differ
            np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-4, err_msg=name)
    for place in ("cpu", "elsewhere"):
        assert store.read_json(tmp_path / place / "manifest.json")["machine"]["device"] == place


def run_elsewhere(config, out) -> None:
    save = PreTrainedModel.save_pretrained
    with pytest.MonkeyPatch.context() as patch, in_this_process(), elsewhere():  # a tensor there has no bytes to save
        patch.setattr(PreTrainedModel, "save_pretrained", lambda model, folder: save(copy.deepcopy(model).cpu(), folder))
        run(config, out)


def test_steps_in_bfloat16_stay_on_the_device(apart, pair_folders, tmp_path):
    narrow = {"dtype": "bfloat16", "gradient_checkpointing": True}
    assert apart(steps_elsewhere, configured(pair_folders, **SMALL, **narrow, device="elsewhere"), tmp_path) == [({"elsewhere"}, True)] * 2


def steps_elsewhere(config, out) -> list[tuple[set[str], bool]]:
    """After a step of each method, where the student's weights lie, and whether they changed."""
    found = []
    with elsewhere():
        shop = arm.workshop(config.model_dump_json())
        for job in (job for job in jobs(config) if job.method):
            student = copy.deepcopy(shop.pair.student)
            bench = shop.bench(shop.engine(job, student, 1e-2, out / "corpus"), config.limit)
            bench.batch = 4
            job.build().step(bench)
            pairs = zip(student.parameters(), shop.pair.student.parameters(), strict=True)
            changed = not all(torch.equal(new.cpu(), old.cpu()) for new, old in pairs)
            found.append(({weight.device.type for weight in student.parameters()}, changed))
    return found


def test_models_that_a_tier_builds_are_trained_on_the_device(apart, pair_folders):
    assert apart(fit_elsewhere, str(pair_folders["student"])) == ("elsewhere", True)


def fit_elsewhere(folder) -> tuple[str, bool]:
    data = cycle([(torch.tensor([[3, 4, 5, 6]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))])
    with elsewhere():
        model = load_model(folder, device="elsewhere")
        before = model.lm_head.weight.cpu()
        fit(model, data, 2, [torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)])
        return model.lm_head.weight.device.type, not torch.equal(model.lm_head.weight.cpu(), before)


BUILD = """
students: [built/start]
teacher: built/start
tasks: {stem: [opd_bench_arithmetic], coding: []}
build: {base: embedded/student-0, models: {start: {steps: 1}}, batch_tokens: 512, lr: 0.001}
"""
AUDIT = ("--student", "embedded/student-0", "--teacher", "embedded/teacher", "--task", "opd_bench_arithmetic")


@pytest.mark.parametrize(
    "command",
    [("compare",), ("audit", *AUDIT), ("build-teacher", "--tier", "embedded", "--config", "build.yaml")],
    ids=lambda command: command[0],
)
def test_a_device_that_is_not_there_is_one_line(program, monkeypatch, tmp_path, command):
    monkeypatch.setenv("OPD_BENCH_CACHE", str(tmp_path / "cache"))
    store.write_text(tmp_path / "build.yaml", BUILD)
    code, out, error = program(*command, "--device", "gpu")
    assert (code, out) == (2, "")
    assert error.startswith("error: device: gpu is not to be had here (")
    assert error.rstrip().endswith("set device: cpu, or install a torch that has it")


def test_which_gpu_is_said_by_the_environment():
    with pytest.raises(UserError, match="device: cuda:1 names one of several; write cuda, and say which by CUDA_VISIBLE_DEVICES"):
        device.require("cuda:1")


def test_gpus_are_shared_out_among_workers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv(device.VISIBLE, raising=False)
    assert device.places("cuda", 3) == ["0", "1", "0"]
    assert device.most_workers("cuda") == 2
    monkeypatch.setenv(device.VISIBLE, "3, GPU-5a")
    assert device.places("cuda", 4) == ["3", "GPU-5a"] * 2
    assert device.places("cpu", 2) == [None, None]


@pytest.mark.slow
def test_a_worker_sees_the_gpu_it_was_given_and_its_parent_lets_go_of_models(monkeypatch, pair_folders, tmp_path):
    monkeypatch.setattr(device, "places", lambda name, workers: ["7"] * workers)
    monkeypatch.setattr(launch, "_carry_out", _write_what_is_seen)
    config = configured(pair_folders)
    job = jobs(config)[0]
    arm.workshop(config.model_dump_json())
    launch.carry_out(config, [job], tmp_path, 1, Console(quiet=True), lambda job: "")
    assert (tmp_path / "seen").read_text() == "7"
    assert device.VISIBLE not in os.environ
    assert arm.workshop.cache_info().currsize == 0


def _write_what_is_seen(config, job, out):
    (out / "seen").write_text(os.environ.get(device.VISIBLE, "everything"))


def test_memory_is_asked_of_the_fullest_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (10 - number, 80))
    assert device.free("cuda") == 9

"""Methods are found by name or file, say clearly what is wrong with them, and see only what they are charged for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd_bench.errors import RunError, UserError
from opd_bench.methods import Method, find, shipped
from opd_bench.trace import worst_case
from opd_bench.train import require_one_step

HEAD = "from opd_bench.losses import cross_entropy\nfrom opd_bench.methods import Method\n"
BODY = "    def step(self, bench):\n        bench.update(bench.teacher_corpus(), cross_entropy)\n"


def written(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def complaint(request) -> str:
    with pytest.raises(UserError) as raised:
        request()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_shipped_methods_come_by_name():
    assert set(shipped()) == {"sft", "offline_kd", "opd", "opd_rlaif", "rlaif"}
    for name in shipped():
        method = find(name).build({"batch": 12})
        assert isinstance(method, Method)
        assert method.config.batch == 12


def test_another_method_takes_one_file(tmp_path, rig):
    source = find(written(tmp_path, f"{HEAD}class Mine(Method):\n{BODY}"))
    assert source.name == "mine"
    bench = rig().bench
    source.build({}).step(bench)
    assert bench.ledger.saw() == ["teacher text"]


def test_an_unknown_name_is_met_with_a_suggestion():
    assert "did you mean 'offline_kd'?" in complaint(lambda: find("offline_dk"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1 / 0", "can't be imported: ZeroDivisionError"),
        ("def broken(:", "can't be imported: SyntaxError"),
        (f"{HEAD}class Mine(Method):\n    pass\n", "Mine lacks `step(self, bench)`"),
        (f"{HEAD}class A(Method):\n{BODY}\nclass B(Method):\n{BODY}", "defines 2 subclasses of Method"),
        (HEAD, "defines 0 subclasses of Method"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, text: str, line: str):
    path = written(tmp_path, text)
    said = complaint(lambda: find(path))
    assert line in said
    assert "mine.py" in said


def test_a_file_that_is_not_there(tmp_path):
    assert "no method file" in complaint(lambda: find(str(tmp_path / "absent.py")))


def test_bad_options_are_refused():
    assert "did you mean 'epochs'?" in complaint(lambda: find("sft").build({"epoch": 2}))
    assert "lr" in complaint(lambda: find("sft").build({"lr": -1.0}))
    assert "on_policy" in complaint(lambda: find("opd").build({"on_policy": 1.5}))


def test_an_unknown_divergence_is_met_before_training(rig):
    method = find("opd").build({"divergence": "revers_kl"})
    assert "did you mean 'reverse_kl'?" in complaint(lambda: require_one_step(method, rig().counter, 10**12))


def test_a_batch_below_one_group_is_refused(rig):
    method = find("opd_rlaif").build({"batch": 3, "group": 4})
    assert "less than one group of 4" in complaint(lambda: require_one_step(method, rig().counter, 10**12))


def test_a_step_that_charges_nothing_is_refused(tmp_path, rig):
    idle = find(written(tmp_path, f"{HEAD}class Idle(Method):\n    def step(self, bench):\n        bench.prompts()\n")).build({})
    assert "charges nothing" in complaint(lambda: require_one_step(idle, rig().counter, 10**12))


def test_a_step_that_raises_is_named(tmp_path, rig):
    broken = find(written(tmp_path, f"{HEAD}class Broken(Method):\n    def step(self, bench):\n        1 / 0\n")).build({})
    with pytest.raises(RunError, match=r"Broken\.step raised ZeroDivisionError"):
        worst_case(broken, 4, rig().counter)


def test_prefixes_and_divergence_are_free_of_each_other(rig):
    """The 2 x 2 of who writes and which divergence needs no new method."""
    for share, seen in ((1, ["teacher distributions"]), (0, ["teacher text", "teacher distributions"])):
        for name in ("forward_kl", "reverse_kl"):
            bench = rig(batch=4).bench
            find("opd").build({"on_policy": share, "divergence": name}).step(bench)
            assert bench.ledger.saw() == seen


@pytest.mark.parametrize("name", ["opd_rlaif", "rlaif"])
def test_rlaif_weighs_every_rollout_by_its_own_verdict(name: str, rig, monkeypatch):
    built, passed = rig(batch=8), {}
    verdict_B = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0])
    monkeypatch.setattr(built.bench, "judge", lambda rollouts: verdict_B)
    monkeypatch.setattr(built.bench, "update", lambda rollouts, loss, **given: passed.update(given, rollouts=rollouts))
    find(name).build({"batch": 8}).step(built.bench)
    assert torch.equal(passed["weights"] > 0, verdict_B > 0)
    assert passed["rollouts"].group == 4
    if name == "opd_rlaif":
        assert passed["signal"].sequences is passed["rollouts"]


def test_the_judge_alone_is_charged_for_no_distribution(rig):
    bench = rig(batch=8).bench
    find("rlaif").build({"batch": 8}).step(bench)
    assert bench.ledger.saw() == ["judge"]
    assert "teacher_score" not in bench.ledger.by_kind("flops")


def test_a_judge_that_always_says_the_same_teaches_nothing(rig, monkeypatch):
    built = rig(batch=8)
    monkeypatch.setattr(built.bench, "judge", lambda rollouts: torch.full((8,), 0.5))
    before = [weight.clone() for weight in built.engine.student.parameters()]
    find("rlaif").build({"batch": 8}).step(built.bench)
    assert all(torch.equal(weight, old) for weight, old in zip(built.engine.student.parameters(), before, strict=True))

"""`opd-bench check`: shipped methods have every property, each broken one lacks the one it breaks, and no other."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from opd_bench import conformance
from opd_bench.conformance import Property, Report, check, table
from opd_bench.errors import RunError, UserError
from opd_bench.losses import DIVERGENCES, Loss, Tokens, cross_entropy, policy_gradient, reverse_kl
from opd_bench.methods import find, shipped
from opd_bench.sequences import Sequences, concatenate
from opd_bench.watch import Watch, foreign_imports

ROOT = Path(__file__).parents[1]
BROKEN = ROOT / "tests/broken_methods"
LACKS = {
    "burns_seconds": Property.CHARGES,
    "draws_unseeded": Property.DETERMINISTIC,
    "ignores_batch": Property.BUDGET,
    "keeps_state": Property.STATELESS,
    "masks_eos": Property.ALIGNED,
    "outgrows_trace": Property.TRACEABLE,
    "peeks_at_test_items": Property.BLIND,
    "reaches_engine": Property.BLIND,
    "shifts_by_one": Property.ALIGNED,
    "spends_flops": Property.CHARGES,
    "trains_on_prompts": Property.ALIGNED,
    "writes_ledger": Property.BLIND,
}
EOS = 1


@cache
def report(name: str) -> Report:
    return check(str(BROKEN / f"{name}.py") if name in LACKS else name, {})


def lacking(report: Report) -> list[Property]:
    return [verdict.property for verdict in report.verdicts if verdict.held is False]


def why(report: Report, of: Property) -> str:
    return next(verdict.why for verdict in report.verdicts if verdict.property == of)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_method_has_every_property(name):
    assert report(name).fair, report(name)


@pytest.mark.parametrize("name", LACKS)
def test_a_broken_method_lacks_the_property_it_breaks_and_no_other(name):
    assert lacking(report(name)) == [LACKS[name]], report(name)
    assert all(verdict.mend for verdict in report(name).verdicts if verdict.held is False)


def test_the_documented_example_is_fair():
    assert report(str(ROOT / "docs/examples/gkd.py")).fair


def test_every_broken_method_and_every_property_has_its_test():
    assert {path.stem for path in BROKEN.glob("*.py")} == LACKS.keys()
    assert set(LACKS.values()) == set(Property)


def test_the_table_in_the_documentation_is_what_the_checks_say():
    written = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    assert table([report(name) for name in (*sorted(shipped()), *LACKS)]) in written


def test_what_cannot_be_judged_is_said():
    open_ones = [verdict.property for verdict in report("draws_unseeded").verdicts if verdict.held is None]
    assert open_ones == [Property.STATELESS, Property.TRACEABLE]


HEAD = """
import random
import torch
from opd_bench.losses import cross_entropy, policy_gradient, reverse_kl
from opd_bench.methods import Method


class Mine(Method):
    def __init__(self, config):
        super().__init__(config)
        self.random, self.steps = random.Random(7), 0

    def step(self, bench):
"""


@pytest.fixture
def checked(tmp_path):
    """``checked(lines)``: the report on a method whose step consists of ``lines``."""

    def call(*lines: str, **options) -> Report:
        (tmp_path / "mine.py").write_text(HEAD + "".join(f"        {line}\n" for line in lines))
        return check(str(tmp_path / "mine.py"), options)

    return call


def test_a_method_with_seeded_choices_and_state_on_itself_is_fair(checked):
    fair = checked(
        "self.steps += 1",
        "own = self.random.random() < 0.5 or self.steps > 10",
        "rollouts = bench.sample(bench.prompts()) if own else bench.teacher_corpus()",
        "bench.update(rollouts, reverse_kl, signal=bench.teacher(rollouts))",
    )
    assert fair.fair, fair


def test_state_in_torchs_global_generator_is_not_traceable(checked):
    found = checked("texts = bench.teacher_corpus()", "bench.update(texts, policy_gradient, weights=torch.rand(len(texts)))")
    assert lacking(found) == [Property.TRACEABLE]
    assert "global generator" in found.verdicts[-1].mend


def test_files_processes_threads_and_closed_folders_are_noticed(checked, tmp_path):
    found = checked(
        "import importlib.util, subprocess, threading",
        "open(importlib.util.find_spec('lm_eval').origin).close()",
        f"open({str(tmp_path / 'answers.txt')!r}, 'a').close()",
        "importlib.import_module('opd_bench.procedural')",
        "subprocess.run(['true'])",
        "threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "bench.batch = 1000",
        "bench.update(bench.teacher_corpus(), cross_entropy)",
    )
    assert Property.BLIND in lacking(found)
    for what in ("opens lm_eval", "answers.txt", "/procedural", "starts the process true", "leaves a thread running", "sets bench.batch"):
        assert what in why(found, Property.BLIND)


def test_matrix_products_in_a_loss_count_as_outside_the_verbs(checked):
    found = checked(
        "def loss(logits_NV, tokens):",
        "    torch.ones(256, 256) @ torch.ones(256, 256)",
        "    return cross_entropy(logits_NV, tokens)",
        "bench.update(bench.teacher_corpus(), loss)",
    )
    assert lacking(found) == [Property.CHARGES]


def test_a_step_that_charges_nothing_is_no_fair_step(checked):
    found = checked("self.steps += 1", "if self.steps != 3:", "    bench.update(bench.teacher_corpus(), cross_entropy)")
    assert lacking(found) == [Property.CHARGES]
    assert why(found, Property.CHARGES) == "step 3 charged nothing"


def test_two_seeds_must_not_train_on_the_same_prompts(checked):
    found = checked(
        "from opd_bench.sequences import Prompts",
        "bench.update(bench.sample(Prompts([[2, 3]] * bench.batch, [''] * bench.batch)), cross_entropy)",
    )
    assert lacking(found) == [Property.DETERMINISTIC]
    assert "same prompts" in why(found, Property.DETERMINISTIC)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["raise KeyError('what')"], r"Mine\.step raised KeyError"),
        (["while True:", "    bench.update(bench.teacher_corpus(), cross_entropy)"], "no end"),
        (["import os", "os._exit(3)"], "died"),
    ],
)
def test_a_method_that_does_not_run_is_an_error_of_one_line(checked, lines, said):
    with pytest.raises(RunError, match=said):
        checked(*lines)


@pytest.mark.parametrize(
    ("name", "options", "said"), [("odp", {}, "did you mean"), ("none.py", {}, "no method file"), ("opd", {"bach": 3}, "bach")]
)
def test_a_method_that_cannot_be_found_or_built_is_the_users_to_mend(name, options, said):
    with pytest.raises(UserError, match=said):
        check(name, options)


def watch(**more) -> Watch:
    return Watch(Path("mine.py"), EOS, probing=True, **more)


def batch(seed: int = 0) -> tuple[torch.Tensor, Tokens]:
    """Logits of student and teacher at 60 positions over 11 tokens, a sixth of them EOS, with weights of either sign."""
    draw = torch.Generator().manual_seed(seed)
    student_NV, teacher_NV = torch.randn(2, 60, 11, generator=draw) * 2
    ids_N = torch.randint(2, 11, (60,), generator=draw)
    ids_N[::6] = EOS
    return student_NV, Tokens(ids_N, teacher_NV.log_softmax(-1), torch.randn(60, generator=draw))


def complaints(loss: Loss) -> list[str]:
    seen = watch()
    seen.probe(loss, *batch())
    return seen.complaints


@pytest.mark.parametrize("loss", [*DIVERGENCES.values(), cross_entropy, policy_gradient])
def test_no_shipped_loss_is_complained_about(loss):
    assert complaints(loss) == []
    assert complaints(lambda logits_NV, tokens: loss(logits_NV, tokens) + 0.1 * policy_gradient(logits_NV, tokens)) == []
    assert complaints(lambda logits_NV, tokens: tokens.weight_N * loss(logits_NV, tokens)) == []


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda logits_NV, tokens: reverse_kl(logits_NV, tokens) * (tokens.ids_N != EOS), "EOS is masked"),
        (lambda logits_NV, tokens: cross_entropy(logits_NV.roll(1, 0), tokens), "other positions"),
        (lambda logits_NV, tokens: (lambda loss_N: loss_N - loss_N.mean())(cross_entropy(logits_NV, tokens)), "other positions"),
        (lambda logits_NV, tokens: cross_entropy(logits_NV, tokens) * torch.arange(60.0), "other positions"),
        (lambda logits_NV, tokens: -reverse_kl(logits_NV, tokens), "where student and teacher agree"),
        (lambda logits_NV, tokens: reverse_kl(logits_NV / 2, tokens), "where student and teacher agree"),
    ],
    ids=["masked", "shifted", "centred", "captured", "negated", "tempered"],
)
def test_a_wrong_loss_is_complained_about_once(loss, said):
    (complaint,) = complaints(loss)
    assert said in complaint


def rows(*texts: tuple[int, list[int]]) -> Sequences:
    """Sequences of (tokens of the prompt, all token ids)."""
    width = max(len(ids) for _, ids in texts)
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for _, ids in texts])
    prompt_B, length_B = torch.tensor([prompt for prompt, _ in texts]), torch.tensor([len(ids) for _, ids in texts])
    return Sequences(ids_BT, prompt_B, length_B, torch.ones(len(texts), dtype=torch.bool), torch.zeros(ids_BT.shape))


HANDED = rows((2, [5, 6, 7, 1]), (1, [5, 8, 9, 9, 1]), (2, [5, 6, 7, 1]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (HANDED, None),
        (HANDED[[2, 1]], None),
        (concatenate([HANDED[:1], HANDED[1:]]), None),
        (rows((2, [5, 6, 7])), "was cut"),
        (rows((1, [5, 6, 7, 1])), "does not begin where the prompt ends"),
        (rows((3, [5, 6, 7, 1])), "does not begin where the prompt ends"),
        (rows((2, [5, 6, 9, 1])), "no verb had handed out"),
        (HANDED[[1, 1]], "more often"),
    ],
)
def test_an_update_must_take_responses_as_they_were_handed_out(given, said):
    seen = watch()
    seen.hand_out(HANDED)
    seen.take_in(given)
    assert len(seen.complaints) == (said is not None)
    assert said is None or said in seen.complaints[0]


def test_imports_that_lead_to_test_items_or_models_are_named(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch, opd_bench\nfrom opd_bench.losses import kl\nfrom opd_bench import sequences, arm\n"
        "def step():\n    import datasets.load\n    from opd_bench.evaluate import load_suite\n"
    )
    assert sorted(foreign_imports(tmp_path / "mine.py")) == ["datasets.load", "opd_bench.arm", "opd_bench.evaluate"]
    assert not any(foreign_imports(find(name).path) for name in shipped())


def test_the_command_prints_a_verdict_per_property_and_a_table_and_leaves_json(program, tmp_path, monkeypatch):
    monkeypatch.setattr(conformance, "check", lambda name, options: report(Path(name).stem))
    code, out, err = program("check", "sft", BROKEN / "ignores_batch.py", "--json", "check.json")
    assert (code, err) == (1, "error: not fair: ignores_batch\n")
    for name in Property:
        assert len(re.findall(rf"^  [✓✗] {name} ", out, re.MULTILINE)) == 2
    assert out.count("✗") == 2  # in its verdict and in the table
    assert "→ follow bench.batch" in out
    written = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert [(each["method"], each["fair"]) for each in written] == [("sft", True), ("ignores_batch", False)]
    assert [verdict["property"] for verdict in written[0]["verdicts"]] == list(Property)


def test_options_come_from_a_comparisons_yaml(program, tmp_path):
    text, wrong = "{method: opd, like: opd, on_policy: 0}", "{method: opd, on_policy: nobody}"
    (tmp_path / "mine.yaml").write_text(f"methods:\n  text: {text}\n  wrong: {wrong}\n")
    code, out, err = program("check", "text", "--config", "mine.yaml")
    assert (code, err) == (0, "")
    assert out.startswith("text: fair")
    for name, said in (("wrong", "on_policy"), ("txt", "did you mean 'text'")):
        code, out, err = program("check", name, "--config", "mine.yaml")
        assert (code, out) == (2, "")
        assert re.fullmatch(rf"error: [^\n]*{said}[^\n]*\n", err)

"""What an arm logs: TensorBoard's files read back, the others' calls as recorded, and nothing lost where a library fails."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType

import pytest
from test_cli import refused, written
from test_compare import configured

from opd_bench import arm, store, tracking
from opd_bench.compare import preflight
from opd_bench.config import determining
from opd_bench.plan import jobs
from opd_bench.tracking import Log

ONE = {"seeds": 1, "budget": {"limit": 2e9, "points": []}, "methods": {"opd_rlaif": {"batch": 4}}}


@dataclass
class Recorded:
    """Stands for wandb or trackio: what it is called with; from step ``breaks`` on it raises."""

    breaks: int = 1000
    begun: list[dict] = field(default_factory=list)
    logged: list[tuple[int, dict]] = field(default_factory=list)
    finished: int = 0

    def init(self, **given):
        self.begun.append(given)
        return self

    def log(self, values, step):
        if step >= self.breaks:
            raise ConnectionError("the server is down\nfor good")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def config(pair_folders):
    return configured(pair_folders, **ONE)


def stand_in(monkeypatch, name, recorded):
    module = ModuleType(name)
    module.init = recorded.init  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, name, module)
    return recorded


def done(config, out, **changes):
    """The folder of its one arm, run here."""
    config = config.model_copy(update=changes)
    job = jobs(config)[-1]
    arm.run(config, job, out, lambda stage, share: None)
    return job, job.folder(out)


def test_where_arms_log_bears_on_no_result(config):
    logged = config.model_copy(update={"log": "wandb"})
    assert logged.digest == config.digest
    assert [job.run_id for job in jobs(logged)] == [job.run_id for job in jobs(config)]
    assert "log" not in determining(logged.model_dump(mode="json"))


def test_tensorboard_has_every_step_and_the_scores(config, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):  # an arm that begins again takes the place of its old run
        _, folder = done(config, tmp_path / "run", log="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / tracking.FOLDER / "opd_rlaif" / "seed-0")).Reload()
    steps = store.read_jsonl(folder / "steps.jsonl")
    for name in ("loss", "share", "verdict"):
        read = events.Scalars(name)
        assert [event.step for event in read] == [step["step"] for step in steps]
        assert [event.value for event in read] == pytest.approx([step[name] for step in steps], rel=1e-6)
    spent = store.read_json(folder / "arm.json")["spent"]["flops"]
    assert events.Scalars("flops")[-1].value == pytest.approx(sum(spent.values()), rel=1e-6)
    assert 0 < events.Scalars("lr_scale")[-1].value < 1
    rows = store.read_jsonl(folder / "items.jsonl")
    for kind in {(row["decoding"], row["task"]) for row in rows}:
        own = [row["score"] for row in rows if (row["decoding"], row["task"]) == kind]
        (event,) = events.Scalars("/".join(kind))
        assert (event.step, event.value) == (steps[-1]["step"], pytest.approx(sum(own) / len(own)))


def test_a_server_that_fails_ends_the_log_with_a_line_and_not_the_arm(config, tmp_path, monkeypatch, capsys):
    recorded = stand_in(monkeypatch, "wandb", Recorded(breaks=2))
    job, folder = done(config, tmp_path / "run", log="wandb")
    assert store.read_json(folder / "arm.json")["run_id"] == job.run_id
    assert len(store.read_jsonl(folder / "steps.jsonl")) > 2
    assert [step for step, _ in recorded.logged] == [1]
    said = capsys.readouterr().err
    assert said == "note: logging to wandb failed (ConnectionError: the server is down); the arm goes on without\n"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_is_named_after_its_arm_and_grouped_by_the_comparison(config, tmp_path, monkeypatch, name):
    recorded, job = stand_in(monkeypatch, name, Recorded()), jobs(config)[-1]
    for _ in range(2):
        log = Log(name, job, tmp_path / "some run")
        log({"loss": 1.0, "verified": None, "share": float("nan")}, 3)
        log({"greedy/task": 0.5})
        log.close()
    first, second = recorded.begun
    assert first == second  # the same id where there are ids
    assert (first["project"], first["group"], first["name"]) == ("opd-bench", "some run", "opd_rlaif seed 0")
    assert first["config"] == {"method": "opd_rlaif", "seed": 0, "run_id": job.run_id, **dict(job.options)}
    assert ("id" in first) == (name == "wandb")
    assert first.get("id") in (None, f"some-run-{job.run_id}")
    assert recorded.logged == [(3, {"loss": 1.0}), (3, {"greedy/task": 0.5})] * 2
    assert recorded.finished == 2


def test_a_library_that_is_not_installed_is_one_line_before_anything_trains(program, tmp_path, pair_folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    command = ("compare", "--config", written(tmp_path, pair_folders), "--out", "run", "--log")
    refused(program(*command, "wandb"), r"log: wandb is not installed \(.*\): pip install 'opd-bench\[wandb\]'")
    refused(program(*command, "wandbb"), r"log: .*'tensorboard', 'wandb' or 'trackio'")
    assert not (tmp_path / "run").exists()


def test_references_log_nothing_and_preflight_looks_for_the_library_alone(config, tmp_path, monkeypatch):
    recorded = stand_in(monkeypatch, "trackio", Recorded())
    changed = config.model_copy(update={"log": "trackio"})
    preflight(changed, jobs(changed), 1, tmp_path / "run")
    arm.run(changed, jobs(changed)[0], tmp_path / "run", lambda stage, share: None)
    assert not recorded.begun
    assert not (tmp_path / "run" / tracking.FOLDER).exists()

"""Names of models: what each stands for, and one line of advice where it stands for nothing. The hub is a stand-in."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from opd_bench import hub
from opd_bench.config import model_location
from opd_bench.errors import UserError
from opd_bench.hub import locate, unpinned
from opd_bench.resources import EMBEDDED

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_memory():
    hub._download.cache_clear()
    yield
    hub._download.cache_clear()


@pytest.fixture
def snapshots(monkeypatch, tmp_path, pair_folders):
    """A hub whose one model lies in a snapshot's folder; what it is asked is noted."""
    folder, asked = tmp_path / "snapshots" / COMMIT, []
    shutil.copytree(pair_folders["student"], folder)

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def failing(monkeypatch, error: Exception) -> None:
    def download(*_: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def http(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=SimpleNamespace(url="http://127.0.0.1/model"))
    return kind("refused\nand more", response=response)


def complaint(name: str) -> str:
    with pytest.raises(UserError) as raised:
        locate(name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_embedded_models_and_folders_are_themselves(pair_folders):
    assert locate("embedded/teacher").folder == EMBEDDED / "teacher"
    source = locate(str(pair_folders["student"]))
    assert (source.folder, source.commit, source.pinned) == (pair_folders["student"], None, str(pair_folders["student"]))


@pytest.mark.parametrize(("name", "revision"), [("owner/model", None), ("owner/model@v1.0", "v1.0"), (f"owner/model@{COMMIT}", COMMIT)])
def test_a_hub_id_becomes_a_snapshot_whose_commit_pins_it(snapshots, name, revision):
    source = locate(name)
    assert source.folder.name == source.commit == COMMIT
    assert source.pinned == f"owner/model@{COMMIT}"
    assert unpinned(name) == "owner/model"
    ((repository, options),) = snapshots
    assert (repository, options["revision"]) == ("owner/model", revision)
    assert model_location(name) == str(source.folder)
    assert len(snapshots) == 1, "a process asks once, so all of its arms train on one version"


def test_code_is_downloaded_only_where_it_may_run(snapshots):
    locate("owner/model")
    locate("owner/model", remote_code=True)
    plain, allowed = (options["allow_patterns"] for _, options in snapshots)
    assert "*.safetensors" in plain
    assert set(allowed) - set(plain) == {"*.py"}
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in plain)


def test_a_folder_comes_before_a_hub_id(snapshots, monkeypatch, tmp_path, pair_folders):
    shutil.copytree(pair_folders["student"], tmp_path / "owner/model")
    monkeypatch.chdir(tmp_path)
    assert locate("owner/model").commit is None
    assert not snapshots


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (http(errors.GatedRepoError, 403), "is gated: accept its terms"),
        (http(errors.RepositoryNotFoundError, 404), "no folder owner/model here and no such model"),
        (http(errors.RevisionNotFoundError, 404), "has no revision 'v2'"),
        (http(errors.HfHubHTTPError, 500), "cannot download owner/model at v2: refused"),
        (errors.LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (errors.HFValidationError("bad name"), "bad name"),
    ],
    ids=lambda of: type(of).__name__,
)
def test_what_the_hub_refuses_is_one_line_of_advice(monkeypatch, error, advice):
    failing(monkeypatch, error)
    assert advice in complaint("owner/model@v2")


def test_without_network_the_real_library_gives_the_same_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "the hub cannot be reached" in complaint("owner/model")


@pytest.mark.parametrize(
    ("removed", "added", "advice"),
    [
        ("config.json", None, "has no config.json"),
        ("model.safetensors", None, "no weights in safetensors"),
        ("model.safetensors", "pytorch_model.bin", "only .bin files"),
    ],
)
def test_a_folder_that_is_no_model_in_safetensors_is_refused(pair_folders, tmp_path, removed, added, advice):
    folder = tmp_path / "model"
    shutil.copytree(pair_folders["student"], folder)
    (folder / removed).unlink()
    if added:
        (folder / added).write_bytes(b"")
    assert advice in complaint(str(folder))


def test_what_is_neither_folder_nor_hub_id_is_refused_with_the_names_there_are():
    assert "smollm2-135m" in complaint("smollm2")
    assert "no model folder ./models/mine" in complaint("./models/mine")


def test_a_pulled_name_is_a_folder_of_the_cache_or_says_how_to_pull_it(monkeypatch, tmp_path, pair_folders):
    monkeypatch.setenv("OPD_BENCH_CACHE", str(tmp_path))
    assert complaint("smollm2-135m").endswith("opd-bench models pull smollm2-135m")
    shutil.copytree(pair_folders["student"], tmp_path / "models/smollm2-135m")
    assert locate("smollm2-135m").folder == tmp_path / "models/smollm2-135m" == Path(model_location("smollm2-135m"))

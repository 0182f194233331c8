"""Files are written whole or not at all, and what they hold comes back as it was."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from opd_bench import store
from opd_bench.errors import UserError
from opd_bench.exposure import Divergences, Recording
from opd_bench.sequences import Sequences


@pytest.fixture
def full(monkeypatch):
    """A disk that takes the first bytes of a file and no more."""

    def write(path, data):
        with path.open("wb") as file:
            file.write(bytes(data)[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write)
    monkeypatch.setattr(Path, "write_text", lambda path, text, encoding: write(path, text.encode(encoding)))


def sequences():
    ids_BT = torch.arange(8).view(2, 4)
    return Sequences(ids_BT, torch.tensor([1, 2]), torch.tensor([4, 3]), torch.tensor([True, False]), torch.rand(2, 4), 1)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, request):
    path = tmp_path / "manifest.json"
    store.write_json(path, {"old": 1})
    request.getfixturevalue("full")
    with pytest.raises(UserError, match="the disk is full; free some space and run the same command again"), store.disk_errors():
        store.write_json(path, {"new": 2})
    assert store.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["manifest.json"]


@pytest.mark.usefixtures("full")
def test_teacher_text_on_a_full_disk_is_the_users_to_mend_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="the disk is full"):
        store.save_sequences(tmp_path / "seed-0" / "chunk-00000.pt", sequences(), 1.0)
    assert os.listdir(tmp_path / "seed-0") == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.json"), r"the disk is full \(a\.json\)"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full; free"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full; free"),
        (
            PermissionError(errno.EACCES, "Permission denied", "out"),
            "cannot write out: Permission denied; choose another folder with --out",
        ),
        (OSError(errno.EROFS, "Read-only file system", "out"), "cannot write out: Read-only file system"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "out"), "cannot write out: Not a directory"),
    ],
)
def test_what_a_disk_refuses_is_one_line(error, said):
    with pytest.raises(UserError, match=said), store.disk_errors():
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), SafetensorError("header too large"), ValueError("x")])
def test_any_other_error_passes_as_it_is(error):
    with pytest.raises(type(error)) as caught, store.disk_errors():
        raise error
    assert caught.value is error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="cannot write"), store.disk_errors():
        store.write_text(tmp_path / "out" / "a.txt", "")


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    folder = tmp_path / "sft" / "seed-0"
    with store.whole_folder(folder) as part:
        (part / "arm.json").write_text("{}")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["arm.json"]
    assert os.listdir(folder.parent) == ["seed-0"]


def test_a_folder_that_fails_leaves_the_one_before(tmp_path):
    folder = tmp_path / "seed-0"
    folder.mkdir()
    (folder / "arm.json").write_text("old")

    def fail_half_way():
        with store.whole_folder(folder) as part:
            (part / "arm.json").write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert (folder / "arm.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["seed-0"]


def test_a_sweep_takes_what_is_half_written_and_nothing_else(tmp_path):
    kept = tmp_path / "arms" / "sft" / "seed-0" / "arm.json"
    for path in (kept, tmp_path / "arms" / "sft" / ".seed-1.12.part" / "arm.json", tmp_path / "corpus" / ".chunk-0.pt.12.part"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    store.sweep(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("content", [None, "", '{"half": '])
def test_a_damaged_file_says_what_to_do(tmp_path, content):
    path = tmp_path / "arm.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"cannot read .*arm\.json.*delete it and run the command again"):
        store.read_json(path)


def test_sequences_come_back_as_they_were(tmp_path):
    path, saved = tmp_path / "corpus" / "chunk-00000.pt", sequences()
    assert store.load_sequences(path) is None
    store.save_sequences(path, saved, 2.5)
    loaded = store.load_sequences(path)
    assert loaded is not None
    assert loaded[1] == 2.5
    for name, value in vars(saved).items():
        found = getattr(loaded[0], name)
        assert torch.equal(found, value) if torch.is_tensor(value) else found == value, name
    assert os.listdir(path.parent) == ["chunk-00000.pt"]


def test_recordings_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    sides = [rng.random((2, 3)), np.array([[True, True, False], [True, True, True]])] * 2
    for temperature in (0.75, None):
        saved = Recording(
            {"forward_kl": Divergences(*sides), "support": Divergences(*sides)}, {"own 0.5": np.array([1.0, np.nan])}, temperature
        )
        store.save_recording(tmp_path / "recording.npz", saved)
        loaded = store.load_recording(tmp_path / "recording.npz")
        assert (loaded.along.keys(), loaded.temperature) == (saved.along.keys(), temperature)
        np.testing.assert_array_equal(loaded.continued["own 0.5"], [1.0, np.nan])
        for name, of in saved.along.items():
            for field, value in vars(of).items():
                np.testing.assert_array_equal(getattr(loaded.along[name], field), value)


def test_a_damaged_recording_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no"):
        store.load_recording(tmp_path / "recording.npz")
    (tmp_path / "recording.npz").write_bytes(b"PK half a file")
    with pytest.raises(UserError, match="delete it and run the command again"):
        store.load_recording(tmp_path / "recording.npz")

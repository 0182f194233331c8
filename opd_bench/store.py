"""Files of a comparison: written whole or not at all, found again on the next run.

<out>/manifest.json                     what was compared, with what, by which command
<out>/arms/<name>/seed-<k>/             one finished arm; its folder appears only when it is complete
    arm.json, items.jsonl, ledger.jsonl, steps.jsonl, recording.npz, model.safetensors, config.json
    judged.jsonl                        what the judge, if one was asked, says of the arm's own answers
    at-<share>/items.jsonl, recording.npz   the same arm at a share of the budget
<out>/judge.sqlite                      what a judge behind a server said, shared by all arms
<out>/corpus/seed-<k>/chunk-<i>.pt      teacher text, shared by the arms of a seed
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from opd_bench.errors import UserError
from opd_bench.exposure import Divergences, Recording
from opd_bench.sequences import Sequences

FULL = "the disk is full{}; free some space and run the same command again to resume"
NO_ENTRY = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


@contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk or a folder that cannot be written, as one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(FULL.format(f" ({error.filename})" if error.filename else "")) from error
        if error.errno in NO_ENTRY:
            raise UserError(f"cannot write {error.filename}: {error.strerror}; choose another folder with --out") from error
        raise
    except Exception as error:  # safetensors and tokenizers write from Rust and raise types of their own
        if "(os error 28)" not in str(error):
            raise
        raise UserError(FULL.format("")) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A scratch file that becomes ``path`` when the block ends well, and vanishes when it does not: nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    write_text(path, json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """UserError for a file that is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; delete it and run the command again") from None


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``folder`` when the block ends well, and vanishes when it does not."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def point_folder(folder: Path, share: float) -> Path:
    """Where an arm's folder holds what it came to at ``share`` of the budget."""
    return folder if share == 1 else folder / f"at-{share:g}"


def sweep(out: Path) -> None:
    """Remove what a killed process left half-written."""
    for part in list(out.glob("**/.*.part")):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    with disk_errors(), whole_file(path) as part:
        part.write_bytes(buffer.getbuffer())


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What ``save_arrays`` wrote, or None where nothing lies. UserError for a file that is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}; delete it and run the command again") from None


def save_recording(path: Path, recording: Recording) -> None:
    """One file of arrays: ``along/<measure>/<field>`` and ``continued/<kind>``."""
    arrays = {f"along/{name}/{field}": value for name, of in recording.along.items() for field, value in asdict(of).items()}
    arrays |= {f"continued/{kind}": scores_N for kind, scores_N in recording.continued.items()}
    if recording.temperature is not None:
        arrays["temperature"] = np.array(recording.temperature)
    save_arrays(path, arrays)


def load_recording(path: Path) -> Recording:
    """What ``save_recording`` wrote. UserError where it is missing or damaged."""
    arrays = load_arrays(path)
    if arrays is None:
        raise UserError(f"there is no {path}; run the command again")
    along, continued = {}, {}
    for key, value in arrays.items():
        kind, _, rest = key.partition("/")
        if kind == "along":
            name, _, field = rest.partition("/")
            along.setdefault(name, {})[field] = value
        elif kind == "continued":
            continued[rest] = value
    temperature = float(arrays["temperature"]) if "temperature" in arrays else None
    return Recording({name: Divergences(**fields) for name, fields in along.items()}, continued, temperature)


def save_sequences(path: Path, sequences: Sequences, seconds: float) -> None:
    buffer = io.BytesIO()  # torch has its own, wordless error for a full disk
    torch.save({**vars(sequences), "seconds": seconds}, buffer)
    with disk_errors(), whole_file(path) as part:
        part.write_bytes(buffer.getbuffer())


def load_sequences(path: Path) -> tuple[Sequences, float] | None:
    """What ``save_sequences`` wrote, or None where nothing lies."""
    if not path.exists():
        return None
    saved = torch.load(path, weights_only=True)
    seconds = saved.pop("seconds")
    return Sequences(**saved), seconds

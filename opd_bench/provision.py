"""What tasks are given while lm-eval loads them: data sets from local copies, and a sandbox to run code in.

with provided(Path("data")):
    manager.load("gsm8k")  # reads data/openai/gsm8k where it is there, else the hub or its cache
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import evaluate as hf_evaluate

from opd_bench import standard
from opd_bench.code_eval import CodeEval
from opd_bench.errors import UserError


@contextmanager
def provided(data_dir: Path | None) -> Iterator[None]:
    """For as long as this lasts ``load_dataset`` prefers ``data_dir/<hub id>``, and ``evaluate.load("code_eval")`` is our sandbox.

    UserError without that folder and, inside, for a hub data set that cannot be had, with how to provide it.
    """
    if data_dir and not data_dir.is_dir():
        raise UserError(f"there is no folder {data_dir} of data sets")
    load_dataset, load_metric = datasets.load_dataset, hf_evaluate.load

    def local_first(path: str, *arguments: Any, **options: Any) -> Any:
        copy = data_dir / path if data_dir else None
        try:
            return load_dataset(str(copy) if copy and copy.is_dir() else path, *arguments, **options)
        except Exception as error:  # whatever the hub, the network or a damaged file raises
            if "/" not in path or Path(path).exists():  # a data set of the task's own
                raise
            raise UserError(_missing(path, copy, error)) from error

    def sandboxed(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval() if path == "code_eval" else load_metric(path, *arguments, **options)

    datasets.load_dataset, hf_evaluate.load = local_first, sandboxed
    try:
        yield
    finally:
        datasets.load_dataset, hf_evaluate.load = load_dataset, load_metric


def _missing(name: str, copy: Path | None, error: Exception) -> str:
    said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if copy and copy.is_dir():
        return f"the copy of the data set {name} in {copy} cannot be read: {said}; it must be the whole repository, its README.md included"
    gated = any(known.gated for known in standard.TASKS.values() if known.data == name) or "gated" in said
    licence = f"it is gated: accept its licence at https://huggingface.co/datasets/{name} and run hf auth login; " if gated else ""
    fetch = f"hf download {name} --repo-type dataset --local-dir {copy or f'DIR/{name}'}"
    given = "" if copy else ", and give --data-dir DIR"
    return f"cannot load the data set {name}: {said}; {licence}where the hub can be reached run {fetch}{given}"

"""From the name of a model to a folder on this machine.

    locate("embedded/teacher").folder              # a model that travels with the package
    locate("runs/mine").folder                     # a folder, as it stands
    locate("Qwen/Qwen3-0.6B").pinned               # "Qwen/Qwen3-0.6B@<commit>": downloaded, or found in the hub's cache
    locate("smollm2-135m").folder                  # where `opd-bench models pull smollm2-135m` has put it

A folder comes before a hub id of the same name. A name with a commit (40 hex digits) needs no network once its files are here.
Limits: weights in safetensors alone, as other formats can run code when they are loaded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from opd_bench.errors import UserError, did_you_mean
from opd_bench.resources import EMBEDDED

HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
PULLED = ("smollm2-135m",)
SOURCE_FILE = "source.json"  # in a pulled model's folder: where it came from


@dataclass(frozen=True)
class Source:
    """A model of the configuration, and where it lies."""

    name: str
    folder: Path
    commit: str | None = None  # of a model of the hub

    @property
    def pinned(self) -> str:
        """The name that stands for this very version, whatever the hub has tomorrow."""
        return f"{unpinned(self.name)}@{self.commit}" if self.commit else self.name


def unpinned(name: str) -> str:
    """``name`` without the revision of a hub id."""
    found = HUB_NAME.fullmatch(name)
    return found["repository"] if found and not Path(name).is_dir() else name


def locate(name: str, *, remote_code: bool = False) -> Source:
    """Where the model called ``name`` lies, after downloading it where it must be; the code in its repository only with ``remote_code``.

    UserError, in one line, for a name that stands for no model, one that is gated or cannot be reached, and a folder without safetensors.
    """
    found = HUB_NAME.fullmatch(name)
    if name.startswith("embedded/"):
        source = Source(name, EMBEDDED / name.removeprefix("embedded/"))
    elif Path(name).expanduser().is_dir():
        source = Source(name, Path(name).expanduser())
    elif name in PULLED:
        source = Source(name, pulled_folder(name))
        if not source.folder.is_dir():
            raise UserError(f"{name} is not on this machine yet; run: opd-bench models pull {name}")
    elif found:
        folder = _download(found["repository"], found["revision"], remote_code)
        source = Source(name, folder, folder.name)
    else:
        raise UserError(
            f"there is no model folder {name}; give a folder, a hub id (owner/name) or a pulled name{did_you_mean(name, PULLED)}"
        )
    _check(source)
    return source


def cache_folder() -> Path:
    """Where pulled models lie: ``OPD_BENCH_CACHE``, or a folder of the user's cache."""
    return Path(os.environ.get("OPD_BENCH_CACHE") or "~/.cache/opd-bench").expanduser()


def pulled_folder(name: str) -> Path:
    return cache_folder() / "models" / name


def _check(source: Source) -> None:
    """UserError unless the folder holds a model in safetensors."""
    folder, name = source.folder, source.name
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} is no model: {folder} has no config.json")
    if not any(folder.glob("*.safetensors")):
        only = "only .bin files, which can run code when they are loaded" if any(folder.glob("*.bin")) else "no weights in safetensors"
        raise UserError(f"{name} has {only}; load it where you trust it and save it with save_pretrained")


@cache
def _download(repository: str, revision: str | None, remote_code: bool) -> Path:
    """The folder of a hub model's snapshot, named after its commit. UserError if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at {revision}" if revision else ""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*FILES, *["*.py"] * remote_code]))
    except GatedRepoError:
        problem = f"{repository} is gated: accept its terms on its page at the hub, then run `hf auth login` or set HF_TOKEN"
    except RevisionNotFoundError:
        problem = f"{repository} has no revision {revision!r}; give a branch, a tag or a whole commit of 40 digits"
    except RepositoryNotFoundError:
        problem = (
            f"there is no folder {repository} here and no such model on the hub; for a private one, run `hf auth login` or set HF_TOKEN"
        )
    except LocalEntryNotFoundError:
        problem = f"there is no folder {repository} here, the hub cannot be reached, and its cache does not hold that model{at}"
    except (HfHubHTTPError, HFValidationError) as error:
        problem = f"cannot download {repository}{at}: {str(error).strip().splitlines()[0]}"
    raise UserError(problem) from None

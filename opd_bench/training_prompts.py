"""Prompts to train on from any data set, in the place of the tasks' training splits (``prompts:`` of the configuration).

    pool = load(config.prompts)                                  # as they stand, each once; UserError in one line
    pool = pool.without("contaminated", evaluate.met(...))       # nor those that share words with an evaluation document
    pool.fitting(tokenizer, chat, None, room).prompts            # nor those too long for the context
    said(pool.counts)                                            # "math: 19,873 of 20,000 prompts (3 too long, …)"

Files and the hub are read by the library ``datasets``: a local file anew each time it has changed, a data set of the hub at one commit.
What is kept does not depend on the order of the rows, unless ``most`` takes the first of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from opd_bench.errors import UserError, did_you_mean
from opd_bench.hub import COMMIT, HUB_NAME
from opd_bench.models import chat_text
from opd_bench.privilege import told
from opd_bench.settings import PromptSource

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Prompt:
    """A conversation up to where the answer begins, the task or source that it is from, and what else is known of it."""

    source: str
    messages: list[dict[str, str]]  # role and content; where there is no chat template, one of a user
    row: Mapping[str, Any]

    @classmethod
    def of(cls, source: str, text: str, row: Mapping[str, Any]) -> Prompt:
        return cls(source, [{"role": "user", "content": text}], row)

    @property
    def texts(self) -> list[str]:
        return [message["content"] for message in self.messages]

    @property
    def question(self) -> str:
        """As a judge reads it: the text, or who said what."""
        if len(self.messages) == 1:
            return self.texts[0]
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)

    def given(self, chat: PreTrainedTokenizerBase | None, template: str | None = None) -> str:
        """What a model is given, by the template of ``chat`` or as it stands; ``template``: what a privileged teacher is."""
        messages = self.messages
        if template is not None:
            last = max(place for place, message in enumerate(messages) if message["role"] == "user")
            shown = {"role": "user", "content": told(template, self.texts[last], self.row)}
            messages = [*messages[:last], shown, *messages[last + 1 :]]
        return messages[-1]["content"] if chat is None else chat_text(chat, messages)


@dataclass(frozen=True)
class Pool:
    """Prompts in the order of their sources. ``counts`` has, by source, its version, rows read, and prompts gone by reason."""

    prompts: list[Prompt]
    counts: dict[str, dict[str, Any]]

    @property
    def digest(self) -> str:
        """Of the prompts in their order, and of what a privileged teacher is shown of each."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(json.dumps([prompt.source, prompt.messages, prompt.row], sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()[:16]

    def without(self, kind: Literal["contaminated", "removed"], why: Sequence[str]) -> Pool:
        """Without the prompts of which ``why`` says something, counted by it. UserError where none is left."""
        counts = copy.deepcopy(self.counts)
        for prompt, reason in zip(self.prompts, why, strict=True):
            if reason:
                of = counts[prompt.source][kind]
                of[reason] = of.get(reason, 0) + 1
        left = [prompt for prompt, reason in zip(self.prompts, why, strict=True) if not reason]
        if not left:
            raise UserError(f"no prompts are left to train on: {'; '.join(said(counts))}")
        return Pool(left, counts)

    def fitting(self, tokenizer: PreTrainedTokenizerBase, chat: PreTrainedTokenizerBase | None, template: str | None, room: int) -> Pool:
        """Without the prompts of more than ``room`` tokens, as the student or a privileged teacher is given them."""
        lengths = [0] * len(self.prompts)
        for form in dict.fromkeys((None, template)):
            texts = [prompt.given(chat, form) for prompt in self.prompts]
            lengths = list(map(max, lengths, map(len, tokenizer(texts, add_special_tokens=False).input_ids)))
        return self.without("removed", ["too long for the context" if length > room else "" for length in lengths])


def said(counts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each source: how many of its rows are trained on, and why the others are not."""
    lines = []
    for name, of in counts.items():
        reasons = [f"{count:,} {reason}" for reason, count in of["removed"].items()]
        reasons += [f"{count:,} met in test items of {tasks}" for tasks, count in of["contaminated"].items()]
        kept = of["read"] - sum(of["removed"].values()) - sum(of["contaminated"].values())
        lines.append(f"{name}: {kept:,} of {of['read']:,} prompts" + (f" ({', '.join(reasons)})" if reasons else ""))
    return lines


def load(sources: Sequence[PromptSource]) -> Pool:
    """The prompts of ``sources``, each once, whatever its case and white space. UserError if they cannot be had or are no prompts."""
    return _load(json.dumps([source.model_dump() for source in sources]), tuple(map(_stamp, sources)))


def _stamp(source: PromptSource) -> tuple[tuple[str, int, int], ...]:
    """Of local files: changes when they do."""
    path = Path(source.data).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of ``datasets``, and of its words only the errors it raises."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger, shown = logging.getLogger("datasets"), not are_progress_bars_disabled()
    level = logger.level
    try:
        disable_progress_bars()
        logger.setLevel(logging.CRITICAL)
        yield
    finally:
        logger.setLevel(level)
        if shown:
            enable_progress_bars()


@lru_cache(maxsize=1)
@_quiet()
def _load(sources_json: str, stamps: object) -> Pool:
    prompts, counts, seen = [], {}, set()
    for source in (PromptSource(**each) for each in json.loads(sources_json)):
        read, own, removed = 0, [], {}
        for row in _rows(source):
            read += 1
            prompt = _prompt(source, row, f"{source.data}, row {read}")
            key = prompt and tuple((message["role"], " ".join(message["content"].lower().split())) for message in prompt.messages)
            if prompt is None or key in seen:
                reason = "met before" if prompt else "empty"
                removed[reason] = removed.get(reason, 0) + 1
                continue
            seen.add(key)
            own.append(prompt)
            if len(own) == source.most:
                break
        if not read:
            raise UserError(f"{source.data} has no rows; name a file or split with prompts in it")
        counts[source.called] = {"data": pinned(source).data, "read": read, "removed": removed, "contaminated": {}}
        prompts += own
    return Pool(prompts, counts).without("removed", [""] * len(prompts))


def _prompt(source: PromptSource, row: Mapping[str, Any], where: str) -> Prompt | None:
    """None where a column that is asked for is empty."""
    if missing := next((column for column in source.columns.values() if column not in row), None):
        raise UserError(f"{source.data} has no column {missing!r}{did_you_mean(missing, row)}; set columns of this source of prompts")
    columns = {name: row[column] for name, column in source.columns.items()}
    if not all(value.strip() if isinstance(value, str) else value not in (None, []) for value in columns.values()):
        return None
    if "messages" in columns:
        return Prompt(source.called, _conversation(columns.pop("messages"), where), columns)
    text = columns.pop("prompt")
    if not isinstance(text, str):
        advice = "map it as messages" if isinstance(text, list) else "choose another column"
        raise UserError(f"{where}: {source.columns['prompt']!r} is of type {type(text).__name__}, not text; {advice}")
    return Prompt.of(source.called, text, columns)


def _conversation(messages: Any, where: str) -> list[dict[str, str]]:
    """The conversation without the answers at its end."""
    if not isinstance(messages, list):
        raise UserError(f"{where}: the messages are of type {type(messages).__name__}, not a list; choose another column")
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            found = ", ".join(message) if isinstance(message, dict) else type(message).__name__
            raise UserError(f"{where}: a message needs role and content, both text, and has {found}; choose another column")
    last = max((place for place, message in enumerate(messages) if message["role"] != "assistant"), default=-1)
    kept = [{"role": message["role"], "content": message["content"]} for message in messages[: last + 1]]
    if not any(message["role"] == "user" for message in kept):
        raise UserError(f"{where}: no message of a user stands before the answer; remove the row or choose another column")
    return kept


# ---- files and the hub ------------------------------------------------------------------------------------------------------------


def pinned(source: PromptSource) -> PromptSource:
    """``source`` at the commit that the hub has now; a local one as it is."""
    if (found := _of_hub(source)) is None:
        return source
    return source.model_copy(update={"data": f"{found['repository']}@{_builder(source).hash}"})


def _of_hub(source: PromptSource) -> dict[str, Any] | None:
    """Repository and revision; None for what is a file or folder here, or is meant to be one."""
    found = HUB_NAME.fullmatch(source.data)
    local = Path(source.data).expanduser().exists() or Path(source.data).suffix in FORMATS
    return found.groupdict() if found and not local else None


def _builder(source: PromptSource) -> Any:
    """Who reads the data set. UserError where there is none."""
    from datasets import load_dataset_builder

    path = Path(source.data).expanduser()
    if found := _of_hub(source):
        return _hub_builder(**found, subset=source.subset)
    if path.is_dir():
        return load_dataset_builder(str(path.absolute()), source.subset)
    if not path.is_file():
        raise UserError(f"there is no {source.data}; prompts.data is a .jsonl, .json or .parquet file, a folder, or a hub id (owner/name)")
    if path.suffix not in FORMATS:
        raise UserError(f"{source.data} is no file of prompts; give {', '.join(FORMATS)}, or a folder")
    return load_dataset_builder(FORMATS[path.suffix], data_files=str(path))


@cache
def _hub_builder(repository: str, revision: str | None, subset: str | None) -> Any:
    """Asks once, so that all of a process is read at one commit, its ``hash``; without network it finds what the cache holds."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    try:
        builder = load_dataset_builder(repository, subset, revision=revision)
    except DatasetNotFoundError as error:
        advice = "for a private one, run `hf auth login` or set HF_TOKEN"
        if "gated" in str(error):
            advice = "accept its terms on its page at the hub, then run `hf auth login` or set HF_TOKEN"
        raise UserError(f"{_first_line(error).rstrip('.')}; {advice}") from None
    except ConnectionError:
        raise UserError(
            f"there is no folder {repository} here, the hub cannot be reached, and its cache does not hold that data set; "
            "connect once without streaming, or give a file"
        ) from None
    if revision and COMMIT.fullmatch(revision) and builder.hash != revision:
        raise UserError(f"the hub cannot be reached, and the cache holds {repository} at {builder.hash}; name that commit or connect")
    return builder


def _rows(source: PromptSource) -> Iterator[Mapping[str, Any]]:
    """UserError for whatever a reader raises."""
    try:
        builder = _builder(source)
        if _of_hub(source) and not source.streaming:
            builder.download_and_prepare()
            yield from builder.as_dataset(source.split)
        else:  # a local file is not copied into a cache that an edit could escape
            yield from builder.as_streaming_dataset(source.split)
    except UserError:
        raise
    except StopIteration:  # what an empty file comes to
        return
    except Exception as error:
        if at := _bad_line(Path(source.data).expanduser()):
            raise UserError(f"{source.data}: {at}; mend or remove it") from None
        raise UserError(f"cannot read {source.data}: {_first_line(error)}; check data, subset and split") from None


def _bad_line(path: Path) -> str | None:
    """Which line of a .jsonl file is not JSON."""
    if path.suffix == ".jsonl" and path.is_file():
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip() and not isinstance(json.loads(line), dict):
                        return f"line {number} is no JSON object"
                except ValueError:
                    return f"line {number} is not JSON"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

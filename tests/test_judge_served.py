"""A judge behind a real server, `transformers serve`: the shipped teacher checks answers there as it does here.

Runs where that server can be started (`pip install transformers[serving]`), and is skipped elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from opd_bench.judge import Answer
from opd_bench.judge_endpoint import EndpointJudge
from opd_bench.judge_model import CheckJudge, yes_or_no
from opd_bench.models import load_model, load_tokenizer
from opd_bench.resources import EMBEDDED, task_module
from opd_bench.settings import Endpoint

NEEDED = ("fastapi", "uvicorn", "openai")
PROGRAM = Path(sys.executable).with_name("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PROGRAM.exists() or any(importlib.util.find_spec(name) is None for name in NEEDED), reason="transformers serve is not installed"
    ),
]
START_S, CHECK = 120, 98
SOLVED = [(problem.prompt, problem.solution) for problem in islice(task_module("arithmetic").problems("validation", 5), 2)]
WRONG = [(prompt, response.replace("#", "#1")) for prompt, response in SOLVED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The teacher with a chat template that adds nothing to a message."""
    path = tmp_path_factory.mktemp("served") / "teacher"
    shutil.copytree(EMBEDDED / "teacher", path)
    tokenizer = load_tokenizer(str(path))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PROGRAM, "serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}
    with (tmp_path_factory.mktemp("server") / "log").open("w") as log:
        process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, env=environment)
        try:
            for _ in range(START_S):
                assert process.poll() is None, Path(log.name).read_text()
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except (URLError, TimeoutError):
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(10)


def test_the_teacher_judges_behind_a_server_as_it_does_here(url, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    endpoint = Endpoint(url=url, answer="yes_no", max_written=CHECK, max_read=256, concurrency=2)  # pyright: ignore[reportCallIssue]
    asked = EndpointJudge(str(folder), "{prompt}{response}\nCheck:\n", yes_or_no(), yes_or_no(), endpoint, tmp_path / "judge.sqlite")
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    here = CheckJudge.from_text(model, tokenizer, question="\nCheck:\n", yes="yes", no="no", max_check=CHECK)
    ids = tokenizer([prompt + response for prompt, response in SOLVED + WRONG], add_special_tokens=False).input_ids
    answers = [Answer(list(own), *texts) for own, texts in zip(ids, SOLVED + WRONG, strict=True)]
    there, own = asked(answers), here(answers)
    assert own.verdict_B.round().tolist() == [1, 1, 0, 0]
    assert there.verdict_B.tolist() == [1, 1, 0, 0]
    assert there.usage.read_B.tolist() == own.usage.read_B.tolist()
    assert (there.usage.written_B - own.usage.written_B).abs().max() <= 1  # EOS, which a server may not count

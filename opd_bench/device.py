"""Where models lie: on the CPU, or on another device that torch has here, such as a GPU.

    require("cuda")                # UserError where torch has none
    places("cuda", workers=3)      # ["0", "1", "0"] with two GPUs: the one that each of three processes sees
    free("cuda")                   # bytes on the fullest of them

A process sees one GPU, which is "cuda" to it: arms share one only where there are more of them than GPUs.
"""

from __future__ import annotations

import os
from itertools import cycle, islice

import psutil
import torch

from opd_bench.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def require(device: str) -> None:
    """UserError unless torch can put something on ``device``, or where it names one of several."""
    if ":" in device:
        raise UserError(f"device: {device} names one of several; write {device.partition(':')[0]}, and say which by {VISIBLE}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(f"device: {device} is not to be had here ({said}); set device: cpu, or install a torch that has it") from None


def places(device: str, workers: int) -> list[str | None]:
    """For each of ``workers`` processes, what CUDA_VISIBLE_DEVICES is to be; None where it is of no consequence."""
    if device != "cuda":
        return [None] * workers
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return list(islice(cycle(named or map(str, range(torch.cuda.device_count()))), workers))


def most_workers(device: str) -> int:
    """Processes that do not share what they compute on: one per GPU, or per core."""
    return max(1, torch.cuda.device_count()) if device == "cuda" else os.cpu_count() or 1


def free(device: str) -> int:
    """Bytes of memory: the machine's, or that of the GPU with the least."""
    if device != "cuda":
        return psutil.virtual_memory().available
    return min(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))


def called(device: str) -> str:
    """The GPU's own name, for the record; of any other device its name here."""
    return torch.cuda.get_device_name() if device == "cuda" else device

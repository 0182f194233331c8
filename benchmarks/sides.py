"""Two sides of a benchmark, each in processes of its own, taking turns; the figures go to `results.json`.

    compare("opd_step_vs_trl", unit="s", smaller_is_better=True, sides={"ours": ours, "theirs": theirs})

A side is a function that does its work and returns its figure. The script that calls this is started anew for every turn, so that neither
side's memory or threads touch the other's; a figure is the median of its turns, the ratio says how many times better ours is.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
SIDE = "OPD_BENCH_SIDE"  # in the environment of a turn


def compare(name: str, unit: str, smaller_is_better: bool, sides: dict[str, Callable[[], float]], turns: int = 3) -> None:
    """Run both sides in turn and record their figures under ``name``, and those of an OPD step's memory beside it."""
    if side := os.environ.get(SIDE):
        figure = sides[side]()
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"figure": figure, "peak_gib": peak_gib}))
        return
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for turn in range(turns):
        for side in sides:
            done = subprocess.run([sys.executable, *sys.argv], env=os.environ | {SIDE: side}, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"turn {turn + 1}, {side}: {found[side][-1]['figure']:.4g} {unit}, {found[side][-1]['peak_gib']:.2f} GiB", flush=True)
    ours, theirs = (statistics.median(of["figure"] for of in found[side]) for side in ("ours", "theirs"))
    record(name, ours, theirs, unit, smaller_is_better)
    ours, theirs = (statistics.median(of["peak_gib"] for of in found[side]) for side in ("ours", "theirs"))
    print(f"peak memory: ours {ours:.2f} GiB, theirs {theirs:.2f} GiB")
    if "_vs_" in name and name.startswith("opd_step"):
        record(name.replace("_vs_", "_memory_vs_"), ours, theirs, "GiB", smaller_is_better=True)


def record(name: str, ours: float, theirs: float, unit: str, smaller_is_better: bool) -> None:
    """Put a pair of figures into `results.json`; ``ratio`` is how many times better ours is."""
    ratio = theirs / ours if smaller_is_better else ours / theirs
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    known[name] = {
        "ours": round(ours, 4),
        "theirs": round(theirs, 4),
        "ratio": round(ratio, 3),
        "unit": unit,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_public(sys.argv[1:])]),
        "commit": commit.stdout.strip(),
        "machine": machine(),
    }
    RESULTS.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n", encoding="utf-8")
    print(f"{name}: ours {ours:.4g} {unit}, theirs {theirs:.4g} {unit}, {ratio:.2f} times better")


def _public(arguments: list[str]) -> list[str]:
    """Without the folders of this machine."""
    return [Path(argument).name if "/" in argument else argument for argument in arguments]


def machine() -> str:
    """Processor, cores, what it computes fast, torch."""
    capability = torch.backends.cpu.get_cpu_capability()
    tiles = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{os.cpu_count()} cores {platform.machine()} {capability}{tiles}, torch {torch.__version__}"

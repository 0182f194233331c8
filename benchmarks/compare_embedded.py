"""What a comparison costs: wall time, peak memory of the process tree, and where the time went.

    python benchmarks/compare_embedded.py --out results/timing                # runs the default comparison, then reads it
    python benchmarks/compare_embedded.py --out results/timing --smoke        # further options go to `opd-bench compare`

A folder that is finished is only read; an interrupted one is resumed, and wall time and memory are then of the rest alone.
Memory is the resident set summed over all processes, so pages they share count more than once. Linux only.

Teacher text is shared by the arms of a seed, and each is charged for what it uses; here it counts once, as sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from opd_bench.store import load_sequences

CHARGES = {
    "sampling": "student_sample",
    "teacher, score": "teacher_score",
    "judge": "judge",
    "update": "student_update",
}  # as in the ledger
STAGES = {  # as in `arm.json`
    "branches": "branches",
    "evaluation": "evaluation",
    "evaluation and exposure on the way": "points",
    "exposure": "exposure",
}
PLACES = ["sampling", "teacher, generate", *list(CHARGES)[1:], *STAGES, "harness"]
USEFUL = {"teacher, generate", *CHARGES, "branches", "evaluation", "evaluation and exposure on the way"}


def breakdown(arms: list[dict], corpus_s: float) -> dict[str, float]:
    """Seconds by place, summed over ``arms`` (the contents of their `arm.json`); what no place accounts for is harness."""
    places = {place: sum(arm["spent"]["seconds"].get(kind, 0.0) for arm in arms if "spent" in arm) for place, kind in CHARGES.items()}
    places |= {place: sum(arm["seconds"].get(kind, 0.0) for arm in arms) for place, kind in STAGES.items()}
    places["teacher, generate"] = corpus_s
    places["harness"] = sum(arm["wall_s"] for arm in arms) - sum(places.values())
    return {place: places[place] for place in PLACES}


def table(places: dict[str, float]) -> str:
    """Markdown: seconds and share of each place, and of charged compute and evaluation together."""
    total = sum(places.values()) or 1.0
    useful = sum(seconds for place, seconds in places.items() if place in USEFUL)
    rows = [*places.items(), ("all arms", sum(places.values())), ("charged compute + evaluation", useful)]
    return "\n".join(["| where | s | share |", "| :-- | --: | --: |", *(f"| {name} | {s:.1f} | {s / total:.1%} |" for name, s in rows)])


def read(out: Path) -> dict[str, float]:
    """The breakdown of a finished results folder."""
    arms = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("arms/**/arm.json"))]
    chunks = (load_sequences(path) for path in sorted(out.glob("corpus/*/*.pt")))
    return breakdown(arms, sum(chunk[1] for chunk in chunks if chunk))


def resident_bytes(root: int) -> int:
    """Resident set of the process ``root`` and all its descendants, summed."""
    children: dict[int, list[int]] = {}
    pages: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()  # from the third field on: state, parent, ...
        except OSError:
            continue  # it ended meanwhile
        children.setdefault(int(fields[1]), []).append(int(folder.name))
        pages[int(folder.name)] = int(fields[21])
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        total += pages.get(process, 0)
        waiting += children.get(process, [])
    return total * os.sysconf("SC_PAGE_SIZE")


def run(out: Path, options: list[str]) -> tuple[float, int]:
    """Run the comparison to its end: wall seconds and peak bytes, sampled twice a second. Exits with it if it fails."""
    command = [sys.executable, "-c", "from opd_bench.cli import main; main()", "compare", "--out", str(out), *options]
    start, peak, over = time.perf_counter(), 0, threading.Event()
    with subprocess.Popen(command) as process:

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.5):
                peak = max(peak, resident_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            process.wait()
        finally:
            over.set()
            watcher.join()
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="results folder, finished or not")
    arguments, options = parser.parse_known_args()
    if (arguments.out / "leaderboard.json").exists():
        print(f"{arguments.out} is finished: reading it; wall time and memory are measured only while a comparison runs")
    else:
        wall_s, peak = run(arguments.out, options)
        print(f"\nwall time {wall_s:.0f} s, peak memory of all processes {peak / 2**30:.2f} GiB")
    print(f"time of all arms, side by side or not:\n\n{table(read(arguments.out))}")


if __name__ == "__main__":
    main()

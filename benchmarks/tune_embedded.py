"""The same number of learning-rate trials for every method, on validation problems, to set the embedded tier's defaults.

    python benchmarks/tune_embedded.py --out trials

One seed that the leaderboard never uses. The winner by greedy macro accuracy, the leaderboard's score, goes into
`opd_bench/tiers/embedded.yaml`. Last figures: `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

RATES = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3)
SEED = 1000


def trial(method: str, lr: float, limit: float, out: Path) -> dict:
    """Train ``method`` at ``lr`` and measure it on validation problems."""
    import copy

    import torch

    from opd_bench import arm, config
    from opd_bench.embedded import measures
    from opd_bench.plan import Job
    from opd_bench.train import train

    torch.set_num_threads(1)
    settings = config.load("embedded", [{"budget": {"limit": limit, "points": []}}])
    shop = arm.workshop(settings.model_dump_json())
    job = Job(method, SEED, SEED % len(shop.pairs), method, (*settings.methods[method].items(), ("lr", lr)), "")
    student = copy.deepcopy(shop.pairs[job.start].student)
    bench = shop.bench(shop.engine(job, student, lr, out / "corpus"), settings.limit)
    train(job.build(), bench, shop.counter, settings.cooldown, lambda progress: None)
    scores = measures.solving(student, shop.pair.tokenizer)
    macro = {decoding: fmean(by_task.values()) for decoding, by_task in scores.items()}  # two STEM and two coding tasks: equal weights
    return {"method": method, "lr": lr, "steps": bench.ledger.step, **macro, "tasks": scores}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--methods", default="sft,offline_kd,opd,opd_rlaif")
    arguments.add_argument("--budget", type=float, default=6e11, help="FLOPs per trial")
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(trial, method, lr, given.budget, given.out) for method in given.methods.split(",") for lr in RATES]
        rows = []
        for future in futures:
            rows.append(future.result())
            print(json.dumps(rows[-1]), flush=True)
    (given.out / "trials.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

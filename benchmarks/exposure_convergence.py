"""How fast the estimates of the exposure-bias gap converge, on Markov pairs for which dynamic programming gives the truth.

    python benchmarks/exposure_convergence.py                     # about a minute; the last table is in docs/exposure-bias.md

For every number of prompts N the root mean squared error over repeated draws, beside the standard error that theory promises, σ/√N. The
pairs are those of the tests (`tests/markov.py`): in *biased* the student falls into a wrong state that the teacher never visits, *mixed*
errs everywhere, and in *equal* student and teacher are the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

import numpy as np

from opd_bench.exposure import Divergences, Ended, gap

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import markov

LENGTH, SIZES = 8, (50, 200, 800, 3200)
COLUMNS = {"regret": "R", "per_step": "l·ε", "exaccerr": "ExAccErr"}


def part(record: Divergences, at: int, prompts: int) -> Divergences:
    rows = slice(at * prompts, (at + 1) * prompts)
    return Divergences(record.student_NT[rows], record.student_alive_NT[rows], record.teacher_NT[rows], record.teacher_alive_NT[rows])


def row(pair: markov.Pair, convention: str, ended: Ended, column: str, repeats: int) -> list[str]:
    """Exact value, then the error at each of ``SIZES`` as a share of σ/√N."""
    truth = markov.exact(pair, LENGTH, convention, ended)
    cells = [f"{truth.value[column]:.3f}", f"{truth.deviation[column]:.2f}"]
    for prompts in SIZES:
        record = markov.sampled(pair, repeats * prompts, LENGTH, convention, np.random.default_rng(prompts))
        errors = [getattr(gap(part(record, at, prompts), LENGTH, ended), column) - truth.value[column] for at in range(repeats)]
        rms, promised = float(np.mean(np.square(errors))) ** 0.5, truth.deviation[column] / prompts**0.5
        cells.append(f"{rms:.4f} ({rms / promised:.2f})" if promised > 1e-9 else f"{rms:.4f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400, help="draws per cell; a ratio's own standard error is 1/√(2·repeats)")
    repeats = parser.parse_args().repeats
    print("| pair | convention | ended | figure | exact | σ | " + " | ".join(f"N = {prompts}" for prompts in SIZES) + " |")
    print("| --- " * (6 + len(SIZES)) + "|")
    for name, pair in (("biased", markov.BIASED), ("mixed", markov.MIXED)):
        for convention, said in (("kl", "full KL"), ("ratio", "log-ratio")):
            for ended in get_args(Ended):
                for column, label in COLUMNS.items():
                    print(f"| {name} | {said} | {ended} | {label} | " + " | ".join(row(pair, convention, ended, column, repeats)) + " |")
    same = gap(markov.sampled(markov.EQUAL, SIZES[-1], LENGTH, "kl", np.random.default_rng(0)), LENGTH)
    print(f"\nequal, {SIZES[-1]} prompts: R = {same.regret:g}, l·ε = {same.per_step:g}, ExAccErr {same.exaccerr or 'undefined'}")


if __name__ == "__main__":
    main()

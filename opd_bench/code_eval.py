"""Hugging Face's ``code_eval`` metric over our sandbox: lm-eval's code tasks load it by name and run generated programs with it.

    >>> CodeEval().compute(references=["assert f(1) == 2"], predictions=[["def f(a): return a + 1", "def f(a): return a"]], k=[1])[0]
    {'pass@1': 0.5}

The tests stand in the program's own process, as in the original: one that tampers with what it is compared by passes, one that only
exits early or prints does not. Programs see the standard library alone.
"""

from __future__ import annotations

import ast
import secrets
import sys
from collections.abc import Sequence
from math import comb
from statistics import fmean
from typing import Any

from opd_bench import sandbox
from opd_bench.errors import UserError

TIMEOUT_S = 3.0
NONCE = secrets.token_hex(16)  # comes back only from a program that got through its tests


class CodeEval:
    """What ``evaluate.load("code_eval")`` returns."""

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        timeout: float = TIMEOUT_S,
        **_: Any,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k (Chen et al. 2021, arXiv 2107.03374) for every k that no problem has fewer programs than, and what became of each program.

        UserError where tests import what the sandbox does not have, or nothing can be isolated here.
        """
        for test in references:
            _importable(test)
        jobs = [
            (f"{program}\n{test}", [f"assert {NONCE!r} == {NONCE!r}"])
            for test, of in zip(references, predictions, strict=True)
            for program in of
        ]
        outcomes = iter(sandbox.run_many(jobs, timeout))
        found = {problem: [next(outcomes) for _ in of] for problem, of in enumerate(predictions)}
        results = {
            problem: [
                (row, {"task_id": problem, "passed": one.passed, "result": one.detail or one.status, "completion_id": row})
                for row, one in enumerate(every)
            ]
            for problem, every in found.items()
        }
        counts = [(len(every), sum(one.passed for one in every)) for every in found.values()]
        least = min(total for total, _ in counts)
        return {
            f"pass@{of}": fmean(1 - comb(total - right, of) / comb(total, of) for total, right in counts) for of in k if of <= least
        }, results


def _importable(test: str) -> None:
    nodes = list(ast.walk(ast.parse(test)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    if missing := next((name for name in names if name.partition(".")[0] not in sys.stdlib_module_names), None):
        raise UserError(f"tests that import {missing} cannot run in the sandbox, which has the standard library alone; choose another task")

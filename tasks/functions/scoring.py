"""pass@1 of a generated function: it passes when every hidden test holds in the sandbox."""

from opd_bench.resources import task_module
from opd_bench.sandbox import run_tests


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """``results`` holds the one greedy (or sampled) response to ``doc``. Training documents carry no tests: theirs are made when wanted."""
    tests = doc["tests"] or task_module("functions").Problem.of(doc["identity"]).hidden_tests()
    return {"pass@1": float(run_tests(results[0], tests).passed)}

"""pass@1 of a generated function: it passes when every hidden test holds in the sandbox."""

from opd_bench.sandbox import run_tests


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """``results`` holds the one greedy (or sampled) response to ``doc``."""
    return {"pass@1": float(run_tests(results[0], doc["tests"]).passed)}

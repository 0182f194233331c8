"""Who may import whom, read from the source: every module imports only what stands below it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from opd_bench.resources import BASELINES, PACKAGE

# From the bottom up. A new module takes its place here.
ORDER = (
    *(
        "allocator",
        "errors",
        "resources",
        "procedural",
        "device",
        "statistics",
        "exposure",
        "sandbox_worker",
        "sandbox",
        "standard",
        "ledger",
        "losses",
    ),
    *("code_eval", "provision", "checkpointing", "flops"),
    "clock",
    *("readings", "curves", "sequences", "store", "judge_audit", "records", "gates"),
    *(
        "bench",
        "methods",
        "stages",
        "hub",
        "gpus",
        "settings",
        "config",
        "models",
        "privilege",
        "scoring",
        "teacher_cache",
        "vllm_server",
        "teacher_server",
        "decoder",
        "rollouts",
        "teachers",
        "vllm_worker",
        "vllm_sampler",
        "vllm_server_sampler",
        "behind",
        "mismatch",
        "judge",
        "judge_verifier",
        "judge_model",
        "judge_solver",
        "judge_endpoint",
        "lora",
        "engine",
        "measure",
        "prompts",
        "trace",
        "train",
        "supervised",
        "training_prompts",
        "evaluate",
        "continuations",
        "retention",
        "plan",
        "tracking",
        "built",
    ),
    *("watch", "conformance", "backends"),
    *(
        "arm",
        "launch",
        "leaderboard",
        "assemble",
        "report",
        "judge_report",
        "suite",
        "plots",
        "power",
        "preflight",
        "estimate",
        "card",
        "compare",
        "tune",
        "page",
        "audit",
        "dry_run",
        "advice",
        "step_profile",
        "embedded",
        "pull",
        "ledger_file",
        "cli",
    ),
)
READERS = {
    "statistics",
    "exposure",
    "readings",
    "curves",
    "records",
    "gates",
    "judge_audit",
    "leaderboard",
    "assemble",
    "report",
    "judge_report",
    "suite",
    "power",
    "plots",
}  # they see recorded files, never a model
WORKERS = {
    "behind",
    "bench",
    "checkpointing",
    "decoder",
    "engine",
    "mismatch",
    "rollouts",
    "scoring",
    "judge",
    "judge_endpoint",
    "judge_model",
    "judge_verifier",
    "measure",
    "prompts",
    "trace",
    "train",
    "arm",
    "evaluate",
    "models",
    "launch",
}
METHODS = {path.stem for path in BASELINES.glob("*.py")}


@cache
def sources() -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def imported(tree: ast.AST) -> set[str]:
    """Full names of all that is imported, inside functions too; ``from a import b`` gives ``a`` and ``a.b``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(tree: ast.AST) -> set[str]:
    """The modules of this package that ``tree`` imports."""
    return {name.split(".")[1] for name in imported(tree) if re.match(r"opd_bench\.", name)} & {*ORDER, *sources()}


@pytest.mark.parametrize("module", sorted(sources()))
def test_nothing_imports_what_stands_above_it(module: str):
    assert module in ORDER, f"give {module} its place in ORDER"
    assert ours(sources()[module]) <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", sorted(READERS))
def test_readers_of_records_never_reach_what_makes_them(module: str):
    seen, waiting = set(), {module}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= ours(sources()[name]) - seen
    assert not seen & WORKERS


def top_level(name: str) -> set[str]:
    """The modules of the package that import the library ``name``."""
    files = [path for path in PACKAGE.rglob("*.py") if "baselines" not in path.parts and "tasks" not in path.parts]
    return {path.stem for path in files if name in {full.split(".")[0] for full in imported(ast.parse(path.read_text(encoding="utf-8")))}}


def test_lm_eval_is_imported_in_one_module():
    assert top_level("lm_eval") == {"evaluate"}


@pytest.mark.parametrize("library", ["vllm", "ray"])
def test_heavy_backends_have_one_module_at_most(library: str):
    assert len(top_level(library)) <= 1


def strings(path: Path) -> list[str]:
    """String constants of a file that code could use as names: no docstrings, and no prose (such as the help's examples)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and node.body]
    docstrings = {id(node.value) for node in first if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [node.value for node in constants if isinstance(node.value, str) and not re.search(r"\s", node.value)]


def test_the_harness_does_not_know_the_name_of_any_method():
    assert {"sft", "opd"} <= METHODS
    for path in PACKAGE.glob("*.py"):
        words = {word for text in strings(path) for word in re.findall(r"[a-z_]+", re.sub(r"opd[-_]bench", "", text.lower()))}
        assert not words & METHODS, path.name
        assert not {name for name in imported(ast.parse(path.read_text(encoding="utf-8"))) if "baselines" in name}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_short_and_uses_losses_methods_and_sequences_alone(name: str):
    text = (BASELINES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    assert ours(ast.parse(text)) <= {"losses", "methods", "sequences"}

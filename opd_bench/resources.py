"""Where the parts that travel with the package are: baselines, tasks, tiers, designs and embedded models.

In a wheel `baselines/` and `tasks/` lie inside the package; in a checkout they lie beside it.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """The folder ``name`` of the package, or its sibling in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


BASELINES = folder("baselines")
TASKS = folder("tasks")
TIERS = PACKAGE / "tiers"
SIZES = PACKAGE / "sizes"
DESIGNS = PACKAGE / "designs"
EMBEDDED = PACKAGE / "embedded" / "models"


def load_module(path: Path, name: str) -> ModuleType:
    """Import the file ``path`` under the module name ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@cache
def task_module(name: str) -> ModuleType:
    """The problem generator of one of our tasks, ``tasks/<name>/problems.py``."""
    return load_module(TASKS / name / "problems.py", f"opd_bench_tasks_{name}")

"""What a method is, and how methods are found: by name in `baselines/`, by entry point, or by file.

    class OPD(Method):
        def step(self, bench):
            rollouts = bench.sample(bench.prompts())
            bench.update(rollouts, reverse_kl, signal=bench.teacher(rollouts))

A method file defines exactly one subclass of ``Method``. Its ``Config`` declares its options; unknown ones are refused.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opd_bench.bench import Bench
from opd_bench.errors import RunError, UserError, did_you_mean
from opd_bench.resources import BASELINES, DESIGNS, load_module


def tunable(default: Any, values: list, **constraints: Any) -> Any:
    """A field of ``Config`` whose ``values`` are tried by `opd-bench tune`; otherwise like pydantic's Field."""
    return Field(default, json_schema_extra={"tune": values}, **constraints)


def space(cls: type[Method]) -> dict[str, list]:
    """What a method declares to be tried, by option."""
    found = {}
    for name, field in cls.Config.model_fields.items():
        values = field.json_schema_extra.get("tune") if isinstance(field.json_schema_extra, dict) else None
        if isinstance(values, list):
            found[name] = values
    return found


class Method(ABC):
    """One answer to: where do the sequences come from, who annotates them, which loss do they enter?"""

    class Config(BaseModel):
        """Options every method has; a method adds its own in a subclass."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        lr: float = tunable(
            1e-3, [5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3], ge=0, description="peak learning rate of AdamW; 0 trains nothing (a control)"
        )
        batch: int = tunable(32, [16, 32, 64], ge=1, description="sequences per step")

    own_schedule: ClassVar[bool] = False  # True where a step depends on the whole budget: each budget is then trained for separately

    config: Config

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def unit(self) -> int:
        """A step's number of sequences is a multiple of this (the group size of grouped methods)."""
        return 1

    @abstractmethod
    def step(self, bench: Bench) -> None:
        """One step of training, by the bench's verbs alone."""


def take_step(method: Method, bench: Bench) -> None:
    """``method.step(bench)``; RunError for whatever it raises that is not one of our own errors."""
    try:
        method.step(bench)
    except (RunError, UserError):
        raise
    except Exception as error:
        raise RunError(f"{type(method).__name__}.step raised {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Source:
    """A method class and the file it came from."""

    name: str
    path: Path
    cls: type[Method]

    EXAMPLE: ClassVar[str] = "see docs/adding-a-method.md"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]

    def build(self, options: dict) -> Method:
        """The method with ``options``; unknown or invalid ones raise UserError."""
        try:
            return self.cls(self.cls.Config(**options))
        except ValidationError as error:
            raise UserError(f"method {self.name}: {describe(error, self.cls.Config)}") from None


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """The first complaint of pydantic in one line, with a suggestion for an unknown key."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known, parents = model, first["loc"][:-1]
        for part in parents:
            annotation = known.model_fields[str(part)].annotation if str(part) in known.model_fields else None
            if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
                return f"unknown key {where!r}"
            known = annotation
        return f"unknown key {where!r}{did_you_mean(str(first['loc'][-1]), known.model_fields)}"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def shipped() -> dict[str, Path]:
    """The methods that come with the package, by name."""
    return {path.stem: path for path in sorted(BASELINES.glob("*.py")) if not path.stem.startswith("_")}


def designs() -> dict[str, Path]:
    """The declared comparisons whose name stands for their methods, by name; see ``config.selection``."""
    return {path.stem: path for path in sorted(DESIGNS.glob("*.yaml"))}


def label(name: str) -> str:
    """What the arms of the method given as ``name`` are called: a file by its stem."""
    return Path(name).stem if name.endswith(".py") else name


@cache
def find(name: str) -> Source:
    """The method called ``name``: a path to a ``.py`` file, a shipped method, or an entry point ``opd_bench.methods``."""
    if name.endswith(".py"):
        return _from_file(Path(name).resolve())
    if name in shipped():
        return _from_file(shipped()[name])
    installed = {entry.name: entry for entry in entry_points(group="opd_bench.methods")}
    if name in installed:
        cls = installed[name].load()
        return Source(name, Path(inspect.getfile(cls)), cls)
    raise UserError(
        f"unknown method {name!r}{did_you_mean(name, [*shipped(), *installed, *designs()])}; a file is given as path/to/mine.py"
    )


def _from_file(path: Path) -> Source:
    if not path.is_file():
        raise UserError(f"no method file {path}")
    module_name = f"opd_bench_method_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    try:
        module: ModuleType = load_module(path, module_name)
    except Exception as error:
        raise UserError(f"method file {path.name} can't be imported: {type(error).__name__}: {error}") from error
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Method) and value is not Method]
    own = [cls for cls in found if cls.__module__ == module_name]
    if len(own) != 1:
        raise UserError(f"method file {path.name} defines {len(own)} subclasses of Method; it must define exactly one ({Source.EXAMPLE})")
    if getattr(own[0], "__abstractmethods__", None):
        raise UserError(f"method file {path.name}: {own[0].__name__} lacks `step(self, bench)` ({Source.EXAMPLE})")
    return Source(path.stem, path, own[0])

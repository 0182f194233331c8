"""Given FLOPs, from a small YAML file, by every ledger: ``opd-bench ledger FILE``.

    costs = compare_costs(read_arms(Path("docs/examples/ledger.yaml")))
    show(costs, console)

The figures come from the code that reads finished runs (`readings.py`). docs/ledger.md describes the file.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opd_bench.config import read_yaml
from opd_bench.errors import UserError, did_you_mean
from opd_bench.methods import describe
from opd_bench.readings import KINDS, LEDGERS, Costs, Spent


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of charge {kind!r}{did_you_mean(kind, KINDS)}")
    return kind


Flops = dict[Annotated[str, AfterValidator(_known)], Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class LedgerFile(BaseModel):
    """FLOPs by kind of charge; what is left out was not charged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shared: Flops = Field({}, description="charged to every arm: the cold start")
    arms: dict[str, Flops] = Field(min_length=1)


def read_arms(path: Path) -> dict[str, Spent]:
    """What each arm of the file was charged, its share of the cold start included. UserError for a file that says it otherwise."""
    try:
        given = LedgerFile(**read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error, LedgerFile)}") from None
    return {
        name: {"flops": {kind: flops.get(kind, 0) + given.shared.get(kind, 0) for kind in {**flops, **given.shared}}}
        for name, flops in given.arms.items()
    }


def to_json(costs: list[Costs]) -> str:
    """What ``show`` prints, unrounded, with the kinds each ledger charges."""
    return json.dumps({"ledgers": [asdict(row) for row in costs]}, indent=2, ensure_ascii=False)


def show(costs: list[Costs], console: Console) -> None:
    """Print a row per ledger: the cost of each arm, and how many times the cheapest that is."""
    table = Table(title="FLOPs, and times the cheapest arm", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("ledger", no_wrap=True)
    for name in costs[0].cost:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for row in costs:
        table.add_row(row.ledger.name, *(f"{row.cost[name]:.2e} {_times(ratio)}" for name, ratio in row.ratio.items()))
    console.print(table)
    absent = [ledger.name for ledger in LEDGERS if ledger not in [row.ledger for row in costs]]
    console.print(f"Not shown, as the file does not give all they charge: {'; '.join(absent)}.", highlight=False)


def _times(ratio: float | None) -> str:
    return f"{'–' if ratio is None else f'{ratio:.1f}×':>7}"

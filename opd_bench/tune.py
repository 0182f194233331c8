"""Equal tuning: the same number of trials for every method, on development items and a seed that no leaderboard has.

    recipe = tune(config, 8, out, "opd-bench tune", 2, console)

A trial is an arm like any other, with one of the settings its method declares (`methods.tunable`), drawn by lot; so an interrupted
tuning resumes, and what each trial spent stands in its ledger. The best by greedy score, of equal ones by the sampled score, becomes the
recipe: YAML to be laid over the tier with ``compare --config``.
"""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opd_bench import store
from opd_bench.compare import compare
from opd_bench.config import Config
from opd_bench.errors import UserError
from opd_bench.leaderboard import Leaderboard, Method
from opd_bench.methods import find, label, space

SEED = 1000  # the least that a trial begins from
Settings = dict[str, Any]


def drawn(name: str, method: str, trials: int) -> list[Settings]:
    """``trials`` different settings of what ``method`` declares to be tried, the first of them those of fewer trials.

    UserError if it declares fewer.
    """
    declared = space(find(method).cls)
    every = [dict(zip(declared, values, strict=True)) for values in product(*declared.values())]
    if len(every) < trials:
        raise UserError(f"method {name} declares {len(every)} settings to try, fewer than {trials} trials; lower --trials")
    random.Random(f"tune {name}").shuffle(every)
    return every[:trials]


def trials_of(config: Config, trials: int) -> dict[str, list[Settings]]:
    """The options of every trial, by the name a method has in the recipe."""
    found = {}
    for name, options in config.methods.items():
        if "stages" in options:
            raise UserError(f"{name} has stages; tune the method of each by itself and write what is found into the stages")
        named = {"method": name, **options}
        found[label(name)] = [{**named, **chosen} for chosen in drawn(label(name), named["method"], trials)]
    return found


def comparison(config: Config, tried: dict[str, list[Settings]]) -> Config:
    """The comparison whose arms are the trials, called ``<method>-<number>``."""
    first = -(-SEED // len(config.students)) * len(config.students)  # so that it begins from the first cold start
    changed = {
        "methods": {f"{name}-{number}": options for name, trials in tried.items() for number, options in enumerate(trials)},
        "contrasts": {},
        "notes": [],
        "seeds": 1,
        "first_seed": first,
        "exposure": {"prompts": 2, "draws": 10},
        "evaluation": {**config.evaluation.model_dump(), "split": "validation"},
        "budget": {**config.budget.model_dump(), "points": []},
    }
    return Config(**{**config.model_dump(), **changed})


def tune(config: Config, trials: int, out: Path, command: str, workers: int, console: Console) -> dict[str, Settings]:
    """Run the trials under ``out`` and write ``trials.json`` and ``recipe.yaml`` there; the chosen options by method."""
    tried = trials_of(config, trials)
    board = compare(comparison(config, tried), out / "trials", command, workers, console)
    arms = {method.name: method for method in board.methods}
    rows = [_row(name, options, arms[f"{name}-{number}"]) for name, trials in tried.items() for number, options in enumerate(trials)]
    best = {name: max((row for row in rows if row["method"] == name), key=_quality) for name in tried}
    recipe = {name: _recipe(name, row["options"]) for name, row in best.items()}
    total = sum(sum(row["flops"].values()) for row in rows)
    store.write_json(out / "trials.json", {"schema": "opd-bench/trials/1", "command": command, "flops": total, "trials": rows})
    said = f"# {command}\n# {trials} trials per method, {total:.3g} FLOPs in all, chosen by greedy score on {_items(board)}.\n"
    store.write_text(out / "recipe.yaml", said + yaml.safe_dump({"tier": config.tier, "methods": recipe}, sort_keys=False))
    console.print(_table(rows, best))
    console.print(f"Written to {out}/: recipe.yaml (compare --config {out}/recipe.yaml) and trials.json.", markup=False, highlight=False)
    return recipe


def _row(name: str, options: Settings, arm: Method) -> dict[str, Any]:
    spent = {"share_spent": arm.spent.share, "flops": arm.spent.flops}
    return {"method": name, "options": options, "score": arm.score.mean, "sampled": arm.sampled.mean, **spent}


def _recipe(name: str, options: Settings) -> Settings:
    return {option: value for option, value in options.items() if (option, value) != ("method", name)}


def _quality(row: dict[str, Any]) -> tuple[float, float]:
    return row["score"], row["sampled"]


def _items(board: Leaderboard) -> str:
    return f"the validation items of {', '.join([*board.tasks.stem, *board.tasks.coding])} with seed {board.seeds[0]}"


def _table(rows: list[dict[str, Any]], best: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("method", "options", "score", "sampled", "budget"):
        table.add_column(heading)
    for row in sorted(rows, key=lambda row: (row["method"], -row["score"])):
        options = ", ".join(f"{option} {value}" for option, value in _recipe(row["method"], row["options"]).items())
        cells = [row["method"], options, f"{row['score']:.3f}", f"{row['sampled']:.3f}", f"{row['share_spent']:.1%}"]
        table.add_row(*map(escape, cells), style="bold" if row is best[row["method"]] else None)
    return table

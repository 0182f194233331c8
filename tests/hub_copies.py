"""Small copies of hub data sets, laid out and named as `hf download` leaves them, with items of our own in their columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

LETTERS = ["A", "B", "C", "D"]


def _copy(folder: Path, config: str, splits: dict[str, list[dict[str, Any]]], kind: str = "parquet") -> None:
    """A data-set repository: README.md that names the files of ``config``, and one file for each split."""
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        path = folder / config / f"{split}-00000-of-00001.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "parquet":
            Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "A copy."]) + "\n", encoding="utf-8")


def gsm8k(number: int) -> dict[str, str]:
    question = f"Ann has {number} pens and buys {number + 1} more. How many has she?"
    return {"question": question, "answer": f"{number}+{number + 1}=<<{number}+{number + 1}={2 * number + 1}>>\n#### {2 * number + 1}"}


def arc(number: int) -> dict[str, Any]:
    choices = {"text": [str(number + step) for step in range(4)], "label": LETTERS}
    return {"id": f"q{number}", "question": f"Which is {number}?", "choices": choices, "answerKey": "A"}


def humaneval(number: int) -> dict[str, str]:
    name = f"add_{number}"
    prompt = f'def {name}(a):\n    """Add {number}.\n    >>> {name}(1)\n    {number + 1}\n    """\n'
    checks = "".join(f"    assert candidate({value}) == {number + value}\n" for value in (0, 2))
    test = f"\n\nMETADATA = {{'author': 'us'}}\n\n\ndef check(candidate):\n{checks}\n"
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": prompt,
        "canonical_solution": f"    return a + {number}\n",
        "test": test,
        "entry_point": name,
    }


def mbpp(number: int) -> dict[str, Any]:
    tests = [f"assert times_{number}({value}) == {number * value}" for value in (1, 2, 5)]
    return {
        "task_id": number,
        "text": f"Write a function to multiply by {number}.",
        "code": f"def times_{number}(a):\r\n    return a * {number}",
        "test_list": tests,
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def gpqa(number: int) -> dict[str, str]:
    wrong = {f"Incorrect Answer {place}": f" {number + place} " for place in (1, 2, 3)}
    return {"Question": f"Which is {number}?", "Correct Answer": f"{number}\n", **wrong}


def truthfulqa(number: int) -> dict[str, Any]:
    right = [f"There are {number} of them", f"Exactly {number}"]
    return {
        "question": f"How many are {number}?",
        "best_answer": right[0],
        "correct_answers": right,
        "incorrect_answers": ["Nobody can ever know this"],
    }


def write_all(folder: Path, count: int = 8) -> Path:
    """Copies of what the tests read, ``count`` items a split."""

    def rows(item: Any, first: int = 0) -> list[Any]:
        return [item(first + number) for number in range(count)]

    _copy(folder / "openai/gsm8k", "main", {"train": rows(gsm8k, 100), "test": rows(gsm8k)})
    _copy(folder / "allenai/ai2_arc", "ARC-Challenge", {"train": rows(arc, 100), "validation": rows(arc, 50), "test": rows(arc)})
    _copy(folder / "openai/openai_humaneval", "openai_humaneval", {"test": rows(humaneval)})
    _copy(
        folder / "google-research-datasets/mbpp",
        "full",
        {"train": rows(mbpp, 601), "test": rows(mbpp, 11), "validation": rows(mbpp, 511), "prompt": rows(mbpp, 1)},
        "jsonl",
    )
    _copy(folder / "Idavidrein/gpqa", "gpqa_diamond", {"train": rows(gpqa)})
    _copy(folder / "truthfulqa/truthful_qa", "generation", {"validation": rows(truthfulqa)})
    return folder

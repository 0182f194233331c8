"""`opd-bench ledger`: the published ratios come out, the page about it is true, and a mistake in the file is one line."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest

from opd_bench.readings import LEDGERS

ROOT = Path(__file__).parents[1]
EXAMPLE, PAGE = ROOT / "docs/examples/ledger.yaml", ROOT / "docs/ledger.md"
PUBLISHED = {
    "data free": "9.0",
    "data charged": "29.5",
    "teacher scoring free": "18.3",
    "from scratch, data free": "3.4",
    "from scratch, data charged": "4.4",
}


def test_the_example_gives_the_published_ratios(program):
    code, out, err = program("ledger", EXAMPLE)
    rows = re.findall(r"^ ?(\S.*?\S)  +\S+ +1\.0×  +\S+ +([\d.]+)×", out, re.MULTILINE)
    assert (code, err) == (0, "")
    assert dict(rows) == PUBLISHED
    assert "Not shown, as the file does not give all they charge: wall clock." in out


def test_json_holds_the_same_unrounded(program):
    code, out, _ = program("ledger", EXAMPLE, "--json")
    rows = json.loads(out)["ledgers"]
    assert code == 0
    assert {row["ledger"]["name"]: f"{row['ratio']['sft']:.1f}" for row in rows} == PUBLISHED
    assert {row["ledger"]["name"]: row["ledger"]["kinds"] for row in rows} == {
        each.name: [*each.kinds] for each in LEDGERS if each.unit == "flops"
    }
    assert next(row["cost"] for row in rows if row["ledger"]["name"] == "data free") == {"opd": 8.2e19 + 8.4e19, "sft": 1.5e21}


def test_an_arm_that_costs_nothing_has_no_ratio(program, tmp_path):
    file = tmp_path / "ledger.yaml"
    file.write_text("arms: {mine: {student_update: 1e9}, none: {}}", encoding="utf-8")
    assert re.search(r"data charged +1\.00e\+09 +– +0\.00e\+00 +–", program("ledger", file)[1])
    ratios = [row["ratio"] for row in json.loads(program("ledger", file, "--json")[1])["ledgers"]]
    assert ratios == [{"mine": None, "none": None}] * 3  # the cold start is not given


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: {mine: {teacher_scor: 1}}", r"unknown kind of charge 'teacher_scor' \(did you mean 'teacher_score'\?\)"),
        ("shared: {cold_start: 1}\narms: {mine: {judge: 1}}", r"'cold_start' \(did you mean 'cold_start_\w+'\?\)"),
        ("arm: {mine: {judge: 1}}", r"unknown key 'arm' \(did you mean 'arms'\?\)|arms: Field required"),
        ("arms: {}", "arms"),
        ("arms: {mine: {judge: -1}}", "arms.mine.judge: .*greater than or equal to 0"),
        ("arms: {mine: {judge: .inf}}", "arms.mine.judge: .*finite"),
        ("arms: {mine: {judge: much}}", "arms.mine.judge: .*number"),
        ("- arms", "must hold a mapping"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(program, tmp_path, text, said):
    file = tmp_path / "ledger.yaml"
    file.write_text(text, encoding="utf-8")
    code, out, err = program("ledger", file)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: [^\n]*({said})[^\n]*\n", err), err


def test_a_missing_file_is_one_line(program, tmp_path):
    code, out, err = program("ledger", tmp_path / "none.yaml")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: cannot read [^\n]*none.yaml[^\n]*\n", err), err


def test_the_figures_of_the_page_are_what_its_code_prints():
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.failed == 0
    assert result.attempted >= 7


def test_the_page_lists_the_ledgers_and_shows_the_table_of_the_example(program):
    text = PAGE.read_text(encoding="utf-8")
    assert {each.name: each.question for each in LEDGERS} == dict(re.findall(r"^\| \*\*(.+?)\*\*.*\| (.+?) \|$", text, re.MULTILINE))
    table = [line.strip() for line in program("ledger", EXAMPLE)[1].splitlines() if "×" in line]
    assert len(table) == len(PUBLISHED)
    assert all(line in text for line in table)

"""What a reader sees: the same numbers in the terminal, in Markdown and in the figures."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from opd_bench import plots, report
from opd_bench.assemble import assemble
from opd_bench.exposure import Divergences, Recording
from opd_bench.leaderboard import Claim, Leaderboard
from opd_bench.records import ArmRecord, CurvePoint, Run

TASKS = ["arithmetic", "functions"]
METHODS = ["sft", "offline_kd", "opd"]
PNG = b"\x89PNG\r\n\x1a\n"


def items(rng: np.random.Generator, rate: float) -> dict[str, np.ndarray]:
    return {task: (rng.random(60) < rate).astype(float) for task in TASKS}


def divergences(rng: np.random.Generator, growth: float) -> Divergences:
    def side(growth: float) -> tuple[np.ndarray, np.ndarray]:
        alive_NT = np.arange(20) < rng.integers(5, 20, size=(16, 1))
        return np.where(alive_NT, 0.05 * (1 + growth * np.arange(20)), np.nan), alive_NT

    return Divergences(*side(growth), *side(0.0))


def measured(seeds: int) -> tuple[Run, list[ArmRecord]]:
    rng = np.random.default_rng(0)
    start = items(rng, 0.5), items(rng, 0.3)
    run = Run(
        "embedded", "opd-bench run embedded", "0123abc", "FLOPs", 1.5e12, list(range(seeds)), TASKS[:1], TASKS[1:],
        items(rng, 0.95), items(rng, 0.9), [start[0]], [start[1]],
        [Recording({"forward_kl": divergences(rng, 0.2)}, {})], None, {}, dict.fromkeys(TASKS, 0.0),
        dict.fromkeys(TASKS, np.arange(60) % 4 + 2.0),
    )  # fmt: skip
    arms = [
        ArmRecord(
            method, seed, 0, 0.996, 0.001, 185.0, ["teacher text"], items(rng, rate - 0.2),
            [
                CurvePoint(share, *({"student_update": int(share * total)} for total in (1.5e12, 1e6, 30)), items(rng, rate * share), gap)
                for share in (0.5, 1.0)
                for gap in [Recording({"forward_kl": divergences(rng, growth)}, {})]
            ],
        )
        for method, rate, growth in (("sft", 0.6, 0.2), ("offline_kd", 0.7, 0.1), ("opd", 0.8, 0.0))
        for seed in range(seeds)
    ]  # fmt: skip
    return run, arms


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    return assemble(*measured(2), draws=100)


def shown(board: Leaderboard, width: int) -> str:
    stream = io.StringIO()
    report.show(board, Console(file=stream, width=width))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [(0.0341, 3, True, "+.034"), (-1.2, 2, False, "−1.20"), (-0.0001, 3, False, ".000"), (1.0, 3, False, "1.000"), (None, 2, False, "–")],
)
def test_numbers_are_short_and_honest(value: float | None, digits: int, sign: bool, text: str):
    assert report.number(value, digits, sign) == text


@pytest.mark.parametrize(("seconds", "text"), [(42.2, "42s"), (185, "3m05s"), (3599.6, "1h00m"), (7800, "2h10m")])
def test_wall_time_is_rounded_before_it_is_split(seconds: float, text: str):
    assert report.wall_time(seconds) == text


def test_claims_read_as_sentences():
    claim = Claim(
        a="opd", b="sft", family="score", difference=0.034, low=0.01, high=0.05, p=0.0078, p_holm=0.0469, claimed=True, by_start=[0.034]
    )
    assert report.sentence(claim) == "opd > sft by +.034 [.010, .050], p_holm .047: claimed"
    gap = claim.model_copy(update={"family": "excess", "difference": -0.45, "low": -0.6, "high": -0.3})
    assert report.sentence(gap) == "R − l·ε: opd < sft by −.45 nats [−.60, −.30], p_holm .047: claimed"
    assert report.sentence(claim.model_copy(update={"by_start": [0.05, -0.01]})).endswith("(by cold start +.050, −.010): claimed")
    unsure = claim.model_copy(update={"low": None, "high": None, "p_holm": 1.0, "claimed": False})
    assert report.sentence(unsure) == "not claimed: opd vs sft +.034 (no interval), p_holm 1.000"


def contrasted(seeds: int) -> Leaderboard:
    run, arms = measured(seeds)
    arms[0] = replace(arms[0], share_spent=0.9)  # which withholds sft
    weights = {"own text": {"opd": 1.0, "offline_kd": -1.0}, "a third": {"opd": 1 / 3, "sft": -1 / 3}}
    return assemble(replace(run, contrasts=weights), arms, draws=100)


def test_contrasts_read_as_sums_of_methods():
    assert report.formula({"opd": 0.5, "kd": 0.5, "sft": -1.0}) == "½ opd + ½ kd − sft"
    assert report.formula({"sft": -1.0, "kd": 0.25, "opd": 0.75}) == "− sft + .250 kd + .750 opd"


def test_every_contrast_has_a_row_with_a_cell_per_measure_in_markdown_and_terminal():
    board = contrasted(2)
    assert {contrast.claimed for contrast in board.contrasts} == {False}
    (name, formula, *cells), (_, _, *kept) = report.contrast_rows(board)
    assert (name, formula) == ("own text", "opd − offline_kd")
    assert cells == [f"{report.difference(contrast)}: not claimed" for contrast in board.contrasts[::2]]
    assert all(cell.endswith(": withheld") for cell in kept)
    assert " nats [" in cells[2]
    text, terminal = report.markdown(board), shown(board, 400)
    assert f"| own text | opd − offline_kd | {' | '.join(cells)} |" in text
    assert "effects.png" in text
    assert "a third = .333 opd − .333 sft\n" in terminal
    for measure, cell in zip(("score", "sampled", "R − l·ε"), cells, strict=True):
        assert f"\n  {measure} {cell}\n" in terminal


def test_without_contrasts_there_is_no_section_and_no_figure(board: Leaderboard):
    for text in (report.markdown(board), shown(board, 100)):
        assert "ontrast" not in text
        assert "effects.png" not in text


@pytest.mark.parametrize("seeds", [1, 2])
def test_effects_are_drawn_a_panel_per_measure_and_hollow_where_not_claimed(seeds: int, tmp_path: Path):
    board, (run, arms) = contrasted(seeds), measured(seeds)
    panels = plots.effects(board).axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["own text", "a third"]
    for panel, family in zip(panels, ("score", "sampled", "excess"), strict=True):
        drawn = [line for line in panel.lines if line.get_marker() == "o"]
        assert [float(np.asarray(line.get_xdata())[0]) for line in drawn] == [
            contrast.difference for contrast in board.contrasts if contrast.family == family
        ]
        assert {line.get_markerfacecolor() for line in drawn} == {"white"}
    assert plots.draw(board, run, arms, METHODS, tmp_path)[-1].name == "effects.png"


def test_markdown_names_every_method_command_and_figure(board: Leaderboard):
    text = report.markdown(board)
    for word in [*METHODS, "teacher", "cold start", board.command, board.commit, "1.5e+12 FLOPs", "99.6 %", "3m05s", *report.FIGURES]:
        assert word in text
    assert "nan" not in text.lower()
    assert "None" not in text


def test_markdown_tables_are_rectangular(board: Leaderboard):
    rows = [line for line in report.markdown(board).splitlines() if line.startswith("|")]
    assert board.profile
    along, taus, times = report.curve_columns(board), ["method", *board.profile.tau], ["method", *board.profile.targets]
    widths = [
        len(columns)
        for columns in (report.SCORE_COLUMNS, report.EXPOSURE_COLUMNS, report.SPENT_COLUMNS, along, times, taus, report.READING_COLUMNS)
    ]
    lengths = [2 + len(METHODS) + extra for extra in (2, 1, 0, 0, 0, 0)] + [2 + len(board.readings)]
    assert [row.count("|") - 1 for row in rows] == [width for width, length in zip(widths, lengths, strict=True) for _ in range(length)]


def test_the_terminal_cuts_no_cell_at_80_columns(board: Leaderboard):
    text = shown(board, 80)
    assert "…" not in text
    for method in METHODS:
        assert method in text
    assert all(note in " ".join(text.split()) for note in board.notes)


def test_undefined_and_withheld_are_a_dash():
    run, arms = measured(1)
    alive_NT = np.ones((16, 4), dtype=bool)
    same = Divergences(np.zeros((16, 4)), alive_NT, np.zeros((16, 4)), alive_NT)
    board = assemble(
        run,
        [replace(arm, curve=[replace(arm.end, recording=Recording({"forward_kl": same}, {}))], share_spent=0.5) for arm in arms],
        draws=100,
    )
    assert all(row[0] == report.NONE for row in report.score_rows(board)[1:-1])
    assert all(row[4] == report.NONE for row in report.exposure_rows(board)[:-1])
    for text in (report.markdown(board), shown(board, 100)):
        assert "nan" not in text.lower()
        assert "None" not in text


def test_figures_are_the_linked_ones_and_the_same_bytes_every_time(tmp_path: Path):
    run, arms = measured(2)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    board = contrasted(2)
    paths = plots.draw(board, run, arms, METHODS, first)
    plots.draw(board, run, arms, METHODS, second)
    assert [path.name for path in paths] == list(report.figures(board)) == [*report.FIGURES, "effects.png"]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(PNG)
        assert len(data) > 5000
        assert data == (second / path.name).read_bytes()


def test_one_method_with_one_seed_can_be_drawn(tmp_path: Path):
    run, arms = measured(1)
    arms = [arm for arm in arms if arm.method == "opd"]
    board = assemble(run, arms, draws=100)
    assert all(path.stat().st_size > 5000 for path in plots.draw(board, run, arms, ["opd"], tmp_path))


def test_learning_curves_go_from_the_cold_start_to_the_whole_budget_with_bands(board: Leaderboard):
    score, excess, _ = plots.learning_curves(board, METHODS).axes
    assert board.cold_start.exposure
    for method, line, gap in zip(sorted(board.methods, key=lambda one: METHODS.index(one.name)), score.lines, excess.lines, strict=True):
        assert list(line.get_xdata()) == [0, 0.75e12, 1.5e12]
        assert list(line.get_ydata()) == [board.cold_start.score.mean, *(point.score.mean for point in method.curve)]
        assert list(gap.get_ydata()) == [board.cold_start.exposure.excess.mean, *(point.exposure.excess.mean for point in method.curve)]
    assert len(score.collections) == len(METHODS)


def test_a_method_keeps_its_colour_when_others_are_left_out(board: Leaderboard):
    assert plots.style(METHODS, "opd")[0] == plots.COLOURS[2]
    figure = plots.score_by_method(board, METHODS)
    drawn = {line.get_color() for line in figure.axes[0].lines}
    assert {plots.style(METHODS, name)[0] for name in METHODS} <= drawn


def test_score_by_steps_draws_every_level_of_every_task_that_says_its_steps(board: Leaderboard):
    run, arms = measured(2)
    figure = plots.score_by_steps(run, arms, METHODS)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == TASKS
    lines = {line.get_label(): line for line in shown[0].lines}
    assert {*METHODS, "teacher", "cold start"} <= lines.keys()
    chosen = run.steps["arithmetic"] == 3
    expected = np.mean([arm.greedy["arithmetic"][chosen].mean() for arm in arms if arm.method == "opd"])
    assert list(lines["opd"].get_xdata()) == [2, 3, 4, 5]
    assert np.asarray(lines["opd"].get_ydata())[1] == pytest.approx(expected)
    silent = replace(run, steps={**run.steps, "functions": np.full(60, np.nan)})
    assert sum(axes.get_visible() for axes in plots.score_by_steps(silent, arms, METHODS).axes) == 1

"""The figures of a leaderboard, as PNG files whose bytes depend on the data alone.

    draw(board, run, arms, ["sft", "offline_kd", "opd"], folder)

``methods`` fixes the colours: a method keeps its colour in every figure and every leaderboard drawn with the same list. The colours are
Okabe and Ito's without yellow and black; markers repeat what they say. Known limit: colours repeat after six methods, markers after five.

Shapes: S seeds, K budgets of a learning curve, T response positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opd_bench import exposure
from opd_bench.judge_audit import Judged
from opd_bench.leaderboard import CurvePoint, Estimate, Leaderboard
from opd_bench.records import ArmRecord, Run
from opd_bench.report import JUDGE_FIGURE
from opd_bench.statistics import Interval
from opd_bench.suite import Suite

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#7F7F00"]  # Okabe and Ito, and two of Tol's kind
MARKERS = ["o", "s", "^", "D", "v"]
GREY = "#555555"
PREFIXES = {"student": "own prefixes", "teacher": "teacher prefixes"}
ALONG: dict[str, Callable[[CurvePoint], Estimate | None]] = {  # what is drawn against the budget
    "Macro score, greedy (fraction solved)": lambda point: point.score,
    "R − l·ε (nats)": lambda point: point.exposure.excess,
    "ExAccErr (%)": lambda point: point.exposure.exaccerr,
}
MEASURES = {"score": "Greedy score", "sampled": "Sampled score", "excess": "R − l·ε (nats)"}  # of a contrast
PARTS = 20  # of the budget, over which rewards are averaged
SETTLED = 10  # tokens from which on ExAccErr sets the scale of its figure
FEWEST_ALIVE = 0.05  # positions with a smaller share of living rollouts are too noisy to draw


def draw(board: Leaderboard, run: Run, arms: list[ArmRecord], methods: list[str], folder: Path) -> list[Path]:
    """Write the figures of ``board`` into ``folder`` and return their paths; ``methods`` is the order of the colours."""
    figures = {
        "score_by_method.png": score_by_method(board, methods),
        "learning_curves.png": learning_curves(board, methods),
        "score_by_steps.png": score_by_steps(run, arms, methods),
        "divergence_by_position.png": divergence_by_position(arms, methods),
    }
    if board.contrasts:
        figures["effects.png"] = effects(board)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150, metadata={"Software": None})
    return [folder / name for name in figures]


def style(methods: list[str], name: str) -> tuple[str, str]:
    """Colour and marker of a method."""
    if name not in methods:
        return GREY, "x"  # the cold start
    place = methods.index(name)
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]


def score_by_method(board: Leaderboard, methods: list[str]) -> Figure:
    """Mean greedy score with its 95 % interval, the best method on top; seeds as faint dots."""
    figure = _figure(1.4 + 0.45 * len(board.methods))
    axes = figure.subplots()
    for place, method in enumerate(board.methods):
        colour, marker = style(methods, method.name)
        axes.scatter(method.score_by_seed, [place + 0.2] * len(method.score_by_seed), s=22, color=colour, alpha=0.3, linewidths=0)
        axes.errorbar(
            np.array([method.score.mean], float), [place], xerr=_reach(method.score), fmt=marker, color=colour, capsize=4, markersize=7
        )
    _references(axes, board, axes.axvline)
    axes.set_yticks(range(len(board.methods)), [method.name for method in board.methods])
    axes.set_ylim(len(board.methods) - 0.5, -0.5)
    axes.set_xlabel("Macro score, greedy (fraction solved)")
    axes.grid(axis="x", alpha=0.3)
    return _titled(figure, "Bar: 95 % interval over seeds and items. Dots: seeds.", axes)


def learning_curves(board: Leaderboard, methods: list[str]) -> Figure:
    """Score and exposure bias at each budget, from the cold start on, with their 95 % intervals."""
    figure = _figure(3.6)
    panels = list(figure.subplots(1, len(ALONG)).flat)
    start = board.cold_start.exposure
    for panel, (label, of) in zip(panels, ALONG.items(), strict=True):
        origin = [] if start is None else [of(CurvePoint(share=0.0, score=board.cold_start.score, exposure=start))]
        for method in sorted(board.methods, key=lambda method: methods.index(method.name)):
            points = [*origin, *map(of, method.curve)]
            budget_K = np.array([0.0] * len(origin) + [point.share for point in method.curve]) * board.budget.limit
            mean_K, low_K, high_K = np.array([(point.mean, point.low, point.high) if point else (None,) * 3 for point in points], float).T
            colour, marker = style(methods, method.name)
            panel.fill_between(budget_K, low_K, high_K, color=colour, alpha=0.12, linewidth=0)
            panel.plot(budget_K, mean_K, color=colour, marker=marker, markersize=5, label=method.name)
        panel.set_xlim(left=0)
        panel.set_ylabel(label, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    figure.supxlabel(f"Budget ({board.budget.axis}, charged)", fontsize=10)
    return _titled(
        figure, "Each point ends a run of its own budget, cooldown included. Band: 95 % interval over seeds and items.", panels[0]
    )


def effects(board: Leaderboard) -> Figure:
    """Every contrast with its 95 % interval, a panel per measure; filled where it is claimed."""
    names = list(dict.fromkeys(contrast.name for contrast in board.contrasts))
    figure = _figure(1.2 + 0.4 * len(names))
    panels = list(figure.subplots(1, len(MEASURES), sharey=True).flat)
    for panel, (family, label) in zip(panels, MEASURES.items(), strict=True):
        for contrast in board.contrasts:
            if contrast.family == family:
                value = Estimate(mean=contrast.difference, low=contrast.low, high=contrast.high)
                face = COLOURS[0] if contrast.claimed else "white"
                panel.errorbar(
                    np.array([value.mean], float),
                    [names.index(contrast.name)],
                    xerr=_reach(value),
                    fmt="o",
                    color=COLOURS[0],
                    mfc=face,
                    capsize=4,
                )
        panel.axvline(0, color=GREY, linewidth=1.2, zorder=0)
        panel.set_xlabel(label, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return _titled(figure, "Bar: 95 % interval over seeds and items. Filled: claimed.", panels[0])


def score_by_steps(run: Run, arms: list[ArmRecord], methods: list[str]) -> Figure:
    """Greedy score against the number of steps a problem needs, a panel per task; tasks that do not say are left out."""
    tasks = [task for task in run.weights if np.isfinite(run.steps[task]).all()]
    figure, panels = _panels(len(tasks))
    for panel, task in zip(panels, tasks, strict=False):
        steps_N = run.steps[task]
        levels = np.unique(steps_N)

        def means(scores_SN: np.ndarray, steps_N: np.ndarray = steps_N, levels: np.ndarray = levels) -> np.ndarray:
            return np.stack([scores_SN[:, steps_N == level].mean(axis=1) for level in levels])

        for name in methods:
            score_LS = means(np.stack([arm.greedy[task] for arm in arms if arm.method == name]))
            colour, marker = style(methods, name)
            panel.fill_between(levels, score_LS.min(axis=1), score_LS.max(axis=1), color=colour, alpha=0.15, linewidth=0)
            panel.plot(levels, score_LS.mean(axis=1), color=colour, marker=marker, markersize=5, label=name)
        panel.plot(levels, means(run.teacher[task][None]).mean(axis=1), "--", color=GREY, linewidth=1.2, label="teacher")
        starts_SN = np.stack([scores[task] for scores in run.cold_starts])
        panel.plot(levels, means(starts_SN).mean(axis=1), ":", color=GREY, linewidth=1.2, label="cold start")
        panel.set_title(task.removeprefix("opd_bench_"), fontsize=10)
        panel.set_xticks(levels)
        panel.set_ylim(-0.02, 1.02)
        panel.grid(alpha=0.3)
    figure.supxlabel("Steps the problem needs", fontsize=10)
    figure.supylabel("Greedy score (fraction solved)", fontsize=10)
    return _titled(figure, "Band: lowest to highest seed.", panels[0])


def divergence_by_position(arms: list[ArmRecord], methods: list[str]) -> Figure:
    """Mean divergence of the living rollouts at each response position, on own and on teacher prefixes, a panel per method."""
    names = [name for name in methods if any(arm.method == name for arm in arms)]
    figure, panels = _panels(len(names), sharex=True)
    for panel, name in zip(panels, names, strict=False):
        group = [arm.recording for arm in arms if arm.method == name]
        _divergence_panel(panel, [of.along["forward_kl"] for of in group], style(methods, name)[0])
        _entropy_line(panel, [of.along["teacher_entropy"] for of in group if "teacher_entropy" in of.along])
        panel.set_title(name, fontsize=10)
    figure.supxlabel("Response position (tokens)", fontsize=10)
    figure.supylabel("KL(teacher ‖ student), mean of living rollouts (nats)", fontsize=10)
    return _titled(figure, "Band: lowest to highest seed. Faint, right axis: share of rollouts alive.", panels[0])


def _divergence_panel(panel: Axes, records: list[exposure.Divergences], colour: str) -> None:
    found = [exposure.curves(record, "drop") for record in records]
    right = panel.twinx()
    right.set_ylim(0, 1.02)
    right.tick_params(colors=GREY, labelsize=8)
    for side, line, tint in (("student", "-", colour), ("teacher", "--", "black")):
        width = min(len(getattr(curves, f"{side}_T")) for curves in found)
        divergence_ST = np.stack([getattr(curves, f"{side}_T")[:width] for curves in found])
        alive_ST = np.stack([getattr(curves, f"{side}_alive_T")[:width] for curves in found]) / len(records[0])
        shown = int((alive_ST >= FEWEST_ALIVE).all(axis=0).sum())  # the living only ever become fewer
        position_T, divergence_ST = np.arange(1, width + 1), divergence_ST[:, :shown]
        panel.fill_between(position_T[:shown], divergence_ST.min(axis=0), divergence_ST.max(axis=0), color=tint, alpha=0.15, linewidth=0)
        panel.plot(position_T[:shown], divergence_ST.mean(axis=0), line, color=tint, linewidth=1.5, label=PREFIXES[side])
        right.plot(position_T, alive_ST.mean(axis=0), line, color=tint, alpha=0.3, linewidth=1)
    panel.set_ylim(bottom=0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)


def _entropy_line(panel: Axes, records: list[exposure.Divergences]) -> None:
    """The teacher's own uncertainty on the student's prefixes: where it is large, so may a divergence be without any bias."""
    if records:
        entropy_ST = [exposure.curves(record, "drop").student_T for record in records]
        alive_ST = [exposure.curves(record, "drop").student_alive_T / len(record) for record in records]
        shown = min(int((alive_T >= FEWEST_ALIVE).sum()) for alive_T in alive_ST)
        mean_T = np.mean([entropy_T[:shown] for entropy_T in entropy_ST], axis=0)
        panel.plot(np.arange(1, shown + 1), mean_T, ":", color=GREY, linewidth=1.2, label="teacher's entropy, own prefixes")


def draw_exposure(found: Suite, names: list[str], folder: Path) -> list[Path]:
    """Write the figures of the exposure-bias suite into ``folder``; ``names`` is the order of the colours, the cold start is grey."""
    figures = {"exposure_by_length.png": exposure_by_length(found, names)}
    if any(of.contrast for of in found.students.values()):
        figures["prefix_contrast.png"] = prefix_contrast(found, names)
        figures["recovery.png"] = recovery(found, names)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150, metadata={"Software": None})
    return [folder / name for name in figures]


def draw_judges(judges: Mapping[str, Sequence[Judged]], methods: list[str], folder: Path) -> Path:
    """Write the figure of what became of reward and truth into ``folder``; ``methods`` is the order of the colours."""
    reward_and_accuracy(judges, methods).savefig(folder / JUDGE_FIGURE, dpi=150, metadata={"Software": None})
    return folder / JUDGE_FIGURE


def reward_and_accuracy(judges: Mapping[str, Sequence[Judged]], methods: list[str]) -> Figure:
    """The mean verdict on the rollouts of training and their verified accuracy, by what was spent, a panel per method."""
    figure, panels = _panels(len(judges))
    middle_P = (np.arange(PARTS) + 0.5) / PARTS
    for panel, (name, arms) in zip(panels, judges.items(), strict=False):
        for label, line, column, tint in (
            ("mean verdict (reward)", "--", "reward_K", GREY),
            ("verified accuracy", "-", "accuracy_K", style(methods, name)[0]),
        ):
            mean_SP = np.stack([_by_part(arm.share_K, getattr(arm, column)) for arm in arms])
            known_P = np.isfinite(mean_SP).all(axis=0)
            shown_SP = mean_SP[:, known_P]
            panel.fill_between(middle_P[known_P], shown_SP.min(axis=0), shown_SP.max(axis=0), color=tint, alpha=0.15, linewidth=0)
            panel.plot(middle_P[known_P], shown_SP.mean(axis=0), line, color=tint, linewidth=1.5, label=label)
        panel.set_title(name, fontsize=10)
        panel.set_ylim(-0.02, 1.02)
        panel.grid(alpha=0.3)
    figure.supxlabel("Share of the budget spent", fontsize=10)
    figure.supylabel("Of the rollouts of training", fontsize=10)
    return _titled(figure, "Band: lowest to highest seed.", panels[0])


def _by_part(share_K: np.ndarray, values_K: np.ndarray) -> np.ndarray:
    """Means over PARTS equal parts of the budget; NaN where a part has none."""
    known_K = np.isfinite(values_K)
    part_K = np.minimum((share_K[known_K] * PARTS).astype(int), PARTS - 1)
    count_P, sum_P = np.bincount(part_K, minlength=PARTS), np.bincount(part_K, values_K[known_K], minlength=PARTS)
    return np.divide(sum_P, count_P, out=np.full(PARTS, np.nan), where=count_P > 0)


def exposure_by_length(found: Suite, names: list[str]) -> Figure:
    """R − l·ε and ExAccErr up to each length, with bands."""
    figure = _figure(3.8)
    panels = list(figure.subplots(1, 2).flat)
    for name, student in found.students.items():
        colour, _ = style(names, name)
        for panel, column in zip(panels, ("excess", "exaccerr"), strict=True):
            band = student.by_length[column]
            length_T = np.arange(1, len(band.mean_T) + 1)
            panel.fill_between(length_T, band.low_T, band.high_T, color=colour, alpha=0.12, linewidth=0)
            panel.plot(length_T, band.mean_T, color=colour, linewidth=1.5, label=name)
    late = [getattr(of.by_length["exaccerr"], end)[SETTLED:] for of in found.students.values() for end in ("low_T", "high_T")]
    reached = [float(value) for values_T in late for value in values_T if np.isfinite(value)]
    if reached:  # the first lengths divide by next to nothing
        room = 0.1 * (max(0.0, *reached) - min(0.0, *reached))
        panels[1].set_ylim(min(0.0, *reached) - room, max(0.0, *reached) + room)
    for panel, label in zip(panels, ("R − l·ε (nats)", "ExAccErr (%)"), strict=True):
        panel.axhline(0, color=GREY, linewidth=0.8)
        panel.set_ylabel(label, fontsize=9)
        panel.grid(alpha=0.3)
    figure.supxlabel("Length l (tokens of the response)", fontsize=10)
    return _titled(figure, "KL(teacher ‖ student) summed up to length l. Band: 95 % interval over prompts and seeds.", panels[0])


def prefix_contrast(found: Suite, names: list[str]) -> Figure:
    """Solve rate from the teacher's prefix minus that from the student's own, by share of the solution that was given."""
    title = "Greedy, where both prefixes were still right. Bar: 95 % interval over prompts and seeds."
    return _grouped(
        found, names, "contrast", "difference", "Share of the solution given", "From the teacher's − from its own\n(solve rate)", title
    )


def recovery(found: Suite, names: list[str]) -> Figure:
    """Solve rates of the students against the number of wrong tokens in a right prefix, and after a wrong result, with the teacher's."""
    title = "Greedy, from the same prefix of the teacher. Bar: 95 % interval over prompts and seeds."
    figure = _grouped(found, names, "recovery", "a", "Wrong at the end of the prefix", "Solve rate", title, ("token", "tokens"))
    axes = figure.axes[0]
    places = [label.get_text() for label in axes.get_xticklabels()]
    teacher = next(iter(found.students.values())).recovery
    rate = [pair.b.mean if (pair := teacher.get(place)) else np.nan for place in places]
    axes.plot(range(len(places)), rate, "_", color=GREY, markersize=60, markeredgewidth=2, zorder=0)
    axes.set_ylim(0, 1.02)
    if places:
        axes.annotate("teacher", (0, rate[0]), (0, -12), textcoords="offset points", ha="center", fontsize=8, color=GREY)
    return figure


def _grouped(
    found: Suite, names: list[str], what: str, column: str, along: str, across: str, title: str, joins: tuple[str, ...] = ()
) -> Figure:
    """One value per student and place, side by side with its interval; a line joins the places whose names end as ``joins`` says."""
    figure = _figure(3.6)
    axes = figure.subplots()
    pairs = {name: getattr(of, what) for name, of in found.students.items()}
    places = list(dict.fromkeys(place for of in pairs.values() for place, pair in of.items() if pair))
    for offset, name in zip(np.linspace(-0.25, 0.25, len(pairs)) if len(pairs) > 1 else [0.0], pairs, strict=True):
        colour, marker = style(names, name)
        shown = {place: getattr(pair, column) for place in places if (pair := pairs[name].get(place))}
        at = {place: places.index(place) + offset for place in shown}
        for place, value in shown.items():
            label = name if place == places[0] else None
            axes.errorbar([at[place]], [value.mean], yerr=_reach(value), fmt=marker, color=colour, capsize=3, label=label)
        joined = [place for place in shown if place.endswith(joins)]
        axes.plot([at[place] for place in joined], [shown[place].mean for place in joined], color=colour, linewidth=1, alpha=0.6)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(range(len(places)), places)
    axes.set_xlabel(along)
    axes.set_ylabel(across)
    axes.grid(axis="y", alpha=0.3)
    return _titled(figure, title, axes)


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _reach(value: Estimate | Interval) -> list[list[float]] | None:
    """How far the interval reaches below and above the mean."""
    if value.mean is None or value.low is None or value.high is None:
        return None
    return [[value.mean - value.low], [value.high - value.mean]]


def _references(axes: Axes, board: Leaderboard, line: Callable[..., object]) -> None:
    """The teacher's and the cold start's scores as lines across the figure."""
    for name, reference, dashes in (("teacher", board.teacher, "--"), ("cold start", board.cold_start, ":")):
        if reference.score.mean is not None:
            line(reference.score.mean, color=GREY, linestyle=dashes, linewidth=1.2, label=name, zorder=0)


def _panels(count: int, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with two panels to a row, or one alone, and those of its panels that are used."""
    columns = 1 if count < 2 else 2
    rows = max(1, -(-count // columns))
    figure = _figure(0.9 + 2.3 * rows)
    panels = list(figure.subplots(rows, columns, sharex=sharex, sharey=True, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels


def _titled(figure: Figure, title: str, labelled: Axes) -> Figure:
    """``figure`` with the legend of ``labelled`` above it, under a small grey title."""
    handles, labels = labelled.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False, fontsize=9, title=title, title_fontsize=9)
    legend.get_title().set_color(GREY)
    return figure

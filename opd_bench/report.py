"""A leaderboard for reading: tables and sentences in the terminal and as ``leaderboard.md``.

    show(board)                         # to the terminal
    (folder / "leaderboard.md").write_text(markdown(board), encoding="utf-8")

Both print the same cells. Scores are fractions, divergences nats, brackets 95 % intervals; "–" is undefined or not measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opd_bench.judge_audit import Audit
from opd_bench.leaderboard import Claim, Contrast, Crossing, Estimate, Gate, Leaderboard, Method, Reference
from opd_bench.ledger import STUDENT_TOKENS, TEACHER_TOKENS
from opd_bench.statistics import Interval

NONE = "–"
SCORE_COLUMNS = ["rank", "method", "score", "sampled", "STEM", "coding", "budget", "wall"]
EXPOSURE_COLUMNS = ["method", "R", "l·ε", "R − l·ε", "ExAccErr", "allowed to see"]
SCORE_TITLE = "Score (greedy macro; higher is better)"
EXPOSURE_TITLE = "Exposure bias (nats; R − l·ε: added by own prefixes, lower is better)"
BESIDE_TITLE = "Beside the score (tasks that count for none; general text that the cold start wrote, per token)"
KEPT_COLUMNS = ["KL from the start, nats", "gain in its answers' log-likelihood, nats"]
SPENT_TITLE = "Spent"
SPENT_COLUMNS = ["method", "FLOPs", "student tokens", "teacher tokens", "seconds"]
CONTRAST_TITLE = "Contrasts (sums of methods, declared beforehand; R − l·ε: lower is better)"
CONTRAST_COLUMNS = ["contrast", "is", "score", "sampled", "R − l·ε"]
CURVE_TITLE = "Learning curves"
READING_TITLE = "By other ledgers"
READING_COLUMNS = ["ledger", "what it asks", "at", "methods, best first", "turned around"]
JUDGE_TITLE = "Judges"
JUDGE_FIGURE = "reward_and_accuracy.png"  # drawn where there is a judge
JUDGE_COLUMNS = ["method", "agreement", "AUROC", "length bias", "position bias", "unreadable", "cost of a verdict", "reward and truth"]
JUDGE_NOTE = (
    "On the arm's own sampled answers. Length bias: Spearman's correlation of verdict and length among answers that are equally right. "
    f"Position bias: mean change of a verdict when the options change places; {NONE} where the question names none. More in judge.md."
)
UNITS = {"flops": "FLOPs", "seconds": "s"}
FIGURES = {  # written by opd_bench.plots
    "score_by_method.png": "Score by method",
    "learning_curves.png": "Score and exposure bias against the budget",
    "score_by_steps.png": "Score against the number of steps",
    "divergence_by_position.png": "Divergence by position",
}
EFFECTS = {"effects.png": "Contrasts with their intervals"}  # where there are contrasts
NUMBERS = {*SCORE_COLUMNS, *EXPOSURE_COLUMNS, *SPENT_COLUMNS, *KEPT_COLUMNS} - {"method", "allowed to see"}
REFERENCES = ("teacher", "cold start")


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """``value`` without the leading zero, with a true minus: .034, −1.20, +.034."""
    if value is None:
        return NONE
    text = f"{abs(value):.{digits}f}"
    negative = value < 0 and float(text) != 0
    return ("−" if negative else "+" if sign else "") + (text[1:] if text.startswith("0.") else text)


def estimate(value: Estimate | Interval | None, digits: int = 3, unit: str = "") -> str:
    """``.705 [.68, .73]``; the mean alone where the interval is undefined."""
    if value is None or value.mean is None:
        return NONE
    mean = number(value.mean, digits) + unit
    return mean if value.low is None and value.high is None else f"{mean} [{number(value.low, digits)}, {number(value.high, digits)}]"


def percent(value: Estimate | Interval | None) -> str:
    """``40 % [33, 47]``; the mean alone where the interval is undefined."""
    if value is None or value.mean is None:
        return NONE
    low, high = (number(None if bound is None else 100 * bound, 0) for bound in (value.low, value.high))
    return f"{number(100 * value.mean, 0)} %" + ("" if NONE in (low, high) else f" [{low}, {high}]")


def wall_time(seconds: float) -> str:
    """``42s``, ``3m05s`` or ``2h10m``."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest}s"
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def difference(tested: Claim | Contrast) -> str:
    """``+.034 [.010, .058], p_holm .047``, with the difference from each cold start where there are several."""
    digits, unit = (2, " nats") if tested.family == "excess" else (3, "")
    interval = f" [{number(tested.low, digits)}, {number(tested.high, digits)}]" if tested.low is not None else " (no interval)"
    p = "p_holm <.001" if tested.p_holm < 0.0005 else f"p_holm {number(tested.p_holm)}"
    if len(tested.by_start) > 1:
        p += f" (by cold start {', '.join(number(value, digits, sign=True) for value in tested.by_start)})"
    return f"{number(tested.difference, digits, sign=True)}{unit}{interval}, {p}"


def sentence(claim: Claim) -> str:
    """The claim in words: ``opd > sft by +.034 [.010, .058], p_holm .047: claimed``."""
    what, better = ("R − l·ε: ", "<") if claim.family == "excess" else ("", ">")
    if claim.claimed:
        return f"{what}{claim.a} {better} {claim.b} by {difference(claim)}: claimed"
    return f"not claimed: {what}{claim.a} vs {claim.b} {difference(claim)}"


def sentences(board: Leaderboard) -> list[str]:
    """All claims in words, the claimed ones first."""
    return [sentence(claim) for claim in sorted(board.claims, key=lambda claim: (not claim.claimed, claim.family != "score"))]


def formula(weights: dict[str, float]) -> str:
    """``½ opd + ½ rlaif − sft``: the methods of a contrast with their weights."""

    def term(method: str, weight: float) -> str:
        size = {1.0: "", 0.5: "½ "}.get(abs(weight), f"{number(abs(weight))} ")
        return f"{'−' if weight < 0 else '+'} {size}{method}"

    return " ".join(term(method, weight) for method, weight in weights.items()).removeprefix("+ ")


def contrast_rows(board: Leaderboard) -> list[list[str]]:
    """The cells of CONTRAST_COLUMNS, a row for each contrast."""
    withheld = {name for gate in board.gates if gate.held is False for name in gate.methods}

    def verdict(contrast: Contrast) -> str:
        return "claimed" if contrast.claimed else "withheld" if withheld & contrast.weights.keys() else "not claimed"

    rows: dict[str, list[str]] = {}
    for contrast in board.contrasts:  # family by family, each in the same order
        row = rows.setdefault(contrast.name, [contrast.name, formula(contrast.weights)])
        row.append(f"{difference(contrast)}: {verdict(contrast)}")
    return list(rows.values())


def gate_lines(board: Leaderboard) -> list[str]:
    """Every gate in words, the failed ones first."""
    state = {True: "held", False: "FAILED", None: "not checked"}

    def line(gate: Gate) -> str:
        kept_from = "" if gate.held is not False else f" Withheld: rank and claims of {', '.join(gate.methods)}."
        return f"{gate.name} {state[gate.held]}: {gate.said}{kept_from}"

    return [line(gate) for gate in sorted(board.gates, key=lambda gate: gate.held is not False)]


def reading_rows(board: Leaderboard) -> list[list[str]]:
    """The cells of READING_COLUMNS, a row for each ledger."""
    return [
        [
            reading.ledger,
            reading.question,
            NONE if reading.cost is None else f"{reading.cost:.3g} {UNITS[reading.unit]}",
            ", ".join(f"{name} {number(reading.score[name])}" for name in reading.order) or NONE,
            "; ".join(f"{ahead} falls behind {behind}" for ahead, behind in reading.turned) or "none",
        ]
        for reading in board.readings
    ]


def spent_rows(board: Leaderboard) -> list[list[str]]:
    """The cells of SPENT_COLUMNS: what an arm spent on every axis, whichever bound."""

    def row(method: Method) -> list[str]:
        spent = method.spent
        student, teacher = (sum(spent.tokens.get(kind, 0) for kind in kinds) for kinds in (STUDENT_TOKENS, TEACHER_TOKENS))
        return [method.name, f"{sum(spent.flops.values()):.3g}", f"{student:,}", f"{teacher:,}", f"{sum(spent.seconds.values()):.1f}"]

    return list(map(row, board.methods))


def curve_columns(board: Leaderboard) -> list[str]:
    return ["method", *(f"at {point.share:.0%} of the budget" for point in board.methods[0].curve), "recovered"]


def curve_rows(board: Leaderboard) -> list[list[str]]:
    """Score at each budget, and the share of the gap from cold start to teacher that the whole budget recovered."""
    return [[method.name, *(estimate(point.score) for point in method.curve), percent(method.recovered)] for method in board.methods]


def crossing_lines(board: Leaderboard) -> list[str]:
    """Every pair in words: who overtakes whom at which budget, or who is ahead at all of them."""

    def line(crossing: Crossing) -> str:
        if crossing.a_ahead is None:
            return f"{crossing.a} and {crossing.b} end level"
        ahead, behind = (crossing.a, crossing.b) if crossing.a_ahead else (crossing.b, crossing.a)
        if crossing.budget is None:
            return f"{ahead} is ahead of {behind} at every budget" + (f", clearly from {crossing.high:.3g} on" if crossing.high else "")
        low, high = crossing.low, crossing.high
        bounds = f"{'below the least' if low is None else f'{low:.3g}'}, {'above the whole' if high is None else f'{high:.3g}'}"
        return f"{ahead} overtakes {behind} at {crossing.budget:.3g} {board.budget.axis} [{bounds}]"

    return list(map(line, board.crossings))


def time_rows(board: Leaderboard) -> list[list[str]]:
    """Of each method and task, the shares of the budget at which the median seed reaches the targets."""
    if board.profile is None:
        return []

    def share(time: float | None) -> str:
        return NONE if time is None else f"{time / board.budget.limit:.0%}"

    return [[name, *(", ".join(map(share, times)) for times in tasks.values())] for name, tasks in board.profile.times.items()]


def profile_rows(board: Leaderboard) -> list[list[str]]:
    profile = board.profile
    return [] if profile is None else [[name, *(number(share, 2) for share in solved)] for name, solved in profile.solved.items()]


def heading(board: Leaderboard) -> list[str]:
    """What was run, one fact a line: tier, tasks, seeds, budget, commit."""
    limit = f"{board.budget.limit:.3g}"
    return [
        f"Tier: {board.tier}",
        *(f"{role.capitalize()}: {', '.join(names)}" for role, names in board.models.items()),
        f"STEM tasks: {', '.join(board.tasks.stem) or NONE}; coding tasks: {', '.join(board.tasks.coding) or NONE}",
        f"Seeds: {', '.join(map(str, board.seeds))}",
        f"Budget: {limit} {board.budget.axis} per arm",
        f"Commit: {board.commit}",
    ]


def score_rows(board: Leaderboard) -> list[list[str]]:
    """The cells of SCORE_COLUMNS: teacher, methods by rank, cold start."""

    def row(name: str, of: Reference) -> list[str]:
        cells = [name, estimate(of.score), estimate(of.sampled), estimate(of.stem), estimate(of.coding)]
        if not isinstance(of, Method):
            return ["", *cells, "", ""]
        rank = NONE if of.rank is None else str(of.rank)
        return [rank, *cells, f"{100 * of.spent.share:.1f} %", wall_time(of.wall_s)]

    return [row("teacher", board.teacher), *(row(method.name, method) for method in board.methods), row("cold start", board.cold_start)]


def exposure_rows(board: Leaderboard) -> list[list[str]]:
    """The cells of EXPOSURE_COLUMNS: methods by rank, cold start."""

    def row(name: str, of: Reference, saw: str) -> list[str]:
        gap = of.exposure
        if gap is None:
            return [name, NONE, NONE, NONE, NONE, saw]
        nats = [estimate(value, 2) for value in (gap.regret, gap.per_step, gap.excess)]
        return [name, *nats, estimate(gap.exaccerr, 0, " %"), saw]

    def saw(method: Method) -> str:
        skill = "" if method.judge_auroc is None else f" (AUROC {number(method.judge_auroc, 2)})"
        return ", ".join(method.saw).replace("judge", f"judge{skill}") or NONE

    methods = [row(method.name, method, saw(method)) for method in board.methods]
    return [*methods, row("cold start", board.cold_start, "")]


def beside_columns(board: Leaderboard) -> list[str]:
    """Nothing where there is nothing beside the score."""
    kept = any(method.retention for method in board.methods)
    tasks = [f"{task} ({group.replace('_', ' ')})" for task, group in board.tasks.beside.items()]
    return ["method", *tasks, *KEPT_COLUMNS * kept] if kept or tasks else []


def beside_rows(board: Leaderboard) -> list[list[str]]:
    """Scores of tasks that count for none, and what was worn away of what the cold start could do: teacher, methods by rank, cold start."""

    def row(name: str, of: Reference) -> list[str]:
        kept = [estimate(of.retention.kl), estimate(of.retention.gain)] if of.retention else [NONE, NONE]
        return [name, *(estimate(of.held_out[task]) for task in board.tasks.beside), *kept][: len(beside_columns(board))]

    return [row("teacher", board.teacher), *(row(method.name, method) for method in board.methods), row("cold start", board.cold_start)]


def figures(board: Leaderboard) -> dict[str, str]:
    """Captions of what opd_bench.plots draws, by file."""
    return {**FIGURES, **(EFFECTS if board.contrasts else {})}


def show(board: Leaderboard, console: Console | None = None) -> None:
    """Print the tables, the claims and the notes."""
    console = console or Console()
    console.print(escape("\n".join(heading(board))), highlight=False)
    for title, columns, rows in (
        (SCORE_TITLE, SCORE_COLUMNS, score_rows(board)),
        (EXPOSURE_TITLE, EXPOSURE_COLUMNS, exposure_rows(board)),
    ):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
        for column in columns:
            left = column in ("method", "allowed to see")
            table.add_column(column, justify="left" if left else "right", no_wrap=column in ("rank", "method"), overflow="fold")
        for row in rows:
            cells = [escape(cell.replace(" [", "\n[").replace(", ", ",") if "[" in cell else cell) for cell in row]
            table.add_row(*cells, style="dim" if row[columns.index("method")] in REFERENCES else None)
        console.print(table)
    for name, *cells in beside_rows(board) if beside_columns(board) else ():
        said = "; ".join(f"{what} {cell}" for what, cell in zip(beside_columns(board)[1:], cells, strict=True))
        console.print(escape(f"{name}: {said}"), highlight=False)
    for name, judge in ((method.name, method.judge) for method in board.methods):
        if judge:
            console.print(escape(f"judge of {name}: {judge.judge}. {judge.said}"), highlight=False)
    for line in gate_lines(board):
        console.print(escape(line), style="bold" if " FAILED: " in line else "dim", highlight=False)
    console.print()
    for name, *scores, recovered in curve_rows(board):
        console.print(escape(f"{name}: {' → '.join(scores)}; {recovered} of the gap to the teacher recovered"), highlight=False)
    console.print()
    for ledger, _, cost, order, turned in reading_rows(board)[1:]:
        console.print(escape(f"by the ledger {ledger!r}, at {cost}: {order}; turned around: {turned}"), highlight=False)
    console.print()
    for name, weights, *cells in contrast_rows(board):
        console.print(escape(f"{name} = {weights}"), highlight=False)
        for measure, cell in zip(CONTRAST_COLUMNS[2:], cells, strict=True):
            console.print(escape(f"  {measure} {cell}"), style="bold" if cell.endswith(": claimed") else None, highlight=False)
    for line in [*[""] * bool(board.contrasts), *sentences(board), "", *board.notes]:
        console.print(escape(line), style="bold" if line.endswith(": claimed") else None, highlight=False)


def markdown_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    sides = ["--:" if column in NUMBERS else ":--" for column in columns]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (columns, sides, *rows)]


def markdown(board: Leaderboard) -> str:
    """The whole leaderboard as Markdown that GitHub renders, with links to the figures beside it."""

    parts = [
        ["# Leaderboard"],
        ["```", board.command, "```"],
        [f"- {line}" for line in heading(board)],
        [f"## {SCORE_TITLE}"],
        markdown_table(SCORE_COLUMNS, score_rows(board)),
        [f"## {EXPOSURE_TITLE}"],
        markdown_table(EXPOSURE_COLUMNS, exposure_rows(board)),
        [
            "Brackets are 95 % intervals over seeds and items; budget is the share spent and wall the time per arm;",
            "R and l·ε are summed over positions; –: undefined, not measured or withheld.",
        ],
        *_beside(board),
        [f"## {SPENT_TITLE}"],
        markdown_table(SPENT_COLUMNS, spent_rows(board)),
        [f"Mean per arm; {board.budget.axis} bound. Seconds are of charged work, beside whatever ran at the same time."],
        *_judges(board),
        ["## Gates"],
        [f"- {line}" for line in gate_lines(board)],
        [f"## {CURVE_TITLE}"],
        markdown_table(curve_columns(board), curve_rows(board)),
        [
            "Each is a run of its own budget, cooldown included;",
            "recovered: (score − cold start) / (teacher − cold start) at the whole budget.",
        ],
        [f"- {line}" for line in crossing_lines(board)],
        *_profile(board),
        [f"## {READING_TITLE}"],
        markdown_table(READING_COLUMNS, reading_rows(board)),
        ["Each arm's score is read from its learning curve at the largest cost that all arms reached, linear between points; untested."],
        ["## Claims"],
        [f"- {line}" for line in sentences(board)] or ["There is one method, so there is nothing to compare."],
        *_contrasts(board),
        ["## Notes"],
        [f"- {note}" for note in board.notes],
        ["## Figures"],
        [f"![{caption}]({name})\n" for name, caption in figures(board).items()],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part).rstrip() + "\n"


def _beside(board: Leaderboard) -> list[list[str]]:
    columns = beside_columns(board)
    return [[f"## {BESIDE_TITLE}"], markdown_table(columns, beside_rows(board))] if columns else []


def _contrasts(board: Leaderboard) -> list[list[str]]:
    if not board.contrasts:
        return []
    said = "Each is tested like a claim, Holm's correction going over a column; one is withheld where a gate withholds one of its methods."
    return [[f"## {CONTRAST_TITLE}"], markdown_table(CONTRAST_COLUMNS, contrast_rows(board)), [said]]


def _judges(board: Leaderboard) -> list[list[str]]:
    found = {method.name: method.judge for method in board.methods if method.judge}
    return [[f"## {JUDGE_TITLE}"], markdown_table(JUDGE_COLUMNS, judge_rows(found)), [JUDGE_NOTE]] if found else []


def judge_rows(found: Mapping[str, Audit]) -> list[list[str]]:
    """The cells of JUDGE_COLUMNS, a row for each method with a judge."""

    def cost(audit: Audit) -> str:
        known = {"tokens": "{:.0f} tokens", "flops": "{:.3g} FLOPs", "dollars": "{:.2g} $", "seconds": "{:.2g} s"}
        return ", ".join(text.format(audit.cost[unit]) for unit, text in known.items() if audit.cost.get(unit)) or NONE

    def row(name: str, audit: Audit) -> list[str]:
        values = [estimate(value, 2) for value in (audit.agreement, audit.auroc, audit.length_bias, audit.shift)]
        unreadable = NONE if audit.unreadable is None else f"{100 * audit.unreadable:.1f} %"
        return [name, *values, unreadable, cost(audit), audit.said]

    return [row(name, audit) for name, audit in found.items()]


def _profile(board: Leaderboard) -> list[list[str]]:
    if board.profile is None:
        return []
    targets = [f"{task} {', '.join(number(score) for score in scores)}" for task, scores in board.profile.targets.items()]
    return [
        ["Share of the budget at which the median seed first reaches three scores on the way from the cold start to the teacher:"],
        markdown_table(["method", *targets], time_rows(board)),
        [f"Share of {sum(map(len, board.profile.targets.values()))} targets reached within τ times the least budget of any method:"],
        markdown_table(["method", *(f"τ = {tau:g}" for tau in board.profile.tau)], profile_rows(board)),
    ]

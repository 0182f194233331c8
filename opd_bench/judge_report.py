"""The audit of the judges of a comparison, for reading and for programs: ``judge.md`` and ``judge.json``.

(out / "judge.md").write_text(markdown(audits))
(out / "judge.json").write_text(to_json(audits, judges))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from opd_bench.judge_audit import Audit, Judged
from opd_bench.report import JUDGE_COLUMNS, JUDGE_FIGURE, JUDGE_NOTE, estimate, judge_rows, markdown_table


def to_json(audits: Mapping[str, Audit], judges: Mapping[str, Sequence[Judged]]) -> str:
    """Audits by method, and step by step, for each seed, the mean verdict and the verified accuracy of the same rollouts."""

    def finite(values_K: np.ndarray) -> list[float | None]:
        return [float(value) if np.isfinite(value) else None for value in values_K]

    def along(judged: Judged) -> dict[str, list[float | None]]:
        return {"share": finite(judged.share_K), "verdict": finite(judged.reward_K), "verified": finite(judged.accuracy_K)}

    document = {
        "schema": "opd-bench/judge/1",
        "judges": {name: audit.model_dump(mode="json") for name, audit in audits.items()},
        "along": {name: [along(judged) for judged in of] for name, of in judges.items()},
    }
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def markdown(audits: Mapping[str, Audit]) -> str:
    """The table of the leaderboard, what each judge is, and what became of reward and truth."""
    parts = [["# Judges"], markdown_table(JUDGE_COLUMNS, judge_rows(audits)), [JUDGE_NOTE]]
    for name, audit in audits.items():
        lines = [f"- The judge: {audit.judge}.", f"- {audit.said}"]
        if audit.length_bias and audit.length_bias.low is not None and audit.length_bias.high is not None:
            low, high = audit.length_bias.low, audit.length_bias.high
            found = "prefers longer" if low > 0 else "prefers shorter" if high < 0 else "does not clearly prefer longer or shorter"
            lines.append(f"- Among equally right answers it {found} ones: {estimate(audit.length_bias, 2)}.")
        if audit.signed_shift is None:
            lines.append("- Its question names no options that could change places, so there is no position bias to measure.")
        else:
            moved, signed = estimate(audit.shift, 3), estimate(audit.signed_shift, 3)
            lines.append(f"- With its options in the other order a verdict moves by {moved}; on average, sign included, by {signed}.")
        parts += [[f"## {name}"], lines]
    parts += [[f"![Reward and verified accuracy over training]({JUDGE_FIGURE})"]]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"

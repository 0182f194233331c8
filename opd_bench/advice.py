"""One sentence on a profile: the part that takes most of a step, why, and the setting that moves it; by stated rules, from the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd_bench.rollouts import ROWS

BUSY = 0.5  # of the peak: the products themselves take the time
FEW = 512  # tokens at once, below which products are small for what surrounds them
FASTER = 1.2  # times as fast matrix products on all cores: more threads are worth a try
NARROWER = 2.0  # times as fast products in bfloat16: on the embedded models, at 1.6, all the rest that decoding does made it slower


@dataclass(frozen=True)
class Row:
    """A part of the mean step. Seconds exclude those of other parts.

    Bytes are the most there were, and the most that came on top of a call's start; in the warm-up step, too: what it takes is often kept.
    """

    part: str
    seconds: float
    share: float
    calls: float
    tokens: float | None = None
    flops: float | None = None
    peak_bytes: int | None = None
    growth_bytes: int | None = None
    peak_flops_per_s: float | None = None  # of a large matrix product in the part's precision

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def flops_per_s(self) -> float | None:
        return self.flops / self.seconds if self.flops and self.seconds else None

    @property
    def share_of_peak(self) -> float | None:
        return self.flops_per_s / self.peak_flops_per_s if self.flops_per_s and self.peak_flops_per_s else None


@dataclass(frozen=True)
class Setup:
    """What the sentence goes by: the settings that could be moved, and what a step was like. Lengths are means in tokens."""

    batch: int  # sequences of a step
    update_tokens: float  # of a step, prompts included
    response: float
    max_response: int
    check: float  # what the judge wrote on a response
    max_check: int
    on_policy: bool
    threads: int
    cores: int
    all_cores: float  # times as fast a matrix product on all cores as on the threads
    bfloat16: float  # times as fast a product of decoding's shape in it as in the precision that writes rollouts
    checkpointing: bool
    vocabulary: int
    rollouts_by: str
    scoring_by: str
    scoring_top: int
    options: tuple[str, ...]  # of the method


def bottleneck(rows: Sequence[Row], setup: Setup) -> str:
    """One sentence: the part that takes most of a step, and the setting that moves it.

    A part at BUSY of the peak or more is bound by its products, one below it by what surrounds them: memory, element-wise passes, calls. A
    limit on lengths is named only where the mean is above half of it, threads only where all cores are FASTER at products,
    bfloat16 only where they are NARROWER times as fast in it.
    """
    seconds: dict[str, float] = {}
    for row in rows:
        seconds[group(row.part)] = seconds.get(group(row.part), 0.0) + row.seconds
    part = max(seconds, key=lambda name: seconds[name])
    total = sum(seconds.values())
    reached = sum(row.share_of_peak * row.seconds for row in rows if group(row.part) == part and row.share_of_peak) / seconds[part]
    at = f" at {percent(reached)} of the peak" if reached else ""
    return f"{part} takes {seconds[part] / total:.0%} of a step{at}: {_knob(part, reached >= BUSY, setup)}"


def _knob(part: str, busy: bool, setup: Setup) -> str:
    """Why, and what to do, for the part that takes most of a step."""
    batch = f"raise the method's batch, now {setup.batch}"
    threads = f"raise threads, now {setup.threads} on {setup.cores} cores" if setup.all_cores >= FASTER else ""
    student, teacher = (threads or f"take a smaller model ({role}) or a faster machine" for role in ("students", "teacher"))
    length = f"lower max_response, now {setup.max_response}" if setup.response > setup.max_response / 2 else ""
    match part:
        case "weight sync":
            return f"the weights are handed to the sampler once, however many rollouts follow; {batch}"
        case "optimiser":
            return f"it goes over all weights once, however many sequences a step has; {batch}"
        case "harness":
            return f"it is about the same for a step of any size; {batch}"
        case "decode" | "generate" if not busy and setup.batch < ROWS:
            return f"at most {setup.batch} rows share a pass over the weights, where {ROWS} may; {batch}"
        case "prefill" | "decode" | "generate" if setup.bfloat16 >= NARROWER and setup.rollouts_by != "server":
            return f"products in bfloat16 are {setup.bfloat16:.1f} times as fast here; set rollouts.dtype: bfloat16"
        case "prefill":
            return f"prompts are long for what is written after them; choose tasks with shorter prompts, or {student}"
        case "decode" if not busy and setup.rollouts_by == "model":
            return f"{ROWS} rows share a pass over the weights, the most that our sampler takes; set rollouts.by: vllm"
        case "decode" | "generate":
            return f"every token is a pass through the student; {length or student}"
        case "teacher text":
            again = "raise the method's epochs, each of which takes the same text again" if "epochs" in setup.options else ""
            return f"the teacher writes every text; {again or length or teacher}"
        case "judge" if setup.check > setup.max_check / 2:
            return f"it writes {setup.check:.0f} tokens on a response; lower judge.max_check, now {setup.max_check}"
        case "judge" if not busy and setup.batch < ROWS:
            return f"at most {setup.batch} of its checks are decoded together, where {ROWS} may be; {batch}"
        case "judge":
            return f"it reads every response and writes {setup.check:.0f} tokens on it; {teacher}"
        case "teacher" if setup.scoring_by == "server":
            return f"the server is waited for; give it a faster machine or lower scoring.top, now {setup.scoring_top}"
        case "teacher" if not setup.on_policy and setup.scoring_by == "model":
            return "the teacher's own text is scored anew at every pass; set scoring.by: cache"
        case "teacher":
            return f"it scores every token of a step; {threads or 'have another machine do it, scoring.by: server'}"
        case "backward" if setup.checkpointing:
            return "it computes every layer again; leave out gradient_checkpointing where memory allows"
        case "forward" | "backward" if not busy and setup.update_tokens < FEW:
            return f"a step has {setup.update_tokens:.0f} tokens, and products of fewer than {FEW} are small; {batch}"
        case "forward" | "backward":
            return f"every token of a step passes the student; {student}"
        case "loss":
            return f"head and loss go over {setup.vocabulary} tokens at every position; {threads or length or 'take a faster machine'}"
    return f"it is none of the parts known here; {student}"


def group(part: str) -> str:
    """Whose part it is: "judge" of "judge, decode"."""
    return part.split(", ")[0]


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"

"""What training wears away: how a student takes general prompts and answers that its own start wrote.

    texts = written(start, tokenizer, count=32, max_response=96, kept=folder / "retention.pt")
    found = measure(student, start, texts)
    found["kl"].mean()  # nats per token from the start to the student; 0 for the start itself

No data set is needed: shown its chat template up to where a user's message begins, a chat model writes such a message, and then answers it
(Xu et al. 2024, arXiv 2406.08464). Both are sampled at temperature 1. Nothing of it is ever trained on.

Shapes: N texts, M response tokens of them all, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_bench import store
from opd_bench.errors import UserError
from opd_bench.losses import kl
from opd_bench.models import chat_text, eos_id
from opd_bench.rollouts import sample
from opd_bench.scoring import chunks, micro_batches, output_head, response_hidden
from opd_bench.sequences import Prompts, Sequences

SEED = 20_260
MESSAGE = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the user's message in the template
MICRO_TOKENS = 2048


def written(start: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int, max_response: int, kept: Path) -> Sequences:
    """``count`` messages with answers by ``start``, both of at most ``max_response`` tokens; kept in the file ``kept``."""
    if (found := store.load_sequences(kept)) is None:
        found = _write(start, tokenizer, count, max_response), 0.0
        store.save_sequences(kept, *found)
    return found[0]


def _write(start: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, max_response: int) -> Sequences:
    generator, eos = torch.Generator().manual_seed(SEED), eos_id(tokenizer)
    before, *after = chat_text(tokenizer, MESSAGE).split(MESSAGE)
    if not after:
        raise UserError("the chat template changes a user's message, so retention cannot be measured; set retention.prompts to 0")
    opening = list(tokenizer(before, add_special_tokens=False).input_ids)
    asked = sample(start, Prompts([opening] * count, [""] * count), max_response=max_response, eos=eos, generator=generator)
    messages = [str(tokenizer.decode(asked.response(row), skip_special_tokens=True)).strip() for row in range(count)]
    ids = tokenizer([chat_text(tokenizer, message) for message in messages], add_special_tokens=False).input_ids
    return sample(start, Prompts(list(map(list, ids)), [""] * count), max_response=max_response, eos=eos, generator=generator)


@torch.no_grad()
def measure(student: PreTrainedModel, start: PreTrainedModel, texts: Sequences) -> dict[str, np.ndarray]:
    """Per text (N,), the mean over its response tokens of "kl", KL(start ‖ student), and of "gain", the change in log-likelihood (nats)."""
    columns = min(len(output_head(model).weight) for model in (student, start))
    found = {name: np.zeros(len(texts)) for name in ("kl", "gain")}
    for rows in micro_batches(texts, MICRO_TOKENS):
        part = texts[rows]
        hidden = [response_hidden(model, part) for model in (start, student)]
        ids_M = part.ids_BT[part.response_BT]
        owner_M = rows[:, None].expand(part.response_BT.shape)[part.response_BT].numpy()
        for cut in chunks(len(ids_M), columns, student.device):
            before_MV, after_MV = (
                torch.log_softmax(output_head(model)(hidden_MD[cut])[:, :columns].float(), -1)
                for model, hidden_MD in zip((start, student), hidden, strict=True)
            )
            gain_M = (after_MV - before_MV).gather(1, ids_M[cut, None].to(after_MV.device))[:, 0]
            for name, values_M in (("kl", kl(before_MV, after_MV)), ("gain", gain_M)):
                np.add.at(found[name], owner_M[cut], values_M.double().cpu().numpy())
    length_N = (texts.length_B - texts.prompt_B).numpy()
    return {name: total_N / length_N for name, total_N in found.items()}

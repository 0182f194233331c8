"""Rollouts from a vLLM server that is given the student's weights whenever they change.

    sample = VLLMServerSampler("http://127.0.0.1:8000", "student", max_length=1024)
    sample.check(model, prompts, eos=1)
    rollouts = sample(model, prompts, max_response=88, eos=1, generator=torch.Generator().manual_seed(0))

The weights travel as a file of safetensors in the folder for temporary files (TMPDIR), which the server must see under the same path and be
allowed to read. The server marks every answer with the version of its weights, so an answer by weights of somebody else's is noticed.
"""

from __future__ import annotations

import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from opd_bench.errors import RunError, UserError
from opd_bench.rollouts import ROWS
from opd_bench.scoring import FOREIGN, ModelTeacher, output_head
from opd_bench.sequences import Prompts
from opd_bench.vllm_sampler import VLLM, Weights
from opd_bench.vllm_server import PassingError, RefusedError, Server
from opd_bench.vllm_worker import EXTENSION, SHAPE

GENERATE, RPC, RESET, VERSION = "/inference/v1/generate", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version"
START = (
    "start it with VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --enable-scale-out --logprobs-mode processed_logprobs "
    f"--worker-extension-cls {EXTENSION} --load-format dummy --hf-overrides '{{\"vocab_size\": %d}}'"
)  # with the number of the student's tokens
TIMEOUT_S = 600.0  # of a response, which may wait for others
PROBED = 8  # tokens of each response that a check asks for


class VLLMServerSampler(VLLM):
    """``served`` is what the server at ``url`` calls the student."""

    def __init__(self, url: str, served: str, max_length: int) -> None:
        super().__init__(max_length)
        root = url.rstrip("/").removesuffix("/v1")
        self.server, self.served, self.version = Server(f"the rollouts' server at {root}", root, TIMEOUT_S), served, ""

    def check(self, model: PreTrainedModel, prompts: Prompts, eos: int) -> None:
        """UserError unless the server can write as ``model``: its log-probabilities must be those of the weights that it is given."""
        with self.server.checking():
            self.server.check_context(self.served, self.max_length, spare=0)
            self._check_start(model)
            try:
                drawn = self(model, prompts, max_response=PROBED, eos=eos, generator=None)
            except RunError as reason:
                raise UserError(str(reason)) from None
            own_NV, _ = ModelTeacher(model)(drawn)[:]
            mask_BT = drawn.response_BT
            gap = float((own_NV.cpu().gather(1, drawn.ids_BT[mask_BT][:, None])[:, 0] - drawn.logprob_BT[mask_BT]).abs().max())
            if gap > FOREIGN:
                raise RefusedError(f"its log-probabilities differ by {gap:.2g} nats from those of the weights that it was given")

    def _check_start(self, model: PreTrainedModel) -> None:
        """RefusedError unless it was started as it must be, with a model of this shape that has the student's tokens and no others."""
        tokens = output_head(model).out_features
        start = START % tokens
        if absent := [path for path in (GENERATE, RPC, RESET, VERSION) if path not in self.server.ask("/openapi.json")["paths"]]:
            raise RefusedError(f"it has no {', '.join(absent)}; {start}")
        try:
            said = self._call("describe")[0]
        except PassingError as reason:
            raise RefusedError(f"its workers cannot take weights ({reason}); {start}") from None
        for key in SHAPE:
            if said[key] != (own := getattr(model.config, key, None)):
                raise RefusedError(f"{key} of its model is {said[key]}, and {own} of the student; serve the student")
        if said["vocab_size"] != tokens:
            raise RefusedError(f"its model has {said['vocab_size']} output columns, and the student {tokens} tokens; {start}")
        if said["logprobs_mode"] != "processed_logprobs":
            raise RefusedError(f"it gives {said['logprobs_mode']}; {start}")

    def _send(self, weights: Weights) -> None:
        with tempfile.TemporaryDirectory(prefix="opd-bench-") as folder:
            path = Path(folder) / "weights.safetensors"
            save_file({name: weight.contiguous() for name, weight in weights}, path)
            if reason := next(filter(None, self._call("take_weights_from", str(path), persist=True)), None):
                raise RunError(f"{self.server.name} cannot read the weights ({reason}); set TMPDIR to a folder that it sees, too")
        self.version = uuid.uuid4().hex
        self.server.persist(VERSION, {"new_version": self.version})
        if not self.server.persist(RESET, {})["success"]:
            raise RunError(f"{self.server.name} is writing for somebody else, too; give this run a server of its own")

    def _call(self, method: str, *arguments: str, persist: bool = False) -> list[Any]:
        """What every worker returns."""
        return (self.server.persist if persist else self.server.ask)(RPC, {"method": method, "args": arguments})["results"]

    def _generate(self, prompts: list[list[int]], parameters: list[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
        with ThreadPoolExecutor(ROWS) as pool:
            return list(pool.map(self._answer, prompts, parameters))

    def _answer(self, prompt: list[int], parameters: dict[str, Any]) -> tuple[list[int], list[float]]:
        request = {"model": self.served, "token_ids": prompt, "sampling_params": parameters}
        written = self.server.persist(GENERATE, request)["choices"][0]
        if {span["version"] for span in written["weight_versions"]} != {self.version}:
            raise RunError(f"{self.server.name} was given other weights by somebody else; give this run a server of its own")
        return written["token_ids"], [token["logprob"] for token in written["logprobs"]["content"]]

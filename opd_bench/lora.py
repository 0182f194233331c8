"""Low-rank adapters (Hu et al., arXiv 2106.09685), by peft: a frozen model with trained maps of low rank beside its linear ones.

    student = adapted(student, rank=16, alpha=32, seed=0)   # says what it said before
    plain = merged(student)                                 # the same distributions, a model of transformers like any other

Shapes: V vocabulary, D width, R rank.
Limits: every linear map of every layer is adapted; the output head, embeddings and norms stay as they are.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_bench.errors import UserError

PEFT = "peft_config"  # the attribute by which transformers and our sampler know an adapted model


def adapted(model: PreTrainedModel, *, rank: int, alpha: float, seed: int) -> PreTrainedModel:
    """``model`` itself, frozen, with an adapter beside every linear map but the output head; ``seed`` is of their first weights.

    UserError if peft is absent, or cannot adapt the model.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"lora needs peft ({error}): pip install 'opd-bench[smol]'") from None
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0)  # pyright: ignore[reportArgumentType]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which it sets right by itself
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise UserError(f"peft cannot adapt {type(model).__name__}: {str(error).splitlines()[0]}; leave out lora") from None
    return model.eval()


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model with the weights that ``model`` and its adapters come to, sharing the rest; without adapters, ``model`` itself."""
    if not hasattr(model, PEFT):
        return model
    from peft.tuners.lora import LoraLayer

    known = {id(weight): weight for weight in model.parameters()}
    with torch.no_grad():
        known |= {id(layer): _plain(layer) for layer in model.modules() if isinstance(layer, LoraLayer)}
        plain = copy.deepcopy(model, known)  # which takes these for copies it has made
    for name in (PEFT, "_hf_peft_config_loaded"):
        plain.__dict__.pop(name, None)
    return plain.eval()


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A model that trains on by itself; what is frozen is shared."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters() if not weight.requires_grad})


def trained(model: PreTrainedModel) -> list[Tensor]:
    """The parameters that are trained: the adapters', or all."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def _plain(layer: Any) -> nn.Module:
    """The linear map that an adapted one comes to."""
    (adapter,) = layer.active_adapters
    base = layer.get_base_layer()
    plain = copy.copy(base)
    plain._parameters = {**base._parameters}
    plain.weight = nn.Parameter(base.weight + layer.get_delta_weight(adapter), requires_grad=False)
    return plain

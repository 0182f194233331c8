"""Gradient checkpointing: a forward pass keeps each layer's input alone, and the backward pass computes the rest again (Chen et al. 2016).

    with checkpointed(student):
        hidden_BTD = student.base_model(ids_BT, use_cache=False).last_hidden_state

Only the layers' forward passes are replaced, so a model in eval mode stays there and no dropout comes in.
Limits: models whose layers transformers itself can checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd_bench.errors import UserError


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Forward passes in the block keep the inputs of layers only. UserError for a model whose layers cannot do that."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} has no layers that can be computed again; leave out gradient_checkpointing")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward

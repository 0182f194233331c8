"""Gradient checkpointing: a forward pass keeps each layer's input alone, and the backward pass computes the rest again (Chen et al. 2016).

The layers have to believe that they are in training for it; what lies within them does not, so dropout stays off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd_bench.errors import UserError


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Forward passes in the block keep the inputs of layers only. UserError for a model whose layers cannot do that."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} has no layers that can be computed again; leave out gradient_checkpointing")
    if not layers[0].gradient_checkpointing:
        # transformers 5.24 renamed it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False

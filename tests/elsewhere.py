"""A device that is none: its tensors lie on the CPU, and like a GPU's they refuse to be computed with any that lie on another device.

    with elsewhere():
        model.to("elsewhere")

What forgets to move a tensor fails here as it would on a GPU, and what is computed is what the CPU computes. Kernels, streams and memory of
a GPU are not tried. `torch.tensor` and its like are moved by torch itself, hence the private switch that torch's own fake tensors use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")  # narrows nothing
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)  # which take tensors of several devices


class _Device(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class There(torch.Tensor):
    """A tensor on the device; ``here`` holds its values."""

    here: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=torch.device(NAME, 0)
        )
        made.here = here
        return made

    def __tensor_flatten__(self):
        return ["here"], None

    @staticmethod
    def __tensor_unflatten__(parts, *_):
        return There(parts["here"])

    def tolist(self):
        return self.here.tolist()

    def __repr__(self, *_, **__):
        return f"There({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees what makes tensors on the device out of none there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):  # as in inference mode
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return _computed(func, args, kwargs or {})


def _computed(func, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    if there and func not in MOVES and any(tensor.dim() for tensor in tensors if not isinstance(tensor, There)):
        raise RuntimeError(f"Expected all tensors to be on the same device ({func})")
    stays = bool(there)
    if kwargs.get("device") is not None:
        stays, kwargs = torch.device(kwargs["device"]).type == NAME, {**kwargs, "device": torch.device("cpu")}
    own_args, own_kwargs = tree_map_only(There, lambda tensor: tensor.here, (args, kwargs))
    found = func(*own_args, **own_kwargs)
    if not stays:
        return found
    wrapped = tree_map_only(torch.Tensor, There, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


@contextmanager
def elsewhere() -> Iterator[None]:
    """The device is to be had for as long as this lasts."""
    if torch._C._get_privateuse1_backend_name() != NAME:  # once a process
        _setup_privateuseone_for_python_backend(NAME, _Device())
        AUTOCAST.fallback(torch.library.fallthrough_kernel)
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Factories():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)

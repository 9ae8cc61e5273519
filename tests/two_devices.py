"""Two devices without one: tensors that say they are on `lazy:0` or `lazy:1`, while the CPU computes their values.

An operation on tensors of different devices raises, as on two GPUs. So do results that were never copied to the CPU.
`lazy` is a device type that needs no driver, and whose gradients torch computes in the calling thread.
"""

from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICES = ["lazy:0", "lazy:1"]
_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}  # CUDA takes indices on the CPU


class TwoDevices(TorchDispatchMode):
    """Within it, both devices exist. Two details are FakeTensorMode's."""

    depth = 0

    def __enter__(self) -> Self:
        TwoDevices.depth += 1
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor() fills on the CPU, then copies
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        TwoDevices.depth -= 1
        torch._C._set_only_lift_cpu_tensors(TwoDevices.depth > 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._can_decompose():  # inference mode leaves operations whole that are made of others
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return _run(func, args, kwargs or {})


class _Placed(Tensor):
    """A tensor that says it is on a device; `inner` has its values, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Self:
        made: _Placed = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} on {self.device}"


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute on the CPU; the result is where the operands are, or where `device` says."""
    placed = [each for each in tree_leaves((args, kwargs)) if isinstance(each, _Placed)]
    device = _device(func, args, kwargs)
    args, kwargs = tree_map(lambda each: each.inner if isinstance(each, _Placed) else each, (args, kwargs))
    if device.type != "lazy":
        return func(*args, **kwargs)
    result = func(*args, **(kwargs | {"device": "cpu"} if "device" in kwargs else kwargs))
    changed = {id(each.inner): each for each in placed} if func._schema.is_mutable else {}

    def place(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        return changed[id(each)] if id(each) in changed else _Placed(each, device)

    with torch.inference_mode(False):  # where autograd takes a view of a weight, it asks for no inference tensor
        return tree_map(place, result)


def _device(func: Any, args: Any, kwargs: Any) -> torch.device:
    if func in _COPIES:
        return torch.device(kwargs.get("device") or args[0].device)
    operands = args[:1] if func in _INDEXING else tree_leaves((args, kwargs))
    tensors = [each for each in operands if isinstance(each, Tensor)]
    devices = {each.device for each in tensors if each.dim() or each.device.type != "cpu"}
    if len(devices) > 1:
        raise RuntimeError(f"{func}: expected all tensors on one device, got {sorted(map(str, devices))}")
    if (asked := kwargs.get("device")) is not None:
        return torch.device(asked)
    return devices.pop() if devices else torch.device("cpu")

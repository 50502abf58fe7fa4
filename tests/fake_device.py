"""An accelerator imitated on the CPU: what asks it for float64, or mixes its tensors with those of the host?

    with FakeDevice("mps", without=(torch.float64,)) as fake:
        model.to("mps")(x.to("mps")).sum().backward()
    assert not fake.problems

Tensors stay plain CPU tensors and parameters, so that no branch on their type changes; the storages that are "on the
device" are remembered. One mode sees the names of Python (`.device`, `.to`, `device=`, `.numpy`), one the operators, in
the backward pass too. As on a real device, copies, indices and 0-dimensional tensors of the host are fine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class FakeDevice:
    """`problems` is what a real device would have refused, with the operator; `operators` counts those that it ran."""

    def __init__(self, name: str, *, without: tuple[torch.dtype, ...] = ()) -> None:
        self.device, self.without = torch.device(name, 0), without
        self.problems: list[str] = []
        self.operators = 0
        self._storages: dict[int, Any] = {}  # held, so that no address is used again
        self._modes = (_Operators(self), _Names(self))

    def __enter__(self) -> FakeDevice:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def put(self, value: Any) -> Any:
        """The tensors of `value` are on the device from now on."""
        for tensor in tensors_of(value):
            self._refuse(tensor, "a tensor")
            self._storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return value

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host."""
        copy = tensor.clone()
        self._storages.pop(copy.untyped_storage()._cdata, None)
        return copy

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operator, on the device if any of its tensors is."""
        operands, result = tensors_of((args, kwargs)), func(*args, **kwargs)
        here = [tensor for tensor in operands if self.holds(tensor)]
        name = func._schema.name.removeprefix("aten::")
        if not here or name == "copy_":
            return result
        self.operators += 1
        for tensor in here:
            self._refuse(tensor, name)
        others = [tensor for tensor in operands if tensor.ndim and not self.holds(tensor)]
        if name in INDEXING and self.holds(operands[0]):
            others = [tensor for tensor in others if tensor.dtype not in (torch.int64, torch.bool)]
        if others and torch._C._current_autograd_node() is None:  # zeros that autograd makes are nobody's mistake
            self.problems.append(f"{name} of this device and the host: {[tuple(x.shape) for x in operands]}")
        return self.put(result)

    def _refuse(self, tensor: torch.Tensor, what: str) -> None:
        if tensor.dtype in self.without:
            self.problems.append(f"{what} of {tensor.dtype}, {tuple(tensor.shape)}")


def tensors_of(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class _Operators(TorchDispatchMode):
    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.fake.run(func, args, kwargs or {})


class _Names(TorchFunctionMode):
    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fake, kwargs = self.fake, dict(kwargs or {})
        here = bool(args) and isinstance(args[0], torch.Tensor) and fake.holds(args[0])
        if here and func == torch.Tensor.device.__get__:
            return fake.device
        if func is torch.Tensor.numpy and here:
            fake.problems.append("numpy of a tensor on the device")
        if func is torch.Tensor.cpu and here:
            return fake.fetch(args[0])
        if func is torch.Tensor.to:
            return self._moved(func, here, *args, **kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == fake.device.type:
            return fake.put(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)

    def _moved(self, func: Any, here: bool, tensor: torch.Tensor, *words: Any, copy: bool = False, **kwargs: Any):
        if words and isinstance(words[0], torch.Tensor):
            where = self.fake.device if self.fake.holds(words[0]) else words[0].device
            words = (where, words[0].dtype, *words[1:])
        device, dtype, _, layout = torch._C._nn._parse_to(*words, **kwargs)
        there = here if device is None else device.type == self.fake.device.type
        if here and not there:
            tensor = self.fake.fetch(tensor)
        same = here == there and not copy
        moved = func(tensor, dtype=dtype or tensor.dtype, copy=not same, memory_format=layout or torch.preserve_format)
        return self.fake.put(moved) if there and not same else moved

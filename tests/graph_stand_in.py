"""Records operations on the CPU as a CUDA graph records kernels, and repeats them.

As there, recording runs nothing that lasts, memory keeps its place, and whatever the host decides
while it records is fixed: numbers that are no tensors, branches, random generators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Outputs = tuple[Tensor, Tensor | None]


class _Recorder(TorchDispatchMode):
    """Notes each operation, and the memory it writes to as it was before the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero"):
            raise RuntimeError("operation not permitted when stream is capturing")
        for value in tree_leaves(_written(func, args, kwargs)):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Puts back what the operations wrote over."""
        for storage, before in self._before.values():
            storage.copy_(before)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Returns the arguments that an operation writes to."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


class RecordedGraph:
    """Stands in for `captured.CudaGraph`."""

    made = 0  # in this process

    def __init__(self, function: Callable[[], Outputs]) -> None:
        recorder = _Recorder()
        try:
            with recorder:
                self.outputs = function()
        finally:
            recorder.undo()
        self._calls = recorder.calls
        RecordedGraph.made += 1
        self.replays = 0

    def replay(self) -> None:
        """Repeats the operations; their results land where they were while recording."""
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, result in self._calls:
                again = func(*args, **kwargs)
                returns = func._schema.returns
                if any(each.alias_info is not None for each in returns):
                    continue  # a view, or an argument that was written to
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)

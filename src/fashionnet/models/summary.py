"""The table of a network's layers, as Keras' `model.summary()` prints it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fashionnet.models.weights import num_parameters

_MOST_LAYERS = 30
_HEADS = ("Layer (type)", "Output Shape", "Param #")


@torch.inference_mode()
def summary(model: nn.Module, input_shape: Sequence[int]) -> str:
    """Returns layers, output shapes and parameter counts of a model as a table.

    Args:
        model: any module that takes a float batch (N, *input_shape); it is run once on zeros, in
            evaluation mode, and left as it was.
        input_shape: shape of one input, without the batch.
    """
    rows: list[tuple[str, str, str]] = []
    seen: dict[str, int] = {}

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        kind = type(module).__name__
        count = seen[kind] = seen.get(kind, -1) + 1
        label = f"{kind.lower()}{f'_{count}' if count else ''} ({kind})"
        shape = (None, *output.shape[1:]) if isinstance(output, torch.Tensor) else "?"
        rows.append((label, str(shape), f"{num_parameters(module):,}"))

    leaves = [module for module in model.modules() if not list(module.children())]
    if len(leaves) > _MOST_LAYERS:  # as Keras shows a network inside another: a line a part
        leaves = list(model.children())
    hooks = [leaf.register_forward_hook(note) for leaf in leaves]
    like = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        model(like.new_zeros((1, *input_shape)))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()

    total = num_parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = like.element_size()
    return "\n".join(
        (
            f'Model: "{type(model).__name__.lower()}"',
            *_table(rows),
            f" Total params: {total:,} ({_size(total * size)})",
            f" Trainable params: {trained:,} ({_size(trained * size)})",
            f" Non-trainable params: {total - trained:,} ({_size((total - trained) * size)})",
        )
    )


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [_HEADS, *rows]) + 2 for i in range(3)]

    def line(cells: Sequence[str], bar: str) -> str:
        left = [f" {cell:<{width - 1}}" for cell, width in zip(cells[:2], widths[:2], strict=True)]
        return bar + bar.join([*left, f"{cells[2]:>{widths[2] - 1}} "]) + bar

    def rule(left: str, dash: str, cross: str, right: str) -> str:
        return left + cross.join(dash * width for width in widths) + right

    body = [line(row, "│") for row in rows]
    between = rule("├", "─", "┼", "┤")
    separated = [text for row in body for text in (row, between)][:-1]
    return [
        rule("┏", "━", "┳", "┓"),
        line(_HEADS, "┃"),
        rule("┡", "━", "╇", "┩"),
        *separated,
        rule("└", "─", "┴", "┘"),
    ]


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1024 or unit == "GB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.2f} {unit}"

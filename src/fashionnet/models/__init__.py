"""Networks. They are built here and never fetched; they return logits, softmax is for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fashionnet.config import targets
from fashionnet.errors import UserError
from fashionnet.system import seeds


def build(
    node: Mapping[str, Any],
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
) -> nn.Module:
    """Builds the configured model on the CPU, its initial weights a function of `seed` alone.

    The global generators start from it. Nothing is loaded; see `runs.pretrained`.
    """
    seeds.seed_everything(seed)
    model = targets.build(node, "model", input_shape=tuple(input_shape), num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model._target_={node['_target_']} built a {type(model).__name__}, "
            "which is not a torch.nn.Module"
        )
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise UserError(
            f"model._target_={node['_target_']}: {lazy[0]} has no shape before the first batch; "
            "take layers whose inputs have a given size, not lazy ones"
        )
    return model

"""Building the classes that a configuration names, from an allow-list.

A run directory can come from a stranger, so a target that is not on the list is refused before it
is imported. Users add their own classes from their environment, never from a configuration:

    FASHIONNET_ALLOW=mynets.ConvNet,torch.optim.AdamW python -m fashionnet.train ...
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from typing import Any

from fashionnet.errors import UserError

ALLOW_VARIABLE = "FASHIONNET_ALLOW"

ALLOWED = frozenset(
    {
        "fashionnet.models.cnn.CNN",
        "fashionnet.models.small_resnet.SmallResNet",
        "fashionnet.models.mlp.MLP",
        "fashionnet.training.schedule.Constant",
        "fashionnet.training.schedule.Cosine",
        "fashionnet.training.schedule.OneCycle",
        "fashionnet.training.schedule.Plateau",
        "fashionnet.training.schedule.Step",
        "fashionnet.training.optim.Adam",
        "fashionnet.models.transfer.Transfer",
        "torch.optim.Adagrad",
        "torch.optim.Adam",
        "torch.optim.AdamW",
        "torch.optim.NAdam",
        "torch.optim.RMSprop",
        "torch.optim.SGD",
    }
)


def allowed() -> frozenset[str]:
    """Returns the dotted names that may be built: the package's and those of the environment."""
    own = os.environ.get(ALLOW_VARIABLE, "").replace(",", " ").split()
    return ALLOWED.union(own)


def build(node: Mapping[str, Any], group: str, *args: Any, **offered: Any) -> Any:
    """Builds the object a config node describes.

    Args:
        node: `_target_` and the keyword arguments of its class.
        group: the config group, for messages.
        *args: positional arguments that come before the node's keywords.
        **offered: keywords passed on only where the target's signature has them (a model may
            ask for `input_shape` and `num_classes`). The package sets them; a node must not.

    Raises:
        UserError: a target that is not allowed, cannot be imported or refuses its arguments, or
            a key that its signature does not have or that is offered.
    """
    if taken := sorted(offered.keys() & node.keys()):
        raise UserError(f"{group}.{taken[0]} is set by the package; leave it out")
    target, factory = str(node.get("_target_")), located(node, group)
    given = {key: value for key, value in node.items() if key != "_target_"}
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [
        p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    free = named[len(args) :]
    unknown = [key for key in given if key not in free]
    if unknown and not takes_any:
        settable = ", ".join(name for name in free if name not in offered)
        raise UserError(f"{group}.{unknown[0]}: {target} has no such argument; it has {settable}")
    given |= {key: value for key, value in offered.items() if key in free}
    try:
        return factory(*args, **given)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]  # torch appends its own call stack
        raise UserError(f"{group}: {target} refused its arguments: {reason}") from error


def located(node: Mapping[str, Any], group: str) -> Any:
    """Imports the class or function that a node names; nothing is imported that is not allowed.

    Args:
        node: a plain mapping with `_target_` and the keyword arguments of its class.
        group: the config group the node stands for, for the message.

    Raises:
        UserError: no target, one that is not on the list or cannot be imported, or a target inside
            an argument.
    """
    target = node.get("_target_")
    if not isinstance(target, str) or not target:
        raise UserError(f"{group}._target_ names no class: {target!r}")
    if target not in allowed():
        raise UserError(
            f"{group}._target_={target} is not on the allow-list; if you trust it, "
            f"set {ALLOW_VARIABLE}={target} in your environment"
        )
    if _holds_target({key: value for key, value in node.items() if key != "_target_"}):
        raise UserError(
            f"{group} holds a _target_ inside an argument; only {group}._target_ is built"
        )
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(f"{group}._target_={target} cannot be imported: {error}") from error
    if not callable(found):
        raise UserError(f"{group}._target_={target} is not a class or function")
    return found


def _holds_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(_holds_target(item) for item in value.values())
    return isinstance(value, list | tuple) and any(_holds_target(item) for item in value)

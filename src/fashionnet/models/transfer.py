"""Transfer learning: a network trained on many pictures, its final layer replaced by a fresh one.

Keras: base = keras.applications.X(include_top=False, pooling="avg"); base.trainable = False;
model = keras.Sequential([base, keras.layers.Dense(num_classes)]).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashionnet.errors import UserError, first_line, is_out_of_memory, shortened
from fashionnet.models import backbones
from fashionnet.models.layers import Dropout, dense

_LARGEST = 1e6  # of the numbers that normalize pixels in 0..1


class Transfer(nn.Module):
    """A backbone, and a fresh Dense layer on its features.

    Input: pictures, float in 0..1, gray (N, H, W) or RGB (N, 3, H, W). Gray pictures become three
    equal channels, and all are resized to `size`. Features, (N, D), are accepted too and go to the
    head directly. Output: logits, float (N, num_classes).

    Frozen parts take no gradients, stay in evaluation mode (the statistics of batch normalization
    do not move) and are not in `state_dict()`, because a fit does not change them; `frozen_state`
    returns them. Where a pretrained backbone is trained, its batch normalization keeps its
    statistics too, because batches of a few photos would spoil them.

    Args:
        library: "torchvision" or "timm".
        name: name of the architecture in the library, e.g. "resnet18".
        pretrained: what `runs.pretrained` loads: "imagenet", a file of weights, or "run:RUN_DIR".
        trained: "head"; the last N stages of the backbone as well; "all"; or "scratch", which
            trains all of it from random weights and ignores `pretrained`.
        size: side in pixels that pictures are resized to; None leaves them as they are.
        mean, std: numbers that normalize the channels, three or one for all; None takes those of
            the network's pretraining from the library.
        head_stages: number of stages, from the last, whose maps the head sees as means side by
            side; 1 is the features alone. Earlier stages help where the pictures differ much from
            those of the pretraining (Evci et al. 2022, "Head2Toe").
        batch_norm: "frozen"; or "trained", for pictures that need statistics of their own.
        dropout: fraction of features dropped in training, before the head.
        input_shape: shape of a picture, (H, W) or (3, H, W).
        num_classes: number of logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        library: str = "torchvision",
        name: str = "resnet18",
        pretrained: str = "imagenet",
        trained: str | int = "head",
        size: int | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        head_stages: int = 1,
        batch_norm: str = "frozen",
        dropout: float = 0.0,
        input_shape: Sequence[int] = (28, 28),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if batch_norm not in ("frozen", "trained"):
            raise UserError(f"model.batch_norm={batch_norm} is not known; choose frozen, trained")
        check_size(size)
        if not (isinstance(pretrained, str) and pretrained):
            raise UserError(
                f"model.pretrained={shortened(pretrained)} must be imagenet, a file of weights, or "
                "run:RUN_DIR; model.trained=scratch begins with random weights"
            )
        if pretrained == "none" and trained != "scratch":
            raise UserError("model.pretrained=none goes with model.trained=scratch")
        self.size = size
        self.pretrained = None if trained == "scratch" else pretrained
        self.library, self.name = library, name
        self.backbone, width = backbones.build(library, name)
        self._maps: list[Tensor] = []  # of the stages before the last that the head sees
        width += self._tap(head_stages, size or max(input_shape[-2:]))
        self.dropout = Dropout(dropout)
        self.head = dense(width, num_classes)
        self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as pictures
        self._freeze(trained, keeps_statistics=batch_norm == "frozen" and trained != "scratch")
        expected = backbones.expected_input(library, name)
        for key, given in (("mean", mean), ("std", std)):
            numbers = _three(key, getattr(expected, key) if given is None else given)
            self.register_buffer(key, torch.tensor(numbers).view(3, 1, 1), persistent=False)

    def misfit(self, side: int, error: Exception) -> UserError:
        """Returns the error for pictures that the backbone refused.

        Args:
            side: pixels of their side, before `size` changes it.
        """
        side, own = self.size or side, backbones.expected_input(self.library, self.name).size
        way_out = f"; use model.size={own}, its own" if side != own else ""
        return UserError(
            f"model.name={self.name} cannot take pictures of {side} pixels "
            f"({first_line(error)[:200]}){way_out}"
        )

    def _tap(self, head_stages: int, side: int) -> int:
        """Lets the head see stages before the last; returns how many features they add."""
        stages = backbones.stages(self.backbone)
        if not (type(head_stages) is int and 1 <= head_stages <= len(stages)):
            raise UserError(f"model.head_stages={head_stages} must be 1 to {len(stages)} stages")
        self.head_stages = head_stages
        if head_stages == 1:
            return 0
        for stage in stages[-head_stages:-1]:
            stage.register_forward_hook(lambda _, __, output: self._maps.append(output))
        was_training = self.backbone.training
        self.backbone.eval()
        with torch.inference_mode():
            weight = next(self.backbone.parameters())
            try:
                self.backbone(weight.new_zeros(1, 3, side, side))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise self.misfit(side, error) from error
        self.backbone.train(was_training)
        maps, self._maps = self._maps, []
        if any(each.ndim != 4 or each.shape[2] != each.shape[3] for each in maps):
            raise UserError(
                f"model.head_stages={head_stages} needs stages that give maps (N, C, H, W); "
                "those of this network do not"
            )
        return sum(each.shape[1] for each in maps)

    def _freeze(self, trained: str | int, keeps_statistics: bool) -> None:
        """Freezes what is not trained, and records what stays in evaluation mode."""
        stages = backbones.stages(self.backbone)
        if trained in ("all", "scratch"):
            frozen: list[nn.Module] = []
        elif trained == "head":
            frozen = [self.backbone]
        elif isinstance(trained, int) and 1 <= trained <= len(stages):
            frozen = stages[: len(stages) - trained]
        else:
            raise UserError(
                f"model.trained={trained} must be head, all, scratch, or the last 1 to "
                f"{len(stages)} stages"
            )
        for module in frozen:
            module.requires_grad_(False)
        self._still = frozen + [
            module
            for module in self.backbone.modules()
            if keeps_statistics and isinstance(module, nn.modules.batchnorm._NormBase)
        ]
        tensors = [t for module in frozen for t in module.state_dict(keep_vars=True).values()]
        ids = {id(tensor) for tensor in tensors}
        whole = super().state_dict(keep_vars=True)
        self._frozen_names = frozenset(name for name in whole if id(whole[name]) in ids)

    @property
    def is_head_only(self) -> bool:
        """Whether the backbone is frozen as a whole, so that its features can be computed once."""
        return not any(p.requires_grad for p in self.backbone.parameters())

    def train(self, mode: bool = True) -> Transfer:
        """Sets the mode of what is trained; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of pictures, or of features (N, D)."""
        features = x if x.ndim == 2 else self.features(x)
        logits: Tensor = self.head(self.dropout(features))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Returns the features that the backbone computes from pictures: float32 (N, D)."""
        x = self._prepared(x.unsqueeze(1) if x.ndim == 3 else x)
        self._maps = []  # a caller of a single stage left its map here
        found: Tensor = self.backbone(x)
        maps, self._maps = self._maps, []
        return torch.cat([*(each.float().mean((2, 3)) for each in maps), found.float()], 1)

    def _prepared(self, x: Tensor) -> Tensor:
        """Returns pictures as the backbone takes them: three channels, normalized, of its size."""
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            sides = (self.size, self.size)
            x = F.interpolate(x, sides, mode="bilinear", antialias=True, align_corners=False)
        x = (x.expand(-1, 3, -1, -1) - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what a fit may change: all but the frozen parts."""
        state = super().state_dict(*args, **kwargs)
        for name in self._frozen_names:
            del state[name]
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Restores what `state_dict` returned."""
        return super().load_state_dict({**self.frozen_state(), **state_dict}, strict, assign)

    def frozen_state(self) -> dict[str, Tensor]:
        """Returns what a fit does not change, by its names in the whole network."""
        whole = super().state_dict()
        return {name: whole[name] for name in whole if name in self._frozen_names}

    def load_frozen_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `frozen_state` returned."""
        super().load_state_dict({**self.state_dict(), **state})

    def parameter_groups(self, lr: float, backbone_lr: float) -> list[dict[str, Any]]:
        """Returns the trained parameters with their learning rates, the head's first.

        Args:
            backbone_lr: the rate of a pretrained backbone, as a fraction of `lr`.
        """
        groups: list[dict[str, Any]] = [{"params": list(self.head.parameters()), "lr": lr}]
        inner = [p for p in self.backbone.parameters() if p.requires_grad]
        fraction = 1 if self.pretrained is None else backbone_lr
        return [*groups, {"params": inner, "lr": lr * fraction}] if inner else groups


def check_size(size: object) -> None:
    if size is not None and not (type(size) is int and 8 <= size <= 1024):
        raise UserError(f"model.size={shortened(size)} must be 8 to 1024 pixels, or null")


def _three(key: str, value: Any) -> list[float]:
    """Returns the three numbers of `model.mean` or `model.std`.

    Raises:
        UserError: it is neither a number nor three, or they are out of range.
    """
    numbers = list(value) if isinstance(value, list | tuple) else [value] * 3
    sound = len(numbers) == 3 and all(
        type(number) in (int, float) and abs(number) <= _LARGEST for number in numbers
    )
    if not sound or (key == "std" and min(numbers) < 1 / _LARGEST):
        least = f" of {1 / _LARGEST:g} or more" if key == "std" else ""
        raise UserError(
            f"model.{key}={shortened(value)} must be three numbers{least}, one a channel, or one "
            "for all"
        )
    return [float(number) for number in numbers]

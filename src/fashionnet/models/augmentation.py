"""Random changes to training pictures.

Pictures are float (N, C, H, W) in 0..1, before they are normalized. What is random is drawn for a
whole batch from torch's global generator, and each process of a job takes its rows of it. All but
`mixed` leave a picture's class as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fashionnet.system.rows import Rows

# Sides of a rectangle that is erased, as shares of the picture's.
_LEAST_ERASED, _MOST_ERASED = 0.15, 0.4


def flipped(x: Tensor, rows: Rows) -> Tensor:
    """Returns pictures of which every other one, at random, is mirrored left to right."""
    mirrored = (torch.rand(rows.total, device=x.device) < 0.5)[rows.part]
    return torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)


def shifted(x: Tensor, share: float, rows: Rows) -> Tensor:
    """Returns pictures moved by up to `share` of their sides; their edges are drawn out."""
    high, wide = (round(share * side) for side in x.shape[-2:])
    framed = F.pad(x, (wide, wide, high, high), mode="replicate")
    down = torch.randint(2 * high + 1, (rows.total, 1), device=x.device)[rows.part]
    right = torch.randint(2 * wide + 1, (rows.total, 1), device=x.device)[rows.part]
    down = down + torch.arange(x.shape[2], device=x.device)
    right = right + torch.arange(x.shape[3], device=x.device)
    numbers = torch.arange(len(x), device=x.device)[:, None, None]
    moved = framed.permute(0, 2, 3, 1)[numbers, down[:, :, None], right[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def erased(x: Tensor, share: float, rows: Rows) -> Tensor:
    """Returns pictures of which a share, at random, has a rectangle filled with noise.

    Source: Zhong et al. 2020, Random Erasing Data Augmentation.
    """
    inside = torch.rand(rows.total, device=x.device)[rows.part, None] < share
    spans = []
    for side in x.shape[-2:]:
        least, most = round(_LEAST_ERASED * side), round(_MOST_ERASED * side)
        length = torch.randint(least, most + 1, (rows.total, 1), device=x.device)
        start = (torch.rand(rows.total, 1, device=x.device) * (side - length + 1)).long()
        places = torch.arange(side, device=x.device)
        spans.append(((start <= places) & (places < start + length))[rows.part] & inside)
    rectangle = spans[0][:, None, :, None] & spans[1][:, None, None, :]
    noise = torch.rand((rows.total, *x.shape[1:]), dtype=x.dtype, device=x.device)[rows.part]
    return torch.where(rectangle, noise, x)


@dataclass(frozen=True)
class Mix:
    """How the pictures of a batch were mixed.

    Attributes:
        partners: int64 (N,), the picture that each took a rectangle of.
        share: of each picture that is its own, in 0..1.
    """

    partners: Tensor
    share: float


def mixed(x: Tensor, share: float) -> tuple[Tensor, Mix | None]:
    """Returns a whole batch in which, in a share of the batches, pictures hold a part of others.

    All take a rectangle of the same place and of their own proportions; how much of each picture
    it is, is uniform in 0..1.

    Source: Yun et al. 2019, CutMix.
    """
    if torch.rand(()) >= share:
        return x, None
    part = math.sqrt(torch.rand(()).item())
    spans = []
    for side in x.shape[-2:]:
        length = round(part * side)
        start = int(torch.randint(side - length + 1, ()))
        spans.append(slice(start, start + length))
    partners = torch.randperm(len(x)).to(x.device)
    found = x.clone()
    found[..., spans[0], spans[1]] = x[partners][..., spans[0], spans[1]]
    taken = math.prod(span.stop - span.start for span in spans) / math.prod(x.shape[-2:])
    return found, Mix(partners, 1 - taken)

"""The products and the Adam of the lesson's 8,440 steps alone, on one thread; prints seconds.

    python scripts/benchmarks/floor.py

A step multiplies five times: forward through both layers, backward for both kernels, and once for
the gradient of the hidden layer.
"""

from __future__ import annotations

import math
import time

import torch

_STEPS = 8_440


def main() -> None:
    """Times the steps on random numbers; how long they take does not depend on these."""
    torch.set_num_threads(1)
    x, hidden, errors = torch.rand(32, 784), torch.rand(32, 128), torch.rand(32, 10)
    weights = [torch.rand(128, 784), torch.zeros(128), torch.rand(10, 128), torch.zeros(10)]
    gradients, means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(3))
    logits, delta = torch.empty(32, 10), torch.empty(32, 128)
    infinity = torch.full((), math.inf)
    arguments = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-7}
    with torch.inference_mode():
        began = time.perf_counter()
        for _ in range(_STEPS):
            torch.mm(x, weights[0].T, out=hidden)
            torch.mm(hidden, weights[2].T, out=logits)
            torch.mm(errors.T, hidden, out=gradients[2])
            torch.mm(errors, weights[2], out=delta)
            torch.mm(delta.T, x, out=gradients[0])
            torch._fused_adam_(
                *(weights, gradients, means, squares, [], [infinity] * 4),
                lr=1e-9,
                amsgrad=False,
                maximize=False,
                **arguments,
            )
        print(time.perf_counter() - began)


if __name__ == "__main__":
    main()

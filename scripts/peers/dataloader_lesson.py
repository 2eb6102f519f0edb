"""The lesson as PyTorch's quickstart writes such a loop: Dataset, DataLoader, scaling on the way.

Reads the pictures that KERAS_HOME holds. Prints one JSON line: seconds of the fit, test accuracy.
"""

import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset


class Pictures(Dataset):
    """Hands out one picture at a time, scaled as it is asked for, as torchvision's data sets do."""

    def __init__(self, part: str) -> None:
        folder = Path(os.environ["KERAS_HOME"]) / "datasets" / "fashion-mnist"
        images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
        self.images = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        self.labels = np.frombuffer(labels, np.uint8, offset=8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[i].copy()).float().div(255), int(self.labels[i])


def evaluate(model: nn.Module, loader: DataLoader) -> float:
    """Returns the accuracy over a loader."""
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in loader)
    model.train()
    return right / len(loader.dataset)


train, test = Pictures("train"), Pictures("t10k")
fitted, held_out = Subset(train, range(54000)), Subset(train, range(54000, 60000))
model = nn.Sequential(
    nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)
)
loss_of = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters())
began = time.perf_counter()
for _ in range(5):
    for x, y in DataLoader(fitted, batch_size=32, shuffle=True):
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    evaluate(model, DataLoader(held_out, batch_size=32))
fit_seconds = time.perf_counter() - began
accuracy = evaluate(model, DataLoader(test, batch_size=32))
print(json.dumps({"fit_seconds": fit_seconds, "test_accuracy": accuracy}))

"""One of scikit-learn's classifiers on Fashion-MNIST, with its defaults.

    python scripts/peers/sklearn_lesson.py RandomForestClassifier [SEED]

Prints one JSON line: seconds of `fit`, and test accuracy. The data are those that Keras keeps.
"""

import gzip
import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

MODULES = {
    "LogisticRegression": "sklearn.linear_model",
    "RandomForestClassifier": "sklearn.ensemble",
    "HistGradientBoostingClassifier": "sklearn.ensemble",
}


def read(name: str, skip: int) -> np.ndarray:
    path = Path(os.environ["KERAS_HOME"]) / "datasets" / "fashion-mnist" / f"{name}-ubyte.gz"
    return np.frombuffer(gzip.decompress(path.read_bytes())[skip:], np.uint8)


name = sys.argv[1]
seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
X_train = read("train-images-idx3", 16).reshape(-1, 784) / np.float32(255)
X_test = read("t10k-images-idx3", 16).reshape(-1, 784) / np.float32(255)
y_train, y_test = read("train-labels-idx1", 8), read("t10k-labels-idx1", 8)
settings = {"random_state": seed}
if name == "RandomForestClassifier":
    settings["n_jobs"] = -1
if name == "HistGradientBoostingClassifier":
    settings |= {"max_iter": 50, "early_stopping": False}
model = getattr(importlib.import_module(MODULES[name]), name)(**settings)
began = time.perf_counter()
model.fit(X_train, y_train)
fit_seconds = time.perf_counter() - began
print(json.dumps({"fit_seconds": fit_seconds, "test_accuracy": model.score(X_test, y_test)}))

"""fashionnet: a Keras lesson on Fashion-MNIST as reproducible PyTorch experiments.

Modules named by a verb are commands (`python -m fashionnet.train`), modules named by a noun are
their parts. Every command has a plain function of the same name behind it, for notebooks:

    from fashionnet.train import train
    run = train("model=mlp", "epochs=1")
"""

import os
from importlib.metadata import PackageNotFoundError, version

# torch's two threads meet three times in each step of a small network. By default a thread that
# waits spins for milliseconds, and where other programs want the cores too it spins against the
# one it waits for, tens of times slower than a single thread. This makes it sleep after some
# microseconds. OpenMP reads the variable when torch is imported, hence here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

try:
    __version__ = version("fashionnet")
except PackageNotFoundError:  # a source tree on PYTHONPATH, never installed
    __version__ = "0+unknown"

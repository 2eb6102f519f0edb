"""fashionnet: a Keras lesson on Fashion-MNIST as reproducible PyTorch experiments.

Modules named by a verb are commands (`python -m fashionnet.train`), modules named by a noun are
their parts. Every command has a plain function of the same name behind it, for notebooks:

    from fashionnet.train import train
    run = train("model=mlp", "epochs=1")
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fashionnet")
except PackageNotFoundError:  # a source tree on PYTHONPATH, never installed
    __version__ = "0+unknown"

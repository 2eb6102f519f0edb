"""fashionnet: a Keras lesson on Fashion-MNIST as reproducible PyTorch experiments.

Modules named by a verb are commands (`python -m fashionnet.train`), modules named by a noun are
their parts. Every command has a plain function behind it, for notebooks:

    from fashionnet.train import train
    run = train("model=mlp", "epochs=1")
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "__version__":  # looked up when asked for: importing the machinery takes its time
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("fashionnet")
        except PackageNotFoundError:  # a source tree on PYTHONPATH, never installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

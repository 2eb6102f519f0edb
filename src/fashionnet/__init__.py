"""fashionnet: a Keras lesson on Fashion-MNIST as reproducible PyTorch experiments.

Modules named by a verb are commands (`python -m fashionnet.train`), modules named by a noun are
their parts. Every command has a plain function behind it, for notebooks:

    from fashionnet.train import train
    run = train("model=mlp", "epochs=1")
"""

import os
import signal
import sys


def __getattr__(name: str) -> str:
    if name == "__version__":  # looked up when asked for: importing the machinery takes its time
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("fashionnet")
        except PackageNotFoundError:  # a source tree on PYTHONPATH, never installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_command() -> bool:
    """Returns whether this process is one of the package's commands, not a notebook or a test."""
    script, *_ = getattr(sys, "argv", None) or [""]
    if script == "-m":  # Python looks for the module that it was asked to run
        words = sys.orig_argv[1:]
        return any(word.removeprefix("-m").partition(".")[0] == __name__ for word in words)
    # A worker process of a command has the command's arguments, and others of its own.
    name = os.path.basename(script)
    return name.partition("-")[0] == __name__ and script in sys.orig_argv


def _end_in_one_line(_number: int, _frame: object) -> None:
    """Ends the process where nothing needs to be put right: while its modules are imported."""
    try:
        os.write(2, b"interrupted by SIGINT\n")
    finally:
        os._exit(128 + signal.SIGINT)


if _is_command():
    # First of all: the imports of a command take seconds. What is ignored, as in the background,
    # stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_in_one_line)
    from fashionnet.system import terminal

    terminal.begin()

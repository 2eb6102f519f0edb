"""A process that has imported torch and the package, and forks for each command of a test.

Importing costs a command three seconds, which most tests do not ask about. A forked command is one
all the same: it runs the real module as `__main__`, in a process of its own with its own
descriptors, folder, environment, signals and exit status. What a test says about the start of a
process, about Ctrl-C or about a terminal takes `Commands.call` or `Commands.line`, which start one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

# Variables that a command reads while it runs. Others may decide something while it imports.
_READ_LATE = (
    *("FASHIONNET_", "HYDRA_FULL_ERROR", "PYTHONPATH", "SLURM_", "TORCHELASTIC_"),
    *("LOCAL_", "MASTER_", "RANK", "WORLD_SIZE"),  # what torchrun sets
    *("PATH", "http_proxy", "https_proxy"),
)

# What commands import in functions; most of it takes longer than what they do with it.
_LAZY = (
    "hydra._internal.core_plugins.basic_launcher",
    "hydra._internal.core_plugins.basic_sweeper",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "numpy.random",
    "torch._dynamo",  # by torch's own optimizers, and by torchvision
    "tensorboard.plugins.hparams.api_pb2",
    "tensorboard.summary.writer.record_writer",
)


class Forked:
    """A command that a server has started; its methods are those of `subprocess.Popen`."""

    def __init__(self, server: str, request: Mapping[str, Any], stdout: IO[bytes] | None) -> None:
        self.args = request["words"]
        self._streams = [stdout or tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(server)
        socket.send_fds(self._connection, [b"."], [file.fileno() for file in self._streams])
        self._connection.sendall(json.dumps(request).encode())
        self._connection.shutdown(socket.SHUT_WR)
        self._reports = self._connection.makefile()
        self.pid = int(self._reports.readline())

    def poll(self) -> int | None:
        """Returns the exit status, None while the command runs."""
        return self.wait() if select.select([self._connection], [], [], 0)[0] else None

    def send_signal(self, number: int) -> None:
        """Sends a signal to a command that has not been waited for."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Waits for the command; returns its exit status."""
        if not hasattr(self, "returncode"):
            self._connection.settimeout(600)
            self.returncode = int(self._reports.readline())
            self._reports.close()
            self._connection.close()
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """Waits for the command; returns what it printed."""
        self.wait()
        printed = []
        for file in self._streams:
            with file:
                if file.readable():
                    file.seek(0)
                printed.append(file.read().decode("utf-8") if file.readable() else "")
        return printed[0], printed[1]


class Server:
    """The process that forks.

    Args:
        environment: the environment that it imports in.
        modules: more that it imports, besides the package.
        prefix: a command line that starts it, e.g. in namespaces of its own.
    """

    def __init__(
        self, environment: Mapping[str, str], *modules: str, prefix: Sequence[str] = ()
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._address = str(Path(self._folder.name, "socket"))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._address)
            listener.listen(64)
            self._process = subprocess.Popen(
                [*prefix, sys.executable, __file__, str(listener.fileno()), *modules],
                env={**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
                pass_fds=(listener.fileno(),),
                stdin=subprocess.DEVNULL,
            )

    @staticmethod
    def can_start(environment: Mapping[str, str]) -> bool:
        """Returns whether variables of a command come early enough for a forked one."""
        return all(key.startswith(_READ_LATE) for key in environment)

    def start(
        self,
        *arguments: str | Path,
        cwd: Path,
        environment: Mapping[str, str],
        option: str = "-m",
        stdout: IO[bytes] | None = None,
    ) -> Forked:
        """Starts `python -m fashionnet.MODULE …`, or `python -c PROGRAM …`, in this environment.

        Args:
            stdout: a file for standard output; None keeps it for `communicate`.
        """
        words = [option, *map(str, arguments)]
        request = {"words": words, "cwd": str(cwd), "environment": dict(environment)}
        return Forked(self._address, request, stdout)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def keep_data() -> None:
    """Reads and verifies each file of the data folder once in this process, and in its forks."""
    from fashionnet.data import folders, sources

    read, root = sources.read_checked, folders.default_root().resolve()

    @functools.lru_cache
    def kept(path: Path, source: sources.Source, *_: int) -> sources.Content:
        return read(path, source)

    def kept_or_read(path: Path, source: sources.Source) -> sources.Content:
        whole = path.resolve()
        if not (whole.is_file() and whole.is_relative_to(root)):
            return read(path, source)
        stat = whole.stat()
        return kept(path, source, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)

    sources.read_checked = kept_or_read


def _prepare() -> None:
    os.environ["KINETO_LOG_LEVEL"] = "6"  # torch reads it early; see `fashionnet.config.hydra_app`
    import fashionnet

    found = pkgutil.walk_packages(fashionnet.__path__, "fashionnet.")
    for name in (*[module.name for module in found], *_LAZY, *sys.argv[2:]):
        with contextlib.suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(name)
    from fashionnet.data import fetching, folders, published
    from fashionnet.errors import UserError

    keep_data()
    # Nothing here computes with torch: a fork does not have the threads of its parent.
    with contextlib.suppress(UserError):  # the data cannot be had
        data = published.SETS["fashion_mnist"]
        for part in (data.train, data.test):
            fetching.load(folders.data_folder(None), data, part)


def _requests(listener: socket.socket) -> dict[str, Any]:
    """Forks for each request, and returns it in the fork."""
    while True:
        connection, _ = listener.accept()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:  # waits for the command, and reports how it ended
            listener.close()
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 2)
            request: dict[str, Any] = json.load(connection.makefile())
            command = os.fork()
            if command == 0:
                connection.close()
                for number, descriptor in enumerate(descriptors, 1):
                    os.dup2(descriptor, number)
                    os.close(descriptor)
                return request
            connection.sendall(f"{command}\n".encode())
            _, status = os.waitpid(command, 0)
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(0)
        connection.close()


def _serve(listener: socket.socket) -> None:
    """Serves, and makes each fork what Python makes of a new process."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [place for place in sys.path[1:] if place not in given]
    _prepare()
    gc.freeze()
    request = _requests(listener)
    for number, name, buffering, errors in (
        (1, "stdout", -1, "strict"),
        (2, "stderr", 1, "backslashreplace"),
    ):
        stream = open(number, "w", buffering, "utf-8", errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [os.getcwd(), *filter(None, added), *path]
    importlib.invalidate_caches()
    option, given, *arguments = request["words"]
    sys.orig_argv[:] = [sys.executable, option, given, *arguments]
    sys.argv[:] = [option, *arguments]
    importlib.reload(sys.modules["fashionnet"])  # what the package does first in a command
    status: int | str | None = None
    try:
        if option == "-c":
            exec(given, {"__name__": "__main__"})
        else:
            del sys.modules[given]
            runpy.run_module(given, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    # As Python ends a process, without freeing all that is imported, which takes 0.3 s.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))

"""The machine a run works on: device, threads, determinism, memory."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from fashionnet.errors import UserError, first_line

log = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda", "mps")
_precision: ContextVar[str] = ContextVar("precision", default="float32")

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def pick_device(name: str) -> torch.device:
    """Returns the device called `name`; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: an unknown device, or one this machine or this torch does not have.
    """
    kind = name.partition(":")[0]
    if name == "auto":
        kind = name = next((k for k in ("cuda", "mps") if _is_available(k)), "cpu")
    if kind not in DEVICES:
        raise UserError(f"device={name} is not known; choose one of {', '.join(DEVICES)}")
    if not _is_available(kind):
        raise UserError(
            f"device={name}: this machine, or this build of torch {torch.__version__}, "
            f"has no {kind.upper()} device; device=auto takes what there is"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"device={name} is not a device name; write cpu, cuda, cuda:1 or mps"
        ) from None
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={name}: there are {torch.cuda.device_count()} CUDA devices, from cuda:0 on"
        )
    return device


def _is_available(kind: str) -> bool:
    module: Any = {"cuda": torch.cuda, "mps": torch.backends.mps}.get(kind)
    return module is None or bool(module.is_available())


def device_of_run(asked: str | None, recorded: object) -> str:
    """Returns the name of the device on which to evaluate a finished run.

    Equal weights give other last digits on another kind of device. The default is therefore the
    run's own kind where this machine has it, and `auto` elsewhere.

    Args:
        asked: name that `pick_device` takes, or None.
        recorded: device in the run's record, e.g. `cuda:3`.
    """
    if asked is not None:
        return asked
    kind = str(recorded).partition(":")[0]
    return kind if kind in DEVICES and _is_available(kind) else "auto"


def describe(device: torch.device) -> str:
    """Returns a device's name for people, e.g. `cuda (NVIDIA H100)` or `cpu (2 threads)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        num = torch.get_num_threads()
        return f"cpu ({num} thread{'s' if num > 1 else ''})"
    return str(device)


@contextlib.contextmanager
def started(
    device: str,
    threads: int | None,
    deterministic: bool,
    tf32: bool = False,
    precision: str = "float32",
) -> Iterator[torch.device]:
    """Prepares the process for a run, yields the run's device, and restores everything afterwards.

    Denormal numbers are flushed to zero, as in TensorFlow and XLA: Adam's moments of pixels that
    are almost always black become denormal, and operations on them take several times as long.
    Worker threads copy the setting when they start, so this comes before any work.

    Args:
        device: name that `pick_device` takes.
        threads: CPU threads; None takes torch's default, the number of cores.
        deterministic: whether torch must use its deterministic algorithms.
        tf32: whether CUDA may round the factors of products and convolutions to TensorFloat-32,
            10 bits of mantissa; torch by default does so in convolutions alone.
        precision: of the network's forward pass, float32 or bfloat16; where the device does not
            compute in bfloat16, float32 takes its place, and the log says so.

    Raises:
        UserError: as in `pick_device`.
    """
    chosen = pick_device(device)
    restart_peak_memory(chosen)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads or torch.get_num_threads())
        if precision == "bfloat16" and not _has_bfloat16(chosen):
            log.warning(
                "%s does not compute in bfloat16: precision=float32 takes its place",
                describe(chosen),
            )
            precision = "float32"
        stack.enter_context(_deterministic(deterministic))
        stack.enter_context(_float32_precision(tf32))
        stack.callback(torch.set_flush_denormal, _flushes_denormals())
        torch.set_flush_denormal(True)
        stack.callback(_precision.reset, _precision.set(precision))
        yield chosen


@contextlib.contextmanager
def computing(threads: int) -> Iterator[None]:
    """Lets this thread compute in the body as a run does, on so many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    flushed = _flushes_denormals()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)
        torch.set_num_threads(before)


def free_memory_bytes(device: torch.device) -> int:
    """Returns how much memory of a device can still be used, about."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except OSError:  # not on macOS
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def precision() -> str:
    """Returns the precision that `started` set, float32 or bfloat16."""
    return _precision.get()


def forward_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Returns the context of a network's forward pass, which computes in the run's precision.

    Weights stay float32, and so does all that happens outside the context: losses, metrics, the
    optimizer. Torch computes a backward pass in the precision of its forward pass.
    """
    if precision() == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def num_cores() -> int:
    """Returns how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _has_bfloat16(device: torch.device) -> bool:
    """Returns whether a device computes in bfloat16, and does not only emulate it slowly."""
    if device.type == "cuda":  # NVIDIA's since Ampere
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    is_x86 = device.type == "cpu" and platform.machine() == "x86_64"
    return not is_x86 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextlib.contextmanager
def on_all_cores() -> Iterator[None]:
    """Lets torch use every core in the body, for any `threads` of the run."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _deterministic(deterministic: bool) -> Iterator[None]:
    """Lets torch use its deterministic algorithms in the body, or not."""
    cudnn = torch.backends.cudnn
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_before = cudnn.deterministic, cudnn.benchmark
    changes = (was_on, only_warned) != (deterministic, False)
    # cuBLAS needs this before its first call.
    sets_workspace = deterministic and _WORKSPACE not in os.environ
    if sets_workspace:
        os.environ[_WORKSPACE] = ":4096:8"
    if changes:
        torch.use_deterministic_algorithms(deterministic)  # imports the compiler, a second
    cudnn.deterministic, cudnn.benchmark = deterministic, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = cudnn_before
        if changes:
            torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
        if sets_workspace:
            os.environ.pop(_WORKSPACE, None)


# Pairs of CUDA's and the CPU's rounding that the older switches can express.
_AGREEING = (("none", "none"), ("tf32", "tf32"), ("tf32", "bf16"))


@contextlib.contextmanager
def _float32_precision(tf32: bool) -> Iterator[None]:
    """Sets how CUDA rounds the factors of float32 products in the body; the CPU keeps all bits.

    A caller may have changed it by torch's older switches or, from torch 2.9 on, by its newer ones.
    Where the two disagree, torch refuses to read the older ones, and its own exporters read them.
    Setting the older ones makes both agree; all are restored after the body.
    """
    backends: Any = torch.backends
    older = (backends.cuda.matmul, backends.cudnn)
    parents: tuple[Any, ...] = ()
    parts: tuple[tuple[Any, ...], ...] = ((), ())  # of CUDA, of the CPU
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        parents = (backends, backends.cudnn, backends.mkldnn)
        parts = (
            (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),
            (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn),
        )
    with contextlib.ExitStack() as stack:
        before = _older_switches(older)  # readable as long as nothing was set
        # Parents first: a part without a value of its own has its parent's.
        for part in (*parents, *parts[0], *parts[1]):
            stack.callback(setattr, part, "fp32_precision", part.fp32_precision)
            part.fp32_precision = "none"
        for values in _AGREEING:
            for group, value in zip(parts, values, strict=True):
                for part in group:
                    part.fp32_precision = value
            before = {**_older_switches(older), **before}
        for part in (*parts[0], *parts[1]):
            part.fp32_precision = "none"
        if None in before:
            stack.callback(torch.set_float32_matmul_precision, before[None])
        for part in older:
            if part in before:
                stack.callback(setattr, part, "allow_tf32", before[part])
            part.allow_tf32 = tf32
        yield


def _older_switches(older: tuple[Any, ...]) -> dict[Any, Any]:
    """Returns the readable switches by part, and under None the precision of products."""
    found: dict[Any, Any] = {}
    with contextlib.suppress(RuntimeError):
        found[None] = torch.get_float32_matmul_precision()
    for part in older:
        with contextlib.suppress(RuntimeError):
            found[part] = part.allow_tf32
    return found


def _flushes_denormals() -> bool:
    return bool(torch.full((1,), 1e-30).mul(1e-10).eq(0).item())


def restart_peak_memory(device: torch.device) -> None:
    """Restarts the measurement of the peak, so that a job does not report its predecessor's.

    Args:
        device: the run's device; no other device is initialized.

    Raises:
        UserError: CUDA cannot be initialized.
    """
    if device.type == "cuda":
        try:
            torch.cuda.init()  # there are no figures to reset before
        except RuntimeError as error:  # e.g. a device that another process has for itself
            raise UserError(
                f"device={device} cannot be used: {first_line(error)}; device=cpu needs no GPU"
            ) from error
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; Linux only


def peak_memory_bytes() -> int:
    """Returns the most resident memory since `restart_peak_memory`, in bytes.

    Where the system cannot restart the measurement (other than Linux) it is the process' peak.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory_bytes(device: torch.device) -> int | None:
    """Returns the most that torch held on a CUDA device since `restart_peak_memory`, in bytes.

    None on other devices.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def platform_name() -> str:
    """Returns system, machine and processor capability, e.g. `Linux-6.1 x86_64 AVX512`."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.system()}-{platform.release()} {platform.machine()} {capability}"


def processor_name() -> str:
    """Returns the processor's name and number of cores, e.g. `AMD EPYC, 2 cores`."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    return f"{name}, {os.cpu_count()} cores"


def gpu_facts(device: torch.device) -> dict[str, Any] | None:
    """Returns what a GPU's results depend on: its name and the versions of driver, CUDA, cuDNN.

    None on other devices. A version that cannot be learned is None.
    """
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    return {
        "name": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, capability)),
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver_version() -> str | None:
    """Returns the version of NVIDIA's driver, e.g. `580.65.06`."""
    with contextlib.suppress(OSError):
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)*\b", _DRIVER_FILE.read_text())
        if found:
            return found[0]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def _rounding(device: torch.device) -> tuple[Any, ...]:
    """Returns how the factors of float32 products and convolutions are rounded on a device."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # until torch 2.8
        return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
    if device.type == "cuda":
        return backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
    return backends.mkldnn.matmul.fp32_precision, backends.mkldnn.conv.fp32_precision


def arithmetic(device: torch.device) -> dict[str, Any]:
    """Returns what the bits of a result on `device` depend on, besides numbers and operations."""
    facts: dict[str, Any] = {
        "torch": (torch.__version__, torch.version.git_version),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "device": device.type,
        "rounding": _rounding(device),
        "precision": precision(),
    }
    if device.type == "cuda":
        return facts | {"gpu": gpu_facts(device), "cudnn": torch.backends.cudnn.deterministic}
    if device.type == "mps":
        return facts | {"platform": platform.platform()}
    capability = torch.backends.cpu.get_cpu_capability()
    return facts | {"processor": (processor_name(), capability), "cores": num_cores()}

"""Looking into a fit: torch's anomaly detection and its profiler."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from fashionnet.system.files import atomic_write


@contextlib.contextmanager
def observed(anomaly: bool, trace: Path | None, device: torch.device) -> Iterator[None]:
    """Runs the body under torch's anomaly detection, its profiler, both or neither.

    Args:
        anomaly: an operation whose gradient is nan raises RuntimeError, after a trace of the call
            that made it.
        trace: where the profile is written, in Chrome's format; None: no profile.
        device: what the run works on; no other device is profiled.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":  # asked for on any other device, it would start CUDA
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with contextlib.ExitStack() as stack:
        if anomaly:
            stack.enter_context(torch.autograd.detect_anomaly())
        profile = (
            stack.enter_context(torch.profiler.profile(activities=kinds))
            if trace is not None
            else None
        )
        yield
    if profile is not None and trace is not None:
        # torch would write through a link at the file's name, or at that of its temporary file.
        with tempfile.TemporaryDirectory() as folder, atomic_write(trace) as file:
            profile.export_chrome_trace(f"{folder}/trace.json")
            with open(f"{folder}/trace.json", "rb") as written:
                shutil.copyfileobj(written, file)

"""Device, threads, determinism, memory."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fashionnet.errors import UserError
from fashionnet.system import devices

CPU = torch.device("cpu")
HAS_CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="this machine has no CUDA device")


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts back what `started` sets for the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "x")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool = False) -> None:
    """Lets torch say that it has so many CUDA devices, and MPS or not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(0, False, "cpu"), (1, False, "cuda"), (0, True, "mps"), (2, True, "cuda")],
)
def test_auto_takes_the_best_there_is(
    monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool, expected: str
) -> None:
    pretend(monkeypatch, cuda, mps)
    assert devices.pick_device("auto").type == expected
    assert devices.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["CUDA", "", "xpu:0"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(UserError, match=rf"^device={name} is not known; .* auto, cpu, cuda, mps"):
        devices.pick_device(name)


@pytest.mark.parametrize("name", ["cpu:x", "cuda:", "cuda:-1", "auto:1"])
def test_what_is_not_a_device_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend(monkeypatch, 1)
    with pytest.raises(UserError, match=rf"^device={name} is not a device name"):
        devices.pick_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:99", "mps"])
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend(monkeypatch, 0)
    with pytest.raises(UserError, match=rf"^device={name}: .*no (CUDA|MPS) device; device=auto"):
        devices.pick_device(name)


def test_a_cuda_device_beyond_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 2)
    assert devices.pick_device("cuda:1") == torch.device("cuda:1")
    for name in ("cuda:2", "cuda:99"):
        with pytest.raises(UserError, match=rf"^device={name}: there are 2 CUDA devices"):
            devices.pick_device(name)


def test_describe() -> None:
    with devices.started("cpu", 2, deterministic=False) as device:
        assert devices.describe(device) == "cpu (2 threads)"
    assert devices.describe(torch.device("mps")) == "mps"


@pytest.mark.parametrize("threads", [1, 3, None])
def test_threads_are_set_for_the_run_only(threads: int | None) -> None:
    before = torch.get_num_threads()
    with devices.started("cpu", threads, deterministic=False) as device:
        assert device == torch.device("cpu")
        assert torch.get_num_threads() == (threads or before)
    assert torch.get_num_threads() == before


def test_a_users_own_cublas_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with devices.started("cpu", 1, deterministic=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("flushed_before", [False, True])
def test_denormal_numbers_are_flushed_for_the_run_only(flushed_before: bool) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    small = torch.full((4,), 1e-30)
    try:
        torch.set_flush_denormal(flushed_before)
        with pytest.raises(KeyError), devices.started("cpu", 1, deterministic=False):
            assert not (small * 1e-10).any()
            raise KeyError  # also when the run fails
        assert bool((small * 1e-10).any()) is not flushed_before
    finally:
        torch.set_flush_denormal(False)


HAS_NEW_SWITCHES = hasattr(torch.backends.cuda.matmul, "fp32_precision")
NEW_SWITCHES = ("generic", "cudnn", "mkldnn", "cuda.matmul", "cudnn.conv", "mkldnn.matmul")


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_as_asked_for_and_as_before_afterwards(tf32: bool) -> None:
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    assert len(set(before)) == 2  # torch's own defaults differ, so this shows each put back
    with devices.started("cpu", 1, deterministic=False, tf32=tf32):
        assert [backend.allow_tf32 for backend in backends] == [tf32, tf32]
    assert [backend.allow_tf32 for backend in backends] == before


def newer_switches() -> dict[str, Any]:
    backends: Any = torch.backends
    return {
        "generic": backends,
        "cudnn": backends.cudnn,
        "mkldnn": backends.mkldnn,
        "cuda.matmul": backends.cuda.matmul,
        "cudnn.conv": backends.cudnn.conv,
        "cudnn.rnn": backends.cudnn.rnn,
        "mkldnn.matmul": backends.mkldnn.matmul,
        "mkldnn.conv": backends.mkldnn.conv,
    }


@pytest.mark.skipif(not HAS_NEW_SWITCHES, reason="this torch has the older switches alone")
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("value", ["ieee", "tf32", "none"])
@pytest.mark.parametrize("which", NEW_SWITCHES)
def test_a_callers_newer_switches_do_not_count_in_a_run_and_come_back(
    which: str, value: str, tf32: bool
) -> None:
    switches = newer_switches()
    before = {name: switch.fp32_precision for name, switch in switches.items()}
    try:
        switches[which].fp32_precision = value
        changed = {name: switch.fp32_precision for name, switch in switches.items()}
        with devices.started("cpu", 1, deterministic=False, tf32=tf32):
            # torch's own exporters read these, and fail where the two kinds disagree.
            assert torch.backends.cuda.matmul.allow_tf32 is tf32
            assert torch.backends.cudnn.allow_tf32 is tf32
            for name in ("cuda.matmul", "cudnn.conv", "cudnn.rnn"):
                assert (switches[name].fp32_precision == "tf32") is tf32
            for name in ("mkldnn.matmul", "mkldnn.conv"):  # the CPU's products keep all bits
                assert switches[name].fp32_precision in ("none", "ieee")
        assert {name: switch.fp32_precision for name, switch in switches.items()} == changed
    finally:
        for name, switch in switches.items():
            switch.fp32_precision = before[name]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_of_products_is_as_before_afterwards(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with devices.started("cpu", 1, deterministic=False):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_cuda_that_cannot_be_initialized_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable\nmore")

    pretend(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "init", fail)
    with (
        pytest.raises(UserError, match=r"^device=cuda cannot be used: .*unavailable; device=cpu"),
        devices.started("cuda", 1, deterministic=False),
    ):
        pass


def test_everything_that_a_start_changes_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for deterministic in (False, True):
            with devices.started("cpu", 1, deterministic):
                assert (cudnn.benchmark, cudnn.deterministic) == (False, deterministic)
                assert torch.are_deterministic_algorithms_enabled() is deterministic
                assert not torch.is_deterministic_algorithms_warn_only_enabled()
                assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (
                    ":4096:8" if deterministic else None
                )
            assert (cudnn.benchmark, cudnn.deterministic) == (True, True)
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    finally:
        torch.use_deterministic_algorithms(False)


def test_peak_memory_is_that_since_the_restart() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"this system cannot restart the measurement of the peak: {error}")
    size = 100 * 2**20
    devices.restart_peak_memory(CPU)
    before = devices.peak_memory_bytes()
    # Pages of its own: a tensor may be given memory that an earlier test freed and that the
    # allocator kept, and then nothing rises.
    with mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        with_block = devices.peak_memory_bytes()
    assert devices.peak_memory_bytes() > before + 0.9 * size
    with devices.started("cpu", 1, deterministic=False):
        after = devices.peak_memory_bytes()
    assert with_block > before + 0.9 * size
    assert after < with_block - 0.9 * size
    assert 10 * 2**20 < after < 2**40  # bytes


def test_peak_memory_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(Path, "write_text", missing)
    devices.restart_peak_memory(CPU)
    assert devices.peak_memory_bytes() > 10 * 2**20
    in_kilobytes = devices.peak_memory_bytes()
    monkeypatch.setattr(sys, "platform", "darwin")  # counts in bytes
    assert devices.peak_memory_bytes() <= in_kilobytes / 1000


def test_platform_name_says_what_bits_depend_on() -> None:
    name = devices.platform_name()
    assert torch.backends.cpu.get_cpu_capability() in name
    assert len(name.split()) >= 3


@pytest.mark.gpu
@needs_cuda
def test_cuda_is_picked_and_described() -> None:
    assert devices.pick_device("auto").type == "cuda"
    assert torch.cuda.get_device_name(0) in devices.describe(devices.pick_device("cuda"))
    with pytest.raises(UserError, match=r"^device=cuda:99: there are \d+ CUDA devices"):
        devices.pick_device("cuda:99")


@pytest.mark.gpu
@needs_cuda
def test_a_start_on_cuda_restarts_its_peak() -> None:
    held = torch.cuda.memory_allocated()  # by other tests of this process
    block = torch.ones(2**24, device="cuda")
    del block
    with devices.started("cuda", 1, deterministic=False):
        assert torch.cuda.max_memory_allocated() < held + 2**24


@pytest.mark.parametrize(
    ("asked", "recorded", "name"),
    [
        (None, "cpu", "cpu"),
        (None, "cuda:3", "cuda"),
        (None, "mps:0", "auto"),
        (None, "a word", "auto"),
        (None, None, "auto"),
        ("cpu", "cuda:0", "cpu"),
    ],
)
def test_a_run_is_looked_at_on_its_own_kind_of_device_where_that_is_here(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, recorded: object, name: str
) -> None:
    pretend(monkeypatch, 1)
    assert devices.device_of_run(asked, recorded) == name


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC", "535.129.03"),
        ("NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
    ],
)
def test_the_drivers_version_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, version: str
) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(devices, "_DRIVER_FILE", tmp_path / "version")
    assert devices._driver_version() == version


def test_only_a_gpu_has_facts() -> None:
    assert devices.gpu_facts(CPU) is None


def test_arithmetic_depends_on_the_gpu_and_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(("H100", "H200", "H200", "H200"))
    monkeypatch.setattr(devices, "gpu_facts", lambda _: {"name": next(names)})
    device = torch.device("cuda")
    found = [devices.arithmetic(device), devices.arithmetic(device)]
    with devices.started("cpu", 1, False, tf32=True):
        found.append(devices.arithmetic(device))
    with devices.started("cpu", 1, False, tf32=False):
        found.append(devices.arithmetic(device))
    with devices.started("cpu", 1, False):
        found.append(devices.arithmetic(CPU))
    with devices.started("cpu", 1, False, precision="bfloat16"):
        assert devices.arithmetic(CPU) != found[4]
    assert all(a != b for i, a in enumerate(found[:3]) for b in found[i + 1 : 3])
    assert found[2] != found[3] != found[4]

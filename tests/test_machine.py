import os
import time
from pathlib import Path

import pytest
import torch

from moescope.kernels import cpu
from moescope.machine import (
    EnergyMeter,
    Machine,
    last_level_cache,
    measure_gemm_peak,
    measure_native_gemm_peak,
    measure_read_bandwidth,
    memory,
)

GIBIBYTE = 2**30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_available_memory_is_the_kernels_estimate(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal:  9 kB\nMemAvailable:     2048 kB\n"})
    assert memory(tmp_path)[1] == 2048 * 1024


@pytest.mark.parametrize(
    ("limit_file", "used_file"),
    [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ],
)
def test_a_containers_limit_bounds_memory(tmp_path: Path, limit_file, used_file) -> None:
    write(
        tmp_path / "sys/fs/cgroup",
        {limit_file: f"{GIBIBYTE}\n", used_file: f"{GIBIBYTE // 4}\n"},
    )
    assert memory(tmp_path) == (GIBIBYTE, GIBIBYTE * 3 // 4)
    stat = Path(limit_file).parent / "memory.stat"
    files = f"anon 7\ninactive_file {GIBIBYTE // 16}\nactive_file {GIBIBYTE // 16}\n"
    write(tmp_path / "sys/fs/cgroup", {str(stat): files})
    assert memory(tmp_path) == (GIBIBYTE, GIBIBYTE * 7 // 8)


@pytest.mark.parametrize(
    ("line", "folder", "limit_file", "used_file"),
    [
        ("0::/user.slice/run.scope", "user.slice/run.scope", "memory.max", "memory.current"),
        (
            "4:memory:/outer/inner",
            "memory/outer/inner",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
    ],
)
def test_the_narrowest_of_a_processs_groups_counts(
    tmp_path: Path, line: str, folder: str, limit_file: str, used_file: str
) -> None:
    write(tmp_path / "proc/self", {"cgroup": f"9:name=systemd:/\n{line}\n"})
    inner = tmp_path / "sys/fs/cgroup" / folder
    write(inner, {limit_file: f"{GIBIBYTE}\n", used_file: f"{GIBIBYTE // 4}\n"})
    outer = {limit_file: f"{2 * GIBIBYTE}\n", used_file: f"{GIBIBYTE // 2}\n"}
    write(inner.parent, outer)
    assert memory(tmp_path) == (GIBIBYTE, GIBIBYTE * 3 // 4)
    write(inner.parent, {used_file: f"{GIBIBYTE * 7 // 4}\n"})
    assert memory(tmp_path) == (GIBIBYTE, GIBIBYTE // 4)


def test_a_container_without_limit_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "sys/fs/cgroup", {"memory.max": "max\n", "memory.current": "5\n"})
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory(tmp_path) == (total, total)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the kernel's own list is Linux's")
def test_instruction_sets_are_those_the_kernel_lists() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    known = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}
    assert known & set(Machine.detect().instruction_sets) == known & flags


def test_a_product_takes_no_less_time_than_the_peak_says() -> None:
    """A tenfold margin holds on a machine that does other work meanwhile."""
    start, end = (torch.zeros(1024, 1024) for _ in range(2))
    peak = measure_gemm_peak(torch.float32, seconds=0.1)
    with torch.profiler.profile() as profile:
        for _ in range(20):
            torch.mm(start, end)
    event = next(event for event in profile.key_averages() if event.key == "aten::mm")
    rate = 2 * 1024**3 * event.count / (event.cpu_time_total * 1e-6)
    assert peak / 10 < rate < peak * 10


def test_memory_reads_have_a_rate_of_this_age() -> None:
    assert 1e8 < measure_read_bandwidth(seconds=0.1) < 1e13


@pytest.mark.skipif(not cpu.available(), reason="the native kernels are not built")
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_a_native_product_takes_no_less_time_than_the_peak_says(weight_format: str) -> None:
    weights, states = cpu.pack(torch.randn(2048, 2048), weight_format), torch.randn(512, 2048)
    peak = measure_native_gemm_peak(weight_format, seconds=0.1)
    start = time.perf_counter()
    for _ in range(10):
        cpu.linear(weights, 2048, states)
    rate = 10 * 2 * 512 * 2048**2 / (time.perf_counter() - start)
    assert peak / 10 < rate < peak * 10


def test_the_largest_cache_is_the_last(tmp_path: Path) -> None:
    folder = "sys/devices/system/cpu/cpu0/cache"
    write(tmp_path, {f"{folder}/index{n}/size": f"{size}K\n" for n, size in ((0, 48), (3, 32768))})
    assert last_level_cache(tmp_path) == 2**25
    assert last_level_cache(tmp_path / "nothing") == 2**25


def test_joules_are_those_of_all_packages_across_an_overflow(tmp_path: Path) -> None:
    """A core's domain is part of its package's, so it is not added."""
    folder = "sys/class/powercap/intel-rapl"
    domains = {":0": (900_000, 100_000), ":1": (5_000_000, 7_000_000), ":0:0": (1, 99_000_000)}
    for name, (start, _) in domains.items():
        write(tmp_path, {f"{folder}{name}/energy_uj": f"{start}\n"})
        write(tmp_path, {f"{folder}{name}/max_energy_range_uj": "1000000\n"})
    meter = EnergyMeter(tmp_path)
    for name, (_, end) in domains.items():
        write(tmp_path, {f"{folder}{name}/energy_uj": f"{end}\n"})
    assert meter.joules() == pytest.approx(0.2 + 2.0)


def test_a_machine_that_tells_no_joules_tells_none(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).joules() is None
    write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": "not for you"})
    assert EnergyMeter(tmp_path).joules() is None

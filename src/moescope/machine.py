"""What this machine has, and how fast it can possibly be: the limits that results are held to."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moescope.errors import UserError
from moescope.kernels import cpu, fusion

CPU = torch.device("cpu")

INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx512_f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "avx_vnni": "avx_vnni",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "neon": "neon",
    "bf16": "neon_bf16",
    "i8mm": "neon_i8mm",
    "sve": "sve",
    "sme": "sme",
}
"""PyTorch's name of each instruction set that matters to matrix products, and the usual one."""


UNTOLD_CACHE = 32 * 2**20


@dataclass(frozen=True)
class Machine:
    """The parts of a machine that decide what runs on it and how fast."""

    cpu: str
    architecture: str
    cores: int  # that this process may use
    instruction_sets: tuple[str, ...]
    memory_total: int  # bytes, no more than a container's limit
    memory_available: int  # bytes
    torch_version: str
    torch_threads: int
    onednn: bool
    cxx: str | None  # path of the C++ compiler that fusing kernels needs
    native_instruction_set: str | None  # of the native CPU kernels; None if they are not built
    gpu: str | None
    gpu_memory_total: int | None  # bytes

    @classmethod
    def detect(cls) -> "Machine":
        """Look at the machine that this process runs on; nothing is measured."""
        capabilities = torch.cpu.get_capabilities()
        memory_total, memory_available = memory()
        gpu, gpu_memory = None, None
        if torch.cuda.is_available():
            gpu, gpu_memory = torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1]
        return cls(
            cpu=str(capabilities.get("cpu_name", "unknown")).strip(),
            architecture=str(capabilities["architecture"]),
            cores=_usable_cores(),
            instruction_sets=tuple(
                name for key, name in INSTRUCTION_SETS.items() if capabilities.get(key)
            ),
            memory_total=memory_total,
            memory_available=memory_available,
            torch_version=torch.__version__,
            torch_threads=torch.get_num_threads(),
            onednn=torch.backends.mkldnn.is_available(),
            cxx=fusion.compiler(),
            native_instruction_set=cpu.instruction_set(),
            gpu=gpu,
            gpu_memory_total=gpu_memory,
        )

    @property
    def has_fast_bf16(self) -> bool:
        """Whether the CPU has instructions made for bf16 products; else float32 is faster."""
        made_for_bf16 = {"avx512_bf16", "amx_bf16", "neon_bf16"}
        return not made_for_bf16.isdisjoint(self.instruction_sets)


def choose_device(name: str | None) -> torch.device:
    """Return the device that a process computes on.

    Args:
        name: `cpu`, `cuda` or one GPU, `cuda:1`. `cuda` is the GPU of the process's number on its
            node where torchrun started several (`LOCAL_RANK`), else the first. None is `cuda`
            where there is a GPU, else `cpu`.

    Raises:
        UserError: there is no such device.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, number = (name or ("cuda" if there else "cpu")).partition(":")
    if kind == "cpu" and not number:
        return torch.device("cpu")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise UserError(f"device is {name!r}; choose from cpu, cuda and cuda:N")
    if not there:
        raise UserError(
            f"device is {name!r}, but PyTorch {torch.__version__} finds no GPU here; leave it out "
            "or say cpu"
        )
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= there:
        raise UserError(
            f"there is no cuda:{index}: PyTorch finds {there} GPUs here, and each process takes one"
        )
    return torch.device("cuda", index)


def measure_gemm_peak(
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 1.0,
    device: torch.device = CPU,
) -> float:
    """Measure the FLOP/s that matrix products of `dtype` reach on a device.

    The peak is the best, over squares of 256, 1024 and 2048 (and 8192 on a GPU), of the median
    rate; a product of `n x n` matrices counts `2 * n**3` operations. Squares of which one product
    would fill the time are left out: without instructions for it, bf16 is some 40 times slower
    than float32.

    Args:
        dtype: type of both factors and of the product.
        seconds: time to spend, about.
        device: that computes.
    """
    sizes = (256, 1024, 2048) if device.type == "cpu" else (2048, 8192)
    rates: list[float] = []
    for size in sizes:
        if rates and 2 * size**3 / rates[-1] > seconds:
            break
        generator = torch.Generator().manual_seed(0)
        left = torch.randn(size, size, generator=generator).to(device, dtype)
        right = torch.randn(size, size, generator=generator).to(device, dtype)
        product = torch.empty_like(left)
        multiply = _writes_product(left, right, product)
        rates.append(2 * size**3 / _median_time(multiply, seconds / len(sizes)))
    return max(rates)


def measure_native_gemm_peak(weight_format: str, seconds: float = 1.0) -> float:
    """Measure the operations/s of the native kernels in products with many rows.

    512 rows times a matrix of 2048 x 2048; the extension must be there.

    Args:
        weight_format: `int8` or `int4`.
        seconds: time to spend, about.
    """
    size, rows = 2048, 512
    generator = torch.Generator().manual_seed(0)
    weights = cpu.pack(torch.randn(size, size, generator=generator), weight_format)
    states = torch.randn(rows, size, generator=generator)
    taken = _median_time(lambda: cpu.linear(weights, size, states), seconds)
    return 2 * size * size * rows / taken


def last_level_cache(root: Path = Path("/")) -> int:
    """Return the bytes of the largest cache that a core reaches; 32 MiB where nothing tells.

    Args:
        root: where the kernel's `sys` folder is found.
    """
    sizes = [
        int(file.read_text().strip().removesuffix("K")) * 1024
        for file in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=UNTOLD_CACHE)


def measure_read_bandwidth(seconds: float = 1.0) -> float:
    """Measure the bytes/s at which all threads together sum up 512 MiB, more than caches hold.

    Args:
        seconds: time to spend, about.
    """
    block = torch.zeros(2**29 // 8, dtype=torch.int64)
    return block.nbytes / _median_time(block.sum, seconds)


def _writes_product(left: Tensor, right: Tensor, product: Tensor) -> Callable[[], object]:
    def multiply() -> None:
        torch.mm(left, right, out=product)
        if product.is_cuda:  # which else goes on while the next one is asked for
            torch.cuda.synchronize(product.device)

    return multiply


def _median_time(action: Callable[[], object], seconds: float) -> float:
    """Median seconds of one call, over calls that fill `seconds`; at least three."""
    action()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class EnergyMeter:
    """Counts the joules that all processors take, as Linux tells by RAPL (`powercap`).

    Args:
        root: where the kernel's `sys` folder is found.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        domains = (root / "sys/class/powercap").glob("intel-rapl:*")
        self._domains = [domain for domain in domains if domain.name.count(":") == 1]
        self._start = self._read()

    def joules(self) -> float | None:
        """Return what was taken since the meter was made; None where the machine does not tell."""
        now = self._read()
        if not now or len(now) != len(self._start):
            return None
        taken = 0
        for domain, start, end in zip(self._domains, self._start, now, strict=True):
            span = _integer_in(domain / "max_energy_range_uj") or 0
            taken += end - start if end >= start else end - start + span
        return taken / 1e6

    def _read(self) -> list[int]:
        """Microjoules of each package; empty unless all can be read."""
        counts = [_integer_in(domain / "energy_uj") for domain in self._domains]
        return [] if None in counts else [count for count in counts if count is not None]


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return total and available bytes, bounded by the container's limit where there is one.

    Files that the system keeps in memory count as available.

    Args:
        root: where the kernel's `proc` and `sys` folders are found.
    """
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = available = physical
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    for group in _control_groups(root):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _integer_in(group / limit_file), _integer_in(group / used_file)
            if limit is not None and used is not None and limit < physical:
                used -= _cached_files(group / "memory.stat")
                total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _control_groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's memory group and of those around it, of v2 and v1."""
    mounted = {"": root / "sys/fs/cgroup", "memory": root / "sys/fs/cgroup/memory"}
    places = dict.fromkeys(mounted, "/")
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, place = line.split(":", 2)
        if "memory" in controllers.split(",") or not controllers:
            places[controllers and "memory"] = place
    for kind, place in places.items():
        group = mounted[kind] / place.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if mounted[kind] in folder.parents)
        yield mounted[kind]


def _cached_files(stat: Path) -> int:
    """Bytes of files that a container has in memory; 0 where nothing tells."""
    if not stat.exists():
        return 0
    fields = dict(line.split(maxsplit=1) for line in stat.read_text().splitlines())
    return sum(int(fields.get(name, 0)) for name in ("inactive_file", "active_file"))


def _integer_in(path: Path) -> int | None:
    """Return the number a kernel file holds; None if it is absent or says `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None

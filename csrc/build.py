"""Builds the native CPU kernels into `src/moescope/kernels/`: `python csrc/build.py`.

Calls the C++ compiler itself: a dozen small files do not need a build system, and so a build needs
nothing but a compiler and nanobind. Each instruction set has its own object file, compiled with
its own flags; which one runs is decided when the extension is loaded.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "_native"
STABLE_ABI = sys.version_info >= (3, 12) and not sysconfig.get_config_var("Py_GIL_DISABLED")
"""Whether one extension serves every Python from 3.12 on; 3.11 has its own."""
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra"]
SOURCES = [
    *("pool", "memory", "file", "isa", "weights", "gguf_blocks", "settling", "expert_memory"),
    *("attend", "latent_attention", "grouped_attention"),
    *("linear", "feed_forward", "layer", "decoder", "sampling", "quantize"),
]
BINDINGS = ("module", "bind_weights", "bind_attention", "bind_layers")
AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"),
    # GCC 12 takes its own header's registers of any content for a mistake.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
X86_KERNELS = {
    "kernels_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avxvnni": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "kernels_avx512": AVX512,
    "kernels_avx512bf16": [*AVX512, "-mavx512bf16"],
    "kernels_amx": [*AVX512, "-mamx-tile", "-mamx-int8"],
    "kernels_amx_attention": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
"""Kernel files of x86 and what they are compiled with; everything else is for any processor."""

LAYOUT = ("isa.h", "weight_format.h", "records.h", "weights.h", "weights.cpp", "gguf_blocks.cpp")
"""What decides how packed weights lie in memory: files of them are read by the same code only."""


def build_native(root: Path) -> Path | None:
    """Compile the extension of the project at `root` and return its path.

    Returns None, after printing why in a sentence, where there is no C++ compiler or it fails:
    moescope then runs on PyTorch alone. `CXX` names another compiler, `CXXFLAGS` are added.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or _find_compiler()
    if not compiler:
        print(
            "moescope: no C++ compiler was found, so the native CPU kernels are left out and "
            "PyTorch computes instead, several times slower (install g++ or clang++ and then "
            "moescope again)"
        )
        return None
    csrc, build = root / "csrc", root / "build" / "native"
    build.mkdir(parents=True, exist_ok=True)
    suffix = ".abi3.so" if STABLE_ABI else sysconfig.get_config_var("EXT_SUFFIX")
    target = root / "src" / "moescope" / "kernels" / (NAME + suffix)
    try:
        _compile(compiler, csrc, build, target)
    except (subprocess.CalledProcessError, OSError) as error:
        details = (getattr(error, "stderr", None) or str(error)).strip()
        print(
            f"moescope: {compiler[0]} could not build the native CPU kernels, so PyTorch computes "
            f"instead, several times slower; it said:\n{details}"
        )
        return None
    return target


def _find_compiler() -> list[str]:
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return [found] if found else []


def _compile(compiler: list[str], csrc: Path, build: Path, target: Path) -> None:
    """Compile what changed, then link into `target` in one step, so that it is whole or absent."""
    import nanobind

    nanobind_dir = Path(nanobind.__file__).parent
    units = kernel_units(csrc, platform.machine())
    flags = units[csrc / "pool.cpp"]
    # Not `-I`: warnings in others' headers are not ours to mend.
    binding = [
        f"-isystem{sysconfig.get_path('include')}",
        f"-isystem{nanobind_dir / 'include'}",
        f"-isystem{nanobind_dir / 'ext' / 'robin_map' / 'include'}",
        "-DNB_COMPACT_ASSERTIONS",
        "-fno-strict-aliasing",
        *(["-DPy_LIMITED_API=0x030C0000"] if STABLE_ABI else []),
    ]
    for name in BINDINGS:
        units[csrc / f"{name}.cpp"] = flags + binding
    units[nanobind_dir / "src" / "nb_combined.cpp"] = flags + binding + ["-w"]
    objects = compile_units(compiler, units, build)
    partial = target.with_name(f".{target.name}.partial")
    link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--gc-sections"]
    command = [*compiler, *flags, "-shared", *map(str, objects), *link, "-pthread"]
    subprocess.run([*command, "-o", str(partial)], check=True, capture_output=True, text=True)
    partial.replace(target)


def kernel_units(csrc: Path, machine: str) -> dict[Path, list[str]]:
    """Return the source files for a kind of processor, each with its flags, but for the binding."""
    flags = [*COMMON, *shlex.split(os.environ.get("CXXFLAGS", "")), f"-I{csrc}"]
    kernels: dict[str, list[str]] = {"kernels_portable": []}
    if machine.lower() in ("x86_64", "amd64"):
        kernels |= X86_KERNELS
        flags.append("-DMOESCOPE_X86")
    units = {csrc / f"{name}.cpp": flags for name in SOURCES}
    layout = hashlib.sha256(b"".join((csrc / name).read_bytes() for name in LAYOUT)).hexdigest()
    units[csrc / "weights.cpp"] = [*flags, f'-DMOESCOPE_LAYOUT="{layout[:16]}"']
    return units | {csrc / f"{name}.cpp": flags + extra for name, extra in kernels.items()}


def compile_units(compiler: list[str], units: dict[Path, list[str]], build: Path) -> list[Path]:
    """Compile what changed, several files at once, and return the object files.

    Raises:
        subprocess.CalledProcessError: the compiler refuses a file.
    """
    headers = [Path(__file__), *Path(__file__).parent.glob("*.h")]

    def compile_unit(source: Path) -> Path:
        built = build / f"{source.stem}.o"
        command = [*compiler, *units[source], "-c", str(source), "-o", str(built)]
        stamp = built.with_suffix(".command")
        parts = [source] if source.stem == "nb_combined" else [source, *headers]
        newest = max(part.stat().st_mtime for part in parts)
        if (
            built.exists()
            and built.stat().st_mtime >= newest
            and stamp.exists()
            and stamp.read_text() == shlex.join(command)
        ):
            return built
        stamp.unlink(missing_ok=True)
        subprocess.run(command, check=True, capture_output=True, text=True)
        stamp.write_text(shlex.join(command))
        return built

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(compile_unit, units))


if __name__ == "__main__":
    built = build_native(Path(__file__).resolve().parent.parent)
    if built is None:
        sys.exit(1)
    print(built)

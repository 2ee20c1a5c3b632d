"""Builds the kernels with the compiler's checks and runs their tests: `python csrc/sanitize.py`.

Names of checks may follow: `warnings` (all files compile without any), `address` (the extension
under AddressSanitizer and UndefinedBehaviorSanitizer runs tests/kernels and tests/native), `amx`
(tests/kernels on an extension whose AMX tiles are C++, csrc/tests/amx_emulated.h), `thread`
(csrc/tests/exercise.cpp under ThreadSanitizer: Python itself is not clean there) and `arm64` (the
same program, cross-compiled, under qemu). Without names, all run for which the tools are there.
Minutes each, `address` half an hour on two cores; needs g++, for arm64 also
g++-aarch64-linux-gnu and qemu-user.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import build

ROOT = Path(__file__).resolve().parent.parent
CSRC, SCRATCH = ROOT / "csrc", ROOT / "build" / "sanitize"
CHECKED = "-O1 -g1 -fno-omit-frame-pointer"
# The checks left out are of every access of the unrolled loops: compiling those took ten minutes.
# AddressSanitizer sees what the first two see.
ADDRESS = (
    "-fsanitize=address,undefined -fno-sanitize=null,object-size,alignment "
    "-fno-sanitize-recover=undefined"
)
ARM64 = "aarch64-linux-gnu"


def warnings() -> None:
    """Compile with the flags of a release; any warning is an error."""
    _extension("warnings", "-Werror")


def address() -> None:
    """Run the kernels' Python tests on an extension that checks its memory and its arithmetic."""
    package = _extension("address", f"{CHECKED} {ADDRESS}")
    libraries = [_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much until the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": "1",
    }
    tests = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-n", "auto"]
    # `-s`: a report is printed right before the end, where pytest's own capture would lose it.
    # What PyTorch compiles ("fused") is not ours, and takes many minutes so.
    chosen = ["-k", "not fused", "-o", "faulthandler_timeout=3600", "tests/kernels", "tests/native"]
    subprocess.run([*tests, *chosen], cwd=ROOT, env=environment, check=True)


def amx() -> None:
    """Run the kernels' Python tests with AMX on a processor that has AVX-512 alone."""
    package = _extension("amx", f"-include {CSRC / 'tests' / 'amx_emulated.h'}")
    environment = {**os.environ, "PYTHONPATH": str(package)}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    subprocess.run([*tests, "tests/kernels"], cwd=ROOT, env=environment, check=True)


def thread() -> None:
    """Run the C++ program that calls the kernels from many threads."""
    flags = f"{CHECKED} -fsanitize=thread"
    subprocess.run([_exercise("thread", ["g++"], flags, platform.machine())], check=True)


def arm64() -> None:
    """Run the same program as an ARM64 machine would."""
    program = _exercise("arm64", [f"{ARM64}-g++"], "-Werror", "aarch64")
    subprocess.run(["qemu-aarch64", "-L", f"/usr/{ARM64}", program], check=True)


def _exercise(name: str, compiler: list[str], flags: str, machine: str) -> Path:
    """Build the C++ program and return it."""
    os.environ["CXXFLAGS"] = flags
    folder = SCRATCH / name
    folder.mkdir(parents=True, exist_ok=True)
    units = build.kernel_units(CSRC, machine)
    units[CSRC / "tests" / "exercise.cpp"] = units[CSRC / "pool.cpp"]
    try:
        objects = build.compile_units(compiler, units, folder)
    except subprocess.CalledProcessError as error:
        sys.exit(error.stderr)
    program = folder / "exercise"
    subprocess.run([*compiler, *flags.split(), *objects, "-pthread", "-o", program], check=True)
    return program


def _extension(name: str, flags: str) -> Path:
    """Build the extension in a package of its own and return where that is imported from."""
    os.environ |= {"CXX": "g++", "CXXFLAGS": flags}
    folder = SCRATCH / name
    _mirror_package(folder)
    if build.build_native(folder) is None:
        sys.exit(1)
    return folder / "src"


def _mirror_package(folder: Path) -> None:
    """Link to the sources from a folder of its own, so that the extension in use stays."""
    shutil.rmtree(folder / "src", ignore_errors=True)
    for source in (ROOT / "src" / "moescope").rglob("*"):
        made = "__pycache__" in source.parts or source.name.startswith("_native.c")
        if source.is_file() and not made:
            target = folder / "src" / source.relative_to(ROOT / "src")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
    (folder / "csrc").unlink(missing_ok=True)
    (folder / "csrc").symlink_to(CSRC)


def _library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    return found.stdout.strip()


CHECKS = {
    "warnings": warnings,
    "thread": thread,
    "arm64": arm64,
    "amx": amx,
    "address": address,
}


def main(names: list[str]) -> None:
    """Run checks by name, or all."""
    unknown = set(names) - set(CHECKS)
    if unknown:
        sys.exit(f"there is no check {unknown.pop()!r}; choose from {', '.join(CHECKS)}")
    for name in names or CHECKS:
        if not names and name == "arm64" and shutil.which(f"{ARM64}-g++") is None:
            print("arm64: left out, there is no cross compiler", flush=True)
            continue
        CHECKS[name]()
        print(f"{name}: clean", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""A model larger than the memory it may use: `--stream-experts` beside llama.cpp's mapped file.

    python benchmarks/streaming.py --json streaming.json
    python benchmarks/streaming.py --layers 9 --limit 1.8

Shape F of `cpu_inference.py` is written as GGUF in Q4_0 (8.8 GB) and run three times, by a process
each: in memory; with streamed experts in a control group of 5 GB, in which the pack is made, too;
and by llama.cpp in the same group. The texts of the first two must be the same. Before each run the
file system's cache is emptied of the files. It wants root, or a control group that can be written,
and twice the model's size on the disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cpu_inference import SHAPES, weight_shapes
from peers import LlamaCpp, Moescope, Runner, random_weights

import moescope
from moescope.families import read_config
from moescope.formats.gguf.writer import write_gguf
from moescope.kernels import cpu

GROUP = "moescope-streaming"
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
ENGINES = ("streamed", "llama.cpp", "memory")


@contextmanager
def control_group(limit: int) -> Generator[Path]:
    """Make a group of processes that together use so many bytes, the files' cache included."""
    v1 = V1.is_dir()
    group = (V1 if v1 else V2) / GROUP
    try:
        group.mkdir(exist_ok=True)
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit))
    except OSError as error:
        raise SystemExit(
            f"no control group of {limit} bytes can be made at {group} ({error.strerror}); run it "
            f"inside one that holds {limit} bytes, with --limit 0"
        ) from error
    try:
        yield group
    finally:
        group.rmdir()


def peak(group: Path) -> int:
    """Return the most that a group has used."""
    files = (group / name for name in ("memory.max_usage_in_bytes", "memory.peak"))
    return next((int(file.read_text()) for file in files if file.exists()), 0)


def write_model(path: Path, layers: int) -> None:
    """Write random weights in Q4_0, unless they are there already."""
    if path.exists():
        return
    config = read_config(SHAPES["F"] | {"num_hidden_layers": layers})
    shapes = weight_shapes(config)
    unfinished = path.with_suffix(".part")
    write_gguf(config, shapes, lambda n: random_weights(shapes[n]), unfinished, "Q4_0")
    unfinished.rename(path)


def forget(folder: Path) -> None:
    """Empty the file system's cache of the files in a folder."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@torch.inference_mode()
def run(engine: str, path: Path, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Open the model, read a prompt and continue it, in this process."""
    prompt = torch.randint(102400, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    runner: Runner
    if engine == "llama.cpp":
        runner = LlamaCpp(path, cpu.threads(), 1, prompt_tokens + new_tokens + 1, mapped=True)
    else:
        model = moescope.load(path, stream_experts=engine == "streamed")
        runner = Moescope(model.network)
    opened = time.perf_counter()
    runner.read(prompt)
    read = time.perf_counter()
    before = cpu.expert_counts()
    text: list[int] = []
    for _ in range(new_tokens):
        if isinstance(runner, Moescope):
            text.append(runner.tokens[0])
        runner.step()
    seconds = time.perf_counter() - read
    after = cpu.expert_counts()
    return {
        "open_seconds": opened - start,
        "prefill": prompt_tokens / (read - opened),
        "decode": new_tokens / seconds,
        "text": text,
        "experts": asdict(after),
        "visits_per_token": (after.visits - before.visits) / new_tokens,
        "hits": (after.hits - before.hits) / max(1, after.visits - before.visits),
        "bytes_read_per_token": (after.bytes_read - before.bytes_read) / new_tokens,
        "disk_bytes": _disk_bytes(),
    }


def _disk_bytes() -> int:
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


def apart(arguments: list[str], group: Path | None) -> dict[str, Any]:
    """Run an engine in a process of its own, in a control group if there is one."""

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, preexec_fn=join, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    folder: Path, engines: list[str], limit: int, options: list[str], say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Run all engines, those that must not use more than `limit` in a control group."""
    found: dict[str, dict[str, Any]] = {}
    for engine in engines:
        arguments = ["--engine", engine, *options]
        if engine == "memory" or not limit:
            forget(folder)
            found[engine] = apart(arguments, None)
        else:
            with control_group(limit) as group:
                if engine == "streamed":
                    say("packing")
                    packed = apart([*arguments, "--new-tokens", "1"], group)
                    say(f"packed and opened in {packed['open_seconds']:.0f} s")
                forget(folder)
                found[engine] = apart(arguments, group)
                found[engine]["peak_bytes"] = peak(group)
        row = found[engine]
        say(
            f"{engine}: prefill {row['prefill']:.2f}, decode {row['decode']:.2f} tokens/s; "
            f"{row['hits']:.1%} of {row['visits_per_token']:.0f} visits a token hit, "
            f"{row['bytes_read_per_token'] / 1e6:.0f} MB read a token; "
            f"{row['disk_bytes'] / 1e9:.1f} GB from the disk, "
            f"peak {row.get('peak_bytes', 0) / 1e9:.2f} GB"
        )
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--limit", type=float, default=5.0, help="GB; 0 makes no control group")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--folder", type=Path, help="where the files are kept from run to run")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--engine", choices=ENGINES, help="run this one here, and nothing else")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"F-{given.layers}-Q4_0.gguf"
        if given.engine:
            print(json.dumps(run(given.engine, path, given.prompt_tokens, given.new_tokens)))
            return
        write_model(path, given.layers)
        counts = [given.prompt_tokens, given.new_tokens]
        options = ["--folder", str(folder), "--layers", str(given.layers)]
        options += ["--prompt-tokens", str(counts[0]), "--new-tokens", str(counts[1])]
        engines, limit = given.engines.split(","), int(given.limit * 1e9)
        found = measure(folder, engines, limit, options, lambda line: print(line, flush=True))
    if {"memory", "streamed"} <= set(found):
        same = found["memory"]["text"] == found["streamed"]["text"]
        print(f"the texts are {'the same' if same else 'NOT the same'}")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`moescope doctor`: what this machine has, and which paths will be used."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moescope.machine import Machine

SECONDS = 0.5
"""How long each rate is measured."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what this machine has, how fast it can be, and which paths will be used."""
    import torch

    from moescope.machine import Machine, measure_gemm_peak, measure_read_bandwidth

    machine = Machine.detect()
    rates = {
        "gemm_bfloat16_flops": measure_gemm_peak(torch.bfloat16, SECONDS),
        "gemm_float32_flops": measure_gemm_peak(torch.float32, SECONDS),
        "read_bytes_per_second": measure_read_bandwidth(SECONDS),
    }
    paths = _paths(machine)
    if as_json:
        print(json.dumps({**dataclasses.asdict(machine), **rates, "paths": paths}))
    else:
        _draw(machine, rates, paths)


def _paths(machine: "Machine") -> dict[str, str]:
    """Say in a few words each which of the possible ways will be taken here."""
    from moescope.native.pack_cache import packs_are_kept

    bf16_products = (
        "on instructions made for them"
        if machine.has_fast_bf16
        else "emulated, slower than float32"
    )
    training = (
        f"elementwise chains fused by {machine.cxx}"
        if machine.cxx
        else "elementwise chains one by one; faster with a C++ compiler (apt install g++)"
    )
    return {
        "bfloat16 products": bf16_products,
        "training": training,
        "--backend cpu": _native(machine.native_instruction_set),
        "packed weights": packs_are_kept(),
    }


def _native(instruction_set: str | None) -> str:
    """Say what `--backend cpu` computes with, and what it costs where that is not the best."""
    if instruction_set is None:
        return (
            "native kernels not built, so PyTorch computes on rounded weights: no memory saved, "
            "prompts and tokens several times slower (install g++ or clang++, then moescope again)"
        )
    costs = {
        "amx": "",
        "avx512bf16": "",
        "avx512": "",
        "avxvnni": ": tokens nearly as fast as with AVX-512, prompts about half",
        "avx2": ": tokens nearly as fast as with AVX-512, prompts about a quarter",
        "portable": ", plain C++: a twentieth of the speed that vector instructions give prompts",
    }
    return f"native kernels, {instruction_set}{costs[instruction_set]}"


def _draw(machine: "Machine", rates: dict[str, float], paths: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    gibibytes = 2**30
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "processor": f"{machine.cpu} ({machine.architecture}), {machine.cores} cores",
        "instruction sets": ", ".join(machine.instruction_sets) or "none that matter here",
        "memory": f"{machine.memory_total / gibibytes:.1f} GiB, "
        f"{machine.memory_available / gibibytes:.1f} GiB available",
        "GPU": "none"
        if machine.gpu is None or machine.gpu_memory_total is None
        else f"{machine.gpu}, {machine.gpu_memory_total / gibibytes:.0f} GiB",
        "PyTorch": f"{machine.torch_version}, {machine.torch_threads} threads, "
        f"oneDNN {'on' if machine.onednn else 'off'}",
        "measured, bfloat16": f"{rates['gemm_bfloat16_flops'] / 1e9:,.0f} GFLOP/s",
        "measured, float32": f"{rates['gemm_float32_flops'] / 1e9:,.0f} GFLOP/s",
        "measured, memory": f"{rates['read_bytes_per_second'] / 1e9:,.0f} GB/s read",
        **paths,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)

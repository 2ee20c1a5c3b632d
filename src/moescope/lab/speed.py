"""How fast a model would run on this machine: a few of its own layers, with random weights, timed.

A formula of bytes over bandwidth errs by factors on small models, which are bound by the calls of
each layer or sit in the caches, and on mixtures whose experts receive few rows each. So the parts
are timed at the model's own sizes: a sample of its layers, as many as read twice the last-level
cache for every token (all of them, where a model is that small), so that nothing is found there
that the whole model would not find. What a layer takes more is then multiplied by the number of
layers.

Where a sample's experts would be too many, it has fewer of them. Generating takes as long, since a
token visits as many; for a prompt, they are timed on fewer rows, so that each receives as many as
in the whole model.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moescope.config import ModelConfig
from moescope.kernels import cpu
from moescope.machine import (
    Machine,
    last_level_cache,
    measure_gemm_peak,
    measure_native_gemm_peak,
    measure_read_bandwidth,
)
from moescope.model.cache import Cache
from moescope.model.costs import Parameters, attention_flops, count_parameters, held_numbers
from moescope.model.decoder import CausalLM
from moescope.model.moe import MoE
from moescope.model.rope import RotaryEmbedding
from moescope.native.network import Packer
from moescope.native.weight_format import BITS_PER_WEIGHT, cache_bytes

PROMPT = 512
"""Tokens of the prompt that is read, and so of the context in which is generated."""
SAMPLE_WEIGHTS = 1 << 27
"""Weights of a sample's routed experts, about: they are made and packed within a second."""
CACHES_READ = 2
"""A token reads so many times the last-level cache, or everything."""
PYTORCH_CACHE_BYTES = 2
"""Of a number in the cache of `bf16`, with which PyTorch computes."""
LEAST_PROMPTS, MOST_PROMPTS = 3, 10
LEAST_STEPS, MOST_STEPS, WARM_STEPS = 32, 256, 8
ENOUGH_SECONDS = 0.3
"""Prompts, and steps, are repeated for so long if they are quick."""
PROBE_SECONDS = 0.5
KNOWN_ROUTERS = ("greedy", "group_limited_greedy", "noaux_tc")


@dataclass(frozen=True)
class Speed:
    """What to expect of one format of the weights.

    Attributes:
        format: `bf16` computes with PyTorch, `int8` and `int4` with the native kernels.
        decode: tokens a second, generated one after another behind the prompt.
        prefill: tokens a second of the prompt.
        decode_bytes: weights and cache that a generated token reads.
        decode_flops, prefill_flops: operations of a token.
        prefill_intensity: operations of a prompt for each byte of weights that it reads.
        decode_limit: tokens a second if `decode_bytes` came at the memory's rate and nothing
            else took time. A model that sits in the caches can be faster.
        prefill_limit: tokens a second if all operations ran as fast as large products do.
        layers, experts: that the sample had.
    """

    format: str
    decode: float
    prefill: float
    decode_bytes: int
    decode_flops: int
    prefill_flops: int
    prefill_intensity: float
    decode_limit: float
    prefill_limit: float
    layers: int
    experts: int


@dataclass(frozen=True)
class Prediction:
    """How fast a model would run here.

    Attributes:
        machine: the processor.
        threads: that compute.
        read_bandwidth: bytes/s from memory.
        gemm_peak: FLOP/s of large products, by format.
        prompt: tokens of the prompt.
        seconds: that finding out took.
        speeds: for each format that runs here.
    """

    machine: str
    threads: int
    read_bandwidth: float
    gemm_peak: dict[str, float]
    prompt: int
    seconds: float
    speeds: list[Speed]


@torch.inference_mode()
def predict(config: ModelConfig, prompt: int = PROMPT) -> Prediction:
    """Measure what this machine can do, and time samples of a model on it.

    Args:
        config: of the model.
        prompt: tokens to read before generating; fewer where the model's context is short.
    """
    start = time.perf_counter()
    machine = Machine.detect()
    formats = [name for name in BITS_PER_WEIGHT if name == "bf16" or cpu.available()]
    bandwidth = measure_read_bandwidth(PROBE_SECONDS)
    peaks = {
        name: measure_gemm_peak(torch.bfloat16, PROBE_SECONDS)
        if name == "bf16"
        else measure_native_gemm_peak(name, PROBE_SECONDS)
        for name in formats
    }
    room = config.max_position_embeddings - LEAST_STEPS - WARM_STEPS
    prompt = max(1, min(prompt, room))
    speeds = [predict_format(config, name, prompt, bandwidth, peaks[name]) for name in formats]
    return Prediction(
        machine=machine.cpu,
        threads=machine.torch_threads,
        read_bandwidth=bandwidth,
        gemm_peak=peaks,
        prompt=prompt,
        seconds=time.perf_counter() - start,
        speeds=speeds,
    )


def number_bytes(config: ModelConfig, weight_format: str) -> int:
    """Return the bytes of a number in the cache: `bf16` is PyTorch's, others are packed."""
    return PYTORCH_CACHE_BYTES if weight_format == "bf16" else cache_bytes(config, weight_format)


@torch.inference_mode()
def predict_format(
    config: ModelConfig, weight_format: str, prompt: int, bandwidth: float, peak: float
) -> Speed:
    """Time a sample of the model in one format.

    Args:
        config: of the model.
        weight_format: of its weights.
        prompt: tokens.
        bandwidth: bytes/s from memory.
        peak: FLOP/s of large products, faster than which no prompt is read.
    """
    parameters = count_parameters(config)
    sample = sample_shape(config, weight_format, last_level_cache())
    decode, prefill = _time_sample(config, sample, weight_format, prompt)
    cached = held_numbers(config) * prompt
    read = _weight_bytes(parameters, parameters.active_without_embedding, weight_format)
    touched = _weight_bytes(
        parameters, parameters.total - parameters.embedding, weight_format
    )  # by a prompt with more tokens than experts
    flops = 2 * (parameters.active_without_embedding - parameters.norm)
    decode_flops = flops + attention_flops(config, prompt, reading=False)
    prefill_flops = flops - 2 * parameters.lm_head + attention_flops(config, prompt, reading=True)
    decode_bytes = int(read + cached * number_bytes(config, weight_format))
    return Speed(
        format=weight_format,
        decode=1 / decode,
        prefill=min(prompt / prefill, peak / prefill_flops),  # a sample's noise is no speed
        decode_bytes=decode_bytes,
        decode_flops=decode_flops,
        prefill_flops=prefill_flops,
        prefill_intensity=prefill_flops * prompt / touched,
        decode_limit=bandwidth / decode_bytes,
        prefill_limit=peak / prefill_flops,
        layers=sample.num_hidden_layers,
        experts=sample.n_routed_experts or 0,
    )


# --- what is timed -------------------------------------------------------------------------------


def sample_shape(config: ModelConfig, weight_format: str, cache: int) -> ModelConfig:
    """Return the shape of a sample: fewer layers, fewer experts, a smaller vocabulary.

    Args:
        config: of the model.
        weight_format: of its weights.
        cache: bytes of the last-level cache.
    """
    parameters = count_parameters(config)
    bytes_of_one = BITS_PER_WEIGHT[weight_format] / 8
    vocab_size = min(config.vocab_size, int(CACHES_READ * cache / config.hidden_size))
    mixtures = _mixtures(config)
    dense = config.num_hidden_layers - mixtures
    attention = parameters.attention / config.num_hidden_layers
    changes: dict[str, Any] = {"vocab_size": vocab_size, "num_nextn_predict_layers": 0}
    changes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if not mixtures:
        active = (attention + parameters.dense_mlp / dense) * bytes_of_one
        changes["num_hidden_layers"] = min(dense, max(2, math.ceil(CACHES_READ * cache / active)))
        return config.model_copy(update=changes)
    expert = 3 * config.hidden_size * config.required("moe_intermediate_size")
    chosen = config.required("num_experts_per_tok")
    active = (attention + (chosen + config.n_shared_experts) * expert) * bytes_of_one
    least = 1 if dense else 2  # a layer's time is a difference
    layers = min(mixtures, max(least, math.ceil(CACHES_READ * cache / active)))
    experts = min(
        config.required("n_routed_experts"), max(chosen, SAMPLE_WEIGHTS // (layers * expert))
    )
    changes |= {
        "num_hidden_layers": layers + min(dense, 1),
        "first_k_dense_replace": min(dense, 1),
        "moe_layer_freq": 1,
        "n_routed_experts": experts,
        "n_group": 1,
        "topk_group": 1,
    }
    if config.topk_method not in KNOWN_ROUTERS:
        changes["topk_method"] = "greedy"
    return config.model_copy(update=changes)


def _mixtures(config: ModelConfig) -> int:
    return sum(config.is_moe_layer(layer_idx) for layer_idx in range(config.num_hidden_layers))


def random_model(config: ModelConfig, weight_format: str) -> CausalLM:
    """Build a network with random weights, `bf16` or packed, without holding all of it unpacked."""
    with torch.device("meta"):
        model = CausalLM(config)
    tensors = model.state_dict()

    def weight(name: str) -> Tensor:
        shape = tensors[name].shape
        if len(shape) > 1:
            return _random(shape)
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)

    packer = None if weight_format == "bf16" else Packer(weight_format)
    kept = set(tensors) - (packer.wants(model) if packer else set())
    dtype = torch.bfloat16 if packer is None else torch.float32
    weights = {name: weight(name) for name in kept}
    weights = {n: t if t.ndim > 1 else t.to(dtype) for n, t in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.model.rotary_emb = RotaryEmbedding(config)
    if packer is not None:
        packer.pack(model, weight, lambda name, expert, shape: _random(shape))
    return model.eval()


def _random(shape: torch.Size) -> Tensor:
    """bf16 weights that repeat one block of random numbers, of a length that no row divides."""
    count = math.prod(shape)
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(min((1 << 20) + 7, count), generator=generator) * 0.02).bfloat16()
    return block.repeat(-(-count // len(block)))[:count].view(shape)


# --- timing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Taken:
    """Seconds of all, and of the output head among them."""

    all: float
    head: float

    @classmethod
    def mean(cls, runs: "list[_Taken]") -> "_Taken":
        return cls(statistics.fmean(r.all for r in runs), statistics.fmean(r.head for r in runs))


class _Sample:
    """A network that reads a text, in parts."""

    def __init__(self, shape: ModelConfig, weight_format: str) -> None:
        self.shape = shape
        self.model = random_model(shape, weight_format)
        self.cache = Cache()

    def read(self, ids: Tensor, first: int) -> _Taken:
        """Run `(1, seq)` ids from position `first`, 0 for a new text, and predict what follows."""
        self.cache = self.cache if first else Cache()
        start = time.perf_counter()
        positions = torch.arange(first, first + ids.shape[1])[None]
        states = self.model(ids, positions, self.cache)  # (1, seq, hidden)
        transformed = time.perf_counter()
        self.model.logits(states[:, -1]).argmax(dim=-1)
        end = time.perf_counter()
        return _Taken(end - start, end - transformed)


def _time_sample(
    config: ModelConfig, shape: ModelConfig, weight_format: str, prompt: int
) -> tuple[float, float]:
    """Predict the seconds of a generated token, and those of a prompt.

    What a layer takes is the difference between the sample and its first layer alone; the two take
    turns.
    """
    samples = [_Sample(shape, weight_format)]
    if shape.num_hidden_layers < config.num_hidden_layers:
        samples.append(_Sample(shape.model_copy(update={"num_hidden_layers": 1}), weight_format))
    generator = torch.Generator().manual_seed(0)
    room = config.max_position_embeddings - prompt
    ids = torch.randint(shape.vocab_size, (1, prompt + min(room, MOST_STEPS)), generator=generator)

    def read(start: int, end: int) -> list[_Taken]:
        return [sample.read(ids[:, start:end], start) for sample in samples]

    read(0, prompt)
    prompts: list[list[_Taken]] = []
    while len(prompts) < LEAST_PROMPTS or (not _enough(prompts) and len(prompts) < MOST_PROMPTS):
        prompts.append(read(0, prompt))
    steps: list[list[_Taken]] = []
    for at in range(prompt, ids.shape[1]):
        steps.append(read(at, at + 1))
        if len(steps) >= WARM_STEPS + LEAST_STEPS and _enough(steps):
            break
    decode, prefill = _whole(config, shape, steps[WARM_STEPS:]), _whole(config, shape, prompts)
    if routed := _routed_seconds(config, samples[0], ids[:, :prompt]):
        of_sample, of_model = (_mixtures(config) * seconds for seconds in routed)
        prefill = max(prefill - of_sample, 0.0) + of_model
    return decode, prefill


def _enough(runs: list[list[_Taken]]) -> bool:
    return sum(taken.all for run in runs for taken in run) >= ENOUGH_SECONDS


def _whole(config: ModelConfig, shape: ModelConfig, runs: list[list[_Taken]]) -> float:
    """Seconds of the whole model, from those of the sample and of its first layer alone."""
    taken = [_Taken.mean(list(of_one)) for of_one in zip(*runs, strict=True)]
    sample, first = taken[0], taken[-1]
    seconds = sample.all + sample.head * (config.vocab_size / shape.vocab_size - 1)
    if len(taken) == 1:
        return seconds
    layer = (sample.all - first.all) / (shape.num_hidden_layers - 1)
    missing = config.num_hidden_layers - shape.num_hidden_layers
    dense = config.num_hidden_layers - _mixtures(config)
    unlike = dense - 1 if shape.first_k_dense_replace else 0
    return seconds + (missing - unlike) * layer + unlike * (first.all - first.head)


def _routed_seconds(
    config: ModelConfig, sample: _Sample, ids: Tensor
) -> tuple[float, float] | None:
    """Seconds of a layer's routed experts for a prompt: the sample's, and the model's.

    With fewer experts each of them receives more rows, and products with more rows are faster. So
    they are timed on all rows, as in the sample, and on as few as give an expert what it receives
    in the model. None if both have the same experts.
    """
    ours, theirs = sample.shape.n_routed_experts, config.n_routed_experts
    if ours is None or theirs is None or ours == theirs:
        return None
    mixture = sample.model.model.layers[-1].mlp
    assert isinstance(mixture, MoE)
    tokens = ids.shape[1]
    rows = max(1, round(tokens * ours / theirs))
    states = torch.randn(tokens, config.hidden_size)
    states = states.to(sample.model.model.norm.weight.dtype)
    routing = mixture.gate(states, ids.flatten())

    def seconds(count: int) -> float:
        topk_ids, topk_weights = routing.topk_ids[:count], routing.topk_weights[:count]
        return _mean_time(lambda: mixture.experts(states[:count], topk_ids, topk_weights))

    return seconds(tokens), seconds(rows) * tokens / rows


def _mean_time(action: Callable[[], object]) -> float:
    seconds: list[float] = []
    for _ in range(1 + LEAST_PROMPTS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.fmean(seconds[1:])


# --- what is counted -----------------------------------------------------------------------------


def _weight_bytes(parameters: Parameters, count: int, weight_format: str) -> float:
    """Bytes of `count` weights, the head and the routers among them."""
    router_bytes = 2 if weight_format == "bf16" else 4
    matrices = count - parameters.router
    return matrices * BITS_PER_WEIGHT[weight_format] / 8 + parameters.router * router_bytes

"""`moescope.load`: a model and its tokenizer, ready to use."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from moescope.catalog import BOX
from moescope.checkpoint import load_model, open_checkpoint, save_weights
from moescope.config import ModelConfig
from moescope.engine.engine import Engine, Generation
from moescope.engine.sampling import SamplingParams
from moescope.engine.sequence import Token
from moescope.errors import UserError
from moescope.formats.gguf.model import is_gguf
from moescope.formats.headers import Headers
from moescope.formats.repository import is_hub_name
from moescope.kernels import cpu
from moescope.machine import choose_device, memory
from moescope.model.costs import count_parameters
from moescope.model.decoder import CausalLM
from moescope.model.steering import Steering, steered
from moescope.native.linear import PackedLinear
from moescope.native.network import Packer
from moescope.native.pack_cache import load_packed
from moescope.scope.recording import record
from moescope.scope.trace import Trace
from moescope.text.generation import GenerationDefaults
from moescope.text.tokenizer import Tokenizer
from moescope.transfer import transfer_bar

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BACKENDS = ("torch", "cpu")
EXPERTS_SHARE = 0.75
"""Of the memory that is left beside a network, that streamed experts take; caches need some."""
FLOAT32_PARAMETERS = 500_000_000
"""Models of up to so many parameters compute in float32 unless asked otherwise.

In bfloat16, a text read at once and the same text read token by token differ so much that routers
choose other experts for some tokens.
"""


def load(
    name_or_path: str | Path,
    *,
    dtype: str | None = None,
    backend: str | None = None,
    quantize: str | None = None,
    device: str | None = None,
    stream_experts: bool = False,
    expert_memory: int | None = None,
) -> "Model":
    """Open a model.

    Args:
        name_or_path: `tiny` (the model in the box), a folder with `config.json`, safetensors and
            `tokenizer.json`, a `.gguf` file, or a Hub name such as `deepseek-ai/DeepSeek-V2-Lite`
            or, of a repository of GGUF files, `org/repo:Q4_K_M`. What is on the Hub is downloaded,
            unless it does not fit into memory or onto the disk.
        dtype: `float32` or `bfloat16`, of the backend `torch`; None takes float32 for models of up
            to 500M parameters, and above it the type of a folder's norms, bfloat16 for GGUF.
        backend: `torch` computes with PyTorch, `cpu` with the native kernels, whose activations are
            float32. None means `cpu` for GGUF and for folders of FP8 or MXFP4, unless `dtype` is
            given, and where `quantize` is given; else `torch`.
        quantize: what weights are rounded to for the backend `cpu`: `int8`, `int4` or `bf16`. None
            keeps the own numbers of GGUF, FP8 and MXFP4, and means `int8` for other folders.
        device: `cpu`, `cuda` or `cuda:N`, of the backend `torch`; a GPU means that backend. None is
            `cpu`.
        stream_experts: leave routed experts on the disk, packed for the native kernels; each is
            read when a token visits it, and dropped when others need its place.
        expert_memory: bytes of such experts that may be in memory at a time; None takes three
            quarters of what is free beside everything else.

    Raises:
        UserError: there is no such model, it is damaged, does not fit into memory or is of a kind
            moescope does not know, there is no such device, or backend, `quantize` and `device` do
            not go together.
    """
    place = choose_device(device or "cpu")
    if place.type != "cpu":
        if backend == "cpu" or quantize is not None or stream_experts:
            raise UserError(
                f"the native kernels compute on the CPU, and device is {device!r}; leave out "
                "backend, quantize and stream_experts for a GPU"
            )
        backend = "torch"
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
    if stream_experts and backend is None:
        backend = "cpu"
    if stream_experts and backend == "torch":
        raise UserError('backend "torch" holds all experts in memory; stream them with "cpu"')

    def packer_of(has_blocks: bool) -> Packer | None:
        unasked = backend is None and quantize is None and dtype is None
        if has_blocks and unasked and cpu.available():
            return Packer(None)
        return packer_for(backend, quantize, has_blocks)

    def fitting_dtype(
        config: ModelConfig, stored: torch.dtype, packer: Packer | None, size: int
    ) -> torch.dtype:
        """Return what is computed in; refuse a model that memory has no room for."""
        wanted = DTYPES[dtype] if dtype else stored
        if packer is not None:
            packer.refuse_if_too_large(config, memory()[1], size, experts=not stream_experts)
            return torch.float32 if packer.weight_format is None else wanted
        parameters = count_parameters(config)
        if dtype is None and parameters.total <= FLOAT32_PARAMETERS:
            wanted = torch.float32
        room = memory()[1] if place.type == "cpu" else torch.cuda.mem_get_info(place)[0]
        _refuse_if_too_large(parameters.total + parameters.mtp, wanted, room)
        return wanted

    def refuse_before_download(headers: Headers) -> None:
        packer = packer_of(headers.has_blocks)
        size = sum(held.size for held in headers.tensors.values())
        fitting_dtype(headers.config, headers.dtype, packer, size)

    packer_for(backend, quantize, False)  # refuses what can never be
    path = locate(name_or_path, refuse_before_download)
    checkpoint = open_checkpoint(path)
    packer = packer_of(checkpoint.has_blocks)
    size = sum(file.stat().st_size for file in checkpoint.files)
    wanted = fitting_dtype(checkpoint.config, checkpoint.dtype, packer, size)
    tokenizer = checkpoint.tokenizer()
    if packer is None:
        network, pack = load_model(checkpoint, dtype=wanted, device=place), None
    else:
        if stream_experts:
            free = memory()[1] - packer.resident_bytes(checkpoint.config, size, experts=False)
            cpu.limit_experts(int(EXPERTS_SHARE * free) if expert_memory is None else expert_memory)
        network, pack = load_packed(
            checkpoint, wanted, packer.weight_format, stream_experts=stream_experts
        )
    model = Model(str(name_or_path), network, tokenizer, checkpoint.generation_defaults())
    model.pack, model.path = pack, path
    return model


def _refuse_if_too_large(parameters: int, dtype: torch.dtype, available: int) -> None:
    needed = parameters * dtype.itemsize
    if needed > available:
        raise UserError(
            f"the model takes {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, but "
            f"{available / 2**30:.1f} GiB are free; close other programs, or open it with "
            'quantize="int8" or "int4" (--quantize)'
        )


def packer_for(backend: str | None, quantize: str | None, has_blocks: bool) -> Packer | None:
    """Return what packs the weights for the native kernels; None for PyTorch.

    Args:
        backend: as for `load`.
        quantize: as for `load`.
        has_blocks: whether the weights stand in GGUF, in FP8 or in MXFP4, whose numbers are kept.

    Raises:
        UserError: there is no such backend or format, or the two do not go together.
    """
    if backend not in (None, *BACKENDS):
        raise UserError(f"backend is {backend!r}; choose from {', '.join(BACKENDS)}")
    if backend == "torch" and quantize is not None:
        raise UserError(f'quantize is {quantize!r}, but backend "torch" rounds nothing; use "cpu"')
    if backend != "cpu" and quantize is None:
        return None
    own = has_blocks and quantize is None and cpu.available()
    return Packer(None if own else quantize or "int8")


def locate(name_or_path: str | Path, refuse: Callable[[Headers], object] | None = None) -> Path:
    """Return a model's folder or GGUF file; a Hub name is downloaded, or found in its cache.

    Args:
        name_or_path: as for `load`.
        refuse: called with the headers of a model on the Hub before it is downloaded; raises a
            `UserError` where that would be in vain.

    Raises:
        UserError: there is no such model, or it cannot be fetched.
    """
    folder = Path(name_or_path)
    if folder.is_dir() or is_gguf(folder):
        return folder
    name = str(name_or_path)
    if (BOX / name / "config.json").is_file():
        return BOX / name
    if folder.is_file():
        raise UserError(
            f"{name} is a file; name a .gguf file or the folder that holds config.json and "
            "safetensors"
        )
    if not is_hub_name(name):
        raise UserError(
            f'there is no model {name!r}; give "tiny", a folder, a .gguf file, or a Hub name like '
            '"org/model" or "org/model:Q4_K_M"'
        )
    return _fetch(name, refuse)


def _fetch(name: str, refuse: Callable[[Headers], object] | None) -> Path:
    """Download what is missing of a model on the Hub, once it is known to fit."""
    from moescope.formats import hub

    try:
        found = hub.HubModel(name)
    except hub.Unavailable:
        if (path := hub.cached(name)) is not None:
            return path
        raise
    if found.choice.note:
        print(found.choice.note, file=sys.stderr)
    if found.missing_bytes:
        found.refuse_if_disk_is_full()
        if refuse is not None:
            refuse(found.headers())
    with transfer_bar(name) as tell:
        return found.download(tell)


class Model:
    """A network and its tokenizer.

    Attributes:
        name: what it was loaded as.
        config: its shape.
        tokenizer: turns text into ids and back; a `UserError` for a model that has none.
        network: the PyTorch module.
        engine: the five steps from text to text.
        steering: what `steer` changed about the routers.
        pack: the file that its weights were read from ready packed; None if there was none.
        path: its folder or GGUF file; None if it was made here.
    """

    def __init__(
        self,
        name: str,
        network: CausalLM,
        tokenizer: Tokenizer | None,
        defaults: GenerationDefaults | None = None,
    ) -> None:
        self.name = name
        self.config: ModelConfig = network.config
        self.network = network
        self.engine = Engine(network, tokenizer, defaults)
        self.steering = Steering()
        self.pack: Path | None = None
        self.path: Path | None = None
        self._unsteered = network

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into ids and back.

        Raises:
            UserError: the model has none.
        """
        return self.engine.tokenizer

    @torch.inference_mode()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Map ids `(batch, seq)` int64 to next-token logits `(batch, seq, vocab)` float32.

        Raises:
            UserError: `input_ids` is not two-dimensional or holds an id the model lacks.
        """
        if input_ids.ndim != 2 or not input_ids.numel():
            raise UserError(
                f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, seq)"
            )
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise UserError(
                f"input_ids runs from {low} to {high}; the model's ids run from 0 to "
                f"{self.config.vocab_size - 1}"
            )
        hidden_states = self.network(input_ids.to(self.engine.device))  # (batch, seq, hidden)
        return self.network.logits(hidden_states)

    @overload
    def generate(self, prompt: str, **sampling: Any) -> Generation: ...
    @overload
    def generate(self, prompt: list[str], **sampling: Any) -> list[Generation]: ...
    def generate(self, prompt: str | list[str], **sampling: Any) -> Generation | list[Generation]:
        """Continue a prompt, or each of a list of prompts as one batch.

        Args:
            prompt: text, or several texts of any lengths.
            sampling: fields of `SamplingParams`: `max_tokens`, `temperature`, `top_k`, `top_p`,
                `min_p`, `repetition_penalty`, `frequency_penalty`, `presence_penalty`, `seed`,
                `stop`, `stop_token_ids`, `ignore_eos`; `prompt_logprobs` and `routed_experts` for
                what tokens tell besides. What is not given is as the model's files say
                (`generation_config.json`), else as `SamplingParams` has it.

        Raises:
            UserError: a prompt is empty or too long, or a field has no meaning.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        generations = self.engine.generate(prompts, self._params(sampling))
        return generations[0] if isinstance(prompt, str) else generations

    def stream(self, prompt: str | Sequence[int], **sampling: Any) -> Iterator[Token]:
        """Yield the tokens of a continuation as they are made.

        Args:
            prompt: text, or ids, which nothing is set around: a chat's are `engine.encode_chat`.
            sampling: as for `generate`.

        Raises:
            UserError: as for `generate`.
        """
        params = self._params(sampling)
        if isinstance(prompt, str):
            prompt = self.engine.encode(prompt)
        else:
            self.engine.check(prompt)
        return self.engine.repeat([prompt], params)

    def trace(
        self, prompt: str, max_tokens: int = 0, *, attention: bool = False, **sampling: Any
    ) -> Trace:
        """Record what happens to each token of a prompt, and of its continuation, in each layer.

        Args:
            prompt: text.
            max_tokens: length of the continuation.
            attention: whether to keep attention probabilities, `(heads, tokens, tokens)` a layer.
            sampling: as for `generate`, but likeliest tokens unless asked otherwise.

        Raises:
            UserError: as for `generate`.
        """
        params = sampling_params({**sampling, "max_tokens": max_tokens})
        prompt_ids = self.engine.encode(prompt)
        made = [token.id for token in self.engine.repeat([prompt_ids], params)]
        input_ids = [*prompt_ids, *made][: self.config.max_position_embeddings]
        return record(
            self.name, self.network, self.tokenizer, input_ids, len(prompt_ids), attention
        )

    def steer(self, **changes: Any) -> "Model":
        """Return this model with routers that decide otherwise; weights are shared.

        Args:
            changes: fields of `moescope.model.steering.Steering`: `num_experts_per_tok`, `rule`,
                `without_bias`, `noise`, `noise_seed`, `bias`, `disabled`, `forced`. Those made
                before stay, unless they are given anew.

        Raises:
            UserError: there is no such field, or the model cannot do what it asks.
        """
        known = Steering.__dataclass_fields__
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise UserError(
                f"there is no steering field {unknown[0]!r}; choose from {', '.join(known)}"
            )
        steering = replace(self.steering, **changes)
        network = steered(self._unsteered, steering)
        model = Model(self.name, network, self.engine.own_tokenizer, self.engine.defaults)
        model.steering, model._unsteered = steering, self._unsteered
        model.pack, model.path = self.pack, self.path
        return model

    def save(self, folder: str | Path) -> None:
        """Write what `transformers.AutoModelForCausalLM.from_pretrained` opens.

        A model whose router its family's software does not know is written all the same, under
        the `model_type` "moescope", which all but moescope refuse.

        Raises:
            UserError: the folder cannot be written, the disk is full, or the model is steered
                or packed.
        """
        if isinstance(self.network.lm_head, PackedLinear):
            raise UserError(
                "a model on the native kernels holds packed weights only; open it with the backend "
                '"torch" to save it'
            )
        if not self.steering.changes_nothing:
            raise UserError("a checkpoint cannot hold steering; save the model before `steer`")
        folder = Path(folder)
        save_weights(self.network, folder)
        self.engine.defaults.save(folder)
        if self.engine.own_tokenizer is not None:
            self.engine.own_tokenizer.save(folder)

    def _params(self, sampling: dict[str, Any]) -> SamplingParams:
        return sampling_params({**self.engine.defaults.sampling, **sampling})


def sampling_params(fields: dict[str, Any]) -> SamplingParams:
    """Check sampling fields given by name.

    Raises:
        UserError: there is no such field, or a value has no meaning.
    """
    known = SamplingParams.__dataclass_fields__
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise UserError(
            f"there is no sampling field {unknown[0]!r}; choose from {', '.join(known)}"
        )
    return SamplingParams(**fields)

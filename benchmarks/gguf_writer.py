"""A DeepSeek-V2 or V3 network as a GGUF file (arch `deepseek2`), written tensor by tensor.

For files that llama.cpp is to run beside moescope: random models of any shape, of which at no time
more than one tensor is in memory. Names, layout and metadata are those that llama.cpp's own
converter gives: latent attention stored as multi-query attention with one key-value head,
`kv_b_proj` split into a transposed key half and a value half, experts stacked.

Formats that this cannot round to, such as Q4_K_M, are made from a BF16 file by
`llama_cpp.llama_model_quantize`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from moescope.config import ModelConfig
from moescope.files import atomic_path
from moescope.model.decoder import CausalLM

Read = Callable[[str], Tensor]

FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
ROWS_AT_A_TIME = 4096

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokens; tokens are spelled in GPT-2's byte alphabet."""

    tokens: Sequence[str]
    merges: Sequence[str]
    types: Sequence[int]
    pre: str = "deepseek-v3"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    add_bos_token: bool = False
    chat_template: str | None = None


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: how it is made from one of the network's, and its type there."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    make: Callable[[Tensor], Tensor] = field(repr=False)


def write_gguf(
    config: ModelConfig,
    weights: Read,
    path: Path,
    file_type: str,
    *,
    head_type: str | None = None,
    vocabulary: Vocabulary | None = None,
    fused_kv_b: bool = False,
    fused_gate_up: bool = False,
) -> None:
    """Write the network to `path`, atomically.

    Args:
        config: a shape with latent attention.
        weights: returns the tensor of a name in the network's state dict (`CausalLM`), any
            floating type; called once or twice a name.
        path: the file.
        file_type: type of the matrices, a key of `FILE_TYPES`. Norms, routers and biases are F32;
            rows that are no multiple of 32 are F16 where a type needs blocks.
        head_type: type of `output.weight`; None is `file_type`.
        vocabulary: the tokens; None spells the 256 bytes and fills up with unused ids,
            257 at least.
        fused_kv_b: whether `kv_b_proj` stays one tensor, as in files before April 2025.
        fused_gate_up: whether experts' gates and ups are one tensor, as llama.cpp can also have it.
    """
    with atomic_path(Path(path)) as partial:
        writer = GGUFWriter(partial, "deepseek2")
        _add_shape(writer, config, fused_kv_b)
        writer.add_file_type(FILE_TYPES[file_type])
        _add_vocabulary(writer, vocabulary or _bytes_only(config))
        whole = {"self_attn.kv_b_proj.weight"} if fused_kv_b else set[str]()
        whole |= {"mlp.experts.gate_up_proj"} if fused_gate_up else set()
        entries = list(_entries(config, file_type, head_type or file_type, whole))
        for entry in entries:
            numbers = int(np.prod(entry.shape))
            block, size = gguf.GGML_QUANT_SIZES[entry.kind]
            writer.add_tensor_info(
                entry.name, entry.shape, np.dtype(np.float32), numbers // block * size, entry.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            tensor = entry.make(weights(entry.source).detach())
            assert tuple(tensor.shape) == entry.shape, (entry.name, tensor.shape, entry.shape)
            writer.write_tensor_data(_encode(tensor, entry.kind))
        writer.close()


def _entries(
    config: ModelConfig, file_type: str, head_type: str, whole: set[str]
) -> Iterator[_Entry]:
    heads, nope = config.num_attention_heads, config.required("qk_nope_head_dim")

    def key_half(weight: Tensor) -> Tensor:  # (heads, rank, nope)
        return weight.unflatten(0, (heads, -1))[:, :nope].mT.contiguous()

    def value_half(weight: Tensor) -> Tensor:  # (heads, v_head_dim, rank)
        return weight.unflatten(0, (heads, -1))[:, nope:].contiguous()

    parts: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
        "mlp.experts.gate_up_proj": {
            "ffn_gate_exps.weight": lambda weight: weight.chunk(2, dim=1)[0],
            "ffn_up_exps.weight": lambda weight: weight.chunk(2, dim=1)[1],
        },
        "self_attn.kv_b_proj.weight": {
            "attn_k_b.weight": key_half,
            "attn_v_b.weight": value_half,
        },
    }
    with torch.device("meta"):
        state = CausalLM(config).state_dict()
    for source, tensor in state.items():
        if source.startswith("mtp.") or (source == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if source in _TOP_NAMES:
            made: dict[str, Callable[[Tensor], Tensor]] = {
                _TOP_NAMES[source]: lambda weight: weight
            }
        else:
            layer, part = source.removeprefix("model.layers.").split(".", 1)
            named = {_LAYER_NAMES[part]: lambda weight: weight}
            if part in parts and part not in whole:
                named = parts[part]
            made = {f"blk.{layer}.{name}": make for name, make in named.items()}
        for name, make in made.items():
            shape = tuple(make(tensor).shape)
            kind = _kind(name, shape, head_type if name == "output.weight" else file_type)
            yield _Entry(name, source, shape, kind, make)


def _kind(name: str, shape: tuple[int, ...], file_type: str) -> GGMLQuantizationType:
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[file_type]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _encode(tensor: Tensor, kind: GGMLQuantizationType) -> NDArray[np.generic]:
    """Round to a type of the file, some rows at a time."""
    if tensor.dtype == torch.bfloat16 and kind == GGMLQuantizationType.BF16:
        return tensor.contiguous().view(torch.int16).numpy()
    rows = tensor.reshape(-1, tensor.shape[-1])
    return np.concatenate(
        [
            gguf.quants.quantize(part.float().contiguous().numpy(), kind)
            for part in rows.split(ROWS_AT_A_TIME)
        ]
    )


def _add_shape(writer: GGUFWriter, config: ModelConfig, fused_kv_b: bool) -> None:
    """Write the sizes and switches, under the keys that llama.cpp's converter gives them."""
    rank, rope = config.required("kv_lora_rank"), config.required("qk_rope_head_dim")
    v_head_dim = config.required("v_head_dim")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_head_count(config.num_attention_heads)
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(rank)
    if fused_kv_b:
        writer.add_head_count_kv(config.num_attention_heads)
        writer.add_key_length(config.qk_head_dim)
        writer.add_value_length(v_head_dim)
    else:
        writer.add_head_count_kv(1)
        writer.add_key_length(rank + rope)
        writer.add_value_length(rank)
        writer.add_key_length_mla(config.qk_head_dim)
        writer.add_value_length_mla(v_head_dim)
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.type))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.type == "yarn":
            writer.add_rope_scaling_orig_ctx_len(
                scaling.original_max_position_embeddings or config.max_position_embeddings
            )
            writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
            writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
            if scaling.mscale_all_dim is not None:
                writer.add_rope_scaling_yarn_log_mul(0.1 * scaling.mscale_all_dim)
    _add_experts(writer, config)


def _add_experts(writer: GGUFWriter, config: ModelConfig) -> None:
    writer.add_expert_count(config.required("n_routed_experts"))
    writer.add_expert_used_count(config.required("num_experts_per_tok"))
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.required("moe_intermediate_size"))
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType[config.scoring_func.upper()])
    if config.n_group is not None and config.topk_group is not None:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name in ("bos", "eos", "pad"):
        token_id = getattr(vocabulary, f"{name}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(vocabulary.add_bos_token)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _bytes_only(config: ModelConfig) -> Vocabulary:
    """The least that llama.cpp takes for a vocabulary of the config's size."""
    spelled = sorted(ByteLevel.alphabet())
    merged = spelled[0] + spelled[1]  # one merge, as llama.cpp refuses a file without any
    unused = [f"[unused{number}]" for number in range(config.vocab_size - 257)]
    return Vocabulary(
        tokens=[*spelled, merged, *unused],
        merges=[f"{spelled[0]} {spelled[1]}"],
        types=[TokenType.NORMAL] * 257 + [TokenType.UNUSED] * len(unused),
        eos_token_id=config.vocab_size - 1,
    )

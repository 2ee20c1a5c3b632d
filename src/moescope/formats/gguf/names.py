"""Where the network's tensors stand in a GGUF file, by llama.cpp's names."""

from moescope.families.family import Gguf

TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
"""Without `.weight` or `.bias`, which are the same on both sides."""
_WHOLE = {
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.k_b_proj": "attn_k_b.weight",
    "self_attn.v_b_proj": "attn_v_b.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "mlp.experts.gate_proj": "ffn_gate_exps.weight",
    "mlp.experts.up_proj": "ffn_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.gate_up_proj_bias": "ffn_gate_up_exps.bias",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
}
SPLIT = {
    "attn_kv_b.weight": ("attn_k_b.weight", "attn_v_b.weight"),
    "ffn_gate_up_exps.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "ffn_gate_up_exps.bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
}
"""What most files hold in two parts."""
PERMUTED = ("self_attn.q_proj", "self_attn.k_proj")
"""Whose rows stand otherwise in the architectures that `Gguf.permuted` marks."""


def stored_name(name: str, gguf: Gguf) -> tuple[str, str]:
    """Return a tensor's layer, as a prefix, and its name behind that.

    Args:
        name: in the network's state dict, or of experts' `gate_proj` and `up_proj` apart.
        gguf: the architecture.
    """
    if name in TOP:
        return "", TOP[name]
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    if part in _WHOLE:
        return f"blk.{layer}.", _WHOLE[part]
    stem, _, kind = part.rpartition(".")
    place = gguf.in_layer[stem] if stem in gguf.in_layer else _IN_LAYER[stem]
    return f"blk.{layer}.", f"{place}.{kind}"

"""Llama 2 and 3, and R1's distillations of it."""

from moescope.config import ModelConfig
from moescope.families.dialect import dense
from moescope.families.family import Family, Fields, Gguf, Metadata


def _write(config: ModelConfig) -> Fields:
    return {"attention_bias": config.attention_bias}


def _read_gguf(metadata: Metadata) -> Fields:
    """Mixtral is kept as a Llama with experts."""
    if not metadata.get("expert_count", int, 0):
        return {
            "model_type": "llama",
            "rope_interleave": False,
            "attention_bias": metadata.holds("attn_q.bias"),
        }
    return {
        "model_type": "mixtral",
        "rope_interleave": False,
        "moe_intermediate_size": metadata.get("feed_forward_length", int),
        "softmax_after_topk": True,
        "norm_topk_prob": True,
    }


GGUF = Gguf("llama", _read_gguf, permuted=True)
LLAMA = Family("llama", "LlamaForCausalLM", dense, _write, GGUF)

"""Llama 2 and 3, and R1's distillations of it."""

from moescope.config import ModelConfig
from moescope.families.dialect import dense
from moescope.families.family import Family, Fields


def _write(config: ModelConfig) -> Fields:
    return {"attention_bias": config.attention_bias}


LLAMA = Family("llama", "LlamaForCausalLM", dense, _write)

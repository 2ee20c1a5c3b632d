"""Small random DeepSeek-V2 and V3 networks, and the GGUF files that hold them."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from moescope.families import read_config
from moescope.formats.gguf.writer import Vocabulary, write_gguf
from moescope.model.decoder import CausalLM, initialise

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
}
YARN = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 64}
V2: dict[str, Any] = SMALL | {"model_type": "deepseek_v2"}
V3: dict[str, Any] = SMALL | {
    "model_type": "deepseek_v3",
    "q_lora_rank": 32,
    "n_group": 4,
    "topk_group": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "V2-Lite": V2,
    "V2, normed and scaled": V2 | {"norm_topk_prob": True, "routed_scaling_factor": 1.5},
    "V2, YaRN": V2 | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "V3": V3,
    "V3, YaRN": V3 | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "V3, one group, tied": V3
    | {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "tie_word_embeddings": True},
}
"""Fields of `config.json` by what is special about them."""


def network(fields: dict[str, Any]) -> CausalLM:
    """Return a network of random weights and, where it has them, random router biases."""
    made = CausalLM(read_config(fields))
    initialise(made, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return made.eval().requires_grad_(False)


def write(
    made: CausalLM,
    path: Path,
    file_type: str = "F32",
    *,
    vocabulary: Vocabulary | None = None,
    **layout: bool,
) -> Path:
    """Write a network's weights to `path`."""
    write_gguf(
        made.config,
        {name: tensor.shape for name, tensor in made.state_dict().items()},
        made.state_dict().__getitem__,
        path,
        file_type,
        vocabulary=vocabulary,
        **layout,
    )
    return path


def open_with_llama_cpp(path: Path, **options: Any) -> Any:
    """Open a file with llama.cpp, its weights as they are.

    It would lay them anew for AMX where the processor has it, and ends the process then at some
    models ("GGML_ASSERT(*cur_backend_id != -1) failed", 0.3.36).
    """
    import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def as_they_are() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    with patch.object(llama_cpp.llama_cpp, "llama_model_default_params", as_they_are):
        return llama_cpp.Llama(str(path), verbose=False, **options)


def logits_of_llama_cpp(path: Path, ids: Tensor, **options: Any) -> Tensor:
    """Logits of llama.cpp for `(1, seq)` ids, `(seq, vocab)`; its cache is float32."""
    import llama_cpp

    runner = open_with_llama_cpp(
        path,
        n_ctx=128,
        n_batch=128,
        n_threads=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        **options,
    )
    runner.eval(ids[0].tolist())
    return torch.from_numpy(np.array(runner.scores[: ids.shape[1]])).float()

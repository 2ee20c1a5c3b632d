"""Recipes and text that train in a second."""

import json
from pathlib import Path

MODEL = """
[model]
model_type = "deepseek_v3"
vocab_size = 300
hidden_size = 16
intermediate_size = {width}
num_hidden_layers = 2
num_attention_heads = 2
kv_lora_rank = 8
qk_nope_head_dim = 4
qk_rope_head_dim = 4
v_head_dim = 8
max_position_embeddings = 64
"""
EXPERTS = """
moe_intermediate_size = 8
n_routed_experts = 4
num_experts_per_tok = 2
first_k_dense_replace = 1
"""


def write_text(folder: Path, held_out: int) -> Path:
    """Two domains, of each 40 documents to train on and some held out."""
    for domain, line in (("poems", "第{}首：床前明月光，疑是地上霜。"), ("sums", "{} + 1 = ?")):
        for part, numbers in (("train", range(40)), ("held_out", range(40, 40 + held_out))):
            place = folder / part / domain
            place.mkdir(parents=True)
            rows = [json.dumps({"text": line.format(n)}) + "\n" for n in numbers]
            (place / "a.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder

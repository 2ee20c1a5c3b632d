"""What a checkpoint takes as it is stored: bytes by type, in each part of the network."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from moescope.config import ModelConfig
from moescope.formats.gguf.model import is_gguf
from moescope.formats.headers import (
    Headers,
    LocalFiles,
    gguf_headers,
    safetensors_headers,
    split_names,
)
from moescope.formats.repository import CONFIG, choose, weight_files

_PARTS = {
    "ffn_gate_inp": "router",
    "exp_probs_b": "router",
    "_shexp": "shared_experts",
    "shared_expert": "shared_experts",
    "shared_mlp": "shared_experts",
    "_exps": "routed_experts",
    ".experts.": "routed_experts",
    "_linear.": "routed_experts",
    "norm": "norm",
    "embed_tokens": "embedding",
    "token_embd": "embedding",
    "lm_head": "lm_head",
    "output.": "lm_head",
    "attn": "attention",
    ".gate.": "router",
    ".router.": "router",
}
"""What a stored tensor belongs to, by a piece of its name; the first that fits decides, and what
fits none is `dense_mlp`. GGUF's `attn_output.` is met by its layer first."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint's tensors, without multi-token prediction.

    Attributes:
        bytes: of all, which is what opening them at their own precision takes.
        active_bytes: of those that work on one token: of routed experts the share that it visits,
            without the input embedding.
        kinds: bytes by type, most first.
        parts: the same for each part of the network, as `Parameters` calls them.
    """

    bytes: int
    active_bytes: int
    kinds: dict[str, int]
    parts: dict[str, dict[str, int]]

    @classmethod
    def of(cls, headers: Headers) -> "Stored":
        """Sum up headers."""
        kinds: Counter[str] = Counter()
        parts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for name, tensor in headers.tensors.items():
            kinds[tensor.kind] += tensor.size
            parts[part_of(name)][tensor.kind] += tensor.size
        total = kinds.total()
        return cls(
            bytes=total,
            active_bytes=total - _idle(headers.config, parts),
            kinds=dict(kinds.most_common()),
            parts={part: dict(held.most_common()) for part, held in parts.items()},
        )


def part_of(name: str) -> str:
    """Return the part of the network that a stored tensor belongs to."""
    pieces = _PARTS if not name.startswith("blk.") else {**_PARTS, "output.": "attention"}
    return next((part for piece, part in pieces.items() if piece in name), "dense_mlp")


def _idle(config: ModelConfig, parts: dict[str, Counter[str]]) -> int:
    routed, embedding = (
        parts[name].total() if name in parts else 0 for name in ("routed_experts", "embedding")
    )
    if config.tie_word_embeddings:
        embedding = 0
    if config.n_routed_experts is None:
        return embedding
    visited = config.required("num_experts_per_tok")
    return embedding + routed - routed * visited // config.n_routed_experts


def local_headers(path: Path, config: ModelConfig | None) -> Headers | None:
    """Read the headers of a folder or a GGUF file; None where a folder holds a config alone.

    Args:
        path: the folder or file.
        config: of the folder.

    Raises:
        UserError: a file is missing or damaged.
    """
    if is_gguf(path):
        return gguf_headers(LocalFiles(path.parent), split_names(path.name))
    sizes = {held.name: held.stat().st_size for held in path.iterdir() if held.is_file()}
    if config is None or not any(name.endswith(".safetensors") for name in sizes):
        return None
    files = LocalFiles(path)
    choice = choose(str(path), sizes, "", lambda: weight_files(files))
    assert choice.main == CONFIG
    return safetensors_headers(files, config, choice.weights)

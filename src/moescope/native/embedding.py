"""The embedding of a network on the native kernels."""

from torch import Tensor, nn

from moescope.kernels import cpu
from moescope.native.linear import stand_in


class PackedEmbedding(nn.Embedding):
    """An embedding whose rows are taken out of packed weights, which a tied head shares."""

    def __init__(self, packed: "cpu.Weights", rows: int, width: int) -> None:
        super().__init__(rows, width, device="meta")
        self.weight = stand_in(rows, width)
        self.packed = packed

    def forward(self, input: Tensor) -> Tensor:
        """Map ids to `(..., hidden)` float32."""
        return cpu.rows(self.packed, input, self.embedding_dim)

    def products(self, vector: Tensor) -> Tensor:
        """Multiply every row with a vector `(hidden,)`: `(rows,)`, as exactly as the head does."""
        return cpu.linear(self.packed, self.num_embeddings, vector[None])[0]

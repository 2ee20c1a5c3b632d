"""Multi-token prediction: a module that guesses the token after the next (DeepSeek-V3, 2.2)."""

import torch
from torch import Tensor, nn

from moescope.config import ModelConfig
from moescope.model.layer import DecoderLayer
from moescope.model.norm import RMSNorm
from moescope.model.recorder import Recorder


class MultiTokenPredictor(nn.Module):
    """`num_nextn_predict_layers` further depths, each one decoder layer (eq. 21-23).

    Depth `d` joins the hidden state of depth `d - 1` at a position with the embedding of the
    token `d` places ahead, and predicts the token `d + 1` places ahead. Embedding and output
    head are the main model's.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.depths = nn.ModuleList(
            PredictorDepth(config, config.num_hidden_layers + depth)
            for depth in range(config.num_nextn_predict_layers)
        )


class PredictorDepth(nn.Module):
    """One depth; its tensors stand in a checkpoint as layer `num_hidden_layers + depth`."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = DecoderLayer(config, layer_idx)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        embedded: Tensor,
        input_ids: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Join `(batch, seq, hidden)` states with the later tokens' embeddings, run the layer."""
        joined = torch.cat([self.enorm(embedded), self.hnorm(hidden_states)], dim=-1)
        return self.layer(self.eh_proj(joined), input_ids, rotation, positions, recorder=recorder)

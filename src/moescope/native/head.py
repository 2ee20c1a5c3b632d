"""What follows the layers, in one call."""

from torch import Tensor

from moescope.kernels import cpu
from moescope.model.decoder import CausalLM
from moescope.native.linear import PackedLinear
from moescope.native.norm import NativeRMSNorm


class NativeHead:
    """The last norm and the map to logits of a packed network.

    Args:
        model: whose head `is_native`.
    """

    def __init__(self, model: CausalLM) -> None:
        norm, lm_head = model.model.norm, model.lm_head
        assert isinstance(lm_head, PackedLinear)
        self._model, self._outputs = model, lm_head.out_features
        self._joined = cpu.head((norm.weight, norm.eps), lm_head.packed, lm_head.bias)

    @staticmethod
    def is_native(model: CausalLM) -> bool:
        """Whether both are the kernels'."""
        return isinstance(model.model.norm, NativeRMSNorm) and isinstance(
            model.lm_head, PackedLinear
        )

    def __call__(self, states: Tensor) -> Tensor:
        """Map `(rows, hidden)` before the norm to next-token logits `(rows, vocab)`, float32."""
        return self._model.scaled(cpu.run_head(self._joined, self._outputs, states))

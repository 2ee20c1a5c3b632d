"""Muon for the matrices, AdamW for the rest, on float32 masters of the network's weights."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from moescope.training.parallel.ranks import Ranks
from moescope.training.parallel.shards import from_part, part, part_of, replicas, whole

MUON_MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADAMW_BETAS = (0.9, 0.95)
ADAMW_EPS = 1e-8


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix near one, keeping its singular vectors.

    Newton-Schulz iteration of the quintic `a X + b (X X^T) X + c (X X^T)^2 X` in bf16 (Jordan et
    al. 2024, "Muon"); singular values end between about 0.7 and 1.2.

    Args:
        matrices: `(batch, rows, columns)`.

    Returns:
        The same shape, bf16.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    norm = torch.linalg.matrix_norm(x, keepdim=True, dtype=torch.float32)
    x = x / norm.clamp(min=1e-7).to(x.dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def is_hidden_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon may move a weight: a matrix, or a stack of them, within the layers."""
    at_the_edge = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")
    return weight.ndim > 1 and not name.endswith(at_the_edge)


class Optimizer:
    """Holds the float32 masters, sums gradients into float32 and moves the masters.

    Where a network is dealt to ranks, each rank moves the parts that it holds; all state is parts.

    Attributes:
        masters: name -> float32 weight; the parameter itself where it is float32 already.
        momenta: name -> Muon's momentum.
        adamw: AdamW over the remaining masters.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Literal["muon", "adamw"],
        *,
        weight_decay: float,
        ranks: Ranks | None = None,
    ) -> None:
        self._weight_decay, self._ranks = weight_decay, ranks or Ranks()
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters = {n: part(p.detach()).float() for n, p in self._parameters.items()}
        self._gradients = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        by_muon = [n for n, m in self.masters.items() if kind == "muon" and is_hidden_matrix(n, m)]
        self.momenta = {n: torch.zeros_like(self.masters[n]) for n in by_muon}
        by_adamw = [m for n, m in self.masters.items() if n not in self.momenta]
        self.adamw = torch.optim.AdamW(
            [
                {"params": [m for m in by_adamw if m.ndim > 1], "weight_decay": weight_decay},
                {"params": [m for m in by_adamw if m.ndim == 1], "weight_decay": 0.0},
            ],
            betas=ADAMW_BETAS,
            eps=ADAMW_EPS,
            fused=True,
        )

    def accumulate(self) -> None:
        """Add the parameters' gradients to the step's sum and free them."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._gradients[name].add_(part(parameter.grad))
                parameter.grad = None

    @torch.no_grad()
    def step(self, muon_learning_rate: float, adamw_learning_rate: float, clip: float) -> float:
        """Clip the summed gradient, move the weights, clear the sum; return the norm before.

        Raises:
            FloatingPointError: the gradient is not finite; it was dropped, no weight was moved.
        """
        gradients = list(self._gradients.values())
        norm = self._norm(gradients)
        if not norm < float("inf"):
            torch._foreach_zero_(gradients)  # pyright: ignore
            raise FloatingPointError(f"the gradient's norm is {norm}")
        if norm > clip:
            torch._foreach_mul_(gradients, clip / norm)  # pyright: ignore
        for name, momentum in self.momenta.items():
            self._step_muon(name, momentum, muon_learning_rate)
        for group in self.adamw.param_groups:
            group["lr"] = adamw_learning_rate
        for name, master in self.masters.items():
            if name not in self.momenta:
                master.grad = self._gradients[name]
        self.adamw.step()
        for gradient in gradients:
            gradient.zero_()
        self.write_back()
        return norm

    def _norm(self, gradients: list[Tensor]) -> float:
        """The norm of the whole gradient; parts that several ranks hold count once."""
        norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore
        if self._ranks.size == 1:
            return float(torch.linalg.vector_norm(norms))
        held_by = torch.tensor([replicas(p) for p in self._parameters.values()])
        squares = (norms.double().square() / held_by.to(norms.device)).sum()
        return float(self._ranks.sum(squares).sqrt())

    def _step_muon(self, name: str, momentum: Tensor, learning_rate: float) -> None:
        """Nesterov momentum, orthogonalised per matrix and scaled by `0.2 * sqrt(max(m, n))`.

        The scale gives updates the size that AdamW's have (Liu et al. 2025, "Muon is scalable",
        eq. 4). Stacked experts are matrices each; so are the gate and the up half of one. A matrix
        whose rows are dealt to ranks is orthogonalised whole, on each of them.
        """
        master, gradient = self.masters[name], self._gradients[name]
        momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
        update = gradient.lerp(momentum, MUON_MOMENTUM)
        parameter = self._parameters[name]
        if update.ndim == 2:
            update = whole(from_part(update, parameter))
        matrices = update.flatten(0, -3) if update.ndim > 2 else update[None]
        if name.endswith("gate_up_proj"):
            matrices = matrices.unflatten(1, (2, -1)).flatten(0, 1)  # (2 * experts, m, n)
        orthogonal = orthogonalise(matrices)
        scale = 0.2 * max(orthogonal.shape[1:]) ** 0.5
        master.mul_(1 - learning_rate * self._weight_decay)
        orthogonal = orthogonal.reshape(update.shape)
        if update.ndim == 2:
            orthogonal = part_of(orthogonal, parameter)
        master.add_(orthogonal, alpha=-learning_rate * scale)

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the network's parameters."""
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                parameter.copy_(self.masters[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """Return everything that a continued training needs, by name."""
        tensors = {f"master.{n}": self._dealt(m, n) for n, m in self.masters.items()}
        tensors |= {f"momentum.{n}": self._dealt(m, n) for n, m in self.momenta.items()}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"adamw.{key}.{name}"] = self._dealt(value, name) if value.ndim else value
        return tensors

    def blank_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors to read into, dealt as `state_tensors` returns them under these names."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            kind, _, of = name.partition(".")
            if kind == "adamw":
                kind, _, of = of.partition(".")
            if kind == "step":
                tensors[name] = torch.zeros(())
            elif of in self.masters:
                tensors[name] = self._dealt(torch.zeros_like(self.masters[of]), of)
        return tensors

    def _dealt(self, own: Tensor, name: str) -> Tensor:
        return from_part(own, self._parameters[name])

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_tensors` returned, and round it into the parameters."""
        for name, master in self.masters.items():
            master.copy_(part(tensors[f"master.{name}"]))
            if name in self.momenta:
                self.momenta[name].copy_(part(tensors[f"momentum.{name}"]))
            else:
                self.adamw.state[master] = {
                    key: part(tensors[f"adamw.{key}.{name}"]).clone()
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"adamw.{key}.{name}" in tensors
                }
        self.write_back()

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from moescope.training.optimizer import ADAMW_BETAS, Optimizer, orthogonalise
from moescope.training.schedule import warmup_stable_decay

EXPERTS, INTERMEDIATE, HIDDEN, VOCAB = 3, 4, 10, 7


class Tiny(nn.Module):
    """One parameter of each kind, named as in the network."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.q_proj = nn.Linear(HIDDEN, 6, bias=False)
        self.o_proj = nn.Linear(6, HIDDEN, bias=False)
        self.norm = nn.RMSNorm(HIDDEN)
        self.mlp = nn.Module()
        self.mlp.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.mlp.experts = nn.Module()
        self.mlp.experts.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, 2 * INTERMEDIATE, HIDDEN))
        self.mlp.experts.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INTERMEDIATE))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.to(dtype)


HIDDEN_MATRICES = {
    "q_proj.weight",
    "o_proj.weight",
    "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj",
}


def gradients(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}


def give(model: nn.Module, grads: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = grads[name].to(parameter.dtype)


def take_steps(model: nn.Module, optimizer: Optimizer, seeds: range, clip: float = 1e9) -> None:
    for seed in seeds:
        give(model, gradients(model, seed))
        optimizer.accumulate()
        optimizer.step(0.02, 0.01, clip)


def test_muon_equals_pytorchs_on_matrices_and_on_each_half_of_each_expert():
    model = Tiny()
    optimizer = Optimizer(model, "muon", weight_decay=0.1)
    assert set(optimizer.momenta) == HIDDEN_MATRICES

    def matrices(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        experts = [
            matrix
            for e in range(EXPERTS)
            for matrix in (
                tensors["mlp.experts.gate_up_proj"][e, :INTERMEDIATE],
                tensors["mlp.experts.gate_up_proj"][e, INTERMEDIATE:],
                tensors["mlp.experts.down_proj"][e],
            )
        ]
        return [tensors["q_proj.weight"], tensors["o_proj.weight"], *experts]

    twins = [m.detach().clone() for m in matrices(dict(model.named_parameters()))]
    oracle = torch.optim.Muon(
        twins, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for seed in range(4):
        for twin, gradient in zip(twins, matrices(gradients(model, seed)), strict=True):
            twin.grad = gradient.clone()
        oracle.step()
    take_steps(model, optimizer, range(4))
    for ours, twin in zip(matrices(dict(model.named_parameters())), twins, strict=True):
        # The iteration is bf16, so batched and single products may differ in its last bits.
        torch.testing.assert_close(ours, twin, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_rest_is_adamw_that_decays_matrices_only(kind):
    model = Tiny()
    optimizer = Optimizer(model, kind, weight_decay=0.1)
    names = [n for n, _ in model.named_parameters() if n not in optimizer.momenta]
    expected = {"embed_tokens.weight", "norm.weight", "mlp.gate.weight"}
    assert set(names) == (expected if kind == "muon" else expected | HIDDEN_MATRICES)
    twins = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
    oracle = torch.optim.AdamW(
        [
            {"params": [t for t in twins.values() if t.ndim > 1], "weight_decay": 0.1},
            {"params": [t for t in twins.values() if t.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=ADAMW_BETAS,
    )
    for seed in range(4):
        for name, gradient in gradients(model, seed).items():
            if name in twins:
                twins[name].grad = gradient
        oracle.step()
    take_steps(model, optimizer, range(4))
    parameters = dict(model.named_parameters())
    for name, twin in twins.items():
        torch.testing.assert_close(parameters[name].detach(), twin, atol=1e-6, rtol=1e-5)


@given(
    st.integers(1, 3), st.integers(2, 24), st.integers(2, 24), st.floats(1e-3, 1e3), st.integers(0)
)
def test_orthogonalise_keeps_the_singular_vectors_and_levels_the_values(b, m, n, size, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    # Singular values between 0.3 and 1: five iterations bring smaller ones up, but not all the way.
    rank = min(m, n)
    left = torch.linalg.qr(torch.randn(b, m, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(b, n, rank, generator=generator)).Q
    values = torch.rand(b, rank, generator=generator) * 0.7 + 0.3
    result = orthogonalise(size * left * values[:, None] @ right.mT)
    assert result.shape == (b, m, n)
    core = left.mT @ result.float() @ right  # diagonal if the singular vectors were kept
    assert torch.linalg.svdvals(result.float()).min() > 0.55
    assert torch.linalg.svdvals(result.float()).max() < 1.35
    off_diagonal = core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 0.12


def test_clipping_equals_pytorchs():
    model, twin = Tiny(), Tiny()
    give(twin, gradients(twin, 0))
    expected_norm = nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    optimizer = Optimizer(model, "adamw", weight_decay=0.0)
    give(model, gradients(model, 0))
    optimizer.accumulate()
    assert optimizer.step(0.02, 0.01, clip=1.0) == pytest.approx(float(expected_norm), rel=1e-5)
    for name, parameter in twin.named_parameters():
        first_moment = optimizer.adamw.state[optimizer.masters[name]]["exp_avg"]
        expected = parameter.grad * (1 - ADAMW_BETAS[0])
        torch.testing.assert_close(first_moment, expected, atol=1e-7, rtol=1e-4)


def test_gradients_are_summed_in_float32():
    """One large and many small bf16 gradients: a bf16 sum would lose the small ones."""
    model = Tiny(torch.bfloat16)
    optimizer = Optimizer(model, "adamw", weight_decay=0.0)
    for size in [1.0] + [2.0**-10] * 64:
        give(model, {n: torch.full(p.shape, size) for n, p in model.named_parameters()})
        optimizer.accumulate()
    assert all(p.grad is None for p in model.parameters())
    count = sum(p.numel() for p in model.parameters())
    norm = optimizer.step(0.0, 0.0, clip=1e9)
    assert norm == pytest.approx((1 + 64 * 2.0**-10) * count**0.5, rel=1e-5)


def test_masters_keep_what_bf16_would_round_away():
    model = Tiny()
    optimizer = Optimizer(model, "adamw", weight_decay=0.0)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    before = {n: m.clone() for n, m in optimizer.masters.items()}
    for _ in range(50):
        give(model, {n: torch.ones(p.shape) for n, p in model.named_parameters()})
        optimizer.accumulate()
        optimizer.step(1e-5, 1e-5, clip=1e9)
    for name, parameter in model.named_parameters():
        moved = before[name] - optimizer.masters[name]
        torch.testing.assert_close(moved, torch.full_like(moved, 50e-5), atol=5e-6, rtol=0.02)
        assert torch.equal(parameter, optimizer.masters[name].bfloat16())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_saved_state_continues_bit_for_bit(kind):
    straight = Tiny()
    straight_optimizer = Optimizer(straight, kind, weight_decay=0.1)
    take_steps(straight, straight_optimizer, range(3))
    saved = {n: t.clone() for n, t in straight_optimizer.state_tensors().items()}
    take_steps(straight, straight_optimizer, range(3, 6))

    resumed = Tiny()
    resumed_optimizer = Optimizer(resumed, kind, weight_decay=0.1)
    resumed_optimizer.load_state_tensors(saved)
    take_steps(resumed, resumed_optimizer, range(3, 6))
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_moves_nothing(poison):
    model = Tiny()
    optimizer = Optimizer(model, "muon", weight_decay=0.1)
    take_steps(model, optimizer, range(1))
    before = {n: t.clone() for n, t in optimizer.state_tensors().items()}
    grads = gradients(model, 1)
    grads["norm.weight"][0] = poison
    give(model, grads)
    optimizer.accumulate()
    with pytest.raises(FloatingPointError):
        optimizer.step(0.02, 0.01, clip=1.0)
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_frozen_weights_are_left_alone():
    model = Tiny()
    model.mlp.gate.weight.requires_grad_(False)
    optimizer = Optimizer(model, "muon", weight_decay=0.1)
    assert "mlp.gate.weight" not in optimizer.masters


# --- schedule ------------------------------------------------------------------------------------


@given(
    st.integers(1, 200),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.sampled_from(["linear", "sqrt"]),
)
def test_the_rate_warms_up_stays_and_decays(steps, warmup, decay_share, decay):
    warmup_steps, decay_steps = int(steps * warmup), int(steps * decay_share)
    factors = [
        warmup_stable_decay(
            s, steps=steps, warmup_steps=warmup_steps, decay_steps=decay_steps, decay=decay
        )
        for s in range(steps)
    ]
    assert all(0 < factor <= 1 for factor in factors)
    rising, stable = factors[:warmup_steps], factors[warmup_steps : steps - decay_steps]
    falling = factors[steps - decay_steps :]
    assert rising == sorted(rising)
    assert stable == [1.0] * len(stable)
    assert falling == sorted(falling, reverse=True)
    if decay_steps > 3:
        assert falling[-1] < 0.3


@given(st.integers(20, 100), st.integers(1, 100))
def test_nothing_before_the_decay_depends_on_the_number_of_steps(steps, more):
    def factors(total: int) -> list[float]:
        return [
            warmup_stable_decay(s, steps=total, warmup_steps=4, decay_steps=8, decay="sqrt")
            for s in range(steps - 8)
        ]

    assert factors(steps) == factors(steps + more)


def test_the_forms_of_decay():
    def factor(decay: str) -> float:
        return warmup_stable_decay(94, steps=100, warmup_steps=0, decay_steps=19, decay=decay)

    assert factor("linear") == pytest.approx(0.3)  # the 14th of 20 parts
    assert factor("sqrt") == pytest.approx(1 - 0.7**0.5)

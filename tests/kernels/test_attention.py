"""Native grouped-query attention equals plain float64 loops, and transformers' modules."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from moescope.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="test_cpu.py says why this is fine")

SETS = cpu.instruction_sets() or ["none"]
SLOTS = 400
BLOCK = 48
pack = partial(cpu.pack, weight_format="bf16")  # its products take activations as they are
examples = partial(settings, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Any:
    """Each instruction set in turn."""
    before = cpu.instruction_set()
    assert before is not None
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(before)


def held(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal numbers that bf16 holds exactly, in float64."""
    drawn = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    return drawn.bfloat16().double()


@dataclass
class Part:
    """Grouped-query attention behind a norm, with every switch that the kernels know."""

    hidden: int
    heads: int
    kv_heads: int
    width: int
    rope: int
    interleave: bool = False
    biased: bool = False
    qk_norm: str = "none"
    clip: float | None = None
    window: int | None = None
    sinks: bool = False
    residual_multiplier: float = 1.0
    embedding_multiplier: float = 1.0
    scale: float = 0.3
    factor: float = 1.0
    seed: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        """Draw the weights."""
        draw = partial(held, generator=torch.Generator().manual_seed(self.seed))
        query, key = self.heads * self.width, self.kv_heads * self.width
        self.weights = {
            "norm": draw(self.hidden) + 1,
            "q": draw(query, self.hidden),
            "k": draw(key, self.hidden),
            "v": draw(key, self.hidden),
            "o": draw(self.hidden, query),
        }
        if self.biased:
            self.weights |= {f"{name}_bias": draw(len(self.weights[name])) for name in "qkvo"}
        if self.qk_norm != "none":
            wide = (self.width, self.width) if self.qk_norm == "head" else (query, key)
            self.weights |= {"q_norm": draw(wide[0]) + 1, "k_norm": draw(wide[1]) + 1}
        if self.sinks:
            self.weights["sinks"] = 3 * draw(self.heads)
        self.frequencies = 100.0 ** -(torch.arange(0, self.rope, 2) / self.rope)

    def native(self, embedding: Tensor) -> "cpu.Decoder":
        """A layer whose feed-forward part adds nothing, over rows `(tokens, hidden)`."""
        floats = {name: weight.float() for name, weight in self.weights.items()}

        def linear(name: str) -> "tuple[cpu.Weights, Tensor | None]":
            return pack(floats[name]), floats.get(f"{name}_bias")

        attention = cpu.grouped_attention(
            (floats["norm"], 1e-5),
            linear("q"),
            linear("k"),
            linear("v"),
            linear("o"),
            heads=self.heads,
            kv_heads=self.kv_heads,
            scale=self.scale,
            query_norm=floats.get("q_norm"),
            key_norm=floats.get("k_norm"),
            rope=self.rope,
            interleave=self.interleave,
            clip=self.clip,
            window=self.window,
            sinks=floats.get("sinks"),
            residual_multiplier=self.residual_multiplier,
        )
        nothing = torch.zeros(1, 1, self.hidden)
        layer = cpu.feed_forward_layer(None, (pack(nothing), pack(nothing), pack(nothing.mT)))
        block = cpu.feed_forward_block((floats["norm"], 1e-5), None, layer)
        rotation = self.frequencies, self.factor
        table = cpu.pack(embedding, "f32")
        return cpu.decoder(table, [attention], [block], rotation, self.embedding_multiplier)

    def exact(self, rows: Tensor) -> Tensor:
        """What becomes of the tokens `(seq, hidden)` of one text, in float64, one by one."""
        weights = self.weights
        x = rows.double() * self.embedding_multiplier
        normed = normalised(x, weights["norm"])
        query, key, value = (
            normed @ weights[name].T + weights.get(f"{name}_bias", 0.0) for name in "qkv"
        )
        query, key, value = (part.unflatten(-1, (-1, self.width)) for part in (query, key, value))
        if self.qk_norm == "head":
            query, key = normalised(query, weights["q_norm"]), normalised(key, weights["k_norm"])
        if self.qk_norm == "full":
            query, key = (
                normalised(part.flatten(-2), weights[name]).view_as(part)
                for part, name in ((query, "q_norm"), (key, "k_norm"))
            )
        if self.clip is not None:
            query, key, value = (part.clamp(-self.clip, self.clip) for part in (query, key, value))
        query, key = self.rotated(query), self.rotated(key)
        mixed = torch.zeros_like(query)  # (seq, heads, width)
        for token in range(len(rows)):
            first = 0 if self.window is None else max(0, token + 1 - self.window)
            for head in range(self.heads):
                kv_head = head * self.kv_heads // self.heads
                logits = key[first : token + 1, kv_head] @ query[token, head] * self.scale
                if self.sinks:
                    logits = torch.cat([logits, weights["sinks"][head : head + 1]])
                probabilities = logits.softmax(dim=0)[: token + 1 - first]
                mixed[token, head] = probabilities @ value[first : token + 1, kv_head]
        added = mixed.flatten(1) @ weights["o"].T + weights.get("o_bias", 0.0)
        return x + self.residual_multiplier * added

    def rotated(self, states: Tensor) -> Tensor:
        """Rotate the front of each head of `(seq, heads, width)`, pair by pair."""
        out, half = states.clone(), self.rope // 2
        for pair, frequency in enumerate(self.frequencies.double()):
            angles = torch.arange(len(states)).double()[:, None] * frequency  # (seq, 1)
            cosine, sine = angles.cos() * self.factor, angles.sin() * self.factor
            one, two = (2 * pair, 2 * pair + 1) if self.interleave else (pair, pair + half)
            first, second = states[..., one], states[..., two]  # (seq, heads)
            out[..., pair] = first * cosine - second * sine
            out[..., half + pair] = second * cosine + first * sine
        return out


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight


class Reader:
    """A layer's cache for a batch, whose slots lie in scattered blocks, read in parts."""

    def __init__(
        self, part: Part, x: Tensor, dtype: torch.dtype = torch.float32, slots: int = SLOTS
    ) -> None:
        batch, seq, hidden = x.shape
        self.embedding = x.flatten(0, 1).float()
        self.layer, self.hidden = part.native(self.embedding), hidden
        self.ids = torch.arange(batch * seq).view(batch, seq)
        each = -(-slots // BLOCK)  # blocks of a row
        shape = batch * each, BLOCK, part.kv_heads, part.width
        held = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
        self.tables = torch.arange(batch * each).flip(0).view(each, batch).T.tolist()
        self.slots = cpu.cache_slots([(held[0], held[1])])

    def read(self, positions: Tensor) -> Tensor:
        """Run the tokens that stand at `positions` `(batch, seq)` of each row."""
        ids = self.ids.gather(1, positions)
        batch, seq = ids.shape
        singles = batch if seq == 1 else 0
        states = cpu.run_decoder(
            self.layer,
            ids.flatten().tolist(),
            self.hidden,
            positions.flatten().tolist(),
            range(0, (batch + 1) * seq, seq),
            singles,
            self.tables,
            self.slots,
        )
        return states.view(batch, seq, -1)


parts = st.builds(
    lambda kv_heads, group, half_width, rotated, **switches: Part(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        width=2 * half_width,
        rope=2 * max(1, int(half_width * rotated)),
        **switches,
    ),
    hidden=st.integers(1, 70),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 6),
    half_width=st.one_of(st.integers(1, 20), st.sampled_from([32, 40, 64, 96])),
    rotated=st.sampled_from([1.0, 0.5, 0.25]),
    interleave=st.booleans(),
    biased=st.booleans(),
    qk_norm=st.sampled_from(["none", "head", "full"]),
    clip=st.sampled_from([None, 0.5]),
    window=st.one_of(st.none(), st.integers(1, 20), st.sampled_from([63, 64, 65])),
    sinks=st.booleans(),
    residual_multiplier=st.sampled_from([1.0, 0.22]),
    embedding_multiplier=st.sampled_from([1.0, 12.0]),
    scale=st.sampled_from([0.1, 0.7]),
    factor=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 100),
)


def close(found: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within float32's rounding, or bf16's: of each key, value, query and probability."""
    bound = 2e-5 if dtype == torch.float32 else 2.0**-6
    rtol = 1e-4 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=bound * exact.abs().max())


dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@examples(max_examples=25, deadline=None)
@given(part=parts, batch=st.integers(1, 3), dtype=dtypes, data=st.data())
def test_prompts_and_single_tokens_equal_plain_loops(
    isa: str, part: Part, batch: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    seq = data.draw(st.one_of(st.integers(1, 12), st.integers(60, 90)))
    x = torch.randn(batch, seq, part.hidden, generator=torch.Generator().manual_seed(part.seed))
    exact = torch.stack([part.exact(row) for row in x])
    reader, at, found = Reader(part, x, dtype), 0, []
    while at < seq:
        count = data.draw(st.one_of(st.just(1), st.integers(1, seq - at)))
        found.append(reader.read(torch.arange(at, at + count).expand(batch, -1)))
        at += count
    close(torch.cat(found, dim=1), exact, dtype)


@examples(max_examples=15, deadline=None)
@given(
    part=parts,
    batch=st.integers(2, 4),
    new=st.sampled_from([1, 1, 2, 5, 40]),
    dtype=dtypes,
    data=st.data(),
)
def test_rows_may_stand_at_different_positions(
    isa: str, part: Part, batch: int, new: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    starts = torch.tensor([data.draw(st.integers(0, 50)) for _ in range(batch)])
    length = int(starts.max()) + new
    x = torch.randn(batch, length, part.hidden, generator=torch.Generator().manual_seed(part.seed))
    reader = Reader(part, x, dtype)
    reader.read(torch.arange(length).expand(batch, -1))
    positions = starts[:, None] + torch.arange(new)
    found = reader.read(positions)
    for row, start in enumerate(starts.tolist()):
        close(found[row], part.exact(x[row, : start + new])[start:], dtype)


def test_a_window_at_every_edge_of_a_block_of_slots(isa: str) -> None:
    for window in (1, 15, 16, 17, 48, 64, 128, 129, 1000):
        part = Part(20, 5, 1, 8, 8, window=window, sinks=True, seed=window)
        x = torch.randn(1, 260, 20, generator=torch.Generator().manual_seed(window))
        exact = part.exact(x[0])
        whole, singly = Reader(part, x), Reader(part, x)
        close(whole.read(torch.arange(260)[None])[0], exact)
        singly.read(torch.arange(200)[None])
        for position in range(200, 260):
            close(singly.read(torch.tensor([[position]]))[0], exact[position : position + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1000])
def test_long_texts_are_joined_from_runs(isa: str, dtype: torch.dtype, window: int | None) -> None:
    part = Part(20, 5, 1, 8, 8, window=window, sinks=True, seed=3)
    x = torch.randn(2, 2060, 20, generator=torch.Generator().manual_seed(3))
    exact = torch.stack([part.exact(row) for row in x])
    reader = Reader(part, x, dtype, slots=2100)
    found = [reader.read(torch.arange(1020).expand(2, -1))]
    found += [reader.read(torch.tensor([[at], [at]])) for at in range(1020, 1030)]
    found.append(reader.read(torch.arange(1030, 2045).expand(2, -1)))
    found += [reader.read(torch.tensor([[at], [at]])) for at in range(2045, 2060)]
    close(torch.cat(found, dim=1), exact, dtype)
    at = torch.tensor([[2050], [100]])  # a row of one run beside one of several
    close(reader.read(at)[1, 0], exact[1, 100], dtype)


def test_parts_that_do_not_fit_are_refused() -> None:
    x = torch.ones(1, 2, 16)
    for wrong in (
        {"rope": 7},
        {"rope": 10},
        {"window": 0},
        {"weights": {"sinks": torch.zeros(5).double()}},
        {"weights": {"q_norm": torch.zeros(9).double()}},
    ):
        part = Part(16, 4, 2, 8, 8)
        for name, value in wrong.items():
            if name == "weights":
                part.weights |= value
            else:
                setattr(part, name, value)
        part.frequencies = part.frequencies[: part.rope // 2]
        with pytest.raises(ValueError, match="do not fit"):
            Reader(part, x)

"""Plans against DeepSeek's figures, PyTorch's count of products and a cache really made."""

import json
from pathlib import Path

import pytest
import torch
from family_models import VARIANTS
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moescope
from moescope import UserError
from moescope.catalog import catalog
from moescope.families import config_fields, read_config
from moescope.lab import plan as plan_module
from moescope.lab.plan import CONTEXT, Plan, plan
from moescope.machine import Machine
from moescope.model.costs import cached_numbers, held_numbers
from moescope.model.decoder import CausalLM, initialise

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LATENT = SMALL | {
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
GROUPED = SMALL | {"model_type": "llama", "num_key_value_heads": 2}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Return a way to pretend that this machine has so much memory."""

    def pretend(memory: int, gpu_memory: int | None = None) -> None:
        fields = dict.fromkeys(Machine.__dataclass_fields__)
        fields |= {"memory_available": memory, "gpu_memory_total": gpu_memory}
        fields["gpu"] = "GPU of dreams" if gpu_memory else None
        monkeypatch.setattr(Machine, "detect", lambda: Machine(**fields))

    return pretend


V4_AND_V32 = ("v4-pro", "v4-flash", "v3.2-exp")


def write(folder: Path, fields: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_plan_is_part_of_the_package() -> None:
    assert moescope.plan is plan_module.plan


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        # DeepSeek, "Insights into DeepSeek-V3" (2025), table 1: 70.272 KB.
        ("deepseek-v3", 70272),
        # Published shapes by hand: 2 * key-value heads * head width * 2 bytes * layers.
        ("deepseek-moe-16b", 2 * 16 * 128 * 2 * 28),
        ("deepseek-r1-distill-qwen-1.5b", 2 * 2 * 128 * 2 * 28),
        ("deepseek-r1-distill-llama-70b", 2 * 8 * 128 * 2 * 80),
    ],
)
def test_a_token_takes_the_published_place_in_the_cache(name: str, bytes_per_token: int) -> None:
    cache = plan(name).cache
    assert cache.bytes_per_token == bytes_per_token
    assert cache.bytes_at_max_context == cache.max_context * bytes_per_token


def test_v2s_cache_at_six_bits_is_the_published_share_smaller_than_67bs() -> None:
    # DeepSeek-V2's abstract says 93.3 %; section 3.2.3 that its cache is kept in 6 bits. DeepSeek
    # 67B has 95 layers of 8 key-value heads, 128 wide.
    served = plan("deepseek-v2").cache.bytes_per_token * 6 / 16
    assert 1 - served / (2 * 8 * 128 * 2 * 95) == pytest.approx(0.933, abs=0.0005)


@pytest.mark.parametrize("fields", [LATENT, GROUPED], ids=["latent", "grouped"])
def test_the_cache_of_a_real_run_is_as_large(fields: dict, tmp_path: Path) -> None:
    config = read_config(fields)
    model = CausalLM(config)
    initialise(model, seed=0)
    kept: list[torch.Tensor] = []

    class Spy:
        def update(self, layer_idx, keys, values, positions):
            kept.extend([keys, values])
            return keys, values

    tokens = 5
    positions = torch.arange(tokens)[None]
    model(torch.arange(tokens)[None], positions, cache=Spy())
    held = sum(tensor.numel() for tensor in kept) * 2  # bytes of bf16
    assert plan(write(tmp_path, fields)).cache.bytes_per_token * tokens == held


@pytest.mark.parametrize("variant", ["deepseek_v32", "deepseek_v4", "gpt_oss"])
def test_what_the_engine_holds_of_other_attention_is_what_a_run_keeps(
    variant: str, tmp_path: Path
) -> None:
    config = read_config(VARIANTS[variant].to_dict())
    model = CausalLM(config)
    initialise(model, seed=0)
    held = 0

    class Spy:
        def update(self, layer_idx, keys, values, positions):
            nonlocal held
            held += keys.numel() + values.numel()
            return keys, values

        def store(self, layer_idx, name, states, positions, rate=1):
            nonlocal held
            held += states.numel()
            return states

    tokens = 21  # whole entries
    with torch.no_grad():
        model(torch.arange(tokens)[None], torch.arange(tokens)[None], cache=Spy())
    per_token = held_numbers(config)
    assert per_token * tokens == pytest.approx(held, abs=tokens)  # entries are rounded
    assert cached_numbers(config) <= per_token


def test_v4_keeps_the_share_of_v32s_cache_that_its_report_tells() -> None:
    # DeepSeek-V4's report, figure 1: 10 % (Pro) and 7 % (Flash) of V3.2's at a million tokens.
    per_token = {name: plan(f"deepseek-{name}").cache.bytes_per_token for name in V4_AND_V32}
    assert per_token["v4-pro"] / per_token["v3.2-exp"] == pytest.approx(0.10, abs=0.02)
    assert per_token["v4-flash"] / per_token["v3.2-exp"] == pytest.approx(0.07, abs=0.02)


@pytest.mark.parametrize(("name", "gigaflops"), [("deepseek-v3", 250), ("deepseek-v2", 155)])
def test_training_work_is_the_published_one(name: str, gigaflops: int) -> None:
    # The same paper, table 2: per token at 4,096 tokens; training is a forward pass and two more.
    work = plan(name).work
    assert work.context == 4096
    assert 3 * work.reading_flops / 1e9 == pytest.approx(gigaflops, rel=0.005)


class FullCache:
    """Hands out the new token's states as if so many tokens had left the same."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def update(self, layer_idx, keys, values, positions):
        return tuple(states.expand(-1, self.slots, *states.shape[2:]) for states in (keys, values))


def counted_flops(fields: dict, tokens: int, cache: FullCache | None = None) -> int:
    """Let PyTorch count the products of a pass over `tokens` tokens."""
    model = CausalLM(read_config(fields))
    initialise(model, seed=0)
    positions = torch.arange(tokens)[None] + (cache.slots - 1 if cache else 0)
    # The fused kernel's products are not counted; those of plain attention are.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.logits(model(torch.zeros(1, tokens, dtype=torch.long), positions, cache))
    return counter.get_total_flops()


DENSE_LATENT = LATENT | {"n_routed_experts": None}


@pytest.mark.parametrize("fields", [DENSE_LATENT, GROUPED], ids=["latent", "grouped"])
def test_a_written_token_costs_what_pytorch_counts(fields: dict, tmp_path: Path) -> None:
    work = plan(write(tmp_path, fields)).work
    assert work.context == SMALL["max_position_embeddings"]
    assert work.generating_flops == counted_flops(fields, 1, FullCache(work.context))


@pytest.mark.parametrize("fields", [DENSE_LATENT, GROUPED], ids=["latent", "grouped"])
def test_a_read_token_costs_what_pytorch_counts(fields: dict, tmp_path: Path) -> None:
    work = plan(write(tmp_path, fields)).work
    counted = counted_flops(fields, work.context) / work.context
    # Plain attention also makes the products that the causal mask throws away: as many again.
    assert work.weight_flops + 2 * work.reading_attention_flops == counted


def test_weights_take_their_formats_bytes() -> None:
    made = plan("deepseek-v2-lite")
    total = made.parameters.total
    assert made.weights.bf16 == 2 * total
    assert made.weights.int8 == total
    assert made.weights.int4 == total // 2 + total // 32 * 2  # and 16 bits for each 32


def test_a_written_token_reads_active_weights_and_cache() -> None:
    made = plan("deepseek-v3")
    cached = made.cache.bytes_per_token * CONTEXT
    assert made.work.bytes_read.bf16 - cached == 2 * made.parameters.active_without_embedding
    assert made.work.bytes_read.int8 - cached == made.parameters.active_without_embedding


@pytest.mark.parametrize("spare", [0, -1])
def test_a_model_fits_up_to_the_last_byte(machine, spare: int) -> None:
    machine(0)
    needed = {fit.format: fit.needed for fit in plan("deepseek-v2-lite").fits}
    machine(needed["int8"] + spare)
    fits = {fit.format: fit for fit in plan("deepseek-v2-lite").fits}
    assert [fits[kind].fits for kind in ("bf16", "int8", "int4")] == [False, spare == 0, True]
    assert fits["bf16"].longest_context == 0
    assert fits["int8"].longest_context == CONTEXT + spare


def test_room_beyond_the_models_most_gives_no_longer_context(machine) -> None:
    machine(10**15)
    made = plan("deepseek-v3")
    assert {fit.longest_context for fit in made.fits} == {made.cache.max_context}


def test_a_gpu_is_a_second_place(machine) -> None:
    machine(10**9, gpu_memory=10**15)
    fits = plan("deepseek-v3").fits
    assert {(fit.place, fit.room, fit.fits) for fit in fits} == {
        ("memory", 10**9, False),
        ("GPU of dreams", 10**15, True),
    }


def test_a_folder_its_file_and_a_name_lead_to_the_same_config(tmp_path: Path) -> None:
    config = catalog()["deepseek-v3"].config
    folder = write(tmp_path / "v3", config_fields(config))
    asked = [
        folder,
        folder / "config.json",
        "deepseek-v3",
        "DeepSeek-V3",
        "deepseek-ai/DeepSeek-V3",
    ]
    assert [plan(name).config for name in asked] == [config] * len(asked)


def test_a_folder_goes_before_a_name(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "deepseek-v3", GROUPED)
    monkeypatch.chdir(tmp_path)
    assert plan("deepseek-v3").config.model_type == "llama"


def test_a_folder_without_a_config_hides_no_name(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "deepseek-v3").mkdir()
    monkeypatch.chdir(tmp_path)
    assert plan("deepseek-v3").source == "deepseek-ai/DeepSeek-V3"


def test_an_unknown_name_is_told_with_close_ones_and_all(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        plan("deepsek-v3")
    told = str(error.value)
    assert told.startswith("there is no model 'deepsek-v3'; did you mean deepseek-v3")
    assert all(name in told for name in catalog())


def test_a_name_like_no_other_is_told_without_a_guess() -> None:
    with pytest.raises(UserError) as error:
        plan("qqqq")
    assert "did you mean" not in str(error.value)
    assert "deepseek-v2-lite" in str(error.value)


def test_weights_that_others_packed_are_refused_before_they_are_counted(tmp_path: Path) -> None:
    write(tmp_path, LATENT)
    packed = {"model.layers.0.mlp.down_proj.qweight": torch.zeros(8, 8, dtype=torch.int32)}
    save_file(packed, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"tensor model\.layers\.0\.mlp\.down_proj\.weight has GPTQ"
    ):
        plan(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("notes.txt", "", "there is no config.json"),
        ("config.json", "{", "as JSON"),
        ("config.json", "[]", "no JSON object"),
        ("config.json", '{"model_type": "abacus"}', "`model_type` is 'abacus'"),
    ],
)
def test_a_wrong_folder_is_one_sentence(tmp_path: Path, file, content, told) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=told) as error:
        plan(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_everything_becomes_plain_data() -> None:
    data = json.loads(json.dumps(plan("deepseek-v3").to_dict()))
    assert data["parameters"]["total"] == 671026404352
    assert data["config"]["n_routed_experts"] == 256
    assert [fit["format"] for fit in data["fits"]][:3] == ["bf16", "int8", "int4"]


def test_plain_attention_would_keep_what_deepseek_says() -> None:
    """DeepSeek-V2, table 1: `2 * heads * width * layers` numbers a token, of 128 heads of 128."""
    cache = plan("deepseek-v2").cache
    assert cache.plain_bytes_per_token == 2 * 128 * 128 * 60 * 2
    dense = plan("deepseek-r1-distill-qwen-1.5b").cache  # 12 heads share 2 keys and values
    assert dense.plain_bytes_per_token == 6 * dense.bytes_per_token


def test_a_plan_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    made = plan("deepseek-v3")
    made.save(tmp_path / "plan.json")
    assert Plan.from_file(tmp_path / "plan.json") == made

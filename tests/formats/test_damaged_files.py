"""Damaged and hostile model files: the model opens, or one sentence says why not, and soon."""

import json
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import V3, YARN, network, write
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file

import moescope
from moescope.api import Model
from moescope.checkpoint import load_model, save_weights
from moescope.cli.main import run
from moescope.errors import UserError
from moescope.formats.gguf.container import GgufFile
from moescope.formats.safetensors import WEIGHTS

SECONDS = 5
"""That an attempt may take; an intact file takes a hundredth of it."""
EXAMPLES = 150
FIELDS = V3 | {
    "num_hidden_layers": 2,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}


@contextmanager
def within_seconds() -> Iterator[None]:
    """Fail where the code inside does not return."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def opens_or_is_refused(path: Path) -> bool:
    """Open a model and compute with it; only a sentence of one line may be raised."""
    with within_seconds():
        try:
            model = moescope.load(path, dtype="float32")
            model.logits(torch.zeros(1, 5, dtype=torch.long))
            model.tokenizer.encode("床前 the moon")
        except UserError as error:
            assert "\n" not in str(error)
            assert path.name in str(error) or path.parent.name in str(error)
            return False
        return True


def damaged(whole: bytes, end: int) -> st.SearchStrategy[bytes]:
    """Strategies of damage to the first `end` bytes: bits, bytes, numbers, and an early end."""
    places = st.integers(0, end - 1)
    numbers = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
    pieces = st.one_of(
        st.integers(0, 255).map(lambda value: bytes([value])),
        st.binary(min_size=1, max_size=16),
        numbers.map(lambda value: struct.pack("<Q", value)),
    )

    def overwritten(changes: list[tuple[int, bytes]]) -> bytes:
        made = bytearray(whole)
        for place, piece in changes:
            made[place : place + len(piece)] = piece
        return bytes(made)

    changed = st.lists(st.tuples(places, pieces), min_size=1, max_size=4).map(overwritten)
    return st.one_of(changed, changed, places.map(lambda place: whole[:place]))


# --- GGUF ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write(network(FIELDS), tmp_path_factory.mktemp("gguf") / "intact.gguf", "Q8_0")
    assert opens_or_is_refused(made)
    return made


def data_start(path: Path) -> int:
    return min(tensor.start for tensor in GgufFile(path).tensors.values())


def test_a_damaged_gguf_header(gguf_path: Path) -> None:
    path = gguf_path.with_name("damaged.gguf")

    @settings(max_examples=EXAMPLES)
    @given(damaged(gguf_path.read_bytes(), data_start(gguf_path)))
    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        opens_or_is_refused(path)

    attempt()


def test_any_bytes_behind_the_magic_number(gguf_path: Path) -> None:
    path = gguf_path.with_name("random.gguf")

    @settings(max_examples=EXAMPLES)
    @given(st.sampled_from([2, 3]), st.binary(max_size=200))
    def attempt(version: int, content: bytes) -> None:
        path.write_bytes(b"GGUF" + struct.pack("<I", version) + content)
        assert not opens_or_is_refused(path)

    attempt()


ODD_NUMBERS = [0, 1, 2, 3, 7, 31, 33, 1000, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
ODD_FLOATS = [0.0, -1.0, 1.0, 1e-38, 1e38, float("nan"), float("inf")]


def test_every_number_of_the_metadata_may_be_absurd(gguf_path: Path) -> None:
    """Shapes that do not match the tensors, and values that nothing can be divided by."""
    whole = gguf_path.read_bytes()
    path = gguf_path.with_name("absurd.gguf")
    tried = 0
    for key in GgufFile(gguf_path).metadata:
        name = struct.pack("<Q", len(key)) + key.encode()
        at = whole.index(name) + len(name)
        (kind,) = struct.unpack_from("<I", whole, at)
        odd = {
            4: [struct.pack("<I", number) for number in ODD_NUMBERS],
            5: [struct.pack("<i", number) for number in (-(2**31), -1, 0, 2)],
            6: [struct.pack("<f", number) for number in ODD_FLOATS],
            7: [b"\0", b"\1", b"\xff"],
        }
        for value in odd.get(kind, []):
            path.write_bytes(whole[: at + 4] + value + whole[at + 4 + len(value) :])
            opens_or_is_refused(path)
            tried += 1
    assert tried > 300


def test_every_early_end_is_refused(gguf_path: Path) -> None:
    whole = gguf_path.read_bytes()
    path = gguf_path.with_name("short.gguf")
    ends = [*range(0, data_start(gguf_path), 61), len(whole) // 2, len(whole) - 1]
    for end in ends:
        path.write_bytes(whole[:end])
        assert not opens_or_is_refused(path)


ARRAY_OF_STRINGS = struct.pack("<Q1sII", 1, b"k", 9, 8)
HOSTILE = {
    "43 bytes, which end within the number of strings": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    + ARRAY_OF_STRINGS
    + b"\xff\xff",
    "2^60 strings": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    + ARRAY_OF_STRINGS
    + struct.pack("<Q", 2**60),
    "2^60 keys": struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**60),
    "2^60 tensors": struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 0),
    "a key of 2^63 bytes": struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**63) + bytes(99),
    "arrays of arrays": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    + struct.pack("<Q1sI", 1, b"k", 9)
    + struct.pack("<IQ", 9, 1) * 50_000,
    "a tensor of 2^64 numbers": struct.pack("<4sIQQ", b"GGUF", 3, 1, 0)
    + struct.pack("<Q1sIQQQQIQ", 1, b"t", 4, 2**16, 2**16, 2**16, 2**16, 0, 0),
    "a tensor behind the end": struct.pack("<4sIQQ", b"GGUF", 3, 1, 0)
    + struct.pack("<Q1sIQIQ", 1, b"t", 1, 32, 0, 2**63)
    + bytes(200),
    "version 1": struct.pack("<4sIQQ", b"GGUF", 1, 0, 0),
    "big-endian": struct.pack(">4sIQQ", b"GGUF", 3, 0, 0),
    "nothing": b"",
    "text": b"this is no model\n" * 9,
    "16 million empty strings and no end": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    + ARRAY_OF_STRINGS
    + struct.pack("<Q", 2**24)
    + bytes(2**20),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_gguf(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[what])
    assert not opens_or_is_refused(path)
    with within_seconds():
        assert run(["generate", "--model", str(path), "a"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "model.gguf" in said.err


# --- safetensors ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def intact(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in moescope's int8, so that scales can be damaged, too."""
    folder = tmp_path_factory.mktemp("intact")
    save_weights(network(FIELDS), folder, dtype=torch.int8)
    model.tokenizer.save(folder)
    assert opens_or_is_refused(folder)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in intact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def header_end(path: Path) -> int:
    (length,) = struct.unpack_from("<Q", path.read_bytes())
    return 8 + length


ATTEMPT = settings(
    max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@ATTEMPT
@given(data=st.data())
def test_a_damaged_safetensors_header(data: st.DataObject, intact: Path, folder: Path) -> None:
    whole = (intact / WEIGHTS).read_bytes()
    content = data.draw(damaged(whole, header_end(intact / WEIGHTS)))
    (folder / WEIGHTS).write_bytes(content)
    opens_or_is_refused(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@ATTEMPT
@given(data=st.data())
def test_damaged_json(name: str, data: st.DataObject, intact: Path, folder: Path) -> None:
    whole = (intact / name).read_bytes()
    (folder / name).write_bytes(data.draw(damaged(whole, len(whole))))
    opens_or_is_refused(folder)


ODD = [None, 0, 1, -1, 3, 2**31, 2**63, 10**30, 1e308, -1.5, "x", "", [], {}, True, [1], "yarn"]


def test_every_field_of_the_config_may_be_absurd(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    scaling = fields["rope_scaling"]
    tries = [fields | {name: odd} for name in fields for odd in ODD]
    tries += [fields | {"rope_scaling": scaling | {name: odd}} for name in scaling for odd in ODD]
    for tried in tries:
        (folder / "config.json").write_text(json.dumps(tried))
        opens_or_is_refused(folder)


KEY = "model.layers.0.self_attn.o_proj.weight"
SCALES = [torch.ones(1, 64), torch.ones(64), torch.ones(64, 1, 1), torch.ones(64, 1).int()]
WRONG = {
    "a scale along the other side": {KEY + "_scale": SCALES[0]},
    "a flat scale": {KEY + "_scale": SCALES[1]},
    "a deep scale": {KEY + "_scale": SCALES[2]},
    "a scale of integers": {KEY + "_scale": SCALES[3]},
    "a weight of int16": {KEY: torch.ones(64, 64, dtype=torch.int16)},
    "a weight of complex numbers": {KEY: torch.ones(64, 64, dtype=torch.complex64)},
    "FP8 with a scale for each number": {
        KEY: torch.ones(64, 64).to(torch.float8_e4m3fn),
        KEY + "_scale_inv": torch.ones(64, 64),
    },
}


FOREIGN = {
    "GPTQ": (("qweight", "scales", "qzeros", "g_idx"), "GPTQ's or AWQ's form"),
    "compressed-tensors": (("weight_packed", "weight_scale"), "compressed-tensors' form"),
    "bitsandbytes": (("weight", "weight.absmax"), "bitsandbytes' form"),
}


@pytest.mark.parametrize("whose", FOREIGN)
def test_weights_that_others_packed_are_refused_by_their_name(whose: str, folder: Path) -> None:
    endings, told = FOREIGN[whose]
    tensors = load_file(folder / WEIGHTS)
    del tensors[KEY], tensors[KEY + "_scale"]
    packed = torch.zeros(64 * 8, 1, dtype=torch.uint8)
    tensors |= {KEY.removesuffix("weight") + ending: packed.clone() for ending in endings}
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match=f"{told}.*take the model as it was published"):
        load_model(folder)


@pytest.mark.parametrize("what", WRONG)
def test_weights_and_scales_of_a_wrong_kind(what: str, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS) | WRONG[what]
    if KEY in WRONG[what]:
        del tensors[KEY + "_scale"]
    save_file(tensors, folder / WEIGHTS)
    assert not opens_or_is_refused(folder)

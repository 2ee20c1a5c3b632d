"""Packed weights kept in a file come back bit for bit, or not at all."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from gguf_models import VARIANTS, network, write
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from moescope.api import Model, load
from moescope.catalog import BOX
from moescope.checkpoint import save_weights
from moescope.kernels import cpu
from moescope.native import pack_cache
from moescope.native.pack_file import MAGIC, NewPack, StalePack, StoredPack

pytestmark = pytest.mark.skipif(
    not cpu.available(), reason="tests/kernels/test_cpu.py says why this is fine"
)
IDS = torch.arange(20)[None]


@pytest.fixture(autouse=True)
def everything_is_worth_keeping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pack_cache, "SMALLEST", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    """A checkpoint on disk."""
    made = tmp_path / "checkpoint"
    save_weights(model.network, made)
    model.tokenizer.save(made)
    return made


def open_twice(path: Path, weight_format: str = "int8") -> tuple[Model, Model]:
    first, second = (load(path, quantize=weight_format) for _ in range(2))
    return first, second


def packs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.pack"))


@pytest.mark.parametrize("weight_format", ["int8", "int4", "bf16"])
def test_a_second_start_reads_what_the_first_one_packed(folder: Path, weight_format: str) -> None:
    first, second = open_twice(folder, weight_format)
    assert first.pack is None
    assert second.pack == folder / f"moescope-{weight_format}.pack" == packs(folder)[0]
    assert torch.equal(first.logits(IDS), second.logits(IDS))
    assert second.generate("床前明月光", max_tokens=4) == first.generate("床前明月光", max_tokens=4)
    assert second.steer(num_experts_per_tok=1).pack == second.pack


@pytest.mark.parametrize("variant", ["V2-Lite", "V3, one group, tied"])
@pytest.mark.parametrize("file_type", ["F32", "BF16", "Q8_0"])
def test_gguf_is_kept_beside_its_file(
    variant: str, file_type: str, folder: Path, tmp_path: Path
) -> None:
    path = write(network(VARIANTS[variant]), tmp_path / "small.Q.gguf", file_type)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    first, second = open_twice(path)
    assert first.pack is None and second.pack == tmp_path / "small.Q-int8.pack"
    assert torch.equal(first.logits(IDS), second.logits(IDS))


def test_weights_of_another_training_are_packed_anew(folder: Path) -> None:
    """Even where the size and the time of the file stay, as copying tools leave them."""
    second = open_twice(folder)[1]
    assert second.pack is not None
    weights = folder / "model.safetensors"
    before = weights.stat()
    network = load(folder).network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.25)
    save_weights(network, folder)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    third, fourth = open_twice(folder)
    assert third.pack is None and fourth.pack is not None
    assert torch.equal(third.logits(IDS), fourth.logits(IDS))
    assert not torch.equal(third.logits(IDS), second.logits(IDS))


def rewrite_in_place(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))


def rewrite_config(folder: Path) -> None:
    config = folder / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "rms_norm_eps": 1e-3}))


@pytest.mark.parametrize("touch", [rewrite_in_place, rewrite_config])
def test_a_touched_source_is_packed_anew(folder: Path, touch: Callable[[Path], None]) -> None:
    assert open_twice(folder)[1].pack is not None
    touch(folder)
    again = open_twice(folder)
    assert [bool(opened.pack) for opened in again] == [False, True]


@pytest.mark.parametrize("attribute", ["layout", "code", "__version__", "float32"])
def test_other_code_does_not_read_it(
    folder: Path, attribute: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert open_twice(folder)[1].pack is not None
    options = {}
    if attribute == "layout":
        monkeypatch.setattr(cpu, "layout", lambda: "another")
    elif attribute == "code":
        changed = shutil.copytree(cpu.__path__[0], tmp_path / "cpu")
        with (changed / "weights.py").open("a") as file:
            file.write("# changed\n")
        monkeypatch.setattr(cpu, "__path__", [str(changed)])
    elif attribute == "__version__":
        monkeypatch.setattr("moescope.__version__", "99")
    else:
        options = {"dtype": "bfloat16"}
    assert load(folder, quantize="int8", **options).pack is None


def damage(pack: Path, at: int) -> None:
    content = bytearray(pack.read_bytes())
    content[at] ^= 16
    pack.write_bytes(content)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), how=st.sampled_from(["cut", "flip"]))
def test_no_damaged_pack_is_believed(folder: Path, place: float, how: str) -> None:
    pack = folder / "moescope-int8.pack"
    if not pack.exists():
        load(folder, quantize="int8")
    whole = pack.read_bytes()
    at = int(place * len(whole))
    if how == "cut":
        pack.write_bytes(whole[:at])
    else:
        damage(pack, at)
    opened = load(folder, quantize="int8")
    found = pack.read_bytes()
    pack.write_bytes(whole)
    if opened.pack is None:
        assert found == whole, "it is made anew"
    else:  # what lies between two entries is nobody's
        assert how == "flip" and whole[at] == 0
    assert torch.equal(opened.logits(IDS), plain_logits(folder))


_plain: dict[Path, Tensor] = {}


def plain_logits(folder: Path) -> Tensor:
    if folder not in _plain:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("MOESCOPE_PACKS", "off")
            _plain[folder] = load(folder, quantize="int8").logits(IDS)
    return _plain[folder]


def with_header(pack: Path, header: bytes) -> None:
    """Put another header, with its right sum, in the place of a pack's own."""
    length = len(header).to_bytes(8, "little")
    pack.write_bytes(MAGIC + length + sha256(header).digest() + header + bytes(8192))


HUGE = 2**62
HOSTILE: dict[str, Callable[[dict], object]] = {
    "no object": lambda header: [],
    "no entries": lambda header: {**header, "entries": []},
    "endless numbers": lambda header: {**header, "entries": [10**5000]},
    "deep": lambda header: {**header, "entries": "DEEP"},
    "offset": lambda header: edited(header, offset=HUGE),
    "negative offset": lambda header: edited(header, offset=-4096),
    "size": lambda header: edited(header, size=HUGE),
    "no size": lambda header: edited(header, size=0),
    "shape": lambda header: edited(header, shape=[HUGE, HUGE, HUGE]),
    "kind": lambda header: edited(header, kind="int9"),
    "text for a number": lambda header: edited(header, size="12"),
    "more": lambda header: {**header, "entries": header["entries"] * 2},
    "more than a header": lambda header: {**header, "code": "import os"},
}


def edited(header: dict, **fields: object) -> dict:
    return {**header, "entries": [{**entry, **fields} for entry in header["entries"]]}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_headers_cost_a_packing(folder: Path, attack: str) -> None:
    load(folder, quantize="int8")
    pack = folder / "moescope-int8.pack"
    content = pack.read_bytes()
    length = int.from_bytes(content[8:16], "little")
    sys.set_int_max_str_digits(0)
    header = json.dumps(HOSTILE[attack](json.loads(content[48 : 48 + length])))
    sys.set_int_max_str_digits(4300)
    with_header(pack, header.replace('"DEEP"', "[" * 100_000 + "]" * 100_000).encode())
    opened = load(folder, quantize="int8")
    assert opened.pack is None
    assert pack.read_bytes() == content
    assert torch.equal(opened.logits(IDS), plain_logits(folder))


def test_a_header_of_terabytes_is_not_read(folder: Path) -> None:
    load(folder, quantize="int8")
    pack = folder / "moescope-int8.pack"
    pack.write_bytes(MAGIC + (2**40).to_bytes(8, "little") + bytes(100))
    assert load(folder, quantize="int8").pack is None


def test_many_starts_at_once_leave_one_whole_file(folder: Path) -> None:
    program = (
        "import sys; from moescope.native import pack_cache; pack_cache.SMALLEST = 0\n"
        "from moescope import load; import torch\n"
        "print(load(sys.argv[1], quantize='int8').logits(torch.arange(20)[None]).sum().item())"
    )
    starts = [
        subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    printed = {start.communicate()[0] for start in starts}
    assert all(start.returncode == 0 for start in starts) and len(printed) == 1
    assert [file.name for file in folder.glob("moescope*")] == ["moescope-int8.pack"]
    assert load(folder, quantize="int8").pack is not None


def test_who_comes_second_leaves_writing_to_the_first(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = FileLock(folder / ".moescope-int8.pack.lock")
    with caplog.at_level(logging.INFO), lock:
        load(folder, quantize="int8")
    assert packs(folder) == [] and "by somebody else" in caplog.text
    assert open_twice(folder)[1].pack is not None


def test_where_the_folder_is_not_writable_the_users_is_taken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writable = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != folder and writable(path, mode)
    )
    first, second = open_twice(folder)
    assert packs(folder) == [] and second.pack is not None
    assert second.pack.parent == tmp_path / "user" / "moescope" / "packs"
    assert torch.equal(first.logits(IDS), second.logits(IDS))


def test_where_nothing_is_writable_all_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "moescope-int8.pack").mkdir()  # a folder cannot be replaced by a file
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first, second = open_twice(folder)
    assert first.pack is second.pack is None
    assert torch.equal(first.logits(IDS), second.logits(IDS))
    assert caplog.text.count("packed weights are not kept") >= 2
    assert packs(tmp_path) == [folder / "moescope-int8.pack"]


def test_a_disk_that_is_nearly_full_is_spared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pack_cache, "SPARE", 2**62)
    load(folder, quantize="int8")
    assert packs(folder.parent) == [] and "too full" in caplog.text


def test_the_model_in_the_box_leaves_the_package_alone(tmp_path: Path) -> None:
    second = open_twice(Path("tiny"))[1]
    assert packs(BOX) == [] and second.pack is not None
    assert second.pack.is_relative_to(tmp_path / "user")


def test_small_models_leave_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert open_twice(folder)[1].pack is None and packs(folder) == []


def test_the_switch_turns_it_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder, quantize="int8")
    monkeypatch.setenv("MOESCOPE_PACKS", "off")
    assert load(folder, quantize="int8").pack is None


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    matrices=st.integers(1, 3),
    outputs=st.integers(1, 130),
    columns=st.integers(1, 300),
    weight_format=st.sampled_from(["int8", "int4", "bf16"]),
)
def test_any_shape_comes_back(
    tmp_path: Path, matrices: int, outputs: int, columns: int, weight_format: str
) -> None:
    weight = torch.randn(matrices, outputs, columns)
    made, path = NewPack(), tmp_path / "any.pack"
    packed, table = made.weights(weight, weight_format), made.weights(weight[0], None)
    made.write(path, "key")
    stored = StoredPack(path, "key")
    empty = torch.empty(weight.shape, device="meta")
    shape = (matrices, outputs, columns)
    read = stored.weights(empty, weight_format)
    assert torch.equal(cpu.unpacked(read, shape), cpu.unpacked(packed, shape))
    ids = torch.arange(outputs)
    rows = cpu.rows(stored.weights(empty[0], None), ids, columns)
    assert torch.equal(rows, cpu.rows(table, ids, columns))
    assert torch.equal(rows, weight[0])
    stored.close()
    with pytest.raises(StalePack, match="other files"):
        StoredPack(path, "another key")


def test_large_weights_move_into_memory_while_they_are_used(tmp_path: Path) -> None:
    shape = (5, 1000, 2048)  # not a whole number of the pieces that are moved
    weight, x = torch.randn(shape), torch.randn(3, 2048)
    made, path = NewPack(), tmp_path / "large.pack"
    packed = made.weights(weight, "int8")
    made.write(path, "key")
    stored = StoredPack(path, "key")
    read = stored.weights(torch.empty(shape, device="meta"), "int8")
    expected = cpu.linear(packed, 5000, x)
    if sys.platform == "linux":
        assert "large.pack" in Path("/proc/self/maps").read_text()
    stored.close()
    deadline = time.monotonic() + 60
    while cpu.unsettled() and time.monotonic() < deadline:
        assert torch.equal(cpu.linear(read, 5000, x), expected)
    assert cpu.unsettled() == 0
    if sys.platform == "linux":
        assert "large.pack" not in Path("/proc/self/maps").read_text()
    path.unlink()
    assert torch.equal(cpu.linear(read, 5000, x), expected)
    assert torch.equal(cpu.unpacked(read, shape), cpu.unpacked(packed, shape))


def test_weights_that_are_dropped_before_they_are_moved_are_passed_over(tmp_path: Path) -> None:
    shape = (1, 1000, 4500)
    made, path = NewPack(), tmp_path / "dropped.pack"
    made.weights(torch.randn(shape), "int8")
    made.write(path, "key")
    stored = StoredPack(path, "key")
    stored.weights(torch.empty(shape, device="meta"), "int8")
    stored.close()
    deadline = time.monotonic() + 60
    while cpu.unsettled() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cpu.unsettled() == 0


def test_a_sum_tells_any_bit_and_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(256, (3 * 2**20 + 5,), dtype=torch.uint8, generator=generator)
    right = cpu.checksum(data.numpy())
    for at in (0, 7, 2**20, len(data) - 1):
        other = data.clone()
        other[at] ^= 1
        assert cpu.checksum(other.numpy()) != right
    assert cpu.checksum(data.roll(2**20).numpy()) != right
    assert cpu.checksum(data[:-1].numpy()) != right
    assert cpu.checksum(torch.zeros(64, dtype=torch.uint8).numpy()) != cpu.checksum(
        torch.zeros(65, dtype=torch.uint8).numpy()
    )
    before = cpu.threads()
    try:
        cpu.set_threads(1)
        assert cpu.checksum(data.numpy()) == right
    finally:
        cpu.set_threads(before)

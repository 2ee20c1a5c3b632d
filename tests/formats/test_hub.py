"""Models on the Hub, held to its own library against a server on this machine."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf_models import V3, network, write
from hub_server import TOKEN, Hub, point_at, serving

import moescope
from moescope.api import Model
from moescope.errors import UserError
from moescope.formats import hub as hub_module
from moescope.formats.hub import HubModel, cached
from moescope.formats.repository import choose, is_hub_name
from moescope.lab.plan import plan


@pytest.fixture(scope="module")
def server():
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server, with nothing on it, and an empty cache."""
    endpoint = server.endpoint
    server.__dict__.update(Hub(endpoint=endpoint).__dict__)
    point_at(endpoint, tmp_path / "cache", monkeypatch)
    monkeypatch.setattr(hub_module, "SECONDS_BETWEEN", 0.0)
    return server


@pytest.fixture
def folder(hub: Hub, model: Model, tmp_path: Path) -> Path:
    """`org/model`: safetensors, and things that nobody needs."""
    folder = tmp_path / "there"
    model.save(folder)
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    (folder / "original").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "original/model.safetensors")
    hub.repos["org/model"] = folder
    return folder


@pytest.fixture
def ggufs(hub: Hub, tmp_path: Path) -> Path:
    """`org/gguf`: one file, one in a folder and split, and parts of other models."""
    folder = tmp_path / "ggufs"
    folder.mkdir()
    made = network(V3)
    write(made, folder / "small-Q8_0.gguf", "Q8_0")
    write(made, folder / "small-BF16.gguf", "BF16")
    (folder / "mmproj-F16.gguf").write_bytes(b"GGUF")
    hub.repos["org/gguf"] = folder
    return folder


def test_a_folder_is_fetched_whole_and_nothing_else(hub: Hub, folder: Path, model: Model) -> None:
    opened = moescope.load("org/model")
    ids = torch.tensor([model.tokenizer.encode("the moon before my bed")])
    torch.testing.assert_close(opened.logits(ids), model.logits(ids))
    assert opened.path is not None
    held = {path.name for path in opened.path.iterdir()}
    assert held == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } & {path.name for path in folder.iterdir()}
    assert not {"modeling.py", "pytorch_model.bin"} & set(hub.served)
    assert not any("original" in path for _, path in hub.requests)


def test_what_is_there_is_not_fetched_again_and_opens_offline(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = moescope.load("org/model").path
    served = hub.served.copy()
    assert moescope.load("org/model").path == first
    assert hub.served == served
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert moescope.load("org/model").path == first
    assert cached("org/other") is None


def test_half_a_model_in_the_cache_is_none(hub: Hub, ggufs: Path) -> None:
    opened = HubModel("org/gguf:Q8_0").download(lambda done, total: None)
    assert cached("org/gguf:Q8_0") == opened
    assert cached("org/gguf:BF16") is None
    opened.unlink()
    assert cached("org/gguf:Q8_0") is None


def test_a_broken_connection_is_taken_up_again(hub: Hub, folder: Path) -> None:
    name, size = "model.safetensors", (folder / "model.safetensors").stat().st_size
    hub.cut_after[name] = (size // 2, 3)
    told: list[tuple[int, int]] = []
    path = HubModel("org/model").download(lambda done, total: told.append((done, total)))
    assert (path / name).read_bytes() == (folder / name).read_bytes()
    assert hub.served[name] < size * 1.5
    assert told[-1][0] == told[-1][1]
    assert sorted(told) == told


def test_an_interrupted_download_goes_on_where_it_ended(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, size = "model.safetensors", (folder / "model.safetensors").stat().st_size

    def interrupt(done: int, total: int) -> None:
        if done > size // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        HubModel("org/model").download(interrupt)
    found = HubModel("org/model")
    assert 0 < found.missing_bytes < size
    hub.served.clear()
    path = found.download(lambda done, total: None)
    assert (path / name).read_bytes() == (folder / name).read_bytes()
    assert hub.served[name] < size


def test_a_server_that_knows_no_ranges_sends_it_anew(hub: Hub, folder: Path) -> None:
    found = HubModel("org/model")
    file = found._files["model.safetensors"]
    found._partial(file).parent.mkdir(parents=True)
    found._partial(file).write_bytes(b"something else")
    hub.ignores_ranges = True
    told: list[int] = []
    path = found.download(lambda done, total: told.append(done))
    assert (path / file.path).read_bytes() == (folder / file.path).read_bytes()
    assert told[-1] == sum(found.size(path) for path in found.choice.paths)
    assert found.read("config.json", 2, 9) == (folder / "config.json").read_bytes()[2:9]


def test_a_connection_that_breaks_always_is_a_sentence(hub: Hub, folder: Path) -> None:
    hub.cut_after["model.safetensors"] = (0, 99)
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        HubModel("org/model").download(lambda done, total: None)


def test_a_model_that_does_not_fit_is_refused_before_it_is_fetched(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moescope.api.memory", lambda: (2**30, 1000))
    with pytest.raises(UserError, match=r"takes 0\.0 GiB in float32"):
        moescope.load("org/model")
    with pytest.raises(UserError, match=r"takes 0\.0 GiB in int4"):
        moescope.load("org/model", quantize="int4")
    monkeypatch.undo()


def test_a_full_disk_is_told_before_anything_is_fetched(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"GB more on the disk, but 0\.0 GB are free .* HF_HOME"):
        moescope.load("org/model")
    assert not hub.served


def test_a_gated_model_says_where_to_ask(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add("org/model")
    with pytest.raises(UserError, match=r"org/model is gated: ask .*/org/model, then set HF_TOKEN"):
        moescope.load("org/model")
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    assert moescope.load("org/model").path


def test_what_is_not_there_or_cannot_be_reached_is_a_sentence(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no folder org/none, and the Hub has no such model"):
        moescope.load("org/none")
    with pytest.raises(UserError, match="is no name of a model"):
        moescope.load("org/a b")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the Hub cannot be reached at http://127\.0\.0\.1:9"):
        moescope.load("org/none")


# --- GGUF ----------------------------------------------------------------------------------------


def test_a_quantisation_is_fetched_alone(hub: Hub, ggufs: Path) -> None:
    path = HubModel("org/gguf:q8_0").download(lambda done, total: None)
    assert path.read_bytes() == (ggufs / "small-Q8_0.gguf").read_bytes()
    assert set(hub.served) == {"small-Q8_0.gguf"}


def test_all_parts_of_a_split_model_are_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "split" / "Q8_0"
    folder.mkdir(parents=True)
    names = [f"big-Q8_0-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    hub.repos["org/split"] = folder.parent
    path = HubModel("org/split").download(lambda done, total: None)
    assert path.name == names[0]
    assert [(path.parent / name).read_bytes() for name in names] == [n.encode() for n in names]
    (folder / names[1]).unlink()
    with pytest.raises(UserError, match=r"lacks Q8_0/big-Q8_0-00002-of-00003.gguf, one of the 3"):
        HubModel("org/split:Q8_0")


SIZES = {
    "README.md": 1,
    "m-Q2_K.gguf": 2_000_000_000,
    "m-Q4_K_M.gguf": 4_000_000_000,
    "UD/m-UD-Q4_K_XL-00001-of-00002.gguf": 3_000_000_000,
    "UD/m-UD-Q4_K_XL-00002-of-00002.gguf": 2_000_000_000,
    "m.imatrix.gguf": 5,
    "MXFP4/model.gguf": 6,
}


def chosen(wanted: str, sizes: dict[str, int] = SIZES):
    return choose("org/repo", sizes, wanted, lambda: {"a.safetensors", "b.safetensors"})


@pytest.mark.parametrize(
    ("wanted", "main"),
    [
        ("Q2_K", "m-Q2_K.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("UD-Q4_K_XL", "UD/m-UD-Q4_K_XL-00001-of-00002.gguf"),
        ("Q4_K_XL", "UD/m-UD-Q4_K_XL-00001-of-00002.gguf"),
        ("m-q2_k.gguf", "m-Q2_K.gguf"),
        ("mxfp4", "MXFP4/model.gguf"),
    ],
)
def test_quantisations_are_found_by_name(wanted: str, main: str) -> None:
    assert chosen(wanted).main == main
    assert chosen(wanted).note == ""


def test_the_usual_quantisation_is_taken_and_told() -> None:
    choice = chosen("")
    assert choice.main == "m-Q4_K_M.gguf"
    listed = "Q2_K (2.0 GB), Q4_K_M (4.0 GB)"
    assert f"{listed}; this is Q4_K_M" in choice.note and "UD-Q4_K_XL (5.0 GB)" in choice.note


@pytest.mark.parametrize(
    ("wanted", "change", "said"),
    [
        ("Q9_K", {}, r"holds no Q9_K, but MXFP4 \(0\.0 GB\), .*Q2_K \(2\.0 GB\)"),
        ("", {"m-Q4_K_M.gguf": None}, "holds GGUF files of several quantisations: .* such as"),
        ("Q2_K", {"n-Q2_K.gguf": 1}, "several files of Q2_K: m-Q2_K.gguf, n-Q2_K.gguf; name one"),
    ],
)
def test_what_is_not_clear_is_listed(wanted: str, change: dict, said: str) -> None:
    sizes = {name: size for name, size in (SIZES | change).items() if size is not None}
    with pytest.raises(UserError, match=said):
        chosen(wanted, sizes)


@pytest.mark.parametrize(
    ("files", "wanted", "said"),
    [
        (["config.json", "pytorch_model.bin"], "", "only pickle files, which can run code"),
        (["config.json", "model.safetensors"], "Q4_0", "no GGUF files; leave out :Q4_0"),
        (["model.safetensors"], "", "no config.json"),
        (["README.md"], "", "neither safetensors nor GGUF"),
    ],
)
def test_a_repository_without_a_model_says_what_it_holds(files, wanted, said) -> None:
    with pytest.raises(UserError, match=said):
        chosen(wanted, dict.fromkeys(files, 1))


def test_an_index_decides_which_files_hold_weights() -> None:
    index = "model.safetensors.index.json"
    sizes = dict.fromkeys(["config.json", index, "a.safetensors", "consolidated.safetensors"], 1)
    with pytest.raises(UserError, match=r"lacks b\.safetensors, though"):
        chosen("", sizes)
    choice = chosen("", sizes | {"b.safetensors": 1})
    assert choice.weights == ("a.safetensors", "b.safetensors")
    assert set(choice.paths) == {"config.json", index, "a.safetensors", "b.safetensors"}


def test_names_of_the_hub_are_told_from_paths() -> None:
    assert is_hub_name("org/repo") and is_hub_name("org/repo:Q4_K_M")
    assert not any(map(is_hub_name, ("repo", "./a", "/a/b", "a/b/c", "a/", "~/a")))


# --- headers -------------------------------------------------------------------------------------


def test_headers_are_read_without_the_weights(hub: Hub, folder: Path) -> None:
    padded = folder / "model.safetensors"
    found = HubModel("org/model")
    headers = found.headers()
    assert headers.config.n_routed_experts == 8
    total = sum(tensor.size for tensor in headers.tensors.values())
    assert total < padded.stat().st_size < total + (1 << 16)


def test_a_plan_of_a_repository_reads_its_headers_alone(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    fields = V3 | {"hidden_size": 512, "n_routed_experts": 32, "moe_intermediate_size": 128}
    write(network(fields), folder / "large-Q8_0.gguf", "Q8_0")
    size = (folder / "large-Q8_0.gguf").stat().st_size
    hub.repos["org/large"] = folder
    made = plan("org/large:Q8_0")
    assert made.config.hidden_size == 512
    assert sum(hub.served.values()) < min(size / 4, 2 << 20)
    assert not (tmp_path / "cache").exists()
    assert made.stored is not None and made.stored.kinds["Q8_0"] > 0.9 * size


def test_a_damaged_header_is_a_sentence(hub: Hub, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"org/model/model.safetensors is no intact safetensors"):
        HubModel("org/model").headers()
    (folder / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match=r"config\.json holds no JSON object"):
        HubModel("org/model").headers()

"""Where packed weights are kept from one start to the next, and when.

A model of more than `SMALLEST` packed bytes leaves a file beside its checkpoint, or in the user's
cache folder where that is not writable, and the next start reads it instead. The file
is keyed to the checkpoint's content and to the code that packs; `MOESCOPE_PACKS=off` switches all
of this off. Nothing here fails a load: what cannot be read or kept is logged.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

import moescope
from moescope import checkpoint, families
from moescope.catalog import BOX
from moescope.checkpoint import load_model
from moescope.errors import UserError
from moescope.formats import safetensors, weight_files
from moescope.formats.gguf import container, model
from moescope.formats.source import WeightSource
from moescope.kernels import cpu, quantize
from moescope.model.decoder import CausalLM
from moescope.native.network import Packer
from moescope.native.pack_file import (
    NewPack,
    StalePack,
    StoredPack,
    WrittenPack,
    written_pack,
)

SWITCH = "MOESCOPE_PACKS"
SMALLEST = 2**26
"""Bytes of a pack that is kept; less is packed in about a third of a second."""

SPARE = 2**30
"""Bytes that must stay free on the disk."""

HEAD, SAMPLES, SAMPLE = 2**20, 64, 4096
"""Bytes at the front of a file that its key depends on, and further parts all over it."""

log = logging.getLogger(__name__)


def load_packed(
    source: WeightSource,
    dtype: torch.dtype,
    weight_format: str | None,
    *,
    stream_experts: bool = False,
) -> tuple[CausalLM, Path | None]:
    """Make a network with packed weights: from an earlier start's pack, if there is one that fits.

    Args:
        source: an open checkpoint.
        dtype: of what is not packed.
        weight_format: `int8`, `int4` or `bf16`; None keeps what the file holds.
        stream_experts: leave experts in the pack, which is made first if there is none.

    Returns:
        The network, and the pack that it was read from; None if it was packed anew.

    Raises:
        UserError: as for `load_model`, or a pack to stream from cannot be written.
    """
    cache = PackCache(source.files, weight_format, str(dtype))
    if (stored := cache.find(streams_experts=stream_experts)) is not None:
        try:
            network = load_model(source, dtype=dtype, packer=Packer(weight_format, stored))
            stored.close()
            log.info("packed weights come from %s", stored.path)
            return network, stored.path
        except StalePack as why:
            log.warning("%s is not used, and made anew: %s", stored.path, why)
    if stream_experts:
        with cache.writing() as written:
            return load_model(source, dtype=dtype, packer=Packer(weight_format, written)), None
    made = NewPack()
    network = load_model(source, dtype=dtype, packer=Packer(weight_format, made))
    cache.keep(made)
    return network, None


class PackCache:
    """The packs of one checkpoint in one format.

    Args:
        files: config and weights, the first of which names the checkpoint's folder.
        weight_format: `int8`, `int4` or `bf16`; None keeps what the file holds.
        dtype: that of the tensors that are not packed.
    """

    def __init__(self, files: Sequence[Path], weight_format: str | None, dtype: str) -> None:
        self._files = list(files)
        weight_format = weight_format or "own"
        self._recipe = [weight_format, dtype]
        first = self._files[0]
        stem = "moescope" if first.name == "config.json" else first.stem
        name = f"{stem}-{weight_format}.pack"
        folder = first.parent.absolute()
        unique = hashlib.sha256(os.fsencode(folder / name)).hexdigest()[:16]
        self._beside = folder / name
        self._apart = user_folder() / f"{folder.name}-{unique}-{name}"
        self._off = _switched_off() or not cpu.available()

    def find(self, *, streams_experts: bool = False) -> StoredPack | None:
        """Open the pack of an earlier start; None if there is none that fits."""
        if self._off:
            return None
        for path in (self._beside, self._apart):
            if not path.is_file():
                continue
            try:
                return StoredPack(path, self._key(), streams_experts=streams_experts)
            except StalePack as why:
                log.info("%s is not used: %s", path, why)
        return None

    @contextmanager
    def writing(self) -> Generator[WrittenPack]:
        """Yield a pack that is written as it is made, in the first place that takes it.

        Raises:
            UserError: packs are switched off, or no place can be written.
        """
        if self._off:
            raise UserError(
                "experts are streamed from packed weights in a file, which need the native kernels "
                f"and {SWITCH} not to be off"
            )
        beside = os.access(self._beside.parent, os.W_OK) and BOX not in self._beside.parents
        with written_pack(self._beside if beside else self._apart, self._key()) as pack:
            yield pack

    def keep(self, pack: NewPack) -> None:
        """Write what was packed, in the first place that takes it."""
        if self._off or pack.size < SMALLEST:
            return
        for path in (self._beside, self._apart):
            if BOX not in path.parents and self._write(pack, path):
                return

    def _write(self, pack: NewPack, path: Path) -> bool:
        try:
            if path == self._apart:
                path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK):
                log.info("%s is not writable", path.parent)
                return False
            spare = shutil.disk_usage(path.parent).free - pack.size
            if spare < SPARE:
                log.warning("the disk is too full to keep packed weights in %s", path)
                return False
            with FileLock(path.with_name(f".{path.name}.lock"), blocking=False):
                pack.write(path, self._key())
        except Timeout:
            log.info("%s is being written by somebody else", path)
            return True
        except (OSError, UserError) as error:
            log.warning("packed weights are not kept: %s", error)
            return False
        log.info("packed weights are kept in %s", path)
        return True

    def _key(self) -> str:
        """Say of what and by which code the weights are packed."""
        parts = {
            "version": moescope.__version__,
            "layout": cpu.layout(),
            "code": _code(),
            "recipe": self._recipe,
            "files": [_fingerprint(file) for file in self._files],
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def packs_are_kept() -> str:
    """Say in a few words where packs are kept, and what lies in the user's folder."""
    if _switched_off():
        return f"made at every start ({SWITCH}=off)"
    found = list(user_folder().glob("*.pack"))
    held = sum(file.stat().st_size for file in found) / 2**30
    return (
        "kept beside each checkpoint for the next start, or else in "
        f"{user_folder()} ({len(found)} now, {held:.1f} GiB)"
    )


def _switched_off() -> bool:
    return os.environ.get(SWITCH, "").lower() in ("off", "0")


def user_folder() -> Path:
    """Return where packs go that cannot stand beside their checkpoint."""
    return user_cache_path("moescope", appauthor=False) / "packs"


def _fingerprint(file: Path) -> list[str | int]:
    """Name, size, time and a hash of the front of a file and of samples all over it.

    Raises:
        StalePack: the file is gone.
    """
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            digest = hashlib.sha256(stream.read(HEAD))
            for sample in range(1, SAMPLES + 1):
                stream.seek(max(0, (status.st_size - SAMPLE) * sample // SAMPLES))
                digest.update(stream.read(SAMPLE))
    except OSError as error:
        raise StalePack(str(error)) from error
    return [file.name, status.st_size, status.st_mtime_ns, digest.hexdigest()]


def _code() -> str:
    """Hash the source of all that stands between a checkpoint and its packed weights."""
    digest = hashlib.sha256()
    for module in (checkpoint, safetensors, weight_files, container, model, quantize):
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    for folder in (Path(families.__path__[0]), Path(cpu.__path__[0]), Path(__file__).parent):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()

"""Text to token files: documents become memory-mapped ids, one file a domain."""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from moescope.errors import UserError
from moescope.files import atomic_path, write_text
from moescope.text.documents import (
    HELD_OUT_SHARE,
    Document,
    TextFile,
    is_split,
    read_documents,
    text_files,
)
from moescope.text.split import Fingerprint, hash_number
from moescope.text.tokenizer import Tokenizer

FORMAT_VERSION = 2
ENCODE_BATCH = 512  # documents

Progress = Callable[[int, int], None]  # (bytes of text done, bytes of source files)


@dataclass(frozen=True)
class Shard:
    """The documents of one domain, end to end, each as bos + tokens + eos.

    Attributes:
        domain: its name.
        tokens, documents: how many.
        text_bytes: UTF-8 bytes of the documents' text.
        tokens_file: name of the file of token ids (uint16 or uint32, little-endian).
        starts_file: name of the file of the documents' first positions and the end (int64).
        tokens_crc, starts_crc: CRC-32 of the files.
        digest: of the documents' `text.split.Fingerprint`.
        held_out_below: the hash number below which the domain's documents are held out; None where
            folders say what is.
    """

    domain: str
    tokens: int
    documents: int
    text_bytes: int
    tokens_file: str
    starts_file: str
    tokens_crc: int
    starts_crc: int
    digest: int
    held_out_below: int | None

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.documents, self.digest)


class ShardIndex:
    """Token files of one part (training or held-out) of a source, opened by memory map.

    Attributes:
        domains: names in alphabetical order; a batch's domain ids are positions in this list.
        shards: one for each domain.
        vocab_size: of the tokenizer that made the ids.
        fingerprint: hash of the token files' content, the same wherever they were made.
    """

    def __init__(self, folder: Path, description: dict[str, Any]):
        self.folder = folder
        self.vocab_size: int = description["vocab_size"]
        self.shards = [Shard(**shard) for shard in description["shards"]]
        self.domains = [shard.domain for shard in self.shards]
        content = [(shard.domain, shard.tokens_crc, shard.starts_crc) for shard in self.shards]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        self._byte_lengths = np.array(description["token_byte_lengths"], dtype=np.int64)
        dtype = _token_dtype(self.vocab_size)
        self._tokens = [
            _map(folder / s.tokens_file, dtype, s.tokens, s.tokens_crc) for s in self.shards
        ]
        self._starts = [
            _map(folder / s.starts_file, np.dtype("<i8"), s.documents + 1, s.starts_crc)
            for s in self.shards
        ]

    @property
    def total_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    def document(self, domain_id: int, number: int) -> npt.NDArray[np.int64]:
        """Return the token ids of one document: (document length,)."""
        start, end = self._starts[domain_id][number : number + 2]
        return self._tokens[domain_id][start:end].astype(np.int64)

    def document_lengths(self, domain_id: int) -> npt.NDArray[np.int64]:
        """Return the tokens of each document of a domain: (documents,)."""
        return np.diff(self._starts[domain_id])

    def tokens(self, domain_id: int, start: int, end: int) -> npt.NDArray[np.int64]:
        """Return the token ids of a domain from position `start` to `end`: (end - start,)."""
        return self._tokens[domain_id][start:end].astype(np.int64)

    def text_bytes(self, ids: npt.NDArray[np.int64]) -> int:
        """Return how many bytes of text `ids` stand for; special tokens count as none."""
        return int(self._byte_lengths[ids].sum())


def build_shards(
    source: Path,
    out: Path,
    tokenizer: Tokenizer,
    *,
    held_out: bool = False,
    progress: Progress | None = None,
) -> ShardIndex:
    """Encode `source` into token files under `out`, or open those that are there already.

    Args:
        source: a file or folder, as `moescope.text.documents` describes.
        out: folder for the token files; `train/` and `held_out/` are made in it.
        tokenizer: needs a bos and an eos token.
        held_out: encode the held-out part instead of the training part. In a source that is not
            split by folders every domain of two different documents or more has one.
        progress: called with (bytes of text done, bytes of source files).

    Raises:
        UserError: no text, unreadable text, a corrupt token file or no space on the disk.
    """
    folder = out / ("held_out" if held_out else "train")
    files = _files(source, held_out)
    key = _key(source, files, tokenizer, held_out)
    index_file = folder / "index.json"
    description = _read_index(index_file)
    if description is None or description.get("key") != key:
        description = _encode(source, files, folder, tokenizer, key, held_out, progress)
        _remove_others(folder, key)
    try:
        index = ShardIndex(folder, description)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{index_file} is damaged ({error}); delete the folder {folder}, it is made anew"
        ) from error
    if not held_out and not index.shards:
        raise UserError(f"there is no text in {source}; its files hold only empty documents")
    return index


# --- encoding ----------------------------------------------------------------------------------


def _files(source: Path, held_out: bool) -> list[TextFile]:
    if is_split(source):
        return text_files(source / ("held_out" if held_out else "train"))
    return text_files(source)


def _key(source: Path, files: Sequence[TextFile], tokenizer: Tokenizer, held_out: bool) -> str:
    listing = [
        (str(file.path.relative_to(source.parent)), status.st_size, status.st_mtime_ns)
        for file in files
        for status in [file.path.stat()]
    ]
    parts = [FORMAT_VERSION, HELD_OUT_SHARE, held_out, tokenizer.hash, listing]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _read_index(path: Path) -> dict[str, Any] | None:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete the folder {path.parent}, it is made anew"
        ) from error
    return description if isinstance(description, dict) else None


def _encode(
    source: Path,
    files: Sequence[TextFile],
    folder: Path,
    tokenizer: Tokenizer,
    key: str,
    held_out: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise UserError(
            "this tokenizer names no bos_token and eos_token, which separate documents; "
            "choose another or train one"
        )
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    total = sum(file.path.stat().st_size for file in files)
    done = 0
    cuts = None if is_split(source) else _cuts(files)
    with ExitStack() as stack:
        writers: dict[str, _ShardWriter] = {}
        for batch in _batches(_part(files, cuts, held_out)):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                writer = writers.get(document.domain)
                if writer is None:
                    name = f"{key}-{len(writers):03d}"
                    writer = _ShardWriter(stack, folder, name, tokenizer.vocab_size)
                    writers[document.domain] = writer
                text_bytes = len(document.text.encode())
                writer.add([bos, *ids, eos], text_bytes, hash_number(document.text))
                done += text_bytes
            if progress is not None:
                progress(min(done, total), total)
        shards = [
            asdict(writers[domain].finish(domain, cuts[domain] if cuts else None))
            for domain in sorted(writers)
        ]
    description = {
        "key": key,
        "format_version": FORMAT_VERSION,
        "vocab_size": tokenizer.vocab_size,
        "shards": shards,
        "token_byte_lengths": _byte_lengths(tokenizer),
    }
    write_text(folder / "index.json", json.dumps(description, ensure_ascii=False) + "\n")
    return description


class _ShardWriter:
    """Writes one domain's two files, which appear under their names when the stack closes."""

    def __init__(self, stack: ExitStack, folder: Path, name: str, vocab_size: int):
        self._tokens_file, self._starts_file = f"{name}.tokens", f"{name}.starts"
        self._tokens_out: BinaryIO = stack.enter_context(
            stack.enter_context(atomic_path(folder / self._tokens_file)).open("wb")
        )
        self._starts_out: BinaryIO = stack.enter_context(
            stack.enter_context(atomic_path(folder / self._starts_file)).open("wb")
        )
        self._dtype = _token_dtype(vocab_size)
        self._starts = [0]
        self._text_bytes = 0
        self._crc = 0
        self._fingerprint = Fingerprint()

    def add(self, ids: Sequence[int], text_bytes: int, number: int) -> None:
        data = np.asarray(ids, dtype=self._dtype).tobytes()
        self._tokens_out.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self._starts.append(self._starts[-1] + len(ids))
        self._text_bytes += text_bytes
        self._fingerprint += Fingerprint(1, number)

    def finish(self, domain: str, held_out_below: int | None) -> Shard:
        starts = np.array(self._starts, dtype="<i8").tobytes()
        self._starts_out.write(starts)
        return Shard(
            domain=domain,
            tokens=self._starts[-1],
            documents=len(self._starts) - 1,
            text_bytes=self._text_bytes,
            tokens_file=self._tokens_file,
            starts_file=self._starts_file,
            tokens_crc=self._crc,
            starts_crc=zlib.crc32(starts),
            digest=self._fingerprint.digest,
            held_out_below=held_out_below,
        )


def _part(
    files: Sequence[TextFile], cuts: dict[str, int] | None, held_out: bool
) -> Iterator[Document]:
    """Yield the documents of one part; without cuts the files are that part."""
    for document in _all(files):
        if cuts is None or (hash_number(document.text) < cuts[document.domain]) == held_out:
            yield document


def _cuts(files: Sequence[TextFile]) -> dict[str, int]:
    """Return for each domain the hash below which documents are held out.

    One in a hundred; but of two different documents or more at least one is held out, and at
    least one is not.
    """
    smallest: dict[str, int] = {}
    largest: dict[str, int] = {}
    for document in _all(files):
        number = hash_number(document.text)
        smallest[document.domain] = min(number, smallest.get(document.domain, number))
        largest[document.domain] = max(number, largest.get(document.domain, number))
    share = int(HELD_OUT_SHARE * 2**64)
    return {domain: min(max(share, smallest[domain] + 1), largest[domain]) for domain in smallest}


def _all(files: Sequence[TextFile]) -> Iterator[Document]:
    for file in files:
        yield from read_documents(file)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == ENCODE_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _byte_lengths(tokenizer: Tokenizer) -> list[int]:
    return [
        0 if token_id in tokenizer.special_ids else len(tokenizer.token_bytes(token_id))
        for token_id in range(tokenizer.vocab_size)
    ]


def _token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _map(path: Path, dtype: np.dtype[Any], count: int, crc: int) -> npt.NDArray[Any]:
    advice = f"delete the folder {path.parent}, it is made anew from the text"
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"the token file {path} is missing; {advice}") from None
    if size != count * dtype.itemsize:
        raise UserError(
            f"the token file {path} has {size} bytes instead of {count * dtype.itemsize}; {advice}"
        )
    mapped = np.memmap(path, dtype=dtype, mode="r")
    if zlib.crc32(mapped.data) != crc:
        raise UserError(f"the token file {path} is corrupt (wrong checksum); {advice}")
    return mapped


def _remove_others(folder: Path, key: str) -> None:
    for path in [*folder.glob("*.tokens"), *folder.glob("*.starts")]:
        if not path.name.startswith(key):
            path.unlink(missing_ok=True)

"""Reading text: files and folders of plain text, source code, .jsonl and .parquet as documents.

A document's domain is its `domain` field, else the first-level subfolder that it lies in, else
"default". A folder that holds `train/` and `held_out/` names its own held-out part; in any other,
one document in a hundred is held out, chosen by the hash of its text.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from moescope.errors import UserError

PLAIN = (
    *(".txt", ".md", ".rst", ".tex", ".org", ".adoc"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt"),
    *(".scala", ".swift", ".cs", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".svelte", ".vue"),
    *(".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".ex", ".erl", ".clj", ".lisp"),
    *(".sh", ".sql", ".html", ".css"),
)
"""Files that are one document each: prose, and source code."""
SUFFIXES = (*PLAIN, ".jsonl", ".jsonl.zst", ".parquet")
READABLE = ".txt, .md, source code such as .py, .jsonl, .jsonl.zst or .parquet"
DEFAULT_DOMAIN = "default"
HELD_OUT_SHARE = 0.01


@dataclass(frozen=True)
class Document:
    text: str
    domain: str


@dataclass(frozen=True)
class TextFile:
    """A file with text and the domain of those of its documents that name none."""

    path: Path
    domain: str


def is_split(source: Path) -> bool:
    """Tell whether `source` names its own held-out part."""
    return (source / "train").is_dir() and (source / "held_out").is_dir()


def text_files(source: Path) -> list[TextFile]:
    """Return the readable files under `source`, or `source` itself, in a fixed order.

    Raises:
        UserError: there is no such path, or no file that can be read.
    """
    if source.is_file():
        if not source.name.endswith(SUFFIXES):
            raise UserError(f"{source} is not readable text; give {READABLE}")
        return [TextFile(source, DEFAULT_DOMAIN)]
    if not source.is_dir():
        raise UserError(f"there is no file or folder {source}; check the path to the text")
    files: list[TextFile] = []
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source).parts
        hidden = any(part.startswith(".") for part in inside)
        if path.is_file() and path.name.endswith(SUFFIXES) and not hidden:
            files.append(TextFile(path, inside[0] if len(inside) > 1 else DEFAULT_DOMAIN))
    if not files:
        raise UserError(
            f"there is no text in {source}; put files there ({READABLE}), one subfolder a domain"
        )
    return files


def read_documents(file: TextFile) -> Iterator[Document]:
    """Yield the documents of one file; plain text and source code are one document a file.

    Raises:
        UserError: a line is not JSON, has no `text`, or the file is not what its name says.
    """
    name = file.path.name
    try:
        if name.endswith(".parquet"):
            documents = _parquet_rows(file)
        elif name.endswith(".jsonl.zst"):
            documents = _json_lines(file, _zstd_lines(file.path))
        elif name.endswith(".jsonl"):
            documents = _json_lines(file, file.path.open(encoding="utf-8"))
        else:
            documents = iter([Document(file.path.read_text(encoding="utf-8"), file.domain)])
        for document in documents:
            if document.text:
                yield document
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path} is not UTF-8 text (byte {error.start}); convert or remove it"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {file.path} ({error}); check or replace the file") from error


def is_held_out(text: str) -> bool:
    """Tell by its hash whether a document belongs to the held-out hundredth."""
    return int.from_bytes(hash_of(text)[:8]) < HELD_OUT_SHARE * 2**64


def hash_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def balanced_sample(sources: Sequence[Path], max_bytes: int) -> Iterator[str]:
    """Yield texts of at most `max_bytes` UTF-8 bytes, every domain with an equal share.

    Within a domain, documents are chosen by their hash, so the choice is spread over its files and
    the same each time. A domain smaller than its share is taken whole.
    """
    files = [
        file
        for source in sources
        for file in text_files(source / "train" if is_split(source) else source)
    ]
    sizes: dict[str, int] = {}
    for file in files:
        sizes[file.domain] = sizes.get(file.domain, 0) + file.path.stat().st_size
    share = max_bytes // len(sizes)
    room = dict.fromkeys(sizes, share)
    for file in files:
        threshold = share / max(sizes[file.domain], 1)
        for document in read_documents(file):
            size = len(document.text.encode())
            chosen = int.from_bytes(hash_of(document.text)[8:16]) < threshold * 2**64
            if chosen and size <= room[file.domain]:
                room[file.domain] -= size
                yield document.text


def _json_lines(file: TextFile, lines: Iterable[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"line {number} of {file.path} is not JSON ({error}); repair or remove the line"
            ) from error
        yield _document(file, row, f"line {number} of {file.path}")


def _document(file: TextFile, row: Any, place: str) -> Document:
    fields = cast("dict[str, Any]", row) if isinstance(row, dict) else {}
    text = fields.get("text")
    if not isinstance(text, str):
        raise UserError(f'{place} has no string field "text"; every document needs one')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{place} holds half a surrogate pair, which is no character; repair or remove it"
        ) from None
    domain = fields.get("domain")
    return Document(text, domain if isinstance(domain, str) and domain else file.domain)


def _zstd_lines(path: Path) -> Iterator[str]:
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{path} needs the package zstandard; install it with: pip install 'moescope[train]'"
        ) from None
    frame = zstandard.ZstdDecompressor().decompressobj()
    rest = b""
    try:
        with path.open("rb") as file:
            while data := file.read(2**20):
                while data:
                    if frame.eof:
                        frame = zstandard.ZstdDecompressor().decompressobj()
                    *lines, rest = (rest + frame.decompress(data)).split(b"\n")
                    yield from (line.decode() for line in lines)
                    data = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is not a whole zstd file ({error}); download it again") from error
    if not frame.eof:
        raise UserError(f"{path} is not a whole zstd file (its end is missing); download it again")
    yield rest.decode()


def _parquet_rows(file: TextFile) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"{file.path} needs the package pyarrow; install it with: pip install 'moescope[train]'"
        ) from None
    try:
        table = parquet.ParquetFile(file.path)
        names = [name for name in ("text", "domain") if name in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(columns=names):
            for row in batch.to_pylist():
                number += 1
                yield _document(file, row, f"row {number} of {file.path}")
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file.path} is not a parquet file ({error}); make it again") from error

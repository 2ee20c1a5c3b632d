"""Labelled text to measure on: some passages of each domain, the same for every model.

Long documents are cut into passages at the ends of lines. Passages are chosen by their hash, so
the choice is spread over a domain's documents and the same each time; they are what resampling
resamples. A model takes them in windows of so many tokens.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moescope.errors import UserError
from moescope.model.decoder import CausalLM
from moescope.text.documents import Document, hash_of, is_split, read_documents, text_files
from moescope.text.tokenizer import Tokenizer

BYTES_PER_DOMAIN = 200_000
BYTES_PER_PASSAGE = 2000
MAX_WINDOW = 512
"""Most tokens that are read at once unless asked otherwise."""
TOKENS_AT_ONCE = 4096


def labelled_documents(source: Path, max_bytes: int = BYTES_PER_DOMAIN) -> list[Document]:
    """Return passages of up to `max_bytes` UTF-8 bytes of each domain, sorted by domain.

    Of a source that holds `train/` and `held_out/` only the held-out part is read. A domain's
    last passage is cut where the bytes end.

    Raises:
        UserError: there is no text, or it cannot be read.
    """
    samples: dict[str, _Sample] = {}
    for file in text_files(source / "held_out" if is_split(source) else source):
        for document in read_documents(file):
            sample = samples.setdefault(document.domain, _Sample(max_bytes))
            for passage in passages(document.text):
                sample.add(passage)
    if not samples:
        raise UserError(f"there is no text in {source}; its files hold only empty documents")
    return [
        Document(text, domain) for domain in sorted(samples) for text in samples[domain].texts()
    ]


def passages(text: str) -> Iterator[str]:
    """Cut a text into parts of at most `BYTES_PER_PASSAGE`, between lines where there are any."""
    data, start = text.encode(), 0
    while start < len(data):
        end = start + BYTES_PER_PASSAGE
        if end < len(data):
            line_end = data.rfind(b"\n", start, end) + 1
            while not line_end and data[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
            end = line_end or end
        yield data[start:end].decode()
        start = end


class _Sample:
    """The texts with the smallest hashes, as many as fill `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._heap: list[tuple[int, str]] = []  # the largest hash first

    def add(self, text: str) -> None:
        heapq.heappush(self._heap, (-int.from_bytes(hash_of(text)), text))
        self._bytes += len(text.encode())
        while self._bytes - (size := len(self._heap[0][1].encode())) >= self._max_bytes:
            heapq.heappop(self._heap)
            self._bytes -= size

    def texts(self) -> Iterator[str]:
        room = self._max_bytes
        for _, text in sorted(self._heap, reverse=True):
            part = text.encode()[:room]
            room -= len(part)
            yield part.decode(errors="ignore")


def check_resampling(documents: Sequence[Document]) -> None:
    """Refuse text of which no interval can be told.

    Raises:
        UserError: a domain has a single document.
    """
    labels = [document.domain for document in documents]
    for domain in sorted(set(labels)):
        if labels.count(domain) == 1:
            raise UserError(
                f"the domain {domain} has a single passage, from which nothing can be told about "
                "others; give more documents of it, or raise --bytes"
            )


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[list[int]]:
    """Return the ids of each document, with what the tokenizer sets around a text."""
    texts = [document.text for document in documents]
    return tokenizer.encode_batch(texts, add_special_tokens=True)


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `end` of a document."""

    document: int
    start: int
    end: int


def windows(encoded: Sequence[Sequence[int]], length: int, overlap: int) -> list[Window]:
    """Cut documents into windows of `length + overlap` tokens that begin `length` apart."""
    return [
        Window(number, start, min(start + length + overlap, len(ids)))
        for number, ids in enumerate(encoded)
        for start in range(0, len(ids) - overlap, length)
    ]


def window_length(model: CausalLM, asked: int | None = None) -> int:
    """Return how many tokens a model reads at once.

    Not more than it was trained on at once: beyond, a good model may look worse than a bad one.
    Where the checkpoint does not tell, that is the context which its config claims.

    Raises:
        UserError: more are asked for than the context holds.
    """
    context = model.config.max_position_embeddings
    if asked is None:
        return min(MAX_WINDOW, model.config.trained_length or context, context)
    if asked > context:
        raise UserError(
            f"a window of {asked} tokens is longer than the model's context of {context}; choose "
            "a smaller one"
        )
    return asked


def batches(
    encoded: Sequence[Sequence[int]], cut: Sequence[Window]
) -> Iterator[tuple[list[Window], Tensor]]:
    """Yield windows of about the same length with their ids, `(rows, longest)` int64.

    A shorter row ends with repetitions of its last id, which none of its own tokens sees.
    """
    ordered = sorted(cut, key=lambda window: window.end - window.start)
    while ordered:
        longest = ordered[-1].end - ordered[-1].start
        rows = max(1, TOKENS_AT_ONCE // longest)
        ordered, batch = ordered[:-rows], ordered[-rows:]
        ids = [encoded[w.document][w.start : w.end] for w in batch]
        yield batch, torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in ids])

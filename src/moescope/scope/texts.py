"""Labelled text to measure on: some passages of each domain, the same for every model.

Long documents are cut into passages at the ends of lines. Passages are chosen by their hash, so
the choice is spread over a domain's documents and the same each time; they are what resampling
resamples. A model takes them in windows of so many tokens.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moescope.errors import UserError
from moescope.model.decoder import CausalLM
from moescope.text.documents import (
    DEFAULT_DOMAIN,
    Document,
    hash_of,
    is_split,
    read_documents,
    text_files,
)
from moescope.text.split import Fingerprint, TrainedText, hash_number
from moescope.text.tokenizer import Tokenizer

BYTES_PER_DOMAIN = 200_000
BYTES_PER_PASSAGE = 2000
MAX_WINDOW = 512
"""Most tokens that are read at once unless asked otherwise."""
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class LabelledText:
    """Text to measure on, and whether models have seen it in training.

    Attributes:
        documents: passages, sorted by domain.
        held_out: domain -> whether no model was trained on it, as far as models remember; False
            where one does not remember this text.
        left_out: domains of which a model was trained on every document.
    """

    documents: list[Document]
    held_out: dict[str, bool]
    left_out: list[str]

    def notes(self) -> list[str]:
        """Say what a reader of the numbers must know of the text."""
        told: list[str] = []
        if unknown := [domain for domain, known in self.held_out.items() if not known]:
            of = "" if unknown == [DEFAULT_DOMAIN] else f" of {', '.join(unknown)}"
            told.append(
                f"nothing tells whether this text{of} was trained on, so it may be no held-out text"
            )
        if self.left_out:
            told.append(f"left out, as all of it was trained on: {', '.join(self.left_out)}")
        return told


def labelled_text(
    source: Path,
    max_bytes: int = BYTES_PER_DOMAIN,
    trained: Sequence[TrainedText | None] = (None,),
) -> LabelledText:
    """Return passages of up to `max_bytes` UTF-8 bytes of each domain, sorted by domain.

    Of a source that holds `train/` and `held_out/` only the held-out part is read. Of any other
    that a model was trained on, only the documents that its trainer held out are. A domain's last
    passage is cut where the bytes end.

    Args:
        source: file or folder.
        max_bytes: of each domain.
        trained: what the models that will read it remember of their training; None for a model
            that remembers nothing.

    Raises:
        UserError: there is no text, it cannot be read, or all of it was trained on.
    """
    limits = {
        domain.held_out_below
        for text in trained
        if text is not None
        for domain in text.domains.values()
        if domain.held_out_below is not None
    }
    found: dict[str, _Domain] = {}
    for file in text_files(source / "held_out" if is_split(source) else source):
        for document in read_documents(file):
            found.setdefault(document.domain, _Domain(limits, max_bytes)).add(document.text)
    if not found:
        raise UserError(f"there is no text in {source}; its files hold only empty documents")
    documents: list[Document] = []
    held_out: dict[str, bool] = {}
    left_out: list[str] = []
    for domain in sorted(found):
        known = [text.limit(found[domain].fingerprint) if text else None for text in trained]
        texts = list(found[domain].texts(min((k for k in known if k is not None), default=2**64)))
        documents += [Document(text, domain) for text in texts]
        if texts:
            held_out[domain] = None not in known
        else:
            left_out.append(domain)
    if not documents:
        raise UserError(
            f"all text in {source} was trained on; give text that was not, or train again with "
            "more documents, of which some are held out"
        )
    return LabelledText(documents, held_out, left_out)


class _Domain:
    """A domain's documents: by what they are known again, and a sample below each limit."""

    def __init__(self, limits: Iterable[int], max_bytes: int) -> None:
        self.fingerprint = Fingerprint()
        self._samples = {limit: _Sample(max_bytes) for limit in {*limits, 2**64}}

    def add(self, text: str) -> None:
        number = hash_number(text)
        self.fingerprint += Fingerprint(1, number)
        for limit, sample in self._samples.items():
            if number < limit:
                for passage in passages(text):
                    sample.add(passage)

    def texts(self, limit: int) -> Iterator[str]:
        """Yield passages of the documents below one of the limits; none below 0."""
        return self._samples[limit].texts() if limit else iter(())


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

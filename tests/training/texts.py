"""Domains of text that the tests of this folder train on."""

import json
from pathlib import Path

from moescope.training.data import ShardIndex

PROSE = [f"There were {i} books upon the shelf, and nobody had read them." for i in range(60)]
POEMS = [f"第{i}首：床前明月光，疑是地上霜。" for i in range(60)]
SUMS = [f"{i} + {i + 3} = {2 * i + 3}" for i in range(60)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")


def documents(index: ShardIndex, domain: str) -> list[list[int]]:
    domain_id = index.domains.index(domain)
    count = index.shards[domain_id].documents
    return [index.document(domain_id, number).tolist() for number in range(count)]

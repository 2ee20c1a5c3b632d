"""Which files of a repository make a model: safetensors and their config, or one GGUF of many."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from moescope.errors import UserError
from moescope.formats.headers import SPLIT, Files, read_object, split_names

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")
SMALL_SUFFIXES = (".json", ".jinja")
"""What is fetched of a folder beside its safetensors."""
DEFAULT_QUANTISATION = "Q4_K_M"
NO_MODELS = ("mmproj", "imatrix")
"""What the names of GGUF files hold that are parts of something else."""

_QUANTISATION = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|NVFP4\w*|B?F16|F32|FP16|FP32))$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Choice:
    """The files of one model.

    Attributes:
        main: what is opened: the first GGUF file, or `config.json`, whose folder is.
        paths: of all that belongs to it.
        weights: those of them that hold weights, in order.
        note: what was chosen without being asked for; empty if nothing was.
    """

    main: str
    paths: tuple[str, ...]
    weights: tuple[str, ...]
    note: str = ""


def is_hub_name(name: str) -> bool:
    """Whether a name could be `org/repo` or `org/repo:Q4_K_M`."""
    repo = name.partition(":")[0]
    return repo.count("/") == 1 and not repo.startswith((".", "/", "~")) and not repo.endswith("/")


def choose(
    repo: str, sizes: Mapping[str, int], wanted: str, index: Callable[[], set[str]]
) -> Choice:
    """Choose the files of one model.

    Args:
        repo: for messages.
        sizes: bytes of every file by path.
        wanted: a quantisation such as `Q4_K_M`, or a GGUF file's name; empty if none was named.
        index: reads which files hold weights, where the repository has an index of them.

    Raises:
        UserError: there is no such model, or several; the sentence lists what there is.
    """
    ggufs = _ggufs(sizes)
    if not wanted and CONFIG in sizes and (weights := _safetensors(repo, sizes, index)):
        small = [p for p in sizes if "/" not in p and p.endswith(SMALL_SUFFIXES)]
        return Choice(CONFIG, (*small, *weights), weights)
    if not ggufs:
        raise UserError(_no_model(repo, sizes, wanted))
    found = _matching(ggufs, wanted or DEFAULT_QUANTISATION) if wanted or ggufs[1:] else ggufs
    if len(found) == 1:
        unasked = not wanted and len(ggufs) > 1
        note = f"{repo} holds {_listed(ggufs, sizes)}; this is {found[0].label}"
        return _gguf_choice(repo, sizes, found[0], note if unasked else "")
    if found:
        paths = ", ".join(one.parts[0] for one in found)
        raise UserError(f"{repo} holds several files of {wanted}: {paths}; name one: {repo}:FILE")
    said = f"no {wanted}, but" if wanted else "GGUF files of several quantisations:"
    example = f"{repo}:{ggufs[0].label}"
    raise UserError(f"{repo} holds {said} {_listed(ggufs, sizes)}; name one, such as {example}")


@dataclass(frozen=True)
class _Gguf:
    """A model in GGUF: its files in order, and what its name says of its precision."""

    parts: tuple[str, ...]
    label: str


def _ggufs(sizes: Mapping[str, int]) -> list[_Gguf]:
    found: list[_Gguf] = []
    for path in sorted(sizes):
        name = PurePosixPath(path).name.lower()
        parts = split_names(path)
        if not name.endswith(".gguf") or any(part in name for part in NO_MODELS):
            continue
        if path != parts[0] and parts[0] in sizes:  # found by its first part
            continue
        split = SPLIT.fullmatch(path)
        stem = PurePosixPath(split[1] if split else path.removesuffix(".gguf"))
        label = _QUANTISATION.search(str(stem)) or _QUANTISATION.search(str(stem.parent))
        found.append(_Gguf(tuple(parts), label[1] if label else stem.name))
    return found


def _matching(ggufs: Sequence[_Gguf], wanted: str) -> list[_Gguf]:
    """Return those of a name, else of a precision, else of one such as `UD-Q4_K_XL`."""
    wanted = wanted.lower()
    names = [(one.parts[0].lower(), PurePosixPath(one.parts[0]).name.lower()) for one in ggufs]
    labels = [one.label.lower() for one in ggufs]
    for fitting in (
        [wanted in both for both in names],
        [label == wanted for label in labels],
        [label.endswith(f"-{wanted}") for label in labels],
    ):
        if any(fitting):
            return [one for one, fits in zip(ggufs, fitting, strict=True) if fits]
    return []


def _gguf_choice(repo: str, sizes: Mapping[str, int], chosen: _Gguf, note: str) -> Choice:
    if lacking := [part for part in chosen.parts if part not in sizes]:
        raise UserError(
            f"{repo} lacks {lacking[0]}, one of the {len(chosen.parts)} parts of {chosen.label}; "
            "choose another quantisation"
        )
    beside = str(PurePosixPath(chosen.parts[0]).with_name(TOKENIZER))
    small = [beside] if beside in sizes else []
    return Choice(chosen.parts[0], (*small, *chosen.parts), chosen.parts, note)


def _safetensors(
    repo: str, sizes: Mapping[str, int], index: Callable[[], set[str]]
) -> tuple[str, ...]:
    """Return the weight files of a repository's own folder; others hold them in other layouts."""
    held = sorted(path for path in sizes if path.endswith(".safetensors") and "/" not in path)
    if INDEX in sizes:
        named = sorted(index())
        if lacking := [path for path in named if path not in sizes]:
            raise UserError(f"{repo} lacks {lacking[0]}, though {INDEX} names it")
        return tuple(named)
    return (WEIGHTS,) if WEIGHTS in held else tuple(held)


def weight_files(files: Files) -> set[str]:
    """Return the files that a folder's index names.

    Raises:
        UserError: it is no index.
    """
    weight_map = read_object(files, INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{files.shown(INDEX)} is damaged: it lacks `weight_map`")
    return {Path(str(file)).name for file in cast(dict[str, Any], weight_map).values()}


def _listed(ggufs: Sequence[_Gguf], sizes: Mapping[str, int]) -> str:
    def one(gguf: _Gguf) -> str:
        size = sum(sizes.get(part, 0) for part in gguf.parts)
        return f"{gguf.label} ({size / 1e9:.1f} GB)"

    return ", ".join(map(one, ggufs))


def _no_model(repo: str, sizes: Mapping[str, int], wanted: str) -> str:
    if wanted and any(path.endswith(".safetensors") for path in sizes):
        return f"{repo} holds safetensors and no GGUF files; leave out :{wanted}"
    if any(path.endswith(PICKLES) for path in sizes):
        return (
            f"{repo} holds only pickle files, which can run code when opened; moescope opens "
            "safetensors and GGUF, so choose a repository with such"
        )
    if any(path.endswith(".safetensors") for path in sizes):
        return f"{repo} holds safetensors but no config.json, which says what they are"
    return f"{repo} holds neither safetensors nor GGUF files; choose another repository"

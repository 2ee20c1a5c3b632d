"""Models on the Hub: what a repository holds, which of it is a model, and fetching that.

Nothing is fetched that could be executed, and nothing before the repository is listed. A file goes
into the cache of `huggingface_hub`, where other programs find it. What an interrupted download
left there is continued: the library itself begins anew.
"""

import glob
import shutil
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    WeakFileLock,
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
    http_stream_backoff,
)

from moescope.errors import UserError
from moescope.families import read_config
from moescope.formats.headers import (
    Headers,
    LocalFiles,
    gguf_headers,
    read_object,
    safetensors_headers,
)
from moescope.formats.repository import CONFIG, Choice, choose, weight_files

CONNECTIONS = 4
MAX_FAILURES = 5
"""In a row, without a byte between them, that a download survives."""
SECONDS_BETWEEN = 1.0
LARGEST_PLAIN_FILE = 50 * 10**9
"""The Hub serves larger files in its own protocol alone, so the library fetches them."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        path: in the repository.
        size: bytes.
        etag: what its content is called in the cache.
    """

    path: str
    size: int
    etag: str


class HubModel:
    """A model on the Hub, listed; nothing of it is downloaded as yet.

    Attributes:
        name: as asked for.
        repo: `org/repo`.
        commit: that was found; all reads are of it.
        choice: the files that make the model.

    Raises:
        UserError: the Hub cannot be reached, it has no such repository or shows it to members
            only, or the repository holds no model or several.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.repo, _, wanted = name.partition(":")
        with sentences(self.repo):
            info = huggingface_hub.HfApi().model_info(self.repo, files_metadata=True)
        self.commit = info.sha or constants.DEFAULT_REVISION
        self._files: dict[str, HubFile] = {}
        for held in info.siblings or []:
            etag = held.lfs.sha256 if held.lfs else held.blob_id
            if held.size is not None and etag and etag.isalnum():
                self._files[held.rfilename] = HubFile(held.rfilename, held.size, etag)
        self.choice = choose(self.repo, self.sizes, wanted, self._index)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file in the repository, by path."""
        return {path: file.size for path, file in self._files.items()}

    def headers(self) -> Headers:
        """Read config and headers by requests for parts of files.

        Raises:
            UserError: they cannot be read, are damaged, or of a kind that moescope does not know.
        """
        with sentences(self.repo):
            if self.choice.main != CONFIG:
                return gguf_headers(self, self.choice.weights)
            config = read_config(read_object(self, CONFIG), str(self.shown(CONFIG)))
            return safetensors_headers(self, config, self.choice.weights)

    def _index(self) -> set[str]:
        with sentences(self.repo):
            return weight_files(self)

    # --- parts of files -------------------------------------------------------------------------

    def size(self, name: str) -> int:
        return self._files[name].size

    def shown(self, name: str) -> Path:
        return Path(self.repo) / name

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return a part of a file, also where the server sends all of it."""
        data = bytearray()
        with self._request(name, f"bytes={start}-{stop - 1}") as response:
            skipped = 0 if response.status_code == httpx2.codes.PARTIAL_CONTENT else start
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= skipped + stop - start:
                    break
        return bytes(data[skipped : skipped + stop - start])

    @contextmanager
    def _request(self, name: str, wanted: str) -> Generator[Any]:
        url = huggingface_hub.hf_hub_url(
            self.repo, name, revision=self.commit, endpoint=constants.ENDPOINT
        )
        headers = build_hf_headers() | {"Range": wanted, "Accept-Encoding": "identity"}
        with http_stream_backoff(
            "GET",
            url,
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),
            retry_on_status_codes=(408, 429),
        ) as response:
            hf_raise_for_status(response)
            yield response

    # --- whole files ----------------------------------------------------------------------------

    @property
    def missing_bytes(self) -> int:
        """What is still to be downloaded."""
        return sum(file.size - self._held(file) for file in self._missing())

    def refuse_if_disk_is_full(self) -> None:
        """Refuse a download that the disk has no room for.

        Raises:
            UserError: what is missing is more than is free.
        """
        place = self._cache
        while not place.exists():
            place = place.parent
        needed, free = self.missing_bytes, shutil.disk_usage(place).free
        if needed > free:
            raise UserError(
                f"{self.name} takes {needed / 1e9:.1f} GB more on the disk, but {free / 1e9:.1f} "
                f"GB are free at {constants.HF_HUB_CACHE}; free some, or set HF_HOME to a folder "
                "on a larger disk"
            )

    def download(self, tell: Callable[[int, int], None]) -> Path:
        """Fetch what the cache lacks, and return the model's folder or its first GGUF file.

        Args:
            tell: called with the bytes that are here, and those of all files.

        Raises:
            UserError: the connection broke too often, or the disk is full.
        """
        chosen = [self._files[path] for path in self.choice.paths]
        missing = [file for file in self._missing() if file.size <= LARGEST_PLAIN_FILE]
        progress = _Progress(sum(file.size for file in chosen), tell)
        progress.add(progress.total - sum(file.size - self._held(file) for file in missing))
        with sentences(self.repo), ThreadPoolExecutor(CONNECTIONS) as pool:
            fetching = [pool.submit(self._fetch, file, progress) for file in missing]
            try:
                for one in fetching:
                    one.result()
            except BaseException:
                progress.stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        patterns = [glob.escape(path) for path in self.choice.paths]
        large = any(file.size > LARGEST_PLAIN_FILE for file in self._missing())
        with sentences(self.repo), nullcontext() if large else disable_progress_bars():
            folder = Path(huggingface_hub.snapshot_download(self.repo, allow_patterns=patterns))
        return _opened(folder, self.choice)

    @property
    def _cache(self) -> Path:
        return _cache_of(self.repo)

    def _missing(self) -> list[HubFile]:
        chosen = {self._files[path].etag: self._files[path] for path in self.choice.paths}
        blobs = self._cache / "blobs"
        return [file for etag, file in chosen.items() if not (blobs / etag).exists()]

    def _partial(self, file: HubFile) -> Path:
        return self._cache / "blobs" / f"{file.etag}.incomplete"

    def _held(self, file: HubFile) -> int:
        """Bytes of a file that an earlier download left."""
        partial = self._partial(file)
        size = partial.stat().st_size if partial.exists() else 0
        return size if size <= file.size else 0

    def _fetch(self, file: HubFile, progress: "_Progress") -> None:
        locks = Path(constants.HF_HUB_CACHE) / ".locks" / self._cache.name
        for folder in (locks, self._cache / "blobs"):
            folder.mkdir(parents=True, exist_ok=True)
        blob, partial = self._cache / "blobs" / file.etag, self._partial(file)
        with WeakFileLock(locks / f"{file.etag}.lock"):
            if blob.exists():  # another process was faster
                return
            failures = 0
            while (held := self._held(file)) < file.size or not partial.exists():
                try:
                    self._continue(file, held, progress)
                except httpx2.TransportError:
                    failures = failures + 1 if self._held(file) == held else 0
                    if failures == MAX_FAILURES or progress.stopped.wait(SECONDS_BETWEEN):
                        raise
                if progress.stopped.is_set():
                    return
            partial.replace(blob)

    def _continue(self, file: HubFile, held: int, progress: "_Progress") -> None:
        """Append what the server sends from byte `held` on."""
        if not file.size:
            self._partial(file).touch()
            return
        with self._request(file.path, f"bytes={held}-") as response:
            whole = response.status_code != httpx2.codes.PARTIAL_CONTENT
            if whole:
                progress.add(-held)
            with self._partial(file).open("ab" if held and not whole else "wb") as out:
                for chunk in response.iter_bytes():
                    out.write(chunk)
                    progress.add(len(chunk))
                    if progress.stopped.is_set():
                        return


class _Progress:
    """Bytes of several files that are fetched at a time, counted together."""

    def __init__(self, total: int, tell: Callable[[int, int], None]) -> None:
        self.total, self._tell = total, tell
        self.stopped = threading.Event()
        self._done, self._lock = 0, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._tell(self._done, self.total)


def cached(name: str) -> Path | None:
    """Return a model that was downloaded before, without asking the Hub; None if it is not whole.

    Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    repo, _, wanted = name.partition(":")
    cache = _cache_of(repo)
    reference = cache / "refs" / constants.DEFAULT_REVISION
    if not reference.exists():
        return None
    folder = cache / "snapshots" / reference.read_text(encoding="utf-8").strip()
    held = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in held}
    try:
        choice = choose(repo, sizes, wanted, lambda: weight_files(LocalFiles(folder)))
    except UserError:
        return None
    return _opened(folder, choice)


def _cache_of(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _opened(folder: Path, choice: Choice) -> Path:
    return folder if choice.main == CONFIG else folder / choice.main


# --- what can go wrong ---------------------------------------------------------------------------


class Unavailable(UserError):
    """The Hub cannot be reached, or does not show a repository."""


@contextmanager
def sentences(repo: str) -> Generator[None]:
    """Turn what the Hub's library raises into sentences."""
    try:
        yield
    except GatedRepoError as error:
        raise Unavailable(
            f"{repo} is gated: ask for access at {constants.ENDPOINT}/{repo}, then set HF_TOKEN "
            "to a token of your account; or name a folder that holds the model"
        ) from error
    except RepositoryNotFoundError as error:
        raise Unavailable(
            f"there is no folder {repo}, and the Hub has no such model or shows it to its members "
            "only; check the name, or set HF_TOKEN to a token that may read it"
        ) from error
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a model on the Hub; check it") from error
    except (OfflineModeIsEnabled, httpx2.TransportError) as error:
        raise Unavailable(
            f"there is no folder {repo}, and the Hub cannot be reached at {constants.ENDPOINT} "
            "to look for it there; check the connection, or name a folder that holds the model"
        ) from error
    except HfHubHTTPError as error:
        raise Unavailable(
            f"the Hub answers {error.response.status_code} when asked for {repo}; try again "
            "later, or name a folder that holds the model"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot fetch {repo} into {constants.HF_HUB_CACHE} ({error.strerror or error}); free "
            "some space or set HF_HOME to another folder"
        ) from error

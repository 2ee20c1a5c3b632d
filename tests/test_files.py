import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moescope.errors import UserError
from moescope.files import atomic_path, write_text


def test_writes_and_makes_the_folder(tmp_path: Path) -> None:
    target = tmp_path / "new" / "诗.txt"
    write_text(target, "床前明月光\n")
    assert target.read_text(encoding="utf-8") == "床前明月光\n"
    assert list(target.parent.iterdir()) == [target]


def test_a_defect_while_writing_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    write_text(target, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as partial:
        partial.write_text("half of the n")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(tmp_path: Path) -> None:
    """`/dev/full` fails each write as a full disk does."""
    target = tmp_path / "weights"
    write_text(target, "old")
    told = pytest.raises(UserError, match=r"(?i)no space left.*free some space")
    with told, atomic_path(target) as partial:
        partial.symlink_to("/dev/full")
        partial.write_text("new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_path_through_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot write .*choose another folder"):
        write_text(tmp_path / "file" / "below", "text")


def test_a_kill_while_writing_leaves_the_old_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_text(target, "old")
    script = (
        "import os, signal, sys; from pathlib import Path; from moescope.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half of the n')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    write_text(target, "new")
    assert target.read_text() == "new"


def test_content_is_on_the_disk_before_the_name_points_to_it(tmp_path, monkeypatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (calls.append("rename"), replace(self, to))[1]
    )
    write_text(tmp_path / "file", "text")
    assert calls == ["fsync", "rename", "fsync"]

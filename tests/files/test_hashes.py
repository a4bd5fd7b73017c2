"""Hashes of large files: computed by one of several processes, and never taken for those of a changed file."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ditune.files import atomic
from ditune.files.atomic import keep_hashes_in, sha256

RANK = """
import sys, time
from pathlib import Path
from ditune.files import atomic
file, folder, notes = map(Path, sys.argv[1:])
digest, atomic.LARGE = atomic._digest, 1000
def noted(path):
    with notes.open("a") as lines:
        lines.write("computed\\n")
    time.sleep(0.5)
    return digest(path)
atomic._digest = noted
atomic.keep_hashes_in(folder)
print(atomic.sha256(file))
"""


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A file that counts as large."""
    monkeypatch.setattr(atomic, "LARGE", 1000)
    monkeypatch.setattr(atomic, "_hashes", {})
    monkeypatch.setattr(atomic, "_kept_in", None)
    path = tmp_path / "network.pt"
    path.write_bytes(b"a" * 2000)
    return path


def new_process(monkeypatch) -> None:
    """What a process knows of its own is forgotten."""
    monkeypatch.setattr(atomic, "_hashes", {})


def expected(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entry(folder: Path) -> Path:
    (found,) = folder.glob("*.json")
    return found


def test_one_of_several_processes_computes_it(file, tmp_path):
    folder, notes = tmp_path / "hashes", tmp_path / "notes"
    start = [sys.executable, "-c", RANK, str(file), str(folder), str(notes)]
    ranks = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [rank.communicate(timeout=60)[0].strip() for rank in ranks] == [expected(file)] * 3
    assert notes.read_text() == "computed\n"


def test_a_kept_hash_is_used_and_one_of_another_state_is_not(file, tmp_path, monkeypatch):
    folder = tmp_path / "hashes"
    keep_hashes_in(folder)
    assert sha256(file) == expected(file)
    content = json.loads(entry(folder).read_text())
    entry(folder).write_text(json.dumps(content | {"sha256": "kept"}))
    new_process(monkeypatch)
    assert sha256(file) == "kept"
    before = file.stat()
    with file.open("r+b") as same:  # in place, of the same size, and with the old time of its last change
        same.write(b"b" * 2000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    new_process(monkeypatch)
    assert sha256(file) == expected(file)
    assert json.loads(entry(folder).read_text())["sha256"] == expected(file)


def test_a_damaged_entry_is_written_anew(file, tmp_path, monkeypatch):
    folder = tmp_path / "hashes"
    keep_hashes_in(folder)
    sha256(file)
    whole = entry(folder).read_text()
    entry(folder).write_text("{")
    new_process(monkeypatch)
    assert sha256(file) == expected(file)
    assert entry(folder).read_text() == whole


def test_where_nothing_can_be_kept_every_process_computes_it(file, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "taken").write_text("")
    keep_hashes_in(tmp_path / "taken" / "hashes")
    assert sha256(file) == expected(file)
    assert "is not shared with other processes" in caplog.text


def test_a_file_that_changes_meanwhile_is_not_kept(file, tmp_path, monkeypatch):
    digest = atomic._digest

    def slow(path: Path) -> str:
        found = digest(path)
        path.write_bytes(b"c" * 3000)
        return found

    monkeypatch.setattr(atomic, "_digest", slow)
    keep_hashes_in(tmp_path / "hashes")
    sha256(file)
    assert not list((tmp_path / "hashes").glob("*.json"))


def test_small_files_and_folders_leave_nothing(file, tmp_path, monkeypatch):
    keep_hashes_in(tmp_path / "hashes")
    monkeypatch.setattr(atomic, "LARGE", 5000)
    line = f"network.pt {expected(file)}\n"
    assert sha256(tmp_path) == hashlib.sha256(line.encode()).hexdigest()
    assert not (tmp_path / "hashes").exists()

"""Long work is never silent: a line every ten seconds or twentieth of it where there is no terminal."""

import logging
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ditune import progress
from ditune.progress import amount, duration, meter


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.3)
    monkeypatch.setattr(progress, "MOMENT", 0.0)


def test_a_line_for_every_twentieth(quick, caplog):
    caplog.set_level(logging.INFO)
    with meter("encoding latents", 200) as work:
        for _ in range(200):
            work.advance()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 21  # and one that says how long it took
    assert lines[0].startswith("encoding latents: 10 of 200 images, ")
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("encoding latents: done in ")


def test_work_that_gives_no_sign_is_not_silent(quick, caplog):
    caplog.set_level(logging.INFO)
    with meter("generating", 8), meter("reading base.pt", None, "bytes"):
        time.sleep(2.2)
    lines = [record.getMessage() for record in caplog.records]
    assert lines
    assert lines[0].startswith("reading base.pt: 0.0 MB, ")  # the innermost one speaks
    assert not any(line.startswith("generating") for line in lines)


def test_short_work_and_other_ranks_say_nothing(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    with meter("hashing", 100) as work:
        work.advance(100)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with meter("hashing", 100) as work:
        work.advance(100)
    assert not caplog.records


def test_numbers_are_shown_as_people_say_them():
    assert [duration(s) for s in (7.6, 200, 7500)] == ["8 s", "3 min 20 s", "2 h 5 min"]
    assert [amount(n, "images") for n in (1852, 0.25, 3)] == ["1,852 images", "0.25 images", "3 images"]
    assert [amount(n, "bytes") for n in (2.7e9, 5e6)] == ["2.7 GB", "5.0 MB"]


def test_a_terminal_shows_a_bar_that_is_gone_afterwards():
    code = (
        "from ditune.progress import meter\n"
        "with meter('listing files', None, 'files') as outer, meter('hashing', 3, 'images') as inner:\n"
        "    outer.advance(5)\n    inner.advance(2, 'loss 1.0')\n"
        "print('done')"
    )
    screen, terminal = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(Path(progress.__file__).parents[1]), "TERM": "xterm", "COLUMNS": "120"}
    with os.fdopen(screen, "rb", buffering=0) as reader:
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], stdout=terminal, stderr=subprocess.PIPE, env=env, timeout=120
            )
        finally:
            os.close(terminal)
        assert done.returncode == 0, done.stderr.decode()
        shown = reader.read(65536).decode()
    assert "hashing" in shown
    assert "of 3 images" in shown
    assert "done" in shown

"""Downloads: resumed, verified, and refused with a sentence."""

import hashlib
import http.server
import json
import logging
import threading
from collections.abc import Iterator
from logging.handlers import BufferingHandler

import huggingface_hub
import pytest

from ditune import cli
from ditune.commands.prepare import prepare
from ditune.data import CUB
from ditune.data.archives import Archive
from ditune.errors import UserError
from ditune.files.download import fetch, record_first_use
from miniatures import cub, put
from small_datasets import pack, prepare_config


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `content`, with ranges; breaks off after `limit` bytes as long as `breaks` is not used up."""

    content, breaks, limit, ranges, requests = b"", 0, 0, True, []

    def do_GET(self) -> None:
        cls = type(self)
        wanted = self.headers.get("Range") if cls.ranges else None
        cls.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if self.path == "/missing":
            return self.send_error(404)
        if start >= len(cls.content) and wanted:
            return self.send_error(416)
        body = cls.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cls.breaks:
            cls.breaks -= 1
            body = body[: cls.limit]
        return self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[str]:
    monkeypatch.setattr("ditune.files.download.PAUSE", 0)
    Handler.content, Handler.breaks, Handler.limit, Handler.ranges, Handler.requests = (
        bytes(range(250)) * 40,
        0,
        0,
        True,
        [],
    )
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{service.server_port}"
    service.shutdown()


def md5() -> str:
    return hashlib.md5(Handler.content).hexdigest()


def test_a_download_that_breaks_off_goes_on(server, tmp_path):
    Handler.breaks, Handler.limit = 2, 3000
    fetch(f"{server}/x", tmp_path / "x", md5())
    assert (tmp_path / "x").read_bytes() == Handler.content
    assert Handler.requests == [None, "bytes=3000-", "bytes=6000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_part_of_an_earlier_process_is_gone_on_from(server, tmp_path):
    put(tmp_path / "x.part", Handler.content[:4321])
    fetch(f"{server}/x", tmp_path / "x", md5())
    assert Handler.requests == ["bytes=4321-"]
    put(tmp_path / "y.part", Handler.content)  # only the renaming was missing
    fetch(f"{server}/y", tmp_path / "y", md5())
    assert (tmp_path / "y").read_bytes() == Handler.content


def test_a_server_without_ranges_starts_again(server, tmp_path):
    Handler.ranges = False
    put(tmp_path / "x.part", b"old")
    fetch(f"{server}/x", tmp_path / "x", md5())
    assert (tmp_path / "x").read_bytes() == Handler.content


def test_a_wrong_checksum_is_refused_and_the_next_try_starts_afresh(server, tmp_path):
    put(tmp_path / "x.part", b"wrong")
    with pytest.raises(UserError, match="has the MD5"):
        fetch(f"{server}/x", tmp_path / "x", md5())
    assert not list(tmp_path.iterdir())
    fetch(f"{server}/x", tmp_path / "x", md5())


def test_what_cannot_be_fetched_is_said(server, tmp_path):
    with pytest.raises(UserError, match=r"/missing cannot be fetched .*404.* put it at .*/x"):
        fetch(f"{server}/missing", tmp_path / "x")
    Handler.breaks, Handler.limit = 99, 100
    with pytest.raises(UserError, match="it goes on where it stopped"):
        fetch(f"{server}/x", tmp_path / "x")
    assert (tmp_path / "x.part").stat().st_size == 500


def test_a_dataset_is_fetched_with_its_licence_shown(server, tmp_path, monkeypatch, caplog):
    cub(tmp_path / "whole")
    Handler.content = pack(tmp_path / "whole", tmp_path / "CUB_200_2011.tgz").read_bytes()
    archive = Archive("CUB_200_2011.tgz", "CUB_200_2011", (f"{server}/missing", f"{server}/x"), md5())
    monkeypatch.setattr(CUB, "archives", (archive,))
    with pytest.raises(UserError, match="is not in"):
        prepare(prepare_config(tmp_path / "root", "stages=[fetch]"))
    prepare(prepare_config(tmp_path / "root", "stages=[fetch]", "download=true"))
    assert CUB.licence in caplog.text
    assert len(CUB(tmp_path / "root", 16)) == 12


def test_a_file_without_a_published_hash_is_remembered(tmp_path):
    put(tmp_path / "x.tar", "first")
    found = record_first_use(tmp_path / "x.tar", "http://somewhere/x.tar")
    assert found == {"bytes": 5, "sha256": hashlib.sha256(b"first").hexdigest()}
    assert json.loads((tmp_path / "x.tar.json").read_text()) == found | {"url": "http://somewhere/x.tar"}
    assert record_first_use(tmp_path / "x.tar") == found
    put(tmp_path / "x.tar", "other")
    with pytest.raises(UserError, match="not the file that was first used"):
        record_first_use(tmp_path / "x.tar")


def test_the_hubs_warnings_are_shown_once(monkeypatch):
    rooted = BufferingHandler(9)
    monkeypatch.setattr(logging.root, "handlers", [rooted])
    cli.prepare()
    hub = logging.getLogger(huggingface_hub.__name__)
    hub.warning("a file is gone")
    assert hub.handlers  # it shows them itself
    assert not rooted.buffer

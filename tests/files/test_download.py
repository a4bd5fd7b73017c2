"""Downloads: resumed, verified, and refused with a sentence."""

import base64
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
from ditune.files.download import fetch, record_first_use, shown
from ditune.files.needs import Need, bring, published_need
from miniatures import cub, put
from small_datasets import pack, prepare_config


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `content`, with ranges; breaks off after `limit` bytes as long as `breaks` is not used up."""

    content, breaks, limit, ranges, requests, keys = b"", 0, 0, True, [], []

    def do_GET(self) -> None:
        cls = type(self)
        wanted = self.headers.get("Range") if cls.ranges else None
        cls.requests.append(wanted)
        cls.keys.append((self.headers.get("Authorization"), self.path.partition("?")[2]))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if self.path.startswith("/missing"):
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
    Handler.keys = []
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


SECRETS = ("user-1", "s3cr3t", "abcd", "0123")


def with_secrets(server: str, path: str) -> str:
    return server.replace("://", "://user-1:s3cr3t@") + f"{path}?token=abcd&X-Amz-Signature=0123"


def test_keys_in_an_address_reach_the_server_and_nobody_else(server, tmp_path, caplog):
    missing, url = with_secrets(server, "/missing"), with_secrets(server, "/x")
    need = Need("a file", tmp_path / "x", present=False, addresses=(missing, url))
    Handler.breaks, Handler.limit = 1, 3000
    bring(need)
    assert (tmp_path / "x").read_bytes() == Handler.content
    basic = f"Basic {base64.b64encode(b'user-1:s3cr3t').decode()}"
    assert Handler.keys == [(basic, "token=abcd&X-Amz-Signature=0123")] * 3
    assert json.loads((tmp_path / "x.json").read_text())["url"] == f"{server}/x?..."
    by_hand = published_need("inception", "a file", tmp_path / "y", {"inception": [missing]})
    with pytest.raises(UserError) as caught:
        fetch(missing, tmp_path / "z")
    said = [caplog.text, str(need), str(by_hand), by_hand.remedy, str(caught.value)]
    assert "Trying the next address" in caplog.text
    assert "broke off" in caplog.text
    for text in said:
        assert f"{server}/" in text
        assert not [secret for secret in SECRETS if secret in text], text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://a.b/c/d.pt", "https://a.b/c/d.pt"),
        ("hf://owner/name@revision/file.pt", "hf://owner/name@revision/file.pt"),
        ("https://u:p@w@a.b:80/c?k=1#x", "https://a.b:80/c?..."),
        ("403 for url: https://cdn/x?Signature=abc. Ask.", "403 for url: https://cdn/x?... Ask."),
        ("URL can't contain '/x?token=abc' here", "URL can't contain '/x?...' here"),
        ("Is it at /data/x? Put it there.", "Is it at /data/x? Put it there."),
    ],
)
def test_what_is_shown_of_an_address(text, expected):
    assert shown(text) == expected


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

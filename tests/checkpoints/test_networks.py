"""Network files: progress while they are read, and files of our own."""

from types import SimpleNamespace

import torch

from ditune.checkpoints import load_network, loading, read_network, save_network
from ditune.files import atomic as checkpoint_files
from ditune.files.atomic import sha256


def test_large_files_show_their_progress(saved, tensors, monkeypatch, tmp_path):
    meters = []

    class Recorded:
        def __init__(self, what: str, total: int, unit: str) -> None:
            self.what, self.total, self.done = what, total, 0
            meters.append(self)

        def __enter__(self) -> "Recorded":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def advance(self, count: int) -> None:
            self.done += count

    path = saved(tensors)
    for module in (checkpoint_files, loading):
        monkeypatch.setattr(module, "meter", Recorded)
        monkeypatch.setattr(module, "LARGE", 1000)
    load_network(path)
    hashed = sha256(path)
    assert [m.what for m in meters] == [f"reading {path.name}", f"hashing {path.name}"]
    assert meters[0].done == meters[0].total == sum(value.nbytes for value in tensors.values())
    assert meters[1].done == meters[1].total == path.stat().st_size
    assert sha256(path) == hashed
    assert len(meters) == 2  # the second time it is known


def test_files_of_ours_are_read_as_before(base, tmp_path):
    one, two = load_network(base), read_network(base).network
    again = tmp_path / "again.safetensors"
    save_network(again, one, {"kind": "flow"})
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])
        assert torch.equal(value, load_network(again).state_dict()[key])
    assert SimpleNamespace(**read_network(again).process).kind == "flow"

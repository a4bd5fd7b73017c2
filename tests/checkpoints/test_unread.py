"""Networks whose weights are read when they are cut: each process gets its rows of the same bits, and nothing else."""

import os
from pathlib import Path

import pytest
import torch
from test_loading import FORMATS, filled, moe, ours

from ditune.checkpoints import loading, read_network
from ditune.config.components import freeze_in_bf16
from ditune.errors import UserError
from ditune.networks import DiT
from ditune.networks.unfilled import Uninitialised, skeleton, unfilled
from ditune.networks.unread import Memory, ReadWhole, own_rows
from ditune.peft import build_peft
from ditune.rng import seeded
from foreign_files import network

PLACES = [(0, 1), (0, 2), (1, 2), (2, 3), (4, 5)]


def assert_rows(found: DiT, expected: DiT, place: tuple[int, int]) -> None:
    values = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        rows = own_rows(len(parameter), place)
        chunks = values[name].chunk(place[1])
        own = chunks[place[0]] if place[0] < len(chunks) else values[name][:0]
        assert torch.equal(parameter[rows], own.to(parameter.dtype)), name


@pytest.mark.parametrize("name", FORMATS)
def test_each_process_reads_its_rows_of_a_file(tmp_path, name):
    make, write = FORMATS[name]
    own = make()
    path = write(own, tmp_path)
    if name == "halved":
        own.load_state_dict({key: value.half().float() for key, value in own.state_dict().items()})
    for place in PLACES:
        with seeded(7):
            expected = filled(own, step=True)
        with seeded(7):
            found = read_network(path, later=True, step=True).network
        if place == (1, 2):
            for parameter in found.blocks[0].parameters():
                parameter.requires_grad_(False)
            freeze_in_bf16(found)
            assert found.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
        assert all(found.unread.holds(p) for p in found.blocks.parameters())
        for part in (*found.blocks, found):
            found.unread.fill(part.parameters(), place)
            assert not any(found.unread.holds(p) for p in part.parameters())
        assert_rows(found, expected, place)
        for key, buffer in expected.named_buffers():  # such as the routers' biases
            assert torch.equal(found.get_buffer(key), buffer), key


@pytest.mark.parametrize("make", [network, moe])
@pytest.mark.parametrize("place", PLACES)
def test_each_process_initialises_its_rows(make, place):
    """As an ordinary constructor does, and with the random numbers behind it."""
    with seeded(1):
        expected = make()
        after = torch.get_rng_state()
    with seeded(1):
        with unfilled() as initialisation:
            found = make()
        unread = Uninitialised(found, initialisation)
        before = torch.get_rng_state()
        unread.fill(found.blocks[0].parameters(), place)
        assert torch.equal(torch.get_rng_state(), before)
    assert_rows(found, expected, place)
    assert torch.equal(unread.generator, after)


def test_rows_of_other_processes_have_no_pages():
    memory = Memory(torch.Size([8, 1 << 20]))
    before = resident()
    memory.tensor.fill_(1)
    assert resident() - before > 30e6
    memory.keep(own_rows(8, (1, 4)))
    assert resident() - before < 10e6
    assert memory.tensor[2:4].eq(1).all()
    assert not memory.tensor[:2].any()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("method", "read"), [("difffit", ""), ("lora", ""), ("dora", "qkv"), ("pissa", "qkv"), ("psoft", "qkv")]
)
def test_methods_read_what_they_begin_with(tmp_path, method, read):
    """The adapted network has the bits of one that was read before."""
    path = ours(network(), tmp_path)
    adapted = []
    for later in (False, True):
        found = read_network(path, later=later).network
        with seeded(3), ReadWhole(found.unread):
            build_peft(method, lr=1e-3).apply(found)
        if later:
            here = {name for name, p in found.blocks.named_parameters() if not found.unread.holds(p)}
            base = {name for name in here if "default" not in name and "gamma" not in name}
            assert base == {name for name in base if read and read in name and "weight" in name}
            assert bool(base) == bool(read)
            skeleton(found)  # can be copied
            found.unread.fill(found.parameters())
        adapted.append(found.state_dict())
    for name, value in adapted[0].items():
        assert torch.equal(adapted[1][name], value), name


def test_a_file_that_changes_before_it_is_read_is_refused(tmp_path):
    path = ours(network(), tmp_path)
    found = read_network(path, later=True).network
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="changed while it was read"):
        found.unread.fill(found.blocks[0].parameters(), (0, 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_checks_the_hash_of_what_nobody_has_read(tmp_path, monkeypatch, rank):
    path = ours(network(), tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(loading, "is_first_rank", lambda: not rank)
    if rank:
        assert read_network(path, later=True).network.unread is not None
        return
    with pytest.raises(UserError, match="is damaged"):
        read_network(path, later=True)

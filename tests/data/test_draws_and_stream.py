"""Random numbers and the order of the data are functions of (seed, step, position): who asks changes nothing."""

from itertools import islice

import pytest
import torch
from torch.testing import assert_close

from ditune.data import Augment, ImageDataset
from ditune.data.stream import ImageStream, MicroBatches, micro_batch_size, training_loader
from ditune.errors import UserError
from ditune.rng import Draws, generator, mix

N = 10  # pictures


@pytest.fixture
def stream(pictures):
    return ImageStream(ImageDataset(pictures, 16, "train"), seed=3)


def positions(batch_size, accumulate, world_size, first_step=0, steps=3):
    """For every step the sorted positions of all ranks and micro-steps."""
    ranks = [iter(MicroBatches(batch_size, accumulate, rank, world_size, first_step)) for rank in range(world_size)]
    return [sorted(p for rank in ranks for batch in islice(rank, accumulate) for p in batch) for _ in range(steps)]


# Draws


def test_mix_is_fixed():
    """Seeds of old runs must not change their meaning."""
    assert mix(0) == 0xE220A8397B1DCDAF  # first output of splitmix64 from state 0
    assert len({mix(), mix(0), mix(0, 0), mix(1), mix(0, 1), mix(1, 0), mix(-1)}) == 7
    assert 0 <= mix(-(1 << 70), 1 << 70) < 1 << 64


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[3], [1], [2], [0]]])
def test_draws_depend_on_positions_only(split):
    whole = Draws(5, 17, range(4))
    parts = [Draws(5, 17, part) for part in split]
    order = [p for part in split for p in part]
    for draw in (
        lambda d: d.normal("noise", (3, 2)),
        lambda d: d.uniform("drop"),
        lambda d: d.integers("t", 1000),
    ):
        assert torch.equal(torch.cat([draw(part) for part in parts]), draw(whole)[order])


def test_draws_differ_by_everything_else():
    draws = [Draws(0, 0, range(8)), Draws(1, 0, range(8)), Draws(0, 1, range(8)), Draws(0, 0, range(8, 16))]
    values = [d.normal(purpose, (4,)) for d in draws for purpose in ("noise", "posterior")]
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    Draws(0, 0, range(4)).normal("noise", (8,))
    generator(1, 2).initial_seed()
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_have_their_distributions():
    draws, share = Draws(0, 0, range(4000)), torch.linspace(0.05, 0.95, 19).double()
    normal = draws.normal("noise", (5,)).flatten().double()
    assert_close(normal.quantile(share), torch.special.ndtri(share), atol=0.04, rtol=0)
    assert_close(draws.uniform("drop").quantile(share), share, atol=0.025, rtol=0)  # Kolmogorov: 1 of 100 exceeds it
    counts = torch.bincount(draws.integers("t", 10), minlength=10)
    assert len(counts) == 10
    assert counts.min() > 320
    assert counts.max() < 480


# Stream


def test_every_pass_shows_every_image_once(stream):
    orders = [stream._permutation(epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    shown, _, positions = stream.__getitems__(range(7, 17))  # the last 3 of a pass, the first 7 of the next
    expected = [orders[0][i] for i in (7, 8, 9)] + orders[1][:7]
    assert torch.equal(shown, stream.dataset.load()[expected])
    assert positions.tolist() == list(range(7, 17))


def test_image_of_a_position_does_not_depend_on_its_batch(stream):
    pictures, labels, _ = stream.__getitems__(range(12))
    for p in (0, 9, 10, 11):
        picture, label, _ = stream.__getitems__([p])
        assert torch.equal(picture[0], pictures[p])
        assert label[0] == labels[p]


def test_flips_are_half_and_fixed(stream):
    flipping = ImageStream(stream.dataset, seed=3, flip=True)
    plain, _, _ = stream.__getitems__(range(400))
    flipped, _, _ = flipping.__getitems__(range(400))
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(dim=1)
    kept = (flipped == plain).flatten(1).all(dim=1)
    assert torch.equal(mirrored, ~kept)
    assert 160 < mirrored.sum() < 240
    assert torch.equal(flipping.__getitems__([7, 399])[0], flipped[[7, 399]])


ALL = {"share": 1.0, "degrees": 15, "scale": (0.75, 1.1), "shift": 0.1, "hue": 0.5, "saturation": (0.5, 1.5)}


def test_a_share_is_changed_without_class_and_the_rest_is_as_it_was(stream):
    augmented = ImageStream(stream.dataset, seed=3, augment=Augment(**ALL | {"share": 0.4}, shading=0.4))
    before, classes, _ = stream.__getitems__(range(400))
    after, labels, _ = augmented.__getitems__(range(400))
    hidden = labels == stream.dataset.num_classes
    assert 120 < hidden.sum() < 200
    assert torch.equal(labels[~hidden], classes[~hidden])
    same = (before == after).flatten(1).all(dim=1)
    assert torch.equal(same, ~hidden)
    assert torch.equal(augmented.__getitems__([7, 399])[0], after[[7, 399]])
    assert torch.equal(stream.__getitems__(range(400))[0], before)  # pictures in memory stay as they are


@pytest.mark.parametrize("shading", [0.0, 0.4])
def test_a_changed_drawing_stays_on_white(shading):
    drawing = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    drawing[:, 10:22, 12:20] = torch.tensor([200, 40, 90], dtype=torch.uint8)[:, None, None]
    augment = Augment(**ALL, shading=shading)
    for number in range(20):
        changed = augment.changed(drawing, generator(number))
        assert (changed[:, 0] == 255).all()
        assert (changed[:, :, 0] == 255).all()
        assert 40 < (changed.amin(0) < 200).sum() < 160


# Micro-batches and loaders


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_a_step_covers_the_same_positions_whoever_takes_part(accumulate, world_size):
    assert positions(4, accumulate, world_size) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert positions(4, accumulate, world_size, first_step=2, steps=1) == [[8, 9, 10, 11]]


def test_ranks_share_nothing():
    ranks = [[p for b in islice(MicroBatches(8, 2, rank, 2, 0), 6) for p in b] for rank in range(2)]
    assert not set(ranks[0]) & set(ranks[1])
    assert [len(b) for b in islice(MicroBatches(8, 2, 1, 2, 0), 3)] == [2, 2, 2]


@pytest.mark.parametrize("sizes", [(7, 1, 2), (6, 4, 1), (4, 2, 4), (0, 1, 1), (-4, 1, 1)])
def test_batches_that_do_not_divide_are_refused(sizes):
    with pytest.raises(UserError, match="multiple"):
        micro_batch_size(*sizes)


def test_worker_processes_change_nothing(stream):
    def batches(workers, first_step=1):
        loader = training_loader(stream, MicroBatches(4, 1, 0, 1, first_step), workers, pin_memory=False)
        return list(islice(loader, 5))

    for alone, parallel in zip(batches(0), batches(2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(alone, parallel, strict=True))


def test_loader_begins_where_it_is_told(stream):
    loader = training_loader(stream, MicroBatches(4, 1, 0, 1, first_step=5), 0, pin_memory=False)
    assert next(iter(loader))[2].tolist() == [20, 21, 22, 23]

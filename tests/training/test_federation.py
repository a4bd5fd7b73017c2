"""Federated averaging with zeros: the original's merges, one client as plain training, rounds by hand, and resuming."""

import json
from pathlib import Path

import pytest
import torch
from comparison import saved
from injectors import during_training_step, terminate
from omegaconf import OmegaConf
from torch.testing import assert_close

from ditune.commands.clients import taking_part
from ditune.commands.federate import LAST, federate
from ditune.commands.train import train
from ditune.config.grammar import hydra_value
from ditune.data.subsets import of_client
from ditune.errors import UserError
from ditune.training import Sparsity
from ditune.training.federation import Weights, fedavg, merge, next_weights, nnz, voted
from ditune.training.masks import largest
from helpers import SMALL, assert_same_bits, golden, task

# The original's numbers


@pytest.fixture
def clients():
    """Weights, masks and numbers of images of three clients."""
    given = golden("efficiency_fedsparsify")
    values, masks = ([given[f"merge.{name}{k}"] for k in range(3)] for name in ("w", "mask"))
    return values, [mask.bool() for mask in masks], given["merge.factors"].tolist()


def test_fedsparsifys_averages(clients):
    values, masks, factors = clients
    expected = golden("efficiency_fedsparsify")
    assert_close(fedavg(values, factors), expected["merge.fedavg"], atol=1e-15, rtol=1e-15)
    assert_close(nnz(values, masks, factors), expected["merge.nnz"], atol=1e-15, rtol=1e-15)


@pytest.mark.parametrize(("name", "count"), [("majority", 3), ("majority_two", 2)])
def test_fedsparsifys_majority(clients, name, count):
    """The original counts K // 2 votes as a majority: one of three, and one of two."""
    values, masks, factors = (part[:count] for part in clients)
    mean = fedavg(values, factors) * voted(masks, needed=count // 2)
    assert_close(mean, golden("efficiency_fedsparsify")[f"merge.{name}"], atol=1e-15, rtol=1e-15)


def test_a_majority_is_more_than_half():
    kept = [torch.tensor(row, dtype=torch.bool) for row in ([1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0])]
    assert voted(kept).tolist() == [True, True, False, False]
    assert voted(kept[:2]).tolist() == [True, False, False, False]
    assert voted(kept[:1]).tolist() == kept[0].tolist()


def weights_of(*values, masked=True):
    value = torch.tensor(values)
    return Weights({"w": value, "b": value + 1}, {"w": 2 * value, "b": value}, {"w": value != 0} if masked else {})


def test_merges_by_hand():
    """Clients of 1 and 3 images; weights that a client has masked are 0."""
    one, other = weights_of(4.0, 0.0, 8.0, 0.0), weights_of(8.0, 4.0, 0.0, 0.0)
    mean = merge([one, other], [1, 3])
    assert mean.values["w"].tolist() == [7.0, 3.0, 2.0, 0.0]
    assert mean.average["w"].tolist() == [14.0, 6.0, 4.0, 0.0]
    assert mean.masks["w"].tolist() == [True, True, True, False]
    kept = merge([one, other], [1, 3], "nnz")
    assert kept.values["w"].tolist() == [7.0, 4.0, 8.0, 0.0]
    agreed = merge([one, other], [1, 3], "majority")
    assert agreed.values["w"].tolist() == [7.0, 0.0, 0.0, 0.0]
    assert agreed.masks["w"].tolist() == [True, False, False, False]
    for merged in (mean, kept, agreed):  # what is not masked has its mean
        assert merged.values["b"].tolist() == [8.0, 4.0, 3.0, 1.0]
    dense = [weights_of(*range(1, 5), masked=False), weights_of(*range(5, 9), masked=False)]
    assert_same_bits(merge(dense, [1, 3], "nnz").values, merge(dense, [1, 3]).values)


@pytest.mark.parametrize("how", ["fedavg", "nnz", "majority"])
def test_one_client_is_itself_to_the_bit(how):
    generator = torch.Generator().manual_seed(0)
    values = {"w": torch.randn(50, generator=generator), "b": torch.randn(3, generator=generator)}
    client = Weights(values, {name: value / 3 for name, value in values.items()}, {"w": torch.ones(50) > 0})
    merged = merge([client], [7], how)
    assert_same_bits([merged.values, merged.average, merged.masks], [client.values, client.average, client.masks])


def test_purges_before_and_after_the_merge():
    """Half of four weights goes: of the mean (global), or of each client's own (local)."""
    sparsity = Sparsity("unstructured", target="w", final=0.5)
    one, other = weights_of(1.0, 2.0, 3.0, 4.0, masked=False), weights_of(9.0, 1.0, 2.0, 8.0, masked=False)
    after = next_weights([one, other], [1, 1], "fedavg", "global", sparsity, step=1)
    assert after.values["w"].tolist() == [5.0, 0.0, 0.0, 6.0]
    before = next_weights([one, other], [1, 1], "majority", "local", sparsity, step=1)
    assert before.values["w"].tolist() == [0.0, 0.0, 0.0, 6.0]  # one keeps the last two, the other the outer two
    assert before.average["w"].tolist() == [0.0, 0.0, 0.0, 12.0]
    dense = next_weights([one, other], [1, 1], "fedavg", "global", None, step=1)
    assert dense.values["w"].tolist() == [5.0, 1.5, 2.5, 6.0]
    late = Sparsity("unstructured", target="w", final=0.5, start=5)
    assert_same_bits(next_weights([one, other], [1, 1], "fedavg", "global", late, step=4).values, dense.values)


# Shares of the images


def test_shares_are_disjoint_and_together_all():
    names, labels = [f"{i}.png" for i in range(23)], torch.arange(23) % 5
    for by, sizes in (("random", {7, 8}), ("classes", {4, 5, 9, 10})):
        shares = [of_client(names, labels, client=k, clients=3, by=by) for k in range(3)]
        assert sorted(row for share in shares for row in share) == list(range(23))
        assert {len(share) for share in shares} <= sizes
        assert all(share == sorted(share) for share in shares)
        assert of_client(names, labels, client=0, clients=1, by=by) == list(range(23))
    classes = [set(labels[of_client(names, labels, client=k, clients=3, by="classes")].tolist()) for k in range(3)]
    assert sum(map(len, classes)) == 5
    order = [of_client(names, labels, client=0, clients=3, seed=seed) for seed in range(3)]
    assert len({tuple(rows) for rows in order}) == 3
    with pytest.raises(UserError, match="fewer clients"):
        of_client(names, labels, client=5, clients=6, by="classes")


# Whole simulations

STEPS = 4


@pytest.fixture
def simulate(pictures, tmp_path):
    """`simulate(name, *overrides)`: folder of a federation of four steps."""

    def start(name: str, *overrides: str, code: int = 0) -> Path:
        folder = tmp_path / name
        given = [*SMALL, f"data.root={pictures}", "peft=full", f"max_steps={STEPS}", "optimizer.lr=0.01"]
        cfg = task("federate", *given, *overrides, f"paths.output_dir={hydra_value(folder)}")
        assert federate(cfg) == code
        return folder

    return start


def test_one_client_is_plain_training_to_the_bit(simulate, small, tmp_path):
    """In any number of rounds: a client keeps its optimizer."""
    train(small("peft=full", f"max_steps={STEPS}", "optimizer.lr=0.01", "scheduler=linear", folder=tmp_path / "plain"))
    plain = saved(tmp_path / "plain", STEPS)
    for rounds in (1, 2):
        folder = simulate(f"rounds_{rounds}", "clients=1", f"rounds={rounds}", "scheduler=linear")
        for own in ("client_0", "global"):
            found = saved(folder / own, STEPS)
            for part in ("state_dict", "ema", "optimizer_states", "identity", "lr_schedulers"):
                assert_same_bits(found[part], plain[part], part)
        network = (folder / "global" / "network.safetensors").read_bytes()
        assert network == (tmp_path / "plain" / "network.safetensors").read_bytes()
        assert json.loads((folder / "global" / "result.json").read_text())["status"] == "finished"


def test_rounds_of_two_clients_with_zeros_by_hand_stopped_and_resumed(simulate, monkeypatch):
    """The mean of what the clients have trained, purged by each; the next round begins there, under its masks."""
    options = ["clients=2", "rounds=2", "purge=local", "merge=majority", "sparsity=magnitude", "sparsity.final=0.75"]
    whole = simulate("whole", *options, "callbacks.checkpoint.keep=-1", "callbacks.checkpoint.every_n_steps=1")
    # the first round, by hand: both have trained on their own images from equal weights; checkpoints of step 2 have
    # been written once more with the mean, so the second half of the schedule is looked at
    schedule, sizes = Sparsity("unstructured", final=0.75, schedule="cubic", end=STEPS), []
    ends = []
    for client in range(2):
        sizes.append(json.loads((whole / f"client_{client}" / "result.json").read_text())["data"]["n"])
        ends.append(saved(whole / f"client_{client}", STEPS))
    assert sizes == [5, 5]
    first, second = (saved(whole / f"client_{client}", 2) for client in range(2))
    assert_same_bits(first["state_dict"], second["state_dict"])  # the mean was handed out
    assert_same_bits(first["sparsity"]["masks"], second["sparsity"]["masks"])
    assert first["optimizer_states"][0]["state"][0]["exp_avg"].any()
    for content in ends:  # masks were kept in the second round, and nothing else was purged
        assert_same_bits(content["sparsity"]["masks"], first["sparsity"]["masks"])
        for name, mask in first["sparsity"]["masks"].items():
            assert not content["state_dict"][f"network.{name}"][~mask].any()
            assert not content["ema"][name][~mask].any()
    masks = first["sparsity"]["masks"]
    assert schedule.amount(2) == pytest.approx(0.75 * (1 - 0.5**3))
    merged = torch.load(whole / LAST, weights_only=True)
    own = [
        largest({name: content["state_dict"][f"network.{name}"] for name in masks}, schedule.amount(4))
        for content in ends
    ]
    for name, mask in masks.items():
        kept = mask & own[0][name] & own[1][name]  # of two clients both must agree
        mean = (ends[0]["state_dict"][f"network.{name}"] + ends[1]["state_dict"][f"network.{name}"]) / 2
        assert torch.equal(merged["masks"][name], kept)
        assert_close(merged["values"][name], mean * kept, atol=1e-7, rtol=1e-6)
    facts = json.loads((whole / "federation.json").read_text())
    zeros = [found["zeros"] for found in facts["rounds"]]
    assert len(zeros) == 2
    assert zeros[0] < zeros[1] == sum(int((~mask).sum()) for mask in merged["masks"].values())

    with monkeypatch.context() as patch:
        during_training_step(patch, 3, terminate)
        stopped = simulate("stopped", *options, code=143)
    assert not (stopped / "global").exists()
    simulate("stopped", *options)
    assert_same_bits(torch.load(stopped / LAST, weights_only=True), merged)
    name = Path("global") / "network.safetensors"
    assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(UserError, match="a federation with merge=majority"):
        simulate("stopped", *options, "merge=nnz")
    (stopped / LAST).write_bytes((stopped / LAST).read_bytes()[:-100])
    with pytest.raises(UserError, match=r"merged\.pt is damaged"):
        simulate("stopped", *options)


def test_a_share_of_the_clients_takes_part_by_seed_and_round():
    def chosen(clients, participation, seed=0, rounds=40):
        cfg = OmegaConf.create({"clients": clients, "participation": participation, "seed": seed})
        return [taking_part(cfg, number) for number in range(1, rounds + 1)]

    assert chosen(5, 1.0) == [[0, 1, 2, 3, 4]] * 40
    assert {len(found) for found in chosen(10, 0.25)} == {3}
    assert {len(found) for found in chosen(3, 0.1)} == {1}
    assert all(found == sorted(set(found)) for found in chosen(10, 0.5))
    assert {client for found in chosen(10, 0.1) for client in found} == set(range(10))
    assert chosen(10, 0.3) == chosen(10, 0.3)
    assert chosen(10, 0.3) != chosen(10, 0.3, seed=1)


def test_clients_that_miss_rounds_go_on_from_the_weights_of_all(simulate):
    """One client in each round: the weights go from hand to hand, and each keeps its own optimizer."""
    options = ["clients=2", "rounds=4", "participation=0.5", "scheduler=linear"]
    kept = ["callbacks.checkpoint.keep=-1", "callbacks.checkpoint.every_n_steps=1"]
    order = [1, 0, 0, 1]  # of seed 0
    folder = simulate("relay", *options, *kept)
    facts = json.loads((folder / "federation.json").read_text())
    assert [row["clients"] for row in facts["rounds"]] == [[client] for client in order]
    last = {}  # own optimizer steps
    for number, client in enumerate(order):
        if number == 0:
            last[client] = 1
            continue
        begin, end = (saved(folder / f"client_{client}", step) for step in (number, number + 1))
        before = saved(folder / f"client_{order[number - 1]}", number)
        assert_same_bits(begin["state_dict"], before["state_dict"])
        assert_same_bits(begin["ema"], before["ema"])
        states = begin["optimizer_states"][0]["state"].values()
        assert {int(state["step"]) for state in states} == {last.get(client, 0)}
        assert any(bool(state["exp_avg"].any()) for state in states) == (client in last)
        assert begin["lr_schedulers"][0]["last_epoch"] == begin["global_step"] == number
        last[client] = int(end["optimizer_states"][0]["state"][0]["step"])
    assert last == {0: 2, 1: 2}
    losses = [json.loads((folder / name / "result.json").read_text())["denoising"] for name in ("client_0", "client_1")]
    assert losses == [{}, {}]  # nobody evaluates clients
    own, other, everyone = (
        saved(folder / name, step) for name, step in (("client_1", 4), ("client_0", 3), ("global", 4))
    )
    assert_same_bits(everyone["state_dict"], own["state_dict"])
    assert len({content["identity"]["data"] for content in (own, other, everyone)}) == 3


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["rounds=3"], "3 rounds do not share evenly"),
        (["trainer.devices=2"], r"trainer\.devices=1"),
        (["callbacks.checkpoint.best=loss"], r"callbacks\.checkpoint\.best=null"),
        (["sparsity=n_m"], r"sparsity\.way=hard"),
        (["patches=windows", "patches.schedule=progressive"], "would cut"),
        (["network=tiny_moe", "balance=loss_free"], "no weights to be merged"),
        (["clients=11", "rounds=2"], "fewer clients"),
    ],
)
def test_what_cannot_be_merged_is_refused(simulate, overrides, part):
    with pytest.raises(UserError, match=part):
        simulate("run", "clients=2", "rounds=2", *overrides)

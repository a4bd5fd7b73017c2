"""The greedy search for ranks: what it measures and keeps on known losses, and one search by trainings."""

import json

import hydra
import pytest

import forked
from ditune import cli
from ditune.config.components import build_components
from ditune.errors import UserError
from helpers import SMALL, compose
from hydra_plugins.ditune_sweeper.greedy_ranks import Measured, search

COSTS = {"qkv": 4, "proj": 2, "fc": 8, "none": 0}  # parameters of one rank of a group
GROUPS = ["qkv", "proj", "fc"]


class Known:
    """Trainings whose loss is known: each group lowers it by its value times (1 - 1 / rank)."""

    def __init__(self, **values):
        self.values, self.batches = values, []

    def __call__(self, several):
        self.batches.append([dict(ranks) for ranks in several])
        return [
            Measured(
                dict(ranks),
                1.0 - sum(self.values.get(name, 0) * (1 - 1 / rank) for name, rank in ranks.items()),
                100 + sum(COSTS[name] * rank for name, rank in ranks.items()),
            )
            for ranks in several
        ]


def test_the_group_that_lowers_the_loss_most_per_parameter_is_doubled():
    """qkv lowers the loss by .2 / 4 = .05 for each parameter, proj by .12 / 2 = .06, fc by .3 / 8 = .0375."""
    known = Known(qkv=0.4, proj=0.24, fc=0.6)
    kept = search(known, GROUPS, largest=2, gain=0.01, max_jobs=100)
    assert [found.ranks for found in kept] == [
        {"qkv": 1, "proj": 1, "fc": 1},
        {"qkv": 1, "proj": 2, "fc": 1},
        {"qkv": 2, "proj": 2, "fc": 1},
        {"qkv": 2, "proj": 2, "fc": 2},
    ]
    assert [len(batch) for batch in known.batches] == [1, 3, 2, 1]  # a group at `largest` is not doubled again


def test_it_ends_where_no_doubling_gives_enough():
    known = Known(qkv=0.04)  # 2 % of the loss by rank 2, 1.02 % by rank 4, 0.5 % by rank 8
    kept = search(known, GROUPS, largest=64, gain=0.01, max_jobs=100)
    assert [found.ranks["qkv"] for found in kept] == [1, 2, 4]
    assert len(known.batches) == 4  # the last round was in vain
    assert len(search(Known(), GROUPS, largest=64, gain=0.0, max_jobs=100)) > 1  # a gain of 0 is enough for 0


def test_it_is_bounded():
    known = Known(qkv=0.4, proj=0.4, fc=0.4)
    kept = search(known, GROUPS, largest=1024, gain=0.0, max_jobs=8)
    assert sum(map(len, known.batches)) == 7
    assert len(kept) == 3


def test_a_group_without_layers_is_refused():
    known = Known(qkv=0.4)
    with pytest.raises(UserError, match=r"groups\.none adds no parameters"):
        search(known, ["qkv", "none"], largest=4, gain=0.01, max_jobs=100)


def test_the_sweep_composes_and_its_overrides_are_ranks_of_the_layers(tmp_path):
    cli.prepare()
    with hydra.initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        cfg = hydra.compose("train", ["sweep=search_rank"], return_hydra_config=True)
    sweeper = hydra.utils.instantiate(cfg.hydra.sweeper)
    assert type(sweeper).__name__ == "GreedyRanks"  # Hydra imports its plugins once more
    assert sweeper.max_jobs == 1 + 4 * 5
    assert (cfg.data.pictures.split, cfg.metrics.loss_split, cfg.metrics.n) == ("train.fit", "train.val", 0)
    ranks = {"qkv": 1, "proj": 2, "fc1": 4, "fc2": 8}
    c = build_components(compose(tmp_path, "sweep=search_rank", *sweeper.overrides(ranks)))
    shapes = {name: p.shape for name, p in c.network.named_parameters() if "blocks.0." in name and "lora_A" in name}
    assert {name.split(".")[3]: shape[0] for name, shape in shapes.items()} == ranks
    block = c.network.blocks[0]
    assert {block.mlp.fc2.scaling["default"], block.attn.qkv.scaling["default"]} == {1.0}


@pytest.mark.slow
def test_a_search_by_trainings(tmp_path, pictures, base):
    """Two groups, rank 2 at the most: four trainings, and none of them again."""
    small = [override for override in SMALL if override != "~experiment"]
    command = [
        *("src/train.py", "~experiment", "sweep=search_rank", *small),
        *(f"data.root={pictures}", f"pretrained={base}", "max_steps=2", "optimizer.lr=0.05"),
        *(
            "data.pictures.split=train",
            "metrics.loss_split=test",
            "~hydra.sweeper.groups.proj",
            "~hydra.sweeper.groups.fc2",
        ),
        *("hydra.sweeper.largest=2", "hydra.sweeper.gain=0", f"sweep_dir={tmp_path}/sweep", "launcher.slots=2"),
        *(f"paths.cache_dir={tmp_path}/cache", r"peft.target_modules='blocks\.\d+\.(attn\.qkv|mlp\.fc1)'"),
    ]

    def start():
        done = forked.run(tmp_path, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / "sweep" / "search.json").read_text())

    found = start()
    assert found["rounds"][0]["ranks"] == {"qkv": 1, "fc1": 1}
    losses = [kept["loss"] for kept in found["rounds"]]
    assert losses == sorted(losses, reverse=True)
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/result.json")}
    assert len(results) == found["trainings"] <= 4
    assert start() == found
    assert {path: path.stat().st_mtime_ns for path in results} == results

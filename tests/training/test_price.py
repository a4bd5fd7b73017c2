"""What a run is expected to take: the arithmetic, the count of FLOP, and the plans that say it."""

import json
from dataclasses import replace

import pytest
import torch

from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.launch.jobs import Job
from ditune.launch.sweep import total_price
from ditune.networks import build_network
from ditune.training import price as module
from ditune.training.outlook import Outlook
from ditune.training.price import Device, Pace, expected_pace, forward_flops, price
from helpers import SMALL, compose

OUTLOOK = Outlook(
    max_steps=100, batch_size=8, calls=50, sheet_images=4, every_n_steps=50, held_out_calls=100, evaluation_images=10
)


def test_seconds_and_money():
    """100 x 8 images, three sheets less the first, 10 images of the evaluation and two images' worth of the loss."""
    found = price(Pace(step=0.5, image=2.0, source="here"), OUTLOOK, devices=1, per_hour=3.6)
    assert found.seconds == {"training": 400.0, "sample sheets": 16.0, "validation": 0, "evaluation": 24.0}
    assert found.money == pytest.approx(0.44)
    assert "0.44 at 3.6 an hour" in found.line()
    two = price(Pace(step=0.5, image=2.0, source="here"), OUTLOOK, devices=2, per_hour=3.6)
    assert two.seconds["training"] == 200.0
    assert two.money == pytest.approx((200 + 40) * 2 / 1000)
    assert price(None, OUTLOOK, 1, 3.6).line().startswith("unknown")
    assert price(None, OUTLOOK, 1, 3.6).money is None


def test_flop_of_the_published_network():
    """118.6 G multiplications and additions, Table 4 of arXiv 2212.09748: twice as many FLOP."""
    with torch.device("meta"):
        network = build_network("dit_xl_2")
    assert forward_flops(network, (4, 32, 32)) == pytest.approx(2 * 118.6e9, rel=0.01)
    with torch.device("meta"):
        assert forward_flops(build_network("tiny_moe"), (4, 32, 32)) is None


@pytest.mark.parametrize(("peft", "passes"), [("full", 3), ("lora", 2)])
def test_the_table_gives_the_pace(small, base, monkeypatch, peft, passes):
    c = build_components(small(f"peft={peft}", f"pretrained={base}"))
    flops = forward_flops(c.network, c.autoencoder.latent_shape(16))
    row = Device("some device", "32-true", training=1e9, sampling=1e8, date="2026-11", source="a test")
    monkeypatch.setattr(module, "DEVICES", (row,))
    pace = expected_pace(c, 50, "some device, of 80 GB")
    assert pace.step == pytest.approx(passes * flops / 1e9)
    assert pace.image == pytest.approx(50 * flops / 1e8)
    assert expected_pace(c, 50, "another device") is None
    monkeypatch.setattr(module, "DEVICES", (replace(row, precision="bf16-mixed"),))
    assert expected_pace(c, 50, "some device") is None


@pytest.mark.parametrize("way", ["true", "measure"])
def test_a_plan_says_it_and_trains_nothing(tmp_path, pictures, capsys, way):
    cfg = compose(tmp_path, *SMALL, f"data.root={pictures}", "peft=full", f"dry_run={way}", "price_per_hour=2")
    assert train(cfg) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("price"))
    written = json.loads((tmp_path / "price.json").read_text())
    if way == "measure":
        assert written["seconds"]["training"] > 0
        assert written["money"] == pytest.approx(sum(written["seconds"].values()) / 3600 * 2)
        assert "measured now, 3 steps of 4 images" in said
    else:
        assert "unknown" in said
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "result.json").exists()


def test_a_sweep_sums_over_its_missing_jobs():
    def job(status, seconds, devices=1, money=None):
        return Job([], status=status, dry_run=True, price={"seconds": seconds, "devices": devices, "money": money})

    planned = [job("planned", {"training": 3600.0}, money=2.0), job("planned", {"training": 1800.0}, 4, money=4.0)]
    others = [job("skipped", {"training": 9e9}, money=9.0), job("planned", {})]
    text = total_price([*planned, *others])
    assert text == "2 of 3 missing jobs have a price: 3.00 device-hours = 6.00"

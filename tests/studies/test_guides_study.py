"""The table of guides: its network evaluations are those of a sampler, and its differences are of equal seeds."""

import hydra
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from ditune import cli
from ditune.config.instantiate import instantiate
from ditune.errors import UserError
from ditune.files.atomic import write_json
from ditune.samplers import DDIM, sample
from helpers import compose
from studies.guides import CONFIGS, evaluations, guide_of, study

SWEEP = ("experiment=styles", "data=emoji_fluent3d")


def settings(tmp_path, *overrides: str):
    cli.prepare()
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        return hydra.compose("guides", [f"sweeps=[{tmp_path}/a,{tmp_path}/b]", f"out={tmp_path}/out", *overrides])


class Counting(torch.nn.Module):
    """Returns zeros and counts the images that it is given."""

    num_classes, count = 3, 0

    def forward(self, x, t, y):
        self.count += len(x)
        return torch.zeros_like(x)


@pytest.mark.parametrize(("guidance", "interval"), [(5.0, [0.15, 1.0]), (5.0, [0.0, 1.0]), (1.0, [0.15, 1.0])])
def test_network_evaluations_are_those_that_the_sampler_makes(tmp_path, guidance, interval):
    cfg, network = compose(tmp_path, "sweep=guides", *SWEEP, "peft=lora"), Counting()
    process = instantiate(cfg.objective, "objective").process
    given = {"steps": 25, "guidance": guidance, "guidance_interval": interval}
    sample(network, process, torch.zeros(2, 4, 2, 2), torch.zeros(2, dtype=torch.int64), sampler=DDIM(), **given)
    assert evaluations(cfg, given) == network.count / 2


def test_both_sweeps_train_the_same_jobs_but_for_the_target(tmp_path):
    plain, dogfit = (
        OmegaConf.to_container(compose(tmp_path, f"sweep={name}", *SWEEP, *more, "peft=lora", "seed=2"))
        for name, more in (("guides", ()), ("guides_dogfit", ("transfer=dogfit",)))
    )
    assert dogfit["transfer"].pop("_target_").endswith("DogFit")
    assert 1 / (2 - dogfit["transfer"]["w"]) == pytest.approx(plain["sampler"]["guidance"])
    assert dogfit["sampler"].pop("guidance") == 1
    assert plain["sampler"].pop("guidance") == 5
    different = {key for key in plain if plain[key] != dogfit[key]}
    assert different <= {"transfer", "name", "sweep_name", "sweep_dir"}


def write_run(folder, seed: int, kids: dict[str, float], guidance: float = 5.0, transfer: str | None = None) -> None:
    """A finished run with one evaluation for each guide; the first one is its own."""
    objective = {"_target_": "ditune.objectives.GaussianDiffusion", "process": {"_target_": "ditune.processes.Process"}}
    objective["process"]["_target_"] = "ditune.processes.GaussianProcess"
    folder.mkdir(parents=True)
    protocols = [
        {
            "protocol": {"steps": 25, "guidance": guidance, "guidance_interval": [0.15, 1.0]}
            | ({} if guide == "null class" else {"guide": guide}),
            "before": {"kid_x": 0.5},
            "after": {"kid_x": kid, "kid_x_std": 0.01},
        }
        for guide, kid in kids.items()
    ]
    result = {"status": "finished", "seed": seed, "peft": {"name": "lora"}, "seconds": {"fit": 60.0}}
    result |= {"metrics": protocols[0], "other_protocols": dict(enumerate(protocols[1:]))}
    write_json(folder / "result.json", result)
    target = None if transfer is None else {"_target_": transfer}
    (folder / "config.yaml").write_text(yaml.safe_dump({"objective": objective, "transfer": target}))


def test_the_table_compares_equal_seeds(tmp_path):
    for seed, (null, base) in enumerate([(0.20, 0.17), (0.30, 0.26), (0.25, 0.20)]):
        write_run(tmp_path / "a" / str(seed), seed, {"null class": null, "base {}": base})
    write_run(tmp_path / "b" / "0", 2, {"null class": 0.24}, guidance=1.0, transfer="ditune.objectives.DogFit")
    lines = (study(settings(tmp_path)) / "table.md").read_text().splitlines()
    null, base, dogfit = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert null[:8] == ["lora", "plain", "null class", "5", "3", "0.5000", "0.2500 ± 0.0500", ""]
    # differences -0.03, -0.04, -0.05: s = 0.01, t(0.975; 2) = 4.3027
    half = 4.3027 * 0.01 / 3**0.5
    assert base[2:8] == [
        "base",
        "5",
        "3",
        "0.5000",
        "0.2100 ± 0.0458",
        f"-0.0400 [{-0.04 - half:+.4f}, {-0.04 + half:+.4f}]",
    ]
    assert dogfit[1:8] == ["DogFit", "none", "1", "1", "0.5000", "0.2400", "-0.0100 (one seed)"]
    assert (int(null[8]), int(dogfit[8])) == (46, 25)
    assert len((tmp_path / "out" / "values.csv").read_text().splitlines()) == 1 + 7


def test_guides_have_their_setting_in_the_name():
    assert guide_of({"guidance": 2.0, "guide": "interpolated {'strength': 0.5}"}) == "interpolated 0.5"
    assert guide_of({"guidance": 2.0, "guide": "base {}"}) == "base"


def test_without_runs_the_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="There is no evaluated run in"):
        study(settings(tmp_path))

"""A training on two machines, by torchrun's agents and by Slurm's variables, with both "machines" on this one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from ditune import cli
from ditune.commands.train import train
from ditune.errors import UserError
from helpers import ROOT, SMALL, assert_same_bits, compose


def slurm(task: int) -> dict[str, str]:
    """What srun tells the only task of each of two nodes."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_START_TIME": "1700000000",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "localhost",
        "SLURM_PROCID": str(task),
        "SLURM_NODEID": str(task),
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1",
    }


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.ddp
@pytest.mark.slow
def test_two_machines_learn_as_one(tmp_path, pictures):
    """All four processes at once; nobody but the first one of each training writes."""
    common = [*SMALL, f"data.root={pictures}", "peft=full", "name=pair", "max_steps=2", "optimizer.lr=1e-3"]
    command = ["src/train.py", *common, "trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2"]
    command += ["trainer.devices=1", f"paths.log_dir={tmp_path}/logs"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    agent += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    by_agents = tmp_path / "agents"
    starts = [([*agent, f"--node-rank={node}", *command, f"run_dir={by_agents}"], {}) for node in (0, 1)]
    starts += [([sys.executable, *command], slurm(task)) for task in (0, 1)]
    processes = []
    for k, (arguments, variables) in enumerate(starts):
        with (tmp_path / f"{k}.log").open("wb") as log:
            env = os.environ | {"OMP_NUM_THREADS": "1"} | variables
            processes.append(subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        for k, process in enumerate(processes):
            assert process.wait(timeout=300) == 0, (tmp_path / f"{k}.log").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()

    (by_slurm,) = (tmp_path / "logs" / "train" / "runs").iterdir()  # both tasks found one folder
    for folder in (by_agents, by_slurm):
        assert json.loads((folder / "result.json").read_text())["status"] == "finished"
        assert (folder / "train.log").is_file()
        # Hydra opens a log for the other rank too, and nothing is said there
        written = (folder / "rank_1.log").read_text()
        assert "is in" not in written
        assert len((folder / "metrics.csv").read_text().splitlines()) == 3
    assert_same_bits(load_file(by_agents / "network.safetensors"), load_file(by_slurm / "network.safetensors"))

    alone = tmp_path / "alone"
    assert train(compose(alone, *common)) == 0
    one, two = load_file(alone / "network.safetensors"), load_file(by_agents / "network.safetensors")
    for name, value in one.items():
        if not name.endswith("qkv.bias"):  # see test_ddp.py
            assert_close(two[name], value, atol=1e-5, rtol=0)


def test_a_training_that_would_wait_for_other_machines_is_refused(small, monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"trainer\.num_nodes is 2, and nothing has started"):
        train(small("peft=full", "trainer.num_nodes=2"))


def test_later_ranks_write_no_hydra_files(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert cli.quiet(["seed=1"]) == []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first one of its machine
    assert cli.quiet(["seed=1"]) == ["hydra.output_subdir=null", "hydra.job.name=rank_3"]
    assert cli.quiet(["hydra.job.name=train_ddp_process_3"]) == []


def test_tasks_of_slurm_are_numbered_as_by_torchrun(monkeypatch):
    for name, value in slurm(1).items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that the values of the function are removed at the end
        monkeypatch.delenv(name)
    cli.number_as_torchrun()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["1", "0", "2"]


def test_agents_of_several_machines_need_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    cfg = compose(tmp_path)
    with pytest.raises(Exception, match="Add run_dir=") as error:
        Path(cfg.run_dir)
    assert cli.config_error(error.value).startswith("The config is wrong: every machine must")

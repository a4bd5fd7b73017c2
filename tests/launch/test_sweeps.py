"""Sweeps: jobs side by side in process trees of their own; what fails stays alone; the same command does the rest."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.testing import assert_close

import forked
from ditune import cli
from ditune.commands.evaluate_sweep import asked_for, evaluate_sweep
from ditune.config.roles import job_hash
from ditune.config.swept import held_back, is_sweep, joined, lacking
from ditune.errors import UserError
from ditune.files.locks import alone
from ditune.launch.jobs import Job, needs, of_the_job, place
from ditune.launch.sweep import Stopped, Sweep, show_summary
from ditune.launch.trees import Tree
from helpers import ROOT, SMALL, compose, task
from miniatures import MINIATURES


def processes(text: str) -> list[int]:
    """Ids of the processes whose command line holds `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has just ended
    return found


def wait_until(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


# Process trees, with programs that start at once


def tree(folder: Path, script: str, count: int) -> Tree:
    return Tree([sys.executable, "-S", "-c", f"import os, sys, time\n{script}"], count, folder)


def finish(running: Tree) -> list[int]:
    assert wait_until(lambda: running.poll() is not None)
    return running.poll()


def test_ranks_get_what_torchrun_gives(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "7")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "CUDA_VISIBLE_DEVICES")
    script = f"print([os.environ.get(n) for n in {names}])"
    command = [sys.executable, "-S", "-c", f"import os\n{script}"]
    finish(running := Tree(command, 2, tmp_path, devices=["3", "5"]))
    for rank in (0, 1):
        written = running.log(rank).read_text().strip()
        assert written == str([str(rank), str(rank), "2", "127.0.0.1", None, "3,5"])


def test_one_failing_rank_ends_the_others(tmp_path):
    start = time.monotonic()
    running = tree(tmp_path, "if os.environ['RANK'] == '1': sys.exit('Error: no luck.')\ntime.sleep(60)", 3)
    assert finish(running) == [-signal.SIGTERM, 1, -signal.SIGTERM]
    assert time.monotonic() - start < 20
    assert running.failed_first == [1]
    assert running.causes() == {1: "Error: no luck."}


def test_the_cause_is_told_and_not_the_lost_connection(tmp_path):
    """The rank that only lost its connection may well be the first to end."""
    lost = "sys.exit('RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed')"
    late = "time.sleep(0.7)\nsys.exit('RuntimeError: the disk is gone')"
    finish(running := tree(tmp_path, f"if os.environ['RANK'] == '0': {lost}\n{late}", 2))
    assert running.failed_first == [0, 1]
    assert running.causes() == {1: "RuntimeError: the disk is gone"}


def test_the_table_of_jobs_takes_no_error_for_markup(capsys):
    failed = Job(["name=[b]"], status="failed", error="lost [/x.cc:5] at :smile: [red]", folder=Path("[0]"))
    show_summary([failed, Job(["name=c"])])
    shown = "".join(capsys.readouterr().out.split())
    for text in ("name=[b]", "lost[/x.cc:5]", "at:smile:[red]", "[0]"):
        assert text in shown, shown


def test_a_rank_that_does_not_listen_is_killed_with_its_children(tmp_path):
    mark = f"mark-{tmp_path.name}-{os.getpid()}"
    child = "import subprocess, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    child += (
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{mark}']); print('up', flush=True)"
    )
    running = tree(tmp_path, f"{child}\ntime.sleep(60)", 1)
    assert wait_until(lambda: "up" in running.log(0).read_text() and processes(mark))
    assert running.stop(grace=0.2) == [-signal.SIGKILL]
    assert wait_until(lambda: not processes(mark))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_nothing_outlives_a_sweep_that_is_killed(tmp_path):
    mark = f"mark-{tmp_path.name}-{os.getpid()}"
    script = f"""
import sys, time
from pathlib import Path
from ditune.launch.trees import Tree
from ditune.files.locks import alone
Tree([sys.executable, "-c", "import time; time.sleep(60)", {mark!r}], 2, Path({str(tmp_path)!r}))
print("up", flush=True)
time.sleep(60)
"""
    sweep = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert sweep.stdout.readline() == "up\n"
    sweep.kill()
    sweep.wait()
    assert wait_until(lambda: not processes(f"\0{mark}"))


# Plans


def test_hash_is_of_what_decides_the_result(tmp_path):
    cfg = compose(tmp_path)

    def key(name: str, value: object) -> str:
        changed = cfg.copy()
        OmegaConf.update(changed, name, value)
        return job_hash(changed)

    same = {"paths.output_dir": "x", "tags": ["a"], "resume": "auto", "launcher.slots": 3, "run_dir": "x"}
    assert {key(*item) for item in same.items()} == {job_hash(cfg)}
    other = {"seed": 1, "peft.name": "bitfit", "peft.lr": 1e-4, "max_steps": 401, "trainer.devices": 2}
    assert len({job_hash(cfg), *(key(*item) for item in other.items())}) == 1 + len(other)
    assert cfg.paths.output_dir == str(tmp_path)  # left as it was


@pytest.mark.parametrize(
    ("accelerator", "devices", "gpus", "per_job", "expected"),
    [
        ("cpu", 2, 8, None, (2, False)),
        ("cpu", "auto", 0, None, (1, False)),
        ("auto", "auto", 8, 2, (2, True)),
        ("auto", "auto", 8, None, (8, True)),
        ("auto", 2, 0, None, (2, False)),
        ("gpu", "1", 2, 2, (1, True)),
        ("gpu", 4, 8, 2, "raise launcher.gpus_per_job"),
        ("gpu", [0, 1], 8, None, "Give their number"),
    ],
)
def test_what_a_job_needs(accelerator, devices, gpus, per_job, expected):
    if isinstance(expected, tuple):
        assert needs(accelerator, devices, gpus, per_job) == expected
    else:
        with pytest.raises(UserError, match=expected):
            needs(accelerator, devices, gpus, per_job)


def test_a_job_of_several_machines_is_refused():
    with pytest.raises(UserError, match="submitit_slurm"):
        needs("gpu", 1, gpus=1, gpus_per_job=None, num_nodes=2)


def test_places_are_kept(tmp_path):
    for name, key, status in (("0", "a", "finished"), ("2", "b", "killed")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"config_hash": key, "status": status}))
    jobs = [Job([], key) for key in ("c", "b", "a", "d", "c")]
    place(jobs, tmp_path)
    assert [job.folder and job.folder.name for job in jobs] == ["1", "2", "0", "3", None]
    assert [job.status for job in jobs] == ["waiting", "waiting", "skipped", "waiting", "refused"]


def test_places_are_found_by_what_changes_the_result(tmp_path):
    """Runs 0 and 1 are of one identity and two configs, 2 is of an earlier version; 3 is damaged, 4 has no result."""
    runs = [("x", "A", "finished"), ("y", "A", "finished"), ("old", None, "finished")]
    for k, (key, identity, status) in enumerate(runs):
        (tmp_path / str(k)).mkdir()
        result = {"config_hash": key, "status": status} | ({"job_identity": identity} if identity else {})
        (tmp_path / str(k) / "result.json").write_text(json.dumps(result))
    for k in "34":
        (tmp_path / k / "checkpoints").mkdir(parents=True)
    (tmp_path / "3" / "result.json").write_text('{"status": "fin')
    noted = [{"folder": k, "config_hash": key, "status": "killed"} for k, key in (("3", "hurt"), ("4", "gone"))]
    (tmp_path / "summary.json").write_text(json.dumps({"jobs": noted}))
    pairs = [("y", "A"), ("new", "A"), ("old", "B"), ("gone", "C"), ("hurt", "D"), ("more", "A"), ("none", "E")]
    jobs = [Job([], key, identity=identity) for key, identity in pairs]
    place(jobs, tmp_path)
    assert [job.folder.name for job in jobs] == ["1", "0", "2", "4", "3", "5", "6"]
    assert [job.status for job in jobs] == ["skipped"] * 3 + ["waiting"] * 4
    assert (tmp_path / "3" / "result.json.damaged").is_file()
    assert not (tmp_path / "3" / "result.json").exists()


TABLE = [
    "difffit_food101",
    "difffit_sun397",
    "difffit_df20m_mini",
    "difffit_caltech101",
    "difffit_cub",
    "difffit_artbench10",
]


def test_experiments_name_a_sweep(tmp_path):
    group = compose(tmp_path, "logger=wandb", "sweep_name=a+b").logger.group
    assert group == "a+b"
    assert compose(tmp_path, "logger=wandb").logger.group == "emoji"  # of a single run, as ever
    assert joined(["difffit_flowers102", "difffit_cub", "difffit_cub"]) == "difffit_cub+difffit_flowers102"
    many = joined(TABLE)
    assert many.startswith("difffit_artbench10+5_others-")
    assert joined(TABLE[::-1]) == many != joined([*TABLE[1:], "difffit_flowers102"])


def test_the_sweeps_config_leaves_to_its_jobs_what_it_lacks():
    error = HydraException("Could not override 'data.root'.\nTo append to your config use +data.root=/a")
    given = ["-m", "experiment=difffit_cub,difffit_flowers102", "data.root=/a", "seed=0"]
    changed = held_back(error, given)
    assert changed == [*given[:2], "data.root=choice(/a)", "seed=0"]
    assert held_back(error, changed) is None  # then the jobs have refused it
    assert held_back(error, given[1:]) is None  # no sweep
    assert held_back(HydraException("Could not find 'data/cup'"), given) is None


@pytest.mark.parametrize(
    ("swept", "sentence"),
    [
        (
            ["experiment=difffit_emoji,difffit_cub", "rates.keep.full=1"],
            "experiment=difffit_cub has no key 'rates.keep.full'",
        ),
        (["experiment=difffit_cub", "peft=difffit,lora", "peft.r=4"], "peft=difffit has no key 'peft.r'"),
        (["experiment=difffit_cub,difffit_sun397", "peft.q=4"], None),
    ],
)
def test_options_that_lack_a_key_are_named(swept, sentence):
    cli.prepare()
    said = lacking(swept[-1].partition("=")[0], cli.CONFIGS, "train", swept)
    assert said is None if sentence is None else said.startswith(sentence)


def test_hydras_own_overrides_of_a_sweep_stay_there():
    given = [
        "hydra/launcher=basic",
        "hydra.launcher.slots=1",
        "+hydra.sweep.x=1",
        "hydra.verbose=true",
        "hydra.mode=MULTIRUN",
    ]
    assert of_the_job(given) == ["hydra.verbose=true"]


def test_gpus_are_shared_and_never_given_twice(tmp_path):
    """Four jobs of one and two GPUs on three; each job writes when it had which."""
    script = tmp_path / "job.py"
    script.write_text(
        "import json, os, sys, time\n"
        "folder = next(a for a in sys.argv if a.startswith('run_dir=')).split('=')[1]\n"
        "start = time.time(); time.sleep(1.5)\n"
        "if os.environ.get('RANK', '0') == '0':\n"
        "    gpus = os.environ['CUDA_VISIBLE_DEVICES'].split(',')\n"
        "    content = {'status': 'finished', 'gpus': gpus, 'start': start, 'end': time.time()}\n"
        "    open(folder + '/result.json', 'w').write(json.dumps(content))\n"
    )
    jobs = [
        Job([], str(k), tmp_path / "sweep" / str(k), processes=count, on_gpu=True)
        for k, count in enumerate((2, 2, 1, 1))
    ]
    Sweep(tmp_path / "sweep", script, ["0", "1", "2"]).run(jobs)
    assert [job.status for job in jobs] == ["finished"] * 4
    results = [json.loads((job.folder / "result.json").read_text()) for job in jobs]
    assert [len(result["gpus"]) for result in results] == [2, 2, 1, 1]
    together = 0
    for i, a in enumerate(results):
        for b in results[:i]:
            if a["start"] < b["end"] and b["start"] < a["end"]:
                together += 1
                assert not set(a["gpus"]) & set(b["gpus"])
    assert together  # they did run side by side


def test_jobs_that_only_plan_have_not_failed(tmp_path):
    script = tmp_path / "job.py"
    script.write_text("import sys\nsys.exit('--' in sys.argv)\n")
    folders = [tmp_path / "sweep" / str(k) for k in range(2)]
    jobs = [Job(own, str(k), folders[k], dry_run=True) for k, own in enumerate(([], ["--"]))]
    Sweep(tmp_path / "sweep", script, []).run(jobs)
    assert [job.status for job in jobs] == ["planned", "failed"]
    assert [job.succeeded for job in jobs] == [True, False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_says_what_became_of_its_jobs(tmp_path, number):
    """One job has failed by itself, one is stopped in time, one is stopped and has a result to say so, one waits."""
    script = tmp_path / "job.py"
    script.write_text(
        "import signal, sys, time\n"
        "folder = next(a for a in sys.argv if a.startswith('run_dir=')).split('=')[1]\n"
        "def stop(*_):\n"
        "    open(folder + '/result.json', 'w').write('{\"status\": \"stopped\"}')\n"
        "    sys.exit(143)\n"
        "if 'fails' in sys.argv: sys.exit('Error: no luck.')\n"
        "if 'saves' in sys.argv: signal.signal(signal.SIGTERM, stop)\n"
        "open(folder + '/up', 'w').close()\n"
        "time.sleep(60)\n"
    )
    folders = [tmp_path / "sweep" / str(k) for k in range(4)]
    jobs = [Job(own, str(k), folders[k]) for k, own in enumerate((["fails"], [], ["saves"], []))]

    def stop() -> None:
        wait_until(lambda: jobs[0].status == "failed" and all((folder / "up").exists() for folder in folders[1:3]))
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()
    with pytest.raises(Stopped) as stopped:
        Sweep(tmp_path / "sweep", script, [], slots=2).run(jobs)
    assert stopped.value.args == (number,)
    assert [job.status for job in jobs] == ["failed", "stopped", "stopped", "waiting"]
    assert jobs[0].error == "rank 0: Error: no luck."
    assert jobs[1].error == jobs[2].error == "stopped with the sweep; the same command goes on with it"
    summary = json.loads((tmp_path / "sweep" / "summary.json").read_text())["jobs"]
    assert [job["status"] for job in summary] == [job.status for job in jobs]


def test_a_second_sweep_in_a_folder_is_refused(tmp_path):
    with (
        alone(tmp_path / ".lock", "Another sweep", "Wait."),
        pytest.raises(UserError, match="Another sweep is running"),
    ):
        Sweep(tmp_path, tmp_path / "job.py", []).run([Job([], "a", tmp_path / "0")])
    assert not (tmp_path / "0").exists()


SWEEPS = sorted(path.stem for path in (ROOT / "configs" / "sweep").glob("[!_]*.yaml"))


@pytest.mark.parametrize("name", [name for name in SWEEPS if not name.startswith("search")])
def test_shipped_sweeps_compose_into_different_jobs(name):
    cli.prepare()
    with hydra.initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        master = hydra.compose("train", [f"sweep={name}"], return_hydra_config=True)
        assert master.hydra.mode == RunMode.MULTIRUN
        assert Path(master.sweep_dir).name == name
        params = [f"{key}={value}" for key, value in master.hydra.sweeper.params.items()]
        parsed = OverridesParser.create().parse_overrides(params)
        (jobs,) = BasicSweeper.split_arguments(parsed, None)
        keys = {job_hash(hydra.compose("train", [f"sweep={name}", *job])) for job in jobs[::5]}
    assert len(keys) == len(jobs[::5]) > 1


# The real thing


@pytest.mark.ddp
@pytest.mark.slow
def test_one_of_four_jobs_fails_on_rank_1_and_one_is_killed(tmp_path, pictures):
    """Jobs of one process are spared by faults.py; of those of two, one fails and one is killed, on rank 1 only."""
    settings = [*SMALL, f"data.root={pictures}", "peft=full", "max_steps=4", "optimizer.lr=1e-3", "name=four"]
    settings += ["trainer=ddp", "trainer.accelerator=cpu", "launcher.slots=3", f"paths.log_dir={tmp_path}"]
    swept = ["trainer.devices=1,2", "data.pictures._target_=faults.FailsOnRank1,faults.Killed"]
    sweep = tmp_path / "train" / "multiruns" / "four"

    def start(faults: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        env = os.environ | {"PYTHONPATH": "tests/support", "OMP_NUM_THREADS": "1", "FAULTS": faults}
        done = forked.run(tmp_path, "src/train.py", "-m", *settings, *swept, env=env)
        return done, [job["status"] for job in json.loads((sweep / "summary.json").read_text())["jobs"]]

    first, status = start(faults="1")
    assert status == ["finished", "finished", "failed", "killed"], first.stdout + (sweep / "summary.json").read_text()
    assert first.returncode == 1
    assert "2 of 4 jobs have no result" in first.stderr
    assert "Traceback" not in first.stderr
    assert "the disk of rank 1 is gone" in (sweep / "summary.json").read_text()
    results = [json.loads((sweep / str(k) / "result.json").read_text()) for k in range(4)]
    assert [result["status"] for result in results] == status
    assert not processes(str(sweep))

    second, status = start(faults="0")
    assert second.returncode == 0, second.stdout + second.stderr
    assert status == ["skipped", "skipped", "finished", "finished"]
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == ["0", "1", "2", "3"]
    one, *others = (load_file(sweep / str(k) / "network.safetensors") for k in range(4))
    for other in others:
        for name, value in one.items():
            if not name.endswith("qkv.bias"):  # see test_ddp.py
                assert_close(other[name], value, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_sweep_over_experiments_below_one_folder_and_its_metrics_later(tmp_path):
    """Two public datasets share data.root; then other devices start nothing again, and metrics come by evaluate.py."""
    for name in ("cub", "flowers102"):
        MINIATURES[name](tmp_path / "data")
    settings = [
        *("network=tiny", "pretrained=null", "peft=full", "classes=null", "batch_size=4", "max_steps=2"),
        *(
            "network.learn_sigma=true",
            "autoencoder=none",
            "data.latents=false",
            "data.resolution=16",
            "data.num_workers=0",
        ),
        *("trainer=cpu", "trainer.precision=32-true", "sampler.steps=2", "sampler.batch_size=2"),
        *("callbacks.samples.n=2", "metrics=efflite0", "metrics.n=0"),
        *(f"data.root={tmp_path}/data", f"paths.log_dir={tmp_path}/logs", f"paths.cache_dir={tmp_path}/cache"),
    ]
    sweep = tmp_path / "logs" / "train" / "multiruns" / "difffit_cub+difffit_flowers102"

    def start(*command: str) -> str:
        done = forked.run(tmp_path, *command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        start.code = done.returncode
        return done.stdout + done.stderr

    train = ["src/train.py", "-m", "experiment=difffit_flowers102,difffit_cub", *settings]
    shown = start(*train)
    assert start.code == 0, shown
    for number, name in (("0", "flowers102"), ("1", "cub")):
        cfg = OmegaConf.load(sweep / number / "config.yaml")
        assert (cfg.name, cfg.sweep_name) == (f"difffit_{name}", sweep.name)
        assert cfg.data.prepared == f"{tmp_path}/data/prepared/{name}"
    again = start(*train, "trainer.devices=2", "data.num_workers=1", "callbacks.checkpoint.every_n_steps=7")
    assert start.code == 0, again
    assert again.count("skipped") == 2

    evaluate = ["src/evaluate.py", f"sweep='{sweep}'"]
    shown = start(*evaluate, "metrics.n=4")
    assert start.code == 1  # flowers102 has too few images here
    assert "1 of 2 runs have the metrics" in shown
    assert json.loads((sweep / "1" / "result.json").read_text())["metrics"]["protocol"]["n"] == 4


def test_runs_without_a_number_of_images_are_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="There are no runs in"):
        evaluate_sweep(task("evaluate", f"runs={tmp_path}"))
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "result.json").write_text('{"status": "finished", "metrics": {}}')
    (tmp_path / "0" / "config.yaml").write_text("metrics: {n: 0}")
    with pytest.raises(UserError, match=r"1 runs were trained with metrics\.n=0.* Set metrics\.n=10000"):
        evaluate_sweep(task("evaluate", f"runs={tmp_path}"))


def test_runs_with_metrics_are_due_for_another_guide():
    own = task("evaluate", "runs=a")
    asked = [
        asked_for(task("evaluate", "runs=a", *given))
        for given in (
            ["guide=base"],
            ["guide=interpolated"],
            ["guide=interpolated", "guide_strength=0.3"],
            ["guidance=2"],
            ["strength=0.5"],
            ["metrics_of=this"],
            ["metrics_of=this", "guide=base"],
        )
    ]
    assert asked_for(own) is None
    assert None not in asked
    assert len(set(asked)) == len(asked)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_shows_its_table(tmp_path, pictures):
    settings = [*SMALL, f"data.root={pictures}", "peft=full", "seed=0,1", "max_steps=100000", "launcher.slots=1"]
    command = [sys.executable, "src/train.py", "-m", *settings, f"sweep_dir={tmp_path}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    sweep = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert wait_until(lambda: (tmp_path / "0" / "metrics.csv").exists(), seconds=120)
    sweep.send_signal(signal.SIGTERM)
    shown, errors = sweep.communicate(timeout=150)
    assert sweep.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    for text in ("0 of 2 jobs have a result", "stopped", "waiting"):
        assert text in shown
    assert json.loads((tmp_path / "0" / "result.json").read_text())["status"] == "stopped"


def test_a_sweep_is_stopped_while_its_jobs_are_composed(capsys):
    assert is_sweep(["sweep=emoji_table"])
    assert not is_sweep(
        ["sweep=emoji_table", "peft=full", "hydra.mode=RUN"]
    )  # one of its jobs, of which nothing is said
    with pytest.raises(SystemExit) as ended, cli.stoppable(sweep=True):
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "none has begun" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended, cli.stoppable(sweep=False):
        raise KeyboardInterrupt
    assert ended.value.code == 128 + signal.SIGINT


@pytest.mark.slow
def test_submitit_runs_the_same_sweep(tmp_path, pictures):
    """By its local executor, which starts the processes that Slurm would; one of two jobs has a wrong config."""
    settings = [*SMALL, f"data.root={pictures}", "peft=full", "name=two", f"paths.log_dir={tmp_path}", "resume=auto"]
    command = [sys.executable, "src/train.py", "-m", "hydra/launcher=submitit_local", *settings, "max_steps=2"]

    def start(*swept: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *swept], cwd=ROOT, capture_output=True, text=True, timeout=240)

    failed = start("batch_size=4,0")
    assert failed.returncode == 1
    assert "batch_size is 0, but must be a whole number of at least 1." in failed.stderr
    result = tmp_path / "train" / "multiruns" / "two" / "0" / "result.json"
    before = result.stat().st_mtime_ns
    assert json.loads(result.read_text())["status"] == "finished"
    again = start("batch_size=4,2")
    assert again.returncode == 0, again.stderr
    assert result.stat().st_mtime_ns == before  # not run again
    assert json.loads((result.parents[1] / "1" / "result.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_optuna_reads_the_objective_from_the_results(tmp_path, pictures):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="an extra: pip install hydra-optuna-sweeper")
    settings = [*SMALL, f"data.root={pictures}", "peft=full", "max_steps=2", f"paths.log_dir={tmp_path}"]
    search = ["sweep=search_lr", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2"]
    command = [sys.executable, "src/train.py", *search, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "train" / "multiruns" / "search_lr"
    found = OmegaConf.load(folder / "optimization_results.yaml")
    losses = [json.loads((folder / str(k) / "result.json").read_text())["denoising"]["after"] for k in range(2)]
    assert found.best_value == pytest.approx(min(losses))
    assert 1e-4 <= found.best_params["optimizer.lr"] <= 1e-2

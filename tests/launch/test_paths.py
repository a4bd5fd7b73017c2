"""Folders of any name, on any disk: runs, sweeps and evaluations in them, and what cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import forked
from ditune import cli
from ditune.cli import message
from ditune.commands.train import train
from ditune.config.grammar import between_quotes, hydra_value, literal, resolved
from ditune.config.instantiate import instantiate
from ditune.errors import UserError
from ditune.files.atomic import atomic, read_json, write_json
from ditune.files.locks import alone, attempt, locked
from ditune.launch.trees import last_error
from ditune.run import load_run
from helpers import ROOT, SMALL

ODD = """Größe (Lab), a=b [x] {y} $z #1 ~ & ! "q" it's 日本 \\"""
HARD = [
    *("a b", "Größe (Lab)", "[x]", "{a}", "a,b", "a=b", "it's", 'say "x"', "#1", "~x", "~", "&", "!", "$", "$HOME"),
    *(
        "${HOME}",
        "${a}/b",
        "\\${a}",
        "\\\\${a}",
        "a\\",
        "a\\\\",
        "a\\'b",
        "a\\\\'b",
        "'",
        "''",
        "'\\",
        "\\",
        "$$",
        "${",
    ),
    *("}", "${a", "日本語", "x" * 3000, "null", "1", "1e5", "true", "", ":", "a:b", "@", "?", "*", "%", "^", "|", ";"),
    *(
        "<>",
        "`",
        "\t",
        "a\nb",
        "${'a'}",
        '${"a"}',
        "a\\b${c}\\d",
        "a\\'${b}",
        "'${b}'\\",
        " lead",
        "trail ",
        "-",
        "--x",
    ),
    *("+a", "choice(1,2)", "range(1,3)", "${oc.env:HOME}", "\\n", "a\\ b", "/plain/path-1_2.x", ODD, "C:\\Users\\x"),
]


def read(value: str) -> object:
    """As a config holds what an override sets."""
    override = OverridesParser.create().parse_override(f"out={value}")
    assert not override.is_sweep_override()
    cfg = OmegaConf.create({"out": "other"})
    OmegaConf.update(cfg, "out", override.value())
    return cfg.out


@pytest.mark.parametrize("text", HARD)
def test_hydra_reads_every_value_as_it_is(text):
    assert read(hydra_value(text)) == text
    assert OmegaConf.create({"a": literal(text)}).a == text
    if "${" not in text:
        assert read(f'"{between_quotes(text)}"') == text  # as Lightning quotes the run folder


def test_ordinary_paths_stay_readable():
    assert hydra_value(Path("/data/runs/2026-11-27_train")) == "/data/runs/2026-11-27_train"


def test_a_dollar_in_a_path_is_no_reference(tmp_path):
    cfg = OmegaConf.create({"a": {"_target_": "builtins.dict", "path": "${b}/c"}, "b": literal("/x/${HOME}")})
    assert instantiate(cfg.a, "a") == {"path": "/x/${HOME}/c"}
    OmegaConf.save(resolved(cfg), tmp_path / "config.yaml")
    assert OmegaConf.load(tmp_path / "config.yaml").a.path == "/x/${HOME}/c"


@pytest.mark.parametrize("name", [ODD, "x" * 200])
def test_a_run_in_an_odd_folder(small, tmp_path, name):
    folder = tmp_path / name
    every = "callbacks.checkpoint.every_n_steps=1"
    assert train(small("peft=full", "max_steps=1", every, folder=folder)) == 0
    assert train(small("peft=full", "max_steps=2", every, "resume=auto", folder=folder)) == 0
    assert read_json(folder / "result.json")["steps"] == 2
    assert load_run(folder).folder == folder


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="/dev/shm is no file system of its own here")
def test_a_run_on_another_disk_than_the_temporary_folder(small, monkeypatch):
    folder = Path("/dev/shm") / f"ditune-{os.getpid()}"
    try:
        assert train(small("peft=full", "max_steps=1", "callbacks.checkpoint.every_n_steps=1", folder=folder)) == 0
        assert load_run(folder).network is not None
    finally:
        subprocess.run(["rm", "-r", str(folder)], check=True)


def start(script: str, *arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "src" / script), *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def fork(folder: Path, script: str, *arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """The same without the imports."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return forked.run(folder, f"src/{script}", *arguments, cwd=cwd, env=env)


@pytest.mark.slow
def test_a_sweep_in_an_odd_folder_plans_its_jobs(tmp_path, pictures):
    sweep = tmp_path / ODD
    settings = [*SMALL, f"data.root={pictures}", "peft=full", "seed=0", "dry_run=true"]
    done = fork(tmp_path, "train.py", "-m", *settings, f"sweep_dir={hydra_value(sweep)}")
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = read_json(sweep / "summary.json")["jobs"]
    assert [(job["status"], job["method"], job["data"]) for job in jobs] == [("planned", "full", "folder")]


@pytest.mark.ddp
@pytest.mark.slow
def test_ranks_and_evaluations_in_an_odd_folder(tmp_path, pictures):
    run = tmp_path / ODD
    settings = [*SMALL, f"data.root={pictures}", "peft=full", "max_steps=1", f"run_dir={hydra_value(run)}"]
    done = start("train.py", *settings, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    assert read_json(run / "result.json")["status"] == "finished"
    judged = ["metrics_of=this", "metrics.n=6", "processes=2", "threads=1", f"paths.cache_dir={tmp_path}/cache"]
    out = f"out={hydra_value(tmp_path / 'out (x)')}"
    done = fork(tmp_path, "evaluate.py", f"run={hydra_value(run)}", *judged, out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(run / "result.json")["other_protocols"]


@pytest.mark.slow
def test_home_is_expanded(tmp_path, pictures):
    settings = [*SMALL, f"data.root={pictures}", "peft=full", "dry_run=true"]
    done = fork(tmp_path, "train.py", *settings, "run_dir='~/runs/a'", cwd=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "a" / "config.yaml").is_file()
    assert not (tmp_path / "~").exists()


# Default folders


def default_folder(**env: str) -> str:
    cli.prepare()
    with hydra.initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        cfg = hydra.compose("train", return_hydra_config=True)
        assert cfg.run_dir == cfg.hydra.run.dir  # asked for twice, it is one and the same
        return cfg.run_dir


def test_no_two_starts_share_a_default_folder():
    folders = [default_folder() for _ in range(3)]
    assert len(set(folders)) == 3
    assert sorted(folders) == folders  # by time


@pytest.mark.parametrize(
    "env",
    [
        {"TORCHELASTIC_RUN_ID": "none"},
        {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_START_TIME": "1764000000"},
    ],
)
def test_ranks_that_others_start_share_one(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert default_folder() == default_folder()


# One process at a time

HOLDER = """
import sys, time
from pathlib import Path
from ditune.files.locks import alone
with alone(Path(sys.argv[1]) / ".lock", "x", "y"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_dies(small, tmp_path):
    folder = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"held\n"
    for overrides in ([], ["resume=auto"], ["dry_run=true"]):
        with pytest.raises(UserError, match=rf"{folder} \(process {first.pid} on .*run_dir="):
            train(small("peft=full", "max_steps=1", *overrides))
    assert [path.name for path in folder.iterdir()] == [".lock"]
    first.kill()
    first.wait()
    assert train(small("peft=full", "max_steps=1")) == 0


@pytest.mark.slow
def test_two_starts_in_one_folder_leave_one_whole_run(tmp_path, pictures):
    run = tmp_path / "twin"
    command = ["src/train.py", *SMALL, f"data.root={pictures}", "peft=full", "max_steps=20", f"run_dir={run}"]
    both = [forked.Forked(forked.script(*command, f"seed={k}"), tmp_path / f"{k}.log") for k in (0, 1)]
    codes = [process.wait() for process in both]
    errors = [process.err.read_text() for process in both]
    assert sorted(codes) == [0, 2], errors
    seed = codes.index(0)
    assert f"is running in {run} (process {both[seed].pid} on" in errors[1 - seed]
    assert read_json(run / "result.json")["seed"] == OmegaConf.load(run / "config.yaml").seed == seed
    assert OmegaConf.load(run / ".hydra" / "config.yaml").seed == seed


def test_locks(tmp_path):
    path = tmp_path / "x.lock"
    with locked(path), attempt(path) as mine:
        assert not mine
        mine_now = rf"Work is running in {tmp_path} \(process {os.getpid()} on"
        with pytest.raises(UserError, match=mine_now), alone(path, "Work", "Wait."):
            pass
    with attempt(path) as mine:
        child = os.fork()
        if child == 0:  # it holds nothing of its parent's
            os._exit(not all(link_of(fd) != str(path) for fd in range(3, 200)))
        assert mine
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with attempt(tmp_path / "gone" / "x.lock") as mine:
        assert not mine
    assert not (tmp_path / "gone").exists()


def link_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


# What cannot be written


@pytest.mark.parametrize(
    ("place", "cause"),
    [
        ("file/run", "a part of the path is a file"),
        ("x" * 300, "its name is longer"),
        ("/proc/x", "is denied"),
    ],
)
def test_a_run_folder_that_cannot_be_is_a_sentence(tmp_path, pictures, place, cause):
    (tmp_path / "file").write_text("")
    for key, more in (("run_dir", []), ("sweep_dir", ["-m", "seed=0,1"])):
        settings = [*SMALL, f"data.root={pictures}", "peft=full", f"{key}={tmp_path / place}"]
        done = fork(tmp_path, "train.py", *more, *settings)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        (line,) = filter(None, done.stderr.splitlines())
        assert line.startswith("Error: ")
        assert line.endswith(f"Choose another place for it by {key}=.")
        assert cause in line


def test_a_failed_write_names_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "in").mkdir(parents=True)
    for path in (tmp_path / "file" / "x.json", tmp_path / "folder", tmp_path / ("ü" * 200)):
        with pytest.raises(OSError, match="Errno") as caught:
            write_json(path, {})
        assert "cannot be used: " in message(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    write_json(tmp_path / ("x" * 250), {"a": 1})  # though a temporary file of a longer name could not be
    assert read_json(tmp_path / ("x" * 250)) == {"a": 1}


FULL = """
import resource, sys
import numpy as np, torch
from safetensors.torch import save_file
from ditune.checkpoints import atomic
from ditune.cli import message
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
big = torch.zeros(2**18)
writers = {
    "torch": lambda path: torch.save(big, path),
    "text": lambda path: path.write_text("x" * 2**20),
    "safetensors": lambda path: save_file({"a": big}, path),
    "numpy": lambda path: np.save(path.open("wb"), big.numpy()),
}
for name, write in writers.items():
    try:
        with atomic(f"{sys.argv[1]}/{name}") as temporary:
            write(temporary)
    except OSError as error:
        print(message(error))
"""


def test_whichever_library_fails_in_writing(tmp_path):
    """A limit of the system stops the files, as a full disk would."""
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for name, line in zip(("torch", "text", "safetensors", "numpy"), lines, strict=True):
        assert line.startswith(f"{tmp_path}/{name} cannot be used: the ")
    assert not list(tmp_path.iterdir())


def test_errors_of_the_program_are_not_called_the_disks(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic(tmp_path / "a"):
        (tmp_path / "missing").read_text()
    assert message(caught.value) is None
    with pytest.raises(ValueError, match="invalid"), atomic(tmp_path / "a"):
        int("x")
    assert message(OSError("no number")) is None


# What a job says last

HYDRA_END = "\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.\n"
TRACE = "Traceback (most recent call last):\n  File x\n"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (f"mismatched input '='\nSee https://hydra.cc/docs for details\n{HYDRA_END}", "mismatched input '='"),
        (
            f"Could not override 'a'.\nUse +a=1\n    full_key: a\n    object_type=dict\n{HYDRA_END}",
            "Could not override",
        ),
        (f"In 'train': Could not find 'peft/x'\n\nOptions:\n\ta\n\tpath=structured://\n{HYDRA_END}", "In 'train'"),
        (
            f"x\nError executing job with overrides: []\n{TRACE}RuntimeError: disk\nmore\n{HYDRA_END}",
            "RuntimeError: disk",
        ),
        ("\n".join(f"[rank1]: {line}" for line in f"{TRACE}a.Strange: oh".splitlines()), "a.Strange: oh"),
        (f"{TRACE}AssertionError\n", "AssertionError"),
        ("12:00 I step 1\n\nError: The config is wrong.\n", "Error: The config is wrong."),
        ("12:00 I step 1\n12:01 W the end\n", "12:01 W the end"),
        ("", "it wrote nothing"),
    ],
)
def test_the_reason_is_the_last_error(output, expected):
    assert last_error(output).startswith(expected)

"""The road of the papers' experiments, from bare archives to a report, by the functions of benchmarks/road.py."""

import json
import math
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import timm  # noqa: F401 - this and what follows is imported once, for all parts that are forked
from diffusers import AutoencoderKL, DDIMScheduler  # noqa: F401
from safetensors import safe_open

from ditune.commands import evaluate, export, prepare_trainings, sample, train  # noqa: F401
from ditune.report import write  # noqa: F401
from forked import Forked, script
from helpers import ROOT


def load_road() -> ModuleType:
    spec = spec_from_file_location("road", ROOT / "benchmarks" / "road.py")
    module = sys.modules["road"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


road = load_road()


def forked(name: str, *command: str, log: Path) -> road.Part:
    """Run a command in a forked process, which has the imports already; otherwise as `measured`."""
    start = time.perf_counter()
    process = Forked(script(*command), log)
    code = process.wait(600)
    seconds, cpu = time.perf_counter() - start, process.usage.ru_utime + process.usage.ru_stime
    return road.Part(name, seconds, cpu, process.usage.ru_maxrss * 1024 / 1e9, code)


def read(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_the_road_from_bare_archives_to_a_report(tmp_path: Path) -> None:
    parts, logs = [], {}
    for part in road.walk(tmp_path, "tiny", 64, run_part=forked):
        logs[part.name] = (tmp_path / f"{part.name}.log").read_text()
        assert part.code == 0, f"{part.name}:\n{logs[part.name][-3000:]}"
        parts.append(part)
    assert len(parts) == 11

    assert not (tmp_path / "nothing" / "data_dir").exists()  # the plan fetches nothing
    assert "CUB_200_2011.tgz: to be fetched" in logs["plan with nothing on disk"]
    assert (tmp_path / "data" / "cub" / "CUB_200_2011").is_dir()
    run = read(tmp_path / "run")
    assert (run["status"], run["steps"]) == ("finished", 3)
    assert "going on from step 2 of 3" in logs["resume by 1 step, evaluate"]
    assert list((tmp_path / "run" / "adapter").glob("*.safetensors"))
    assert math.isfinite(run["denoising"]["after"])
    assert (run["metrics"]["after"]["n"], math.isfinite(run["metrics"]["after"]["kid_efflite0"])) == (4, True)
    assert [found["after"]["n"] for found in run["other_protocols"].values()] == [5]
    assert len(list((tmp_path / "samples").rglob("grid.png"))) == 1
    for part in ("transformer", "vae"):
        weights = tmp_path / "export" / part / "diffusion_pytorch_model.safetensors"
        with safe_open(weights, "pt") as file:
            assert len(list(file.keys())) > 20
    results = [read(path.parent) for path in sorted((tmp_path / "sweep").glob("*/result.json"))]
    assert [(result["name"], result["status"]) for result in results] == [
        ("difffit_cub", "finished"),
        ("difffit_flowers102", "finished"),
    ]
    table = (tmp_path / "sweep" / "table.md").read_text(encoding="utf-8")
    for result in results:
        (found,) = result["other_protocols"].values()
        assert f"{found['after']['kid_efflite0']:.4f}" in table
    assert (tmp_path / "sweep" / "report.html").stat().st_size < 5_000_000
    assert road.table(parts).count("\n") == 13

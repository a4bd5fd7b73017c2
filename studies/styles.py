"""Single images of the runs of sweep=styles_table, and the small files that docs/ keeps of them.

`do=measure` adds measured.json and shown.png to each finished run. `do=keep` copies what is small into docs/,
`do=restore` copies it back into a sweep's folder, where the sweep knows these jobs as finished. `do=sheet` puts the
images together.
"""

import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from ditune.checkpoints import load_network
from ditune.cli import entry_point
from ditune.commands.prepare import held_out_images, held_out_source
from ditune.config.instantiate import instantiate, training_images
from ditune.config.keys import APART
from ditune.config.kinds import Key
from ditune.errors import UserError
from ditune.evaluation.denoising_loss import image_losses
from ditune.evaluation.image_arrays import ArrayImages
from ditune.files.atomic import read_json, write_json
from ditune.generation.generator import label_plan
from ditune.generation.grids import sheet, tiles
from ditune.launch.jobs import runs_of
from ditune.metrics.distances import kid_with_deviation
from ditune.report.gap_tables import MEASURED
from ditune.run import Run, load_run

log = logging.getLogger(__name__)

CONFIGS = str(Path(__file__).resolve().parent / "configs")
DO = ("measure", "keep", "restore", "sheet")
APART["styles"] = (
    Key("do", str, choices=DO),
    Key("folder", str),
    Key("kept", str),
    Key("apart", str),
    Key("base", str),
    Key("n", int, at_least=4),
    Key("shown", str, many=True),
)
SHARE_ALIKE = "emoji_openmoji"  # images of it and files with them stand apart
SMALL = 1_000_000  # bytes of an adapter that is kept
FEW = 10  # classes that a style must lack for their KID
IMAGES, SHOWN = "samples.npz", "shown.png"


def study(cfg: DictConfig) -> None:
    """Do what `do` says.

    Raises:
        UserError: a folder is missing or has no finished run.
    """
    {"measure": measure, "keep": keep, "restore": restore, "sheet": write_sheets}[cfg.do](cfg)


def finished(folder: Path) -> list[Path]:
    """The folders of the finished runs below a sweep's folder.

    Raises:
        UserError: there are none.
    """
    found = [run.folder for run in runs_of(folder) if run.finished]
    if not found:
        raise UserError(f"There is no finished run in {folder}. Give that of a sweep as folder=.")
    return found


def measure(cfg: DictConfig) -> None:
    """Losses of single held-out images, drift, forgotten classes and images to show, of the runs that lack them."""
    of_base: dict[str, float] = {}
    for folder in finished(Path(cfg.folder)):
        if (folder / MEASURED).is_file():
            continue
        if not (folder / "config.yaml").is_file():
            log.warning("%s was restored from docs/, which keeps no weights, so nothing of it can be measured", folder)
            continue
        log.info("measuring %s", folder)
        run, result = load_run(folder), read_json(folder / "result.json")
        base = load_network(run.base, run.network.config, **run.generator.process.network).eval()
        images = held_out_images(run.cfg)
        values = {"names": images.names, "losses": losses(run, images), "drift": drift(run, Path(cfg.base))}
        mean = sum(values["losses"]) / len(values["losses"])
        if not math.isclose(mean, result["denoising"]["after"], rel_tol=1e-5):
            raise UserError(f"The run {folder} has the loss {result['denoising']['after']}, and here it is {mean}.")
        if (lost := forgotten(run, base, cfg.n, of_base)) is not None:
            values["forgotten"] = lost
        labels = torch.tensor([run.class_names.index(name) for name in cfg.shown])
        for network, name in ((base, f"base_{SHOWN}"), (run.network, SHOWN)):
            strip(run.generator.generate(network, labels, run.cfg.metrics.seed)).save(folder / name)
        write_json(folder / MEASURED, values)


def losses(run: Run, images) -> list[float]:
    """The loss of each held-out image: the mean over its noise levels, which are the same for every run."""
    objective = instantiate(run.cfg.objective, "objective")
    objective.process = run.generator.process
    source = held_out_source(run.cfg, images, run.generator.autoencoder)
    return image_losses(run.network, objective, source, run.cfg.metrics.seed, run.generator.bf16).mean(0).tolist()


def drift(run: Run, base: Path) -> dict[str, float]:
    """Cosine distance between the features of the run's images and of the base's from the same noise and classes."""
    suite = instantiate(run.cfg.metrics.judge, "metrics")
    paths = (run.folder / IMAGES, base / run.cfg.data.name / IMAGES)
    classes = [np.load(path, allow_pickle=False)["arr_1"] for path in paths]
    if not np.array_equal(*classes):
        raise UserError(f"{paths[0]} and {paths[1]} are images of other classes. Generate them by one protocol.")
    x, y = (suite.features(ArrayImages(path))[:, suite.extractor.columns["features"]] for path in paths)
    distances = 1 - torch.nn.functional.cosine_similarity(x.double(), y.double())
    return {"mean": distances.mean().item(), "error": (distances.std() / len(distances) ** 0.5).item()}


def forgotten(run: Run, base: torch.nn.Module, n: int, of_base: dict[str, float]) -> dict[str, float] | None:
    """KID of classes that the style lacks to the base's domain, before and after; None if it lacks few.

    Args:
        run: a finished run.
        base: the network before its training.
        n: images of each of the two.
        of_base: KID of the base by style and sampler, filled here: runs of one style share it.
    """
    trained = set(training_images(run.cfg).labels.tolist())
    reference = instantiate(run.cfg.metrics.base_reference, "metrics")
    rows = [i for i, label in enumerate(reference.labels.tolist()) if label not in trained]
    lacking = reference.labels[rows].unique()
    if len(lacking) < FEW:
        return None
    suite = instantiate(run.cfg.metrics.judge, "metrics")
    columns, seed = suite.extractor.columns["features"], run.cfg.metrics.seed
    real = suite.reference(reference)[rows][:, columns]
    labels = label_plan(reference.labels[rows], seed, n)

    def kid(network: torch.nn.Module) -> tuple[float, float]:
        images = run.generator.generate(network, labels, seed, fixed_batch=True)
        return kid_with_deviation(suite.features(images)[:, columns], real)

    same = f"{run.cfg.data.name} {run.cfg.sampler} {seed} {run.generator.bf16}"
    if same not in of_base:
        of_base[same], _ = kid(base)
    after, error = kid(run.network)
    return {"classes": len(lacking), "n": n, "before": of_base[same], "after": after, "error": error}


def strip(images: Tensor) -> Image.Image:
    """Images (N, 3, H, W) uint8 side by side, as they are."""
    return Image.fromarray(torch.cat(list(images), dim=2).permute(1, 2, 0).numpy())


def keep(cfg: DictConfig) -> None:
    """Copy the small files of finished runs to where git keeps them."""
    for folder in finished(Path(cfg.folder)):
        result = read_json(folder / "result.json")
        target = Path(cfg.apart if result["data"]["name"] == SHARE_ALIKE else cfg.kept) / name_of(result)
        if (target / "result.json").is_file():
            if read_json(target / "result.json")["job_identity"] != result["job_identity"]:
                raise UserError(f"{target} holds another job than {folder}. Move it away, or give another kept=.")
            if (target / MEASURED).is_file() or not (folder / MEASURED).is_file():
                continue
        target.mkdir(parents=True, exist_ok=True)
        for name in ("result.json", MEASURED, SHOWN, f"base_{SHOWN}"):
            if (folder / name).is_file():
                shutil.copy(folder / name, target / name)
        adapter = folder / "adapter"
        if adapter.is_dir() and sum(path.stat().st_size for path in adapter.iterdir()) <= SMALL:
            shutil.copytree(adapter, target / "adapter", dirs_exist_ok=True)
        log.info("kept %s", target)


def name_of(result: dict) -> str:
    """A folder's name of a job of the table."""
    return f"{result['peft']['name']}_{result['data']['name'].removeprefix('emoji_')}_{result['seed']}"


def restore(cfg: DictConfig) -> None:
    """Copy kept runs into the sweep's folder, but for jobs that it has."""
    sweep = Path(cfg.folder)
    there = {run.identity for run in runs_of(sweep)} if sweep.is_dir() else set()
    for folder in kept_runs(cfg):
        if read_json(folder / "result.json")["job_identity"] not in there:
            shutil.copytree(folder, sweep / folder.name)
            log.info("restored %s", sweep / folder.name)


def kept_runs(cfg: DictConfig) -> Iterator[Path]:
    """The folders of the kept runs."""
    for place in (cfg.kept, cfg.apart):
        yield from sorted(path.parent for path in Path(place).glob("*/result.json"))


def write_sheets(cfg: DictConfig) -> None:
    """sheet.png: one noise and one class in each row, the base and each style in the columns, by DiffFit.

    The share-alike style stands in a file of its own, with a column for each method.
    """
    runs = [(read_json(path / "result.json"), path) for path in kept_runs(cfg) if (path / SHOWN).is_file()]
    runs = [(result, path) for result, path in runs if result["seed"] == 0]
    columns = {r["data"]["name"]: path for r, path in runs if r["peft"]["name"] == "difffit"}
    columns.pop(SHARE_ALIKE, None)
    own = {r["peft"]["name"]: path for r, path in runs if r["data"]["name"] == SHARE_ALIKE}
    for place, found in ((Path(cfg.kept).parent, columns), (Path(cfg.apart), own)):
        if found:
            put_together(found, list(cfg.shown)).save(place / "sheet.png")
            log.info("%s", place / "sheet.png")


def put_together(columns: dict[str, Path], classes: list[str]) -> Image.Image:
    """A sheet whose first column is the base."""
    first = next(iter(columns.values()))
    strips = {"base": first / f"base_{SHOWN}"} | {name: path / SHOWN for name, path in columns.items()}
    rows: list[list[tuple[Image.Image, str]]] = [[] for _ in classes]
    for name, path in strips.items():
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        for row, tile in zip(rows, tiles(torch.stack(pixels.split(pixels.shape[1], dim=2))), strict=True):
            row.append((tile, name.removeprefix("emoji_")))
    return sheet(rows, pad=6, captions=classes)


@entry_point("styles", CONFIGS)
def main(cfg: DictConfig) -> None:
    study(cfg)


if __name__ == "__main__":
    main()

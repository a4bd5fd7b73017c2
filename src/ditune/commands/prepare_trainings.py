"""`python src/prepare.py experiment=...` or `sweep=...`: everything that trainings need, on a node with a network."""

import logging

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from ditune.commands import prepare as stages
from ditune.config.hardware import device_of
from ditune.config.instantiate import instantiate, refuse_missing, training_images
from ditune.config.keys import check
from ditune.config.needs import each_once, needs_of, parts_of_a_training
from ditune.config.trainings import compose, jobs
from ditune.distributed import best_device
from ditune.errors import UserError
from ditune.files.needs import Need, describe_needs, fetch_all, refuse, with_reasons
from ditune.progress import meter

log = logging.getLogger(__name__)

OWN = ("stages", "again", "download", "policy")  # keys of src/prepare.py alone


def prepare_trainings(cfg: DictConfig) -> None:
    """Fetch, verify, encode and measure what the trainings of a config of src/prepare.py need, each thing once.

    Raises:
        UserError: something is missing, broken or cannot be written; all that cannot be fetched is listed.
    """
    stages.check_stages(cfg)
    trainings = configs(cfg)
    for training in trainings:
        check(training)
        refuse_missing(training)
    needs = each_once(need for t in trainings for need in needs_of(t, parts_of_a_training(t)))
    describe_needs(needs)
    if "fetch" in cfg.stages:
        fetch(needs, trainings, cfg.download)
    for training in once(trainings, "data.prepared"):
        if "verify" in cfg.stages:
            stages.verify_pictures(training, cfg.policy, cfg.again)
    if "encode" in cfg.stages:
        encode(trainings, cfg.again)
    if "statistics" in cfg.stages:
        for training in once([t for t in trainings if t.metrics.n], "metrics.judge", "metrics.reference"):
            stages.statistics(training)
    say_devices(trainings)


def configs(cfg: DictConfig) -> list[DictConfig]:
    """The configs of the trainings: that of the command line, or those of the sweep's jobs."""
    if not HydraConfig.initialized():
        return [cfg]
    chosen = HydraConfig.get()
    overrides = [
        o for o in OmegaConf.to_container(chosen.overrides.task) if o.lstrip("+~").partition("=")[0] not in OWN
    ]
    found = jobs(chosen.sweeper.get("params"), overrides)
    with meter("reading configs", len(found), "jobs") as progress:
        trainings = []
        for job in found:
            training = compose(job)
            with open_dict(training):
                training.paths.output_dir = ""  # of a run, which there is none of
            trainings.append(training)
            progress.advance()
    return trainings


def fetch(needs: list[Need], trainings: list[DictConfig], download: bool) -> None:
    """Bring what is missing.

    Raises:
        UserError: something cannot be fetched, or may not be; all of it is listed.
    """
    absent = sum(not need.present for need in needs)
    if absent and not download:
        raise UserError(
            f"{absent} of the files above are missing, and download=false fetches nothing. "
            "Leave it out where there is a network."
        )
    needs = with_reasons(needs)
    refuse([str(need) for need in needs if need.lost], stages.NOT_ALL)
    fetch_all(needs)
    for training in once(trainings, "data.prepared"):
        stages.fetch(training, download)


def encode(trainings: list[DictConfig], again: bool) -> None:
    """The latents of all trainings that read them."""
    cached = [training for training in trainings if training.data.latents]
    for training in once(cached, "data.pictures", "data.fraction", "data.subset", "data.prepared", "autoencoder"):
        autoencoder = instantiate(training.autoencoder, "autoencoder")
        stages.encode(training, training_images(training), autoencoder, best_device(), again)


def once(trainings: list[DictConfig], *keys: str) -> list[DictConfig]:
    """The first of all trainings that are equal in these keys."""
    found = {repr([OmegaConf.select(t, key) for key in keys]): t for t in reversed(trainings)}
    return list(found.values())[::-1]


def say_devices(trainings: list[DictConfig]) -> None:
    """Say if this machine is not the one to train on."""
    for training in once(trainings, "trainer.accelerator"):
        try:
            device_of(training.trainer.accelerator)
        except UserError as error:
            log.info("everything is here; train where there is a GPU (%s)", error)

"""Before a training: what is missing, whether it can be had, and whether all of it fits; then it is fetched.

Everything that costs nothing is looked at before the first byte is fetched, and all that is wrong is said at once.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from ditune.commands.prepare import ensure
from ditune.config import disk
from ditune.config.components import build_generator
from ditune.config.hardware import BF16, device_of, settle
from ditune.config.needs import needs_of, parts_of_a_training, without_secrets
from ditune.config.outline import Outline, outline
from ditune.config.sharded import is_sharded
from ditune.config.training import build_outlook
from ditune.errors import UserError
from ditune.files.needs import Need, describe_needs, fetch_all, refuse, with_reasons, written
from ditune.progress import is_first_rank
from ditune.training.checkpoint_io import newest_checkpoint
from ditune.training.components import Processes
from ditune.training.plan import announce, expected_memory
from ditune.training.price import device_name, expected_pace, price
from ditune.training.resume import NEVER

log = logging.getLogger(__name__)


def preflight(cfg: DictConfig, folder: Path) -> bool:
    """Settle device and precision, and bring the files of a training, or say why it cannot start.

    Args:
        cfg: of the training; its trainer.precision is set.
        folder: of the run.

    Returns:
        Whether the training can be built. A dry run that lacks files or its device has shown its plan and is over.

    Raises:
        UserError: something is wrong or missing and cannot be fetched; all of it is listed.
    """
    problems = settled(cfg, folder)
    needs = needs_of(cfg, parts_of_a_training(cfg))
    complete = all(need.present for need in needs)
    if complete and not cfg.dry_run:
        refuse(problems, CANNOT)
        ensure(cfg)
        return True
    if cfg.dry_run:
        describe_needs(needs)
        return True if complete and not problems else plan_without_files(cfg, folder, needs, problems)
    needs = with_reasons(needs)
    problems += [str(need) for need in needs if need.lost]
    try:
        expected = outline(cfg, processes_of(cfg))
    except UserError as error:
        problems.append(str(error))
    refuse(problems, CANNOT)
    describe_needs(needs)
    if expected is not None:
        warn(cfg, expected, folder, needs)
    fetch_all(needs)
    ensure(cfg)
    return True


CANNOT = "This run cannot start"


def settled(cfg: DictConfig, folder: Path) -> list[str]:
    """Settle device and precision; what stands against them, as sentences. A plan goes on as for a GPU with bf16."""
    try:
        settle(cfg, None if cfg.resume == NEVER else newest_checkpoint(folder / "checkpoints"))
    except UserError as error:
        if cfg.trainer.precision == "auto":
            cfg.trainer.precision = BF16
        return [str(error)]
    return []


def plan_without_files(cfg: DictConfig, folder: Path, needs: Sequence[Need], problems: Sequence[str]) -> bool:
    """Show the plan of a dry run by what is published of the files that are missing.

    Raises:
        UserError: a file is missing that nothing is published of.
    """
    expected = outline(cfg, processes_of(cfg))
    if expected is None:
        refuse([str(need) for need in needs if need.lost] or [str(need) for need in needs if not need.present], CANNOT)
    if is_first_rank():
        for text in problems:
            log.warning("%s", text)
        spaces = disk.spaces(cfg, expected.components, folder, needs)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(without_secrets(cfg), folder / "config.yaml")
        config = OmegaConf.to_yaml(without_secrets(cfg), resolve=True) if cfg.verbose else None
        lines = {"device": f"{device_line(cfg)}, {cfg.trainer.precision}", "disk": disk.line(spaces)}
        lines["price"] = price_line(cfg, expected, folder)
        announce(expected.components, None, folder, config, lines, expected.per_sample)
        for text in disk.shortage(spaces):
            log.warning("%s", text)
    return False


def price_line(cfg: DictConfig, expected: Outline, folder: Path) -> str:
    """What the run will take, without its files; held-out images are not counted yet."""
    c = expected.components
    outlook = build_outlook(cfg, c, build_generator(cfg, c), None)
    outlook.evaluation_images = 2 * cfg.metrics.n // c.processes.world_size
    device = device_name(torch.device(device_of(cfg.trainer.accelerator))) if torch.cuda.is_available() else "unknown"
    found = price(expected_pace(c, outlook.calls, device), outlook, c.processes.world_size, cfg.price_per_hour)
    found.write(folder)
    return found.line()


def device_line(cfg: DictConfig) -> str:
    """The device of the config, as far as it is here."""
    try:
        return device_of(cfg.trainer.accelerator)
    except UserError:
        return f"{cfg.trainer.accelerator} (not on this machine; bf16 is assumed)"


def warn(cfg: DictConfig, expected: Outline, folder: Path, needs: Sequence[Need]) -> None:
    """Warn of a disk or a GPU that is too small, before anything is fetched."""
    if not is_first_rank():
        return
    spaces = disk.spaces(cfg, expected.components, folder, needs)
    log.info("disk: %s", disk.line(spaces))
    c = expected.components
    micro = cfg.batch_size // (c.processes.accumulate * c.processes.world_size)
    shape = c.autoencoder.latent_shape(cfg.data.resolution)
    given = {"per_sample": expected.per_sample, "shares": c.processes.shares}
    memory = expected_memory(c.network, c.objective, shape, micro, c.settings.bf16, **given)
    if c.sparsity is not None:
        memory["masks, dense copies"] = c.sparsity.memory(c.method.trainable(c.network)) / 2**20
    for text in [*disk.shortage(spaces), *too_little_memory(sum(memory.values()))]:
        log.warning("%s", text)


def too_little_memory(mib: float) -> list[str]:
    """A sentence if the GPU has less memory than a training is expected to need."""
    if not torch.cuda.is_available():
        return []
    there = torch.cuda.get_device_properties(0).total_memory
    if mib * 2**20 <= there:
        return []
    return [
        f"The training is expected to need {written(int(mib * 2**20))} of memory, and the GPU has {written(there)}. "
        "Lower batch_size, raise trainer.accumulate_grad_batches, or set gradient_checkpointing=true."
    ]


def processes_of(cfg: DictConfig) -> Processes:
    """How the training is spread, as far as the config says; "all devices" counts those that are here."""
    devices, accumulate = cfg.trainer.devices, cfg.trainer.accumulate_grad_batches
    if not isinstance(devices, int):
        devices = len(devices) if not isinstance(devices, str) else max(1, torch.cuda.device_count())
    elif devices < 0:
        devices = max(1, torch.cuda.device_count())
    world = devices * cfg.trainer.get("num_nodes", 1)
    shares = world if is_sharded(cfg) else 1
    return Processes(world, accumulate if isinstance(accumulate, int) else 1, starts_others=False, shares=shares)

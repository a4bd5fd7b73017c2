"""A network that is spread over the processes, for trainings that fill more than one device (`trainer=fsdp`).

torch's FSDP2 cuts every parameter along its first dimension, and with it gradient, optimizer state and EMA. A block's
parameters are whole for as long as it computes.
"""

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.optim import Optimizer

from ditune.distributed import local, spread_like, whole
from ditune.errors import CAUSES, UserError
from ditune.networks.unfilled import Uninitialised, skeleton
from ditune.networks.unread import Unread, unread_of
from ditune.training.callbacks.compare_ranks import compare
from ditune.training.checkpoint_io import size_of
from ditune.training.sharded_checkpoint import read, whole_or_not_there, write

if TYPE_CHECKING:
    from ditune.training.module import GenerativeModule


class Sharded(ModelParallelStrategy):
    """Lightning's strategy around `fully_shard`, with one dimension: every process has a share of everything.

    Args:
        timeout: without an answer of another process after which one ends.
    """

    def __init__(self, timeout: timedelta):
        super().__init__(timeout=timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def spread(self, module: "GenerativeModule") -> None:
        """Spread the network, which all processes have built alike, over them: block by block, then the rest.

        What has no values yet gets them now, each process its own rows.

        Args:
            module: of the training; its network's parameters become DTensors.

        Raises:
            RankError: the processes have other networks.
            UserError: a parameter has no dimension to cut, or a file cannot be read any more.
        """
        from torch.distributed.fsdp import fully_shard  # takes seconds to import

        network, mesh = module.network, self.device_mesh["data_parallel"]
        unread, network.unread = unread_of(network), None
        compare(module.trainer, common(module, unread))
        scalar = next((name for name, p in network.named_parameters() if not p.ndim), None)
        if scalar is not None:
            raise UserError(f"trainer=fsdp cuts parameters, and {scalar} is a single number. Set trainer=ddp.")
        self.skeleton = skeleton(network)
        for part in (*network.blocks, network):
            if unread is not None:
                unread.fill(map(local, part.parameters()), (mesh.get_local_rank(), mesh.size()))
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
            part.unshard()  # once outside of inference mode: what is made in it cannot be trained later
            part.reshard()
        if isinstance(unread, Uninitialised):
            compare(module.trainer, {"state of the random numbers": unread.generator.view(torch.int64)})

    @torch.no_grad()
    def put_together(self, module: "GenerativeModule", everywhere: bool) -> nn.Module:
        """The plain network of what is spread, after the training; all processes call it.

        Args:
            module: of the training; the state of its optimizer is given up, to make room.
            everywhere: whether every process gets it, on its device; else the first one alone does, on the CPU.

        Returns:
            The network; in other processes one without values.
        """
        for optimizer in self.optimizers:
            optimizer.state.clear()
        kept = everywhere or self.is_global_zero
        device = self.root_device if everywhere else torch.device("cpu")
        values = {}
        for name, value in module.network.state_dict().items():
            full = whole(value.detach())
            if kept:
                values[name] = full.to(device, copy=full is value)
        if kept:
            self.skeleton.load_state_dict(values, assign=True)
        return self.skeleton.to(device) if kept else self.skeleton

    # Lightning's own forms gather all, or execute pickles when they are read

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module says itself what is saved."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return ParallelStrategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Of a checkpoint in shares or, from one process or DDP, of a whole one."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            for number, parameter in zip(numbers, parameters, strict=True):
                state = saved["state"].get(number, {})
                moments = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}
                state.update({key: spread_like(value, parameter) for key, value in moments.items()})
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, each process its own share; `AtomicCheckpointIO` says which stay, and what if it is full.

        Args:
            checkpoint: its content.
            filepath: of the folder, the same in all processes.
            storage_options: another `on_full`.

        Raises:
            UserError: it cannot be written.
        """
        path, files = Path(filepath), self.checkpoint_io
        needed, code = size_of(checkpoint), None
        written = self.broadcast(needed <= shutil.disk_usage(existing(path.parent)).free)
        if written:
            try:
                with whole_or_not_there(path) as folder:
                    write(checkpoint, folder)
            except (OSError, CheckpointException) as error:
                code = failed_write(error)
                if code is None:
                    raise RuntimeError(f"{path} cannot be written: {error}") from error
                written = False
        if not written:
            files.refuse(path, needed, code, storage_options or files.on_full)
        self.barrier()
        if written and self.is_global_zero:
            files.retain(path)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Content of a checkpoint: each process reads its own share of a folder, and all of a file."""
        path = Path(checkpoint_path)
        if not path.is_dir():
            return self.checkpoint_io.load_checkpoint(path)
        content = read(path, self.device_mesh["data_parallel"])
        for name, value in (content["state_dict"] | content["ema"] | content["teacher"]).items():
            if not torch.isfinite(local(value)).all():
                raise UserError(f"The checkpoint {path} holds numbers that are not finite, in {name}. Delete it.")
        return content


def common(module: "GenerativeModule", unread: Unread | None) -> dict[str, Tensor]:
    """What all processes must have alike before the network is cut: what has values, and the file of what has none."""
    parameters = module.network.named_parameters()
    found = {name: p for name, p in parameters if unread is None or not unread.holds(p)}
    base = module.identity.get("base_sha256")
    if base is not None:
        found["hash of the pretrained file"] = torch.frombuffer(bytearray.fromhex(base), dtype=torch.int64)
    return found


def existing(folder: Path) -> Path:
    """The folder, or the nearest one around it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def failed_write(error: OSError | CheckpointException) -> int | None:
    """The system's number for why a process could not write; None = it is another mistake."""
    failures = [error] if isinstance(error, OSError) else [failure for failure, _ in error.failures.values()]
    return next((e.errno for e in failures if isinstance(e, OSError) and e.errno in CAUSES), None)

"""A trained network that a key of another config names: a run folder, or a network file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditune.checkpoints import locate, read_network
from ditune.files.atomic import sha256
from ditune.networks import DiT
from ditune.processes import GaussianProcess, build_process


@dataclass(frozen=True)
class Finished:
    """A trained network and what it says about itself.

    Args:
        network: in evaluation mode, with its adapter.
        sha256: of the file with what was trained.
        process: config of its process.
        facts: its autoencoder and class_names; None = a file of others, which does not say them.
    """

    network: DiT
    sha256: str
    process: dict[str, Any]
    facts: dict[str, Any] | None


def read_finished(checkpoint: str, cache_dir: str | Path, key: str, download: bool = True) -> Finished:
    """Read the network of a run folder, with its adapter, or of a network file.

    Args:
        checkpoint: the folder, the file, or the name of a published one.
        cache_dir: where published networks lie.
        key: that names it, for messages.
        download: whether a published one may be fetched.

    Raises:
        UserError: it is missing or damaged.
    """
    from ditune.run import load_run  # which builds samplers, and so needs this file

    folder = Path(checkpoint).expanduser()
    if folder.is_dir() and (folder / "config.yaml").is_file():
        run = load_run(folder)
        adapter, file = folder / "adapter" / "adapter_model.safetensors", folder / "network.safetensors"
        facts = {"autoencoder": run.generator.autoencoder.latent_fingerprint, "class_names": run.class_names}
        process = run.generator.process.config
        return Finished(run.network, sha256(adapter if adapter.is_file() else file), process, facts)
    path = locate(checkpoint, Path(cache_dir) / "networks", download=download)
    read = read_network(path, key=key)
    process = build_process(read.process) if read.process else GaussianProcess()
    facts = None if read.header is None else read.header["provenance"]
    return Finished(read.network.eval(), sha256(path), process.config, facts)

"""Messages for files that are given as networks and are none, or cannot be used directly."""

from ditune.checkpoints.inert import Inert
from ditune.checkpoints.source import KINDS, Source
from ditune.checkpoints.state_dicts import is_tensor
from ditune.checkpoints.weight_files import listed
from ditune.errors import UserError

OF_LIGHTNING = {"identity", "method", "state_dict"}  # keys that only checkpoints of our trainings have together


def refuse_ours(source: Source) -> None:
    """Refuse a run, an adapter or a training checkpoint of this project, and name the file to give instead.

    Raises:
        UserError: the source is one of these.
    """
    path = source.path
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (path / "config.yaml").is_file():
        network = path / "network.safetensors"
        instead = f"or {network}" if network.is_file() else f"or first `python src/export.py run={path} format=dit`"
        raise UserError(f"{path} is a run folder. Give run={path} to sample, evaluate or export it, {instead}.")
    if (folder / "adapter_config.json").is_file() and (path.is_dir() or path.stem == "adapter_model"):
        raise UserError(
            f"{path} is an adapter, which is no network without its base. Give run={folder.parent} to sample, evaluate "
            "or export it; `python src/export.py run=<run> format=dit` writes both as one network file."
        )
    if path.is_dir() and source.weights and "ditune" in Source(source.weights.files[0]).header:
        raise UserError(f"{path} is a folder that holds a network file. Give {source.weights.files[0]}.")
    if source.kind == "torch" and isinstance(source.content, dict) and source.content.keys() >= OF_LIGHTNING:
        run = path.parent.parent
        raise UserError(
            f"{path} is a checkpoint to resume a training from, not a network. Give run={run} to sample, evaluate or "
            f"export, {run}/network.safetensors, or resume by run_dir={run} resume=auto."
        )


def unknown(source: Source, known: list[str]) -> UserError:
    """The error for a file of no known kind, which says what the file is instead.

    Args:
        source: the file or folder.
        known: titles of the formats.
    """
    content, path = source.content, source.path
    message = f"{path} is of no kind that is known ({', '.join(known)}, and this project's own). "
    if path.is_dir() and not source.weights:
        return UserError(f"{message}It is a folder with {listed(path)}. A folder of diffusers has a config.json.")
    if source.kind not in ("torch", "torch legacy", "safetensors", "folder", "index"):
        return UserError(f"{message}It is {KINDS[source.kind]}. Give a .safetensors or .pt file.")
    if isinstance(content, dict) and any("transformer_blocks.0.norm1.emb" in str(key) for key in content):
        return UserError(f"{message}It is one file of diffusers' DiT. Give its folder, with the config.json in it.")
    executed = ""
    if source.strangers:
        names = ", ".join(sorted(source.strangers)[:5])
        executed = f" It holds more than tensors ({names}); nothing was executed."
    return UserError(
        f"{message}It is {KINDS[source.kind]} with {_contents(content)}.{executed} An official DiT file has "
        "x_embedder.proj.weight. Save the network's state_dict() in the code that made it."
    )


def _contents(content: object) -> str:
    if not isinstance(content, dict):
        kind = content.name if isinstance(content, Inert) else type(content).__name__
        return "one tensor" if is_tensor(content) else f"one object, {kind},"
    shown = [f"{key} {_value(value)}".strip() for key, value in list(content.items())[:6]]
    more = f" and {len(content) - 6} more" if len(content) > 6 else ""
    return f"the keys {', '.join(shown)}{more}" if shown else "no keys"


def _value(value: object) -> str:
    if is_tensor(value):
        return str(tuple(value.shape))
    if isinstance(value, Inert) and not isinstance(value, dict):
        return f"({value.name})"
    if isinstance(value, dict):
        return "{" + ", ".join(str(key) for key in list(value)[:3]) + (", ...}" if len(value) > 3 else "}")
    return ""

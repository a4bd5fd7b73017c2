"""Which files of a folder hold its weights, by the names that diffusers and transformers give them.

`<stem>.safetensors`, or several with an index `<stem>.safetensors.index.json`; a variant (fp16, ema) stands before the
last ending, or elsewhere in older indices. `.bin` files are torch's.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ditune.errors import UserError

SINGLE = re.compile(r"(?P<stem>[\w-]+)\.(?:(?P<variant>[\w-]+)\.)?(?P<kind>safetensors|bin)")
INDEX = re.compile(
    r"(?P<stem>[\w-]+)\.(?:(?P<older>[\w-]+)\.)?(?P<kind>safetensors|bin)"
    r"\.(?:(?P<old>(?!index)[\w-]+)\.)?index\.(?:(?P<variant>[\w-]+)\.)?json"
)
SHARD = re.compile(r".*-\d+-of-\d+(\.[\w-]+)?\.(safetensors|bin)")
VARIANTS = ("fp32", "bf16", "fp16")  # the more exact ones first; then others by name


@dataclass(frozen=True)
class Weights:
    """The files of one network.

    Args:
        files: in the order of their names.
        variant: such as "fp16"; None = the plain files.
        is_safetensors: whether they are safetensors; else they are torch files.
    """

    files: tuple[Path, ...]
    variant: str | None
    is_safetensors: bool


def find_weights(folder: Path, stem: str | None = None) -> Weights | None:
    """Find the weights in a folder. Plain files are preferred to variants, safetensors to torch files.

    Args:
        folder: that holds them.
        stem: beginning of their names; None = any.

    Returns:
        The files; None if there are none.

    Raises:
        UserError: an index names files that are missing, or no rule chooses between several networks.
    """
    choices = []
    for path in folder.iterdir():
        for pattern, is_index in ((INDEX, True), (SINGLE, False)):
            name = pattern.fullmatch(path.name)
            if name and stem in (None, name["stem"]) and not SHARD.fullmatch(path.name):
                variant = name["variant"] or (is_index and (name["older"] or name["old"])) or None
                choices.append((_rank(variant), name["kind"] == "bin", not is_index, path.name, variant))
    if not choices:
        return None
    best = min(choices)
    _, is_bin, is_single, name, variant = best
    equal = [choice[3] for choice in sorted(choices) if choice[:3] == best[:3]]
    if len(equal) > 1:
        raise UserError(f"{folder} holds several networks: {', '.join(equal)}. Give one of these files.")
    files = (folder / name,) if is_single else read_index(folder / name)
    return Weights(files, variant, not is_bin)


def read_index(path: Path) -> tuple[Path, ...]:
    """The files that an index names, in the folder of the index.

    Raises:
        UserError: the index is damaged, or a file is missing.
    """
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        files = tuple(path.parent / Path(name).name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The index {path} is damaged ({error}). Copy or fetch it again.") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(f"{path} names {', '.join(missing) or 'no files'}, and they are not there. Fetch them too.")
    return files


def listed(folder: Path) -> str:
    """Names of what a folder holds, for messages."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"


def _rank(variant: str | None) -> tuple[int, str]:
    if variant is None:
        return 0, ""
    return 1 + (VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)), variant

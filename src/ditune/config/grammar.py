"""Values on Hydra's command line and in configs, written so that they are read as they are."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf


def literal(value: Any) -> Any:
    """`value`, and all in it, as OmegaConf reads it back as it is: `${` in a text, such as a path, is no reference."""
    if isinstance(value, dict):
        return {key: literal(part) for key, part in value.items()}
    if isinstance(value, list):
        return [literal(part) for part in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def resolved(cfg: DictConfig) -> DictConfig:
    """The config with no reference left in it, and the same values."""
    return OmegaConf.create(literal(OmegaConf.to_container(cfg, resolve=True)))


def hydra_value(text: object) -> str:
    """`text`, such as a path, as the value of an override: `f"run_dir={hydra_value(folder)}"`.

    Hydra's grammar has a meaning for spaces, brackets, commas, quotes and many other characters, and knows no letters
    beyond ASCII. Between quotes it takes all of them, but for backslashes before a quote.
    """
    if re.fullmatch(r"/[A-Za-z0-9_./-]*", str(text)):
        return str(text)  # an ordinary path is easier to read, and to copy, as it is
    return "'" + _escaped(literal(str(text)), "'") + "'"


def _escaped(text: str, quote: str) -> str:
    """Backslashes before a quote are doubled, and so are those at the end, where the closing quote follows."""
    return re.sub(rf"(\\*)({quote}|$)", lambda match: 2 * match[1] + (f"\\{quote}" if match[2] else ""), text)


def between_quotes(text: str) -> str:
    """What to put where somebody else adds double quotes, and nothing more."""
    return _escaped(text, '"')

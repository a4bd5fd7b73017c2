"""Values on Hydra's command line, written so that Hydra reads them as they are."""

import re


def literal(text: str) -> str:
    """`text` as a config value that OmegaConf reads back as it is: what looks like an interpolation is escaped."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def hydra_value(text: object) -> str:
    """`text`, such as a path, as the value of an override: `f"run_dir={hydra_value(folder)}"`.

    Hydra's grammar has a meaning for spaces, brackets, commas, quotes and many other characters, and knows no letters
    beyond ASCII. Between quotes it takes all of them, but for backslashes before a quote.
    """
    if re.fullmatch(r"/[A-Za-z0-9_./-]*", str(text)):
        return str(text)  # an ordinary path is easier to read, and to copy, as it is
    return "'" + re.sub(r"(\\*)('|$)", _escaped, literal(str(text))) + "'"


def _escaped(match: re.Match) -> str:
    backslashes, quote = match.groups()
    return 2 * backslashes + ("\\'" if quote else "")

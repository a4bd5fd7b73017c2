"""The model card of a run: what it is, its data, its figures with their protocol, how to load it, its limits.

Every figure comes from result.json. Texts of the run are escaped, since a run folder may be someone else's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ditune.metrics.names import headline

LIBRARY = "ditune"
TAGS = ("diffusion", "class-conditional-image-generation")


@dataclass(frozen=True)
class Facts:
    """What a card says besides the content of result.json.

    Args:
        repo: <user>/<name>.
        is_adapter: whether an adapter is published; else a whole network.
        autoencoder: of the latents, as autoencoder= is set to it.
        classes: number of classes.
        resolution: side of the images, in pixels.
        licence: of the weights, by the hub's names; None = not stated.
        data_licence: of the training images, as a sentence.
        grid: file name of the images; None = there are none.
    """

    repo: str
    is_adapter: bool
    autoencoder: str
    classes: int
    resolution: int
    licence: str | None
    data_licence: str
    grid: str | None


def card(result: Mapping[str, Any], facts: Facts) -> str:
    """The text of README.md.

    Args:
        result: content of the run's result.json.
        facts: the rest.
    """
    base = result.get("base") or {}
    title = plain(result.get("name") or facts.repo)
    kind = f"An adapter by {plain(result.get('method'))}" if facts.is_adapter else "A network trained from scratch"
    parameters = result.get("parameters") or {}
    data = result.get("data") or {}
    sections = [
        _front_matter(facts),
        f"# {title}",
        f"{kind} for class-conditional images of {facts.resolution} x {facts.resolution} pixels, {facts.classes} "
        "classes, made with DiTune.",
        *([f"![generated images]({facts.grid})"] if facts.grid else []),
        "## What it is",
        _rows(
            {
                "method": result.get("method"),
                "trained parameters": _share(parameters),
                "frozen weights, in training and figures": result.get("frozen_weights"),
                "base network": f"{base['file']}, SHA-256 {base['sha256']}" if base else "none: trained from scratch",
                "autoencoder": facts.autoencoder,
                "training images": f"{data.get('name')}, {number(data.get('n'))} images",
                "licence of the training images": facts.data_licence,
                "steps": result.get("steps"),
                "batch size": result.get("batch_size"),
                "learning rate": result.get("lr"),
                "precision": result.get("precision"),
                "seed": result.get("seed"),
                "versions": ", ".join(f"{k} {v}" for k, v in (result.get("versions") or {}).items()),
            }
        ),
        "## Figures",
        _figures(result),
        "## How to load it",
        _loading(facts, base, (result.get("metrics") or {}).get("protocol") or {}),
        "## Limits",
        "\n".join(f"- {text}" for text in _limits(result, facts)),
    ]
    return "\n\n".join(sections) + "\n"


def plain(value: object) -> str:
    """A value of a file as text that Markdown and HTML leave alone, on one line."""
    text = re.sub(r"\s+", " ", str(value)).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|#])", r"\\\1", text)


def word(value: object) -> str:
    """A name from a file for a command line: nothing in it that a shell would read."""
    return re.sub(r"[^\w.=-]", "_", str(value))


def number(value: object) -> str:
    """A figure with four significant digits; whole numbers with thousands' commas."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _front_matter(facts: Facts) -> str:
    values = {"library_name": LIBRARY, "tags": list(TAGS), "pipeline_tag": "unconditional-image-generation"}
    if facts.licence is not None:
        values["license"] = facts.licence
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _share(parameters: Mapping[str, Any]) -> str | None:
    if not parameters:
        return None
    return f"{number(parameters['trainable'])} of {number(parameters['total'])} ({parameters['share']:.2%})"


def _rows(values: Mapping[str, object]) -> str:
    known = [f"| {key} | {plain(value)} |" for key, value in values.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *known])


def _figures(result: Mapping[str, Any]) -> str:
    metrics, loss = result.get("metrics") or {}, result.get("denoising") or {}
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    names = [name for name in after if not name.startswith("n") or name.startswith("nearest")]
    rows = {"loss on held-out images": (loss.get("before"), loss.get("after"))} if loss else {}
    rows |= {name: (before.get(name), after[name]) for name in sorted(names, key=lambda n: not headline(n))}
    if not rows:
        return "The run was not evaluated."
    lines = ["| | before | after |", "|---|---|---|"]
    lines += [
        f"| {plain(name)} | {'' if old is None else number(old)} | {number(new)} |" for name, (old, new) in rows.items()
    ]
    protocol = metrics.get("protocol") or {}
    shown = {key: value for key, value in protocol.items() if not isinstance(value, Mapping)}
    shown |= {f"features: {key}": value for key, value in (protocol.get("features") or {}).items()}
    return "\n".join(lines) + ("\n\nProtocol:\n\n" + _rows(shown) if shown else "")


def _loading(facts: Facts, base: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    address = f"hf://{facts.repo}"
    source = f"checkpoint=<{word(base['file'])}> adapter={address}" if base else f"checkpoint={address}"
    keys = {"steps": protocol.get("steps"), "guidance": protocol.get("guidance")}
    settings = "".join(f" {key}={value}" for key, value in keys.items() if isinstance(value, int | float))
    command = (
        f"python src/sample.py {source} autoencoder={' '.join(map(word, facts.autoencoder.split()))} n=16{settings}"
    )
    needs = (
        f" The base network must have the SHA-256 above; its file is compared. `{address}@<commit>` pins a version."
        if base
        else f" `{address}@<commit>` pins a version."
    )
    return f"With a checkout of DiTune:\n\n```bash\n{command}\n```\n\nNo pickle is read.{needs}"


def _limits(result: Mapping[str, Any], facts: Facts) -> list[str]:
    n = ((result.get("metrics") or {}).get("protocol") or {}).get("n")
    limits = [
        "The figures are of one run with one seed. They say nothing about differences that another seed would make.",
        f"It generates the {facts.classes} classes of its training images, and nothing else. What is rare or one-sided "
        "in them is so in its images.",
        "Generated images can resemble training images closely; check them before use.",
    ]
    if n:
        limits.insert(
            1, f"Metrics of {number(n)} images cannot be compared with published ones of other numbers of images."
        )
    if facts.licence is None:
        limits.append("No licence of the weights is stated. Those of the base network and of the images apply.")
    return limits

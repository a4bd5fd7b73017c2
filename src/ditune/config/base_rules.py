"""Rules between a training and its base network, see rules.py."""

from collections.abc import Callable

from ditune.config.base_network import differences, other_latents
from ditune.processes import is_flow
from ditune.training.components import Components

Rule = Callable[[Components], str | None]


def classes_are_as_many(c: Components) -> str | None:
    """The label table has a row for each class of the data."""
    count = len(c.images.class_names)
    if c.base is None or c.network.num_classes == count:
        return None
    return (
        f"The base network {c.base.path.name} knows {c.network.num_classes} classes, the data has {count}. "
        "Give data with the base's classes (data.classes), adapt its label table (classes=reinit, reuse, mean or "
        "map), or train without a base (pretrained=null peft=full)."
    )


def flows_need_an_objective_of_flows(c: Components) -> str | None:
    """A diffusion's objective cannot go on from a flow."""
    if c.base is None or not is_flow(c.base.process) or is_flow(c.objective.process.config):
        return None
    return (
        f"The base network {c.base.path.name} was trained on a flow, the objective is for a diffusion. "
        "Choose an objective= of flows."
    )


def processes_are_equal(c: Components) -> str | None:
    """The objective goes on with the process that the base was trained on; it may add the step size."""
    ours = c.objective.process.config
    if c.base is None or c.base.process.get("kind") != ours.get("kind"):
        return None  # a diffusion that is read as a flow
    theirs = c.base.process
    if theirs.get("step") == "none":
        theirs = {key: value for key, value in theirs.items() if key not in ("step", "base_steps")}
    different = differences(theirs, ours)
    if not different:
        return None
    values = " ".join(f"objective.process.{k}={v}" for k, v in theirs.items() if v != ours.get(k) and k != "kind")
    return (
        f"The base network {c.base.path.name} was trained on another process: {different}. "
        f"Set objective.* as there: {values}."
    )


def latents_are_the_bases(c: Components) -> str | None:
    """The autoencoder encodes into the latents that the base was trained on."""
    if c.base is None or c.base.header is None:
        return None
    return other_latents(f"base network {c.base.path.name}", c.base.header["provenance"], c.autoencoder)


def class_names_are_the_bases(c: Components) -> str | None:
    """Where the label table stays, its rows mean the same classes."""
    if c.base is None or c.base.header is None or c.settings.classes is not None:
        return None
    if c.images.class_names == c.base.header["provenance"]["class_names"]:
        return None
    return (
        f"The classes of the data have other names than those of the base network {c.base.path.name}. "
        "Name the same classes in the same order (data.classes), or set classes=map."
    )


def shapes_are_the_bases(c: Components) -> str | None:
    """`network=` names the network that the file holds."""
    if c.base is None or not c.base.differences:
        return None
    decoupled = " Set objective.process.step_blocks as there." if "step_blocks" in c.base.differences else ""
    return (
        f"The base network {c.base.path.name} is another than network=: {c.base.differences}. Choose its network=, "
        f"or new_resolution=true where only input_size and pos_embed_scale differ.{decoupled}"
    )


def new_classes_are_trained(c: Components) -> str | None:
    """A new label table begins with values that only training makes right."""
    if c.settings.classes is None or (c.method.train_labels and c.base is not None):
        return None
    return "classes= makes a new label table of a pretrained one. Set pretrained= and peft.train_labels=true."


OF_THE_BASE: tuple[Rule, ...] = (
    classes_are_as_many,
    flows_need_an_objective_of_flows,
    processes_are_equal,
    latents_are_the_bases,
    class_names_are_the_bases,
    shapes_are_the_bases,
)
OF_THE_LABELS: tuple[Rule, ...] = (new_classes_are_trained,)

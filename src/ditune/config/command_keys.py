"""Values of the keys of entry points, of several and of one alone."""

from ditune.config.kinds import Key

SHARED_KEYS = (
    Key("run", str, null=True),
    Key("checkpoint", str, null=True),
    Key("adapter", str, null=True),
    Key("experts", str, many=True, null=True),
    Key("weights", float, many=True, null=True),
    Key("out", str, null=True),
    Key("n", int, at_least=1),
    Key("steps", int, at_least=1, null=True),
    Key("guidance", float, null=True),
    Key("guide", str, choices=("null_class", "base", "checkpoint", "interpolated"), null=True),
    Key("guide_checkpoint", str, null=True),
    Key("guide_strength", float),
    Key("strength", float, null=True),
    Key("adapters", str, many=True, null=True),
    Key("precision", str, choices=("auto", "bf16-mixed", "32-true")),
    Key("bf16", bool, null=True),
    Key("process", dict, null=True),  # a config of a process
    Key("process", str, null=True),  # its name
    Key("network_overrides.num_heads", int, at_least=1, null=True),
    Key("network_overrides.input_size", int, at_least=1, null=True),
    Key("network_overrides.pos_embed_scale", float, above=0, null=True),
    Key("network_overrides.num_classes", int, at_least=1, null=True),
    Key("network_overrides.top_k", int, at_least=1, null=True),
    Key("noise", float, at_least=0),
)

# of one entry point alone; they come before those above; the scripts of studies/ add their own
APART = {
    "sample": (
        Key("first", int, at_least=0),
        Key("class_name", str, null=True),
        Key("classes", str, many=True, null=True),
        Key("pairs", str, null=True),
    ),
    "evaluate": (
        Key("runs", str, null=True),
        Key("images", str, null=True),
        Key("npz", str, null=True),
        Key("metrics_of", str),
        Key("processes", int, at_least=1),
        Key("threads", int, at_least=1, null=True),
        Key("record", str, null=True),
    ),
    "prepare": (
        Key("stages", str, many=True),
        Key("again", bool),
        Key("download", bool),
        Key("policy", str, choices=("raise", "skip")),
    ),
    "report": (Key("sweep", str), Key("metric", str, null=True)),
    "export": (Key("format", str), Key("fill_zeros", bool)),
    "app": (
        Key("runs", str),
        Key("sweeps", str),
        Key("host", str),
        Key("port", int, at_least=0, at_most=65535),
    ),
    "publish": (
        Key("repo", str, null=True),
        Key("licence", str, null=True),
        Key("data_licence", str, null=True),
        Key("private", bool),
        Key("push", bool),
    ),
    "upcycle": (
        Key("num_experts", int, at_least=1),
        Key("top_k", int, at_least=1),
        Key("options.shared_ratio", float, at_least=0),
        Key("options.moe_every", int, at_least=1),
        Key("options.moe_from", float, at_least=0, at_most=1),
    ),
    "prune": (
        Key("depth", int, at_least=1, null=True),
        Key("pattern", str),
        Key("target", str, null=True),
        Key("scope", str, choices=("global", "layer")),
        Key("share", float, at_least=0, at_most=1),
    ),
    "federate": (
        Key("clients", int, at_least=1),
        Key("rounds", int, at_least=1),
        Key("participation", float, above=0, at_most=1),
        Key("share_by", str, choices=("random", "classes")),
        Key("merge", str, choices=("fedavg", "nnz", "majority")),
        Key("purge", str, choices=("global", "local")),
    ),
    "parameters": (
        Key("networks", str, many=True),
        Key("num_classes", int, at_least=1),
        Key("rows", str, many=True),
    ),
    "dashboard": (
        Key("entity", str),
        Key("project", str),
        Key("group", str, null=True),
        Key("metric", str),
        Key("spec", str, null=True),
    ),
}


APART["prepare_training"] = APART["prepare"]

"""The methods of huggingface peft, one row each, and what is to be known of each of peft's types."""

from typing import Any

QKV = r"blocks\.\d+\.attn\.qkv"
FC2 = r"blocks\.\d+\.mlp\.fc2"
# name: (peft's type, the arguments that make it this method)
HUGGINGFACE: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LORA", {}),
    "dora": ("LORA", {"use_dora": True}),
    "rslora": ("LORA", {"use_rslora": True}),
    "pissa": ("LORA", {"init_lora_weights": "pissa"}),
    "loha": ("LOHA", {}),
    "lokr": ("LOKR", {}),
    "ia3": ("IA3", {"target_modules": f"{QKV}|{FC2}", "feedforward_modules": FC2}),
    "vera": ("VERA", {}),
    "oft": ("OFT", {}),
    "boft": ("BOFT", {}),
    "hra": ("HRA", {}),
    "fourierft": ("FOURIERFT", {}),
    "shira": ("SHIRA", {}),
    "miss": ("MISS", {}),
    "glora": ("GLORA", {}),
    "deft": ("DEFT", {}),
    "road": ("ROAD", {}),
    "gralora": ("GRALORA", {}),
    "psoft": ("PSOFT", {}),
    "hira": ("HIRA", {}),
    "beft": ("BEFT", {}),
    "randlora": ("RANDLORA", {}),
    "waveft": ("WAVEFT", {}),
    "peanut": ("PEANUT", {}),
    "supertuning": ("SUPERTUNING", {}),
}
# What moves along the dial, by peft's type: of each product the factor that begins at zero. HRA's reflections do not
# become the identity along any path of their vectors, and the start of DEFT's projection is random and not in its
# files. A type that is missing here has no path either.
PATHS: dict[str, tuple[str, ...]] = {
    "LORA": ("lora_B.", "lora_magnitude_vector."),
    "ADALORA": ("lora_E.",),
    "LOHA": ("hada_w2_b.",),
    "LOKR": ("lokr_w1.", "lokr_w1_a."),
    "IA3": ("ia3_l.",),
    "VERA": ("vera_lambda_b.",),
    "OFT": ("oft_R.",),  # the generator of the rotation
    "BOFT": ("boft_R.", "boft_s."),
    "FOURIERFT": ("fourierft_spectrum.",),
    "SHIRA": ("shira_weight.",),
    "MISS": ("miss_block.",),
    "GLORA": (".Xd.", ".X."),  # the low-rank terms' factor that begins at zero, and the other terms
    "ROAD": ("road_theta.", "road_alpha."),  # angles and lengths
    "GRALORA": ("gralora_B.",),
    "PSOFT": ("psoft_R.",),  # the generator of the rotation, and its two scales
    "HIRA": ("hira_B.",),
    "BEFT": ("beft_bias.",),
    "RANDLORA": ("randlora_lambda.",),
    "WAVEFT": ("waveft_spectrum.",),
    "PEANUT": ("peanut_B.",),
    "SUPERTUNING": ("supertuning_values.", "supertuning_lora_B."),
}
ADDED = ("IA3", "FOURIERFT", "SHIRA", "MISS", "BEFT", "WAVEFT")  # by their parameters: the weights are linear in them
# What a file does not hold, by peft's type: the key that would save it, and why it need not.
REMADE = {
    "VERA": {"save_projection": "VeRA's random matrices are saved as their seed."},
    "RANDLORA": {"save_projection": "RandLoRA's random matrices are saved as their seed."},
    "SUPERTUNING": {"save_precomputed_indices": "Super-Tuning's entries are found again in the base."},
}
# Call the layers that they adapt and do not compute with their frozen weights, as HRA, SHiRA, GLoRA and HiRA do.
CALLS_LAYERS = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "VERA", "OFT", "BOFT", "FOURIERFT", "MISS", "DEFT", "ROAD")
CALLS_LAYERS += ("GRALORA", "PSOFT", "BEFT", "RANDLORA", "WAVEFT")
CHANGES_THE_BASE = ("pissa", "olora")  # initial values of LoRA that are subtracted from the base weight

"""Two ways to read a diffusion network as a flow, compared by the images of its probability-flow ODE in few steps.

python studies/bridges.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from ditune.checkpoints import load_network, read_header
from ditune.cli import prepare
from ditune.config.components import build_evaluation
from ditune.config.instantiate import instantiate
from ditune.config.trainings import compose
from ditune.generation.generator import ImageGenerator
from ditune.processes import DiffusionPath, FlowProcess
from ditune.samplers import Euler

STEPS, N = (1, 2, 4, 16), 128


def main() -> None:
    """KID of the pixel base by both bridges, without guidance and with the base's own."""
    prepare()
    cfg = compose(["experiment=difffit_pixels", "data=emoji_base", f"metrics.n={N}"])
    path = Path(cfg.pretrained)
    network, diffusion = load_network(path).eval(), read_header(path)["process"]
    autoencoder = instantiate(cfg.autoencoder, "autoencoder")
    suite, reference = instantiate(cfg.metrics.judge, "metrics"), instantiate(cfg.data.pictures, "data")
    bridges = {"aligned": FlowProcess(diffusion=diffusion), "own path": DiffusionPath(diffusion)}
    for steps in STEPS:
        for name, process in bridges.items():
            generator = ImageGenerator(process, autoencoder, cfg.data.resolution, Euler(), steps, bf16=False)
            evaluation = build_evaluation(cfg, generator, reference, suite=suite)
            sys.stdout.write(json.dumps({"bridge": name, "steps": steps, **evaluation(network)}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

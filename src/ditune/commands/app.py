"""The app: two tabs in a browser, by Gradio. What they show is computed in `side_by_side`."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL import Image

from ditune.commands.side_by_side import BASE, COLUMNS, Shelf, plot, sheet_of, sweeps, table
from ditune.errors import UserError
from ditune.files.atomic import read_json

log = logging.getLogger(__name__)

REQUIREMENT = "gradio>=6.20,<7"
STEPS, GUIDANCE = 25, 5.0  # of the main job, where a run does not say otherwise


def serve(cfg: DictConfig) -> None:
    """Open the app and keep it open until Ctrl-C.

    Raises:
        UserError: Gradio is missing.
    """
    build(cfg).launch(server_name=cfg.host, server_port=cfg.port or None, share=False)


def build(cfg: DictConfig) -> Any:  # gradio.Blocks
    """The app, not started yet.

    Raises:
        UserError: Gradio is missing.
    """
    if find_spec("gradio") is None:
        raise UserError(f'src/app.py needs the package gradio. Install it: pip install "{REQUIREMENT}"')
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere
    import gradio as gr

    shelf = Shelf(cfg)
    with gr.Blocks(title="DiTune") as app:
        with gr.Tab("Side by side"):
            _side_by_side(gr, shelf)
        with gr.Tab("Sweep"):
            _sweep(gr, Path(cfg.sweeps).expanduser())
    return app


def first_settings(shelf: Shelf, chosen: list[str]) -> tuple[int, float]:
    """Steps and guidance to begin with: those of the newest run's evaluation."""
    if len(chosen) < 2:
        return STEPS, GUIDANCE
    metrics = read_json(shelf.folder / chosen[1] / "result.json").get("metrics")
    protocol = metrics.get("protocol", {}) if isinstance(metrics, dict) else {}
    return int(protocol.get("steps", STEPS)), float(protocol.get("guidance", GUIDANCE))


def _side_by_side(gr: Any, shelf: Shelf) -> None:
    """The same noise and classes by each chosen network."""
    names = shelf.names()
    chosen = names[:2]  # the base and the newest run
    first_steps, first_guidance = first_settings(shelf, chosen)
    networks = gr.Dropdown(names, value=chosen, multiselect=True, label="Networks")
    classes = gr.Dropdown(
        shelf.classes([BASE]), value=[], multiselect=True, label="Classes (none = all, one after another)"
    )
    with gr.Row():
        n = gr.Slider(1, 64, value=9, step=1, label="Images")
        steps = gr.Slider(2, 250, value=first_steps, step=1, label="Steps")
        guidance = gr.Slider(1, 10, value=first_guidance, step=0.1, label="Guidance")
        strength = gr.Slider(0, 1.5, value=1, step=0.05, label="Strength")
        seed = gr.Number(0, precision=0, minimum=0, label="Seed of the noise")
    button = gr.Button("Generate", variant="primary")
    sheets = gr.Gallery(label="Images", columns=2, object_fit="contain", height=640, format="png")

    def generate(
        names: list[str], classes: list[str], n: int, steps: int, guidance: float, seed: int, strength: float
    ) -> Any:
        try:
            return shelf.generate(names, classes, n, seed, steps, guidance, strength)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    values = [networks, classes, n, steps, guidance, seed, strength]
    button.click(generate, values, sheets, api_name="generate")


def _sweep(gr: Any, folder: Path) -> None:
    """A sweep's runs as a table, metric over parameters, and the images of the run that is clicked."""
    names = sweeps(folder)
    chosen = gr.Dropdown(names, value=names[0] if names else None, label="Sweep")
    runs = gr.Dataframe(headers=list(COLUMNS), interactive=False, label="Click a row to see its images")
    with gr.Row():
        figure = gr.Plot(label="Metric over trained parameters", show_label=False)
        sheet = gr.Image(label="Images", type="pil", format="png")

    def show(name: str | None) -> tuple[list[list[Any]], Figure | None]:
        if name is None or name not in sweeps(folder):
            return [], None
        found, metric, rows = table(folder / name)
        return rows, plot(found, metric)

    def click(name: str, event: gr.SelectData) -> Image.Image | None:
        if name not in sweeps(folder):
            return None
        found, _, _ = table(folder / name)
        path = sheet_of(folder / name, found[event.index[0]])
        return None if path is None else Image.open(path)

    runs.select(click, chosen, sheet, api_name=False)
    gr.on(fn=show, inputs=chosen, outputs=[runs, figure], api_name="sweep")  # when the page opens, and at a change

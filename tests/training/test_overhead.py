"""What a trainer does around a step: as little as it can, and the same training."""

import sys

import torch

from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import trainer_overhead

from ditune.config.components import build_generator
from ditune.config.training import build_outlook, build_trainer
from ditune.progress import Meter
from ditune.stopping import listen
from ditune.training.callbacks import progress
from ditune.training.unprofiled import Unprofiled


def test_a_step_calls_only_callbacks_that_have_something_to_do(tmp_path):
    cfg = trainer_overhead.config(tmp_path, 2, 1)
    c, *_ = trainer_overhead.parts(cfg)
    generator = build_generator(cfg, c)
    with listen() as signals:
        trainer, *_ = build_trainer(cfg, c, generator, tmp_path, build_outlook(cfg, c, generator, None), signals)
    names = {type(callback).__name__ for callback in trainer.callbacks}
    assert {"StepClock", "TrainingProgress", "StopOnSignal", "Checkpoints"} <= names
    assert not names & {"RoutingMonitor", "CompareRanks"}  # of networks with experts, of several processes
    assert isinstance(trainer.profiler, Unprofiled)
    with trainer.profiler.profile("a hook"), trainer.profiler.profile("one inside of it"):
        pass


def test_the_note_is_made_when_it_can_be_read(tmp_path, monkeypatch):
    """Steps of the first estimate and the last one always have a note, others after `SHOWN_EVERY` seconds."""
    shown, update = [], Meter.update

    def noted(meter: Meter, done: int, note: str = "", **more) -> None:
        shown.append((done, note))
        update(meter, done, note, **more)

    monkeypatch.setattr(Meter, "update", noted)
    monkeypatch.setattr(progress, "SHOWN_EVERY", 3600.0)
    cfg = trainer_overhead.config(tmp_path, 30, 10)
    threads = torch.get_num_threads()
    trainer_overhead.trained(cfg, tmp_path / "run", default=True)
    torch.set_num_threads(threads)
    notes = [(step, note) for step, note in shown if note.startswith("loss")]
    assert [step for step, _ in notes] == [*range(1, 11), 30]
    assert all(float(note.split()[1].rstrip(",")) > 0 for _, note in notes)

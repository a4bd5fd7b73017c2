"""The time that a run will take: counted in forward passes, and in images once one has been timed."""

import logging

import pytest

from ditune.training.outlook import Outlook


@pytest.mark.parametrize(
    ("image_seconds", "line"),
    [
        (None, "training 40 s, sample sheets 1 s, validation 1 s, evaluation 2 s; in all 45 s"),
        (0.8, "training 40 s, sample sheets 13 s, validation 13 s, evaluation 24 s; in all 1 min 30 s"),
    ],
)
def test_the_time_that_is_left(caplog, image_seconds, line):
    """At 20 images/s a forward pass takes 0.4 / 20 s, and an image of 4 passes 0.08 s until one has been timed.

    Training: 80 steps of 10 images. Grids: at step 50 and at the end, 8 images each. Validation: 4 times 16 passes.
    Evaluation: 20 images and 40 passes.
    """
    caplog.set_level(logging.INFO)
    outlook = Outlook(
        max_steps=100,
        batch_size=10,
        calls=4,
        sheet_images=8,
        every_n_steps=50,
        held_out_calls=40,
        evaluation_images=20,
        checks=[(25, 16)],
        image_seconds=image_seconds,
    )
    outlook.say(20, 20.0)
    assert caplog.messages == [f"20 images/s; expected from here: {line}"]

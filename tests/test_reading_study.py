"""The study of readings: its figures, and groups as training draws them."""

from dataclasses import replace

import numpy as np
import pytest

import train_gen
from tiny import reading_study


def test_groups_are_drawn_as_training_draws_the_miniature_s():
    args = train_gen.parse_args([])
    settings = train_gen.sde_settings(args, 3.0, 0)
    drawing = replace(reading_study.DRAWING, branch=args.group, shift=3.0, trained=settings.trained)
    assert drawing == settings and args.group == reading_study.GROUP



def test_figures_of_a_reading_are_its_errors_ties_and_order_within_the_group():
    readings, truths = np.array([[6.0, 5], [6, 5], [5, 5]]), np.array([[7.0, 5], [6, 5], [5, 5]])
    found = reading_study.figures_of(readings, truths, (5.0, 5.0), 6.0)
    assert found == pytest.approx({"v_off": 1 / 3, "a_off": 0, "ties": 1 / 3, "order": 3 ** 0.5 / 2, "seconds": 2})

"""The demo's verdict follows from its figures, whichever way they fall."""

from __future__ import annotations

from jest_stream.demo.comparison import CurvePoint, clear_sign, compare, table, verdict
from jest_stream.demo.training import Recall

PAIRS = {"emoji": 1600}


def curve(*recalls, flops=1.0, seconds=1.0):
    """A test every 100 steps; `flops` and `seconds` per 100 steps."""
    return [
        CurvePoint(
            steps=100 * at,
            scored=1280 * 100 * at,
            trained=256 * 100 * at,
            flops=flops * at,
            seconds=seconds * at,
            accuracy={"emoji": Recall(recall / 4, recall)},
        )
        for at, recall in enumerate(recalls)
    ]


def test_equal_costs_are_the_last_tests_that_cost_no_more():
    uniform = curve(0, 1, 2, 3, 4)
    jest = curve(0, 3, 9, 14, 20, flops=2, seconds=3)
    rows = compare(uniform, jest)
    assert [row.steps for row in rows.values()] == [400, 400, 200, 100]


def test_a_clear_win_is_called_one_with_its_speed_up():
    _, judgement = verdict(curve(0, 1, 2, 3, 5), curve(0, 5, 10, 15, 20, flops=2), PAIRS)
    assert "Selection paid at equal steps, FLOPs and wall time" in judgement
    assert "R@5 20.0 against 5.0 %" in judgement and "R@5 10.0 against 5.0 %" in judgement
    assert "after 25% of the steps, 50% of the FLOPs and 25% of the wall time" in judgement


def test_a_win_in_steps_alone_is_not_called_more():
    _, judgement = verdict(curve(0, 2, 4, 6, 8), curve(0, 1, 2, 6, 12, flops=4, seconds=4), PAIRS)
    assert "Selection paid at equal steps. " in judgement
    assert "behind at equal FLOPs" in judgement and "behind at equal wall time" in judgement


def test_a_loss_is_called_one():
    _, judgement = verdict(curve(0, 5, 10), curve(0, 2, 4), PAIRS)
    assert "Selection did not pay" in judgement and "ahead" not in judgement
    assert "it did not reach the uniform run's 10.0 %" in judgement


def test_a_difference_within_chance_is_no_win():
    _, judgement = verdict(curve(0, 5, 10.0), curve(0, 5, 10.5), PAIRS)
    assert "Selection did not pay" in judgement
    assert judgement.count("not clearly different") == 3


def test_runs_that_learned_nothing_say_so():
    _, judgement = verdict(curve(0.3, 0.3), curve(0.3, 0.5), PAIRS)
    assert "too short a run to tell" in judgement and "paid" not in judgement


def test_a_difference_is_clear_beyond_two_standard_errors():
    # Of 1,600 pairs, 10 % and x %: the error of the difference is about 1.06 points.
    assert clear_sign(12.0, 10.0, 1600) == 0
    assert clear_sign(12.4, 10.0, 1600) == 1
    assert clear_sign(10.0, 12.4, 1600) == -1
    assert clear_sign(0.0, 0.0, 1600) == 0


def test_the_table_is_aligned_markdown():
    lines = table(compare(curve(0, 4), curve(0, 20))).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 6
    assert lines[2].split("|")[1:3] == [" uniform               ", "   100 "]
    assert "1.0 / 4.0 %" in lines[2] and "5.0 / 20.0 %" in lines[3]

"""What training shows on a terminal and in a log file."""

import io
import sys

import numpy as np

from gsae_jax.training import progress


def run_of_calls(monkeypatch, seconds, total):
    """A progress that has seen calls of ten steps each, which took so many seconds."""
    clock = iter(np.cumsum(seconds).tolist())
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    shown = progress.Progress(total, 0, ["gated", "many"])
    for call in range(len(seconds)):
        shown.ended(10 * (call + 1))
    return shown


def test_the_remaining_time_is_estimated_without_compiling(monkeypatch):
    seconds = [60.0, 30.0, 0.5, 0.5, 0.5]  # the first two compile
    assert run_of_calls(monkeypatch, seconds[1:3], 1000).left(20) == ""
    assert run_of_calls(monkeypatch, seconds, 1050).left(50) == "0:00:50 left"


VALUES = {"tokens_per_second": 12345.6} | {
    f"{stack}/{name}": [scale * n for n in range(1, count + 1)]
    for stack, count in (("gated", 2), ("many", 12))
    for name, scale in (("l0", 10), ("loss", 0.1), ("gamma", 0.3), ("dead", 7))
}


def test_a_log_file_gets_one_line_for_each_step_that_is_logged(monkeypatch, capsys):
    shown = run_of_calls(monkeypatch, [60.0, 0.5, 0.5], 1030)
    with shown:
        shown.show(30, VALUES)
        shown.say("step 30: something")
    out, err = capsys.readouterr()
    assert out == (
        "step 30 of 1,030 | 12,346 tokens/s | 0:00:50 left | gated: L0 10.0 20.0, loss 0.1000 0.2000, γ 0.300 0.600, "
        "dead 7 14 | many: L0 10.0 to 120.0, loss 0.1000 to 1.2000, γ 0.300 to 3.600, dead 7 to 84\n"
    )
    assert err == "step 30: something\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_pipe_on_a_terminal_gets_the_lines(monkeypatch, capsys):
    """`python -m gsae_jax.train ... | tee log`: standard error still is the terminal."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with run_of_calls(monkeypatch, [60.0, 0.5, 0.5], 1030) as shown:
        shown.show(30, VALUES)
    assert capsys.readouterr().out.startswith("step 30 of 1,030 | 12,346 tokens/s")
    assert terminal.getvalue() == ""


def test_a_terminal_gets_a_bar_with_a_line_for_each_stack(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    shown = run_of_calls(monkeypatch, [60.0, 0.5, 0.5], 1030)
    with shown:
        shown.show(30, VALUES)
        shown.say("step 30: something")
    text = terminal.getvalue()
    assert "gated: L0 10.0 20.0, loss 0.1000 0.2000" in text
    assert "/1030 steps" in text
    assert "step 30: something\n" in text

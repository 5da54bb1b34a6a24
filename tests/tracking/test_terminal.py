"""The console and train.log while people wait: phases with progress, without a bar in lines that are few."""

import io
import re
import threading

import pytest
from rich.console import Console

from megatron_opd.config import LogConfig
from megatron_opd.tracking.headline import Headline
from megatron_opd.tracking.phase import Phase, clock_time
from megatron_opd.tracking.tracker import Tracker, build_tracker


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("megatron_opd.tracking.terminal.time.monotonic", lambda: made.now)
    return made


def opened(run_dir, out, *, is_terminal=False, steps=60):
    console = Console(file=out, width=150, force_terminal=is_terminal, color_system=None)
    return build_tracker(LogConfig(), run_dir, num_steps=steps, settings={}, console=console)


def said(run_dir):
    return [line.split("  ", 1)[1] for line in (run_dir / "train.log").read_text().splitlines()]


def test_a_line_when_a_phase_begins_and_few_more(tmp_path, clock):
    out = io.StringIO()
    with opened(tmp_path, out) as tracker:
        with tracker.phase("loading the student"):
            clock.now += 12
        with tracker.phase("evaluating", total=200, unit="prompts") as phase:
            for _ in range(200):
                clock.now += 0.5
                phase.advance()
    assert said(tmp_path) == [
        "loading the student",
        "evaluating (200 prompts)",
        "evaluating: 60 of 200 prompts, 1:10 left",
        "evaluating: 120 of 200 prompts, 0:40 left",
        "evaluating: 180 of 200 prompts, 0:10 left",
        "evaluating: done in 1:40",
    ]
    assert [line.split("  ", 1)[1] for line in out.getvalue().splitlines()] == said(tmp_path)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out.getvalue())


@pytest.mark.parametrize(("seconds", "lines"), [(29.9, 0), (30.0, 2)])
def test_a_phase_of_a_later_step_is_told_of_only_if_it_takes_long(tmp_path, clock, seconds, lines):
    how = {"total": 2, "unit": "answers", "is_told": False}
    with opened(tmp_path, io.StringIO()) as tracker, tracker.phase("sampling", **how) as phase:
        clock.now += seconds
        phase.advance()
    assert said(tmp_path) == ["sampling: 1 of 2 answers, 0:30 left", "sampling: done in 0:30"][:lines]


def test_a_phase_that_fails_is_not_done(tmp_path, clock):
    def fail():
        clock.now += 100
        raise RuntimeError

    with opened(tmp_path, io.StringIO()) as tracker:
        with pytest.raises(RuntimeError), tracker.phase("saving"):
            fail()
        tracker.message("next")
    assert said(tmp_path) == ["saving", "next"]


def test_nothing_is_shown_of_a_phase_that_is_over(tmp_path, clock):
    with opened(tmp_path, io.StringIO()) as tracker:
        with tracker.phase("sampling", total=2, unit="answers", is_told=False) as phase:
            pass
        clock.now += 100
        phase.advance()
    assert said(tmp_path) == []


def test_other_threads_tell_of_progress(tmp_path, clock):
    how = {"total": 4, "unit": "answers", "is_told": False}
    with opened(tmp_path, io.StringIO()) as tracker, tracker.phase("sampling", **how) as phase:
        clock.now += 40
        thread = threading.Thread(target=phase.advance)
        thread.start()
        thread.join()
    assert said(tmp_path)[0] == "sampling: 1 of 4 answers, 2:00 left"


def test_a_terminal_shows_the_phase_below_the_steps(tmp_path, clock):
    out = io.StringIO()
    with opened(tmp_path, out, is_terminal=True) as tracker:
        with tracker.phase("evaluating", total=4, unit="prompts") as phase:
            clock.now += 1
            phase.advance(3)
            assert "evaluating: 3 of 4 prompts, 0:00 left" in out.getvalue()
        tracker.begin(0)
        clock.now += 10
        tracker.log({"loss": 0.5}, 1)
        with tracker.phase("sampling"):
            pass
    assert "1/60" in out.getvalue()
    assert "eta 9:50" in out.getvalue()
    assert "sampling" in out.getvalue()
    assert said(tmp_path) == ["evaluating (4 prompts)", "step 1/60  loss 0.5  eta 9:50", "sampling"]


def test_the_time_to_go_is_there_after_the_first_step(tmp_path, clock):
    with opened(tmp_path, io.StringIO(), steps=11) as tracker:
        clock.now += 500  # an evaluation, which is no step
        tracker.begin(0)
        clock.now += 60
        tracker.log({"loss": 1.0}, 1)
    assert said(tmp_path) == ["step 1/11  loss 1  eta 10:00"]


def test_a_line_has_what_was_declared_in_the_declared_order(tmp_path):
    with opened(tmp_path, io.StringIO()) as tracker:
        tracker.show([Headline("reward/mean", "reward"), Headline("kl/ensemble", "kl(top-k)"), Headline("x", "x"),
                      Headline("eval/kl/ensemble", "kl(top-k)")])  # fmt: skip
        tracker.log({"kl/ensemble": 0.76, "loss": 0.0, "grad_norm": 0.0, "reward/mean": 0.5, "tokens_per_s": 9.0}, 3)
        tracker.log({"eval/kl/ensemble": 0.5, "eval/accuracy/all": 0.25}, 3)
    assert said(tmp_path) == [
        "step 3/60  loss 0  grad 0  reward 0.5  kl(top-k) 0.76  tok/s 9  eta -",
        "step 3/60  eval  all 0.250  kl(top-k) 0.5",
    ]


def test_other_ranks_count_and_show_nothing(capsys):
    tracker = Tracker()
    with tracker.phase("sampling", total=4, unit="answers") as phase:
        phase.advance()
    tracker.show([])
    tracker.begin(0)
    assert phase.done == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("done", "text"), [(0, "at: 0 of 4 x"), (1, "at: 1 of 4 x, 0:30 left"), (4, "at: 4 of 4 x")], ids=str
)
def test_a_pace_needs_something_done_and_something_left(done, text):
    phase = Phase("at", 4, "x", show=lambda _: None)
    phase.done = done
    assert phase.text(phase.began + 10) == text


def test_times_as_clocks_show_them():
    assert [clock_time(s) for s in (0, 59.6, 61, 3599.6, 3661)] == ["0:00", "1:00", "1:01", "1:00:00", "1:01:01"]

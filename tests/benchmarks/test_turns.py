"""Programs in lock-step: one at a time, in order, all stopped by one failure."""

import pytest

from benchmarks.turns import Turns, run_in_turns


def test_programs_take_turns_step_by_step():
    diary, turns = [], Turns("abc")

    def program(name):
        for step in range(3):
            turns.next_turn(name)
            diary.append(f"{name}{step}")

    run_in_turns({name: lambda name=name: program(name) for name in "abc"}, turns)
    # A thread that gives up its turn before its first step lets the others come to their own.
    assert diary == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]


def test_only_one_runs_at_a_time():
    running, turns = [], Turns("ab")

    def program(name):
        for _ in range(50):
            turns.next_turn(name)
            running.append(name)
            assert running == [name]
            running.remove(name)

    run_in_turns({name: lambda name=name: program(name) for name in "ab"}, turns)


def test_programs_of_different_length_all_end():
    done, turns = [], Turns("ab")

    def program(name, steps):
        for _ in range(steps):
            turns.next_turn(name)
        done.append(name)

    run_in_turns({"a": lambda: program("a", 1), "b": lambda: program("b", 5)}, turns)
    assert done == ["a", "b"]


def test_a_failure_stops_all_and_is_raised():
    steps, turns = [], Turns("ab")

    def failing():
        turns.next_turn("a")
        raise FloatingPointError("NaN")

    def endless():
        while True:
            turns.next_turn("b")
            steps.append(1)

    with pytest.raises(FloatingPointError, match="NaN"):
        run_in_turns({"a": failing, "b": endless}, turns)
    assert len(steps) <= 1

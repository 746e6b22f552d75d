"""Work beside training: one piece at a time, and no failure of it is lost."""

from __future__ import annotations

import threading

import pytest

from learner.background import Background


def test_the_next_piece_waits_for_the_one_under_way() -> None:
    done = list[str]()
    may_end = threading.Event()

    def first() -> None:
        assert may_end.wait(10)
        done.append("first")

    with Background("test") as background:
        background.start(first)
        assert done == []
        threading.Timer(0.05, may_end.set).start()
        background.start(lambda: done.append("second"))
        assert done[0] == "first"
        background.wait()
    assert done == ["first", "second"]


def test_a_failure_is_raised_by_every_later_call() -> None:
    with Background("test") as background:
        background.start(lambda: open("/nonexistent/folder/file").close())
        with pytest.raises(FileNotFoundError):
            background.wait()
        with pytest.raises(FileNotFoundError):
            background.check()
        with pytest.raises(FileNotFoundError):
            background.start(lambda: None)


def test_leaving_drops_the_piece_under_way_without_an_error() -> None:
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        try:
            while True:
                background.go_on()
        finally:
            ended.set()

    with Background("test") as background:
        background.start(work)
        assert begun.wait(10)
    assert ended.is_set()
    background.check()

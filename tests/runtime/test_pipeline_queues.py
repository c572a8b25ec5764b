"""The bounded queues between the stages of a pipeline."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admth_runtime.errors import QueueFullError
from admth_runtime.pipeline.queues import BoundedQueue, Closed, OrderedQueue, StalledError


def in_thread(function, *arguments) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


class TestBoundedQueue:
    def test_gives_out_in_order_and_counts(self):
        queue = BoundedQueue("next", 3)
        for item in "abc":
            queue.put(item)
        assert [queue.take() for _ in range(3)] == [(0, "a"), (1, "b"), (2, "c")]
        assert (len(queue), queue.peak, queue.taken) == (0, 3, 3)

    def test_block_waits_for_room(self):
        queue = BoundedQueue("next", 2)
        done = []

        def write():
            for item in range(20):
                queue.put(item)
                done.append(item)

        writer = in_thread(write)
        time.sleep(0.05)
        assert len(done) == 2
        assert [queue.take()[1] for _ in range(20)] == list(range(20))
        writer.join(5)
        assert not writer.is_alive() and queue.peak == 2

    def test_many_blocked_writers_all_get_in(self):
        queue = BoundedQueue("next", 4)
        writers = [in_thread(lambda number=number: [queue.put(number) for _ in range(5)]) for number in range(8)]
        taken = [queue.take()[1] for _ in range(40)]
        for writer in writers:
            writer.join(5)
            assert not writer.is_alive()
        assert sorted(taken) == sorted(list(range(8)) * 5)

    def test_drop_oldest_keeps_the_newest(self):
        queue = BoundedQueue("next", 3, policy="drop-oldest")
        for item in range(10):
            queue.put(item)
        assert queue.dropped == 7
        assert [queue.take()[1] for _ in range(3)] == [7, 8, 9]

    def test_reject_raises_and_keeps_the_oldest(self):
        queue = BoundedQueue("next", 2, policy="reject")
        queue.put(0)
        queue.put(1)
        with pytest.raises(QueueFullError, match=r"the queue is full \(2 frames wait\)"):
            queue.put(2)
        assert queue.take() == (0, 0)

    def test_close_lets_the_rest_out_and_wakes_everybody(self):
        queue = BoundedQueue("next", 1)
        queue.put("last")
        results = []

        def write():
            try:
                queue.put("late")
            except Closed:
                results.append("closed")

        writer = in_thread(write)
        time.sleep(0.05)
        queue.close()
        writer.join(5)
        assert results == ["closed"]
        assert queue.take()[1] == "last"
        with pytest.raises(Closed):
            queue.take()

    def test_a_queue_that_nobody_drains_says_so(self):
        queue = BoundedQueue("sink", 1, stall_s=0.1)
        queue.put(0)
        with pytest.raises(
            StalledError, match=r"the sink stage has taken nothing for 0\.1 s while 1 wait in its queue"
        ):
            queue.put(1)

    def test_a_slow_reader_is_no_stall(self):
        queue = BoundedQueue("sink", 1, stall_s=0.3)

        def read():
            for _ in range(5):
                time.sleep(0.15)
                queue.take()

        reader = in_thread(read)
        for item in range(5):
            queue.put(item)
        reader.join(5)
        assert queue.taken == 5


class TestOrderedQueue:
    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 5), st.integers(0, 2**32 - 1))
    def test_any_workers_any_order_come_out_in_order(self, count, limit, workers, seed):
        queue = OrderedQueue("batch", limit + workers)
        numbers, lock = iter(range(count)), threading.Lock()

        def work(number_of_worker):
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                time.sleep(((seed >> (number + number_of_worker) % 30) & 1) * 0.0005)
                queue.put(number, number)

        threads = [in_thread(work, worker) for worker in range(workers)]
        out = []
        while len(out) < count:
            items = queue.collect(limit, 0.0005, lambda: True)
            assert 1 <= len(items) <= limit
            out += items
        for thread in threads:
            thread.join(5)
        assert out == list(range(count))
        assert queue.peak <= limit + workers

    def test_a_batch_waits_for_more_and_then_leaves(self):
        queue = OrderedQueue("batch", 10)
        queue.put(0, "a")
        start = time.monotonic()
        assert queue.collect(4, 0.1, lambda: True) == ["a"]
        assert time.monotonic() - start >= 0.099

    def test_a_full_batch_does_not_wait(self):
        queue = OrderedQueue("batch", 10)
        for number in range(5):
            queue.put(number, number)
        start = time.monotonic()
        assert queue.collect(4, 60.0, lambda: True) == [0, 1, 2, 3]
        assert time.monotonic() - start < 5

    def test_a_batch_goes_on_filling_while_it_may_not_leave(self):
        queue = OrderedQueue("batch", 10)
        queue.put(0, 0)
        out, busy = [], [True]
        reader = in_thread(lambda: out.append(queue.collect(8, 0.01, lambda: not busy[0])))
        time.sleep(0.05)
        queue.put(1, 1)
        queue.put(2, 2)
        time.sleep(0.05)
        assert out == []
        busy[0] = False
        queue.poke()
        reader.join(5)
        assert out == [[0, 1, 2]]

    def test_close_gives_out_what_is_there(self):
        queue = OrderedQueue("batch", 4)
        queue.put(0, 0)
        queue.close()
        assert queue.collect(4, 60.0, lambda: True) == [0]
        with pytest.raises(Closed):
            queue.collect(4, 60.0, lambda: True)
        with pytest.raises(Closed):
            queue.put(1, 1)

    def test_discarding_wakes_a_writer_that_is_ahead(self):
        queue = OrderedQueue("batch", 1)
        queue.put(0, 0)
        raised = []

        def write():
            try:
                queue.put(1, 1)
            except Closed:
                raised.append(True)

        writer = in_thread(write)
        time.sleep(0.05)
        queue.close(discard=True)
        writer.join(5)
        assert raised == [True] and len(queue) == 0

    def test_stalls_like_the_other(self):
        queue = OrderedQueue("batch", 1, stall_s=0.1)
        queue.put(0, 0)
        with pytest.raises(StalledError, match="the batch stage has taken nothing"):
            queue.put(1, 1)

"""Work that is killed at random moments, and begun again until it comes to its end."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import tqdm.auto

NUM_KILLS = int(os.environ.get("SGL_NUM_KILLS", "3"))


class Killer:
    """Lets copies of this process do some work, and kills them at moments drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kills = 0

    def start(self, work: Callable[[Any], Any], place: Any) -> int:
        number = os.fork()
        if number == 0:
            code = 1
            try:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
                for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):  # their own would stay locked in all copies
                    bar.set_lock(threading.RLock())
                work(place)
                code = 0
            finally:
                os._exit(code)  # never back into the tests
        return number

    def seconds(self, work: Callable[[Any], Any], place: Any) -> float:
        """How long the work takes undisturbed."""
        start = time.monotonic()
        assert os.waitpid(self.start(work, place), 0)[1] == 0
        return time.monotonic() - start

    def until_it_is_done(
        self, work: Callable[[Any], Any], place: Any, seconds: float, check: Callable[[Any], Any]
    ) -> None:
        """Starts the work again and again, each time killed in its first `seconds`; `check` sees what a kill left."""
        while self.kills < NUM_KILLS:
            number = self.start(work, place)
            time.sleep(self.random.uniform(0, seconds))
            os.kill(number, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
            if code == 0:
                return  # it was faster
            assert code == -signal.SIGKILL
            self.kills += 1
            check(place)
        self.seconds(work, place)

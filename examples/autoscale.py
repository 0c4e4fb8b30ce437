"""Ray Serve's autoscaler on actor groups: ``python examples/autoscale.py`` goes from 1 to 2 replicas and back in ~20 s.

Every replica owns a group of two workers in a placement group of its own. Requests go through a deployment handle, no
port is opened, and Ray is a local one of this script. Prints what happens, with the seconds since the start; exits with
0 only if the replicas went 1 -> 2 -> 1, no request failed, and no process or placement group of theirs is left.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.util import placement_group_table

import ray_shm
from ray_shm.serve import GroupReplica, deployment_options

APP = "autoscale"
WORKERS = 2  # of each replica
STEP = 0.05  # seconds; what a step of the pretended model takes
BUSY = 8  # requests in flight under load; one replica is meant to have 2
MAX_REQUESTS = 5_000
PHASE_TIMEOUT = 90.0  # seconds; each change takes 2 to 5 on an idle machine
GONE_TIMEOUT = 10.0
LOOK_EVERY = 0.2

AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 2,
    # Impatient, so that the example takes seconds; leave these out in production.
    "upscale_delay_s": 0,
    "downscale_delay_s": 1,
    "look_back_period_s": 1,
    "metrics_interval_s": 0.2,
}


class Model:
    """Pretends to be one rank's part of a model: any plain class is a worker class."""

    def step(self, prompt: int) -> tuple[int, int]:
        time.sleep(STEP)
        return prompt * 2, os.getpid()


@serve.deployment(
    **deployment_options(
        WORKERS,
        replica_cpus=0.5,
        autoscaling_config=AUTOSCALING,
        max_ongoing_requests=4 * BUSY,
        graceful_shutdown_wait_loop_s=0.2,
    )
)
class Replica(GroupReplica):
    """Answers with the ranks' outputs, and says which processes did it."""

    async def __call__(self, prompt: int) -> tuple[list[int], list[int]]:
        outputs = await self.collective_rpc("step", args=(prompt,))
        return [value for value, _ in outputs], [os.getpid(), *(pid for _, pid in outputs)]


class Load:
    """Sends requests and keeps count of what became of them."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._in_flight: list[tuple[int, Any]] = []
        self.sent = 0
        self.failed = 0
        self.answered_by: set[int] = set()  # pids of replicas
        self.pids: set[int] = set()  # of replicas and workers

    def keep(self, in_flight: int) -> None:
        """Wait for the oldest request if there are that many, then send until there are."""
        if len(self._in_flight) >= in_flight:
            self._take()
        while len(self._in_flight) < in_flight and self.sent < MAX_REQUESTS:
            self._in_flight.append((self.sent, self._handle.remote(self.sent)))
            self.sent += 1

    def note(self) -> str:
        return f"{self.sent} requests sent, {self.failed} failed"

    def finish(self) -> None:
        while self._in_flight:
            self._take()

    def _take(self) -> None:
        prompt, response = self._in_flight.pop(0)
        try:
            values, pids = response.result(timeout_s=60)
            if values != [prompt * 2] * WORKERS:
                raise ray_shm.RayShmError(f"wrong answer {values} to request {prompt}")
        except Exception as exc:  # whatever went wrong: the example counts and shows it
            self.failed += 1
            say(f"request {prompt} failed: {type(exc).__name__}: {exc}")
        else:
            self.answered_by.add(pids[0])
            self.pids.update(pids)


BEGUN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGUN:5.1f} s] {text}", flush=True)


class Replicas:
    """How many replicas run, as Serve says; prints every change."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._said = ""
        self._next_look = 0.0

    def look(self, note: str) -> int:
        """The number now, or as of LOOK_EVERY ago: asking costs Serve's controller some work."""
        if time.monotonic() >= self._next_look:
            states = serve.status().applications[APP].deployments["Replica"].replica_states
            running = int(states.get("RUNNING", 0))
            if [running] != self.seen[-1:]:
                self.seen.append(running)
            text = ", ".join(f"{count} {state}" for state, count in sorted(states.items()) if count)
            if text != self._said:
                say(f"replicas: {text}; {note}")
                self._said = text
            self._next_look = time.monotonic() + LOOK_EVERY
        return self.seen[-1]


def run_until(reached: Callable[[int], bool], load: Load, in_flight: int, replicas: Replicas) -> None:
    """Keep up the load until `reached` says so of the number of replicas, or for PHASE_TIMEOUT at most."""
    deadline = time.monotonic() + PHASE_TIMEOUT
    while time.monotonic() < deadline and load.sent < MAX_REQUESTS:
        load.keep(in_flight)
        if reached(replicas.look(load.note())):
            break
    else:
        say("gave up waiting")
    load.finish()


def left_over(pids: set[int]) -> list[str]:
    """Processes of replicas and workers, and placement groups, that are still there after some seconds of grace."""
    deadline = time.monotonic() + GONE_TIMEOUT
    while True:
        left = [f"process {pid}" for pid in sorted(pids) if os.path.exists(f"/proc/{pid}")]
        left += [f"placement group {key}" for key, row in placement_group_table().items() if row["state"] != "REMOVED"]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def main() -> int:
    say("starting Ray, Serve and the first replica")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        handle = serve.run(Replica.bind(Model), name=APP, route_prefix=None)
        load, replicas = Load(handle), Replicas()
        replicas.look(f"each with {WORKERS} workers; now {BUSY} requests at a time")
        run_until(lambda running: running == 2 and len(load.answered_by) == 2, load, BUSY, replicas)
        say(f"now one request at a time; {load.note()}")
        run_until(lambda running: running == 1, load, 1, replicas)
        serve.delete(APP)
        left = left_over(load.pids)
        serve.shutdown()  # Ray prints two lines of its own about the calls that the end of Serve's controller cuts off
    finally:
        ray.shutdown()
    went = " -> ".join(map(str, replicas.seen))
    say(f"replicas {went}; {load.note()}; left over: {', '.join(left) or 'nothing'}")
    return 0 if replicas.seen == [1, 2, 1] and not load.failed and not left else 1


if __name__ == "__main__":
    sys.exit(main())

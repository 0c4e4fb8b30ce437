"""``ray-shm bench queue``, run as a user runs it: what it prints, and what is said and left when something ends it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import leaks
import pytest
from program import start

from ray_shm.actors import cli, iceoryx_peer
from ray_shm.actors.bench_report import parse_size
from ray_shm.size_text import size_text

WATCHDOG = 100.0  # seconds; only a hang comes near
HAS_ICEORYX = importlib.util.find_spec("iceoryx2") is not None
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
OURS = ["ray-shm shm", "ray-shm zmq"]
PEERS = [*OURS, *(["iceoryx2"] if HAS_ICEORYX else []), "pyzmq", "multiprocessing.Pipe", "memcpy", "pipe ping-pong"]

RUN = """
import sys
from ray_shm.actors.cli import main
status = main(["bench", "queue", *sys.argv[1:]])
print("imported", *sorted({"ray", "torch"} & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""

# Sends a signal to the worker of rank 1 in the middle of a long turn of one peer, the only one.
STRIKE = """
import multiprocessing, os, sys, threading
from ray_shm.actors import bench_workers, queue_bench, queue_report
from ray_shm.actors.cli import main
peer, number, watchdog = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
bench_workers.WATCHDOG = watchdog
peers_of = queue_bench.peers_of
queue_bench.peers_of = lambda *args: [p for p in peers_of(*args) if p.name == peer]
turns = 0

def begin_turn(progress, name):
    global turns
    turns += 1
    if turns == 2:  # the first one warms up
        victim = next(p for p in multiprocessing.active_children() if p.name.endswith("-1")).pid
        maps = open(f"/proc/{victim}/maps").read()
        print("victim", victim, "libtorch" in maps or "_raylet" in maps, file=sys.stderr)
        threading.Timer(0.1, os.kill, (victim, number)).start()

queue_report.Progress.peer = begin_turn
sys.exit(main(["bench", "queue", "--readers", "2", "--payload", "100B", "--calls", "100000000", "--seconds", "300"]))
"""


# Ctrl-C comes while a finalizer runs, where Python drops what its handler raises; another finalizer fails.
FINALIZE = """
import signal, sys, time
from ray_shm.actors.bench_workers import WorkerPool

class Interrupted:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

class Failing:
    def __del__(self):
        raise ValueError("not to be hidden")

try:
    with WorkerPool(1) as pool, pool.watched("finalizing"):
        Failing()
        try:
            Interrupted()
        except KeyboardInterrupt:
            sys.exit("it was not dropped")
        time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for text in self.out.splitlines() if (line := json.loads(text)).pop("kind") == kind]


def run(code: str, *args: str, folder: Path) -> Done:
    """Run in a session of its own, with `folder` as the working directory and for temporary files."""
    with start(code, *args, folder=folder) as process:
        out, err = process.communicate(timeout=WATCHDOG)
    return Done(process.returncode, out, err)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """One quick run with JSON and a plot."""
    folder = tmp_path_factory.mktemp("quick")
    plot = ["--plot", "out.png"] if HAS_MATPLOTLIB else []
    return run(RUN, "--quick", "--json", *plot, folder=folder), folder


def test_the_quick_ladder_has_a_row_for_every_peer_and_cell(quick: tuple[Done, Path]) -> None:
    done, _ = quick
    assert done.status == 0, done.err
    cells = [(size, readers, peer) for size in (100, 1 << 20) for readers in (1, 2) for peer in PEERS]
    assert [(row["payload_bytes"], row["readers"], row["peer"]) for row in done.lines("row")] == cells
    assert [item["peer"] for item in done.lines("left out")] == ([] if HAS_ICEORYX else ["iceoryx2"])


def test_the_figures_are_plausible(quick: tuple[Done, Path]) -> None:
    for row in quick[0].lines("row"):
        assert 0 < row["p50_us"] <= row["p90_us"] <= row["p99_us"] < 1e7, row
        assert 0 < row["calls"] <= 50, row
        assert row["cpu_us"] > 0, row
        if row["peer"] == "pipe ping-pong":
            assert row["gb_per_s"] is None
        else:
            assert row["gb_per_s"] == pytest.approx(row["payload_bytes"] / row["p50_us"] / 1000, rel=0.01), row


def test_the_machine_comes_first_and_the_idle_queues_last(quick: tuple[Done, Path]) -> None:
    kinds = [json.loads(line)["kind"] for line in quick[0].out.splitlines()]
    assert (kinds[0], kinds[-1]) == ("machine", "idle")
    (machine,), (idle,) = quick[0].lines("machine"), quick[0].lines("idle")
    assert machine["cpus"] == len(os.sched_getaffinity(0))
    assert {"numpy", "pyzmq"} <= machine["versions"].keys()
    assert (idle["peer"], idle["readers"]) == ("ray-shm shm", 2)
    assert idle["seconds"] >= 1
    assert 0 <= idle["wake_ups_per_s_mean"] <= idle["wake_ups_per_s_worst"]
    assert 0 < idle["cpu_percent"] < 100


def test_neither_ray_nor_torch_is_imported(quick: tuple[Done, Path]) -> None:
    assert "imported\n" in quick[0].err


def test_the_plot_is_a_png_of_a_sensible_size(quick: tuple[Done, Path]) -> None:
    if not HAS_MATPLOTLIB:
        pytest.skip("matplotlib is not installed")
    data = (quick[1] / "out.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert 1000 < width < 4000
    assert 500 < height < 4000
    assert 20_000 < len(data) < 1_000_000


def test_the_table_with_touched_payloads_and_what_does_not_fit(folder: Path) -> None:
    sizes = ["--payload", "4KiB", "1000000GiB"]
    done = run(RUN, "--quick", "--touch", "--readers", "2", "--channel", "shm", *sizes, folder=folder)
    assert done.status == 0, done.err
    peers = [*PEERS[:1], *PEERS[2:]]
    peers[peers.index("memcpy")] = "memcpy and sums"
    rows = [line for line in done.out.splitlines() if re.search(r" [\d,.]+ +[\d,.]+ +[\d,.]+ ", line)]
    assert len([row for row in rows if any(peer in row for peer in peers)]) == len(peers), done.out
    text = " ".join(done.out.split())
    for peer in peers:
        assert re.search(rf"Left out: {peer}, 1000000 GiB to 2 readers: cannot reserve [\d,]+ bytes", text), peer
    assert "Readers sum the payload." in text
    assert re.search(r"Idle: ray-shm shm, 2 readers, 1[.\d]* s: [\d.e-]+ % of one core", text)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "peer",
    [
        "ray-shm shm",
        pytest.param("ray-shm zmq", marks=pytest.mark.slow),
        pytest.param("pyzmq", marks=pytest.mark.slow),
        pytest.param("multiprocessing.Pipe", marks=pytest.mark.slow),
        pytest.param(
            "iceoryx2",
            marks=[pytest.mark.slow, pytest.mark.skipif(not HAS_ICEORYX, reason="iceoryx2 is not installed")],
        ),
    ],
)
def test_a_killed_worker_ends_the_run_with_its_name(peer: str, folder: Path) -> None:
    done = run(STRIKE, peer, str(int(signal.SIGKILL)), "60", folder=folder)
    victim = victim_of(done)
    assert done.status == 1
    assert f"the worker of rank 1 (pid {victim}) ended with exit code -9 (SIGKILL)" in done.err
    assert f"during: {peer}, 100 B to 2 readers." in done.err
    assert "Traceback" not in done.err
    assert list(folder.iterdir()) == []
    assert_no_process_left()


def test_a_hanging_worker_ends_the_run_with_the_state_of_all(folder: Path) -> None:
    done = run(STRIKE, "multiprocessing.Pipe", str(int(signal.SIGSTOP)), "6", folder=folder)
    victim = victim_of(done)
    assert done.status == 1
    assert "no answer for 6 s during: multiprocessing.Pipe, 100 B to 2 readers." in done.err
    assert re.search(rf"rank 0 pid \d+ S \(sleeping\).*, rank 1 pid {victim} T \(stopped\)", done.err)
    assert list(folder.iterdir()) == []
    assert_no_process_left()


def victim_of(done: Done) -> int:
    found = re.search(r"^victim (\d+) (True|False)$", done.err, re.MULTILINE)
    assert found, done.err
    assert found[2] == "False", "a worker has mapped Ray's or torch's library"
    return int(found[1])


@pytest.mark.parametrize(
    ("number", "status", "says"),
    [
        (signal.SIGINT, 130, "ray-shm bench queue: interrupted\n"),
        (signal.SIGKILL, -9, ""),
        pytest.param(signal.SIGTERM, 143, "", marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_no_process(number: signal.Signals, status: int, says: str, folder: Path) -> None:
    args = ["--readers", "1", "--payload", "100B", "4KiB", "--calls", "10", "--json"]
    with start(RUN, *args, folder=folder) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if '"row"' in line)  # it is in the second cell now
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: to the workers, too
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=WATCHDOG)
    assert (process.returncode, err.removesuffix("imported\n")) == (status, says)
    if number == signal.SIGKILL:  # then nobody could
        for left in folder.iterdir():
            iceoryx_peer.remove_files(left)
    else:
        assert list(folder.iterdir()) == []
    assert_no_process_left()


def test_ctrl_c_amid_a_finalizer_ends_the_run_and_is_not_reported_as_lost(folder: Path) -> None:
    with start(FINALIZE, folder=folder) as process:
        _, err = process.communicate(timeout=WATCHDOG)
    assert process.returncode == 130
    assert err.count("Exception ignored") == err.count("not to be hidden") == 1
    assert_no_process_left()


def assert_no_process_left() -> None:
    """No worker; multiprocessing's own resource tracker goes once the driver's end of its pipe is closed."""
    left = [p for p in leaks.marked_processes() if "spawn_main" in " ".join(p.cmdline())]
    assert left == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("100B", 100), ("4096", 4096), ("4KiB", 4096), ("0.5 MiB", 1 << 19), ("256mib", 256 << 20), ("1GiB", 1 << 30)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(size_text(size)) == size


@pytest.mark.parametrize("args", [["--payload", "4 apples"], ["--payload", "0B"], ["--readers", "0"]])
def test_wrong_arguments_are_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(["bench", "queue", *args])
    assert refused.value.code == 2
    assert args[0] in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "queue", "--quick", "--plot", "out.png"]) == 1
    assert "pip install 'ray-shm[bench]'" in capsys.readouterr().err

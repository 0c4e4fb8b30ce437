"""``ray-shm bench rpc``, run as a user runs it: every peer has its rows, and whatever ends it, nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import leaks
import psutil
import pytest
from program import interrupt, start

from ray_shm.actors import cli, rpc_bench
from ray_shm.actors.rpc_report import TITLES, LeftOut, Report, make_row

WATCHDOG = 150.0  # seconds; only a hang comes near
PEERS = {"ray-shm", "Ray compiled graph", "Ray actor calls"}
OPTIONAL = {"ray-shm, driver actor", "Monarch"}  # measured, or left out with a reason
RUN = "import sys; from ray_shm.actors.cli import main; sys.exit(main(['bench', 'rpc', *sys.argv[1:]]))"


def test_a_quick_run_has_a_sane_row_of_every_peer(folder: Path) -> None:
    with start(RUN, "--quick", "--json", "--payload", "64KiB", folder=folder) as process:
        out, err = process.communicate(timeout=WATCHDOG)
    assert process.returncode == 0, err
    lines = [json.loads(line) for line in out.splitlines()]  # and not a word of Ray's in between
    assert lines[0]["kind"] == "machine"
    assert lines[0]["cpus"] == len(os.sched_getaffinity(0))
    assert {"ray", "torch"} <= lines[0]["versions"].keys()
    rows = [line for line in lines if line["kind"] == "row"]
    left_out = {line["peer"]: line["reason"] for line in lines if line["kind"] == "left out"}
    assert left_out.keys() <= OPTIONAL
    assert all(left_out.values())
    for section in TITLES:
        peers = {row["peer"] for row in rows if row["section"] == section}
        few = section in ("kill", "launch")
        assert peers == ({"ray-shm", "Ray actor calls"} if few else (PEERS | OPTIONAL) - left_out.keys()), section
    assert len({(row["section"], row["peer"]) for row in rows}) == len(rows)
    for row in rows:
        assert_sane(row)
    assert {row["payload_bytes"] for row in rows if row["section"] == "sizes"} <= {64 << 10}
    assert "ray-shm bench rpc [" in err  # progress
    assert "done" in err


def assert_sane(row: dict[str, Any]) -> None:
    assert 0 < row["p50_us"] <= row["p90_us"] <= row["p99_us"] < 1e9, row
    assert 0 < row["samples"] <= 60, row
    assert row["workers"] == 2, row
    if row["section"] == "pipelined":
        assert row["calls_per_s"] == pytest.approx(1e6 / row["p50_us"], rel=0.01), row
    else:
        assert row["calls_per_s"] is None


@pytest.mark.slow
def test_ctrl_c_ends_it_with_the_table_so_far_and_no_process(folder: Path) -> None:
    before = leaks.marked_processes()
    arguments = ["--quick", "--only", "paced", "hog", "--seconds", "600", "--calls", "1000000000"]
    with start(RUN, *arguments, folder=folder) as process:
        _, err = interrupt(process, "2 workers: paced", WATCHDOG)
    assert process.returncode == 130, err
    assert "ray-shm bench rpc: interrupted" in err
    assert leaks.marked_processes() == before


def test_every_core_has_its_hog_until_the_end() -> None:
    with rpc_bench.hogs() as pids:
        hogs = [psutil.Process(pid) for pid in pids]
        assert sorted(hog.cpu_affinity() for hog in hogs) == [[core] for core in sorted(os.sched_getaffinity(0))]
        assert all(hog.is_running() for hog in hogs)
    assert not any(hog.is_running() for hog in hogs)


def test_hogs_end_with_a_bench_that_was_killed() -> None:
    code = "from ray_shm.actors.rpc_bench import hogs\nwith hogs() as pids: print(*pids, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        hogs = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        process.kill()
    gone, alive = psutil.wait_procs(hogs, timeout=WATCHDOG)
    assert (len(gone), alive) == (len(os.sched_getaffinity(0)), [])


def test_calls_are_paced_and_bounded() -> None:
    begun: list[float] = []
    start = time.perf_counter()
    times = rpc_bench.time_calls(lambda _: begun.append(time.perf_counter() - start), None, 5, 60.0, pace=0.01)
    assert len(times) == 5
    assert all(at >= 0.01 * number for number, at in enumerate(begun, 1))  # never ahead of the clock
    assert len(rpc_bench.time_calls(lambda _: None, None, 10**9, 0.01)) >= 1  # until the time is over
    assert rpc_bench.time_calls(lambda _: None, None, 0, 60.0) == []


def test_a_peer_that_fails_in_a_cell_is_left_out_of_it_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    def call(payload: bytes) -> None:
        if len(payload) > 100:
            raise OSError("no room\nfor it")

    report = Report(False, "")
    plan = rpc_bench.Plan(sections=["sizes"], payloads=(100, 200), seconds=0.1, calls=20)
    callers = {"other": rpc_bench.Caller(call, lambda number: None), "ray-shm": rpc_bench.Caller(len, lambda n: None)}
    bench = rpc_bench._CallBench(plan, report, 3, callers)
    bench.measure("sizes")
    assert [(row.peer, row.payload_bytes) for row in report.rows] == [
        ("other", 100),
        ("ray-shm", 100),
        ("ray-shm", 200),
    ]
    assert report.left_out == [LeftOut("other", "sizes", 3, 200, "OSError: no room")]
    assert "Left out: other in sizes (200 B, 3 workers): OSError: no room" in capsys.readouterr().err
    with pytest.raises(OSError, match="no room"):  # ours is no peer that may fail
        rpc_bench._CallBench(plan, report, 3, {"ray-shm": callers["other"]}).measure("sizes")


def test_the_tables_compare_each_cell_with_ours(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(False, "notes")
    for section, other in (("noop", 300.0), ("launch", 50_000.0)):
        for count in (8, 1):
            payload = 100 if section == "noop" else None
            report.add([make_row(section, "ray-shm", count, payload, [100.0, 100.0, 100.0 if payload else 1e5])])
            report.add([make_row(section, "Ray actor calls", count, payload, [other])])
    report.add([make_row("pipelined", "ray-shm", 1, 100, [10.0])])
    report.finish()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-3:] for line in lines if "Ray actor calls" in line] == (
        [["3.00", "×", "faster"]] * 2 + [["500.00", "×", "faster"]] * 2
    )
    assert [line.split()[2] for line in lines if " ray-shm " in line and "100 B" in line] == ["1", "8", "1"]
    assert any("100,000" in line for line in lines)  # calls a second


@pytest.mark.parametrize("args", [["--only", "no-op"], ["--kills", "0"], ["--payload", "4 apples"]])
def test_wrong_arguments_are_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(["bench", "rpc", *args])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert args[0] in said
    assert args[1] in said


def test_the_command_line_knows_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "rpc", "--help"])
    assert " ".join(TITLES) in " ".join(capsys.readouterr().out.split())


def test_what_ray_prints_is_kept_out_of_the_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(True, "notes")
    with report.apart():
        print("(raylet) A worker died")
        report.add([make_row("kill", "ray-shm", 4, None, [3.0, 1.0, 2.0])])
    out, err = capsys.readouterr()
    machine, row = (json.loads(line) for line in out.splitlines())
    assert machine["kind"] == "machine"
    assert (row["p50_us"], row["p90_us"], row["p99_us"], row["samples"]) == (2.0, 3.0, 3.0, 3)
    assert "A worker died" in err

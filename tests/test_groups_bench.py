"""``ray-shm bench groups``, as a user runs it: every operation has its rows, and whatever ends it, nothing is left."""

from __future__ import annotations

import json
from pathlib import Path

import leaks
import pytest
from program import interrupt, start

from ray_shm.actors import cli
from ray_shm.actors.groups_report import TITLES, LeftOut, Report, make_rows

WATCHDOG = 150.0  # seconds; only a hang comes near
RUN = """
import sys
from ray_shm.actors.cli import main
status = main(["bench", "groups", *sys.argv[1:]])
print("imported", *sorted({"ray"} & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""


def check_a_run(folder: Path, ranks: str, *args: str) -> None:
    with start(RUN, "--json", "--ranks", ranks, *args, folder=folder) as process:
        out, err = process.communicate(timeout=WATCHDOG)
    assert process.returncode == 0, err
    assert err.splitlines()[-1].strip() == "imported"  # no Ray
    machine, *lines = (json.loads(line) for line in out.splitlines())
    assert machine["kind"] == "machine"
    assert "torch" in machine["versions"]
    rows = [line for line in lines if line["kind"] == "row"]
    left_out = {line["peer"] for line in lines if line["kind"] == "left out"}
    cuda = set() if left_out == {"NCCL"} else {"NCCL", "ray-shm on CUDA"}
    for operation in TITLES:
        peers = {row["peer"] for row in rows if row["operation"] == operation}
        assert peers - cuda == {"ray-shm", "gloo", *(["TCPStore"] if operation.startswith("broadcast_object") else [])}
    for row in rows:
        assert row["ranks"] == int(ranks)
        assert (row["payload_bytes"] is None) == (row["operation"] == "barrier")
        assert 0 < row["p50_us"] <= row["p90_us"] <= row["p99_us"] < 1e8, row
        assert 0 < row["samples"] <= 12
        if row["peer"] == "ray-shm":
            assert (row["compared_with"], row["ratio"]) == (None, None)
        elif row["peer"] in ("gloo", "TCPStore"):
            assert row["compared_with"] == "ray-shm"
            assert row["ratio"] > 0


def test_a_quick_run_has_a_sane_row_of_every_peer(folder: Path) -> None:
    check_a_run(folder, "2", "--quick")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["3", "4"])
def test_so_has_one_with_more_ranks(ranks: str, folder: Path) -> None:
    check_a_run(folder, ranks, "--quick", "--payload", "1KiB", "1MiB")


@pytest.mark.slow
def test_ctrl_c_ends_it_with_the_table_so_far_and_no_process(folder: Path) -> None:
    before = leaks.marked_processes()
    arguments = ["--ranks", "2", "--only", "barrier", "all_reduce", "--payload", "1KiB", "--seconds", "600"]
    with start(RUN, *arguments, folder=folder) as process:
        out, err = interrupt(process, "2 ranks: all_reduce", WATCHDOG)
    assert process.returncode == 130, err
    assert "ray-shm bench groups: interrupted" in err
    assert "barrier" in out
    assert leaks.marked_processes() == before


def test_the_tables_compare_each_cell_with_ours(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(False, "notes")
    report.add(make_rows("all_reduce", 3, 2304, {"ray-shm": [100.0] * 3, "gloo": [300.0, 400.0, 100.0]}))
    report.add(make_rows("barrier", 2, None, {"ray-shm": [100.0], "gloo": [50.0]}))
    report.add(make_rows("broadcast", 2, 8, {"ray-shm": [1.0], "gloo": [1.0], "ray-shm on CUDA": [2.0], "NCCL": [5.0]}))
    report.leave_out(LeftOut("NCCL", None, 3, "no GPU"))
    report.finish()
    lines = capsys.readouterr().out.splitlines()
    of_gloo = [line.split()[-3:] for line in lines if " gloo " in line]
    assert of_gloo == [["3.00", "×", "faster"], ["1.00", "×", "faster"], ["2.00", "×", "slower"]]
    assert [line.split()[-3:] for line in lines if line.split()[:1] == ["NCCL"]] == [["2.50", "×", "faster"]]
    assert "notes" in lines
    assert "Left out: NCCL with 3 ranks: no GPU" in lines


@pytest.mark.parametrize("args", [["--only", "reduce"], ["--ranks", "1"], ["--payload", "4 apples"]])
def test_wrong_arguments_are_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(["bench", "groups", *args])
    assert refused.value.code == 2
    assert args[0] in capsys.readouterr().err


def test_the_command_line_knows_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "groups", "--help"])
    assert " ".join(TITLES) in " ".join(capsys.readouterr().out.split())

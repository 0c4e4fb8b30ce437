"""The Promela model of the queue (tests/model/): Spin finds nothing wrong with it, and finds what is wrong in mutants.

Every configuration is searched to the end, for x86-64 (TSO) and aarch64 (WEAK); README.md there says what is modelled.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parent / "model"
PACKAGE = Path(__file__).parent.parent / "ray_shm"
WATCHDOG = 170  # seconds, against a hang; the largest search takes half a minute

CLEAN = {
    "parking": "",
    "two slots": "-DSLOTS=2 -DMESSAGES=4",
    "writer dies": "-DKILL_WRITER -DMESSAGES=2",
    "writer dies, two slots": "-DKILL_WRITER -DREADERS=1 -DSLOTS=2 -DMESSAGES=4",
    "reader dies": "-DKILL_READER",
    "both die": "-DKILL_WRITER -DKILL_READER -DREADERS=1",
    "arena": "-DARENA -DONE_LEASES",
    "arena, two blocks": "-DARENA -DREADERS=1 -DSLOTS=2 -DMESSAGES=4",
    "arena, both die": "-DARENA -DKILL_WRITER -DKILL_READER -DREADERS=1",
}

ASLEEP = "invalid end state"  # nothing moves any more, and somebody is not done
MISSED = "assertion violated"  # a reader has not got all that was published
STALE, OVERWRITTEN = "payload stale", "payload overwritten"
BOTH, AARCH64 = ("TSO", "WEAK"), ("WEAK",)

# mutant, configuration, processors on which it is wrong, what is seen of it
MUTANTS = [
    ("NO_RECLAIM_FENCE", "", AARCH64, OVERWRITTEN),
    ("NO_RECLAIM_FENCE", "-DARENA -DREADERS=1", AARCH64, OVERWRITTEN),
    ("LIMIT_BEFORE_FENCE", "-DREADERS=1 -DSLOTS=2 -DMESSAGES=4", AARCH64, OVERWRITTEN),
    ("WAKE_SAME_WORD", "", BOTH, ASLEEP),
    ("RING_SAME_WORD", "", BOTH, ASLEEP),
    ("WAKE_AT_CLOSE_ONLY", "-DSLOTS=2 -DMESSAGES=2", BOTH, MISSED),
    ("CURSOR_BEFORE_PAYLOAD", "", BOTH, STALE),
    ("CURSOR_BEFORE_READS", "", BOTH, OVERWRITTEN),
    ("STATE_BEFORE_WORD", "", BOTH, ASLEEP),
    ("TAIL_BEFORE_END", "", BOTH, MISSED),
    ("TAIL_BEFORE_END", "-DKILL_WRITER -DREADERS=1", BOTH, MISSED),
    ("NO_WANTED_FENCE", "", BOTH, ASLEEP),
    ("READER_NOT_REGISTERED", "", BOTH, None),
    ("NO_PAYLOAD_FENCE", "", AARCH64, STALE),
    ("NO_EVENT_FENCE", "", AARCH64, ASLEEP),
    ("NO_BELL_FENCE", "", AARCH64, ASLEEP),
    ("NO_LEASE_FENCE", "-DARENA -DREADERS=1", AARCH64, OVERWRITTEN),
    ("LEASES_BEFORE_CURSORS", "-DARENA -DREADERS=1", BOTH, OVERWRITTEN),
    ("LEASE_AFTER_CURSOR", "-DARENA -DREADERS=1", BOTH, OVERWRITTEN),
    ("LOST_AFTER_WAKE", "-DKILL_WRITER -DREADERS=1", BOTH, ASLEEP),
    ("NO_FLAG_FENCE", "-DKILL_WRITER -DREADERS=1", AARCH64, ASLEEP),
    ("NO_FLAG_FENCE", "-DKILL_READER -DREADERS=1", AARCH64, ASLEEP),
    ("NO_LAST_FENCE", "-DKILL_WRITER -DREADERS=1", AARCH64, MISSED),
    ("DEAD_COUNTS", "-DKILL_READER -DREADERS=1", BOTH, ASLEEP),
]


@dataclass(frozen=True)
class Search:
    errors: int
    error: str  # the first
    complete: bool
    unreached: dict[str, list[str]]  # process type -> statements
    output: str


def require_spin() -> None:
    missing = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    if not missing:
        return
    reason = f"{' and '.join(missing)} not installed; on Debian: apt-get install {' '.join(missing)}"
    if os.environ.get("RAY_SHM_REQUIRE_SPIN") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def run(where: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=WATCHDOG, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)} returned {done.returncode}:\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout + done.stderr


def search(where: Path, flags: str, optimise: str) -> Search:
    """All of the configuration's states, or those up to the first error."""
    require_spin()
    run(where, "spin", *flags.split(), "-a", str(MODEL / "ring.pml"))
    # NOREDUCE: the reduction looks at what statements of Promela share, and these call functions in C.
    run(where, "gcc", "-w", optimise, "-DSAFETY", "-DNOREDUCE", "-DCOLLAPSE", "-DMEMLIM=4000", "-o", "pan", "pan.c")
    output = run(where, "./pan", "-m20000")
    errors = re.search(r"errors: (\d+)", output)
    if errors is None:
        pytest.fail(f"pan printed no result:\n{output}", pytrace=False)
    error = re.search(r"^pan:\d+: (.*) \(at depth", output, re.MULTILINE)
    limits = ("max search depth too small", "Search not completed", "out of memory", "MEMLIM bound")
    return Search(
        int(errors[1]),
        error[1] if error else "",
        not any(limit in output for limit in limits),
        {name: _statements(lines) for name, lines in re.findall(r"^unreached in (.*)\n((?:\t.*\n)*)", output, re.M)},
        output,
    )


def _statements(lines: str) -> list[str]:
    """Without line numbers, which Spin loses in inlines, and without the exits by SIGKILL that it lists beside them."""
    found = re.findall(r'state \d+, "(.*)"', lines)
    return [re.sub(r"(?<=D_STEP)\d+", "", text) for text in found if not text.startswith("(killed[")]


@pytest.mark.parametrize("processor", BOTH)
@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_wrong(name: str, processor: str, tmp_path: Path) -> None:
    flags = f"-D{processor} {CLEAN[name]}"
    found = search(tmp_path, flags, "-O1")
    assert (found.errors, found.error) == (0, ""), found.output
    assert found.complete, found.output
    # A model that cannot move is never wrong. So every statement is reached but for the end of what never ends, and
    # on aarch64 for the loads of payloads that were done too early (twice with leases): the fences prevent them.
    too_early = ["D_STEP"] * (2 if "ARENA" in flags else 1) if processor == "WEAK" else []
    unreached = {process: statements for process, statements in found.unreached.items() if statements}
    expected = {"proctype memory": ["-end-"], "proctype reader": too_early}
    assert unreached == {process: statements for process, statements in expected.items() if statements}, found.output


@pytest.mark.parametrize(
    ("mutant", "flags", "processor", "error"),
    [
        pytest.param(mutant, flags, processor, error, id=f"{mutant}-{processor}-{flags}".replace("-D", ""))
        for mutant, flags, processors, error in MUTANTS
        for processor in processors
    ],
)
def test_mutant_is_found(mutant: str, flags: str, processor: str, error: str | None, tmp_path: Path) -> None:
    found = search(tmp_path, f"-D{processor} -DMUT_{mutant} {flags}", "-O0")
    assert found.errors == 1, found.output
    assert error is None or found.error.startswith(error), found.output


def test_every_mutant_of_the_model_is_tried() -> None:
    there = set(re.findall(r"\bMUT_(\w+)", "".join(path.read_text() for path in MODEL.glob("*.pml"))))
    listed = set(re.findall(r"`([A-Z_]+)`", (MODEL / "README.md").read_text().partition("## Mutants")[2]))
    assert {mutant for mutant, *_ in MUTANTS} == there == listed


def test_model_and_package_name_the_same_sync_points() -> None:
    def names(paths: list[Path]) -> set[str]:
        return {n for path in paths for n in re.findall(r"SYNC POINT: (\w+ before \w+)", path.read_text())}

    assert names([MODEL / "ring.pml"]) == names(sorted(PACKAGE.rglob("*.py")))

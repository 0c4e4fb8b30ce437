"""The Promela models of queue and node exchange: Spin finds nothing wrong with them, and what is wrong in mutants.

Every configuration is searched to the end, for x86-64 (TSO) and aarch64 (WEAK); tests/model/README.md says what is in
them.
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

# of ring.pml
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
MISSED = "assertion violated"  # a reader has not got all that was published; a rank fails, or finds a wrong `what`
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

# of exchange.pml
EXCHANGE_CLEAN = {
    "2 ranks": "-DSTEPS=6",
    "2 ranks, what they do": "-DWHATS -DSTEPS=5",
    "2 ranks, one leaves": "-DLEAVE",
    "2 ranks, one dies": "-DKILL=0 -DSTEPS=3 -DMENU=25",
    "2 ranks, released": "-DRELEASE -DSTEPS=3 -DMENU=25",
    "3 ranks": "-DRANKS=3 -DSTEPS=3 -DMENU=1",
    "3 ranks, broadcasts": "-DRANKS=3 -DMENU=8",
    "3 ranks, one dies": "-DRANKS=3 -DKILL=0 -DSTEPS=1 -DMENU=9",
}
EXCHANGE_ON_ONE = {"3 ranks, one dies": ("TSO",)}  # too many states on aarch64

EXCHANGE_MUTANTS = [
    ("NO_PAYLOAD_FENCE", "", AARCH64, STALE),
    ("NO_PAYLOAD_FENCE", "-DWHATS -DMENU=4", AARCH64, MISSED),
    ("ARRIVED_BEFORE_PAYLOAD", "", BOTH, STALE),
    ("NO_ARRIVED_FENCE", "", AARCH64, ASLEEP),
    ("NO_ARRIVED_FENCE", "-DLEAVE -DSTEPS=2 -DMENU=8", AARCH64, ASLEEP),
    ("WAKE_SAME_WORD", "", BOTH, ASLEEP),
    ("STATE_BEFORE_WORD", "", BOTH, ASLEEP),
    ("NO_READS_FENCE", "", AARCH64, OVERWRITTEN),
    ("ARRIVAL_BEFORE_READS", "", BOTH, OVERWRITTEN),
    ("NO_AWAIT_READERS", "", BOTH, OVERWRITTEN),
    ("ONE_AREA", "", BOTH, OVERWRITTEN),
    ("TWO_WHATS", "-DWHATS", BOTH, MISSED),
    ("RING_BEFORE_OVER", "-DKILL=0 -DSTEPS=3", BOTH, ASLEEP),
    ("NO_LOOK_AGAIN", "-DLEAVE -DSTEPS=3", BOTH, MISSED),
    ("NO_LAST_FENCE", "-DKILL=0 -DSTEPS=2", AARCH64, MISSED),
]

# Changes that do no harm: what x86-64's order makes so, and either of two fences.
EXCHANGE_HARMLESS = [
    ("TSO", "-DMUT_NO_PAYLOAD_FENCE"),
    ("TSO", "-DMUT_NO_ARRIVED_FENCE"),
    ("TSO", "-DMUT_NO_READS_FENCE"),
    ("TSO", "-DMUT_NO_LAST_FENCE -DKILL=0 -DSTEPS=2"),
    ("WEAK", "-DONLY_READERS_FENCE"),
    ("WEAK", "-DONLY_WRITERS_FENCE"),
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


def search(model: str, where: Path, flags: str, optimise: str) -> Search:
    """All of the configuration's states, or those up to the first error."""
    require_spin()
    run(where, "spin", *flags.split(), "-a", str(MODEL / model))
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
    found = search("ring.pml", tmp_path, flags, "-O1")
    assert (found.errors, found.error) == (0, ""), found.output
    assert found.complete, found.output
    # A model that cannot move is never wrong. So every statement is reached but for the end of what never ends, and
    # on aarch64 for the loads of payloads that were done too early (twice with leases): the fences prevent them.
    too_early = ["D_STEP"] * (2 if "ARENA" in flags else 1) if processor == "WEAK" else []
    unreached = {process: statements for process, statements in found.unreached.items() if statements}
    expected = {"proctype memory": ["-end-"], "proctype reader": too_early}
    assert unreached == {process: statements for process, statements in expected.items() if statements}, found.output


@pytest.mark.parametrize(
    ("name", "processor"),
    [(name, processor) for name in EXCHANGE_CLEAN for processor in EXCHANGE_ON_ONE.get(name, BOTH)],
)
def test_nothing_is_wrong_with_the_exchange(name: str, processor: str, tmp_path: Path) -> None:
    flags = f"-D{processor} {EXCHANGE_CLEAN[name]}"
    found = search("exchange.pml", tmp_path, flags, "-O1")
    assert (found.errors, found.error) == (0, ""), found.output
    assert found.complete, found.output
    # Whatever a rank can do is done, where the configuration has all steps to choose from.
    if "MENU" not in flags:
        unreached = [text for text in found.unreached.get("proctype rank", []) if text != "D_STEP"]
        assert unreached == [], found.output


@pytest.mark.parametrize(("processor", "flags"), EXCHANGE_HARMLESS)
def test_this_does_no_harm_to_the_exchange(processor: str, flags: str, tmp_path: Path) -> None:
    found = search("exchange.pml", tmp_path, f"-D{processor} {flags}", "-O0")
    assert found.errors == 0, found.output
    assert found.complete, found.output


@pytest.mark.parametrize(
    ("model", "mutant", "flags", "processor", "error"),
    [
        pytest.param(
            model, mutant, flags, processor, error, id=f"{start}{mutant}-{processor}-{flags}".replace("-D", "")
        )
        for model, start, mutants in (("ring.pml", "", MUTANTS), ("exchange.pml", "exchange-", EXCHANGE_MUTANTS))
        for mutant, flags, processors, error in mutants
        for processor in processors
    ],
)
def test_mutant_is_found(
    model: str, mutant: str, flags: str, processor: str, error: str | None, tmp_path: Path
) -> None:
    found = search(model, tmp_path, f"-D{processor} -DMUT_{mutant} {flags}", "-O0")
    assert found.errors == 1, found.output
    assert error is None or found.error.startswith(error), found.output


def test_every_mutant_of_the_model_is_tried() -> None:
    there = set(re.findall(r"\bMUT_(\w+)", "".join(path.read_text() for path in MODEL.glob("*.pml"))))
    rows = re.findall(r"^\| (`[A-Z_]+`.*?) \|", (MODEL / "README.md").read_text(), re.MULTILINE)
    listed = {mutant for row in rows for mutant in re.findall(r"`([A-Z_]+)`", row)}
    assert {mutant for mutant, *_ in [*MUTANTS, *EXCHANGE_MUTANTS]} == there == listed


def test_models_and_package_name_the_same_sync_points() -> None:
    def names(paths: list[Path]) -> set[str]:
        return {n for path in paths for n in re.findall(r"SYNC POINT: (\w+ before \w+)", path.read_text())}

    assert names([MODEL / "ring.pml", MODEL / "exchange.pml"]) == names(sorted(PACKAGE.rglob("*.py")))

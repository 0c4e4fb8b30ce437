"""The command line, ``ray-shm``. Runs in a driver's process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_shm.actors.bench_report import BenchReport

# Ray, torch and what measures take a second to import: --help must not. So every command imports its own.


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``ray-shm``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ray-shm", description="Call a group of Ray actors through shared memory.")
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="measure calls on this machine, beside their peers")
    kinds = bench.add_subparsers(dest="kind", required=True)
    _add_rpc(kinds.add_parser("rpc", help="collective_rpc beside Ray calls, a compiled graph and Monarch"))
    _add_queue(kinds.add_parser("queue", help="MessageQueue beside pyzmq, pipes, iceoryx2 and a memcpy; needs no Ray"))
    _add_groups(kinds.add_parser("groups", help="coordinator groups beside torch.distributed; needs no Ray"))
    options = parser.parse_args(argv)
    run = {"rpc": _bench_rpc, "queue": _bench_queue, "groups": _bench_groups}[options.kind]
    return run(options)


def _run(report: BenchReport[Any, Any], measure: Callable[[], object], *errors: type[Exception]) -> int:
    """The exit status. Prints what was measured, whatever ends it; `errors` are told in a line."""
    try:
        measure()
    except KeyboardInterrupt:
        print(f"ray-shm bench {report.bench}: interrupted", file=sys.stderr)
        return 130
    except errors as exc:
        print(f"ray-shm bench {report.bench}: {exc}", file=sys.stderr)
        return 1
    finally:
        report.finish()
    return 0


def _add_common(bench: argparse.ArgumentParser, calls: int, seconds: str) -> None:
    """Args: calls: the default. seconds: of what, and the default."""
    bench.add_argument("--calls", type=_positive, metavar="N", help=f"for each row at most (default: {calls})")
    bench.add_argument("--seconds", type=float, help=f"for each {seconds}")
    bench.add_argument("--json", action="store_true", help="JSON lines: the machine, then a line per row as it is done")


# ---- bench rpc ----------------------------------------------------------------------------------------------------


def _add_rpc(rpc: argparse.ArgumentParser) -> None:
    sections = ("noop", "paced", "hog", "pipelined", "sizes", "kill", "launch")
    rpc.add_argument("--only", choices=sections, nargs="+", metavar="SECTION", help=f"of {' '.join(sections)}")
    rpc.add_argument("--workers", type=_positive, nargs="+", metavar="N", help="of noop (default: 1 2 4 8)")
    rpc.add_argument("--full", action="store_true", help="noop with 16 and 32 workers, too: takes a process for each")
    rpc.add_argument("--payload", type=_size, nargs="+", metavar="SIZE", help="of sizes, such as 100B, 1MiB or 256MiB")
    rpc.add_argument("--kills", type=_positive, metavar="N", help="of each peer (default: 20)")
    rpc.add_argument("--quick", action="store_true", help="2 workers, every section for a moment: checks that it works")
    _add_common(rpc, 2000, "row of calls, about (default: 4)")


def _bench_rpc(options: argparse.Namespace) -> int:
    from ray.exceptions import RayError

    from ray_shm.actors.rpc_bench import FULL_WORKERS, QUICK, Plan, bench_rpc
    from ray_shm.actors.rpc_report import Report
    from ray_shm.errors import RayShmError

    asked = {"sections": options.only, "workers": options.workers or (FULL_WORKERS if options.full else None)}
    asked |= {"payloads": options.payload, "calls": options.calls, "seconds": options.seconds, "kills": options.kills}
    plan = Plan(**(QUICK if options.quick else {}) | {name: value for name, value in asked.items() if value})
    report = Report(options.json, plan.notes)
    return _run(report, lambda: bench_rpc(plan, report), RayShmError, RayError)


# ---- bench queue --------------------------------------------------------------------------------------------------


def _add_queue(queue: argparse.ArgumentParser) -> None:
    queue.add_argument("--readers", type=_positive, nargs="+", metavar="N", help="(default: 1 2 4 8)")
    queue.add_argument(
        "--payload",
        type=_size,
        nargs="+",
        metavar="SIZE",
        help='such as 100B 4KiB 64KiB 1MiB 16MiB 256MiB (the default) or 1GiB; "bytes" up to 1 KiB, else a NumPy array',
    )
    queue.add_argument("--channel", choices=["shm", "zmq"], nargs="+", help="of ours (default: both)")
    queue.add_argument("--touch", action="store_true", help="every reader sums all of the payload before it replies")
    queue.add_argument(
        "--quick", action="store_true", help="1 and 2 readers, 100B and 1MiB, 50 calls: checks that it works"
    )
    _add_common(queue, 2000, "number of readers and payload, about (default: 6)")
    queue.add_argument("--plot", metavar="FILE.png", help="draw p50 over payload, too (needs matplotlib)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _size(text: str) -> int:
    from ray_shm.actors.bench_report import parse_size

    try:
        return parse_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 100B, 64KiB, 1MiB or 1GiB") from exc


def _bench_queue(options: argparse.Namespace) -> int:
    from ray_shm.actors.bench_workers import BenchError
    from ray_shm.actors.queue_bench import QUICK, Ladder, bench_queue
    from ray_shm.actors.queue_report import Report, plot, require_plot
    from ray_shm.errors import RayShmError

    asked = {"readers": options.readers, "payloads": options.payload, "channels": options.channel}
    asked |= {"calls": options.calls, "seconds": options.seconds, "touch": options.touch}
    ladder = Ladder(**(QUICK if options.quick else {}) | {name: value for name, value in asked.items() if value})
    report = Report(options.json, ladder.warm_up_text, ladder.touch)

    def measure() -> None:
        if options.plot:
            require_plot()
        bench_queue(ladder, report)

    status = _run(report, measure, BenchError, RayShmError, ModuleNotFoundError)
    if options.plot and status == 0:
        plot(report.rows, options.plot)
    return status


# ---- bench groups -------------------------------------------------------------------------------------------------


def _add_groups(groups: argparse.ArgumentParser) -> None:
    tensors = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "gather", "barrier", "send/recv")
    operations = (*tensors, "broadcast_object", "broadcast_objects", "broadcast_tensor_dict")
    groups.add_argument("--only", choices=operations, nargs="+", metavar="OPERATION", help=f"of {' '.join(operations)}")
    groups.add_argument("--ranks", type=_ranks, nargs="+", metavar="N", help="(default: 2 3 4)")
    groups.add_argument("--payload", type=_size, nargs="+", metavar="SIZE", help="of each rank, such as 64KiB")
    groups.add_argument("--quick", action="store_true", help="2 ranks, one size, 12 calls: checks that it works")
    _add_common(groups, 500, "row, about (default: 1)")


def _ranks(text: str) -> int:
    number = _positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError("a group of one has nobody to exchange with; give 2 or more")
    return number


def _bench_groups(options: argparse.Namespace) -> int:
    from ray_shm.actors.bench_workers import BenchError
    from ray_shm.actors.groups_bench import QUICK, Plan, bench_groups
    from ray_shm.actors.groups_report import Report

    asked = {"operations": options.only, "ranks": options.ranks, "payloads": options.payload}
    asked |= {"calls": options.calls, "seconds": options.seconds}
    plan = Plan(**(QUICK if options.quick else {}) | {name: value for name, value in asked.items() if value})
    report = Report(options.json, plan.notes)
    return _run(report, lambda: bench_groups(plan, report), BenchError)

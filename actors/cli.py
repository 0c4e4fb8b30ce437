"""The command line, ``ray-shm``. Runs in a driver's process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

# Ray, torch and what measures take a second to import: --help must not. So every command imports its own.


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``ray-shm``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ray-shm", description="Call a group of Ray actors through shared memory.")
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="measure calls on this machine, beside their peers")
    kinds = bench.add_subparsers(dest="kind", required=True)
    _add_rpc(kinds.add_parser("rpc", help="no-op collective_rpc beside Ray calls and a compiled graph"))
    _add_queue(kinds.add_parser("queue", help="MessageQueue beside pyzmq, pipes, iceoryx2 and a memcpy; needs no Ray"))
    options = parser.parse_args(argv)
    run = {"rpc": _bench_rpc, "queue": _bench_queue}[options.kind]
    return run(options)


# ---- bench rpc ----------------------------------------------------------------------------------------------------


def _add_rpc(rpc: argparse.ArgumentParser) -> None:
    rpc.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    rpc.add_argument("--calls", type=int, default=2000, metavar="N", help="calls for each row (default: 2000)")
    rpc.add_argument("--quick", action="store_true", help="1 and 2 workers, 200 calls: checks that it works")
    rpc.add_argument("--json", action="store_true", help="one JSON object per row")


def _bench_rpc(options: argparse.Namespace) -> int:
    from ray_shm.actors.rpc_bench import bench_rpc

    workers, calls = ([1, 2], 200) if options.quick else (options.workers, options.calls)
    bench_rpc(workers, calls, options.json)
    return 0


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
    queue.add_argument("--calls", type=_positive, metavar="N", help="for each row at most (default: 2000)")
    queue.add_argument("--seconds", type=float, help="for each number of readers and payload, about (default: 6)")
    queue.add_argument("--touch", action="store_true", help="every reader sums all of the payload before it replies")
    queue.add_argument(
        "--quick", action="store_true", help="1 and 2 readers, 100B and 1MiB, 50 calls: checks that it works"
    )
    queue.add_argument("--json", action="store_true", help="JSON lines: the machine, then a line per row as it is done")
    queue.add_argument("--plot", metavar="FILE.png", help="draw p50 over payload, too (needs matplotlib)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _size(text: str) -> int:
    from ray_shm.actors.queue_report import parse_size

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
    try:
        if options.plot:
            require_plot()
        bench_queue(ladder, report)
    except KeyboardInterrupt:
        print("ray-shm bench queue: interrupted", file=sys.stderr)
        return 130
    except (BenchError, RayShmError, ModuleNotFoundError) as exc:
        print(f"ray-shm bench queue: {exc}", file=sys.stderr)
        return 1
    finally:
        report.finish()
    if options.plot:
        plot(report.rows, options.plot)
    return 0

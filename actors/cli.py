"""The command line, ``ray-shm``. Runs in a driver's process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``ray-shm``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ray-shm", description="Call a group of Ray actors through shared memory.")
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="measure calls on this machine, beside their peers")
    kinds = bench.add_subparsers(dest="kind", required=True)
    rpc = kinds.add_parser("rpc", help="no-op collective_rpc beside Ray calls and a compiled graph")
    rpc.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    rpc.add_argument("--calls", type=int, default=2000, metavar="N", help="calls for each row (default: 2000)")
    rpc.add_argument("--quick", action="store_true", help="1 and 2 workers, 200 calls: checks that it works")
    rpc.add_argument("--json", action="store_true", help="one JSON object per row")
    options = parser.parse_args(argv)
    return _bench_rpc(options)


def _bench_rpc(options: argparse.Namespace) -> int:
    from ray_shm.actors.bench import bench_rpc  # Ray takes a second to import: --help must not

    workers, calls = ([1, 2], 200) if options.quick else (options.workers, options.calls)
    bench_rpc(workers, calls, options.json)
    return 0

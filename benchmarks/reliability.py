"""What nothing can break: the long runs behind docs/reliability.md.

    python -m benchmarks.reliability kills                    # every command that writes, killed at every call
    python -m benchmarks.reliability kills extract svm --most 20   # some, at 20 calls each
    python -m benchmarks.reliability mutations 2000           # of each kind of file that is read

Exit status: 1 where something failed, which is named.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def kills(chosen: list[str], most: int | None, halves: bool, listed: bool) -> int:
    from benchmarks.kills import JOBS, preloaded, prepare, sweep

    if unknown := sorted(set(chosen) - JOBS.keys()):
        sys.exit(f"there is no {unknown[0]}: {', '.join(JOBS)}")
    folder = os.environ.get("KILLS_FOLDER")
    if folder is None:
        return preloaded(sys.argv[1:])
    prepare()
    failed = False
    print(f"{'command':20} {'calls':>6} {'kills':>6} {'ended before':>13} {'failures':>9}", flush=True)
    for swept in sweep(chosen or list(JOBS), most, halves, listed, Path(folder) / "room"):
        counts = f"{swept.calls:6} {swept.kills:6} {swept.missed:13} {len(swept.faults):9}"
        print(f"{swept.name:20} {counts}", *swept.faults, sep="\n    ", flush=True)
        failed |= bool(swept.faults)
    return int(failed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("kills")
    one.add_argument("names", nargs="*", metavar="COMMAND", help="default: all")
    one.add_argument("--most", type=int, help="kills of each command, spread over its calls; default: all")
    one.add_argument("--halves", action="store_true", help="also amidst each write, half of it done")
    one.add_argument("--list", action="store_true", help="also the calls of an undisturbed run")
    options = parser.parse_args()
    sys.exit(kills(options.names, options.most, options.halves, options.list))


if __name__ == "__main__":
    main()

"""What nothing can break: the long runs behind docs/reliability.md.

    python -m benchmarks.reliability kills         # every command that writes, killed at every call
    python -m benchmarks.reliability kills extract svm --most 20  # some, at 20 calls each
    python -m benchmarks.reliability mutations 2000              # of each kind of file that is read

Exit status: 1 where something failed, which is named.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.kills import Room, Sweep, preloaded, prepare


def kills(room: Room, options: argparse.Namespace) -> bool:
    """Whether all kills were survived."""
    from benchmarks.writing import JOBS, Inputs

    if unknown := sorted(set(options.names) - JOBS.keys()):
        sys.exit(f"there is no {unknown[0]}: {', '.join(JOBS)}")
    inputs, sound = Inputs(room), True
    print(
        f"{'command':20} {'calls':>6} {'kills':>6} {'ended before':>13} {'failures':>9}", flush=True
    )
    for name in options.names or JOBS:
        sweep = Sweep(room, JOBS[name](inputs))
        for rank, calls in enumerate(sweep.calls if options.list else []):
            for n, (call, size) in enumerate(calls, 1):
                print(rank, n, call.replace(str(sweep.whole), "."), size, flush=True)
        found = [sweep.fault(*point) for point in sweep.points(options.most, options.halves)]
        faults = [fault for fault in found if fault]
        missed = found.count(None)
        counts = (
            f"{sum(map(len, sweep.calls)):6} {len(found) - missed:6} {missed:13} {len(faults):9}"
        )
        print(f"{name:20} {counts}", *faults, sep="\n    ", flush=True)
        sound &= not faults
    return sound


def mutations(room: Room, options: argparse.Namespace) -> bool:
    """Whether all mutations were read or refused within the bound."""
    from benchmarks.mutations import count, kinds
    from benchmarks.writing import Inputs

    outcomes, sound = ("read", "refused", "other error", "hang", "crash"), True
    print(
        f"{'kind':13}",
        *(f"{name:>11}" for name in outcomes),
        f"{'peak, MiB':>10} {'bound':>6}",
        flush=True,
    )
    for kind in kinds(Inputs(room)):
        if options.names and kind.name not in options.names:
            continue
        counted = count(kind, options.number, room.folder / f"mutations-{kind.name}")
        numbers = (f"{counted.counts[name]:11}" for name in outcomes)
        print(
            f"{kind.name:13}",
            *numbers,
            f"{counted.peak >> 20:10} {counted.bound >> 20:6}",
            flush=True,
        )
        for fault in counted.faults[:40]:
            print(f"    {fault}", flush=True)
        sound &= not counted.faults
    return sound


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("kills")
    one.add_argument("names", nargs="*", metavar="COMMAND", help="default: all")
    one.add_argument("--most", type=int, help="kills of each command, drawn from all")
    one.add_argument(
        "--halves", action="store_true", help="also amidst each write, half of it done"
    )
    one.add_argument("--list", action="store_true", help="also the calls of an undisturbed run")
    one.set_defaults(run=kills)
    other = commands.add_parser("mutations")
    other.add_argument("number", type=int, help="of each kind of file")
    other.add_argument("names", nargs="*", metavar="KIND", help="default: all")
    other.set_defaults(run=mutations)
    options = parser.parse_args()
    folder = os.environ.get("KILLS_FOLDER")
    if folder is None:
        sys.exit(preloaded(sys.argv[1:]))
    prepare()
    sys.exit(0 if options.run(Room(Path(folder) / "room"), options) else 1)


if __name__ == "__main__":
    main()

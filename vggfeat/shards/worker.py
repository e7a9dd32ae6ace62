"""A process that describes shards for whoever tells it which, a number a line.

    python -m vggfeat.shards.worker SET --device cpu --threads 2

It says "ready", or why it refuses, and then answers each line with one of JSON: what `Facts` has,
or what `Failed` has. An image can end it (a decoder's fault, memory): then the line doesn't come,
and another process tries. A shard that three have begun is described in a process of its own; where
that ends, too, its images are tried by halves in others (`killers`), and those that end them by
themselves are marked.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes time
    from vggfeat.start import begin

    begin("vggfeat.shards.worker")

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from vggfeat.errors import VggfeatError, reason
from vggfeat.place import Place, place_of
from vggfeat.shards.engines.failed import ATTEMPTS, Failed
from vggfeat.shards.plan import Plan, read_plan
from vggfeat.shards.shard import (
    Facts,
    already,
    content_of,
    describe_rows,
    describe_shard,
    refuse_other_worker,
    rows_of,
)
from vggfeat.weights import Network

_FROM_WITHOUT = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # no image does that
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Work:
    """How a process describes. where: the set. device: as `load` takes it. threads: that read
    images. weights: where they lie, if not where the plan has them; "" there.
    """

    where: str
    device: str = "auto"
    threads: int = 2
    batch_size: int = 0
    weights: str = ""

    def words(self) -> list[str]:
        """Of a command line."""
        given = {
            "--device": self.device,
            "--threads": self.threads,
            "--batch-size": self.batch_size,
            "--weights": self.weights,
        }
        options = [f"{option}={value}" for option, value in given.items() if value]
        return [sys.executable, "-m", "vggfeat.shards.worker", self.where, *options]


def loaded(work: Work) -> tuple[Place, Plan, Network]:
    """What a worker needs, once. Raises VggfeatError where it would describe otherwise."""
    import torch

    from vggfeat.describe import network_of

    torch.set_num_threads(work.threads)
    place = place_of(work.where)
    plan = read_plan(place)
    network = network_of(plan.description, work.weights or None, work.device)
    refuse_other_worker(plan, network)
    return place, plan, network


def attempt(place: Place, plan: Plan, network: Network, k: int, work: Work) -> Facts:
    """Describe shard k, and tell before that it was begun; see the top. Raises VggfeatError."""
    if (there := already(place, k)) is not None:
        return there
    begun = 0
    while place.size(f"attempts/{k:05d}.{begun}") is not None:
        begun += 1
    bad: dict[int, str] = {}
    if begun < ATTEMPTS:
        place.put_new(f"attempts/{k:05d}.{begun}", b"")
    else:
        # others may be at it just now, or were ended from without: a process of its own tells
        ended = _alone(work, f"--alone={k}")
        if isinstance(ended, Facts):
            return ended
        bad = killers(place, plan, k, work)
    return describe_shard(
        place,
        plan,
        network,
        k,
        workers=work.threads,
        batch_size=work.batch_size or None,
        known_bad=bad,
    )


def tried(k: int, describe: Callable[[], Facts]) -> Facts | Failed:
    """What comes of describing shard k, or why it failed."""
    try:
        return describe()
    except VggfeatError as error:
        return Failed(k, str(error), False)
    except Exception as error:  # whatever it is, it is this shard's alone
        return Failed(k, f"{type(error).__name__}: {reason(error)}", False)


def killers(place: Place, plan: Plan, k: int, work: Work) -> dict[int, str]:
    """Row of shard k -> how it ends the process that describes it. Raises VggfeatError where a
    process fails otherwise, or where one that reads no image ends, too.
    """
    nothing = _alone(work, f"--probe={k}:0:0")
    if isinstance(nothing, str):
        raise VggfeatError(
            f"a process that reads no image ends, too ({nothing}): see whether this machine has"
            " memory left"
        )
    found: dict[int, str] = {}
    todo = [(0, rows_of(place, plan, k))]
    while todo:
        start, stop = todo.pop()
        ended = _alone(work, f"--probe={k}:{start}:{stop}")
        if isinstance(ended, Facts):
            continue
        if stop - start == 1:
            found[start] = f"it ends the process that reads it ({ended})"
        else:
            middle = (start + stop) // 2
            todo += [(middle, stop), (start, middle)]
    return found


def _alone(work: Work, task: str) -> Facts | str:
    """What comes of a task in a process of its own, or how that ended. Raises VggfeatError where it
    failed, or was ended from without.
    """
    ended = subprocess.run([*work.words(), task], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    if ended.stdout.endswith(b"\n"):
        answer = json.loads(ended.stdout)
        if "why" in answer:
            raise VggfeatError(answer["why"])
        return Facts(**answer)
    number = -ended.returncode if ended.returncode < 0 else ended.returncode - 128
    if number in _FROM_WITHOUT:
        raise VggfeatError(f"a process was ended by {signal.Signals(number).name}")
    return _ending(ended.returncode)


def _ending(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="vggfeat.shards.worker", description=__doc__)
    parser.add_argument("where")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=0)
    parser.add_argument("--weights", default="")
    parser.add_argument("--alone", type=int, help="a shard, whoever has begun it")
    parser.add_argument("--probe", help="SHARD:START:STOP, described and not put")
    options = parser.parse_args(words)
    alone, probe = options.alone, options.probe
    del options.alone, options.probe
    work = Work(**vars(options))
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer

        def answer(content: object) -> None:
            answers.write(json.dumps(content) + "\n")
            answers.flush()

        try:
            if alone is None and probe is None:
                _serve(work, answer)
            else:
                _end_with_parent()
                answer(asdict(_task(work, alone, probe)))
        except BrokenPipeError:  # who asked has ended
            os._exit(1)


def _serve(work: Work, answer: Callable[[object], None]) -> None:
    try:
        its = loaded(work)
    except VggfeatError as error:
        answer(asdict(Failed(-1, str(error), True)))
        return
    answer("ready")
    for line in sys.stdin:
        k = int(line)
        answer(asdict(tried(k, lambda: attempt(*its, k, work))))  # noqa: B023


def _task(work: Work, alone: int | None, probe: str | None) -> Facts | Failed:
    """A shard that is described and put, or some of one's rows that are described."""
    k, *part = [alone] if alone is not None else map(int, (probe or "").split(":"))

    def described() -> Facts:
        place, plan, network = loaded(work)
        n, size = work.threads, work.batch_size or None
        if not part:
            return describe_shard(place, plan, network, k, workers=n, batch_size=size)
        its = content_of(place, plan, k, range(*part))
        describe_rows(its.items, plan, network, workers=n, batch_size=size, known_bad=its.reasons)
        return Facts(k, len(its.items), 0, 0.0, put=False)

    return tried(k, described)


def _end_with_parent() -> None:
    """Nobody waits for this process when who started it has ended: it would only hold a device."""
    with suppress(AttributeError, OSError):  # of Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Files of every kind that is read, changed at random, and what reading them takes and says.

A mutation overwrites some bytes, cuts the end off, puts another number into the table of contents,
or changes what a container holds and gives it the right checksums again, as a stranger would. It is
read in a child with a limit of memory, whose processor time counts, so that a busy machine makes no
hang.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import signal
import struct
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

import vggfeat
from benchmarks.writing import WEIGHTS, Inputs, evaluate, training
from pretrain.checkpoint import load_checkpoint, read_state
from pretrain.init import weight_layers
from pretrain.kept import KeptPosteriors
from tests.test_fuzz import LISTED, search
from tests.vggfeat.test_caffe import caffemodel
from tests.vggfeat.test_hdf5 import reseal
from tests.vggfeat.test_tensors import MOMENTUM, arrays_of
from vggfeat import datasets
from vggfeat.describe import description_of
from vggfeat.errors import VggfeatError
from vggfeat.hdf5 import MAGIC
from vggfeat.model import open_model
from vggfeat.versions import versions
from vggfeat.writer import FeatureWriter

MEMORY = 1 << 30
"""Bytes of address space that a child has in addition to what it begins with."""
SECONDS, PATIENCE = 20, 600
"""Of processor time for a file, and of the clock, after which it counts as a hang."""
TIMM = "test_efficientnet"
BATCH = 100  # files a child
ODD = (-1, 0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**53, 2**62, 2**63, 2**64, 10**30)


@dataclass(frozen=True)
class Kind:
    """A sound file, and what reads it."""

    name: str
    sample: Path
    read: Callable[[Path], Any]


def kinds(inputs: Inputs) -> Iterator[Kind]:
    """All that there are."""
    yield Kind("features", inputs.features, lambda path: vggfeat.open_features(path).descriptors)
    yield Kind("half-written", inputs.begun, _going_on(inputs.images))
    yield Kind("model", inputs.model[0], open_model)
    yield Kind("index", LISTED, search)
    yield Kind("posteriors", inputs.made(evaluate(inputs), "p.h5")[0], KeptPosteriors.read)
    stage = inputs.made(training(inputs), "run/A-36")[0]
    weights = stage / "weights.safetensors"
    yield Kind("checkpoint", stage / "last.safetensors", _checkpoint(weights))
    yield Kind("safetensors", weights, vggfeat.load)
    released = inputs.folder / "released.pth"
    # smaller than any whole net of Table 1
    torch.save(timm.create_model(TIMM).state_dict(), released)
    yield Kind("pth", released, lambda path: vggfeat.load(f"timm:{TIMM}@{path}"))
    checkpoint = inputs.folder / "checkpoint.ckpt"
    wrapped = {
        f"module.{key}": value for key, value in timm.create_model(TIMM).state_dict().items()
    }
    torch.save({"epoch": 1, "state_dict": wrapped, "optimizer": MOMENTUM}, checkpoint)
    yield Kind("ckpt", checkpoint, lambda path: vggfeat.load(f"timm:{TIMM}@{path}"))
    for name, old in (("caffemodel", False), ("caffe-2014", True)):
        caffe = inputs.folder / f"{name}.caffemodel"
        caffe.write_bytes(caffemodel(arrays_of(vggfeat.load(WEIGHTS).vgg()), old))
        yield Kind(name, caffe, vggfeat.load)


def _going_on(images: Path) -> Callable[[Path], Any]:
    items = datasets.load("folder", images)
    network = vggfeat.load(WEIGHTS, device="cpu", precision="float32")
    description, facts = description_of(network, None, (40, 48), True), {"versions": versions()}

    def read(path: Path) -> None:
        with FeatureWriter.open(
            path.with_suffix(""), items, description, network.dim("fc7"), "float32", facts
        ):
            pass

    return read


def _checkpoint(weights: Path) -> Callable[[Path], Any]:
    net: Any = vggfeat.load(weights, device="cpu", precision="float32").module.requires_grad_(True)
    parameters: list[Any] = [
        p for layer in weight_layers(net).values() for p in (layer.weight, layer.bias)
    ]
    optimiser = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    def read(path: Path) -> None:
        read_state(path)
        load_checkpoint(path, net, optimiser)

    return read


# --- mutations ------------------------------------------------------------------------------------


def mutate(raw: bytes, path: Path, seed: int) -> None:
    """Write the seed-th mutation of raw to path."""
    r = random.Random(seed)
    how = r.choice((_bytes, _bytes, _number, _inside))
    path.write_bytes(how(raw, r))
    if raw.startswith(MAGIC) and r.random() < 0.5:
        reseal(path)


def _bytes(raw: bytes, r: random.Random) -> bytes:
    """Some bytes changed, more of them at the front, where the structure is; or moved, or the end
    cut off.
    """
    made = bytearray(raw)
    for _ in range(r.randint(1, 6)):
        at = int(r.random() ** r.choice((1, 3)) * len(made))
        width, value = r.choice((1, 1, 2, 4, 8)), r.choice((0, 1, 0x7F, 0xFF, r.randrange(256)))
        made[at : at + width] = bytes([value]) * len(made[at : at + width])
        if r.random() < 0.2 and len(made) > 64:
            source = r.randrange(len(made) - 32)
            made[at : at + 32] = made[source : source + len(made[at : at + 32])]
    if r.random() < 0.15:
        del made[r.randrange(len(made)) :]
    return bytes(made)


def _number(raw: bytes, r: random.Random) -> bytes:
    """Another number, or another word, in the JSON that says where things lie; its length is right
    again.
    """
    if raw.startswith(MAGIC):
        length = struct.unpack_from("<I", raw, 8)[0]
        table = _other(raw[64 : 64 + length], r)
        behind = raw[64 + max(length, len(table)) :]
        padding = bytes(max(0, length - len(table)))
        return raw[:8] + struct.pack("<I", len(table)) + raw[12:64] + table + padding + behind
    if raw.startswith((b"PK", b"\n")):  # PyTorch's, Caffe's
        return _inside(raw, r)
    length = struct.unpack_from("<Q", raw)[0]
    header = _other(raw[8 : 8 + length], r)
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def _other(text: bytes, r: random.Random) -> bytes:
    found = list(
        re.finditer(rb"-?\d+(\.\d+)?", text)
        if r.random() < 0.8
        else re.finditer(rb"[A-Za-z_/.]+", text)
    )
    at = r.choice(found)
    odd: Any = r.choice(
        (*ODD, 0.5, float("nan"), float("inf"), [], {}, None, True, "x" * r.randint(0, 40), "../x")
    )
    return text[: at.start()] + json.dumps(odd).encode() + text[at.end() :]


def _inside(raw: bytes, r: random.Random) -> bytes:
    """The same of what a zip file holds, with right checksums; of other files, of one block."""
    if not raw.startswith(b"PK"):
        low = r.randrange(len(raw))
        high = min(len(raw), low + r.choice((64, 512, 4096)))
        return (
            raw[:low] + _bytes(raw[low:high], r)[: high - low].ljust(high - low, b"\0") + raw[high:]
        )
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(made, "w") as new:
        entries = old.namelist()
        pickled = [name for name in entries if name.endswith("data.pkl")]
        chosen = r.choice(pickled if r.random() < 0.7 else entries)
        for name in entries:
            content = old.read(name)
            new.writestr(name, _bytes(content, r) if name == chosen and content else content)
    return made.getvalue()


# --- reading them ---------------------------------------------------------------------------------


@dataclass
class Counted:
    """counts: outcome -> mutations. peak: bytes beside those of a child that has read the sound
    file.
    """

    name: str
    bound: int
    counts: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    faults: list[str] = field(default_factory=list)


def count(kind: Kind, number: int, folder: Path) -> Counted:
    """Read so many mutations."""
    raw = kind.sample.read_bytes()
    counted = Counted(kind.name, (64 << 20) + 16 * len(raw))
    folder.mkdir()
    path = folder / kind.sample.name
    seed = 0
    while seed < number:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reading)
            _child(kind, raw, path, range(seed, min(seed + BATCH, number)), writing)
        os.close(writing)
        with open(reading) as told:
            lines = [json.loads(line) for line in told if line.endswith("\n")]
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for at, outcome, grown in lines:
            counted.counts[outcome.split(":")[0]] += 1
            counted.peak = max(counted.peak, grown)
            if outcome not in ("read", "refused"):
                counted.faults.append(f"{at}: {outcome}")
            if grown > counted.bound:
                counted.faults.append(f"{at}: {outcome}, {grown >> 20} MiB")
        if status == 99:
            raise AssertionError(f"the sound file of {kind.name} can't be read, or not be changed")
        seed = lines[-1][0] + 1 if lines else seed
        if status:
            outcome = "hang" if status in (-signal.SIGPROF, -signal.SIGALRM) else "crash"
            counted.counts[outcome] += 1
            counted.faults.append(f"{seed}: {outcome}, status {status}")
            seed += 1
    return counted


def _child(kind: Kind, raw: bytes, path: Path, seeds: range, told: int) -> None:
    """Read mutations, a line of JSON for each, and exit."""
    try:
        path.write_bytes(raw)
        kind.read(path)
        before = _peak()
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for seed in seeds:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(PATIENCE)
            mutate(raw, path, seed)
            outcome = "read"
            try:
                kind.read(path)
            except VggfeatError as error:
                outcome = (
                    "refused" if "\n" not in str(error) else f"other error: several lines {error!r}"
                )
            except Exception as error:
                outcome = (
                    f"other error: {type(error).__name__} {' '.join(str(error).split())[:100]}"
                )
            os.write(told, (json.dumps([seed, outcome, _peak() - before]) + "\n").encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

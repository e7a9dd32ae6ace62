"""The net as a step runs it: what happens to a crop on its device, the arithmetic of that, and its
passes, on one process or many, compiled where the device can.

N images, C classes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.colour import Colours
from pretrain.init import learning_layers, weight_layers
from vggfeat.devices import PRECISIONS, device_failed, matrix_rate, out_of_memory
from vggfeat.errors import VggfeatError
from vggfeat.images import Preprocessing
from vggfeat.ranks import Ranks, telling_of_others
from vggfeat.terminal import say
from vggfeat.vgg import VGG

COMPILED = {"cpu": False, "cuda": True}
"""Whether a net is compiled where nothing else is asked for."""


class TrainingNet(nn.Module):
    """A net with what happens to a crop on the device before it, and with keyed dropout in it."""

    def __init__(self, net: VGG, colours: Colours, dropout: float, learn: str = "all") -> None:
        super().__init__()
        self.net = net
        self.preprocessing = Preprocessing(mean=cast(Any, colours.mean))
        self.register_buffer("components", torch.from_numpy(colours.components), persistent=False)
        self.register_buffer("bits", torch.arange(7, -1, -1, dtype=torch.uint8), persistent=False)
        self.dropout = dropout
        self.features_learn = learn == "all"
        learning = learning_layers(net, learn)
        for name, layer in weight_layers(net).items():
            layer.requires_grad_(name in learning)

    def forward(self, crops_NHWC: Tensor, alpha_N3: Tensor, kept: Tensor) -> Tensor:
        """Scores (N, C). kept: (N, bytes) bits as in `Batch`, or (N, 0): nothing is dropped."""
        net = self.net
        x_NCHW = self.preprocessing(crops_NHWC)
        x_NCHW = x_NCHW + (alpha_N3 @ cast(Tensor, self.components).float().T)[:, :, None, None]
        with nullcontext() if self.features_learn else torch.no_grad():
            pool5 = net.features(x_NCHW.to(cast(nn.Linear, net.classifier[0]).weight.dtype))
        x = torch.flatten(pool5, 1)
        keep = ((kept[:, :, None] >> cast(Tensor, self.bits)) & 1).flatten(1)
        start = 0
        for module in net.classifier:
            if not isinstance(module, nn.Dropout):
                x = module(x)
            elif kept.shape[1]:
                units = x.shape[1]
                # scaled here rather than halved at test time: the same net in expectation (Caffe's
                # way, too)
                x = x * (keep[:, start : start + units].to(x.dtype) / (1 - self.dropout))
                start += units
        return x


# --- arithmetic -----------------------------------------------------------------------------------


def passes(learn: str) -> int:
    """Forward passes that an image of training costs as much as: the backward pass multiplies
    twice, by the activations for the weights, by the weights for the activations.
    """
    return 3 if learn == "all" else 1


def forward_gflop(net: VGG) -> float:
    """Of one crop's scores."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        shadow = VGG(net.net, net.num_classes, net.width, net.crop)
        shadow.crop_scores(torch.empty(1, 3, net.crop, net.crop))
    return float(counter.get_total_flops()) / 1e9


def rate_of_device(device: torch.device, precision: str) -> float | None:
    """FLOP/s of a large matrix product, which training is held against; None in float64, where
    nobody asks for speed.
    """
    return matrix_rate(device, precision) if precision in PRECISIONS else None


# --- passes ---------------------------------------------------------------------------------------


def unfit(device: torch.device) -> str:
    """Why a GPU's nets can't be compiled, as far as it is known before that is tried; or ""."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named else ["gcc", "clang"])):
        return f"there is no C compiler: {f'$CC is {named}' if named else 'gcc or clang'}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton has no code for GPUs of that age"
    return ""


class _Forward(nn.Module):
    """A training net's forward pass, as it is or compiled for batches of one size; a batch that is
    smaller is filled up with black images, whose scores are left out.
    """

    def __init__(self, net: TrainingNet) -> None:
        super().__init__()
        self.net = net
        self.compiled: Callable[..., Tensor] | None = None
        self.size = 0

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.compiled is None:
            return cast(Tensor, self.net(*inputs))
        n = len(inputs[0])
        self.size = max(self.size, n)
        if n == self.size:
            return self.compiled(*inputs)
        more = self.size - n
        return self.compiled(*(torch.cat([x, x.new_zeros(more, *x.shape[1:])]) for x in inputs))[:n]


class Replica:
    """A training net in one of the processes that train it together.

    compiled: whether by torch.compile; None: where `COMPILED` says so and it can be done. It isn't
    before `compile` is called; until then it is `undecided` if it's to be.

    On several processes gradients are exchanged bucket by bucket (25 MB, PyTorch's size; fc6's is
    one of its own) while the rest of the backward pass goes on. It does so compiled, too: the net
    is compiled within DistributedDataParallel, whose bounds of buckets dynamo cuts it at.
    """

    def __init__(self, net: TrainingNet, ranks: Ranks, compiled: bool | None) -> None:
        self._forward, self._ranks, self._asked = _Forward(net), ranks, compiled
        self.undecided = COMPILED[ranks.device.type] if compiled is None else compiled
        self._module: nn.Module = self._forward
        if ranks.world > 1:
            device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            ranks.barrier()  # it waits for the others without a word
            with telling_of_others(), warnings.catch_warnings():
                # a later name of this argument isn't known to PyTorch 2.11
                warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
                self._module = DistributedDataParallel(
                    self._forward, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
                )

    def __call__(self, crops_NHWC: Tensor, alpha_N3: Tensor, kept: Tensor) -> Tensor:
        """As TrainingNet's forward pass."""
        return cast(Tensor, self._module(crops_NHWC, alpha_N3, kept))

    def train(self) -> None:
        self._module.train()

    def alone(self) -> AbstractContextManager[None]:
        """Inside, a backward pass adds to this process's gradients, and exchanges none."""
        if isinstance(self._module, DistributedDataParallel):
            return cast(AbstractContextManager[None], self._module.no_sync())
        return nullcontext()

    def compile(self, attempt: Callable[[], object]) -> float:
        """Compile, if it is undecided, by an attempt: a forward and backward pass of this process,
        whose gradients count nothing. Seconds that it took; 0.0 where there was nothing to do.

        All processes call it at once, and are compiled or not together. Where it can't be done that
        is a line, or VggfeatError if it was asked for.
        """
        if not self.undecided:
            return 0.0
        self.undecided = False
        why = "" if self._asked else unfit(self._ranks.device)
        began = time.monotonic()
        if not why:
            why = self._attempt(attempt)
        if self._ranks.sum([float(why != "")])[0]:
            self._forward.compiled = None
            why = next(filter(None, self._ranks.gather(why)))
            what = f"torch.compile can't be used here ({why})"
            if self._asked:
                raise VggfeatError(f"{what}: give `no_compile`")
            if self._ranks.first:
                say(f"{what}: the net runs uncompiled")
            return 0.0
        return time.monotonic() - began

    def _attempt(self, attempt: Callable[[], object]) -> str:
        """Compile by an attempt; why it can't be done, or "". What isn't the compiler's failure is
        raised.
        """
        # an earlier stage's net counts as another case of the same code, of which dynamo has eight
        torch._dynamo.reset()
        self._forward.compiled = torch.compile(self._forward.net.forward, dynamic=False)
        try:
            # the compiler's warnings are of its own matters
            with self.alone(), warnings.catch_warnings(action="ignore"):
                attempt()
        except Exception as error:
            # its stages raise what they like; if it isn't theirs, the first step meets it again
            met = getattr(error, "inner_exception", error)
            if isinstance(met, VggfeatError) or out_of_memory(met) or device_failed(met):
                raise met from None
            return _first_words(error)
        return ""


def _first_words(error: Exception) -> str:
    """Of a compiler's error, which may go on for pages; its first line only says whose it is."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith("backend=")]
    return told[0][:160] if told else type(error).__name__

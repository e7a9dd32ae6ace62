"""One step, one epoch, one stage of synchronous SGD (Sect. 3.1), on one process or many to the same
result.

N images, C classes. The batch of an iteration is split over the processes, and each part over
micro-batches where memory is short; every sample brings its own dropped units and colour shift, and
its loss is divided by the number of images in the whole batch, so that neither split changes the
gradient.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pretrain.checkpoint import State, load_checkpoint, read_state, save_checkpoint
from pretrain.colour import Colours
from pretrain.init import weight_layers
from pretrain.loader import Schedule, TrainingSet
from pretrain.objective import Errors, objective_of
from pretrain.readers import Batch, CentreCrops, Readers, ReadingFailed, Samples
from pretrain.recipe import LOCALISATION, OF_BOXES, SHALLOW, Past, Recipe
from pretrain.replica import Replica, TrainingNet, forward_gflop, passes, rate_of_device
from pretrain.watch import BEST, CHECKPOINT, WEIGHTS, Chance, Log, Stop, cant_write
from vggfeat.datasets.items import name_digest
from vggfeat.devices import device_failed, first_sentence, out_of_memory
from vggfeat.errors import VggfeatError
from vggfeat.files import try_each
from vggfeat.ranks import Ranks, telling_of_others
from vggfeat.terminal import say
from vggfeat.vgg import VGG
from vggfeat.weights import save_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Machine:
    """How a run uses its machine; which net comes out doesn't depend on it, but for rounding."""

    precision: str = "float32"
    """float32, bfloat16 (autocast: weights, gradients and momentum stay float32) or float64."""
    micro_batch: int = 256
    """Most images of a forward and backward pass of one process; gradients are accumulated over
    them.
    """
    workers: int = 2
    """Processes that read images, for each training process; 0 reads in the training process."""
    compile: bool | None = None
    """Compile the net by torch.compile; None: on a GPU, where it can be done."""
    checkpoint_seconds: float = 600.0
    """Seconds between checkpoints."""
    log_every: int = 20
    """Iterations between lines of the log."""


def hidden_units(net: VGG) -> int:
    """Units of fc6 and fc7 together."""
    return net.channels["fc6"] + net.channels["fc7"]


class Trainer:
    """A stage being trained.

    net: its starting weights, on any device. stage_number: its place in the chain, part of the
    samples' keys. from_random: whether the weights are untrained, for advice at chance. start:
    where from, for the record. history: the stages that the weights have been through.
    folder: where its files go; None for a trial, which is never `run`. readers: who reads its
    images. An interrupted stage of the same identity goes on from `folder / last.safetensors`.
    Raises VggfeatError: a checkpoint of another net, recipe, training set or start.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage_number: int,
        net: VGG,
        data: TrainingSet,
        colours: Colours,
        ranks: Ranks,
        machine: Machine,
        folder: Path | None,
        readers: Readers,
        *,
        from_random: bool = False,
        start: str = "",
        history: tuple[Past, ...] = (),
    ) -> None:
        if ranks.world > recipe.batch_size:
            raise VggfeatError(
                f"{ranks.world} processes share a batch of {recipe.batch_size}: start fewer"
            )
        self.recipe, self.stage = recipe, recipe.stages[stage_number]
        self.stage_number, self.data, self.colours = stage_number, data, colours
        self.ranks, self.machine, self.folder = ranks, machine, folder
        self.readers, self.from_random, self.history = readers, from_random, history
        self.objective = objective_of(self.stage, recipe, len(data.classes))
        labels = cast(np.ndarray, data.items.labels)
        self.chance = Chance.of_labels(labels[data.train], labels[data.held_out])
        # chance is a guess among classes: there is none of boxes
        watched = len(data.classes) > 1 and self.stage.task != LOCALISATION
        self.chance_after = recipe.chance_after if watched else 0
        self.per_epoch = len(data.train) // recipe.batch_size
        self.stop_at = self.stage.iterations_of(len(data.train), recipe.batch_size)
        dtype = torch.float64 if machine.precision == "float64" else torch.float32
        self.net = net.to(  # type: ignore[call-overload]
            device=ranks.device, dtype=dtype, memory_format=torch.channels_last
        )
        training_net = TrainingNet(self.net, colours, recipe.dropout, self.stage.learn)
        self.training_net = training_net.to(ranks.device)
        self.optimiser = optimiser(self.net, recipe, self.stage.learning_rate)
        self.state = State(learning_rate=self.stage.learning_rate)
        self.identity = self._identity(start)
        if folder is not None and (folder / CHECKPOINT).exists():
            self._resume(folder / CHECKPOINT)
        self.replica = Replica(self.training_net, ranks, machine.compile)
        self.reported: set[str] = set()
        self.refused: set[str] = set()  # files that a disk has refused, told already
        # this process's losses, not yet summed
        self.pending = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.flop = 1e9 * forward_gflop(net) * passes(self.stage.learn)  # of an image
        self.matrix_flops: float | None = None
        self._restart_clock()

    def _identity(self, start: str) -> dict[str, Any]:
        """What must be the same for a checkpoint to go on."""
        # the mean and covariance are told as they were measured; the net doesn't depend on when to
        # give up, nor on which other nets have this stage
        apart = {"stages", "name", "file", "stands_for", "mean", "covariance", "chance_after"}
        of_stage = {"nets"}
        if not self.recipe.new_classes:  # as it was before there was any
            apart.add("new_classes")
        boxes = {}
        if self.stage.task == LOCALISATION:
            boxes["set of boxes"] = self.data.boxes_digest()
        else:  # as it was before there were any
            apart |= {*OF_BOXES}
            of_stage |= {"task", "boxes", "from_random"}
        recipe = {k: v for k, v in asdict(self.recipe).items() if k not in apart}
        identity = {
            **recipe,
            **{k: v for k, v in asdict(self.stage).items() if k not in of_stage},
            **boxes,
            "classes": self.data.classes,
            "training images": len(self.data.train),
            "training set": self.colours.training_set,
            "mean": self.colours.mean,
            "covariance": self.colours.covariance,
            "start": start,
        }
        return cast(dict[str, Any], _plain(identity))

    def _resume(self, path: Path) -> None:
        state, made_with = read_state(path)
        for key, ours in self.identity.items():
            if key not in made_with:
                raise VggfeatError(
                    f"{path} doesn't say with which {key} it was made: give another `out`"
                )
            if made_with[key] != ours:
                theirs = str(made_with[key])[:60]
                if isinstance(ours, list | str) and len(str(ours)) > 60:
                    what = (
                        f"was made with another list of {key}"
                        if key == "classes"
                        else f"has another {key}"
                    )
                else:
                    what = f"was made with {key} {theirs}, now {ours}"
                of_images = key in ("training images", "training set")
                if key == "training images":
                    what += ", without those held out"
                # the stages that start from it are of the same images
                ways = "" if of_images else f", move {self.folder} away,"
                same = "bring the same images back" if of_images else "give the same"
                raise VggfeatError(f"{path} {what}: {same}{ways} or give another `out`")
        ends = {
            "iteration": self.stop_at,
            "drops": self.recipe.rate_drops,
            "logged": state.iteration,
            "at_chance": state.iteration,
        }
        for name, most in ends.items():
            if (value := getattr(state, name)) > most:
                raise VggfeatError(
                    f"{path}: its {name} is {value}, and {most} is the last: move it away to start"
                    " anew"
                )
        load_checkpoint(path, self.net, self.optimiser)
        if not self.chance_after:  # the run before may have watched
            state.at_chance = 0
        self.state = state

    @property
    def done(self) -> bool:
        """Whether an earlier run has finished the stage, its files included."""
        return self.state.finished and self._place(WEIGHTS).exists()

    # --- one step ---------------------------------------------------------------------------------

    def autocast(self) -> Any:
        """The context of a forward pass."""
        if self.machine.precision == "bfloat16":
            return torch.autocast(self.ranks.device.type, torch.bfloat16)
        return nullcontext()

    def step(self, batch: Batch, images: float) -> Tensor:
        """One iteration on this process's part of a batch of so many readable images; its share of
        the mean loss.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = self.state.learning_rate * group["rate_factor"]
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        pieces = list(self._pieces(batch))
        for i, piece in enumerate(pieces):
            with nullcontext() if i == len(pieces) - 1 else self.replica.alone():
                total += self._pass(piece, images)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return total

    def compile(self, batch: Batch, images: float) -> float:
        """Compile the net, where it's to be and isn't yet; seconds that it took, or 0.0. The
        arguments are those of the first `step`, which nothing is changed for.
        """
        if not self.replica.undecided:
            return 0.0
        piece = next(self._pieces(batch))
        seconds = self.replica.compile(lambda: float(self._pass(piece, images)))  # waits for a GPU
        self.optimiser.zero_grad(set_to_none=True)
        return seconds

    def _pass(self, piece: list[Tensor], images: float) -> Tensor:
        """Add a micro-batch's gradients; its share of the mean loss of so many images."""
        crops, alpha, kept, labels, counts, boxes = piece
        with self.autocast():
            scores = self.replica(crops, alpha, kept)
        if scores.dtype == torch.bfloat16:
            scores = scores.float()
        losses = self.objective.losses(scores, labels, boxes)
        loss = (losses * counts.to(losses.dtype)).sum() / images
        # times the processes, as DistributedDataParallel averages over them
        torch.autograd.backward(loss * self.ranks.world)
        return loss.detach()

    def _pieces(self, batch: Batch) -> Iterator[list[Tensor]]:
        """The batch in micro-batches of one size, but for the last, each on the device."""
        tensors = (
            *(batch.crops_NHWC, batch.alpha_N3, batch.kept, batch.labels, batch.counts),
            batch.boxes,
        )
        n = len(batch.labels)
        size = -(-n // -(-n // self.machine.micro_batch))
        for start in range(0, n, size):
            part = slice(start, start + size)
            yield [tensor[part].to(self.ranks.device, non_blocking=True) for tensor in tensors]

    # --- one stage --------------------------------------------------------------------------------

    def run(self, stop: Stop) -> bool:
        """Train to the end of the stage, or until a signal; whether it is finished. Writes all of
        the stage's files.

        Raises VggfeatError: the loss is not finite; it has been chance's for `chance_after`
        iterations, or the held-out error is in the end; a disk that refuses the last checkpoint
        (one that it refuses on the way is a warning); memory ran out, the device failed, or a
        process that reads images was killed; torch.compile was asked for and can't be used.
        """
        self.stop = stop
        try:
            with telling_of_others():
                return self._run()
        except (RuntimeError, MemoryError, ReadingFailed) as error:
            if isinstance(error, ReadingFailed):
                what = str(error)
            elif out_of_memory(error):
                what = (
                    f"out of memory on {self.ranks.device}: give a `micro_batch` below"
                    f" {self.machine.micro_batch}"
                )
            elif device_failed(error):
                what = f"{self.ranks.device} failed ({first_sentence(error)})"
            else:
                raise
            where = f"{self.stage.name}, iteration {self.state.iteration}"
            raise VggfeatError(
                f"{where}: {what}; the run goes on from its last checkpoint"
            ) from error

    def _run(self) -> bool:
        state, ranks = self.state, self.ranks
        if self.done:
            return True
        began, before = time.monotonic(), state.seconds
        saved_at = began
        self.replica.train()
        with Log(
            self.folder if ranks.first else None, self.stage.name, state.iteration, self.stop_at
        ) as log:
            self._log_start(log)
            self._restart_clock()
            if state.check_due:
                self._check(log)
                if state.check_due:  # left again; the checkpoint is as it was
                    return False
            for batch in self._batches():
                due = float(time.monotonic() - saved_at >= self.machine.checkpoint_seconds)
                # one exchange an iteration, so that all processes count, leave and save together
                images, leave, save = ranks.sum(
                    [
                        float(batch.counts.sum()),
                        float(self.stop.signal > 0),
                        due if ranks.first else 0.0,
                    ]
                )
                self._report(batch.unreadable, "left out")
                # nothing would be learned, to the end of the stage and without a word
                if not images:
                    raise ReadingFailed(
                        "not one image of a batch can be read: is the storage still there?"
                    )
                if seconds := self.compile(batch, images):
                    log("compiled", state.iteration + 1, seconds=seconds)
                    log.leave_out(seconds)
                    log.say(f"compiled in {seconds:.0f} s")
                    self.clock += seconds  # images/s are those of training
                self.pending += self.step(batch, images)
                state.iteration += 1
                state.seconds = before + time.monotonic() - began
                self._log_loss(log)
                self._check(log)
                leave = leave or state.check_due
                if save or leave:
                    self._collect_loss()
                    self._save(must=bool(leave))
                    saved_at = time.monotonic()
                if leave:
                    return False
                if state.finished:
                    break
                if 0 < self.chance_after <= state.at_chance:
                    learned = (
                        "it had learned, but " if self.chance.surely_beaten(state.best_top1) else ""
                    )
                    self._give_up(
                        f"{learned}for {state.at_chance} iterations its loss has been"
                        f" {state.mean_loss:.3f}, and that of a constant guess is"
                        f" {self.chance.loss:.3f}"
                    )
            state.finished = True
            self._refuse_broken()
            self._refuse_chance()
            if len(self.data.val):
                state.val = self.errors(self.data.val)
                if state.val is None:
                    self._save(must=True)
                    return False
                self._tell(log, "val", state.val, len(self.data.val))
            try_each(lambda: self._write_weights(WEIGHTS, must=True), lambda: self._save(must=True))
        return True

    def _batches(self) -> Iterator[Batch]:
        """This process's part of each batch, from the state's iteration to the end; counts the time
        spent waiting.
        """
        samples = Samples.from_recipe(self.recipe, self.stage_number, hidden_units(self.net))
        schedule = Schedule(
            self.data.train,
            self.recipe,
            self.stage_number,
            self.ranks,
            self.state.iteration,
            self.stop_at,
        )
        batches = self.readers.read(samples, self.data.items, schedule, self.data.corners)
        for _ in range(0 if self.state.finished else len(schedule)):
            asked = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - asked
            yield batch

    def _restart_clock(self) -> None:
        self.clock, self.clock_iteration, self.waited = time.monotonic(), self.state.iteration, 0.0

    def _log_start(self, log: Log) -> None:
        """What the device can do, for all lines of the log to come; and the start of a stage."""
        if self.ranks.first:
            self.matrix_flops = rate_of_device(self.ranks.device, self.machine.precision)
        if self.state.iteration == 0:
            machine = {
                **asdict(self.machine),
                "processes": self.ranks.world,
                "device": str(self.ranks.device),
                "matrix_flops": self.matrix_flops,
            }
            log(
                "start",
                0,
                time=time.time(),
                stage=self.stage.name,
                identity=self.identity,
                machine=machine,
            )

    def _collect_loss(self) -> None:
        """Bring the losses of all processes since the last time into the state."""
        self.state.pending_loss += self.ranks.sum([float(self.pending)])[0]
        self.pending.zero_()

    def _log_loss(self, log: Log) -> None:
        """Every `log_every` iterations: the mean loss, the rate, the watch on a loss that goes
        wrong.

        Raises VggfeatError for one that is not finite.
        """
        state, iteration = self.state, self.state.iteration
        if iteration % self.machine.log_every and iteration != self.stop_at:
            return
        self._collect_loss()
        since = iteration - state.logged
        loss = state.pending_loss / since
        state.pending_loss, state.logged = 0.0, iteration
        if not math.isfinite(loss):
            raise VggfeatError(
                f"{self.stage.name}, iteration {iteration}: the loss is {loss} at a learning rate"
                f" of {state.learning_rate:g}; {self._lower_rate()}"
            )
        if self.chance_after:
            self.chance.count(state, loss, since, self.chance_after, self.recipe.batch_size)
        seconds = time.monotonic() - self.clock
        speed = (iteration - self.clock_iteration) * self.recipe.batch_size / seconds
        wait, rate = self.waited / seconds, state.learning_rate
        share = None
        if self.matrix_flops is not None:
            share = speed * self.flop / (self.matrix_flops * self.ranks.world)
        log(
            "train",
            iteration,
            epoch=iteration / self.per_epoch,
            loss=loss,
            learning_rate=rate,
            images_per_second=speed,
            **({} if share is None else {"matrix_share": share}),
            data_wait=wait,
            seconds=state.seconds,
        )
        log.progress(iteration, loss, rate, speed, share, wait)
        self._restart_clock()

    def _check(self, log: Log) -> None:
        """After each iteration `drop_by`; after each epoch the held-out error and the plateau
        rule.
        """
        state, recipe, iteration = self.state, self.recipe, self.state.iteration
        drops = state.drops
        while (
            state.drops < len(recipe.drop_by)
            and iteration >= recipe.drop_by[state.drops] * self.stop_at
        ):
            state.drop(recipe)
        due = iteration % self.per_epoch == 0 or iteration == self.stop_at
        if len(self.data.held_out) and due:
            began = time.monotonic()
            errors = self.errors(self.data.held_out)
            state.check_due = errors is None
            if errors is not None:
                state.held_out = errors
                if self.chance.surely_beaten(errors[0]):
                    state.at_chance = 0
                best = state.judge(errors[0], recipe)
                self._tell(log, "held_out", errors, len(self.data.held_out))
                if best:
                    self._write_weights(BEST, must=False)
            self.clock += time.monotonic() - began  # images/s are those of training
        if state.drops > drops:
            log("drop", iteration, learning_rate=state.learning_rate)
            log.say(f"learning rate {state.learning_rate:g} after iteration {iteration}")

    def _tell(self, log: Log, event: str, errors: Errors, images: int) -> None:
        log(event, self.state.iteration, **self.objective.told(errors), images=images)
        name = {"held_out": "held-out", "val": "validation"}[event]
        words = self.objective.in_words(errors)
        log.say(f"{name} {words}, central crop at Q={self.stage.test_scale}")

    def _refuse_chance(self) -> None:
        """Raise VggfeatError where a stage's end is no better than chance: it is nothing to start
        from, or to use.
        """
        state, chance = self.state, self.chance
        if state.at_chance:
            self._give_up(
                f"its loss is {state.mean_loss:.3f} in the end, and that of a constant guess is"
                f" {chance.loss:.3f}"
            )
        if (
            self.chance_after
            and chance.tells()
            and state.held_out
            and state.held_out[0] >= chance.error
        ):
            self._give_up(
                f"its held-out error is {state.held_out[0]:.2f} % top-1 in the end, and that of a"
                f" constant guess is {chance.error:.2f} %"
            )

    def _give_up(self, why: str) -> NoReturn:
        """Save, and raise VggfeatError, which says what may help a net that is no better than
        chance.
        """
        stage, state = self.stage, self.state
        self._save(must=True)
        self.ranks.barrier()  # torchrun ends the first process as soon as another has left
        ways = [
            f"another learning rate than {stage.learning_rate:g} (`set` STAGE.learning_rate=RATE)"
        ]
        if state.finished:
            ways.append("a longer stage (`set` STAGE.iterations=N)")
        if not self.from_random:
            ways.append("a start that has learned more (`from` FILE)")
        elif stage.net not in SHALLOW:
            ways.append("a trained A to start from (`init` A)")
        if self.recipe.random_layers == "normal":
            ways.append("Glorot's weights (`init` glorot)")
        raise VggfeatError(
            f"{stage.name}, iteration {state.iteration}: the net is no better than chance: {why};"
            f" what may help: {', '.join(ways)}; move {self.folder} away first. Its checkpoint is"
            " kept, and the same command with `set` chance_after=0 goes on from it"
        )

    def _report(self, unreadable: list[tuple[str, str]], how: str) -> None:
        for name, why in unreadable:
            if name not in self.reported:
                self.reported.add(name)
                say(f"unreadable, {how}: {name}: {why}")

    @torch.inference_mode()
    def errors(self, rows: np.ndarray) -> Errors | None:
        """The objective's, of the central crop at Q; an unreadable image is an error.

        None when a signal came before the end: who sent it may kill after some seconds.
        """
        low, high = self.ranks.share(0, len(rows))
        size = min(self.machine.micro_batch, 128)
        keys = [
            [(0, int(r)) for r in rows[i : min(i + size, high)]] for i in range(low, high, size)
        ]
        crops = CentreCrops(self.stage.test_scale, self.recipe.crop)
        self.training_net.eval()
        right = torch.zeros(2, dtype=torch.float64)
        for batch in self.readers.read(crops, self.data.items, keys, self.data.corners):
            self._report(batch.unreadable, "counted as an error")
            for pixels, alpha, kept, labels, counts, boxes in self._pieces(batch):
                with self.autocast():
                    outputs = self.training_net(pixels, alpha, kept)
                hits = self.objective.right(outputs, labels, boxes) & (counts[:, None] > 0)
                right += hits.sum(0).cpu()
            if self.stop.signal:
                break
        self.training_net.train()
        *every, left = self.ranks.sum([*right.tolist(), float(self.stop.signal > 0)])
        return None if left else self.objective.errors(every, len(rows))

    # --- files ------------------------------------------------------------------------------------

    def _place(self, name: str) -> Path:
        """Where a file of the stage is."""
        assert self.folder is not None, "a trial has no files"
        return self.folder / name

    def _save(self, must: bool) -> None:
        """Write the checkpoint, in the first process. A broken net doesn't replace a sound one."""
        if must:
            self._refuse_broken()
        elif self._broken():
            return  # the next line of the log says what happened
        path = self._place(CHECKPOINT)
        self._write(
            path,
            lambda: save_checkpoint(path, self.net, self.optimiser, self.state, self.identity),
            must,
        )

    def _broken(self) -> bool:
        """Whether the net, or its loss, has values that are not finite."""
        sound = math.isfinite(self.state.pending_loss)
        return not (
            sound and all(bool(parameter.isfinite().all()) for parameter in self.net.parameters())
        )

    def _refuse_broken(self) -> None:
        if self._broken():
            raise VggfeatError(
                f"{self.stage.name}, iteration {self.state.iteration}: the net has weights that are"
                f" not finite; {self._lower_rate()}"
            )

    def _lower_rate(self) -> str:
        """What to do about values that are not finite."""
        return (
            f"the last checkpoint is from before it: move {self.folder} away, and begin the stage"
            f" anew with a lower rate than {self.stage.learning_rate:g} (`set`"
            " STAGE.learning_rate=RATE)"
        )

    def _write_weights(self, name: str, must: bool) -> None:
        path = self._place(name)
        self._write(path, lambda: write_weights(path, self), must)

    def _write(self, path: Path, write: Callable[[], None], must: bool) -> None:
        """Call write in the first process. A disk that refuses is a warning, once a file, unless it
        is a must.
        """
        if not self.ranks.first:
            return
        try:
            write()
        except (OSError, SafetensorError, VggfeatError) as error:
            what = cant_write(path, error)
            if must:
                raise VggfeatError(
                    f"{what}; the same command goes on from the last checkpoint, once it can be"
                    " written"
                ) from error
            if path.name not in self.refused:
                self.refused.add(path.name)
                say(f"warning: {what}; training goes on, and what was there before is kept")
        else:
            self.refused.discard(path.name)


def write_weights(path: Path, trainer: Trainer) -> None:
    """The weights file (docs/formats.md): the net as it is now, its preprocessing, and how it was
    made.
    """
    low, high = trainer.stage.train_scale
    rows = np.sort(np.concatenate([trainer.data.train, trainer.data.held_out]))
    past = Past(
        trainer.stage.name,
        trainer.recipe.name,
        trainer.recipe.seed,
        trainer.state.iteration / trainer.per_epoch,
        len(trainer.data.train),
        name_digest([trainer.data.items.names[i] for i in rows]),
    )
    measured = {"held_out": trainer.state.held_out, "validation": trainer.state.val}
    save_weights(
        path,
        trainer.net,
        trainer.training_net.preprocessing,
        classes=trainer.data.classes,
        train_scale=str(low) if low == high else f"{low}-{high}",
        source=f"pretrain {trainer.recipe.name} {trainer.stage.name}",
        epoch=f"{past.epochs:.2f}",
        recipe=trainer.recipe.to_json(),
        history=json.dumps(list(map(asdict, (*trainer.history, past)))),
        errors=json.dumps(
            {
                name: {
                    key.removesuffix("_error"): value
                    for key, value in trainer.objective.told(pair).items()
                }
                for name, pair in measured.items()
                if pair
            }
        ),
        boxes=trainer.stage.boxes,
        box_unit=trainer.recipe.box_unit,
    )


def optimiser(net: VGG, recipe: Recipe, learning_rate: float) -> torch.optim.SGD:
    """SGD with momentum and L2 decay over the layers that learn; biases apart where the recipe asks
    for Caffe's.
    """
    layers = [layer for layer in weight_layers(net).values() if layer.weight.requires_grad]
    weights = [layer.weight for layer in layers]
    biases = [cast(nn.Parameter, layer.bias) for layer in layers]
    twice = recipe.caffe_biases
    groups = [
        {"params": weights, "rate_factor": 1.0, "weight_decay": recipe.weight_decay},
        {
            "params": biases,
            "rate_factor": 2.0 if twice else 1.0,
            "weight_decay": 0.0 if twice else recipe.weight_decay,
        },
    ]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=recipe.momentum, fused=True)


def _plain(value: Any) -> Any:
    """value as JSON would give it back: lists for tuples."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value

"""The command, on generated images: what it leaves behind, what it refuses, and in which words."""

from __future__ import annotations

import json
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pretrain import replica
from pretrain.checkpoint import read_state
from pretrain.colour import Colours
from pretrain.init import FROM_A
from pretrain.posteriors import how_trained
from pretrain.recipe import history_of
from pretrain.replica import forward_gflop
from pretrain.standing import DONE, End, standing_of
from tests import prepared
from tests.conftest import HANG, Command, Ran, ran
from tests.pretrain.conftest import (
    A_STAGE,
    D_STAGE,
    FEW,
    JITTER,
    environment,
    evaluating,
    layers,
    one_line,
    training,
    words_of,
    write_boxes,
)
from vggfeat import cli
from vggfeat.features import open_features
from vggfeat.sources import load


@pytest.fixture
def command(run_main: Command) -> Command:
    return training(run_main)


@dataclass(frozen=True)
class Trained:
    """A run of D's chain, in a folder that its tests leave as it is; and what was printed."""

    words: list[object]
    out: Path
    ran: Ran

    def log(self, stage: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / stage / "log.jsonl").open()]


@pytest.fixture(scope="module")
def trained(made_drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("trained") / "run"
    words: list[object] = ["--net", "D", *FEW, "--data", made_drawings, "--out", out]
    done = training(ran)(*words)
    assert done.status == 0, done.err
    return Trained(words, out, done)


def test_each_stage_of_a_chain_leaves_its_files(trained: Trained) -> None:
    for stage in (A_STAGE, D_STAGE, JITTER):
        names = {path.name for path in (trained.out / stage).iterdir()}
        assert {"last.safetensors", "best.safetensors", "weights.safetensors", "log.jsonl"} <= names
        assert any(name.startswith("events.out.tfevents") for name in names)
        assert f"{stage}: validation error" in trained.ran.err
        assert stage in trained.ran.out
    last, state = trained.out / JITTER, read_state(trained.out / JITTER / "last.safetensors")[0]
    weights = (trained.out / "weights.safetensors").read_bytes()
    assert weights == (last / "weights.safetensors").read_bytes()
    assert state.finished
    assert state.learning_rate < 5e-3  # drop_by of the mini recipe
    standing = standing_of(trained.out)
    assert [stage.name for stage in standing.stages] == [A_STAGE, D_STAGE, JITTER]
    assert standing.end == End(how=DONE, stage=JITTER, iteration=standing.stages[-1].iterations)
    assert '<p class="state">done: validation top-1' in (trained.out / "report.html").read_text()


def test_where_a_stage_began_is_told_by_the_papers_names(trained: Trained) -> None:
    told, of_a = trained.ran.err, trained.out / A_STAGE / "weights.safetensors"
    assert f"D-36: {', '.join(FROM_A)} from {of_a} (net A)" in told
    assert "D-36-64: all layers from" in told
    assert "A-36: all layers random (Glorot's way)" in told


def test_the_log_has_each_step_and_check(trained: Trained) -> None:
    events = trained.log(JITTER)
    steps = [event for event in events if event["event"] == "train"]
    assert [event["iteration"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "learning_rate", "images_per_second", "data_wait", "epoch"} <= steps[0].keys()
    machine = events[0]["machine"]
    flop = 3e9 * forward_gflop(load(str(trained.out / "weights.safetensors")).vgg(""))
    for step in steps:
        done = step["images_per_second"] * flop / machine["matrix_flops"]
        assert step["matrix_share"] == pytest.approx(done)
    assert " % of the matrix rate, " in trained.ran.err
    checks = [event for event in events if event["event"] == "held_out"]
    # each epoch of 76 // 16 iterations, and the end
    assert [event["iteration"] for event in checks] == [4, 6]
    assert {"top1_error", "top5_error", "images"} <= checks[0].keys()


def test_each_key_of_the_log_is_in_the_documents(trained: Trained) -> None:
    text = (Path(__file__).parents[2] / "docs/formats.md").read_text()
    for event in trained.log(A_STAGE):
        assert f"| `{event['event']}` |" in text
        for key in (*event, *event.get("machine", {})):
            assert f"`{key}`" in text, key


def test_in_float64_no_rate_is_measured(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "matrix_rate", lambda *_: pytest.fail("it was"))
    words = ["--net", "A", *FEW, "--stages", "1", "--precision", "float64", "--data", drawings]
    ran = command(*words, "--out", tmp_path / "run")
    assert ran.status == 0 and "matrix rate" not in ran.err
    first, *others = map(json.loads, (tmp_path / "run" / A_STAGE / "log.jsonl").open())
    assert first["machine"]["matrix_flops"] is None
    assert not any("matrix_share" in event for event in others)
    ran = command(*words, "--out", tmp_path / "other", "--dry-run")
    assert ran.status == 0 and re.search(r"A-36 +│ +6 │.*│ +- │", ran.out), ran.out


def test_a_top_5_error_of_two_classes_is_none(trained: Trained) -> None:
    """0.00 was printed, a faultless net's."""
    told = trained.ran
    assert all(
        event["top5_error"] is None for event in trained.log(JITTER) if "top5_error" in event
    )
    assert "% top-1, - % top-5, central crop at Q=" in told.err
    assert re.search(r"36-64 .*\b50 .* \d+\.\d+, - ", told.out)
    assert "errors: of one central crop at Q" in told.out


def test_weights_tell_how_their_whole_chain_has_learned(trained: Trained) -> None:
    network = load(str(trained.out / "weights.safetensors"))
    assert network.classes == ["blue", "red"]
    # how long, and on what: A's stage counts, too
    past = history_of(network.metadata)
    assert [each.stage for each in past] == [A_STAGE, D_STAGE, JITTER]
    assert [each.epochs for each in past] == [6 / 4] * 3
    assert {(each.recipe, each.images) for each in past} == {("mini", 76)}
    assert len({each.training_set for each in past}) == 1
    assert how_trained(network.metadata)["epochs"] == "4.50"
    measured = Colours.read(trained.out / "colours.json")
    assert network.preprocessing.mean == pytest.approx(measured.mean, abs=1e-4)


def test_what_came_out_is_what_extract_takes(
    trained: Trained, made_drawings: Path, run_main: Command, tmp_path: Path
) -> None:
    weights, features = trained.out / "weights.safetensors", tmp_path / "feats.h5"
    line = ("extract", "--dataset", "folder", "--root", made_drawings, "--weights", weights)
    fast = ("--scales", "36,48", "--device", "cpu", "--precision", "float32")
    done = run_main(cli.main, *line, *fast, "--out", features)
    assert done.status == 0, done.err
    assert open_features(features).read().shape == (88, 2, len(layers(weights)["fc7"]))


def test_a_finished_run_is_only_told_again(trained: Trained, command: Command) -> None:
    def written() -> dict[Path, int]:  # of the stages
        return {path: path.stat().st_mtime_ns for path in trained.out.glob("*/*.safetensors")}

    before = written()
    assert len(before) == 9
    again = command(*trained.words)
    assert again.status == 0
    stages = (A_STAGE, D_STAGE, JITTER)
    assert again.err.splitlines() == [f"{stage}: done before" for stage in stages]
    assert JITTER in again.out
    assert written() == before


@pytest.fixture(scope="module")
def of_boxes(made_drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A chain whose last stage learns a box of each class; an image of each part has none."""
    folder = tmp_path_factory.mktemp("boxes")
    boxes = write_boxes(folder / "boxes.csv", made_drawings, ("train/red/07.jpg", "val/red/02.jpg"))
    out = folder / "run"
    words: list[object] = ["--net", "D", *FEW, "--data", made_drawings, "--out", out]
    words += ["--task", "localisation", "--boxes", "pcr", "--annotations", boxes]
    done = training(ran)(*words)
    assert done.status == 0, done.err
    return Trained(words, out, done)


def test_a_net_that_learns_boxes_begins_with_the_net_of_its_s(of_boxes: Trained) -> None:
    stages = {path.parent.name for path in of_boxes.out.glob("*/log.jsonl")}
    assert stages == {A_STAGE, D_STAGE, "D-36-pcr"}  # the jittered one isn't needed
    # it takes the place of no classifier
    assert not (of_boxes.out / "weights.safetensors").exists()
    told, start = of_boxes.ran.err, of_boxes.out / D_STAGE / "weights.safetensors"
    assert f"D-36-pcr: all layers but fc8 from {start} (net D); the others random" in told
    network = load(str(of_boxes.out / "D-36-pcr" / "weights.safetensors"))
    assert (network.boxes, network.classes, network.dim("fc8")) == ("pcr", ["blue", "red"], 8)
    past = [each.stage for each in history_of(network.metadata)]
    assert past == [A_STAGE, D_STAGE, "D-36-pcr"]
    facts = how_trained(network.metadata)
    assert (facts["task"], facts["epochs"]) == ("localisation", "4.50")
    assert "chain=" not in facts["changes"]


def test_the_error_of_boxes_is_told_by_its_name(of_boxes: Trained) -> None:
    events = of_boxes.log("D-36-pcr")
    checks = [event for event in events if event["event"] in ("held_out", "val")]
    assert [event["images"] for event in checks] == [4, 4, 7]  # of eight one has no box
    assert all(0 <= event["localisation_error"] <= 100 for event in checks)
    assert all("top1_error" not in event for event in checks)
    errors = json.loads(
        load(str(of_boxes.out / "D-36-pcr" / "weights.safetensors")).metadata["errors"]
    )
    assert errors["validation"] == {"localisation": checks[-1]["localisation_error"]}
    assert "D-36-pcr: held-out localisation error" in of_boxes.ran.err
    assert "(boxes)" in (of_boxes.out / "report.html").read_text()


def test_images_without_boxes_are_named_and_not_learned_from(of_boxes: Trained) -> None:
    assert re.search(r"held-out, top-1.*boxes", of_boxes.ran.out) and "(boxes)" in of_boxes.ran.out
    assert "train/red/07.jpg" in of_boxes.ran.err and "val/red/02.jpg" in of_boxes.ran.err
    start = next(event for event in of_boxes.log("D-36-pcr") if event["event"] == "start")
    assert start["identity"]["training images"] == 75
    of_classes = next(event for event in of_boxes.log(D_STAGE) if event["event"] == "start")
    assert of_classes["identity"]["training images"] == 76
    assert "box_unit" not in of_classes["identity"]  # which classes don't depend on


def test_a_net_of_boxes_describes_and_is_no_classifier(
    of_boxes: Trained, made_drawings: Path, command: Command, run_main: Command, tmp_path: Path
) -> None:
    weights = of_boxes.out / "D-36-pcr" / "weights.safetensors"
    line = ("extract", "--dataset", "folder", "--root", made_drawings, "--weights", weights)
    fast = ("--scales", "36", "--device", "cpu", "--precision", "float32", "--limit", "2")
    assert run_main(cli.main, *line, *fast, "--out", tmp_path / "f.h5").status == 0
    ran = evaluating(run_main)("--weights", weights, "--data", made_drawings, "--device", "cpu")
    assert ran.status == 1 and "says boxes, not classes" in ran.err
    ran = command(*of_boxes.words[:-6], "--from", weights, "--stages", "1", "--out", tmp_path / "o")
    assert ran.status == 1 and "a stage starts from a net that says classes" in one_line(ran.err)


def test_other_boxes_are_another_net(
    of_boxes: Trained, made_drawings: Path, command: Command, tmp_path: Path
) -> None:
    again = command(*of_boxes.words)
    assert again.status == 0 and again.err.splitlines()[-1] == "D-36-pcr: done before"
    other = write_boxes(tmp_path / "other.csv", made_drawings)
    ran = command(*of_boxes.words, "--annotations", other)
    assert ran.status == 1
    assert "D-36-pcr/last.safetensors has another set of boxes: give the same" in one_line(ran.err)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,class,x1,y1,x2,y2\nnone.jpg,red,1,1,9,9\n", "has no box for any of the 88 images"),
        ("path,class,x1,y1,x2,y2\ntrain/red/00.jpg,red,1,1,9,9\n", "1 training images with a box"),
        ("path,class\n", "x1"),
    ],
)
def test_boxes_that_cant_be_learned_from_are_one_line(
    text: str, says: str, command: Command, made_drawings: Path, tmp_path: Path
) -> None:
    (tmp_path / "boxes.csv").write_text(text)
    ran = command(
        *("--net", "A", *FEW, "--set=held_out=0", "--data", made_drawings, "--out", tmp_path / "o"),
        *("--task", "localisation", "--boxes", "scr", "--annotations", tmp_path / "boxes.csv"),
    )
    assert ran.status == 1 and says in one_line(ran.err)
    assert not list((tmp_path / "o").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--net", "F"], "there is no net 'F'"),
        (["--task", "localisation", "--annotations", "b.csv"], "--boxes scr or pcr go together"),
        (["--boxes", "scr"], "--boxes scr or pcr go together"),
        (
            ["--task", "localisation", "--boxes", "scr"],
            "--annotations, the true boxes, go together",
        ),
        (["--task", "control", "--net", "D"], "recipe paper has no stage of control for net D"),
        (["--recipe", "nothing.toml"], "nothing.toml"),
        (["--stages", "9"], "stages"),
        (["--set", "batch_sise=3"], "can't have 'batch_sise'"),
        (["--init", "zero"], "init"),
    ],
)
def test_wrong_options_are_one_line(
    words: list[str], says: str, command: Command, tmp_path: Path
) -> None:
    ran = command(*words, "--data", tmp_path, "--out", tmp_path / "run")
    assert ran.status in (1, 2)
    assert says in ran.err
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_a_warning_a_file_until_the_last(drawings: Path, tmp_path: Path) -> None:
    """A limit of no bytes a file, which refuses what a full disk does: every file but the last is
    only missing.
    """

    words = [
        "--net",
        "A",
        *FEW,
        "--checkpoint-minutes",
        "0",
        "--data",
        drawings,
        "--out",
        tmp_path / "run",
    ]
    limits = {resource.RLIMIT_FSIZE: 0}
    done = prepared.run(words_of(words), environment(), limits=limits, timeout=HANG)
    assert done.returncode == 1
    last = f"can't write {tmp_path / 'run' / A_STAGE / 'weights.safetensors'}"
    assert last in one_line(done.stderr)
    for name in ("colours.json", "log.jsonl", "events.out", "last.safetensors", "best.safetensors"):
        lines = [line for line in done.stderr.splitlines() if name in line]
        assert len(lines) == 1, done.stderr
        assert "warning: " in lines[0] and "training goes on" in lines[0]
    assert "held-out error" in done.stderr and "validation error" in done.stderr  # it did go on
    left = {
        path.name: path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    assert left == {"lock": 0, "log.jsonl": 0}

"""A trained net for other programs: torchvision's or timm's state dict, or ONNX; or for this one,
in half the bytes.

    python -m pretrain.export runs/D/weights.safetensors --to torchvision --out vgg16.pth
    python -m pretrain.export runs/D/weights.safetensors --to timm --out vgg16.safetensors
    python -m pretrain.export runs/D/weights.safetensors --to onnx --out vgg16.onnx
    python -m pretrain.export runs/D/weights.safetensors --to float16 --out small.safetensors

Each result is read back by the program that it is for, and its scores are compared with ours before
the file appears. The preprocessing is printed, kept in a .safetensors file's metadata, and is part
of the graph in ONNX.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes time
    from vggfeat.start import begin

    begin("pretrain.export")

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vggfeat.errors import VggfeatError, WrongUsage, as_typed
from vggfeat.files import check_outputs, weights_files, whole
from vggfeat.options import Overwrite, Strict, with_debug
from vggfeat.terminal import print_table, run

if TYPE_CHECKING:  # a command that is refused is so before PyTorch is imported
    from torch import Tensor

    from vggfeat.vgg import VGG
    from vggfeat.weights import Network

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# Of the largest score: another library's convolutions round otherwise, and half precision keeps 11
# bits of a weight.
TOLERANCE = {"torchvision": 1e-4, "timm": 1e-4, "onnx": 1e-4, "float16": 5e-3}


@app.command(cls=Strict)
@with_debug
def export(
    weights: Annotated[
        str, typer.Argument(help="A weights file, or any name that vggfeat extract takes.")
    ],
    to: Annotated[
        Literal["torchvision", "timm", "onnx", "float16"],
        typer.Option(help="Which program it is for; float16: this one, in half the bytes."),
    ],
    out_file: Annotated[
        Path,
        typer.Option(
            "--out",
            help="The file to write: .pth or .safetensors; for onnx, .onnx.",
        ),
    ],
    overwrite: Overwrite = False,
) -> None:
    """Write a net for another program, checked by that program."""
    endings = {"onnx": (".onnx",), "float16": (".safetensors",)}.get(to, (".pth", ".safetensors"))
    if out_file.suffix not in endings:
        raise WrongUsage(f"--out {out_file} must end in {' or '.join(endings)}")
    check_outputs({"--out": out_file}, inputs=weights_files(weights), overwrite=overwrite)
    from safetensors import SafetensorError

    from vggfeat.sources import load, of_words

    network = load(weights, device="cpu", precision="float32")
    with as_typed(of_words(network.spec)):
        if network.layers[-1] != "fc8":
            raise VggfeatError(f"{weights} is no whole net of Table 1: its FC layers are needed")
        if to in ("torchvision", "timm"):
            _published(network)
    writer: dict[str, Callable[[Network, Path], float]] = {
        "torchvision": to_torchvision,
        "timm": to_timm,
        "onnx": to_onnx,
        "float16": to_float16,
    }
    try:
        with whole(out_file) as partial:
            difference = writer[to](network, partial)
            if not difference <= TOLERANCE[to]:
                raise VggfeatError(
                    f"{to} gives other scores than this net ({difference:.1e} of the largest): not"
                    " written"
                )
    except SafetensorError as error:  # the library's own word for a disk that refuses
        raise VggfeatError(f"can't write {out_file}: {error}") from error
    preprocessing = network.preprocessing.to_metadata()
    rows = [
        ("file", str(out_file)),
        ("net", network.name),
        ("largest difference of scores", f"{difference:.1e}"),
    ]
    inside = to == "onnx"
    print_table(
        to,
        rows + [(key, "in the graph" if inside else value) for key, value in preprocessing.items()],
    )


def to_torchvision(network: Network, path: Path) -> float:
    """torchvision's state dict; the largest difference of its scores, relative to the largest
    score.
    """
    import torchvision

    module, name = _published(network)
    save_state_dict({k: v.contiguous() for k, v in module.state_dict().items()}, network, path)
    theirs = torchvision.models.get_model(name, weights=None, num_classes=module.num_classes)
    theirs.load_state_dict(_read(path))
    x = _input(network)
    return _difference(module.crop_scores(x), theirs.eval()(x))


def to_timm(network: Network, path: Path) -> float:
    """timm's state dict, FC layers as convolutions; the difference as above."""
    import timm

    from vggfeat.weights import TIMM_FC

    theirs_of = {ours: theirs for theirs, ours in TIMM_FC.items()}
    module, name = _published(network)
    tensors = {}
    for key, value in module.state_dict().items():
        layer, _, kind = key.rpartition(".")
        if kind == "weight" and layer in ("classifier.0", "classifier.3"):
            side = module.fc6_kernel if layer == "classifier.0" else 1
            value = value.view(len(value), -1, side, side)
        tensors[f"{theirs_of.get(layer, layer)}.{kind}"] = value.contiguous()
    save_state_dict(tensors, network, path)
    theirs = timm.create_model(name, num_classes=module.num_classes)
    theirs.load_state_dict(_read(path))
    x = _input(network)
    return _difference(module.crop_scores(x), theirs.eval()(x))


def to_float16(network: Network, path: Path) -> float:
    """This program's own weights file with its metadata, values in half precision; the difference
    as above.
    """
    import torch

    from vggfeat.sources import load
    from vggfeat.weights import write_tensors

    tensors = {k: v.to(torch.float16) for k, v in network.module.state_dict().items()}
    if too_large := [k for k, v in tensors.items() if not torch.isfinite(v).all()]:
        raise VggfeatError(f"{too_large[0]} has values beyond float16's range: not written")
    write_tensors(path, tensors, network.metadata)
    x = _input(network)
    half = load(path, device="cpu", precision="float32").vgg()
    return _difference(network.vgg().crop_scores(x), half.crop_scores(x))


def to_onnx(network: Network, path: Path) -> float:
    """A graph from RGB in 0..255, float32 (N, 3, crop, crop), to scores (N, C); the difference in
    onnxruntime.
    """
    import torch

    from vggfeat.export import INSTALL, Prepared, session_of, write_graph

    module = network.vgg()

    class WithPreprocessing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.prepared = module, Prepared(network.preprocessing)

        def forward(self, images: Tensor) -> Tensor:
            return self.net.crop_scores(self.prepared(images))

    exported = WithPreprocessing().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, module.crop, module.crop), generator=generator).float()
    write_graph(path, exported, images)
    session = session_of(path)
    if session is None:
        raise VggfeatError(f"ONNX needs the package onnxruntime: {INSTALL}")
    worst = 0.0
    for n in (1, 2):
        theirs = session.run(None, {"images": images[:n].numpy()})[0]
        with torch.inference_mode():
            worst = max(worst, _difference(exported(images[:n]), torch.from_numpy(theirs)))
    return worst


def _published(network: Network) -> tuple[VGG, str]:
    """The net, and how torchvision and timm call it. Raises VggfeatError where they don't have
    it.
    """
    from vggfeat.weights import TORCHVISION_NETS

    module, names = network.vgg(), {net: name for name, net in TORCHVISION_NETS.items()}
    if module.net not in names:
        raise VggfeatError(
            f"torchvision and timm have no net {module.net}: only {', '.join(names)}; use --to onnx"
        )
    if module.width != 1 or module.crop != 224:
        raise VggfeatError(
            f"torchvision and timm have this net at width 1 and crop 224 only, not {module.width:g}"
            f" and {module.crop}; use --to onnx"
        )
    return module, names[module.net]


def save_state_dict(tensors: dict[str, Tensor], network: Network, path: Path) -> None:
    """Plain tensors by name: .safetensors with the preprocessing as metadata, or .pth (loads with
    weights_only).
    """
    import torch

    from vggfeat.weights import write_tensors

    if path.suffix == ".pth":
        with open(path, "wb") as file:  # PyTorch's own writing makes a RuntimeError of a full disk
            torch.save(tensors, file)
        return
    write_tensors(path, tensors, {**network.metadata, "classes": json.dumps(network.classes or [])})


def _read(path: Path) -> dict[str, Tensor]:
    import safetensors.torch
    import torch

    return (
        torch.load(path, weights_only=True)
        if path.suffix == ".pth"
        else safetensors.torch.load_file(path)
    )


def _input(network: Network) -> Tensor:
    import torch

    crop = network.vgg().crop
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, crop, crop, 3), dtype=torch.uint8, generator=generator)
    return network.preprocessing(pixels)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / ours.detach().abs().max())


if __name__ == "__main__":
    run(app, "python -m pretrain.export")

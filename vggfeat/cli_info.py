"""`vggfeat info`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vggfeat.checked import fitted, parse_json, shown
from vggfeat.errors import VggfeatError, WrongUsage
from vggfeat.files import (
    check_outputs,
    plain,
    write_json,
)
from vggfeat.hub import ENDINGS, fetched, on_hub
from vggfeat.machine import duration
from vggfeat.options import (
    Json,
    Overwrite,
    with_debug,
)
from vggfeat.place import is_url
from vggfeat.terminal import (
    columns,
    list_unreadable,
    out,
    print_table,
)

if TYPE_CHECKING:
    from vggfeat.model import Model
    from vggfeat.store import Description, Features
    from vggfeat.table1 import Stack
    from vggfeat.weights import Network

MOST_DEPTH = 8  # of records inside records that are printed
MOST_TOLD = 8  # shards that failed, and why


@with_debug
def info_command(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help=(
                "A feature file, a set of shards, an index, a model, weights, one of these two on"
                " the hub as hf:OWNER/NAME, or a net of Table 1, as D; a file of a net's name comes"
                " first."
            ),
        ),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Also hold every descriptor against its checksum.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Print every attribute, also those of the weights.")
    ] = False,
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """Tell about a feature file, an index, a model, weights or a net of the paper; all that is
    known with --all, or in --json.
    """
    from vggfeat.table1 import NETS

    path = Path(file)
    if on_hub(file):
        check_outputs({}, texts={"--json": json_file}, overwrite=overwrite)
        found = fetched(file, "classifier", "weights")
        with found.called():
            _tell_file(str(found.name), Path(found.path), verify, everything, json_file)
        return
    of_net = file in NETS and not path.is_file() and not (path / "plan.json").is_file()
    inputs = [] if of_net or is_url(file) else [path]
    check_outputs({}, texts={"--json": json_file}, inputs=inputs, overwrite=overwrite)
    if of_net:
        if verify:
            raise WrongUsage("--verify is for a feature file: leave it out")
        _tell_net(file, everything, json_file)
        return
    if is_url(file) or path.is_dir():
        _tell_set(file, verify, everything, json_file)
        return
    if not os.path.lexists(file) and file.isalnum():  # rather a net's name than a file's
        raise VggfeatError(f"no feature file at {file}; the nets of Table 1 are {', '.join(NETS)}")
    _tell_file(file, path, verify, everything, json_file)


def _tell_file(
    name: str, path: Path, verify: bool, everything: bool, json_file: Path | None
) -> None:
    """About a feature file, an index, a model or weights. name: as it is opened by; path: where it
    lies.
    """
    from vggfeat.cli_neighbours import INDEX, index_rows
    from vggfeat.convert import MODEL, POSTERIORS
    from vggfeat.features import open_layers
    from vggfeat.hdf5 import format_of

    facts: dict[str, Any]
    unreadable: dict[str, str] = {}
    kind = format_of(path)
    if kind == POSTERIORS:
        raise VggfeatError(
            f"{name} holds kept posteriors: `python -m pretrain.evaluate --from {name}` looks at"
            " them"
        )
    if kind == MODEL:
        from vggfeat.model import open_model

        m = open_model(name)
        facts = {
            "kind": "model",
            "classes": len(m.classes),
            "descriptor": m.coef_KD.shape[1],
            "pool": m.pool,
            "multi_label": m.multi_label,
        }
        for i, part in enumerate(m.parts):
            facts |= {f"network {i + 1} {key}": value for key, value in part.__dict__.items()}
        facts |= m.results.in_brief() if m.results else {}
        rows = model_rows(m)
    elif kind == INDEX:
        from vggfeat.index import open_index, told_of

        index = open_index(path)
        if verify:
            index.verify()
        checked = "every byte" if verify else "all but the descriptors (--verify)"
        facts = {"kind": "index", "checked": checked, **told_of(index)}
        rows = [
            *index_rows(index),
            *_description_rows(index.description),
            ("data set", index.dataset + (f", in {index.root}" if index.root else "")),
            ("checked", checked),
        ]
        unreadable = {index.names[i]: reason for i, reason in index.errors.items()}
        facts |= {"errors": unreadable}
    elif kind is None and (on_hub(name) or name.lower().endswith(ENDINGS["weights"])):
        from vggfeat.sources import load

        network = load(name, device="cpu", precision="float32")
        facts = {
            "kind": "weights",
            "weights": network.spec,
            "fingerprint": network.fingerprint,
            "reaches": network.layers[-1],
            **network.metadata,
        }
        rows = network_rows(network)
    else:
        facts, rows, unreadable = _told(open_layers(path), verify)
        facts |= {"errors": unreadable}
    write_json(json_file, facts)
    facts.pop("errors", None)  # which are listed
    print_table(name, list(_flat(plain(facts))) if everything else rows)
    list_unreadable(unreadable, "--json FILE writes them all")


def _told(
    layers: Sequence[Features], verify: bool
) -> tuple[dict[str, Any], list[tuple[str, str]], dict[str, str]]:
    """Facts, rows of a table, and name -> reason of what is unreadable, of what was opened with
    each of its layers.
    """
    f, several = layers[0], len(layers) > 1
    for each in layers if verify else ():
        each.verify()  # a model is read whole anyway
    shapes = [f"{each.description.layer} {each.shape} {each.dtype}" for each in layers]
    facts = {
        "kind": "features",
        "images": f.shape[0],
        "unreadable": len(f.errors),
        "descriptors": "; ".join(shapes) if several else f"{f.shape} {f.dtype}",
        "classes": len(f.classes),
        "labels": (
            "none"
            if f.labels is None
            else ("several an image" if f.labels.ndim == 2 else "one an image")
        ),
        "splits": {name: len(rows) for name, rows in f.splits.items()},
        "checked": "every byte" if verify else "all but the descriptors (--verify)",
        **f.description.to_dict(),
        **{k: v for k, v in f.attributes.items() if k != "description"},
    }
    if several:
        del facts["layer"]  # `layers` are there
    rows = _feature_rows(layers, facts["labels"], facts["checked"])
    return facts, rows, {f.names[i]: reason for i, reason in f.errors.items()}


def _tell_set(name: str, verify: bool, everything: bool, json_file: Path | None) -> None:
    """About a set of shards: how far it is, and what is in it when it is done."""
    from vggfeat.place import place_of
    from vggfeat.shards.plan import read_plan
    from vggfeat.shards.sharded import open_set_layers
    from vggfeat.shards.status import status_of, verify_done

    place = place_of(name)
    plan = read_plan(place)
    status = status_of(place, plan)
    told = {**asdict(status), "failed": {str(k): why for k, why in status.failed.items()}}
    done = f"{status.done:,} of {status.shards:,} done"
    parts = {
        "begun": status.begun,
        "failed": len(status.failed),
        "not begun": status.left,
        "whose images are looked at one by one": status.killing,
    }
    shards = ", ".join([done, *(f"{n:,} {what}" for what, n in parts.items() if n)])
    rows = [("shards", shards if status.sealed else f"{shards}: half-written")]
    if status.rate:
        rows.append(("rate", f"{status.rate:.2f} images/s of a process"))
    rows += [(f"shard {k}", why) for k, why in list(status.failed.items())[:MOST_TOLD]]
    facts: dict[str, Any] = {"kind": "set"}
    unreadable: dict[str, str] = {}
    if status.sealed:
        facts, more, unreadable = _told(open_set_layers(name), verify)
        rows = [*more[:1], *rows, *more[1:]]
    elif status.images is not None:
        rows.append(("images", f"{status.images:,} of {plan.rows:,} done"))
    if verify and not status.sealed:
        rows.append(("checked", f"every byte of {verify_done(place, plan):,} shards"))
    facts |= {"shards": told}
    write_json(json_file, {**facts, "errors": unreadable})
    print_table(name, list(_flat(plain(facts))) if everything else rows)
    list_unreadable(unreadable, "--json FILE writes them all")


def _tell_net(net: str, everything: bool, json_file: Path | None) -> None:
    """Tables 1 and 2 of one net, and Sect. 2.3's arithmetic of its stacks, as computed."""
    from vggfeat.table1 import TABLE_2, layers, stacks

    every, own = layers(net), [stack for stack in stacks(net) if stack.field > 3]
    weighted = [layer for layer in every if layer.parameters]
    parameters = sum(layer.parameters for layer in every)
    multiply_adds = sum(layer.multiply_adds for layer in every)
    facts: dict[str, Any] = {
        "kind": "net",
        "net": net,
        "crop": every[0].side,
        "classes": every[-1].channels,
        "weight_layers": len(weighted),
        "parameters": parameters,
        "table_2_millions": TABLE_2.get(net),
        "multiply_adds": multiply_adds,
        "layers": [layer._asdict() for layer in every],
        "stacks": [stack._asdict() for stack in own],
    }
    write_json(json_file, facts)
    title = f"net {net}, a crop of {every[0].side}x{every[0].side} pixels"
    if everything:
        print_table(title, list(_flat(plain(facts))))
        return
    head = ("layer", "kernel", "channels", "side", "parameters", "MMAC", "field", "stride")
    table = columns(*head, numbers=range(2, len(head)), title=title, title_justify="left")
    for layer in every:
        table.add_row(
            layer.name,
            "-" if layer.name.startswith("lrn") else f"{layer.kernel}x{layer.kernel}",
            str(layer.channels),
            str(layer.side),
            f"{layer.parameters:,}" if layer.parameters else "-",
            f"{layer.multiply_adds / 1e6:,.1f}" if layer.multiply_adds else "-",
            str(layer.field),
            str(layer.stride),
        )
    out.print(table)
    theirs = f"; Table 2: {TABLE_2[net]} million" if net in TABLE_2 else ""
    for line in (
        "side: of a layer's output, in positions; MMAC: million multiply-adds, biases left out;",
        "field, stride: pixels that a position sees as the net runs densely, and to the next one",
        f"weight layers: {len(weighted)}",
        f"parameters: {parameters:,}{theirs}",
        f"multiply-adds: {multiply_adds / 1e9:.2f} billion",
        *map(_stack_line, own),
    ):
        out.print(line, soft_wrap=True)


def _stack_line(stack: Stack) -> str:
    """Sect. 2.3 of one stack: 3x3 layers against one layer of their field, or the other way."""
    side = f"{stack.field}x{stack.field}"
    several = len(stack.kernels) > 1
    other, weights = (
        (f"one {side} layer", stack.one_layer)
        if several
        else (f"{stack.field // 2} layers of 3x3", stack.of_3x3)
    )
    difference = 100 * (weights / stack.weights - 1)
    return (
        f"{' + '.join(f'{k}x{k}' for k in stack.kernels)}"
        f" (stage{'s' * (len(stack.stages) > 1)} {', '.join(map(str, stack.stages))}):"
        f" a field of {side}, {stack.weights} C^2 weights; {other}: {weights} C^2,"
        f" {abs(difference):.0f} % {'more' if difference > 0 else 'fewer'}"
    )


def _feature_rows(layers: Sequence[Features], labels: str, checked: str) -> list[tuple[str, str]]:
    """What a person wants to know of a feature file."""
    f = layers[0]
    facts = f.attributes
    parts: dict[str, list[str]] = {}
    for name, rows in sorted(f.splits.items(), key=lambda item: "test" in item[0]):
        split, _, part = name.rpartition("/")
        parts.setdefault(split or "splits", []).append(f"{part} {len(rows):,}")
    what, made = "set of shards", ""  # made by many, at many times
    if os.path.isfile(f.path):
        what = "feature file"
        when = datetime.fromtimestamp(os.stat(f.path).st_mtime).astimezone()
        made = f"{when.strftime('%Y-%m-%d %H:%M %Z')}, "
    version = facts.get("versions", {}).get("vggfeat")
    return [
        ("what", f"{what}: a descriptor of each image at each scale"),
        ("data set", facts["dataset"] + (f", in {facts['root']}" if facts["root"] else "")),
        (
            "images" if f.boxes is None else "boxes",
            f"{f.shape[0]:,}"
            + (f", the first of {facts['total']:,}" if "total" in facts else "")
            + (f" ({len(f.errors):,} unreadable)" if f.errors else ""),
        ),
        ("classes", f"{len(f.classes):,}" if f.classes else "none"),
        ("labels", labels),
        *((split, ", ".join(of_split)) for split, of_split in parts.items()),
        ("protocol", facts["protocol"]),
        *_description_rows(f.description, {e.description.layer: e.shape[2] for e in layers}),
        *_trained_rows(facts.get("weights_metadata")),
        ("stored as", str(f.dtype)),
        ("checked", checked),
        (
            "made",
            f"{made}in {duration(facts['seconds'])}"
            + (f", by vggfeat {version}" if version else ""),
        ),
        ("command", facts["command"]),
    ]


def model_rows(m: Model) -> list[tuple[str, str]]:
    """What a person wants to know of a saved classifier."""
    from vggfeat.results import HEAD_NAMES, summary

    rows = [
        ("what", f"model: {HEAD_NAMES[m.head]} on descriptors"),
        ("classes", f"{len(m.classes):,}"),
        ("labels", "several an image" if m.multi_label else "one an image"),
        ("descriptor", f"{m.coef_KD.shape[1]:,} values, {m.pool} over the scales"),
    ]
    for part in m.parts:
        rows += _description_rows(part)
    if m.results:
        rows += [("data set", m.results.dataset), *summary(m.results)]
        rows += [("command", m.results.made.command)] if m.results.made.command else []
    return rows


def network_rows(network: Network) -> list[tuple[str, str]]:
    """What a person wants to know of weights."""
    metadata, layer = network.metadata, network.default_layer
    done = "; ".join(f"{key} {value}" for key, value in network.preprocessing.to_metadata().items())
    return [
        ("what", "weights of a net"),
        ("net", network.name),
        ("layer", f"{layer}, {network.dim(layer):,} values; they reach {network.layers[-1]}"),
        ("scales", ", ".join(map(str, network.default_scales))),
        *_rounding_rows(metadata.get("pool", "none")),
        ("preprocessing", f"{network.filter}; {done}"),
        *([("classes", f"{len(network.classes):,}")] if network.classes else []),
        ("weights", f"{network.spec}, sha256 {network.fingerprint[:12]}"),
        *_trained_rows(metadata),
    ]


def _rounding_rows(pool: str) -> list[tuple[str, str]]:
    rounds = {"floor": "down", "ceil": "up"}.get(pool)
    return [("max-pooling", f"odd sides rounded {rounds}")] if rounds else []


def _description_rows(
    description: Description, values: Mapping[str, int] | None = None
) -> list[tuple[str, str]]:
    """values: of a feature file, how many each of its layers has."""
    described = [f"{layer}, {count:,} values" for layer, count in (values or {}).items()]
    chosen = "; `--layer` chooses one" if len(described) > 1 else ""
    kept_apart = "; `svm --pool` pools them" if len(description.scales) > 1 else ""
    done = description.preprocessing
    return [
        ("net", description.net),
        ("layers" if chosen else "layer", "; ".join(described or [description.layer]) + chosen),
        *([("regions", " and ".join(description.regions))] if description.of_boxes else []),
        ("scales", ", ".join(map(str, description.scales)) + (kept_apart if values else "")),
        ("mirror images", "averaged in" if description.mirror else "left out"),
        *_rounding_rows(description.pool),
        *([("preprocessing", f"{description.filter}; {done}")] if done else []),
        ("weights", f"{description.weights}, sha256 {description.fingerprint[:12]}"),
        ("precision", description.precision),
    ]


def _trained_rows(metadata: Any) -> list[tuple[str, str]]:
    """What the weights' own metadata say of their training, where it is told as our files tell
    it.
    """
    from vggfeat.metrics import error_text

    metadata = metadata if isinstance(metadata, dict) else {}
    names = {"source": "weights from", "train_scale": "trained at S", "epoch": "epochs"}
    rows = [(name, str(metadata[key])[:200]) for key, name in names.items() if metadata.get(key)]
    with suppress(VggfeatError):
        kind = dict[str, dict[str, float | None]]
        errors = fitted(parse_json(str(metadata.get("errors", "{}")), ""), kind, "")
        for images, error in errors.items():
            told = [
                f"{name.replace('top', 'top-')} {error_text(value)} %"
                for name, value in error.items()
            ]
            rows.append((f"error, {images.replace('_', '-')} images", ", ".join(told)))
    return rows


def _flat(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Every value of a record with its name, also of the records inside it, and of those that are
    JSON in a text.
    """
    if isinstance(value, str) and value[:1] in ("{", "["):
        with suppress(VggfeatError):
            value = parse_json(value, name)
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        value = ", ".join(map(str, value)) or "-"
    if not isinstance(value, dict | list):
        yield name, value if isinstance(value, str) else json.dumps(value)
        return
    if depth > MOST_DEPTH:
        yield name, shown(value)
        return
    items = value.items() if isinstance(value, dict) else enumerate(value, 1)
    for key, item in items:
        yield from _flat(item, f"{name} {key}".strip(), depth + 1)

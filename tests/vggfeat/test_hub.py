"""Weights and classifiers on a hub: one of this machine, which speaks what huggingface_hub asks."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

import vggfeat
from tests import prepared
from vggfeat import hub
from vggfeat.errors import VggfeatError, WrongUsage
from vggfeat.hub import Named

from ..conftest import Command
from .conftest import Made, Ours, cells

TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """Repositories: name -> their commits, each the files of it; the last is main."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def put(self, repository: str, files: dict[str, bytes]) -> str:
        before = self.commits.setdefault(repository, [])
        before.append({**(before[-1] if before else {}), **files})
        return self.hash_of(repository, len(before) - 1)

    @staticmethod
    def hash_of(repository: str, number: int) -> str:
        return hashlib.sha1(f"{repository} {number}".encode()).hexdigest()

    def files(self, repository: str) -> dict[str, bytes]:
        return self.commits[repository][-1]


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _commit(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Of a revision; None where that was answered."""
        hub = self.server
        if repository in hub.gated:
            self._send(403, X_Error_Code="GatedRepo")
            return None
        hidden = repository in hub.private and f"Bearer {TOKEN}" != self.headers["Authorization"]
        if repository not in hub.commits or hidden:
            self._send(401, X_Error_Code="RepoNotFound")
            return None
        commits = hub.commits[repository]
        known = {hub.hash_of(repository, n): files for n, files in enumerate(commits)}
        commit = list(known)[-1] if revision == "main" else revision
        if commit not in known:
            self._send(404, X_Error_Code="RevisionNotFound")
            return None
        return commit, known[commit]

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if there := self._commit(found[1], unquote(found[2] or "main")):
                siblings = [{"rfilename": name} for name in there[1]]
                private = found[1] in self.server.private
                self._json(
                    {"id": found[1], "sha": there[0], "private": private, "siblings": siblings}
                )
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if there := self._commit(found[1], unquote(found[2])):
                body = there[1].get(unquote(found[3]))
                if body is None:
                    self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=there[0])
                else:
                    tag = f'"{hashlib.sha1(body).hexdigest()}"'
                    self._send(200, body, ETag=tag, X_Repo_Commit=there[0])
        else:
            self._send(404)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[self.path.rpartition("/")[2]] = body
        self._send(200)

    def do_POST(self) -> None:
        path, hub = urlsplit(self.path).path, self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub.asked.append(f"POST {path}")
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._send(403)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.commits[name] = [{".gitattributes": b""}]
            if asked.get("visibility") == "private":
                hub.private.add(name)
            self._json({"url": f"{hub.endpoint}/{name}"})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith(".h5") else "regular" for f in files}
            answers = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False}
                for name, mode in modes.items()
            ]
            self._json({"files": answers})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.endpoint}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            values = {line["value"]["path"]: line["value"] for line in lines[1:]}
            files = {
                name: base64.b64decode(value["content"])
                if "content" in value
                else hub.large[value["oid"]]
                for name, value in values.items()
            }
            commit = hub.put(found[1], files)
            url = f"{hub.endpoint}/{found[1]}/commit/{commit}"
            self._json({"commitOid": commit, "commitUrl": url})
        else:
            self._send(404)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, an empty cache and a token, as the variables of the environment would have them."""
    from huggingface_hub import constants

    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()


def refused(spec: str, *kinds: hub.Kind) -> str:
    with pytest.raises(VggfeatError) as failed:
        hub.fetched(spec, *(kinds or ("weights",)))
    assert len(str(failed.value)) < 400
    return str(failed.value)


def test_what_a_name_says() -> None:
    names = {
        "hf:me/net": Named("me/net"),
        "hf:me/net@v1": Named("me/net", "", "v1"),
        "hf:me/net/a/b.pth@refs/pr/1": Named("me/net", "a/b.pth", "refs/pr/1"),
    }
    for text, name in names.items():
        assert hub.named(text) == name and str(name) == text
    for text in ("hf:", "hf:net", "hf:me/", "hf:/net", "hf:me/net/", "hf:me/net@", "hf:me/../net"):
        with pytest.raises(WrongUsage, match="names nothing on the hub: give hf:OWNER/NAME"):
            hub.named(text)
    for text in ("hf:me/net/../x", "hf:me/net/a//b", "hf:../net", "hf:me/a--b", "hf:me/-a"):
        with pytest.raises(WrongUsage):
            hub.named(text)


def test_which_file_is_meant(there: Hub) -> None:
    other = {"README.md": b"", "config.json": b"{}", "net.safetensors": b"1"}
    there.put("me/one", other)
    commit = there.hash_of("me/one", 0)
    found = hub.fetched("hf:me/one", "classifier", "weights")
    assert found.name == Named("me/one", "net.safetensors", commit)
    assert Path(found.path).read_bytes() == b"1"
    there.put("me/two", {**other, "b/net.PTH": b"2"})
    told = refused("hf:me/two")
    assert (
        "several files of weights, net.safetensors, b/net.PTH: give one, as hf:me/two/net" in told
    )
    assert Path(hub.fetched("hf:me/two/b/net.PTH", "weights").path).read_bytes() == b"2"
    there.put("me/two", {"weights.pt": b"3", "x.h5": b"", "model.h5": b"4"})
    assert Path(hub.fetched("hf:me/two", "weights").path).read_bytes() == b"3"
    assert Path(hub.fetched("hf:me/two", "classifier", "weights").path).read_bytes() == b"4"
    there.put("me/three", {"tf_model.h5": b"5", "weights.pth": b"6"})
    assert Path(hub.fetched("hf:me/three", "classifier", "weights").path).read_bytes() == b"6"
    told = refused("hf:me/one", "classifier")
    assert told.startswith("hf:me/one has no file of classifier (.h5, .hdf5): there are README.md,")
    assert "has no file x.pth: there are README.md" in refused("hf:me/one/x.pth")


def test_what_cannot_be_had(there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert "no such repository on http://127" in refused("hf:me/none")
    there.put("me/one", {"a.pth": b"1"})
    assert refused("hf:me/one@v2") == "hf:me/one has no revision 'v2'"
    there.gated.add("me/gated")
    assert "who have asked for it on its page" in refused("hf:me/gated")
    there.put("me/own", {"a.pth": b"1"})
    there.private.add("me/own")
    hub.fetched("hf:me/own", "weights")
    monkeypatch.setenv("HF_TOKEN", "another")
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert "or it is private; if so, log in" in refused("hf:me/own")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("hf:me/one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    there.shutdown()
    there.server_close()
    for spec in ("hf:me/one", "hf:me/one/a.pth", "hf:me/one@main"):
        assert f"could not get {spec} on http://127" in refused(spec)
    for module in ("huggingface_hub", "huggingface_hub.constants"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "install it by `pip install huggingface_hub`" in refused("hf:me/one")


def test_without_a_network_the_cache_is_enough(there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    there.put("me/one", {"a.pth": b"1", "model.h5": b"2"})
    found = hub.fetched("hf:me/one", "weights")
    there.asked.clear()
    assert hub.fetched(str(found.name), "weights") == found  # it can't have changed
    assert not there.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for spec in (
        "hf:me/one",
        "hf:me/one@main",
        "hf:me/one/a.pth",
        f"hf:me/one@{found.name.revision}",
    ):
        assert hub.fetched(spec, "weights") == found
    assert "has in the cache no file of classifier" in refused("hf:me/one", "classifier")
    assert not there.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    there.shutdown()
    there.server_close()
    with pytest.warns(UserWarning, match="the hub can't be asked about hf:me/one, and what is in"):
        assert hub.fetched("hf:me/one", "weights") == found


def test_weights_are_pushed_and_loaded(there: Hub, ours: Ours, command: Command) -> None:
    from huggingface_hub import ModelCard

    path, _ = ours
    ran = command("push", path, "me/net")
    assert ran.status == 0, ran.err
    commit = there.hash_of("me/net", 1)
    assert there.files("me/net")["weights.safetensors"] == path.read_bytes()
    assert f"hf:me/net@{commit}" in ran.out and str(path) not in ran.out
    card = there.files("me/net")["README.md"].decode()
    head = ModelCard(card).data
    assert head["library_name"] == "vggfeat" and "A" in head["tags"]
    assert head["pipeline_tag"] == "image-feature-extraction"
    local, far = vggfeat.load(path), vggfeat.load("hf:me/net")
    assert far.fingerprint == local.fingerprint and far.fingerprint[:12] in card
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    assert far.spec == f"hf:me/net/weights.safetensors@{commit}"
    assert far.metadata == local.metadata and str(path.parent) not in card
    assert "| trained at S | 36 |" in card and "Classes: x, y, z" in card
    ran = command("info", "hf:me/net")
    assert cells(ran.out, "weights") == [f"{far.spec}, sha256 {far.fingerprint[:12]}"]
    ran = command("push", "hf:me/net", "me/other")
    assert (ran.status, len(ran.err_lines)) == (2, 1)


def test_a_file_on_the_hub_stands_for_a_file(there: Hub, ours: Ours) -> None:
    commit = there.put("me/bare", {"bare.safetensors": _without_metadata(ours[0])})
    with pytest.raises(VggfeatError) as failed:
        vggfeat.load("hf:me/bare")
    name = f"hf:me/bare/bare.safetensors@{commit}"
    assert str(failed.value).startswith(f"{name} doesn't say which preprocessing")
    assert f"torchvision:vgg11@{name}" in str(failed.value)
    with pytest.raises(VggfeatError, match=re.escape(f"torchvision:vgg11@{name} doesn't fit")):
        vggfeat.load("torchvision:vgg11@hf:me/bare")
    there.put("me/bad", {"weights.pt": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."})
    with pytest.raises(VggfeatError, match=r"hf:me/bad/weights\.pt@"):
        vggfeat.load("hf:me/bad")


def test_weights_of_timm_are_pushed_and_loaded(
    there: Hub, command: Command, tmp_path: Path
) -> None:
    """Their name stays, as a file of them doesn't tell it."""
    import safetensors.torch
    import timm

    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(timm.create_model("test_vit").state_dict(), path)
    ran = command("push", f"timm:test_vit@{path}", "me/vit")
    assert ran.status == 0, ran.err
    assert "--weights timm:test_vit@hf:me/vit" in there.files("me/vit")["README.md"].decode()
    far, near = vggfeat.load("timm:test_vit@hf:me/vit"), vggfeat.load(f"timm:test_vit@{path}")
    commit = there.hash_of("me/vit", 1)
    assert far.spec == f"timm:test_vit@hf:me/vit/weights.safetensors@{commit}"
    assert far.fingerprint == near.fingerprint == vggfeat.load(far.spec).fingerprint


def _without_metadata(path: Path) -> bytes:
    import safetensors.torch

    return safetensors.torch.save(safetensors.torch.load_file(path))


def test_a_classifier_is_pushed_and_predicts(
    there: Hub, made: Made, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import ModelCard, constants

    ran = command("push", made.model, "me/flowers", "--private")
    assert ran.status == 0, ran.err
    assert there.private == {"me/flowers"}
    files = there.files("me/flowers")
    assert files["model.h5"] == made.model.read_bytes()
    card = files["README.md"].decode()
    assert ModelCard(card).data["pipeline_tag"] == "image-classification"
    for text in ("| classes | 2 |", "| scales | 32, 48 |", "Classes: blue, red", "| layer | fc7 |"):
        assert text in card
    assert "accuracy" in card and str(made.root) not in card
    assert "vggfeat predict photos --model hf:me/flowers" in card
    images = sorted((made.folder / "red").iterdir())[:2]
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        far, near = vggfeat.open_model("hf:me/flowers"), vggfeat.open_model(made.model)
        np.testing.assert_array_equal(far.scores(images), near.scores(images))
        ran = command("predict", images[0], "--model", "hf:me/flowers")
        assert ran.status == 0 and "red" in ran.out, ran.err
        assert "hf:me/flowers" in command("info", "hf:me/flowers").out
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert command("push", made.model, "me/flowers").status == 0  # its own card and files


def test_local_weights_go_with_a_classifier(
    there: Hub, ours: Ours, made: Made, command: Command, tmp_path: Path
) -> None:
    path, _ = ours
    features, model = tmp_path / "f.h5", tmp_path / "m.h5"
    images = ("--dataset", "folder", "--root", made.folder, "--device", "cpu")
    assert command("extract", *images, "--weights", path, "--out", features).status == 0
    assert command("svm", "--features", features, "--C", 1, "--out", model).status == 0
    assert command("push", model, "me/own").status == 0
    assert there.files("me/own")["weights.safetensors"] == path.read_bytes()
    near = vggfeat.open_model(model).scores([made.folder / "red" / "00.jpg"])
    card = there.files("me/own")["README.md"].decode()
    assert "hf:me/own/weights.safetensors, sha256" in card and str(tmp_path) not in card
    path.rename(tmp_path / "moved.safetensors")
    far = vggfeat.open_model("hf:me/own")
    assert far.weights == (f"hf:me/own/weights.safetensors@{there.hash_of('me/own', 1)}",)
    np.testing.assert_array_equal(far.scores([made.folder / "red" / "00.jpg"]), near)
    ran = command("push", model, "me/own")
    assert ran.status == 1 and f"no weights file at {path}" in ran.err


def test_what_push_refuses(
    there: Hub, ours: Ours, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = ours
    ran = command("push", path, "me/net", "--dry-run")
    assert ran.status == 0 and "library_name: vggfeat" in ran.out, ran.err
    assert not there.asked and not there.commits
    there.put("me/net", {"README.md": b"---\nlicense: mit\n---\nMine: library_name: vggfeat\n"})
    ran = command("push", path, "me/net")
    assert ran.status == 1 and len(ran.err_lines) == 1
    assert "me/net has a README.md that vggfeat didn't write: give --overwrite" in ran.err
    ran = command("push", path, "me/net", "--private")
    assert ran.status == 1 and "is there, and public: leave out --private" in ran.err
    assert command("push", path, "me/net", "--overwrite").status == 0
    assert command("push", path, "me/net").status == 0
    there.put("me/kept", {"weights.safetensors": b"theirs"})
    assert "has a weights.safetensors that" in command("push", path, "me/kept").err
    monkeypatch.setenv("HF_TOKEN", "another")
    ran = command("push", path, "me/net")
    assert ran.status == 1 and "no access to hf:me/net" in ran.err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    ran = command("push", path, "me/net")
    assert ran.status == 1 and "can't write hf:me/net without a token: log in" in ran.err


def test_the_environment_of_a_process_decides(there: Hub, ours: Ours, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as a shell gives them."""
    commit = there.put("me/net", {"weights.safetensors": ours[0].read_bytes()})
    there.private.add("me/net")
    home = tmp_path / "home"
    environment = {**os.environ, "HF_ENDPOINT": there.endpoint, "HF_HOME": str(home)}
    script = "from vggfeat import hub; print(hub.fetched('hf:me/net', 'weights').name)"
    words = ("-c", script)
    for more in ({"HF_TOKEN": TOKEN}, {"HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}):
        there.asked.clear()
        ran = prepared.run(words, {**environment, **more})
        assert ran.stdout == f"hf:me/net/weights.safetensors@{commit}\n", ran.stderr
        assert bool(there.asked) == ("HF_HUB_OFFLINE" not in more)
    assert (home / "hub" / "models--me--net").is_dir()

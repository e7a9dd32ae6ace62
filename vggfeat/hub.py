"""Files on the Hugging Face hub: weights and classifiers by `hf:OWNER/NAME`, and theirs put there.

`hf:OWNER/NAME[/FILE][@REVISION]` stands wherever a file of weights or a classifier does. All goes
through `huggingface_hub`, which is imported when it is needed: its cache, its token, its offline
mode and its endpoint (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT). What is recorded is the file
at the commit that the revision stood for: hf:OWNER/NAME/FILE@COMMIT.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, NoReturn

from vggfeat.checked import shown
from vggfeat.errors import VggfeatError, WrongUsage, reason
from vggfeat.versions import __version__

HUB = "hf:"
FORM = "hf:OWNER/NAME, hf:OWNER/NAME/FILE, or one of them with @REVISION"
Kind = Literal["weights", "classifier"]
ENDINGS: dict[Kind, tuple[str, ...]] = {
    "classifier": (".h5", ".hdf5"),
    "weights": (".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin", ".caffemodel"),
}
"""Of the files that may be meant."""
STEMS: dict[Kind, str] = {"classifier": "model", "weights": "weights"}
"""Of the files that `push` writes, which come first."""
CARD = "README.md"
LIBRARY = "vggfeat"
_OURS = re.compile(rf"^library_name:\s*['\"]?{LIBRARY}['\"]?\s*$", re.M)
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_WORD}/{_WORD}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
MOST_LISTED = 10
LOGIN = "log in by `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Named:
    """What a name on the hub says. file, revision: "" where it doesn't say."""

    repository: str
    file: str = ""
    revision: str = ""

    def __str__(self) -> str:
        file, revision = self.file and f"/{self.file}", self.revision and f"@{self.revision}"
        return f"{HUB}{self.repository}{file}{revision}"


@dataclass(frozen=True)
class Fetched:
    """A file of the hub in its cache. path: there, behind links; name: with file and commit."""

    path: str
    name: Named

    def told(self, text: str) -> str:
        """A text in which the file has its name on the hub."""
        return text.replace(self.path, str(self.name))

    @contextmanager
    def called(self) -> Iterator[None]:
        """Inside, what is wrong with the file is told by that name."""
        try:
            yield
        except VggfeatError as error:
            error.args = (self.told(str(error)), *error.args[1:])
            raise


def on_hub(spec: str | os.PathLike[str]) -> bool:
    return os.fspath(spec).startswith(HUB)


def is_repository(text: str) -> bool:
    """Whether a text can be OWNER/NAME."""
    return bool(_REPOSITORY.fullmatch(text)) and ".." not in text and "--" not in text


def named(spec: str) -> Named:
    """What `hf:OWNER/NAME[/FILE][@REVISION]` says. Raises WrongUsage where it is no such name."""
    place, at, revision = spec.removeprefix(HUB).partition("@")
    owner, _, rest = place.partition("/")
    name, slash, file = rest.partition("/")
    sound = not any(part in ("", ".", "..") for part in file.split("/")) if slash else True
    if not sound or (at and not revision) or not is_repository(f"{owner}/{name}"):
        raise WrongUsage(f"{shown(spec)} names nothing on the hub: give {FORM}")
    return Named(f"{owner}/{name}", file, revision)


def fetched(spec: str, *kinds: Kind) -> Fetched:
    """The file that a name means, in huggingface_hub's cache, fetched where it isn't there.

    Of several files in a repository one that `push` writes is meant, else the only one with an
    ending of such a kind; where several kinds are asked for, of the first that there is. Without
    a network what is in the cache is taken, with a warning where HF_HUB_OFFLINE isn't set. Raises
    VggfeatError: no such repository, revision or file, no access, no network; WrongUsage: no such
    name.
    """
    name = named(spec)
    hub = _library()
    if name.file and _COMMIT.fullmatch(name.revision):  # which never changes
        cached = hub.try_to_load_from_cache(name.repository, name.file, revision=name.revision)
        if isinstance(cached, str):
            return Fetched(os.path.realpath(cached), name)
    revision = name.revision or None
    failed: BaseException | None = None
    try:
        info = hub.HfApi().model_info(name.repository, revision=revision)
        files = [each.rfilename for each in info.siblings or []]
    except hub.errors.RevisionNotFoundError as error:
        raise VggfeatError(f"{HUB}{name.repository} has no revision {name.revision!r}") from error
    except _failures() as error:
        failed = error
        files = _in_cache(name, error)
        if not isinstance(error, hub.errors.OfflineModeIsEnabled):
            warnings.warn(
                f"the hub can't be asked about {name}, and what is in the cache is taken:"
                f" {reason(error)[:200]}",
                stacklevel=2,
            )
    file = _meant(name, files, kinds, "" if failed is None else " in the cache")
    try:
        path = hub.hf_hub_download(
            name.repository, file, revision=revision, local_files_only=failed is not None
        )
    except _failures() as error:
        _refuse(str(name), failed or error)
    commit = path.removesuffix(f"/{file}").rpartition("/")[2]
    return Fetched(os.path.realpath(path), Named(name.repository, file, commit))


def _library() -> ModuleType:
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise VggfeatError(
            "the hub needs huggingface_hub: install it by `pip install huggingface_hub`"
        ) from error
    hub: ModuleType = huggingface_hub
    if not os.isatty(2) and hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        hub.utils.disable_progress_bars()  # a file of them helps nobody
    return hub


def _failures() -> tuple[type[BaseException], ...]:
    """What huggingface_hub raises where something can't be had: its own errors are its HTTP
    library's, of which there have been three, or OSError.
    """
    # RuntimeError: of hf_xet, which moves large files
    return (OSError, ValueError, RuntimeError, *_library().errors.HfHubHTTPError.__bases__)


def _in_cache(name: Named, failed: BaseException) -> list[str]:
    """The files of a repository that are in the cache. Raises VggfeatError, for what failed
    before, where it isn't there.
    """
    hub = _library()
    try:
        folder = hub.snapshot_download(
            name.repository,
            revision=name.revision or None,
            local_files_only=True,
            allow_patterns=[],  # whatever is there, were it not all
        )
    except _failures():
        _refuse(str(name), failed)
    return sorted(
        os.path.relpath(os.path.join(where, file), folder)
        for where, _, files in os.walk(folder)
        for file in files
    )


def _meant(name: Named, files: Sequence[str], kinds: Sequence[Kind], where: str) -> str:
    """The file of these that a name means. where: in words, the files are. Raises VggfeatError."""
    listed = ", ".join(files[:MOST_LISTED]) + (", ..." if len(files) > MOST_LISTED else "")
    there = f"{HUB}{name.repository}{name.revision and f'@{name.revision}'} has{where}"
    if name.file:
        if name.file not in files:
            raise VggfeatError(f"{there} no file {name.file}: there are {listed or 'none'}")
        return name.file
    own = [
        [each for each in files if each in {f"{STEMS[kind]}{end}" for end in ENDINGS[kind]}]
        for kind in kinds
    ]
    fitting = [[each for each in files if each.lower().endswith(ENDINGS[kind])] for kind in kinds]
    for kind, fit in zip([*kinds, *kinds], [*own, *fitting], strict=True):
        if len(fit) > 1:
            many = ", ".join(fit[:MOST_LISTED]) + (", ..." if len(fit) > MOST_LISTED else "")
            one = Named(name.repository, fit[0], name.revision)
            raise VggfeatError(f"{there} several files of {kind}, {many}: give one, as {one}")
        if fit:
            return fit[0]
    ends = ", ".join(end for kind in kinds for end in ENDINGS[kind])
    raise VggfeatError(
        f"{there} no file of {' or '.join(kinds)} ({ends}): there are {listed or 'none'}"
    )


def _refuse(what: str, error: BaseException, writing: bool = False) -> NoReturn:
    """Raise VggfeatError for what huggingface_hub says. what: was asked for, or to be written."""
    from huggingface_hub import constants, errors

    not_cached = "" if writing else f", and it is not in the cache, {constants.HF_HUB_CACHE}"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.GatedRepoError):
        told = f"{what} is given to those only who have asked for it on its page; then {LOGIN}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        told = (
            f"{what}: there is no such repository on {constants.ENDPOINT}, or it is private; if so,"
            f" {LOGIN}"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        told = f"{what}: the repository has no such revision"
    elif status in (401, 403):
        told = f"no access to {what} on {constants.ENDPOINT} ({status}): {LOGIN}, with the right"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        told = f"{what} is not to be had: HF_HUB_OFFLINE is set{not_cached}; unset it"
    elif isinstance(error, ValueError) and not isinstance(error, OSError):
        told = f"{what} can't be: {reason(error)}"
    else:
        verb = "write" if writing else "get"
        told = f"could not {verb} {what} on {constants.ENDPOINT}: {reason(error)[:200]}{not_cached}"
    raise VggfeatError(told) from error


# --- what is put there ----------------------------------------------------------------------------


def local_file(spec: str) -> str:
    """The local file of a network's spec, as it is recorded: absolute, alone or behind an @; ""
    where it is none.
    """
    file = spec if os.path.isabs(spec) else spec.partition("@")[2]
    return file if os.path.isabs(file) else ""


def beside(spec: str, number: int, networks: int) -> str:
    """The name in a repository of a local file of weights that a classifier there was learned
    with; "" of weights that have a name of their own. number: of the network, from 0, of so many.
    """
    file = local_file(spec)
    which = f"-{number + 1}" if networks > 1 else ""
    return f"{STEMS['weights']}{which}{Path(file).suffix.lower()}" if file else ""


def there(spec: str, name: Named) -> str:
    """A recorded spec whose local file is this one on the hub."""
    return f"{spec.removesuffix(local_file(spec))}{name}"


def push(
    repository: str, files: Mapping[str, Path | bytes], *, private: bool, overwrite: bool
) -> str:
    """Put files into a repository, which is made where there is none, in one commit; its hash.

    files: name -> a local file, or content. private: of a repository that is made. Where one of
    these names is there, and no card of this program, it is replaced with `overwrite` only.
    Raises VggfeatError: no token, no access, no network, another's files, a public repository
    where a private one is asked for.
    """
    hub = _library()
    where = f"{HUB}{repository}"
    try:
        if hub.get_token() is None and not hub.constants.HF_HUB_OFFLINE:
            raise VggfeatError(f"can't write {where} without a token: {LOGIN}")
        api = hub.HfApi()
        try:
            info = api.model_info(repository)
        except hub.errors.RepositoryNotFoundError as error:
            if isinstance(error, hub.errors.GatedRepoError):
                raise
            api.create_repo(repository, private=private or None)
            info = None
        if info is not None:
            if private and not info.private:
                raise VggfeatError(f"{where} is there, and public: leave out `private`")
            present = [each.rfilename for each in info.siblings or []]
            if not overwrite:
                _refuse_anothers(repository, info.sha, present, files)
        commit = api.create_commit(
            repository,
            [hub.CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=f"{', '.join(files)} by {LIBRARY} {__version__}",
            parent_commit=info.sha if info else None,  # what was looked at
        )
    except _failures() as error:
        _refuse(where, error, writing=True)
    return str(commit.oid)


def _refuse_anothers(
    repository: str, commit: str | None, present: Sequence[str], names: Iterable[str]
) -> None:
    """Raise VggfeatError where files would be replaced of which no card of this program tells."""
    taken = [name for name in names if name in present]
    if CARD in present:
        card = _library().hf_hub_download(repository, CARD, revision=commit)
        text = Path(card).read_text(errors="replace")
        if text.startswith("---") and _OURS.search(text.split("\n---", 1)[0]):
            return
    if taken:
        raise VggfeatError(
            f"{HUB}{repository} has a {' and a '.join(taken)} that {LIBRARY} didn't write: give"
            " `overwrite` to replace it, or another repository"
        )

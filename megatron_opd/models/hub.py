"""Models by name: a repository of the Hugging Face hub, or a GGUF file, becomes the directory that all else reads.

    HuggingFaceTB/SmolLM2-135M-Instruct           its branch main
    HuggingFaceTB/SmolLM2-135M-Instruct@v1.0      a branch, a tag or a commit
    Org/Name-GGUF:name.Q4_K_M.gguf                a GGUF file of a repository
    models/name.gguf                              a GGUF file here

A directory of that name wins. Everything is kept in the cache of huggingface_hub, which also decides by the environment
where that is (HF_HOME), whether the network is used (HF_HUB_OFFLINE), which hub is asked (HF_ENDPOINT) and as whom
(HF_TOKEN). Downloads that were cut go on where they ended.
"""

from __future__ import annotations

import difflib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_opd.config import StudentConfig, TeacherConfig
from megatron_opd.config.model_names import NAME
from megatron_opd.models import hub_errors

Need = Literal["config", "texts", "weights"]
"""How much of a model is read: config.json alone, everything but weights, or all."""

_TEXTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_PATTERNS: Mapping[Need, list[str]] = {
    "config": ["config.json"],
    "texts": _TEXTS,
    "weights": [*_TEXTS, "*.safetensors"],
}
_NEVER = ["*/*", "consolidated*.safetensors"]
"""Other forms of the same weights: folders such as onnx/, and Mistral's own format."""
_COMMIT = re.compile("[0-9a-f]{40}")
_CACHED = re.compile(r"models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?")
_ROOM_BYTES = 64 << 20
_ETAG_S = 10.0
"""Longest wait for a file's first answer, in seconds; huggingface_hub's own, which HF_HUB_ETAG_TIMEOUT replaces."""


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository of the hub at a revision; `file` is empty but for a GGUF file."""

    repo: str
    revision: str
    file: str


def needs(
    student: StudentConfig, teachers: Sequence[TeacherConfig], *, starts_servers: bool, asks_teachers: bool
) -> dict[str, Need]:
    """How much a run reads of each of its models, by their names as written.

    `starts_servers` is for the process that starts servers, which read the weights on this machine; `asks_teachers`
    for a run that loads teachers for its evaluations.
    """
    found: dict[str, Need] = {}
    for teacher in teachers:
        is_elsewhere = teacher.is_served and (bool(teacher.servers.urls) or not starts_servers)
        only_texts = is_elsewhere and teacher.carrier != "hidden" and not asks_teachers
        if found.get(teacher.model) != "weights":
            found[teacher.model] = "texts" if only_texts else "weights"
    return found | {student.model: "weights"}


def to_stderr(line: str) -> None:
    """Say a line to the user, beside what a command prints."""
    print(line, file=sys.stderr, flush=True)


def directories(
    wanted: Mapping[str, Need], what: Mapping[str, str], *, say: Callable[[str], None] = to_stderr
) -> dict[str, str]:
    """The directory of each name. Raises ValueError listing every one that cannot be had.

    `what` has the setting or option that gave a name, for the message.
    """
    found, unavailable = look_up(wanted, say=say)
    if unavailable:
        raise ValueError("\n".join(f"{what[text]}: {why}" for text, why in unavailable.items()))
    return found


def look_up(
    wanted: Mapping[str, Need], *, say: Callable[[str], None] = to_stderr
) -> tuple[dict[str, str], dict[str, str]]:
    """The directory of each name, and the reason for each that cannot be had."""
    found: dict[str, str] = {}
    unavailable: dict[str, str] = {}
    for text, need in wanted.items():
        try:
            found[text] = directory(text, need, say=say)
        except ValueError as error:
            unavailable[text] = str(error)
    return found, unavailable


def directory(text: str, need: Need = "weights", *, say: Callable[[str], None] = to_stderr) -> str:
    """The directory of a model: `text` itself where it is no name; else what is downloaded, or unpacked.

    Raises ValueError with the reason and the remedy.
    """
    if Path(text).is_dir():
        return text
    if Path(text).is_file() and text.endswith(".gguf"):
        from megatron_opd.models import gguf_dir

        return str(gguf_dir.unpacked(Path(text), say=say))
    if (matched := NAME.fullmatch(text)) is None:
        return text  # whoever reads it says that it is not there
    name = HubName(matched["repo"], matched["revision"] or "main", matched["file"] or "")
    try:
        return _gguf(name, say) if name.file else _snapshot(name, need, say)
    except hub_errors.Unavailable as refused:
        raise ValueError(f"{text} is not a Hugging Face model directory, and {refused}{nearby(text)}") from None


def pinned(text: str, found: str) -> str:
    """A name with the commit that it was resolved to; `text` itself where `found`, its directory, is not the hub's."""
    matched = NAME.fullmatch(text)
    if matched is None or found == text:
        return text
    if not matched["file"]:
        return origin(found) or text
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(matched["repo"], matched["file"], revision=matched["revision"] or "main")
    of = origin(Path(file).parent) if isinstance(file, str) else ""
    return f"{of}:{matched['file']}" if of else text


def origin(found: str | Path) -> str:
    """`Org/Name@commit` of a directory in the cache of the hub; "" of any other."""
    matched = _CACHED.search(str(found))
    return f"{matched['repo'].replace('--', '/', 1)}@{matched['commit']}" if matched else ""


def shown(found: str) -> str:
    """A model's directory for people: what was asked for, where it is in the cache of the hub."""
    return origin(found) or found


def lacks_weights(model_dir: str | Path) -> bool:
    """Whether this is a directory of the hub's cache whose weights have not been downloaded, or not all of them."""
    if not origin(model_dir):
        return False
    place = Path(model_dir)
    try:
        index = json.loads((place / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return not any(place.glob("*.safetensors"))
    return not all((place / file).is_file() for file in files)


def notes(settings: Mapping[str, str]) -> list[str]:
    """Lines about models of the hub, by their directories: which commits they are, and whose weights are not here."""
    return [
        f"{setting}: {of}" + ("; its weights are not here yet, `train` downloads them" * lacks_weights(found))
        for found, setting in settings.items()
        if (of := origin(found))
    ]


def nearby(text: str) -> str:
    """For the end of a message: directories here whose names are like a path that does not exist; "" for none."""
    path = Path(text)
    try:
        others = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, others, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""


def _snapshot(name: HubName, need: Need, say: Callable[[str], None]) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    how: dict[str, Any] = {"revision": name.revision, "allow_patterns": _PATTERNS[need], "ignore_patterns": _NEVER}
    with hub_errors.explained(name.repo, name.revision):
        found = ""
        if _COMMIT.fullmatch(name.revision):  # which never changes: the hub is not asked for what is here
            with suppress(LocalEntryNotFoundError):
                found = snapshot_download(name.repo, local_files_only=True, **how)
        if not found or (need == "weights" and lacks_weights(found)):
            _announce(name, need, say)
            found = snapshot_download(name.repo, etag_timeout=_ETAG_S, library_name="megatron-opd", **how)
    if not (Path(found) / "config.json").is_file():
        raise hub_errors.Unavailable(f"the hub's {name.revision} has no config.json, as models of transformers have")
    if need == "weights" and lacks_weights(found):
        raise hub_errors.Unavailable(
            f"the cache has no safetensors of {name.revision}, and the hub was not asked for them"
        )
    return found


def _announce(name: HubName, need: Need, say: Callable[[str], None]) -> None:
    """Say what is going to be downloaded, if anything.

    Raises Unavailable where the repository has no safetensors, or the disk no room. A hub that does not answer is no
    error yet: what is asked for may be in the cache.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    if constants.HF_HUB_OFFLINE:
        return
    try:
        info = HfApi().model_info(name.repo, revision=name.revision, timeout=_ETAG_S, files_metadata=True)
    except Exception:  # of three HTTP libraries; the download meets it again, and says it
        return
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if need == "weights" and not any(path.endswith(".safetensors") and "/" not in path for path in sizes):
        raise hub_errors.Unavailable(_no_safetensors(name, list(sizes)))
    wanted = filter_repo_objects(sizes, allow_patterns=_PATTERNS[need], ignore_patterns=_NEVER)
    missing = {
        path: sizes[path]
        for path in wanted
        if not isinstance(try_to_load_from_cache(name.repo, path, revision=info.sha), str)
    }
    _check_room(name, sum(missing.values()), Path(constants.HF_HUB_CACHE))
    if missing:
        what = f"{len(missing)} files of {name.repo}@{(info.sha or '')[:12]} ({size(sum(missing.values()))})"
        say(f"downloading {what} into {constants.HF_HUB_CACHE}")


def _no_safetensors(name: HubName, files: list[str]) -> str:
    others = [path for path in files if path.endswith((".bin", ".gguf", ".pt", ".pth"))]
    told = f"; it has {', '.join(others[:3])}" if others else ""
    ggufs = [path for path in others if path.endswith(".gguf")]
    how = f"; name a GGUF file so: {name.repo}:{ggufs[0]}" if ggufs else "; name a model that has them"
    return f"the hub's {name.revision} has no safetensors, which weights are read from{told}{how}"


def _check_room(name: HubName, num_bytes: int, cache: Path) -> None:
    free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.is_dir())).free
    if num_bytes and free < num_bytes + _ROOM_BYTES:
        raise hub_errors.Unavailable(
            f"the hub's needs {size(num_bytes)} in {cache}, where {size(free)} are free; make room there, or let"
            " HF_HOME name a directory on another disk"
        )


def size(num_bytes: float) -> str:
    """A number of bytes for people."""
    unit, name = (1e9, "GB") if num_bytes >= 1e8 else (1e6, "MB") if num_bytes >= 1e5 else (1e3, "kB")
    return f"{num_bytes / unit:.2f} {name}"


def _gguf(name: HubName, say: Callable[[str], None]) -> str:
    from huggingface_hub import hf_hub_download

    from megatron_opd.models import gguf_dir

    more: dict[str, Any] = {"etag_timeout": _ETAG_S, "library_name": "megatron-opd"}
    with hub_errors.explained(name.repo, name.revision, name.file):
        file = hf_hub_download(name.repo, name.file, revision=name.revision, **more)
    return str(gguf_dir.unpacked(Path(file), say=say))

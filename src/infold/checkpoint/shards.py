"""A checkpoint: one safetensors file, or a folder of them with an index; or a GGUF file, or its
parts; and what lies beside."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infold.checkpoint.files import (
    exists,
    locate,
    read_bytes,
    read_json,
    read_object,
    safe_child,
    walk,
)
from infold.checkpoint.gguf import is_gguf, part_of, parts_beside, read_gguf_header
from infold.checkpoint.safetensors import Header, TensorInfo, parse_json, read_header
from infold.errors import CorruptFile, Refusal, StorageFailure

__all__ = [
    "CARD",
    "GGUF",
    "INDEX",
    "JOURNAL",
    "KEPT_CARD",
    "NOT_CONTENT",
    "RECEIPT",
    "SECOND_COPIES",
    "SINGLE",
    "TOKENIZERS",
    "Checkpoint",
    "Shard",
    "companion",
    "is_bundled",
    "is_foreign",
    "is_loaded",
    "is_lone",
    "kept_name",
    "misnamed",
    "open_checkpoint",
    "read_exactly",
    "read_receipt",
    "read_shard_header",
    "refuse_unfinished",
    "renamed",
    "without_owner",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RECEIPT = "infold-receipt.json"
JOURNAL = "infold-undo.journal"  # there while a folder is edited in place
GGUF = ".gguf"
CARD = "README.md"
KEPT_CARD = "README.base.md"  # the base's, where `infold deploy` wrote a card of its own
# one of them is in every folder with a tokenizer
TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "spiece.model",
)  # fmt: skip

# A second copy of the base's weights in another container.
SECOND_COPIES = (
    "pytorch_model*.bin", "pytorch_model*.bin.index.json", "tf_model*.h5", "flax_model*.msgpack",
    "rust_model.ot", "*.gguf", "consolidated*.pth", "consolidated*.safetensors",
)  # fmt: skip
# Copying those, or an adapter that a loader would attach on top of the merged model, would undo the
# merge behind the user's back.
_STALE = (*SECOND_COPIES, "adapter_config.json", "adapter_model.*", RECEIPT, "infold-undo*")
# What loaders read beside the weights: such a file, added to a merged model, changes it.
_LOADED = (
    "*config.json", "*.jinja", "chat_template.json", "*token*", "vocab.*", "merges.txt", "*.model",
    "*.safetensors", "adapter_*",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"  # the one folder that they look into
NOT_CONTENT = (".git", ".cache", "__pycache__")
# What `infold deploy` and the records of other verbs put beside merged weights.
_BESIDE = re.compile(
    r"deployment_config\.json|README\.base\.md|serving/(\w+\.sh|Modelfile)|records/[\w.-]+\.json"
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint."""

    name: str
    path: Path
    header: Header


@dataclass(frozen=True)
class Checkpoint:
    """A base or merged model as it lies on disk. Nothing but headers has been read."""

    path: Path
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None  # the parsed index of a sharded checkpoint
    config: dict[str, Any] | None  # config.json; None for a lone file
    side_files: tuple[str, ...]  # relative paths, copied as bytes
    left_out: tuple[str, ...]  # relative paths that a merged model must not carry
    where: Mapping[str, int] = field(repr=False)  # tensor name -> number of its shard
    called: str = ""  # the path or Hub id that it had, where it is one that an undo record tells of

    def info(self, name: str) -> TensorInfo:
        return self.shards[self.where[name]].header.tensors[name]

    @property
    def nbytes(self) -> int:
        return sum(shard.header.file_size for shard in self.shards)

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def is_gguf(self) -> bool:
        return self.shards[0].name.endswith(GGUF)

    @property
    def home(self) -> Path:
        """The folder that its files lie in."""
        return self.path if self.is_folder else self.path.parent


def is_lone(path: Path) -> bool:
    """Whether a model at this path is (or will be) a single file, and not a folder."""
    return path.suffix == GGUF and not path.is_dir()


def companion(path: Path, name: str) -> Path:
    """Where a file of infold's own (the receipt, the undo record) lies that belongs to the model at
    `path`: in its folder, or beside a single file, with that one's name before its own."""
    return path.with_name(f"{path.name}.{name}") if is_lone(path) else path / name


def renamed(path: Path, name: str) -> str:
    """Advice on a GGUF file without a companion: files go with it by its name, so it lost them if
    it was renamed or moved. Empty for what is a folder."""
    if not is_lone(path):
        return ""
    if not (gone := without_owner(path, name)):
        return ". It goes with the file by its name: if this file was renamed or moved, undo that"
    listed = " and ".join(gone)
    first = path.with_name(gone[0].removesuffix(f".{name}"))
    return f". Beside it lies {listed}: if this file was renamed, undo that (mv {path} {first})"


def misnamed(path: Path) -> str:
    """Advice on a GGUF file of another name, where what belongs to it is looked for by that name;
    empty for what is none."""
    if is_lone(path) or not path.is_file() or not is_gguf(path):
        return ""
    return f". It holds GGUF: call it {path.name}{GGUF}, since the files that go with it go by that"


def without_owner(path: Path, name: str) -> list[str]:
    """Companions beside a GGUF file of files that are not there."""
    found = sorted(file.name for file in path.parent.glob(f"*{GGUF}.{name}"))
    return [f for f in found if not os.path.lexists(path.with_name(f.removesuffix(f".{name}")))]


def refuse_unfinished(path: Path) -> None:
    """Refuse weights that an edit in place is at, or was killed in the middle of.

    path: a model's folder, or a file of one. Everybody who reads weights asks, also where somebody
    else opens the files (transformers, a server). The edit can be of the folder or of one file of
    it, whichever of the two is given; of what a link leads to; of a GGUF file renamed since.
    Raises Refusal with the command that completes it.
    """
    files = [path]
    if path.is_dir():
        dense = [p for p in path.glob("*.safetensors") if not p.name.startswith("adapter_")]
        files += sorted(dense or path.glob(f"*{GGUF}"))
    reasons: dict[str, str] = {}  # by the journal, which has several names where links lead to it
    # each once: a model has hundreds of shards in one folder
    places = list(dict.fromkeys(p for file in files for p in (file, Path(os.path.realpath(file)))))
    wholes = dict.fromkeys(w for p in places for w in ([p] if p.is_dir() else [p.parent, p]))
    for whole in wholes:
        if os.path.lexists(journal := companion(whole, JOURNAL)):
            reasons.setdefault(
                os.path.realpath(journal),
                f"{whole}: is being edited in place, or was left in the middle of it; "
                f"`infold inspect {whole}` finishes that",
            )
    lone = {place.parent: place for place in reversed(places) if is_lone(place)}
    for place in reversed(lone.values()):
        for name in without_owner(place, JOURNAL):
            owner = place.with_name(name.removesuffix(f".{JOURNAL}"))
            reasons.setdefault(
                os.path.realpath(place.with_name(name)),
                f"{place}: an edit of {owner}, which is not there, was left in the middle; if this "
                f"file was renamed, undo that (mv {place} {owner}), and `infold inspect {owner}` "
                f"finishes it; else remove {owner}.infold-undo*",
            )
    if reasons:
        raise Refusal(reasons.values())


def kept_name(folder: Path, name: str) -> str:
    """Under which name a merged folder holds the base's side file `name`: `infold deploy` moves the
    base's model card when it writes its own."""
    moved = name == CARD and os.path.lexists(folder / KEPT_CARD)
    return KEPT_CARD if moved else name


def read_shard_header(path: Path) -> Header:
    """The header of a file of either container, by its name; raises as its parser does."""
    return read_gguf_header(path) if path.suffix == GGUF else read_header(path)


def open_checkpoint(
    name: str | os.PathLike[str], *, in_place: bool = False, told: Collection[str] = ()
) -> Checkpoint:
    """Open a folder, a .safetensors or GGUF file or a Hub id; read and check every header.

    Of a GGUF model in several parts the path is that of the first. told: names of the shards of a
    folder, where something else than its index tells them. If they are there, they are the shards;
    the index is not looked at.

    Raises CorruptFile for broken files, Refusal for what is no checkpoint, and as
    `refuse_unfinished` does, but for those who finish the edit (`in_place`).
    """
    path = locate(name, never=_STALE)
    if not in_place:
        refuse_unfinished(path)
    if path.is_file():
        if path.suffix == GGUF or is_gguf(path):
            return _assemble(path, _parts(path), None)
        if path.suffix != ".safetensors":
            raise Refusal(f"{path}: neither a .safetensors nor a GGUF file; infold reads no others")
        return _assemble(path, [Shard(path.name, path, read_header(path))], None)
    files = {n: safe_child(path, n) for n in sorted(told) if n.endswith(".safetensors")}
    if files and all(map(exists, files.values())):
        return _assemble(
            path, [Shard(n, file, read_header(file)) for n, file in files.items()], None
        )
    if exists(path / INDEX):
        index = read_json(safe_child(path, INDEX))
        return _assemble(path, _indexed(path, index), index)
    if exists(path / SINGLE):
        file = safe_child(path, SINGLE)
        return _assemble(path, [Shard(SINGLE, file, read_header(file))], None)
    lone = sorted(p.name for p in path.glob("*.safetensors"))
    if len(lone) == 1 and not lone[0].startswith("adapter_model"):
        file = safe_child(path, lone[0])
        return _assemble(path, [Shard(lone[0], file, read_header(file))], None)
    if any(path.glob("pytorch_model*.bin")):
        raise Refusal(
            f"{path}: holds PyTorch pickles only; convert it once with transformers' "
            "from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    if models := _models(path):
        if len(models) > 1:
            listed = ", ".join(file.name for file in models)
            raise Refusal(f"{path}: holds several GGUF models ({listed}); give one of the files")
        return _assemble(path, _parts(models[0]), None)
    swapped = ""
    if exists(path / "adapter_config.json"):
        swapped = ". It looks like an adapter: the base comes first, then its adapters"
    if path != Path(name):
        swapped = ". Of a Hub repository GGUF files are not fetched: download one, give its path"
    raise Refusal(
        f"{path}: no checkpoint: neither {SINGLE} nor {INDEX} nor a GGUF file is there{swapped}"
    )


def _models(path: Path) -> list[Path]:
    """The GGUF models of a folder, each by its first part. Projectors of images, importance
    matrices and adapters, which may lie there too, are none."""
    found = []
    for name in sorted(p.name for p in path.glob("*" + GGUF)):
        file = safe_child(path, name)
        told = read_gguf_header(file).metadata
        kind, architecture = told.get("general.type", "model"), told.get("general.architecture")
        if kind == "model" and architecture not in ("clip", None) and not part_of(file, told)[0]:
            found.append(file)
    return found


def _parts(path: Path) -> list[Shard]:
    """A GGUF file, or all parts of the model that it is the first of."""
    header = read_gguf_header(path)
    count = part_of(path, header.metadata)[1]
    if count == 1:  # of another name: what it would be called in a folder
        return [Shard(path.name.removesuffix(GGUF) + GGUF, path, header)]
    files = parts_beside(path, count)
    if lacking := [file for file in files if not exists(file)]:
        raise CorruptFile(f"{file}: a part of {path}, and not there" for file in lacking)
    shards = []
    for expected, file in enumerate(files):
        safe_child(path.parent, file.name)
        header = read_gguf_header(file)
        if part_of(file, header.metadata) != (expected, count):
            raise CorruptFile(f"{file}: tells that it is another part than its name does")
        shards.append(Shard(file.name, file, header))
    total: Any = shards[0].header.metadata.get("split.tensors.count")
    found = sum(len(shard.header.tensors) for shard in shards)
    if total is not None and total != found:
        raise CorruptFile(f"{path}: tells of {total} tensors, and its parts have {found}")
    return shards


def _indexed(path: Path, index: Any) -> list[Shard]:
    """The shards that the index names, each tensor checked to be where the index says."""
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where:
        raise CorruptFile(f"{path / INDEX}: weight_map is missing or empty")
    if not all(isinstance(file, str) for file in where.values()):
        raise CorruptFile(f"{path / INDEX}: weight_map must map tensor names to file names")
    told: dict[str, set[str]] = {}
    for tensor, file_name in where.items():
        told.setdefault(file_name, set()).add(tensor)
    names = sorted(told)
    # a name such as config.json would be overwritten by a file of the output
    problems = [
        f"{path / INDEX}: {name!r} is not the name of a safetensors file"
        for name in names
        if not name.endswith(".safetensors") or not name.isprintable()
    ]
    if problems:
        raise CorruptFile(problems)
    shards = []
    for name in names:
        file = safe_child(path, name)
        if not exists(file):
            problems.append(
                f"{file}: named by the index, but not there; the download is incomplete"
            )
        else:
            shards.append(Shard(name, file, read_header(file)))
    if problems:
        raise CorruptFile(problems)
    for shard in shards:
        mine, found = told[shard.name], set(shard.header.tensors)
        problems += [
            f"{shard.path}: {t!r} is in the index, not in the file" for t in sorted(mine - found)
        ]
        problems += [
            f"{shard.path}: {t!r} is in the file, not in the index" for t in sorted(found - mine)
        ]
    if problems:
        raise CorruptFile(problems)
    return shards


def _assemble(path: Path, shards: list[Shard], index: dict[str, Any] | None) -> Checkpoint:
    where: dict[str, int] = {}
    for number, shard in enumerate(shards):
        for name in shard.header.tensors:
            if name in where:
                raise CorruptFile(f"{shard.path}: {name!r} is also in {shards[where[name]].path}")
            where[name] = number
    config = None
    side: list[str] = []
    left: list[str] = []
    if path.is_dir():
        side, left = _beside(path, shards)
        if "config.json" in side:
            raw = read_bytes(safe_child(path, "config.json"))
            value = parse_json(raw, str(path / "config.json"), infinity=True)
            if not isinstance(value, dict):
                raise CorruptFile(f"{path / 'config.json'}: must hold a JSON object")
            config = value
    return Checkpoint(path, tuple(shards), index, config, tuple(side), tuple(left), where)


def _beside(path: Path, shards: list[Shard]) -> tuple[list[str], list[str]]:
    """All other files of the folder, as (to copy, to leave out), in sorted order."""
    mine = {shard.name for shard in shards} | {INDEX}
    side: list[str] = []
    left: list[str] = []
    for folder, folders, files in walk(path):
        here = Path(folder).relative_to(path)
        left += [str(here / name) for name in folders if name in NOT_CONTENT]
        folders[:] = sorted(name for name in folders if name not in NOT_CONTENT)
        for name in folders:
            if (Path(folder) / name).is_symlink():  # its content is copied from where it lies
                safe_child(path, str(here / name))
                left.append(str(here / name))
        for name in sorted(files):
            relative = str(here / name)
            if relative in mine:
                continue
            file = safe_child(path, relative)
            if not file.is_file():
                raise Refusal(f"{file}: neither a file nor a folder, or a dangling link; remove it")
            top = here == Path(".")
            if is_foreign(relative, shards[0].name) or (top and _repeats(file, shards)):
                left.append(relative)
            else:
                side.append(relative)
    return side, left


def is_foreign(name: str, shard: str) -> bool:
    """Whether a file, by its path in a checkpoint, is never carried over: it is infold's own, of a
    deployment, of version control, or weights once more. shard: the name of one, for its kind."""
    stale = "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in _STALE)
    if name.endswith(GGUF) and shard.endswith(GGUF):
        stale = False  # such as a projector of images, which belongs to the model
    return stale or is_bundled(name) or not set(NOT_CONTENT).isdisjoint(name.split("/"))


def is_bundled(name: str) -> bool:
    """Whether a file, by its path in a checkpoint, is of a deployment and not of the model."""
    return _BESIDE.fullmatch(name) is not None


def is_loaded(name: str) -> bool:
    """Whether a file, by its path in a checkpoint, is one that loaders read beside the weights."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == _TEMPLATES and file.endswith(".jinja")
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in _LOADED)


def _repeats(file: Path, shards: list[Shard]) -> bool:
    """Whether an unlisted safetensors file holds tensors of the checkpoint once more."""
    if file.suffix != ".safetensors":
        return False
    names = read_header(file).tensors.keys()
    return any(not names.isdisjoint(shard.header.tensors) for shard in shards)


def read_exactly(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from `offset`; a file that ends early is a CorruptFile, never a short read."""
    done = 0
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise StorageFailure(f"{path}: {error.strerror}") from error
        if got == 0:
            raise CorruptFile(
                f"{path}: ends at byte {offset + done:,}; it changed while it was read"
            )
        done += got


def read_receipt(path: Path) -> dict[str, Any]:
    """The receipt of a merged folder or GGUF file. Raises CorruptFile for one of another infold,
    which does not tell the digests of all files."""
    place = companion(path, RECEIPT)
    receipt = read_object(place)
    sides = receipt.get("side_files")
    if not isinstance(sides, dict) or not all(isinstance(told, str) for told in sides.values()):
        raise CorruptFile(
            f"{place}: is not a receipt that this infold writes: no side_files with the digests of "
            "what lies beside the shards; if another version made it, merge again"
        )
    return receipt

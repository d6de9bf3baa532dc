"""Hub ids, without a network: a cache as huggingface_hub lays it out, and what it lacks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects

import handmade
import infold

REVISION = "0123456789abcdef0123456789abcdef01234567"

# Runs in a process of its own, since huggingface_hub reads its environment when it is imported.
CHILD = """
import json, sys, infold
told = []
for base, adapter, out in json.loads(sys.argv[1]):
    try:
        told.append(["done", infold.merge(base, adapter, out).base["path"]])
    except infold.InfoldError as error:
        told.append([type(error).__name__, str(error)])
print(json.dumps(told))
"""


def into_cache(cache: Path, name: str, folder: Path) -> Path:
    """A folder as a cached snapshot: files are links into the blobs. Returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    for part in (repository / "blobs", repository / "refs", snapshot):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        blob = hashlib.sha256(data).hexdigest()
        (repository / "blobs" / blob).write_bytes(data)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def merge_in_child(cache: Path, *merges: tuple[str, str, Path]) -> list[list[str]]:
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    given = json.dumps([[base, adapter, str(out)] for base, adapter, out in merges])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cache,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    result: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture
def cache(tmp_path: Path, sharded: Path, adapter: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    into_cache(folder, "org/model", sharded)
    into_cache(folder, "someone/some-lora", adapter)
    return folder


def test_hub_ids_that_are_in_the_cache_merge_as_their_files_and_all_others_are_failures(
    cache: Path, sharded: Path, adapter: Path, tmp_path: Path
) -> None:
    infold.merge(sharded, adapter, tmp_path / "by-path")
    snapshot = cache / "models--org--model" / "snapshots" / REVISION
    lora = "someone/some-lora"
    out = tmp_path / "none"

    told = merge_in_child(
        cache,
        ("org/model", lora, tmp_path / "by-id"),
        (f"org/model@{REVISION}", f"{lora}@main", tmp_path / "by-revision"),
        (str(snapshot), lora, tmp_path / "by-snapshot"),
        ("org/absent", lora, out),
        ("org/model", "someone/absent", out),
        ("org/model@v9", lora, out),
        ("org/model@../../../etc", lora, out),
        ("../model", lora, out),
        ("org/model/extra", lora, out),
        ("https://huggingface.co/org/model", lora, out),
    )

    assert [kind for kind, _ in told[:3]] == ["done"] * 3, told
    assert told[0][1] == "org/model", "the receipt names the base as it was given"
    expected = handmade.digests(tmp_path / "by-path")
    for name in ("by-id", "by-revision", "by-snapshot"):
        assert handmade.digests(tmp_path / name) == expected
        assert not any(file.is_symlink() for file in (tmp_path / name).iterdir())
    for (kind, message), name in zip(
        told[3:7], ("org/absent", "someone/absent", "@v9", "org/model@../"), strict=True
    ):
        assert kind == "StorageFailure", message
        assert name in message and "\n" not in message and "Hub" in message
    assert [kind for kind, _ in told[7:]] == ["Refusal"] * 3, told
    assert all("no such file or folder" in message for _, message in told[7:])
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_a_snapshot_with_a_link_out_of_its_repository_is_refused(
    cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    snapshot = cache / "models--org--model" / "snapshots" / REVISION
    (snapshot / "README.md").symlink_to(tmp_path / "secret")

    [told] = merge_in_child(cache, ("org/model", "someone/some-lora", tmp_path / "out"))

    assert told[0] == "CorruptFile" and "leads out of the folder" in told[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "offline", "told"),
    [
        (hub_errors.GatedRepoError, False, "accept its terms there, and log in"),
        (hub_errors.RepositoryNotFoundError, False, "the Hub has no org/name; check the spelling"),
        (hub_errors.RevisionNotFoundError, False, "has no revision 'v9'"),
        (hub_errors.LocalEntryNotFoundError, False, "could not be reached"),
        (ConnectionError, False, "correct the path, or if it is a Hub id try again"),
        (hub_errors.LocalEntryNotFoundError, True, "HF_HUB_OFFLINE"),
    ],
)
def test_each_failure_of_the_hub_says_what_to_do_in_our_words(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], offline: bool, told: str
) -> None:
    error = kind.__new__(kind, "Cannot find the requested files; traceback of the library")

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(infold.StorageFailure) as caught:
        infold.inspect("org/name@v9")

    message = str(caught.value)
    assert message.startswith("org/name@v9: no such folder here, and ") and told in message
    assert "requested files" not in message and "\n" not in message


def test_inspect_fetches_no_second_copy_of_a_checkpoint_from_the_hub(
    sharded: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infold.merge(sharded, adapter, tmp_path / "merged")
    (tmp_path / "none").mkdir()
    there = ["pytorch_model-00001-of-00002.bin", "model.Q8_0.gguf", "consolidated.00.pth"]
    fetched: set[str] = set()

    def download(*_: object, ignore_patterns: list[str], **__: object) -> str:
        names = [*there, *(p.name for p in folder.iterdir())]
        fetched.update(filter_repo_objects(names, ignore_patterns=ignore_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for folder, kind in (
        (sharded, "checkpoint"), (adapter, "adapter"), (tmp_path / "merged", "merged"),
    ):  # fmt: skip
        fetched.clear()
        assert infold.inspect("org/name")["kind"] == kind
        assert fetched == {p.name for p in folder.iterdir()}
    folder = tmp_path / "none"
    with pytest.raises(infold.Refusal, match="GGUF files are not fetched: download one"):
        infold.inspect("org/name")


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_a_receipt_never_makes_infold_ask_the_hub(
    which: str, outputs: bool, sharded: Path, adapter: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whoever made the folder also wrote its receipt."""
    if outputs:
        pytest.importorskip("transformers")
    out = tmp_path / "merged"
    infold.merge(sharded, adapter, out)
    receipt = json.loads((out / handmade.RECEIPT).read_text())
    place = receipt["base"] if which == "base" else receipt["adapters"][0]
    place["path"] = "someone/beacon"
    (out / handmade.RECEIPT).write_text(json.dumps(receipt))
    asked = []

    def download(*given: object, **more: object) -> str:
        asked.append(more.get("local_files_only"))
        if not more.get("local_files_only"):
            raise AssertionError("asked the Hub")
        raise hub_errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(infold.Refusal, match="someone/beacon: the receipt names it"):
        infold.verify(out, outputs=outputs)
    assert asked and all(asked)

    source = sharded if which == "base" else adapter
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(source))
    assert infold.verify(out).ok, "what lies in the cache is used"

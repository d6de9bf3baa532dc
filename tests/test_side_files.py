"""What lies beside the weights (config, tokenizer, templates) is in the receipt, and a change of it
is seen: it changes the model as much as changed weights do."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from typer.testing import CliRunner

import ggufs
import handmade
import infold
from handmade import RECEIPT
from infold.checkpoint.record import UNDO
from infold.cli.main import app
from infold.deploy.card import MARK
from infold.deploy.facts import check_as_merged

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False,
    "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8,
}  # fmt: skip
BESIDE = {
    "README.md": "---\nlicense: mit\n---\nthe base's\n",
    "generation_config.json": '{"temperature": 0.5}',
    "tokenizer.json": "{}",
    "templates/chat.jinja": "{{ messages }}",
}


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    base = handmade.base_folder(tmp_path / "base", {"q.weight": torch.randn(8, 4)}, MODEL)
    for name, text in BESIDE.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    return base, handmade.lora(tmp_path / "adapter", {"q": (8, 4)})


@pytest.fixture
def merged(inputs: tuple[Path, Path], tmp_path: Path) -> Path:
    infold.merge(*inputs, tmp_path / "merged", undo=True)
    return tmp_path / "merged"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def told(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / RECEIPT).read_text())["side_files"]
    return found


def there(folder: Path) -> dict[str, str]:
    """The digests of all files that a receipt should tell as side files."""
    return {
        name: blake3(content).hexdigest()
        for name, content in contents(folder).items()
        if not name.startswith("infold-") and not name.endswith(".safetensors")
    }


@pytest.mark.parametrize("way", ["merge", "swap", "merge in place", "swap in place", "untied"])
def test_every_way_of_merging_tells_the_digests(
    way: str, inputs: tuple[Path, Path], merged: Path, tmp_path: Path
) -> None:
    base, adapter = inputs
    folder = tmp_path / "out"
    if way == "merge":
        folder = merged
    elif way == "untied":  # the merge changes config.json
        tensors = {"model.embed_tokens.weight": torch.randn(8, 4)}
        tied = handmade.base_folder(tmp_path / "tied", tensors, {"tie_word_embeddings": True})
        receipt = infold.merge(tied, handmade.lora(tmp_path / "h", {"lm_head": (8, 4)}), folder)
        assert (folder / "config.json").read_bytes() != (tied / "config.json").read_bytes()
        assert receipt.side_files == told(folder)
    elif way == "swap":
        infold.deploy(merged, no_measure=True)  # moves the base's card away
        infold.swap(merged, adapter, folder)
        assert (folder / "README.md").read_text() == BESIDE["README.md"]
    elif way == "merge in place":
        shutil.copytree(base, folder)
        infold.merge(folder, adapter, in_place=True)
    else:
        shutil.copytree(merged, folder)
        infold.swap(folder, adapter, in_place=True)

    assert told(folder) == there(folder) and told(folder)
    check_as_merged(folder)


def change(file: Path) -> None:
    file.write_text(file.read_text() + " ")


def template(file: Path) -> None:
    folder = file.parent / "additional_chat_templates"
    folder.mkdir()
    (folder / file.name).write_text("{{ messages }}")


CHANGES: dict[str, Any] = {
    "config.json: was changed": lambda f: change(f / "config.json"),
    "tokenizer.json: was changed": lambda f: change(f / "tokenizer.json"),
    "templates/chat.jinja: is gone": lambda f: (f / "templates/chat.jinja").unlink(),
    "special_tokens_map.json: came after": lambda f: (f / "special_tokens_map.json").write_text(
        "{}"
    ),
    "chat_template.json: came after": lambda f: (f / "chat_template.json").write_text("{}"),
    "additional_chat_templates/tool.jinja: came after": lambda f: template(f / "tool.jinja"),
    "adapter_config.json: came after": lambda f: (f / "adapter_config.json").write_text("{}"),
    "model-2.safetensors: came after": lambda f: shutil.copy(
        f / "model.safetensors", f / "model-2.safetensors"
    ),
}


@pytest.mark.parametrize("match", CHANGES)
def test_a_change_of_them_is_refused(
    match: str, inputs: tuple[Path, Path], merged: Path, tmp_path: Path
) -> None:
    CHANGES[match](merged)
    before = contents(merged)
    bench = ["bench", *map(str, inputs), str(merged)]
    page = ["report", str(merged), "--out", str(tmp_path / "page.md")]
    deploy = ["deploy", str(merged), "--no-measure"]
    for words in (deploy, [*deploy[:2], "--smoke"], bench, page):
        ran = CliRunner().invoke(app, words)
        assert ran.exit_code == 2 and f"{merged}/{match}" in ran.output, (words, ran.output)
    assert contents(merged) == before and not (tmp_path / "page.md").exists()
    assert not infold.verify(merged).ok
    ran = CliRunner().invoke(app, ["checklist", *map(str, inputs), str(merged), "--json"])
    boxes = {b["title"]: b for b in json.loads(ran.stdout.splitlines()[0])["boxes"]}
    assert boxes["merged"]["status"] == "FAIL" and ran.exit_code == 1


def test_what_infold_and_people_put_there_is_no_change(merged: Path, tmp_path: Path) -> None:
    for folder in (merged, tmp_path / "delivery"):
        infold.deploy(merged, None if folder == merged else folder, no_measure=True)
        (folder / "records").mkdir(exist_ok=True)
        (folder / "records" / "bench.json").write_text('{"kind": "bench"}')
        check_as_merged(folder)
        assert infold.verify(folder).ok
    (merged / "README.md").write_text("for people")
    (merged / "notes.txt").write_text("for people")
    (merged / "eval").mkdir()
    for name in ("config.json", "tokens.txt", "chat.jinja"):  # no loader looks there
        (merged / "eval" / name).write_text("{}")
    check_as_merged(merged)


def test_a_worktree_s_git_file_is_not_carried_over(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """The merged folder would be taken for the base's worktree."""
    (inputs[0] / ".git").write_text("gitdir: /somewhere")
    receipt = infold.merge(*inputs, tmp_path / "merged", undo=True)

    assert not (tmp_path / "merged" / ".git").exists() and ".git" not in receipt.side_files
    assert any(".git" in note and "no part of the model" in note for note in receipt.notes)
    assert infold.verify(*inputs, tmp_path / "merged").ok


def test_a_base_that_was_changed_alike_hides_nothing(
    inputs: tuple[Path, Path], merged: Path
) -> None:
    """Base and merged agree, but neither is what the receipt tells."""
    for folder in (inputs[0], merged):
        change(folder / "tokenizer.json")

    wrong = {(o.what, o.where) for o in infold.verify(merged).offenders}
    assert wrong == {("digest", "tokenizer.json"), ("base changed", "tokenizer.json")}
    wrong = {(o.what, o.where) for o in infold.verify(*inputs, merged).offenders}
    assert wrong == {("digest", "tokenizer.json")}


def test_who_changed_is_told(inputs: tuple[Path, Path], merged: Path) -> None:
    change(inputs[0] / "config.json")
    wrong = {(o.what, o.where) for o in infold.verify(merged).offenders}
    assert wrong == {("side file", "config.json"), ("base changed", "config.json")}


@pytest.mark.parametrize("sides", ["names", "nothing"])
def test_a_receipt_without_their_digests_is_refused(
    sides: str, inputs: tuple[Path, Path], merged: Path
) -> None:
    receipt = json.loads((merged / RECEIPT).read_text())
    receipt["side_files"] = sorted(receipt["side_files"])
    if sides == "nothing":
        del receipt["side_files"]
    (merged / RECEIPT).write_text(json.dumps(receipt))
    before = contents(merged)

    told = "no side_files with the digests.*; if another version made it, merge again"
    for use in (
        lambda: infold.verify(merged),
        lambda: infold.inspect(merged),
        lambda: infold.deploy(merged, no_measure=True),
        lambda: infold.undo(merged, in_place=True),
    ):
        with pytest.raises(infold.CorruptFile, match=told):
            use()
    assert infold.verify(*inputs, merged).offenders[0].what == "receipt"
    assert contents(merged) == before


def test_a_receipt_that_tells_of_none_is_not_believed(
    inputs: tuple[Path, Path], merged: Path
) -> None:
    receipt = json.loads((merged / RECEIPT).read_text())
    (merged / RECEIPT).write_text(json.dumps(receipt | {"side_files": {}}))

    wrong = {(o.what, o.where) for o in infold.verify(merged).offenders}
    names = ["config.json", *BESIDE]
    assert wrong == {(what, n) for what in ("digest", "base changed") for n in names}


@pytest.mark.parametrize("sides", [{"../config.json": "0" * 64}, {"a": 1}, [1], "all"])
def test_a_forged_receipt_ends_in_words(sides: Any, merged: Path) -> None:
    receipt = json.loads((merged / RECEIPT).read_text())
    (merged / RECEIPT).write_text(json.dumps(receipt | {"side_files": sides}))

    with pytest.raises(infold.CorruptFile):
        check_as_merged(merged)
    ran = CliRunner().invoke(app, ["verify", str(merged)])
    assert ran.exit_code in (1, 2), ran.output


def test_a_card_of_ours_that_the_base_had_is_kept(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """A merged model that was delivered, and is the base of the next merge."""
    (inputs[0] / "README.md").write_text(f"{MARK}\nof the merge before\n")
    infold.merge(*inputs, tmp_path / "merged", undo=True)

    for _ in range(2):
        infold.deploy(tmp_path / "merged", no_measure=True)

    assert "of the merge before" in (tmp_path / "merged" / "README.base.md").read_text()
    assert infold.verify(tmp_path / "merged").ok
    infold.undo(tmp_path / "merged", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(inputs[0])


# --- permissions and names -----------------------------------------------------------------------


def modes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in [folder, *folder.rglob("*")]
        if path.is_file() or path == folder
    }


def test_what_only_its_owner_could_read_stays_so(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = inputs[0]
    (base / "model.safetensors").chmod(0o600)
    (base / "tokenizer.json").chmod(0o440)
    (base / "generation_config.json").chmod(0o755)
    base.chmod(0o750)
    wanted = modes(base) | {"tokenizer.json": 0o640}  # infold can write it in a later run

    infold.merge(*inputs, tmp_path / "merged", undo=True)
    infold.undo(tmp_path / "merged", tmp_path / "again")

    assert modes(tmp_path / "again") == wanted
    assert {k: v for k, v in modes(tmp_path / "merged").items() if k in wanted} == wanted
    assert modes(tmp_path / "merged")[UNDO] == 0o600  # it has the adapter, and what was edited
    infold.merge(inputs[0], inputs[1], in_place=True)
    assert modes(inputs[0])[UNDO] == 0o600


def test_a_private_file_has_a_private_output(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_v.weight": ggufs.encode(np.ones((4, 32)), "Q8_0")}
    base = ggufs.write(tmp_path / "in" / "base.gguf", "llama", tensors)
    base.chmod(0o600)
    vector = {"model.layers.0.self_attn.v_proj": torch.full((4, 1), 2.0)}
    out = tmp_path / "out" / "merged.gguf"

    infold.merge(base, handmade.ia3(tmp_path / "adapter", vector), out, undo=True)

    found = modes(out.parent)
    assert found.pop(".") == 0o755
    assert len(found) == 3 and set(found.values()) == {0o600}


def test_names_that_are_one_file_where_it_goes_are_refused(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac, where the second would take the place of the first without a word."""
    (inputs[0] / "readme.md").write_text("another file than README.md\n")
    infold.merge(*inputs, tmp_path / "apart")
    assert (tmp_path / "apart" / "readme.md").read_text() != BESIDE["README.md"]

    def folding(call: Any) -> Any:
        def called(path: Any, *given: Any, **more: Any) -> Any:
            if isinstance(path, Path) and "/.out.infold/output/" in str(path):
                path = path.with_name(path.name.lower())
            return call(path, *given, **more)

        return called

    monkeypatch.setattr(os, "open", folding(os.open))
    monkeypatch.setattr(os, "stat", folding(os.stat))
    with pytest.raises(infold.Refusal, match=r"README\.md and readme\.md would be one file"):
        infold.merge(*inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.infold").exists()

"""The base comes back bit for bit; a record that is damaged or foreign is refused; swaps."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import handmade
import infold
from crash_child import Runner
from forked import infold_command as ran
from handmade import INDEX, digests
from infold.checkpoint.record import MAGIC, UNDO, open_record
from infold.checkpoint.staging import Staging
from infold.sizes import bytes_text

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
MODULES = {"a.q_proj": (48, 40), "b.down_proj": (40, 56)}


def new_base(path: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 2) -> Path:
    random = torch.Generator().manual_seed(1)
    tensors = {f"{m}.weight": torch.randn(*s, generator=random) for m, s in MODULES.items()}
    tensors |= {"a.q_proj.bias": torch.randn(48, generator=random), "z.norm": torch.ones(40)}
    tensors |= {"embed.weight": torch.randn(50, 40, generator=random)}
    handmade.base_folder(path, {n: (t * 0.1).to(dtype) for n, t in tensors.items()}, shards=shards)
    (path / "tokenizer.json").write_text("{}")
    (path / "deep").mkdir()
    (path / "deep" / "side.txt").write_text("side")
    return path


def random_ia3(path: Path, zero: bool = False) -> Path:
    random = torch.Generator().manual_seed(5)
    out, inner = (torch.rand(n, generator=random) * 0.2 + 0.9 for n in (48, 56))
    if zero:
        out[3], inner[7], inner[8] = 0.0, 1e-42, -1.5
    vectors = {"a.q_proj": out[:, None], "b.down_proj": inner[None]}
    return handmade.ia3(
        path, vectors, target_modules=list(MODULES), feedforward_modules=["b.down_proj"]
    )


def tokens(path: Path) -> Path:
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    return handmade.adapter_folder(
        path,
        {"embed.token_adapter.trainable_tokens_delta": values},
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": [4, 0, 49], "target_modules": ["embed"]},
    )


def saved(path: Path) -> Path:
    """A replaced module, and trained biases."""
    random = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 40, generator=random), torch.randn(48, 4, generator=random) * 0.02
    return handmade.adapter_folder(
        path,
        {
            "a.q_proj.lora_A.weight": a,
            "a.q_proj.lora_B.weight": b,
            "a.q_proj.bias": torch.randn(48, generator=random),
            "b.down_proj.weight": torch.randn(40, 56, generator=random),
        },
        {
            "peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "all",
            "modules_to_save": ["down_proj"],
        },
    )  # fmt: skip


ADAPTERS: dict[str, list[Callable[[Path], Path]]] = {
    "ia3": [random_ia3],
    "ia3 with zeros": [lambda path: random_ia3(path, True)],
    "lora": [lambda path: handmade.lora(path, MODULES)],
    "huge lora": [lambda path: handmade.lora(path, MODULES, alpha=1e6)],
    "dora": [lambda path: handmade.lora(path, MODULES, use_dora=True)],
    "tokens": [tokens],
    "saved": [saved],
    "several": [
        random_ia3,
        lambda path: handmade.lora(path, MODULES, use_dora=True),
        lambda path: handmade.lora(path, MODULES, seed=4),
    ],
}


def make(root: Path, case: str) -> list[Path]:
    return [new(root / f"adapter-{case}-{n}") for n, new in enumerate(ADAPTERS[case])]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_undo_gives_the_base_back(case: str, dtype: str, tmp_path: Path) -> None:
    if case == "huge lora" and dtype == "F16":
        pytest.skip("overflows, which is refused")
    base = new_base(tmp_path / "base", DTYPES[dtype])
    adapters = make(tmp_path, case)
    plain = infold.merge(base, adapters, tmp_path / "plain")
    receipt = infold.merge(base, adapters, tmp_path / "merged", undo=True)
    expected = digests(base)
    shutil.rmtree(base)
    for adapter in adapters:
        shutil.rmtree(adapter)

    undone = infold.undo(tmp_path / "merged", tmp_path / "restored", threads=2)

    assert expected == digests(tmp_path / "restored")
    assert receipt.base["shards"] == undone.shards
    assert plain.shards == receipt.shards and plain.undo is None
    assert receipt.undo and receipt.undo["bytes"] == (tmp_path / "merged" / UNDO).stat().st_size


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("before", ["dora", "saved", "tokens"])
def test_a_swap_is_a_merge_of_the_base(case: str, before: str, tmp_path: Path) -> None:
    base = new_base(tmp_path / "base")
    adapters = make(tmp_path, case)
    infold.merge(base, make(tmp_path / "first", before), tmp_path / "merged", undo=True)
    infold.merge(base, adapters, tmp_path / "expected")
    expected = digests(base)
    base.rename(tmp_path / "gone")

    swapped = infold.swap(tmp_path / "merged", adapters, tmp_path / "swapped")
    shutil.rmtree(tmp_path / "merged")
    infold.undo(tmp_path / "swapped", tmp_path / "restored")

    found = digests(tmp_path / "swapped")
    assert found.pop(UNDO) == hashlib.sha256((tmp_path / "swapped" / UNDO).read_bytes()).hexdigest()
    assert digests(tmp_path / "expected") == found
    assert expected == digests(tmp_path / "restored")
    told = json.loads((tmp_path / "expected" / "infold-receipt.json").read_text())
    assert (told["base"], told["shards"]) == (swapped.base, swapped.shards)


# --- many blocks, resumed, proven ----------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from infold.merge import prepare, stream

    monkeypatch.setattr(prepare, "_BLOCK", 512)
    monkeypatch.setattr(prepare, "_SMALLEST_BLOCK", 512)
    monkeypatch.setattr(stream, "KEEP_EVERY", 2 << 10)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", ["several", "saved", "ia3 with zeros"])
def test_many_small_blocks_and_threads(case: str, tmp_path: Path) -> None:
    base = new_base(tmp_path / "base")
    adapters = make(tmp_path, case)
    other = make(tmp_path / "other", "several")
    infold.merge(base, adapters, tmp_path / "merged", undo=True, threads=3)
    with open_record(tmp_path / "merged") as record:
        assert len(record.frames) > 8 and record.manifest["limit"] == 512
    infold.undo(tmp_path / "merged", tmp_path / "restored", threads=3)
    infold.swap(tmp_path / "merged", other, tmp_path / "swapped", threads=3)
    infold.merge(base, other, tmp_path / "expected")
    infold.undo(tmp_path / "swapped", tmp_path / "again")

    assert digests(base) == digests(tmp_path / "restored") == digests(tmp_path / "again")
    found = digests(tmp_path / "swapped")
    del found[UNDO]
    assert digests(tmp_path / "expected") == found


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("at", [0.6, 1.0], ids=["in the middle", "at the record's end"])
@pytest.mark.parametrize("case", ["lora", "saved"])
def test_a_resumed_merge_records_the_base_as_it_is_now(
    case: str, at: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks that are merged again, since the base has changed, what an earlier run has recorded
    is worth nothing."""
    base, merged = new_base(tmp_path / "base"), tmp_path / "merged"
    adapters = make(tmp_path, case)

    def stop(done: int, total: int) -> None:
        if at < 1 and done >= at * total:
            raise KeyboardInterrupt

    def stop_at_the_end(staging: Staging, name: str, like: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "adopt", stop_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            infold.merge(base, adapters, merged, undo=True, threads=1, progress=stop)
    for file in base.glob("*.safetensors"):
        was, tensors = file.stat(), load_file(file)
        save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))  # nothing but the values tells of it
    infold.merge(base, adapters, merged, undo=True, threads=1)

    infold.undo(merged, tmp_path / "restored")

    assert digests(base) == digests(tmp_path / "restored")


@pytest.mark.parametrize("slices", [1, 2])
def test_the_way_back_takes_the_products_as_the_merge_did(slices: int, tmp_path: Path) -> None:
    """The record tells how many slices the factors had, whatever the rule for them is later."""
    base = handmade.base_folder(tmp_path / "base", {"q.weight": torch.randn(300, 400).half()})
    adapter = handmade.lora(tmp_path / "adapter", {"q": (300, 400)}, 64, alpha=4000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infold.plan.consume.slices_for", lambda dtype, rank: slices)
        infold.merge(base, adapter, tmp_path / "merged", undo=True)
    with open_record(tmp_path / "merged") as record:
        [operation] = record.manifest["edits"]["q.weight"]["operations"]
    assert operation["settings"]["slices"] == slices

    infold.undo(tmp_path / "merged", tmp_path / "restored")

    assert digests(base) == digests(tmp_path / "restored")


def test_a_transposed_dora_is_swapped_into(tmp_path: Path) -> None:
    """Conv1D stores (in, out): what DoRA observes there runs across the record's blocks."""
    from peft import LoraConfig, get_peft_model

    from tiny_models import new_model

    new_model("gpt2").save_pretrained(tmp_path / "base")
    for name, dora in (("one", True), ("two", True)):
        torch.manual_seed(len(name))
        config = LoraConfig(
            r=2, use_dora=dora, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True,
            init_lora_weights=False,
        )  # fmt: skip
        get_peft_model(new_model("gpt2"), config).save_pretrained(tmp_path / name)
    with pytest.MonkeyPatch.context() as patch:
        from infold.merge import prepare

        patch.setattr(prepare, "_BLOCK", 256)
        patch.setattr(prepare, "_SMALLEST_BLOCK", 256)
        infold.merge(tmp_path / "base", tmp_path / "one", tmp_path / "merged", undo=True)
        swapped = infold.swap(tmp_path / "merged", tmp_path / "two", tmp_path / "swapped")
    plain = infold.merge(tmp_path / "base", tmp_path / "two", tmp_path / "plain")
    infold.undo(tmp_path / "swapped", tmp_path / "restored")

    assert plain.shards == swapped.shards
    assert [a["method"] for a in (*plain.adapters, *swapped.adapters)] == ["dora", "dora"]
    assert digests(tmp_path / "base") == digests(tmp_path / "restored")


def test_untied_ends_a_new_head_and_the_config_are_undone(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(30, 40, generator=random).bfloat16()}
    tensors |= {"model.q_proj.weight": torch.randn(40, 40, generator=random).bfloat16()}
    base = handmade.base_folder(tmp_path / "base", tensors, {"tie_word_embeddings": True}, 2)
    adapter = handmade.lora(tmp_path / "head", {"lm_head": (30, 40), "model.q_proj": (40, 40)})
    infold.merge(base, adapter, tmp_path / "merged", undo=True)
    other = handmade.lora(tmp_path / "other", {"model.q_proj": (40, 40)}, seed=2)
    infold.merge(base, other, tmp_path / "expected")
    infold.swap(tmp_path / "merged", other, tmp_path / "swapped")
    infold.swap(tmp_path / "swapped", adapter, tmp_path / "back")
    for name in ("merged", "swapped", "back"):
        infold.undo(tmp_path / name, tmp_path / f"restored-{name}")

        assert digests(base) == digests(tmp_path / f"restored-{name}"), name
    found = digests(tmp_path / "swapped")
    del found[UNDO]
    assert digests(tmp_path / "expected") == found
    weights = [digests(tmp_path / n)["config.json"] for n in ("merged", "back")]
    assert weights[0] == weights[1] != digests(base)["config.json"]


def test_verify_and_inspect_know_the_record(tmp_path: Path) -> None:
    base = new_base(tmp_path / "base")
    adapters = make(tmp_path, "several")
    infold.merge(base, adapters, tmp_path / "merged", undo=True)

    assert infold.verify(tmp_path / "merged").ok
    shown = infold.inspect(tmp_path / "merged")["undo"]
    assert shown["bytes"] == (tmp_path / "merged" / UNDO).stat().st_size
    assert shown["blocks"] == 3 and not shown["originals"]

    damage(tmp_path / "merged" / UNDO, -40)
    verdict = infold.verify(tmp_path / "merged")
    assert [offender.what for offender in verdict.offenders] == ["undo record"]
    (tmp_path / "merged" / UNDO).unlink()
    assert not infold.verify(tmp_path / "merged").ok


def damage(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


# --- refusals ----------------------------------------------------------------------------------


def refused(merged: Path, match: str) -> None:
    """Neither undo nor swap writes anything."""
    out = merged.parent / "never"
    before = digests(merged)
    adapter = merged.parent / "adapter-lora-0"
    for verb in (
        lambda: infold.undo(merged, out),
        lambda: infold.undo(merged, in_place=True),
        lambda: infold.swap(merged, adapter, out),
        lambda: infold.swap(merged, adapter, in_place=True),
    ):
        with pytest.raises(infold.Refusal, match=match):
            verb()
        assert not out.exists() and not (merged.parent / ".never.infold").exists()
        assert before == digests(merged)


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base = new_base(tmp_path / "base")
    infold.merge(base, make(tmp_path, "lora"), tmp_path / "merged", undo=True)
    return tmp_path / "merged"


def test_any_damaged_byte_is_noticed(merged: Path) -> None:
    record = merged / UNDO
    whole = record.read_bytes()
    wrong = []
    step = max(1, len(whole) // 150)
    for where in [*range(0, len(whole), step), *range(len(whole) - 30, len(whole))]:
        damage(record, where)
        try:
            open_record(merged).close()
            wrong.append(where)
        except infold.CorruptFile:
            pass
        record.write_bytes(whole)
    assert wrong == []
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        record.write_bytes(whole[:length])
        with pytest.raises(infold.CorruptFile):
            open_record(merged)
    record.write_bytes(whole + b"x")
    with pytest.raises(infold.CorruptFile):
        open_record(merged)


def test_a_damaged_record_is_refused_before_anything_is_written(merged: Path) -> None:
    damage(merged / UNDO, 5000)
    refused(merged, "damaged at byte")


def test_inspect_describes_a_model_whose_record_is_damaged(merged: Path, tmp_path: Path) -> None:
    """What it is, and which digests it has, is needed all the more then."""
    damage(merged / UNDO, 5000)
    text, found = ran("inspect", merged), infold.inspect(merged)

    assert text.returncode == 0 and "damaged at byte" in found["undo"]["damaged"]
    assert f"undo damaged: {merged / UNDO}" in " ".join(text.stdout.split())  # it may be wrapped
    assert all(digest in text.stdout for digest in found["receipt"]["shards"].values())


def test_a_record_of_another_version_is_told_as_one(merged: Path) -> None:
    """It is not damaged: fetching it again would not help."""
    record = merged / UNDO
    whole = record.read_bytes()
    assert whole.count(MAGIC) == 2
    record.write_bytes(whole.replace(MAGIC, b"infold undo 2\n\0\0"))
    refused(merged, "is an undo record of another version of infold; .* merge once more from the")


def test_the_record_of_another_output_is_refused(merged: Path, tmp_path: Path) -> None:
    infold.merge(tmp_path / "base", make(tmp_path, "ia3"), tmp_path / "other", undo=True)
    shutil.copy(tmp_path / "other" / UNDO, merged / UNDO)
    refused(merged, "belongs to another output")


def test_no_record_no_undo(merged: Path) -> None:
    (merged / UNDO).unlink()
    refused(merged, "only a merge with --undo")


def test_changed_shards_are_refused_and_nothing_is_left(merged: Path) -> None:
    damage(merged / "model-00002-of-00002.safetensors", -1)
    refused(merged, "was changed after it was merged")


def touched(merged: Path) -> list[str]:
    """Side files that were changed, or are gone; what undo and swap tell of them."""
    (merged / "tokenizer.json").write_text("{ }")
    (merged / "config.json").write_text('{"tie_word_embeddings": true}')
    shutil.rmtree(merged / "deep")
    changed = "was changed after it was merged"
    what = {"config.json": changed, "deep/side.txt": "is gone", "tokenizer.json": changed}
    out = "the output has the base's, from the undo record"
    return [f"{merged / name} {why}: {out}" for name, why in what.items()]


def test_side_files_that_were_changed_come_back(merged: Path, tmp_path: Path) -> None:
    """Another tokenizer in the merged folder is no reason to lose the base's."""
    adapter = tmp_path / "adapter-lora-0"
    expected = touched(merged)

    undone = infold.undo(merged, tmp_path / "restored")
    swapped = infold.swap(merged, adapter, tmp_path / "swapped")
    told = ran("undo", merged, "--out", tmp_path / "told").stdout
    shutil.rmtree(tmp_path / "swapped" / "deep")
    infold.undo(tmp_path / "swapped", tmp_path / "again")

    base = digests(tmp_path / "base")
    assert base == digests(tmp_path / "restored") == digests(tmp_path / "again")
    assert undone.notes == [n for n in swapped.notes if "undo record" in n] == expected
    assert all(note in " ".join(told.split()) for note in expected)
    names = ("config.json", "tokenizer.json", "model.safetensors.index.json")
    for name in names:
        assert (tmp_path / "swapped" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert swapped.side_files == infold.merge(tmp_path / "base", adapter, tmp_path / "p").side_files


def test_in_place_leaves_side_files_alone(merged: Path, tmp_path: Path) -> None:
    touched(merged)
    before = digests(merged)
    match = (
        r"tokenizer.json: was changed after it was merged, and --in-place leaves side files alone; "
        r"put the base's back, or use --out"
    )
    for verb in (
        lambda: infold.undo(merged, in_place=True),
        lambda: infold.swap(merged, tmp_path / "adapter-lora-0", in_place=True),
    ):
        with pytest.raises(infold.Refusal, match=match) as refusal:
            verb()
        assert len(refusal.value.reasons) == 3 and before == digests(merged)


def test_what_no_checkpoint_may_hold_is_refused_until_it_is_removed(
    merged: Path, tmp_path: Path
) -> None:
    """As docs/undo.md tells it: no link is followed out of the folder, and the record has the file
    once nothing lies in its place."""
    tokenizer, config = merged / "tokenizer.json", merged / "config.json"
    secret = tmp_path / "secret.json"
    secret.write_text("{}")

    def put(target: Path | str) -> None:
        tokenizer.unlink()
        tokenizer.symlink_to(target)

    for break_it, match in (
        (lambda: put(secret), "a link that leads out"),
        (lambda: put("nowhere"), "a dangling link; remove it"),
        (lambda: (tokenizer.unlink(), config.write_text('{"a')), "config.json"),
    ):
        break_it()
        refused(merged, match)
    config.unlink()
    tokenizer.mkdir()
    (tokenizer / "x").write_text("x")
    infold.undo(merged, tmp_path / "restored")
    assert digests(tmp_path / "base") == digests(tmp_path / "restored")


@pytest.mark.parametrize(
    "content", [None, "", "[]", "subset"], ids=["gone", "empty", "no object", "of some shards"]
)
def test_an_index_that_is_lost_or_damaged_comes_back(
    merged: Path, tmp_path: Path, content: str | None
) -> None:
    """The record tells the shards, and keeps the index as it keeps other side files."""
    file = merged / INDEX
    where = json.loads(file.read_text())["weight_map"]
    file.unlink()
    if content is not None:
        first = {tensor: shard for tensor, shard in where.items() if "00001" in shard}
        assert first and first != where
        file.write_text(json.dumps({"weight_map": first}) if content == "subset" else content)
    adapter = tmp_path / "adapter-lora-0"

    undone = infold.undo(merged, tmp_path / "restored")
    infold.swap(merged, adapter, tmp_path / "swapped")
    infold.merge(tmp_path / "base", adapter, tmp_path / "expected", undo=True)

    what = "is gone" if content is None else "was changed after it was merged"
    out = "the output has the base's, from the undo record"
    assert undone.notes == [f"{file} {what}: {out}"]
    assert digests(tmp_path / "base") == digests(tmp_path / "restored")
    found, expected = digests(tmp_path / "swapped"), digests(tmp_path / "expected")
    del found[UNDO], expected[UNDO]
    assert found == expected
    with pytest.raises(infold.Refusal, match="--in-place leaves side files alone"):
        infold.undo(merged, in_place=True)

    (merged / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(infold.Refusal):
        infold.undo(merged, tmp_path / "again")


def test_side_files_too_large_for_the_record_must_be_those_of_the_base(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infold.merge import beside

    monkeypatch.setattr(beside, "_MOST", 20)  # bytes: holds tokenizer.json and deep/side.txt
    merged = tmp_path / "less"
    infold.merge(tmp_path / "base", tmp_path / "adapter-lora-0", merged, undo=True)
    touched(merged)
    refused(merged, r"config.json: was changed .* only the digest .* put the base's back")
    shutil.copy(tmp_path / "base" / "config.json", merged)
    infold.undo(merged, tmp_path / "restored")

    assert digests(tmp_path / "base") == digests(tmp_path / "restored")


@pytest.mark.parametrize("place", ["new folder", "in place"])
@pytest.mark.parametrize("verb", ["merge", "swap", "undo"])
def test_a_disk_without_room_for_the_record_is_told_before_anything_starts(
    verb: str, place: str, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/undo.md counts it: for the residuals 1 % of the edited bytes."""
    adapter = tmp_path / "adapter-lora-0"
    base = shutil.copytree(tmp_path / "base", tmp_path / "model")
    files = {file: file.stat().st_size for file in base.rglob("*") if file.is_file()}
    elements = sum(out * inner for out, inner in MODULES.values())
    residuals = sum(out * inner * 2 // 100 for out, inner in MODULES.values())
    record = residuals + sum(size for file, size in files.items() if file.suffix != ".safetensors")
    record += sum(t.nbytes for t in load_file(adapter / "adapter_model.safetensors").values())
    needed = elements * 2 if place == "in place" else sum(files.values())  # a step, or the output
    needed += record if verb != "undo" else 0
    given = [base if verb == "merge" else merged, *([] if verb == "undo" else [adapter])]
    more: dict[str, Any] = {"in_place": True} if place == "in place" else {"out": tmp_path / "out"}
    if verb == "merge" and place == "new folder":
        more["undo"] = True
    before = digests(tmp_path)

    def free(count: int) -> None:
        usage = shutil._ntuple_diskusage(1, 1, count)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    free(needed - residuals // 2)
    told = r"needs [\d,]+ bytes" + ("" if verb == "undo" else ", about .* for the undo record")
    with pytest.raises(infold.StorageFailure, match=rf"{told}, but .* has only .* free"):
        getattr(infold, verb)(*given, **more)
    assert digests(tmp_path) == before
    free(needed + 200)  # the names and places in a step
    getattr(infold, verb)(*given, **more)


def test_a_loaders_files_of_real_size_cost_little(tmp_path: Path) -> None:
    """What a record keeps of side files is compressed, and no part of its share."""
    base = new_base(tmp_path / "base")
    (base / "tokenizer.json").write_text(json.dumps({f"token {n}": n for n in range(20_000)}))
    receipt = infold.merge(base, make(tmp_path, "lora"), tmp_path / "merged", undo=True)
    shown = infold.inspect(tmp_path / "merged")["undo"]

    assert receipt.undo and receipt.undo["side_files"] == shown["side_files"]
    assert 0 < shown["side_files"] < (base / "tokenizer.json").stat().st_size / 3
    own = shown["bytes"] - shown["adapters"] - shown["side_files"]
    assert shown["share"] == own / receipt.edited_bytes


def test_the_kinds_of_blocks_have_one_number() -> None:
    from infold.checkpoint import record
    from infold.edit import residual

    assert (record.RESIDUAL, record.ORIGINAL) == (residual.RESIDUAL, residual.ORIGINAL)


def test_an_undo_that_was_killed_continues(tmp_path: Path, runner: Runner) -> None:
    """And a merge with --undo that was killed has the same record's worth in the end."""
    base = new_base(tmp_path / "base")
    adapter = make(tmp_path, "dora")[0]
    for verb, source in (("merge", base), ("undo", tmp_path / "made")):
        request = {
            "verb": verb, "base": source, "adapter": adapter, "undo": verb == "merge",
            "block": 512, "keep": 1 << 10,
        }  # fmt: skip
        calls = runner.ask(**request, out=tmp_path / "calls")["calls"]
        shutil.rmtree(tmp_path / "calls")
        if verb == "undo":
            expected = digests(base)
        resumed = 0
        for at in range(4, calls, 9):
            out = tmp_path / f"{verb}-{at}"
            killed = runner.ask(**request, out=out, at=at, how="kill in the middle")
            assert killed["status"] == "killed" or out.exists()
            if not out.exists():
                done = runner.ask(**request, out=out)
                assert done["status"] == "done", done
                resumed += done["resumed"]
            if verb == "merge":
                infold.undo(out, tmp_path / f"restored-{at}")
                assert digests(base) == digests(tmp_path / f"restored-{at}")
            else:
                assert expected == digests(out)
        assert resumed > 0
        if verb == "merge":
            out.rename(tmp_path / "made")


@pytest.mark.parametrize("verb", ["undo", "swap"])
def test_side_files_of_the_record_are_there_after_a_kill_too(
    verb: str, tmp_path: Path, runner: Runner
) -> None:
    base, made = new_base(tmp_path / "base"), tmp_path / "made"
    blocks = {"block": 512, "keep": 1 << 10}
    adapter = make(tmp_path, "dora")[0]
    first = runner.ask(verb="merge", base=base, adapter=adapter, out=made, undo=True, **blocks)
    assert first["status"] == "done", first
    touched(made)
    request = {"verb": verb, "base": made, "adapter": make(tmp_path, "lora")[0], **blocks}
    calls = runner.ask(**request, out=tmp_path / "expected")["calls"]

    def content(folder: Path) -> dict[str, str]:
        return {n: d for n, d in digests(folder).items() if not n.startswith("infold-")}

    expected, resumed = content(tmp_path / "expected"), 0
    for name in ("tokenizer.json", "config.json", "deep/side.txt"):
        assert expected[name] == content(base)[name]
    for at in range(3, calls, 5):
        out = tmp_path / f"out-{at}"
        killed = runner.ask(**request, out=out, at=at, how="kill in the middle")
        assert killed["status"] == "killed" or out.exists()
        if not out.exists():
            done = runner.ask(**request, out=out)
            assert done["status"] == "done", done
            resumed += done["resumed"]
        assert content(out) == expected
    assert resumed > 0
    if verb == "swap":
        infold.undo(out, tmp_path / "restored")
        assert digests(base) == digests(tmp_path / "restored")


@pytest.mark.parametrize(
    ("name", "dtype", "most"),
    [
        ("ia3", "BF16", 0.04), ("lora 2%", "BF16", 0.03), ("lora 16%", "BF16", 0.09),
        ("ia3", "F16", 0.04), ("lora 16%", "F16", 0.09), ("ia3", "F32", 0.02),
    ],
)  # fmt: skip
def test_the_record_is_small(name: str, dtype: str, most: float, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 768, generator=random) * 0.02
    base = handmade.base_folder(tmp_path / "base", {"q.weight": weight.to(DTYPES[dtype])})
    if name == "ia3":
        scale = 1 + 0.1 * torch.randn(512, 1, generator=random)
        adapter = handmade.ia3(
            tmp_path / "adapter", {"q": scale}, target_modules=["q"], feedforward_modules=[]
        )
    else:
        a, b = torch.randn(8, 768, generator=random), torch.randn(512, 8, generator=random)
        b *= float(name[5:-1]) / 100 * weight.norm() / (b @ a).norm()
        adapter = handmade.adapter_folder(
            tmp_path / "adapter",
            {"q.lora_A.weight": a, "q.lora_B.weight": b},
            {"peft_type": "LORA", "r": 8, "lora_alpha": 8},
        )
    infold.merge(base, adapter, tmp_path / "merged", undo=True)

    assert infold.inspect(tmp_path / "merged")["undo"]["share"] < most


def test_the_verbs_on_the_command_line(merged: Path, tmp_path: Path) -> None:
    swapped = ran("swap", merged, tmp_path / "adapter-lora-0", "--out", tmp_path / "again")
    assert swapped.returncode == 0, swapped
    record = infold.inspect(tmp_path / "again")["undo"]
    inside, beside = record["adapters"], record["side_files"]
    own = record["bytes"] - inside - beside
    assert (
        f"{bytes_text(record['bytes'])}: {bytes_text(own)} for the edited bytes "
        f"({record['share']:.1%} of them), {bytes_text(inside)} for a copy of the adapters "
        f"and {bytes_text(beside)} for a copy of the side files; `infold undo` restores the base"
    ) in " ".join(swapped.stdout.split())  # which is wrapped
    receipt = json.loads((tmp_path / "again" / "infold-receipt.json").read_text())
    assert receipt["undo"]["adapters"] == inside > 0
    undone = ran("undo", merged, "--in-place", "--json")
    assert undone.returncode == 0, undone
    assert json.loads(undone.stdout)["shards"]
    assert digests(tmp_path / "base") == digests(merged)
    neither = ran("undo", tmp_path / "again")
    assert (neither.returncode, neither.stderr) == (
        2,
        "infold: give either --out DIR or --in-place\n",
    )
    assert "without" in ran("inspect", tmp_path / "again").stdout
    for wrong, way in (
        ("base", "or use the base where"),
        ("adapter-lora-0", "is an adapter; give the merged model"),
    ):
        none = ran("undo", tmp_path / wrong, "--out", tmp_path / "never")
        assert none.returncode == 2 and way in " ".join(none.stderr.split()), none

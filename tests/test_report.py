"""The report: what it shows, and how a real browser takes it."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ggufs
import handmade
import infold
import test_convert as converted
from infold.cli.main import app
from infold.deploy.bundle import deploy_bundle
from infold.deploy.facts import check_for_report
from infold.errors import Refusal
from infold.inspect.update import describe_update
from infold.report.page import render_html, render_markdown
from infold.report.records import Records, collect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of three layers, with records beside it and a name that tries to be HTML."""
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    weights, scales = {}, {}
    for n in range(3):
        weights[f"model.layers.{n}.mlp.down_proj.weight"] = torch.randn(32, 48).bfloat16()
        weights[f"model.layers.{n}.self_attn.k_proj.weight"] = torch.randn(16, 32).bfloat16()
        prefix = f"base_model.model.model.layers.{n}"
        scales[f"{prefix}.mlp.down_proj.ia3_l"] = 1 + torch.randn(1, 48) / 10
        scales[f"{prefix}.self_attn.k_proj.ia3_l"] = 1 + torch.randn(16, 1) / 10
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    save_file(scales, folder / "adapter" / "adapter_model.safetensors")
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    config = {"peft_type": "IA3", "feedforward_modules": ["down_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    infold.merge(folder / "base", folder / "adapter", folder / "merged")
    long = "x" * 300
    boxes = [
        {"status": "PASS", "title": "configuration saved", "evidence": f"evidence {long}"},
        {"status": "NOT DONE", "title": "merged", "evidence": long},
        {"status": "FAIL", "title": "<script>alert(1)</script>", "evidence": "<b>&",
         "command": f"infold verify Tiny-1B '{folder}/the adapter' {folder}/merged"},
    ]  # fmt: skip
    (folder / "merged" / "records").mkdir()
    record = {"kind": "checklist", "version": 1, "boxes": boxes}
    (folder / "merged" / "records" / "checklist.json").write_text(json.dumps(record))
    one = {"largest": 0.1, "mean": 0.01, "kl": 1e-5, "largest_kl": 1e-4, "agreement": 0.99}
    outputs = {
        "kind": "outputs", "ok": False, "tokens": 20, "notes": [long],
        "checks": [{"what": long, "measured": 0.5, "bound": 0.25, "ok": False}],
        "differences": {"merged": one | {"widest": 0.1, "positions": 40}},
        "perplexity": {"base": 9.0, "adapter": 8.0, "merged": 8.5},
        "continuations": [{"differs_at": None}, {"differs_at": 3}],
    }  # fmt: skip
    (folder / "merged" / "records" / "outputs.json").write_text(json.dumps(outputs))
    compared = [
        {"model": model, "what": "speed", "metric": "decode seconds per token, batch 1"}
        | {"ratio": 1.0, "low": 0.987, "high": 1.234}
        for model in ("infold", "PEFT", "merged")
    ]
    values = {"median": 20.0, "low": 19.0, "high": 22.0}
    models = {m: {"decode_tokens_per_second, batch 1": values} for m in ("base", "merged")}
    bench = {"kind": "bench", "models": models, "comparisons": compared}
    (folder / "merged" / "records" / "bench.json").write_text(json.dumps(bench))
    return folder / "merged"


@pytest.fixture(scope="module")
def records(merged: Path) -> Records:
    return {**collect(merged), "update": describe_update(merged)}


def test_the_update_is_what_torch_says(merged: Path) -> None:
    base = load_file(merged.parent / "base" / "model.safetensors")
    now = load_file(merged / "model.safetensors")
    found = describe_update(merged)

    assert {row["tensor"] for row in found["tensors"]} == set(base)
    for row in found["tensors"]:
        was, new = base[row["tensor"]], now[row["tensor"]]
        norm = (new.double() - was.double()).norm()
        assert math.isclose(row["norm"], norm, rel_tol=1e-12)
        assert math.isclose(row["relative"], norm / was.double().norm(), rel_tol=1e-12)
        assert row["changed"] == (new != was).double().mean().item()
    assert sum(found["histogram"]["counts"]) == 3 * (48 + 16)


def test_the_folders_of_a_report_are_made(merged: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "deeper" / "page.md"
    refused = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(page)])
    assert refused.exit_code == 2 and not page.parent.parent.exists()

    ran = CliRunner().invoke(app, ["report", str(merged), "--out", str(page)])
    assert ran.exit_code == 0 and [p.name for p in page.parent.iterdir()] == ["page.md"]

    (tmp_path / "file").write_text("")
    ran = CliRunner().invoke(app, ["report", str(merged), "--out", str(tmp_path / "file/x.md")])
    assert ran.exit_code == 3 and "Traceback" not in ran.output


def test_no_folder_of_this_machine_reaches_a_report(merged: Path, tmp_path: Path) -> None:
    """Also where base and adapter are not what was merged any more."""
    for name in ("base", "adapter"):
        shutil.copytree(merged.parent / name, tmp_path / name)
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "merged"))
    infold.merge(base, adapter, out)
    files = (base / "model.safetensors", adapter / "adapter_model.safetensors")
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    changed = describe_update(out)["notes"]
    for file in files:
        file.unlink()
    lost = describe_update(out)["notes"]
    for folder in (base, adapter):
        shutil.rmtree(folder)
    gone = describe_update(out)["notes"]

    assert changed[0].startswith("no norms of updates: model.safetensors: ")
    assert changed[1].startswith("no scales: adapter_model.safetensors: ")
    assert gone[0].startswith("no norms of updates: base: the receipt names it")
    for note in (*changed, *lost, *gone):
        assert str(tmp_path) not in note and "/" not in note, note


def test_the_page_needs_nothing_but_itself(records: Records) -> None:
    page = render_html(records)

    assert "<script" not in page and "&lt;script&gt;" in page
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]*)""", page)
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert page.count("<svg") == 5
    assert render_html(records) == page, "the same records, the same bytes"


def test_markdown_has_the_same_figures(records: Records) -> None:
    text = render_markdown(records)

    assert "| FAIL | " + "x" * 300 + " | 5.00e-01 | 2.50e-01 |" in text
    assert "token by token | 1 of 2 |" in text
    assert "## Checklist" in text and "| FAIL | <script>alert(1)</script> | <b>& | infold" in text


def test_a_box_has_its_command_without_folders_of_this_machine(
    records: Records, merged: Path
) -> None:
    """And a command that is none is told as any other odd record."""
    for page in (render_markdown(records), html.unescape(render_html(records))):
        assert "infold verify Tiny-1B 'the adapter' merged" in page
        assert str(merged.parent) not in page
    boxes = [{**records["checklist"]["boxes"][2], "command": "infold 'verify"}]
    with pytest.raises(infold.CorruptFile, match="the checklist record is not one"):
        render_markdown({"checklist": {"boxes": boxes}})


def test_the_training_record_is_found_beside_the_adapter(merged: Path, tmp_path: Path) -> None:
    record = merged.parent / "adapter" / "infold-training.json"
    losses = {"eval_first": 1.5, "eval_last": 0.75, "eval_accuracy": None}
    try:
        assert "## Training" not in infold.report(merged, tmp_path / "page.md").read_text()
        record.write_text(json.dumps({"losses": losses, "steps": 7, "parameters": 10}))
        text = infold.report(merged, tmp_path / "page.md").read_text()
    finally:
        record.unlink()
    assert "## Training" in text and "| eval last | 0.7500 |" in text


def test_a_merged_folder_that_was_edited_afterwards_is_refused(
    merged: Path, tmp_path: Path
) -> None:
    """Its page would tell of other weights than the receipt: an old page stays as it was."""
    folder, page = tmp_path / "merged", tmp_path / "page.md"
    shutil.copytree(merged, folder)
    shard = folder / "model.safetensors"
    whole = shard.read_bytes()
    page.write_text("old")

    def refused(told: str) -> None:
        ran = CliRunner().invoke(app, ["report", str(folder), "--out", str(page)])
        assert ran.exit_code == 2 and told in ran.output, ran.output
        with pytest.raises(Refusal, match=told):
            infold.report(folder, page)
        assert page.read_text() == "old"

    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("was changed after it was merged")
    shard.write_bytes(whole)
    shutil.copy(shard, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(shard), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shard.unlink()
    refused("model.safetensors: is gone; merge again")
    for file in folder.glob("model*"):
        file.unlink()
    infold.report(folder, page)  # a folder of records, which tells of weights elsewhere
    assert "What was merged" in page.read_text()


def test_a_merged_gguf_folder_that_was_edited_afterwards_is_refused(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((64, 64))
    stored = {"blk.0.attn_v.weight": ggufs.encode(values, "Q8_0")}
    heads = {"attention.head_count": 4, "attention.head_count_kv": 4}
    base = ggufs.write(tmp_path / "base" / "model.gguf", "llama", stored, heads)
    scales = {"model.layers.0.self_attn.v_proj": torch.full((64, 1), 0.5)}
    adapter = handmade.ia3(tmp_path / "adapter", scales)
    infold.merge(base, adapter, tmp_path / "merged")
    infold.report(tmp_path / "merged", tmp_path / "page.md")
    shard = tmp_path / "merged" / "model.gguf"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    with pytest.raises(Refusal, match=r"model\.gguf: was changed after it was merged"):
        infold.report(tmp_path / "merged", tmp_path / "page.md")


def test_a_merged_gguf_file(tmp_path: Path) -> None:
    """It has no folder of its own: its receipt lies beside it, where other files' do too."""
    values = np.random.default_rng(0).standard_normal((64, 64))
    stored = {"blk.0.attn_v.weight": ggufs.encode(values, "Q8_0")}
    heads = {"attention.head_count": 4, "attention.head_count_kv": 4}
    base = ggufs.write(tmp_path / "model.gguf", "llama", stored, heads)
    for name, factor in (("one", 0.5), ("two", 2.0)):
        scales = {"model.layers.0.self_attn.v_proj": torch.full((64, 1), factor)}
        adapter = handmade.ia3(tmp_path / f"adapter-{name}", scales)
        infold.merge(base, adapter, tmp_path / f"{name}.gguf")

    infold.report(tmp_path / "one.gguf", tmp_path / "page.md")

    page = (tmp_path / "page.md").read_text()
    assert "What was merged" in page and "adapter-one" in page and "adapter-two" not in page
    with pytest.raises(Refusal, match=r"model\.gguf: has no model\.gguf\.infold-receipt\.json"):
        infold.report(base, tmp_path / "page.md")
    with pytest.raises(Refusal, match="holds no records"):
        infold.report(tmp_path, tmp_path / "page.md")
    data = (tmp_path / "one.gguf").read_bytes()
    (tmp_path / "one.gguf").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Refusal, match=r"one\.gguf: was changed after it was merged"):
        infold.report(tmp_path / "one.gguf", tmp_path / "page.md")


def test_a_record_of_another_merge_is_a_fail_that_is_shown(merged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    shutil.copytree(merged, folder)
    bench = folder / "records" / "bench.json"
    record = json.loads(bench.read_text())
    digest = check_for_report(folder)
    for of, status in ((digest, None), ("0" * 64, "FAIL")):
        bench.write_text(json.dumps(record | {"receipt": of}))
        text = infold.report(folder, tmp_path / "page.md").read_text()
        page = infold.report(folder, tmp_path / "page.html").read_text()
        told = "| FAIL | this record tells of another merge than the one that lies here"
        assert (told in text) == (status == "FAIL")
        assert text.count("another merge") == page.count("another merge") == (status == "FAIL")
        assert ("Medians, and the intervals" in page) == (status is None), "its bars are not drawn"


def test_hostile_records_are_refused(tmp_path: Path) -> None:
    def told(content: str, *more: str) -> str:
        (tmp_path / "records").mkdir(exist_ok=True)
        (tmp_path / "records" / "smoke.json").write_text(content)
        ran = CliRunner().invoke(app, ["report", str(tmp_path), *more])
        assert ran.exit_code == 2, ran.output
        return ran.output

    assert "not JSON" in told("{")
    assert "must hold a JSON object" in told("[1]")
    assert "the smoke record is not one" in told('{"kind": "smoke"}')
    assert "name an .html or .md file" in told("{}", "--out", "x.pdf")


def in_browser(page: str, folder: Path, width: int) -> tuple[list[str], list[str]]:
    """What is wider than the page, which short words of its tables are broken, and what the console
    says, in a window of `width` pixels."""
    (folder / "report.html").write_text(page)
    probe = """<!doctype html><meta charset="utf-8"><pre id="found"></pre>
<iframe id="page" src="report.html" style="border:0;width:WIDTHpx;height:800px"></iframe>
<script>
page.onload = () => {
  const inside = page.contentDocument, wide = inside.documentElement.clientWidth;
  const over = [...inside.querySelectorAll("body, body *:not(svg *)")].filter(
    e => e.getBoundingClientRect().right > wide + 0.5 || e.scrollWidth > wide + 0.5);
  const broken = [];
  for (const cell of inside.querySelectorAll("td, th")) {
    const range = inside.createRange(), text = cell.firstChild;
    for (const word of cell.textContent.matchAll(/(?<!\\S)[a-z]{2,14}(?!\\S)/gi)) {
      range.setStart(text, word.index); range.setEnd(text, word.index + word[0].length);
      if (range.getClientRects().length > 1) broken.push(word[0]);
    }
  }
  found.textContent = "DONE " + over.map(e => e.tagName).concat(broken).join(" ");
};
</script>""".replace("WIDTH", str(width))
    (folder / "probe.html").write_text(probe)
    ran = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=5000", "--dump-dom", (folder / "probe.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"DONE([A-Z0-9 a-z]*)</pre>", ran.stdout)
    assert found, ran.stdout + ran.stderr
    return found[1].split(), [x for x in ran.stderr.splitlines() if ":CONSOLE" in x]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_takes_the_page(records: Records, tmp_path: Path, width: int) -> None:
    assert in_browser(render_html(records), tmp_path, width) == ([], [])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_browser_would_tell(records: Records, tmp_path: Path) -> None:
    bad = '<p style="width:2000px">wide</p><script>console.error("x")</script>'
    wide, said = in_browser(render_html(records).replace("</main>", bad + "</main>"), tmp_path, 360)

    assert "P" in wide and said, "a wide element, and a script that the policy forbids"


@pytest.mark.parametrize("mode", ["dequantize", "requantize", "promote"])
def test_what_a_conversion_cost_is_told_wherever_the_merge_is(mode: str, tmp_path: Path) -> None:
    """In the page, the card, the configuration and by inspect: the receipt's own figures."""
    base = converted.make_base(tmp_path / "base", converted.FORMATS["ct-fp8"]).path
    adapter = converted.low_rank(tmp_path / "adapter")
    if mode == "promote":
        adapter = handmade.ia3(
            tmp_path / "ia3", converted.vectors(), feedforward_modules=["down_proj"]
        )
        base = converted.make_base(tmp_path / "whole", converted.FORMATS["ct-tensor"]).path
    receipt = infold.merge(base, adapter, tmp_path / "merged", **{mode: True})
    worst = max(e["error"] for e in receipt.edits if "error" in e)
    least = min(e["update"] for e in receipt.edits if e.get("update"))
    assert 0 < worst < 0.1 and 0 < least < 1

    done = deploy_bundle(tmp_path / "merged", measured=False)
    page = infold.report(tmp_path / "merged", tmp_path / "page.html").read_text()
    card = (tmp_path / "merged" / "README.md").read_text()
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "merged")]).output

    words = "quantized again" if mode == "requantize" else "written as BF16"
    for text in (html.unescape(page), card, " ".join(shown.split())):
        assert re.search(rf"converted.*{words}; relative error against the exact merge", text)
        assert f"at most {worst:.2g}, the adapters' own updates {least:.2g} and more" in text
    figures = done.config["model_info"]["conversion"]
    assert figures["mode"] == mode and figures["largest_error"] == worst
    assert "<h2>Converted weights</h2>" in page and page.count("<svg") >= 2
    assert "Norm of the update" not in page or mode == "promote", "codes are not subtracted"


def test_a_conversion_that_was_resumed_has_no_figures_and_says_so(tmp_path: Path) -> None:
    base = converted.make_base(tmp_path / "base", converted.FORMATS["ct-fp8"]).path
    infold.merge(base, converted.low_rank(tmp_path / "lora"), tmp_path / "merged", dequantize=True)
    receipt = json.loads((tmp_path / "merged" / "infold-receipt.json").read_text())
    for edit in receipt["edits"]:
        edit |= {"error": None, "update": None}  # as test_convert sees it after an interruption

    text = render_markdown({"receipt": receipt})

    assert "written as BF16; how far they are from the exact merge is not known" in text
    assert "Converted weights" not in render_html({"receipt": receipt})


def test_the_command_names_what_its_page_shows(merged: Path, tmp_path: Path) -> None:
    """Only HTML has pictures, so only there is an update."""
    told = {}
    for name in ("page.md", "page.html"):
        ran = CliRunner().invoke(app, ["report", str(merged), "--out", str(tmp_path / name)])
        words = " ".join(ran.output.split())  # which are wrapped
        told[name] = set(words.rpartition(", of ")[2].split(", "))

    assert told["page.html"] == {"bench", "checklist", "outputs", "receipt", "update"}
    assert told["page.md"] == told["page.html"] - {"update"}


def test_elements_that_moved_are_counted_by_elements(merged: Path) -> None:
    """Not by tensors, of which some are small."""
    receipt = json.loads((merged / "infold-receipt.json").read_text())
    for edit in receipt["edits"]:
        edit["unchanged"] = 0.0 if "down_proj" in edit["tensor"] else 1.0

    text = render_markdown({"receipt": receipt})

    assert "75.0% of their elements moved" in text, "32 x 48 of 32 x 48 and 16 x 32"


@pytest.mark.parametrize("what", ["base", "adapter", "in place"])
def test_what_is_not_what_was_merged_any_more_is_not_drawn(
    what: str, merged: Path, tmp_path: Path
) -> None:
    base, adapter, folder = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(merged.parent / "base", base)
    shutil.copytree(merged.parent / "adapter", adapter)
    if what == "in place":
        infold.merge(base, adapter, in_place=True)
        folder = base
    else:
        infold.merge(base, adapter, folder)
        file = next((tmp_path / what).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"\0")

    found = describe_update(folder)
    page = infold.report(folder, tmp_path / "page.html").read_text()

    assert (found["tensors"] == []) == (what != "adapter")
    assert (found["scales"] == []) == (what == "adapter")
    assert "is not what was merged" in page and "Without a picture" in page
    assert str(tmp_path) not in page, "paths tell of the machine"


@pytest.mark.parametrize("name", ["/etc/hostname", "../base/model.safetensors", "a\0b"])
def test_a_receipt_tells_of_no_file_outside_of_the_adapter(
    name: str, merged: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "merged"
    shutil.copytree(merged, folder)
    receipt = json.loads((folder / "infold-receipt.json").read_text())
    for adapter in receipt["adapters"]:
        adapter["files"] = {name: "0" * 64}
    (folder / "infold-receipt.json").write_text(json.dumps(receipt))

    found = describe_update(folder)

    assert found["scales"] == []
    assert any("points outside of the folder" in note for note in found["notes"]), found["notes"]

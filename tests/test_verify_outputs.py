"""The proof by running: right merges pass in every dtype, wrong ones fail by their outputs."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import infold
from forked import infold_command
from infold.errors import CorruptFile, Refusal
from infold.verify.logits import Distance
from infold.verify.outputs import prove_outputs
from infold.verify.prompts import TEXT
from training import save_base

pytestmark = pytest.mark.usefixtures("calm")
PROMPTS = "the film was good\na bad plot\n"


def make_adapter(base: Path, out: Path, kind: str) -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if kind == "ia3":
        config: Any = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"],
                                feedforward_modules=["down_proj"])  # fmt: skip
    else:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif "lora_B" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base-DTYPE for float32, bfloat16 and float16; adapters lora and ia3; prompts."""
    place = tmp_path_factory.mktemp("outputs")
    for name in ("float32", "bfloat16", "float16"):
        base = save_base(place / f"base-{name}")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():  # logits far enough apart to be a language
            model.lm_head.weight.mul_(20)
        model.to(getattr(torch, name)).save_pretrained(base)
    for kind in ("lora", "ia3"):
        make_adapter(place / "base-float32", place / kind, kind)
    (place / "prompts.txt").write_text(PROMPTS)
    return place


def prove(base: Path, adapter: Path, merged: Path, **options: Any) -> Any:
    prompts = base.parent / "prompts.txt"
    return prove_outputs(base, [adapter], merged, prompts=prompts, new_tokens=4, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_right_merge_passes(dtype: str, kind: str, place: Path, tmp_path: Path) -> None:
    base = place / f"base-{dtype}"
    infold.merge(base, place / kind, tmp_path / "merged")

    found = prove(base, place / kind, tmp_path / "merged")

    assert found.ok, [check for check in found.checks if not check.ok]
    effect, merged = found.differences["effect"], found.differences["merged"]
    assert merged.mean < effect.mean / 4 and merged.positions > 20
    assert not found.notes


def save_int8(place: Path, base: Path) -> None:
    """A base as transformers saves it with bitsandbytes in int8; the prompts beside it."""
    AutoModelForCausalLM.from_pretrained(
        place / "base-float32",
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float32,
    ).save_pretrained(base)
    AutoTokenizer.from_pretrained(place / "base-float32").save_pretrained(base)
    shutil.copy(place / "prompts.txt", base.parent)


@pytest.mark.filterwarnings("ignore")
def test_a_fold_passes_and_one_without_an_edit_fails(place: Path, tmp_path: Path) -> None:
    """A base that transformers saves with bitsandbytes in int8."""
    base, merged = tmp_path / "base", tmp_path / "merged"
    save_int8(place, base)
    infold.merge(base, place / "ia3", merged)

    found = prove(base, place / "ia3", merged)

    assert found.ok, [check for check in found.checks if not check.ok]
    assert found.differences["merged"].mean < found.differences["effect"].mean / 1000
    assert "control" not in found.differences and not found.notes

    name = "model.layers.1.mlp.up_proj.SCB"
    tensors = load_file(merged / "model.safetensors")
    tensors[name] = load_file(base / "model.safetensors")[name]
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})

    assert not prove(base, place / "ia3", merged).ok


@pytest.mark.filterwarnings("ignore")
def test_weights_that_became_dense(place: Path, tmp_path: Path) -> None:
    """LoRA into int8: as BF16 its rounding is expected; quantized again, or from other weights, no
    bound tells it from a wrong merge."""
    base = tmp_path / "base"
    save_int8(place, base)
    dense, again, other = tmp_path / "dense", tmp_path / "again", tmp_path / "other"
    infold.merge(base, place / "lora", dense, dequantize=True, dtype="bf16")
    infold.merge(base, place / "lora", again, requantize=True)
    infold.merge(base, place / "lora", other, dequantize=True, base_16bit=place / "base-bfloat16")

    found = prove(base, place / "lora", dense)

    assert found.ok, [check for check in found.checks if not check.ok]
    with pytest.raises(Refusal, match=r"quantized again.* without --outputs"):
        prove(base, place / "lora", again)
    with pytest.raises(Refusal, match=r"come from .*base-bfloat16.* without --outputs"):
        prove(base, place / "lora", other)

    receipt = dense / "infold-receipt.json"
    told = json.loads(receipt.read_text())
    told["conversion"]["dtype"] = "Q8_0"  # a type of GGUF
    shutil.copytree(dense, tmp_path / "forged")
    (tmp_path / "forged" / receipt.name).write_text(json.dumps(told))
    with pytest.raises(Refusal, match="lora changes single elements"):
        prove(base, place / "lora", tmp_path / "forged")
    with pytest.raises(CorruptFile, match="not a receipt that infold writes"):
        infold.verify(tmp_path / "forged")

    name = "model.layers.1.self_attn.v_proj.weight"
    tensors = load_file(dense / "model.safetensors")
    tensors[name] *= 1.05
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    assert not prove(base, place / "lora", dense).ok


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("skipped", [[], ["q_proj", "v_proj", "down_proj"]], ids=["all", "others"])
def test_a_base_of_which_nothing_folds(skipped: list[str], tmp_path: Path) -> None:
    """Rows of 24 and 40 share NF4's blocks of 64. Those that LoRA changes become BF16; or are so
    already, and then the control is what it is without quantized layers.

    Not of 16: there bitsandbytes' kernel for CPUs gives other weights than its format means.
    """
    base, dense, merged = tmp_path / "base", tmp_path / "dense", tmp_path / "merged"
    save_base(dense, hidden_size=24, intermediate_size=40)
    adapter = make_adapter(dense, tmp_path / "lora", "lora")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", *skipped]
    )
    AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=torch.bfloat16
    ).save_pretrained(base)
    AutoTokenizer.from_pretrained(dense).save_pretrained(base)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    options = {} if skipped else {"dequantize": True, "dtype": "bf16"}
    infold.merge(base, adapter, merged, **options)

    found = prove(base, adapter, merged)

    assert found.ok, [check for check in found.checks if not check.ok]
    assert ("control" in found.differences) is bool(skipped)


def spoil_scale(base: Path, adapter: Path, out: Path) -> None:
    """alpha instead of alpha / r."""
    wrong = out.with_name("wrong")
    shutil.copytree(adapter, wrong)
    config = json.loads((wrong / "adapter_config.json").read_text())
    config["lora_alpha"] *= config["r"]
    (wrong / "adapter_config.json").write_text(json.dumps(config))
    infold.merge(base, wrong, out)


def spoil_layer(base: Path, adapter: Path, out: Path) -> None:
    """One module's edit is missing."""
    infold.merge(base, adapter, out)
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors = load_file(out / "model.safetensors")
    tensors[name] = load_file(base / "model.safetensors")[name]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def spoil_all(base: Path, adapter: Path, out: Path) -> None:
    """The base, passed off as merged."""
    infold.merge(base, adapter, out)
    shutil.copyfile(base / "model.safetensors", out / "model.safetensors")


@pytest.mark.parametrize("spoil", [spoil_scale, spoil_layer, spoil_all])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge_fails_by_its_outputs_alone(
    spoil: Any, dtype: str, place: Path, tmp_path: Path
) -> None:
    base = place / f"base-{dtype}"
    spoil(base, place / "lora", tmp_path / "merged")

    found = prove(base, place / "lora", tmp_path / "merged")

    assert not found.ok
    assert not next(c for c in found.checks if c.what.startswith("the merged folder")).ok
    assert any("is it the base?" in note for note in found.notes) is (spoil is spoil_all)


def test_figures_are_those_of_peft_and_transformers(place: Path, tmp_path: Path) -> None:
    """The largest and mean difference, agreement, perplexity and texts, by PEFT's own forward."""
    base, merged = place / "base-bfloat16", tmp_path / "merged"
    infold.merge(base, place / "lora", merged)
    found = prove(base, place / "lora", merged)

    tokenizer = AutoTokenizer.from_pretrained(base)
    one = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), place / "lora"
    ).eval()
    two = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    asked = PROMPTS.splitlines()
    for prompt, pair in zip(asked, found.continuations, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for model, text in ((one, pair.adapter), (two, pair.merged)):
            out = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4,
                                 do_sample=False, pad_token_id=2)  # fmt: skip
            if 1 not in out[0]:  # generate forbids the end of text, the proof does not
                assert tokenizer.decode(out[0, ids.shape[1] :]) == text
    ids = tokenizer(TEXT, return_tensors="pt", verbose=False)["input_ids"]
    windows = [w for w in ids.split(64, dim=1) if w.shape[1] > 1]  # the model takes 64
    with torch.no_grad():
        for model, name in ((one, "adapter"), (two, "merged")):
            losses = [float(model(w, labels=w).loss) * (w.shape[1] - 1) for w in windows]
            count = sum(w.shape[1] - 1 for w in windows)
            assert found.perplexity[name] == pytest.approx(math.exp(sum(losses) / count), rel=1e-4)
        apart = max(float((one(w).logits - two(w).logits).abs().max()) for w in windows)
    assert apart <= found.differences["merged"].largest * (1 + 1e-3)


def test_a_distance_of_known_logits() -> None:
    distance = Distance()
    one = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    two = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 0.5]])
    distance.add(one, two)
    found = distance.result()

    kl = torch.nn.functional.kl_div(
        two.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert (found.largest, found.positions, found.agreement, found.widest) == (1.0, 2, 0.5, 1.0)
    assert found.mean == pytest.approx(2.5 / 6) and found.kl == pytest.approx(float(kl))
    distance.add(one, two * float("nan"))
    assert distance.result().largest == float("inf")


def test_what_cannot_be_run_is_refused(place: Path, tmp_path: Path) -> None:
    base, adapter, merged = place / "base-float32", place / "lora", tmp_path / "merged"
    infold.merge(base, adapter, merged)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\nthree\n \n")
    with pytest.raises(Refusal) as error:
        prove_outputs(base, [adapter], merged, prompts=prompts)
    assert [reason.split(": ")[1] for reason in error.value.reasons] == [
        "line 2 is empty; remove it", "line 4 is empty; remove it",
    ]  # fmt: skip
    if not torch.cuda.is_available():
        with pytest.raises(Refusal, match="sees no CUDA devices; give cpu"):
            prove(base, adapter, merged, device="cuda")
    with pytest.raises(Refusal, match="--device gpu: cpu, cuda"):
        prove(base, adapter, merged, device="gpu")
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(Refusal, match="has no tokenizer"):
        prove_outputs(bare, [adapter], merged, new_tokens=2)
    with pytest.raises(Refusal, match="it is an adapter, give its base"):
        prove(place / "ia3", adapter, merged)


def without_figures(record: Any) -> Any:
    """Figures differ a little between processes: with other threads sums are added otherwise."""
    if isinstance(record, dict):
        return {name: without_figures(value) for name, value in record.items()}
    if isinstance(record, list):
        return [without_figures(value) for value in record]
    return float if isinstance(record, float) else record


def test_the_command_line_records_and_fails(place: Path, tmp_path: Path) -> None:
    base, adapter, merged = place / "base-bfloat16", place / "lora", tmp_path / "merged"
    infold.merge(base, adapter, merged)

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return infold_command("verify", *words, kind="training")

    options = ("--outputs", "--prompts", place / "prompts.txt", "--new-tokens", 3)
    ran = run(base, adapter, merged, *options)
    assert ran.returncode == 0, ran.stderr
    assert "FAIL" not in ran.stdout and "continuations equal" in ran.stdout
    record = json.loads((merged / "records" / "outputs.json").read_text())
    assert (record["kind"], record["ok"], len(record["receipt"])) == ("outputs", True, 64)
    (merged / "records" / "outputs.json").unlink()
    prompts = place / "prompts.txt"
    found = infold.verify(base, adapter, merged, outputs=True, prompts=prompts, new_tokens=3)
    again = json.loads((merged / "records" / "outputs.json").read_text())
    assert found.ok and without_figures(again) == without_figures(record)
    assert infold.verify(base, adapter, merged).ok  # the record is no stranger to the proof

    spoil_all(base, adapter, tmp_path / "base-again")
    ran = run(base, adapter, tmp_path / "base-again", *options, "--json")
    assert ran.returncode == 1
    told = json.loads(ran.stdout.splitlines()[0])
    assert told["offenders"] and not told["outputs"]["ok"]
    assert run(base, adapter, merged, "--text", "x").returncode == 2

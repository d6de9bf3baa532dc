"""Adapters that attack: pickles with code, tensors that are not there, senseless configs."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import handmade
import infold
from handmade import digests
from hostile.conftest import MODULES, Refused
from infold import patience

WEIGHTS, PICKLE, CONFIG = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_config.json",
)


def as_pickle(adapter: Path, value: Any, **options: Any) -> Path:
    """Put `value`, saved by torch, in the place of the adapter's safetensors file."""
    (adapter / WEIGHTS).unlink()
    torch.save(value, adapter / PICKLE, **options)
    return adapter / PICKLE


def set_config(adapter: Path, **changes: Any) -> Path:
    file = adapter / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return file


# --- pickles -----------------------------------------------------------------------------------


class Attack:
    """What runs a command when it is unpickled by a loader that lets it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("style", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_with_a_command_is_refused_and_the_command_never_runs(
    style: str, inside: bool, base: Path, adapter: Path, tmp_path: Path, refused: Refused
) -> None:
    mark = tmp_path / "mark"
    attack = Attack(f"touch {mark}")
    value = {"a": torch.ones(2), "b": attack} if inside else attack
    if style == "bare pickle":
        (adapter / WEIGHTS).unlink()
        (adapter / PICKLE).write_bytes(pickle.dumps(attack))
    else:
        as_pickle(adapter, value, _use_new_zipfile_serialization=style == "zip")

    refused(base, adapter, str(adapter / PICKLE), "can run code", "safetensors")

    assert not mark.exists()
    if style == "bare pickle":  # the attack itself is real
        pickle.loads((adapter / PICKLE).read_bytes())
        assert mark.exists()


def test_a_name_in_a_pickle_that_is_a_line_of_its_own_is_refused(
    base: Path, adapter: Path, refused: Refused
) -> None:
    as_pickle(adapter, {"a\n  proven": torch.ones(2)})

    refused(base, adapter, PICKLE, "printable text")


def test_a_pickle_beside_a_safetensors_file_is_not_even_opened(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    os.mkfifo(adapter / PICKLE)

    infold.merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_pickle_merges_the_same_bytes_as_its_safetensors_twin(
    legacy: bool, dtype: torch.dtype, base: Path, tmp_path: Path
) -> None:
    adapter = handmade.lora(tmp_path / "adapter", MODULES, dtype=dtype)
    # copies: those of safetensors 0.4 lie in the file, which is written over
    tensors = {name: tensor.clone() for name, tensor in load_file(adapter / WEIGHTS).items()}
    tensors["base_model.model.model.norm.weight"] = torch.rand(16).to(dtype)
    save_file(tensors, adapter / WEIGHTS)
    infold.merge(base, adapter, tmp_path / "safetensors")
    as_pickle(adapter, tensors, _use_new_zipfile_serialization=not legacy)

    infold.merge(base, adapter, tmp_path / "pickle")

    assert handmade.digests(tmp_path / "pickle") == handmade.digests(tmp_path / "safetensors")


def test_views_in_a_pickle_merge_as_what_they_show(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Transposed memory, a slice of a larger storage, a Parameter: all are the same values."""
    tensors = load_file(adapter / WEIGHTS)
    infold.merge(base, adapter, tmp_path / "plain")
    for number, (name, value) in enumerate(tensors.items()):
        if number % 3 == 0:
            tensors[name] = value.t().contiguous().t()
        elif number % 3 == 1:
            tensors[name] = torch.cat([value, value])[value.shape[0] :]
        else:
            tensors[name] = torch.nn.Parameter(value)
    as_pickle(adapter, tensors)

    infold.merge(base, adapter, tmp_path / "views")

    assert handmade.digests(tmp_path / "views") == handmade.digests(tmp_path / "plain")


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(2)],
        torch.ones(2),
        {"a": 1},
        {"a": {"b": torch.ones(2)}},
        {1: torch.ones(2)},
        {"a": torch.ones(2, dtype=torch.int64)},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"a": torch.ones(2, dtype=torch.bool)},
        {"a": torch.ones(2, device="meta")},
        {"a": torch.eye(4).to_sparse()},
        {"a": torch.ones(1).expand(1 << 50)},
        {"a": torch.ones(1).expand(1 << 20, 1 << 20)},
    ],
    ids=str,
)
def test_a_pickle_of_anything_but_dense_float_tensors_is_refused(
    value: Any, base: Path, adapter: Path, refused: Refused
) -> None:
    file = as_pickle(adapter, value)

    refused(base, adapter, str(file))


@pytest.mark.parametrize("size", [0, 1, 100, 1000])
def test_a_truncated_pickle_is_refused(
    size: int, base: Path, adapter: Path, refused: Refused
) -> None:
    file = as_pickle(adapter, load_file(adapter / WEIGHTS))
    file.write_bytes(file.read_bytes()[:size])

    refused(base, adapter, str(file), "not a plain pickle")


def test_a_compressed_pickle_is_refused(base: Path, adapter: Path, refused: Refused) -> None:
    """torch would unpack it: 64 MiB of zeros from 64 KiB here, and any size from a worse one."""
    file = as_pickle(adapter, {"a": torch.zeros(1 << 24)})
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    assert file.stat().st_size < 1 << 17
    assert torch.load(file, weights_only=True)["a"].numel() == 1 << 24

    refused(base, adapter, str(file), "compressed archive")


# --- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8]
)
def test_adapter_tensors_that_are_no_floats_are_listed(
    dtype: torch.dtype, base: Path, adapter: Path, refused: Refused
) -> None:
    tensors = {k: v.to(dtype) for k, v in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)

    message = refused(base, adapter, str(adapter / WEIGHTS), "must be floats", kind=infold.Refusal)

    assert all(name in message for name in tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_diverged_adapter_is_refused_listing_all_tensors(
    value: float, base: Path, adapter: Path, refused: Refused
) -> None:
    tensors = load_file(adapter / WEIGHTS)
    for tensor in tensors.values():
        tensor[1, 2] = value
    save_file(tensors, adapter / WEIGHTS)

    message = refused(base, adapter, "NaN or inf in 1 element", kind=infold.Refusal)

    assert all(name in message for name in tensors)


def test_an_update_that_does_not_fit_the_stored_dtype_is_refused(
    tmp_path: Path, adapter: Path, tensors: dict[str, torch.Tensor], refused: Refused
) -> None:
    half = handmade.base_folder(tmp_path / "half", {k: v.half() for k, v in tensors.items()})
    factors = load_file(adapter / WEIGHTS)
    save_file({k: v * 5000 for k, v in factors.items()}, adapter / WEIGHTS)

    refused(half, adapter, "q_proj.weight[", "does not fit F16", kind=infold.Refusal)


def test_a_base_with_a_nan_in_an_edited_tensor_is_refused(
    tmp_path: Path, adapter: Path, tensors: dict[str, torch.Tensor], refused: Refused
) -> None:
    tensors["model.layers.1.q_proj.weight"][3, 5] = float("nan")
    base = handmade.base_folder(tmp_path / "broken", tensors)

    refused(base, adapter, "layers.1.q_proj.weight[3, 5]", "holds nan there", kind=infold.Refusal)


def test_a_nan_in_a_tensor_that_is_not_edited_is_copied_as_it_is(
    tmp_path: Path, adapter: Path, tensors: dict[str, torch.Tensor]
) -> None:
    tensors["model.norm.weight"][3] = float("nan")
    base = handmade.base_folder(tmp_path / "odd", tensors)

    infold.merge(base, adapter, tmp_path / "out")

    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.isnan(merged["model.norm.weight"][3])


def test_an_adapter_for_modules_that_the_base_lacks_is_refused_listing_all_keys(
    base: Path, tmp_path: Path, refused: Refused
) -> None:
    foreign = handmade.lora(tmp_path / "foreign", {f"model.h.{n}.attn": (16, 24) for n in range(3)})

    message = refused(base, foreign, str(foreign), kind=infold.Refusal)

    assert all(key in message for key in load_file(foreign / WEIGHTS))


# --- the config --------------------------------------------------------------------------------


def test_an_adapter_without_a_config_is_refused(
    base: Path, adapter: Path, refused: Refused
) -> None:
    (adapter / CONFIG).unlink()

    refused(base, adapter, str(adapter), f"no {CONFIG}", kind=infold.Refusal)


def test_an_adapter_without_weights_is_refused(base: Path, adapter: Path, refused: Refused) -> None:
    (adapter / WEIGHTS).unlink()

    refused(base, adapter, str(adapter), "weights are missing", kind=infold.Refusal)


@pytest.mark.parametrize("value", [[], "LORA", 1, None, True])
def test_a_config_that_is_no_object_is_refused(
    value: Any, base: Path, adapter: Path, refused: Refused
) -> None:
    (adapter / CONFIG).write_text(json.dumps(value))

    refused(base, adapter, str(adapter / CONFIG), "must hold a JSON object")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", None),
        ("peft_type", ["LORA"]),
        ("peft_type", {}),
        ("peft_type", "lora"),
        ("peft_type", "PROMPT_TUNING"),
        ("r", 0),
        ("r", -4),
        ("r", 4.5),
        ("r", True),
        ("r", "4"),
        ("r", [4]),
        ("r", 5),
        ("r", 10**30),
        ("r", 10**400),
        ("lora_alpha", 10**400),
        ("rank_pattern", {"q_proj": 10**400}),
        ("alpha_pattern", {"q_proj": 10**400}),
        ("lora_alpha", "8"),
        ("lora_alpha", None),
        ("lora_alpha", [8]),
        ("lora_alpha", True),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": "4"}),
        ("rank_pattern", {"q_proj": {}}),
        ("rank_pattern", {"(": 4}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", "x"),
        ("bias", "some"),
        ("bias", ["none"]),
        ("bias", {}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", ["x"]),
        ("modules_to_save", [1]),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", {"a": 1}),
        ("layer_replication", [[0, 1]]),
        ("a_field_of_the_future", "on"),
    ],
)
def test_a_config_field_that_makes_no_sense_is_refused_by_name(
    field: str, value: Any, base: Path, adapter: Path, refused: Refused
) -> None:
    set_config(adapter, **{field: value})

    message = refused(base, adapter, str(adapter), kind=infold.Refusal)

    told = message.replace(str(adapter), "")
    assert field in told or "by the config" in told or "regular expression" in told


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", 5),
        ("architectures", [{}]),
        ("architectures", {"a": 1}),
        ("model_type", [1]),
        ("model_type", {}),
        ("text_config", [1]),
        ("text_config", {"model_type": [1]}),
        ("quantization_config", 3),
        ("tie_word_embeddings", {}),
        ("is_encoder_decoder", "x"),
    ],
)
def test_a_config_of_the_base_that_makes_no_sense_does_no_harm(
    field: str, value: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Nothing here needs these fields: the merge is right, or refused, but never a traceback."""
    infold.merge(base, adapter, tmp_path / "plain")
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": False, field: value}))

    infold.merge(base, adapter, tmp_path / "odd")

    plain, odd = (digests(tmp_path / name) for name in ("plain", "odd"))
    assert plain.pop("config.json") != odd.pop("config.json") and plain == odd


def test_an_adapter_that_vanishes_while_the_merge_begins_is_a_storage_failure(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    from infold.merge.prepare import open_plan, prepare
    from infold.merge.run import execute

    plan = open_plan(base, [adapter])
    (adapter / WEIGHTS).unlink()

    with pytest.raises(infold.StorageFailure, match=WEIGHTS):
        execute(prepare(plan, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("verb", ["merge", "combine", "load"])
def test_a_pattern_that_would_take_for_ever_is_refused(
    verb: str, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every further letter of a module's name doubles what Python's matcher has to do."""
    monkeypatch.setattr(patience, "SECONDS", 0.3)
    module = "a_self_attention_with_a_very_long_name"
    base = handmade.base_folder(tmp_path / "base", {f"{module}.weight": torch.ones(8, 8)})
    slow = {field: {"([a-z_.0-9]+)+#": 4}, "target_modules": [module], "bias": "none"}
    adapter = handmade.lora(tmp_path / "adapter", {module: (8, 8)}, **slow)
    other = handmade.lora(tmp_path / "other", {module: (8, 8)}, target_modules=[module])
    model = torch.nn.ModuleDict({module: torch.nn.Linear(8, 8)})

    began = time.process_time()
    with pytest.raises(infold.Refusal, match=r"adapter.*: takes longer than 0\.3 s"):
        if verb == "merge":
            infold.merge(base, adapter, tmp_path / "out")
        elif verb == "combine":
            infold.combine([adapter, other], tmp_path / "out", weights=[1.0, 1.0], kind="cat")
        else:
            infold.load(model, adapter)

    assert time.process_time() - began < 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "other"]
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0

"""Make the inputs of the benchmark: checkpoints of real shapes with random weights, and adapters.

    python benchmarks/inputs.py 3gb         # into the cache folder, once; then nothing to do

Weights are N(0, 0.02), as models are initialised; a merge does not care. Adapters lie in PEFT's
layout and have the size of trained ones: LoRA changes each weight by about 2 % of its norm, IA³'s
factors are 1 ± 0.1. A tensor's values depend on its name and shape alone, so inputs that are made
elsewhere are the same. Pieces of tensors go to the disk one by one, and a folder gets its name
when it is complete.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PIECE = 8 << 20  # elements that are drawn at once
RANK, ALPHA = 16, 32
SPREAD = 0.02  # standard deviation of the weights
UPDATE = 0.02  # norm of LoRA's update as a share of the weight's
LONE = "model.layers.0.mlp.down_proj"  # the large layer of the lone file


@dataclass(frozen=True)
class Drawn:
    """A tensor of normally distributed values."""

    shape: tuple[int, ...]
    mean: float = 0.0
    spread: float = SPREAD
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * {"BF16": 2, "F32": 4}[self.dtype]


@dataclass(frozen=True)
class Size:
    """A Qwen2 model with tied embeddings, cut into `shards` files, and the lone tensor beside."""

    layers: int
    hidden: int
    ff: int
    heads: int
    kv_heads: int
    vocab: int
    shards: int
    lone: tuple[int, int]

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer, by module."""
        kv = self.kv_heads * (self.hidden // self.heads)
        block = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ff, self.hidden),
            "mlp.up_proj": (self.ff, self.hidden),
            "mlp.down_proj": (self.hidden, self.ff),
        }
        layers = range(self.layers)
        return {f"model.layers.{n}.{path}": shape for n in layers for path, shape in block.items()}

    def tensors(self) -> dict[str, Drawn]:
        """Every tensor of the model, in its order."""
        norm = Drawn((self.hidden,), mean=1.0, spread=0.1)
        result = {"model.embed_tokens.weight": Drawn((self.vocab, self.hidden))}
        for module, shape in self.linears().items():
            result[f"{module}.weight"] = Drawn(shape)
            if module.endswith(("q_proj", "k_proj", "v_proj")):
                result[f"{module}.bias"] = Drawn(shape[:1])
            if module.endswith("down_proj"):
                block = module.removesuffix(".mlp.down_proj")
                result[f"{block}.input_layernorm.weight"] = norm
                result[f"{block}.post_attention_layernorm.weight"] = norm
        result["model.norm.weight"] = norm
        return result

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


SIZES = {
    "3gb": Size(28, 1536, 8960, 12, 2, 151_936, 4, (62_500, 32_000)),  # Qwen2.5-1.5B
    "12gb": Size(36, 3072, 13_952, 24, 8, 151_936, 4, (62_500, 32_000)),
    "1gb": Size(7, 1536, 8960, 12, 2, 37_984, 2, (8_000, 4_000)),  # a quarter of the first
    "tiny": Size(2, 128, 256, 4, 2, 1_000, 4, (4_000, 2_000)),
}


def cache() -> Path:
    """`bench` in `$INFOLD_CACHE`, else `$XDG_CACHE_HOME/infold`, else `~/.cache/infold`."""
    if own := os.environ.get("INFOLD_CACHE"):
        return Path(own).absolute() / "bench"
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "infold" / "bench"
    return Path.home() / ".cache" / "infold" / "bench"


def names(size: str) -> dict[str, str]:
    """What the inputs of a size are called in the cache folder."""
    lone = "lone-" + "x".join(map(str, SIZES[size].lone))
    return {
        "base": f"qwen2-{size}",
        "lora": f"qwen2-{size}-lora",
        "ia3": f"qwen2-{size}-ia3",
        "lone": lone,
        "lone lora": f"{lone}-lora",
    }


def make(size: str, folder: Path, lone: bool = True) -> None:
    """Make what is missing of the inputs of a size; `lone`: the large tensor too."""
    shape, name = SIZES[size], names(size)
    folder.mkdir(parents=True, exist_ok=True)
    with _new(folder / name["base"]) as out:
        if out is not None:
            _write_model(shape, out)
    adapters = {"lora": shape.linears()}
    if lone:
        adapters["lone lora"] = {LONE: shape.lone}
        with _new(folder / name["lone"]) as out:
            if out is not None:
                norm = Drawn((1024,), 1.0)
                tensors = {f"{LONE}.weight": Drawn(shape.lone), "model.norm.weight": norm}
                _write_safetensors(out / "model.safetensors", tensors)
    for adapter, linears in adapters.items():
        with _new(folder / name[adapter]) as out:
            if out is not None:
                _write_adapter(out, _lora_tensors(linears), _lora_config(linears))
    with _new(folder / name["ia3"]) as out:
        if out is not None:
            _write_adapter(out, _ia3_tensors(shape.linears()), _ia3_config())


@contextmanager
def _new(path: Path) -> Iterator[Path | None]:
    """A folder to fill, which is then renamed to `path`; None if that exists, so is complete."""
    if path.exists():
        yield None
        return
    print(f"making {path.name}", flush=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield work
        work.chmod(0o755)
        for file in work.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        work.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_model(shape: Size, out: Path) -> None:
    tensors, total = shape.tensors(), shape.nbytes
    shards: list[dict[str, Drawn]] = [{} for _ in range(shape.shards)]
    begin = 0
    for name, tensor in tensors.items():
        middle = begin + tensor.nbytes // 2
        shards[middle * shape.shards // total][name] = tensor
        begin += tensor.nbytes
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        where |= dict.fromkeys(shard, file)
        # the safetensors library sorts the tensors of a file by name
        _write_safetensors(out / file, dict(sorted(shard.items())))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(out / "model.safetensors.index.json", index)
    special = {"bos_token_id": shape.vocab - 2, "eos_token_id": shape.vocab - 1}
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": SPREAD,
        "intermediate_size": shape.ff,
        "max_position_embeddings": 32_768,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
        **special,
    }
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {"do_sample": False, **special})


def _lora_tensors(linears: Mapping[str, tuple[int, int]]) -> dict[str, Drawn]:
    """A as PEFT initialises it, and B such that |alpha/r B A| = UPDATE |W|."""
    result = {}
    for module, (rows, columns) in linears.items():
        of_a = (3 * columns) ** -0.5
        of_b = UPDATE * SPREAD / (ALPHA / RANK * RANK**0.5 * of_a)
        prefix = f"base_model.model.{module}"
        result[f"{prefix}.lora_A.weight"] = Drawn((RANK, columns), spread=of_a, dtype="F32")
        result[f"{prefix}.lora_B.weight"] = Drawn((rows, RANK), spread=of_b, dtype="F32")
    return result


def _lora_config(linears: Mapping[str, tuple[int, int]]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({module.rpartition(".")[2] for module in linears}),
    }


def _ia3_tensors(linears: Mapping[str, tuple[int, int]]) -> dict[str, Drawn]:
    result = {}
    for module, (rows, columns) in linears.items():
        shape = (1, columns) if module.endswith("down_proj") else (rows, 1)
        if module.endswith(("k_proj", "v_proj", "down_proj")):
            name = f"base_model.model.{module}.ia3_l"
            result[name] = Drawn(shape, mean=1.0, spread=0.1, dtype="F32")
    return result


def _ia3_config() -> dict[str, object]:
    return {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "target_modules": ["down_proj", "k_proj", "v_proj"],
        "feedforward_modules": ["down_proj"],
    }


def _write_adapter(out: Path, tensors: dict[str, Drawn], config: dict[str, object]) -> None:
    _write_safetensors(out / "adapter_model.safetensors", tensors)
    _write_json(out / "adapter_config.json", config)


def _write_safetensors(path: Path, tensors: Mapping[str, Drawn]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            for piece in _pieces(name, tensor):
                file.write(piece)


def _pieces(name: str, tensor: Drawn) -> Iterator[memoryview]:
    """The bytes of a tensor."""
    import torch  # the benchmark, which imports this file too, must stay small

    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[tensor.dtype]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    total = math.prod(tensor.shape)
    for begin in range(0, total, PIECE):
        x = torch.empty(min(PIECE, total - begin))
        x.normal_(tensor.mean, tensor.spread, generator=generator)
        yield memoryview(x.to(dtype).view(torch.uint8).numpy())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("size", choices=SIZES)
    make(parser.parse_args().size, cache())


if __name__ == "__main__":
    main()

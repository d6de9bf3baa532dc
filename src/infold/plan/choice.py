"""What can be chosen for quantized modules into which an adapter does not fold."""

from __future__ import annotations

from dataclasses import dataclass

from infold.checkpoint.shards import Checkpoint

__all__ = ["DTYPES", "MODES", "TYPES", "WAYS", "Choice"]

DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
# of GGUF, that --requantize can write: those of formats/values/ggml.py, told without PyTorch
TYPES = {kind.lower(): kind for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")}
WAYS = (
    "; --dequantize writes such weights unquantized, --requantize rounds them into their own "
    "format again"
)
MODES = ("promote", "dequantize", "requantize")


@dataclass(frozen=True)
class Choice:
    """What the user chose for modules that do not fold.

    mode: one of MODES. dtype: of weights that become dense, by safetensors' name; "" for the one
    that the config tells, in GGUF F16; with requantize a type of GGUF, "" for the same. original:
    the unquantized checkpoint that values of touched modules come from, in place of the quantized
    one.
    """

    mode: str
    dtype: str = ""
    original: Checkpoint | None = None

    def dense_dtype(self, base: Checkpoint) -> str:
        """The dtype of weights that become dense."""
        if self.mode == "requantize":
            return "F32"
        if self.dtype or base.is_gguf:
            return self.dtype or "F16"
        config = base.config or {}
        inner = config.get("text_config")
        for place in (config, inner if isinstance(inner, dict) else {}):
            told = str(place.get("dtype") or place.get("torch_dtype") or "")
            if told.removeprefix("torch.") in ("bfloat16", "float16", "float32"):
                return {"b": "BF16", "f": "F" + told[-2:]}[told.removeprefix("torch.")[0]]
        return "BF16"

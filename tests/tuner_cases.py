"""The kinds of models and configs on which infold's tuners are held against PEFT's.

The rows follow PEFT's own table of custom models (its 22 IA³ and 46 LoRA cases): the same kinds of
layers, sizes that are small but never square, and every option that changes the result. LoRA on
convolutions of several groups is refused here; PEFT trains what no weight can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Mlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.lin1 = nn.Linear(20, 6, bias=bias)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.act(self.lin0(x)))


class Blocks(nn.Module):
    """Numbered layers, for layers_to_transform and patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        layers = (nn.ModuleDict({"mlp": nn.Linear(10, 10)}) for _ in range(3))
        self.model.layers = nn.ModuleList(layers)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            x = torch.tanh(layer["mlp"](x))
        return self.head(x)


class EmbConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 5)
        self.conv1d = Conv1D(7, 5)
        self.lin0 = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(torch.tanh(self.conv1d(self.emb(x))))


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: what is looked up is scaled."""

    def __init__(self) -> None:
        super().__init__(30, 5)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = ScaledEmbedding()
        self.lin0 = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.emb(x))


class Conv(nn.Module):
    def __init__(self, dims: int, groups: int = 1, **options: Any) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv0 = kind(4, 6, 3, padding=1, **options)
        self.conv1 = kind(6, 8, 3, groups=groups, stride=2, **options)
        self.lin0 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv1(torch.tanh(self.conv0(x))).flatten(2).mean(-1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lin0 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


def _floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (Mlp, _floats(4, 10)),
    "mlp-3d": (Mlp, _floats(4, 5, 10)),
    "mlp-no-bias": (lambda: Mlp(bias=False), _floats(4, 10)),
    "blocks": (Blocks, _floats(4, 10)),
    "emb-conv1d": (EmbConv1D, torch.arange(12).view(4, 3) * 2),
    "scaled-emb": (Scaled, torch.arange(12).view(4, 3)),
    "conv1d": (lambda: Conv(1), _floats(4, 4, 9)),
    "conv2d": (lambda: Conv(2), _floats(4, 4, 7, 7)),
    "conv2d-groups": (lambda: Conv(2, groups=2), _floats(4, 4, 7, 7)),
    "conv2d-depthwise": (lambda: Conv(2, groups=2, bias=False), _floats(4, 4, 7, 7)),
    "conv2d-dilated": (lambda: Conv(2, dilation=2), _floats(4, 4, 9, 9)),
    "conv2d-reflect": (lambda: Conv(2, padding_mode="reflect"), _floats(4, 4, 9, 9)),
    "conv3d": (lambda: Conv(3), _floats(4, 4, 5, 5, 5)),
    "conv3d-groups": (lambda: Conv(3, groups=2), _floats(4, 4, 5, 5, 5)),
    "mha": (Attention, _floats(4, 3, 8)),
}


def _ia3(model: str, targets: Any, inner: Any, **more: Any) -> tuple[str, dict[str, Any]]:
    return model, dict(target_modules=targets, feedforward_modules=inner, **more)


IA3: dict[str, tuple[str, dict[str, Any]]] = {
    "linear-out": _ia3("mlp", ["lin0"], []),
    "linear-in": _ia3("mlp", ["lin0"], ["lin0"]),
    "linear-both": _ia3("mlp", ["lin0", "lin1"], ["lin0"]),
    "linear-other": _ia3("mlp", ["lin0", "lin1"], ["lin1"]),
    "linear-3d": _ia3("mlp-3d", ["lin0", "lin1"], ["lin1"]),
    "linear-no-bias": _ia3("mlp-no-bias", ["lin0", "lin1"], ["lin1"]),
    "linear-pattern": _ia3("mlp", ".*lin.*", ".*lin1"),
    "linear-saved": _ia3("mlp", ["lin0"], ["lin0"], modules_to_save=["lin1"]),
    "linear-random": _ia3("mlp", ["lin0"], [], init_ia3_weights=False),
    "linear-excluded": _ia3("mlp", ".*lin.*", [], exclude_modules=["lin1"]),
    "conv1d-layer-out": _ia3("emb-conv1d", ["conv1d"], []),
    "conv1d-layer-in": _ia3("emb-conv1d", ["conv1d"], ["conv1d"]),
    "conv1d-layer-both": _ia3("emb-conv1d", ["conv1d", "lin0"], ["lin0"]),
    **{
        f"{model}-{side}": _ia3(
            model,
            ["conv0", "conv1"],
            {"out": [], "in": ["conv0", "conv1"], "mixed": ["conv1"]}[side],
        )
        for model in (
            "conv2d",
            "conv2d-groups",
            "conv2d-dilated",
            "conv2d-reflect",
            "conv3d",
            "conv3d-groups",
        )
        for side in ("out", "in", "mixed")
    },
    "conv2d-and-linear": _ia3("conv2d", ["conv0", "lin0"], ["lin0"]),
}


def _lora(model: str, targets: Any, **more: Any) -> tuple[str, dict[str, Any]]:
    return model, dict(target_modules=targets, r=4, lora_alpha=6) | more


LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": _lora("mlp", ["lin0"]),
    "linear-second": _lora("mlp", ["lin1"]),
    "linear-both": _lora("mlp", ["lin0", "lin1"]),
    "linear-3d": _lora("mlp-3d", ["lin0", "lin1"]),
    "linear-no-bias": _lora("mlp-no-bias", ["lin0", "lin1"]),
    "linear-pattern": _lora("mlp", ".*lin."),
    "linear-all": _lora("mlp", "all-linear"),
    "linear-saved": _lora("mlp", ["lin0"], modules_to_save=["lin1"]),
    "linear-gaussian": _lora("mlp", ["lin0"], init_lora_weights="gaussian"),
    "linear-random": _lora("mlp", ["lin0"], init_lora_weights=False),
    "linear-rslora": _lora("mlp", ["lin0"], use_rslora=True),
    "linear-lora-bias": _lora("mlp", ["lin0", "lin1"], lora_bias=True),
    "linear-bias-all": _lora("mlp", ["lin0"], bias="all"),
    "linear-bias-only": _lora("mlp", ["lin0"], bias="lora_only"),
    "linear-rank-pattern": _lora("mlp", ["lin0", "lin1"], rank_pattern={"lin1": 2}),
    "linear-alpha-pattern": _lora("mlp", ["lin0", "lin1"], alpha_pattern={"lin.": 9}),
    "linear-both-patterns": _lora(
        "mlp", ["lin0", "lin1"], rank_pattern={"lin0": 3}, alpha_pattern={"lin1": 2}
    ),
    "linear-dropout": _lora("mlp", ["lin0"], lora_dropout=0.3),
    "linear-dora": _lora("mlp", ["lin0", "lin1"], use_dora=True),
    "linear-dora-no-bias": _lora("mlp-no-bias", ["lin0"], use_dora=True),
    "linear-dora-rslora": _lora("mlp-3d", ["lin0"], use_dora=True, use_rslora=True),
    "linear-dora-dropout": _lora("mlp", ["lin0"], use_dora=True, lora_dropout=0.2),
    "excluded": _lora("mlp", ["lin0", "lin1"], exclude_modules=["lin1"]),
    "excluded-pattern": _lora("mlp", ["lin0", "lin1"], exclude_modules=".*1"),
    "layers": _lora("blocks", ["mlp"], layers_to_transform=[0, 2]),
    "layers-one": _lora("blocks", ["mlp"], layers_to_transform=1, layers_pattern="layers"),
    "layers-ranks": _lora("blocks", ["mlp"], rank_pattern={r"layers\.1\.mlp": 2}),
    "embedding": _lora("emb-conv1d", ["emb"]),
    "embedding-dora": _lora("emb-conv1d", ["emb"], use_dora=True),
    "embedding-scaled": _lora("scaled-emb", ["emb"]),
    "embedding-and-linear": _lora("emb-conv1d", ["emb", "lin0"], use_rslora=True),
    "conv1d-layer": _lora("emb-conv1d", ["conv1d"]),
    "conv1d-layer-dora": _lora("emb-conv1d", ["conv1d"], use_dora=True),
    "emb-and-conv1d-layer": _lora("emb-conv1d", ["emb", "conv1d"]),
    "conv1d": _lora("conv1d", ["conv0", "conv1"]),
    "conv1d-dora": _lora("conv1d", ["conv0"], use_dora=True),
    "conv1d-rank-pattern": _lora("conv1d", ["conv0", "conv1"], rank_pattern={"conv1": 2}),
    "conv2d": _lora("conv2d", ["conv0"]),
    "conv2d-both": _lora("conv2d", ["conv0", "conv1"]),
    "conv2d-and-linear": _lora("conv2d", ["conv0", "lin0"]),
    "conv2d-dora": _lora("conv2d", ["conv0", "conv1"], use_dora=True),
    "conv2d-lora-bias": _lora("conv2d", ["conv0"], lora_bias=True),
    "conv2d-dropout": _lora("conv2d", ["conv0"], lora_dropout=0.2),
    "conv3d": _lora("conv3d", ["conv0", "conv1"]),
    "conv3d-dora": _lora("conv3d", ["conv0"], use_dora=True),
    "mha": _lora("mha", ["mha"]),
    "mha-and-linear": _lora("mha", ["mha", "lin0"], use_rslora=True),
}

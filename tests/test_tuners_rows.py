"""An adapter for each row of a batch, in models where dimension 0 is not always the batch."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from infold.errors import Refusal
from infold.tuners import IA3Config, LoraConfig, attach
from infold.tuners.rows import _TOKENS_FIRST
from peft_oracle import assert_close, assert_differs, shuffle
from tiny_models import VISION_MODELS, model_inputs, new_model

NAMES = ["other", "default"]


def two(model: nn.Module, config: Any) -> Any:
    shuffle(model.named_parameters(), 1)
    for name in ("default", "other"):
        attach(model, copy.deepcopy(config), name)
        own = ((n, p) for n, p in model.named_parameters() if f".adapters.{name}" in n)
        shuffle(own, len(name))
    return model.eval()


def output(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else getattr(found, "logits", found[0])


def assert_rows(model: Any, inputs: dict[str, Tensor], names: list[str] = NAMES) -> None:
    """Each row of the batch is what the whole batch is there with its adapter alone."""
    with torch.no_grad():
        mixed = output(model(**inputs, adapter_names=names))
        for row, name in enumerate(names):
            model.set_adapter(name)
            wanted = output(model(**inputs))
            assert_close(mixed[row], wanted[row])
            if len(set(names)) > 1:
                model.set_adapter(next(other for other in names if other != name))
                assert_differs(output(model(**inputs))[row], wanted[row])


def ids(rows: int = 2, tokens: int = 8) -> Tensor:
    return torch.randint(3, 31, (rows, tokens), generator=torch.Generator().manual_seed(4))


TEXT = dict(vocab_size=31, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HEADS = dict(encoder_attention_heads=2, decoder_attention_heads=2)
LAYERS = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24)


def longformer() -> nn.Module:
    config = hf.LongformerConfig(
        **TEXT, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        attention_window=[4, 4], max_position_embeddings=40,
    )  # fmt: skip
    return hf.LongformerModel(config)


def led() -> nn.Module:
    config = hf.LEDConfig(
        **TEXT, **HEADS, **LAYERS, d_model=16, attention_window=[4],
        max_encoder_position_embeddings=32, max_decoder_position_embeddings=32,
    )  # fmt: skip
    return hf.LEDForConditionalGeneration(config)


def fsmt() -> nn.Module:
    config = hf.FSMTConfig(
        **HEADS, **LAYERS, d_model=16, src_vocab_size=31, tgt_vocab_size=31, langs=["en", "de"],
        max_position_embeddings=32,
    )  # fmt: skip
    return hf.FSMTForConditionalGeneration(config)


def xlnet() -> nn.Module:
    config = hf.XLNetConfig(vocab_size=31, d_model=16, n_layer=2, n_head=4, d_inner=24)
    return hf.XLNetLMHeadModel(config)


def switch() -> nn.Module:
    config = hf.SwitchTransformersConfig(
        vocab_size=31, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4,
        num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        router_jitter_noise=0.0, expert_capacity=100,
    )  # fmt: skip
    return hf.SwitchTransformersForConditionalGeneration(config)


def mlcd() -> nn.Module:
    config = hf.MLCDVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    return hf.MLCDVisionModel(config)


def nllb() -> nn.Module:
    config = hf.NllbMoeConfig(
        **TEXT, **HEADS, **LAYERS, d_model=16, num_experts=2, encoder_sparse_step=1,
        decoder_sparse_step=1, expert_capacity=100, max_position_embeddings=32,
    )  # fmt: skip
    return hf.NllbMoeForConditionalGeneration(config)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


ENCODER = dict(input_ids=ids(), attention_mask=torch.ones(2, 8, dtype=torch.long))
BOTH = ENCODER | dict(decoder_input_ids=ids(tokens=4))
FIRST = "sees tokens in the first dimension"
ROUTED = "sees the tokens that are routed to it"
IA3 = IA3Config()

MINGLING: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Tensor], str, str]] = {
    "longformer": (longformer, IA3, ENCODER, r"encoder\.layer\.N\.attention\.self\.key", FIRST),
    "led": (led, IA3, BOTH, r"encoder\.layers\.N\.self_attn\.longformer_self_attn\.key", FIRST),
    "fsmt": (fsmt, IA3, BOTH, r"model\.encoder\.layers\.N\.self_attn\.k_proj", FIRST),
    "xlnet": (
        xlnet,
        IA3Config(target_modules=["layer_2"], feedforward_modules=["layer_2"]),
        dict(input_ids=ids()),
        r"transformer\.layer\.N\.ff\.layer_2",
        FIRST,
    ),
    "mlcd": (
        mlcd,
        LoraConfig(r=2, target_modules=["out_proj"]),
        dict(pixel_values=torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))),
        r"layers\.N\.self_attn\.out_proj",
        FIRST,
    ),
    "switch": (switch, IA3, BOTH, r"mlp\.experts\.expert_N\.wo", ROUTED),
    "nllb_moe": (nllb, IA3, BOTH, r"ffn\.experts\.expert_N\.fc2", ROUTED),
    "torch": (
        Tokens,
        LoraConfig(r=2, target_modules=["linear1"]),
        dict(x=torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(5))),
        r"layer\.linear1",
        FIRST,
    ),
}


@pytest.mark.parametrize("name", MINGLING)
def test_layers_that_see_no_rows_of_the_batch_are_refused(calm: None, name: str) -> None:
    make, config, inputs, path, why = MINGLING[name]
    model, called = two(make(), config), []
    next(model.children()).register_forward_pre_hook(lambda *_: called.append(1))

    with pytest.raises(Refusal, match=rf"{path} {why}.*call the model once for each adapter"):
        model(**inputs, adapter_names=NAMES)

    assert not called
    assert_rows(model, inputs, ["other", "other"])


# Classes of transformers that put the second dimension first, where it was seen that no layer gets
# tokens first that way, or none that is not refused for another reason.
SEEN = {
    "inside of a class that is listed": ["OneFormerAttention", "Mask2FormerAttention"],
    "its layers are listed": ["OneFormerTextEncoder"],
    "back from tokens first": ["BridgeTowerModel"],
    "images": ["PerceptionLMMultiModalProjector", "EdgeTamVideoModel"],
    "before the layers, to rows first": ["DabDetrModel", "CLIPSegDecoder"],
    "for a product without a layer": ["GroupedLinearLayer", "RecurrentGemmaRglru"],
    "no activations of layers": ["EfficientLoFTRModel", "GlmImageModel", "EsmFold2Model"],
}


def test_no_class_of_transformers_that_puts_tokens_first_is_overlooked() -> None:
    """One more in a new version of transformers has to be looked at, and listed here or there."""
    known = _TOKENS_FIRST.union(*SEEN.values())
    found = set()
    for file in sorted(Path(hf.__file__).parent.glob("models/*/modeling_*.py")):
        name = ""
        for line in file.read_text().splitlines():
            if line.startswith("class "):
                name = re.split(r"\W", line.removeprefix("class "))[0]
            elif re.search(r"permute\(\(?1, 0, 2\)", line) and name not in known:
                found.add(name)
    assert not found


def test_the_rest_of_such_a_model_takes_rows(calm: None) -> None:
    inner = dict(target_modules=["intermediate.dense"], feedforward_modules=[])
    assert_rows(two(longformer(), IA3Config(**inner)), ENCODER)
    attention = LoraConfig(r=2, target_modules=["SelfAttention.k", "SelfAttention.v"])
    assert_rows(two(switch(), attention), BOTH)


def vision(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = VISION_MODELS[name](False)
    model = hf.AutoModelForImageTextToText.from_config(config)
    rows = torch.full((2, 11), 5)
    rows[:, 0], rows[0, 1:5], rows[1, 1:9] = config.vision_start_token_id, 62, 62
    patch = config.vision_config
    size = patch.in_channels * patch.temporal_patch_size * patch.patch_size**2
    inputs = dict(
        input_ids=rows,
        attention_mask=torch.ones_like(rows),
        pixel_values=torch.randn(48, size, generator=torch.Generator().manual_seed(6)),
        image_grid_thw=torch.tensor([[1, 4, 4], [1, 8, 4]]),
        mm_token_type_ids=(rows == 62).long(),
    )
    return model, inputs


def test_images_are_no_rows(calm: None) -> None:
    model, inputs = vision("qwen2_vl")
    two(model, IA3Config())
    with pytest.raises(Refusal) as refused:
        model(**inputs, adapter_names=NAMES)
    assert all(".visual." in told and "several or none" in told for told in refused.value.reasons)

    language = "model.language_model.*(k_proj|v_proj)|lm_head"
    model, inputs = vision("qwen2_vl")
    assert_rows(two(model, LoraConfig(r=2, target_modules=language)), inputs)


@pytest.mark.parametrize("tokens", [2, 7])  # of as many as rows, a table of distances sees "rows"
@pytest.mark.parametrize(
    ("name", "target"), [("gpt2", "wpe"), ("t5", "relative_attention_bias")], ids=str
)
def test_tables_that_all_rows_share_are_refused(
    calm: None, name: str, target: str, tokens: int
) -> None:
    model = two(new_model(name), LoraConfig(r=2, target_modules=[target]))
    inputs = {key: value[:, :tokens] for key, value in model_inputs(name).items()}
    with pytest.raises(Refusal, match=rf"\.{target} is not known to look up tokens"):
        model(**inputs, adapter_names=NAMES)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt2", ["wte"]),
        ("t5", ["embed_tokens"]),
        ("bert", ["word_embeddings"]),
        ("bert", ["token_type_embeddings"]),
    ],
    ids=str,
)
def test_tables_of_tokens_take_rows(calm: None, name: str, targets: list[str]) -> None:
    inputs = model_inputs(name)
    if name == "bert":
        inputs["token_type_ids"] = (inputs["input_ids"] > 15).long()
    assert_rows(two(new_model(name), LoraConfig(r=2, target_modules=targets)), inputs)


def test_a_head_beside_the_text_model_takes_rows(calm: None) -> None:
    config = VISION_MODELS["gemma3"](False)
    config.text_config.pad_token_id = 0
    model = hf.Gemma3ForSequenceClassification(config)
    wanted = dict(target_modules=r".*language_model.*q_proj", task_type="SEQ_CLS")
    model = two(model, LoraConfig(r=2, **wanted))
    assert "score" in model._attached.whole
    assert_rows(model, dict(input_ids=ids(tokens=7)))


class Pairs(nn.Module):
    """Sees each row twice, in halves of its own: nobody could know."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(torch.cat((x, x)))


def test_counts_that_fit_no_input_are_refused(calm: None) -> None:
    model = two(Pairs(), LoraConfig(r=2, target_modules=["lin"]))
    with pytest.raises(Refusal, match="lin sees 4 rows where the batch has 2"):
        model(torch.randn(2, 10), adapter_names=NAMES)


# --- what is right stays right -------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 4, 7])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "bert"])
def test_any_number_of_tokens_is_right(calm: None, architecture: str, tokens: int) -> None:
    inputs = dict(input_ids=ids(tokens=tokens))
    if architecture == "t5":
        inputs["decoder_input_ids"] = ids(tokens=3)
    assert_rows(two(new_model(architecture), IA3Config()), inputs)


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(
        **TEXT, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return hf.MixtralForCausalLM(config)


def test_what_is_beside_fused_experts_is_right(calm: None) -> None:
    with pytest.warns(UserWarning, match="3-D parameters"):
        model = two(mixtral(), IA3Config())
    assert_rows(model, dict(input_ids=ids()))


def choices() -> nn.Module:
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    return hf.BertForMultipleChoice(hf.BertConfig(vocab_size=31, **size))


def test_choices_of_a_row_have_its_adapter(calm: None) -> None:
    inputs = dict(input_ids=ids(6).view(2, 3, 8))
    assert_rows(two(choices(), IA3Config()), inputs)


@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(num_beams=4)], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_beams_have_the_adapter_of_their_row(
    calm: None, architecture: str, options: dict[str, Any]
) -> None:
    model = two(new_model(architecture), IA3Config())
    options = options | dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    found = model.generate(ids(), adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        model.set_adapter(name)
        assert torch.equal(found[row], model.generate(ids()[row : row + 1], **options)[0])


def blip2() -> nn.Module:
    size = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    text = dict(model_type="opt", ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=40)
    config = hf.Blip2Config(
        vision_config=size | dict(image_size=16, patch_size=8),
        qformer_config=size | dict(encoder_hidden_size=16, vocab_size=31),
        text_config=text | size | TEXT | dict(vocab_size=64),
        num_query_tokens=4, image_token_index=62,
    )  # fmt: skip
    return hf.Blip2ForConditionalGeneration(config)


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=2),
        dict(do_sample=True, top_k=1, num_return_sequences=3),
        dict(generation_config=hf.GenerationConfig(num_beams=3)),
    ],
    ids=["beams", "sequences", "config"],
)
def test_beams_of_a_model_inside_have_the_adapter_of_their_row(
    calm: None, options: dict[str, Any]
) -> None:
    model = two(blip2(), LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|fc1|fc2)"))
    rows = torch.cat((torch.full((2, 4), 62), ids(tokens=3)), 1)
    pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    options = dict(do_sample=False) | options | dict(max_new_tokens=4, min_new_tokens=4)
    found = model.generate(pictures, rows, adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        model.set_adapter(name)
        alone = model.generate(pictures[row : row + 1], rows[row : row + 1], **options)
        assert torch.equal(found.view(2, len(alone), -1)[row], alone)


def swin(kind: str) -> nn.Module:
    sizes = dict(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2])
    if kind == "donut":
        return hf.DonutSwinModel(hf.DonutSwinConfig(**sizes, window_size=4))
    model = hf.AutoModelForImageClassification
    return model.from_config(hf.CONFIG_MAPPING[kind](**sizes, window_size=4))


def timesformer() -> nn.Module:
    config = hf.TimesformerConfig(
        image_size=16, patch_size=8, num_frames=3, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    return hf.TimesformerForVideoClassification(config)


@pytest.mark.parametrize("kind", ["swin", "swinv2", "donut", "timesformer"])
def test_rows_that_are_cut_into_pieces_have_their_adapter(calm: None, kind: str) -> None:
    shape = (2, 3, 3, 16, 16) if kind == "timesformer" else (2, 3, 32, 32)
    model = timesformer() if kind == "timesformer" else swin(kind)
    targets = [path for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    kept = [path for path in targets if "position" not in path]  # whose tables all rows share
    model = two(model, LoraConfig(r=2, target_modules=kept))
    pictures = torch.randn(shape, generator=torch.Generator().manual_seed(6))

    assert_rows(model, dict(pixel_values=pictures))

"""Examples as token ids with labels, batches, and packing.

A label of -100 marks a token without loss. What is learnt must be what happens at generation: there
the prompt is tokenised alone and the answer follows. So the ids of a row begin with exactly the ids
of its prompt alone. Where tokenising prompt and answer in one go would merge characters across the
joint, the answer is tokenised as a continuation instead.

Packing puts several examples into one row. Their position ids start anew at 0, and no attention
mask is given: transformers then finds the borders and separates the examples (block-diagonal
attention). The first label of each example is -100, since nothing of its own precedes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from infold.errors import Refusal
from infold.tuners.data import DataSet, Offences

__all__ = [
    "IGNORED",
    "Collator",
    "Tokens",
    "check_labels",
    "class_names",
    "encode",
    "pack",
    "special_ids",
]

IGNORED = -100  # the label that PyTorch's cross entropy skips
CHUNK = 512  # texts for one call of the tokenizer
_ANCHOR = "\n"  # a text that no tokenizer joins with what follows

Segment = tuple[str, bool]  # text, whether it is learnt


@dataclass(frozen=True, slots=True)
class Tokens:
    """One row. `labels` has the length of `ids`, or is a class. `starts`: where examples begin."""

    ids: list[int]
    labels: list[int] | int
    starts: tuple[int, ...] = (0,)

    @property
    def learnt(self) -> int:
        """How many labels count; the first of a causal row never does, nothing predicts it."""
        return 1 if isinstance(self.labels, int) else sum(x != IGNORED for x in self.labels[1:])


def encode(
    data: DataSet,
    tokenizer: Any,
    *,
    limit: int,
    too_long: str = "refuse",
    template: str = "{text}\nLabel:",
    classes: Sequence[str] | None = None,
    heads: bool = False,
) -> tuple[list[Tokens], int]:
    """Token ids and labels of every example, in order; and how many were cut or dropped.

    limit: the most tokens of a row. too_long: what happens to longer ones: refuse, cut (at the end)
    or drop. template: the prompt of a text/label row, when the label is generated as words.
    classes: the classes' names. heads: label rows train a classification head (SEQ_CLS).
    Raises Refusal for all rows that cannot be used.
    """
    wrong = Offences()
    if data.shape == "label" and heads:
        rows = _classified(data, tokenizer, classes or (), wrong)
    elif data.shape == "chat":
        rows = _chats(data, tokenizer, wrong)
    else:
        end = _end_of_text(tokenizer)
        parts = [_segments(e.values, data.shape, template, classes) for e in data.examples]
        before, _ = special_ids(tokenizer)
        rows = [
            Tokens(before + row.ids + end, [IGNORED] * len(before) + _ids_of(row) + end)
            for row in _joined(parts, tokenizer)
        ]
    kept, changed = [], 0
    for example, row in zip(data.examples, rows, strict=True):
        if len(row.ids) > limit:
            if too_long == "refuse":
                wrong.add(
                    example.where,
                    f"has {len(row.ids):,} tokens, {len(row.ids) - limit:,} more than the "
                    f"{limit:,} allowed; shorten it, or choose --too-long cut or drop",
                )
                continue
            changed += 1
            if too_long == "drop":
                continue
            labels = row.labels if isinstance(row.labels, int) else row.labels[:limit]
            row = Tokens(row.ids[:limit], labels)
        if row.ids and not row.learnt:
            wrong.add(example.where, f"none of its first {limit:,} tokens is to be learnt")
            continue
        kept.append(row)
    wrong.refuse(data.name, len(data))
    if not kept:
        all_of_them = "its only row is" if len(data) == 1 else f"all {len(data):,} rows are"
        raise Refusal(f"{data.name}: {all_of_them} longer than {limit:,} tokens")
    return kept, changed


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before and after a text."""
    bare = _tokenise(["a"], tokenizer)[0]
    full = list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def class_names(data: DataSet, given: Sequence[str] | None) -> list[str]:
    """Names of the classes: as given, else the sorted texts, else the numbers 0 to the largest.

    A text label must be one of the given names, a number must index them.
    """
    values = [example.values["label"] for example in data.examples]
    numbers = isinstance(values[0], int)
    names = list(given) if given else None
    if names is None:
        names = [str(n) for n in range(max(values) + 1)] if numbers else sorted(set(values))
    check_labels(data, names)
    if len(names) < 2:
        raise Refusal(f"{data.name}: all rows have the label {values[0]!r}; there is no choice")
    return names


def check_labels(data: DataSet, names: Sequence[str]) -> None:
    """Refuse the rows whose label is none of `names`, all of them."""
    wrong = Offences()
    known = set(names)
    for example in data.examples:
        label = example.values["label"]
        if label not in (range(len(names)) if isinstance(label, int) else known):
            wrong.add(
                example.where, f"label {label!r} is none of the {len(names)}: {', '.join(names)}"
            )
    wrong.refuse(data.name, len(data))


# --- the shapes -----------------------------------------------------------------------------------


def _segments(
    values: Mapping[str, Any], shape: str, template: str, classes: Sequence[str] | None
) -> list[Segment]:
    if shape == "text":
        return [(values["text"], True)]
    if shape == "completion":
        return [(values["prompt"], False), (values["completion"], True)]
    label = values["label"]
    word = classes[label] if isinstance(label, int) and classes else str(label)
    return [(template.replace("{text}", values["text"]), False), (f" {word}", True)]


def _classified(
    data: DataSet, tokenizer: Any, classes: Sequence[str], wrong: Offences
) -> list[Tokens]:
    number = {name: index for index, name in enumerate(classes)}
    texts = [example.values["text"] for example in data.examples]
    rows = []
    for ids, example in zip(_tokenise(texts, tokenizer, special=True), data.examples, strict=True):
        label = example.values["label"]
        rows.append(Tokens(ids, label if isinstance(label, int) else number[label]))
    return rows


def _chats(data: DataSet, tokenizer: Any, wrong: Offences) -> list[Tokens]:
    """Rows of the model's own chat template, which brings all special tokens along."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise Refusal(
            f"{data.name}: holds chat messages, and the base's tokenizer has no chat template; "
            "use an instruct model, or prompt and completion"
        )
    marked = isinstance(template, str) and "{% generation" in template.replace("{%-", "{%")
    parts: list[list[Segment]] = []
    rows: list[Tokens] = []
    for example in data.examples:
        messages = example.values["messages"]
        try:
            if marked:
                rows.append(_marked(messages, tokenizer))
            else:
                parts.append(_turns(messages, tokenizer))
        except Exception as error:  # templates raise what they like
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            wrong.add(example.where, f"the chat template refuses it: {first}")
            (rows if marked else parts).append(Tokens([], []) if marked else [])  # type: ignore[arg-type]
    return rows if marked else _joined(parts, tokenizer)


def _marked(messages: Sequence[Any], tokenizer: Any) -> Tokens:
    """A template with {% generation %} blocks says itself which tokens are answers."""
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = found.get("assistant_masks", found.get("assistant_mask"))
    ids = list(found["input_ids"])
    return Tokens(ids, [i if m else IGNORED for i, m in zip(ids, mask, strict=True)])


def _turns(messages: Sequence[Any], tokenizer: Any) -> list[Segment]:
    """The rendered chat, cut where answers begin and end: what follows the generation prompt."""

    def render(count: int, ask: bool) -> str:
        text = tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=ask
        )
        return str(text)

    whole = render(len(messages), False)
    segments: list[Segment] = []
    done = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin, end = render(number, True), render(number + 1, False)
        if not (whole.startswith(begin) and whole.startswith(end) and len(begin) >= done):
            raise ValueError(
                f"it renders messages[{number}] differently inside of the whole chat, so its "
                "tokens cannot be found; split the row so that each ends with one answer"
            )
        segments += [(whole[done : len(begin)], False), (whole[len(begin) : len(end)], True)]
        done = len(end)
    return [*segments, (whole[done:], False)]


# --- ids ------------------------------------------------------------------------------------------


def _tokenise(texts: Sequence[str], tokenizer: Any, special: bool = False) -> list[list[int]]:
    """Ids of each text; a fast tokenizer works on a chunk of texts at a time."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        chunk = list(texts[start : start + CHUNK])
        ids += tokenizer(chunk, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _joined(parts: Sequence[Sequence[Segment]], tokenizer: Any) -> list[Tokens]:
    """Ids of each row of segments, without special ids; labels on the segments that are learnt.

    The whole row is tokenised at once, and so is each beginning of it that ends with a segment. As
    long as their ids agree, the borders are known; from the first that does not, the segments are
    tokenised one by one.
    """
    texts: list[str] = []
    spans = []
    for segments in parts:
        text, start = "", len(texts)
        for piece, _ in segments:
            text += piece
            texts.append(text)
        spans.append((start, len(texts)))
    ids = _tokenise(texts, tokenizer)
    rows = []
    for segments, (start, stop) in zip(parts, spans, strict=True):
        prefixes = ids[start:stop]
        whole = prefixes[-1] if prefixes else []
        row: list[int] = []
        labels: list[int] = []
        agree = True
        for (piece, learnt), prefix in zip(segments, prefixes, strict=True):
            agree = agree and whole[: len(prefix)] == prefix and len(prefix) >= len(row)
            new = prefix[len(row) :] if agree or not row else _continuation(piece, tokenizer)
            row += new
            labels += new if learnt else [IGNORED] * len(new)
        rows.append(Tokens(row, labels))
    return rows


def _continuation(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text that follows another: without the space that some tokenizers put in front."""
    anchor, anchored, alone = _tokenise([_ANCHOR, _ANCHOR + text, text], tokenizer)
    return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else alone


def _ids_of(row: Tokens) -> list[int]:
    assert isinstance(row.labels, list)
    return row.labels


def _end_of_text(tokenizer: Any) -> list[int]:
    """The id that ends a text: learnt too, so that generation stops."""
    end = tokenizer.eos_token_id
    return [] if end is None else [int(end)]


# --- batches --------------------------------------------------------------------------------------


def pack(rows: Sequence[Tokens], length: int) -> list[Tokens]:
    """Rows of at most `length` tokens made of whole examples: longest first, best fit.

    The order of the result follows the first example of each row, so it depends on nothing else.
    """
    bins: list[tuple[list[int], int]] = []
    room: dict[int, list[int]] = {}  # free tokens -> numbers of bins
    for number in sorted(range(len(rows)), key=lambda n: (-len(rows[n].ids), n)):
        need = len(rows[number].ids)
        free = min((space for space in room if space >= need), default=None)
        if free is None:
            bins.append(([number], 0))
            place, free = len(bins) - 1, length
        else:
            place = room[free].pop()
            if not room[free]:
                del room[free]
            bins[place][0].append(number)
        room.setdefault(free - need, []).append(place)
    return [
        _packed([rows[n] for n in sorted(members)])
        for members, _ in sorted(bins, key=lambda entry: min(entry[0]))
    ]


def _packed(rows: Iterable[Tokens]) -> Tokens:
    ids: list[int] = []
    labels: list[int] = []
    starts = []
    for row in rows:
        starts.append(len(ids))
        ids += row.ids
        labels += [IGNORED, *_ids_of(row)[1:]]
    return Tokens(ids, labels, tuple(starts))


@dataclass(frozen=True)
class Collator:
    """Tokens -> tensors (rows, longest row), int64, padded at the right with `pad_id`.

    Unpacked: input_ids, attention_mask, labels. Packed: input_ids, position_ids, labels; padding is
    one more example of its own.
    """

    pad_id: int
    packing: bool = False

    def __call__(self, rows: Sequence[Tokens]) -> dict[str, Tensor]:
        width = max(len(row.ids) for row in rows)
        gaps = [width - len(row.ids) for row in rows]
        batch = {
            "input_ids": torch.tensor(
                [row.ids + [self.pad_id] * gap for row, gap in zip(rows, gaps, strict=True)]
            )
        }
        if self.packing:
            batch["position_ids"] = torch.tensor([_positions(row, width) for row in rows])
        else:
            batch["attention_mask"] = torch.tensor(
                [[1] * (width - gap) + [0] * gap for gap in gaps]
            )
        labels = [
            row.labels if isinstance(row.labels, int) else row.labels + [IGNORED] * gap
            for row, gap in zip(rows, gaps, strict=True)
        ]
        return batch | {"labels": torch.tensor(labels)}


def _positions(row: Tokens, width: int) -> list[int]:
    borders = [*row.starts, len(row.ids), width]
    return [position for begin, end in pairwise(borders) for position in range(end - begin)]

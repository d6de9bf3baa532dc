"""Data for training: every shape, every error with its place, exact borders, chats, packing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infold.errors import CorruptFile, Refusal, StorageFailure
from infold.tuners.data import Offences, read_data
from infold.tuners.tokens import IGNORED, Collator, Tokens, class_names, encode, pack
from training import CHAT, new_tokenizer, write_jsonl

BYTES = new_tokenizer()
SPACES = new_tokenizer("spaces")
COMPLETION = {"prompt": "two plus two?", "completion": " four"}
CONVERSATION = [
    {"role": "user", "content": "two plus two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "good"},
    {"role": "assistant", "content": "fine"},
]


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        (COMPLETION, "completion"),
        ({"text": "a film"}, "text"),
        ({"text": "a film", "label": "good"}, "label"),
        ({"text": "a film", "label": 1}, "label"),
        ({"messages": CONVERSATION}, "chat"),
    ],
)
def test_each_shape_is_known_by_its_fields(row: dict[str, Any], shape: str, tmp_path: Path) -> None:
    data = read_data(write_jsonl(tmp_path / "d.jsonl", [row | {"id": 7}] * 2))

    assert (data.shape, len(data), data.ignored) == (shape, 2, ("id",))
    assert data.examples[1].where == "d.jsonl, line 2"
    assert data.examples[1].values == row


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", b'{"prompt": "a, \xc3\xa9", "completion": "b\\nc"}\n\n'),
        ("d.json", b'[{"prompt": "a, \xc3\xa9", "completion": "b\\nc"}]'),
        ("d.csv", b'\xef\xbb\xbfprompt,completion\r\n"a, \xc3\xa9","b\nc"\r\n'),
        ("d.tsv", b'prompt\tcompletion\na, \xc3\xa9\t"b\nc"\n'),
    ],
)
def test_each_format_gives_the_same_rows(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)

    data = read_data(tmp_path / name)

    assert [e.values for e in data.examples] == [{"prompt": "a, é", "completion": "b\nc"}]


def test_parquet_is_read_and_its_rows_are_counted(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"messages": [CONVERSATION] * 2, "n": [1, 2]})
    parquet.write_table(table, tmp_path / "d.parquet")

    data = read_data(tmp_path / "d.parquet")

    assert data.examples[1].where == "d.parquet, row 2"
    assert data.examples[1].values["messages"] == CONVERSATION
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CorruptFile, match=r"bad\.parquet: not a Parquet file"):
        read_data(tmp_path / "bad.parquet")


GOOD = json.dumps(COMPLETION)
CHATTING = json.dumps({"messages": CONVERSATION})
LABELLED = json.dumps({"text": "a", "label": "b"})


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([GOOD, "{broken"], "d.jsonl, line 2: not valid JSON: Expecting property name"),
        ([GOOD, "", "[1]"], "d.jsonl, line 3: must be an object with fields, not a list"),
        ([GOOD, '{"prompt": "a"}'], "line 2: field 'completion' is missing"),
        ([GOOD, '{"prompt": "a", "completion": null}'], "line 2: field 'completion' is missing"),
        ([GOOD, '{"prompt": " ", "completion": "b"}'], "line 2: field 'prompt' is empty"),
        ([GOOD, '{"prompt": "a", "completion": ""}'], "line 2: field 'completion' is empty"),
        ([GOOD, '{"prompt": 3, "completion": "b"}'], "field 'prompt' must be text, not a whole"),
        ([GOOD, '{"prompt": "a", "completion": "\\ud800"}'], "half of a surrogate pair"),
        ([LABELLED, '{"text": "a", "label": 1}'], "is a whole number, where the first row has tex"),
        ([LABELLED, '{"text": "a", "label": 0.5}'], "must be text or a whole number, not a number"),
        ([LABELLED, '{"text": "a", "label": true}'], "whole number, not true or false"),
        ([LABELLED, '{"text": "a", "label": -1}'], "is -1, which marks a row without a label"),
        ([LABELLED, '{"text": "a"}'], "line 2: field 'label' is missing"),
        ([CHATTING, '{"messages": []}'], "must be a list of messages, not a list that is empty"),
        ([CHATTING, '{"messages": [{"content": "a"}]}'], "field 'messages[0]' has no 'role'"),
        ([CHATTING, '{"messages": [{"role": "user"}]}'], "'messages[0]' has no 'content' that is"),
        ([CHATTING, '{"messages": [{"role": "user", "content": "a"}]}'], "no message of the assis"),
        ([CHATTING, '{"messages": [{"role": "assistant", "content": ""}]}'], "answer without con"),
    ],
)
def test_each_error_tells_line_and_field(lines: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("\n".join(lines))

    with pytest.raises(Refusal) as refused:
        read_data(tmp_path / "d.jsonl")

    assert told in str(refused.value)
    assert "1 of 2 rows cannot be used" in str(refused.value)


def test_csv_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('prompt,completion\n"a\nb",c\nd\ne,\n')

    with pytest.raises(Refusal) as refused:
        read_data(tmp_path / "d.csv")

    assert "d.csv, line 4: has 1 field, and the header has 2" in str(refused.value)
    assert "d.csv, line 5: field 'completion' is empty" in str(refused.value)


@pytest.mark.parametrize(
    ("labels", "read"),
    [
        ("0 1 0", [0, 1, 0]),
        ("1 2 3", ["1", "2", "3"]),
        ("0 1 x", ["0", "1", "x"]),
        ("0 0", ["0", "0"]),
    ],
)
def test_csv_labels_that_count_classes_are_numbers(
    labels: str, read: list[Any], tmp_path: Path
) -> None:
    rows = "".join(f"film {i},{label}\n" for i, label in enumerate(labels.split()))
    (tmp_path / "d.csv").write_text("text,label\n" + rows)

    found = read_data(tmp_path / "d.csv")
    assert [e.values["label"] for e in found.examples] == read
    (tmp_path / "held.csv").write_text("text,label\nanother,1\n")
    held = read_data(tmp_path / "held.csv", like=found)
    assert held.examples[0].values["label"] == (1 if isinstance(read[0], int) else "1")


def test_csv_that_is_not_utf8_tells_the_line(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b"text\ngood\n\xff\n")

    with pytest.raises(Refusal, match=r"d\.csv, line 3: is not UTF-8"):
        read_data(tmp_path / "d.csv")


def test_what_is_wrong_with_many_rows_is_told_of_three_and_counted(tmp_path: Path) -> None:
    """And what is wrong with one of them is not lost among them."""
    rows = [COMPLETION] * 10 + [{"prompt": 1, "completion": ""}] * 3000
    rows[2000] = {"prompt": "a"}

    with pytest.raises(Refusal) as refused:
        read_data(write_jsonl(tmp_path / "d.jsonl", rows))

    lines = (11, 12, 13)
    assert str(refused.value).splitlines() == [
        f"{tmp_path / 'd.jsonl'}: 3,000 of 3,010 rows cannot be used",
        *(f"  d.jsonl, line {n}: field 'prompt' must be text, not a whole number" for n in lines),
        "  and 2,996 more like these",
        *(f"  d.jsonl, line {n}: field 'completion' is empty" for n in lines),
        "  and 2,996 more like these",
        "  d.jsonl, line 2001: field 'completion' is missing",
    ]


def test_numbers_in_a_message_make_no_other_kind(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b" * (30 + n)} for n in range(1000)]

    with pytest.raises(Refusal) as refused:
        tokens_of(rows, tmp_path, limit=20)

    lines = str(refused.value).splitlines()
    assert len(lines) == 5 and lines[3].startswith("  d.jsonl, line 3: has 35 tokens, 15 more than")
    assert lines[4] == "  and 997 more like these"


def test_kinds_beyond_the_twentieth_are_counted() -> None:
    wrong = Offences()
    for n in range(50):
        wrong.add(f"line {n}", f"is wrong as {chr(97 + n % 25)}")

    with pytest.raises(Refusal) as refused:
        wrong.refuse("d.jsonl", 100)

    lines = str(refused.value).splitlines()
    assert len(lines) == 42 and lines[-1] == "  and 10 more of other kinds"


def test_unknown_fields_are_told_and_can_be_renamed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"question": "a", "answer": "b", "text": "c"}])
    renamed = read_data(path, {"prompt": "question", "completion": "answer"})

    assert renamed.examples[0].values == {"prompt": "a", "completion": "b"}
    assert renamed.ignored == ("text",)
    with pytest.raises(Refusal, match="not a field of training data"):
        read_data(path, {"question": "prompt"})
    with pytest.raises(Refusal, match="has the fields answer, question, but training needs one of"):
        read_data(write_jsonl(tmp_path / "e.jsonl", [{"question": "a", "answer": "b"}]))


def test_a_folder_is_read_without_its_held_out_files(tmp_path: Path) -> None:
    for name in ("train-00000", "train-00001", "test-00000", "validation"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])

    data = read_data(tmp_path)

    assert [e.values["text"] for e in data.examples] == ["train-00000", "train-00001"]


def test_a_data_set_of_the_hub_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hub's own client, from its cache: no network is needed for what is there already."""
    place = tmp_path / "datasets--org--films"
    snapshot = place / "snapshots" / ("0" * 40)
    (snapshot / "data").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    write_jsonl(snapshot / "data" / "train.jsonl", [{"text": "good", "label": "yes"}])
    write_jsonl(snapshot / "data" / "test.jsonl", [{"text": "bad", "label": "no"}])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))

    data = read_data("org/films")

    assert data.name == "org/films" and data.shape == "label"
    assert [e.values["text"] for e in data.examples] == ["good"]
    with pytest.raises(StorageFailure, match=r"org/nothing: .* check the name"):
        read_data("org/nothing")
    write_jsonl(snapshot / "data" / "train.jsonl", [{"text": 5, "label": "yes"}])
    with pytest.raises(Refusal, match=r"train\.jsonl.*line 1: field 'text'"):
        read_data("org/films")
    (snapshot / "de").mkdir()
    write_jsonl(snapshot / "de" / "train.jsonl", [{"text": "gut", "label": "ja"}])
    with pytest.raises(Refusal, match=r"org/films: has several subsets: data, de; give the folder"):
        read_data("org/films")


def test_no_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("\n")
    (tmp_path / "d.txt").write_text("hello")
    for name, told in (("d.jsonl", "no rows"), ("d.txt", "is one of"), ("x.csv", "no such file")):
        with pytest.raises(Refusal, match=told):
            read_data(tmp_path / name)


# --- tokens ---------------------------------------------------------------------------------------


def tokens_of(rows: list[dict[str, Any]], tmp_path: Path, tokenizer: Any = BYTES, **options: Any):
    data = read_data(write_jsonl(tmp_path / "d.jsonl", rows))
    return encode(data, tokenizer, **{"limit": 1000, **options})


def learnt(row: Tokens, tokenizer: Any) -> str:
    assert isinstance(row.labels, list)
    return tokenizer.decode([i for i in row.labels if i != IGNORED])


TEXT = st.text(alphabet="agodfilmw 4é?\n", min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(prompt=TEXT.filter(str.strip), completion=TEXT, kind=st.sampled_from(["bytes", "spaces"]))
def test_the_prompt_is_tokenised_as_at_generation(
    prompt: str, completion: str, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = BYTES if kind == "bytes" else SPACES
    if kind == "spaces":  # this one has no ids for these
        prompt, completion = prompt.replace("é", "e"), completion.replace("é", "e")
    folder = tmp_path_factory.mktemp("d")

    rows, _ = tokens_of([{"prompt": prompt, "completion": completion}], folder, tokenizer)

    alone = tokenizer(prompt)["input_ids"]
    assert rows[0].ids[: len(alone)] == alone
    assert rows[0].labels == [IGNORED] * len(alone) + rows[0].ids[len(alone) :]
    assert rows[0].ids[-1] == tokenizer.eos_token_id
    whole = tokenizer.decode(rows[0].ids[1:-1], clean_up_tokenization_spaces=False)
    assert whole.lstrip(" ") == (prompt + completion).lstrip(" ")


def test_a_token_across_the_joint_is_not_made(tmp_path: Path) -> None:
    """` film` is one token, but nobody generates it after a prompt that ends with the space."""
    whole = BYTES("the film")["input_ids"]
    rows, _ = tokens_of([{"prompt": "the ", "completion": "film"}], tmp_path)

    assert BYTES.decode(whole[-1:]) == " film"
    assert rows[0].ids[: len(whole) - 1] == whole[:-1] and rows[0].ids[len(whole) - 1] != whole[-1]
    assert learnt(rows[0], BYTES) == "film</s>"


def test_text_is_learnt_whole_and_ends(tmp_path: Path) -> None:
    rows, _ = tokens_of([{"text": "the film"}], tmp_path)

    assert rows[0].ids == [0, *BYTES("the film", add_special_tokens=False)["input_ids"], 1]
    assert rows[0].labels == [IGNORED, *rows[0].ids[1:]]


def test_a_label_is_written_after_the_template(tmp_path: Path) -> None:
    rows, _ = tokens_of(
        [{"text": "{label}", "label": 1}],
        tmp_path,
        template="Review: {text}\nIs:",
        classes=["bad", "good"],
    )

    assert BYTES.decode(rows[0].ids) == "<s>Review: {label}\nIs: good</s>"
    assert learnt(rows[0], BYTES) == " good</s>"


def test_class_names_come_from_the_labels_or_are_checked(tmp_path: Path) -> None:
    words = [{"text": "a", "label": name} for name in ("good", "bad", "good")]
    data = read_data(write_jsonl(tmp_path / "w.jsonl", words))
    numbers = [{"text": "a", "label": n} for n in (2, 0)]
    counted = read_data(write_jsonl(tmp_path / "n.jsonl", numbers))

    assert class_names(data, None) == ["bad", "good"]
    assert class_names(counted, None) == ["0", "1", "2"]
    with pytest.raises(Refusal, match=r"w\.jsonl, line 2: label 'bad' is none of the 2: good, fin"):
        class_names(data, ["good", "fine"])
    with pytest.raises(Refusal, match=r"n\.jsonl, line 1: label 2 is none of the 2"):
        class_names(counted, ["good", "fine"])


def test_chat_learns_the_answers_alone(tmp_path: Path) -> None:
    tokenizer = new_tokenizer()
    tokenizer.chat_template = CHAT
    rows, _ = tokens_of([{"messages": CONVERSATION}], tmp_path, tokenizer)

    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.decode(rows[0].ids) == rendered
    assert learnt(rows[0], tokenizer) == "four</s>fine</s>"


def test_a_template_that_marks_answers_is_believed(tmp_path: Path) -> None:
    tokenizer = new_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}[{% generation %}{{ m.content }}</s>"
        "{% endgeneration %}]{% else %}({{ m.content }}){% endif %}{% endfor %}"
    )
    rows, _ = tokens_of([{"messages": CONVERSATION}], tmp_path, tokenizer)

    assert learnt(rows[0], tokenizer) == "four</s>fine</s>"


def test_chats_that_cannot_be_cut_or_rendered_are_refused(tmp_path: Path) -> None:
    tokenizer = new_tokenizer()
    with pytest.raises(Refusal, match="has no chat template"):
        tokens_of([{"messages": CONVERSATION}], tmp_path, tokenizer)
    # only the last answer is shown whole, as templates that drop earlier thoughts do
    tokenizer.chat_template = (
        "{% for m in messages %}({% if loop.last %}!{% endif %}{{ m.content }}){% endfor %}"
    )
    with pytest.raises(Refusal, match=r"line 1: .*renders messages\[1\] differently"):
        tokens_of([{"messages": CONVERSATION}], tmp_path, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(Refusal, match="line 1: the chat template refuses it: roles must alternate"):
        tokens_of([{"messages": CONVERSATION}], tmp_path, tokenizer)


def test_rows_that_are_too_long_are_refused_cut_or_dropped(tmp_path: Path) -> None:
    rows = [COMPLETION, {"prompt": "a", "completion": "b" * 30}, {"prompt": "a" * 30} | COMPLETION]
    rows[2]["prompt"] = "x" * 30

    with pytest.raises(Refusal) as refused:
        tokens_of(rows, tmp_path, limit=20)
    assert "line 2: has 33 tokens, 13 more than the 20 allowed" in str(refused.value)
    assert "2 of 3 rows" in str(refused.value)

    kept, changed = tokens_of(rows, tmp_path, limit=20, too_long="drop")
    assert (len(kept), changed) == (1, 2)

    kept, changed = tokens_of(rows[:2], tmp_path, limit=20, too_long="cut")
    assert [len(row.ids) for row in kept][1:] == [20] and changed == 1
    with pytest.raises(Refusal, match="line 3: none of its first 20 tokens is to be learnt"):
        tokens_of(rows, tmp_path, limit=20, too_long="cut")
    with pytest.raises(Refusal, match="its only row is longer than 20 tokens"):
        tokens_of(rows[1:2], tmp_path, limit=20, too_long="drop")


# --- packing --------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 10), min_size=1, max_size=30), room=st.integers(10, 25))
def test_packing_keeps_every_example_whole(lengths: list[int], room: int) -> None:
    rows = [Tokens([number] * size, [number] * size) for number, size in enumerate(lengths)]

    packed = pack(rows, room)

    found = []
    for row in packed:
        assert len(row.ids) <= room
        for begin, end in pairwise((*row.starts, len(row.ids))):
            found.append(Tokens(row.ids[begin:end], row.labels[begin:end]))
    expected = [Tokens(row.ids, [IGNORED, *row.labels[1:]]) for row in rows]
    assert sorted(found, key=lambda row: row.ids) == sorted(expected, key=lambda row: row.ids)
    positions = Collator(0, packing=True)(packed)["position_ids"]
    for row, line in zip(packed, positions.tolist(), strict=True):
        assert all(line[start] == 0 for start in row.starts)


def test_a_batch_is_padded_at_the_right() -> None:
    batch = Collator(9)([Tokens([5, 6, 7], [-100, 6, 7]), Tokens([5], [5])])

    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [5, -100, -100]]

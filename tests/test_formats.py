"""Data of your own: every format gives the same rows, loaded, streamed or checked, and every fault is named."""

import base64
import csv
import io
import json
import os
import re
import sys
import types
from contextlib import nullcontext

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Json, List, Value, Video, load_from_disk
from PIL import Image as PILImage
from pyarrow import parquet as pq
from test_tasks import write_image, write_lines
from test_train import tiny_flags
from tiny import ROOT, tiny_processor

import train
from tasks import _formats, chat, digits, get_task, vqa
from tasks.__main__ import check, main
from training.arguments import DataArguments, DehvfTrainingArguments
from training.data import load_rows, load_splits, read_image
from training.encoding import RowEncoder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def write_list(file, rows):
    file.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8-sig")


def write_csv(file, rows):
    with open(file, "w", encoding="utf-8-sig", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(task, path, split="train", **arguments):
    """The rows of a split with the colour of their image in its place, the same whether they are streamed or not."""
    rows, streamed = (
        task.load(split, str(path), streaming=streaming, **arguments).cast_column("image", Image(decode=False))
        for streaming in (False, True)
    )
    assert rows.features == streamed.features == {**task.FEATURES, "image": Image(decode=False)}
    read_rows = [[{**row, "image": colour_of(read_image(row["image"]))} for row in part] for part in (rows, streamed)]
    assert read_rows[0] == read_rows[1]
    return read_rows[0]


def colour_of(image):
    return image and {(255, 0, 0): "red", (0, 0, 255): "blue"}[image.getpixel((4, 4))]


# --- vqa ---


QUESTION = 'What, "exactly",\nis it, Zoë?'
ROWS = {
    "train": [{"question": QUESTION, "answer": "A", "image": "a.png"}, {"question": "Why?", "answer": "so"}],
    "test": [{"question": "Which?", "answer": "B", "image": "b.png"}],
}
COLOURS = {"a.png": "red", "b.png": "blue", None: None}


def make_dataset(folder, split, make_image=PILImage.open, feature=None):
    names = [row.get("image") for row in ROWS[split]]
    columns = {name: [row[name] for row in ROWS[split]] for name in ("question", "answer")}
    rows = Dataset.from_dict({**columns, "image": [name and make_image(folder / name) for name in names]})
    return rows.cast_column("image", feature or Image())


def save_files(folder, name, write):
    for split, rows in ROWS.items():
        write(folder / name.format(split), [{"question": "", "answer": "", "image": None, **row} for row in rows])


def save_image_folders(folder, write, name):
    """Images of the same name in the folders of all splits."""
    for split, rows in ROWS.items():
        for row in rows:
            write_image(folder / split / "it.png", COLOURS[row.get("image")] or "red")
        rows = [{"file_name": row.get("image") and "it.png", **row} for row in rows]
        write(folder / split / name, [{name: row[name] for name in row if name != "image"} for row in rows])


def save_parquet(folder, name="{}-0.parquet", **arguments):
    for split in ROWS:
        make_dataset(folder, split, **arguments).to_parquet(folder / name.format(split))


def save_parquet_of_paths(folder):
    save_parquet(folder, make_image=lambda file: file.name, feature=Value("string"))
    for number in range(9):  # more images than Parquet files
        write_image(folder / f"{number}.png")


def save_to_disk(folder):
    DatasetDict({split: make_dataset(folder, split) for split in ROWS}).save_to_disk(folder)


def save_each_to_disk(folder):
    for split in ROWS:
        make_dataset(folder, split).save_to_disk(folder / split)
    (folder / "dataset_infos.json").write_text("{}")


LAYOUTS = {
    "JSON Lines": lambda folder: save_files(folder, "{}.jsonl", write_lines),
    "JSON": lambda folder: save_files(folder, "my_{}_set.json", write_list),
    "CSV": lambda folder: save_files(folder, "{}.csv", write_csv),
    "JSON Lines of an image folder": lambda folder: save_image_folders(folder, write_lines, "metadata.jsonl"),
    "CSV of an image folder": lambda folder: save_image_folders(folder, write_csv, "metadata.csv"),
    "Parquet": save_parquet,
    "Parquet with lists": lambda folder: save_parquet(
        folder, make_image=lambda file: [PILImage.open(file)], feature=List(Image())
    ),
    "Parquet with bytes": lambda folder: save_parquet(
        folder, make_image=lambda file: file.read_bytes(), feature=Value("binary")
    ),
    "Parquet with paths": save_parquet_of_paths,
    "save_to_disk": save_to_disk,
    "save_to_disk of each split": save_each_to_disk,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows(layout, tmp_path, capsys):
    for name, colour in COLOURS.items():
        if name:
            write_image(tmp_path / name, colour)
    LAYOUTS[layout](tmp_path)
    for split, rows in ROWS.items():
        expected = [(row["question"], row["answer"], COLOURS[row.get("image")]) for row in rows]
        assert [(row["question"], row["answer"], row["image"]) for row in read(vqa, tmp_path, split)] == expected
    assert check(str(tmp_path))
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{tmp_path}: {layout.partition(' of')[0].partition(' with')[0]}, read with --task vqa\n"
    )
    assert "2 good rows, 1 with an image" in printed and "1 good rows, 1 with an image" in printed


@pytest.mark.parametrize("name", ["x.jsonl", "test.json", "x.csv", "x.parquet", "saved"])
def test_one_file_or_data_set_is_the_train_split(name, tmp_path):
    write_image(tmp_path / "images" / "a.png")  # found, though not named
    rows = [{"question": "Why?", "answer": "so", "image": "a.png"}]
    match name.partition(".")[2]:
        case "jsonl":
            write_lines(tmp_path / name, rows)
        case "json":
            write_list(tmp_path / name, rows)
        case "csv":
            write_csv(tmp_path / name, rows)
        case "parquet":
            Dataset.from_list(rows).to_parquet(tmp_path / name)
        case _:
            write_image(tmp_path / name / "a.png")
            Dataset.from_list(rows).save_to_disk(tmp_path / name)
    (row,) = read(vqa, tmp_path / name)
    assert (row["question"], row["image"]) == ("Why?", "red")
    with pytest.raises(ValueError, match="has no split `test`. It has: train. .*`--holdout 0.05`"):
        vqa.load("test", str(tmp_path / name))


def test_a_data_set_on_the_hub_may_name_its_splits_differently(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png")
    rows = make_dataset(tmp_path, "train")
    splits = {"train_sft": rows, "dev": rows, "paths": Dataset.from_list([{**ROWS["train"][0]}])}
    calls = []
    monkeypatch.setattr(_formats, "load_dataset", lambda *words, **_: calls.append(words) or splits)
    for split in ("train", "validation"):
        assert [row["image"] is None for row in vqa.load(split, "org/data:small")] == [False, True]
    assert calls[0] == ("org/data", "small")
    with pytest.raises(ValueError, match="org/data, paths split, row 0: `image` is 'a.png'.*hf download"):
        vqa.load("paths", "org/data")
    with pytest.raises(ValueError, match="no split `test`. It has: train_sft, dev, paths"):
        vqa.load("test", "org/data")


ANSWERS = [
    ({"answer": [8, 9]}, ["8", "9"], None),
    ({"answer": [2.0, 0.5]}, ["2", "0.5"], None),
    ({"answer": [["red", "crimson"], ["blue"]]}, ["red", "blue"], [["red", "crimson"], ["blue"]]),
    ({"answers": [["red", "crimson"], ["blue"]]}, ["red", "blue"], [["red", "crimson"], ["blue"]]),
    (
        {"answer": ["red", "blue"], "answers": [["red"], ["blue", "teal"]]},
        ["red", "blue"],
        [["red"], ["blue", "teal"]],
    ),
]


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
@pytest.mark.parametrize("columns, learned, right", ANSWERS, ids=map(str, range(len(ANSWERS))))
def test_answers_may_be_numbers_and_lists(layout, columns, learned, right, tmp_path):
    rows = Dataset.from_dict({"question": ["Why?", "Who?"], **columns})
    rows.to_json(tmp_path / "x.jsonl") if layout == "jsonl" else rows.to_parquet(tmp_path / "x.parquet")
    loaded = read(vqa, tmp_path, columns="image=none")
    assert [vqa.answer(row) for row in loaded] == [f"The answer is {answer}." for answer in learned]
    assert [row["answers"] for row in loaded] == (right or [None, None])


def test_class_labels_are_learned_by_their_names_and_any_answer_of_a_list_is_right(tmp_path):
    write_image(tmp_path / "a.png")
    columns = {"prompt": ["Which?", "Who?"], "label": [1, 0], "opts": [["cat", "dog"]] * 2, "source": [0, -1]}
    rows = Dataset.from_dict({**columns, "image": ["a.png"] * 2})
    for column, names in (("label", ["cat", "dog"]), ("source", ["book"])):
        rows = rows.cast_column(column, ClassLabel(names=names))
    rows.to_parquet(tmp_path / "train.parquet")
    loaded = read(vqa, tmp_path, columns="question=prompt, answer=label,choices=opts")
    assert [[row[name] for name in ("question", "answer", "choices", "image")] for row in loaded] == [
        ["Which?", "dog", ["cat", "dog"], "red"],
        ["Who?", "cat", ["cat", "dog"], "red"],
    ]
    record = {"answer": "red", "answers": ["red", "Crimson"], "prediction": " crimson.", "has_image": True}
    assert vqa.score([record, {**record, "prediction": " pink"}], 2)["image"] == 50


def test_answers_may_be_in_two_columns_and_numbers_are_written_out(tmp_path):
    rows = [
        {"answer": ["red"], "answers": ["crimson", "red"]},
        {"answer": '["red", "crimson"]'},
        {"answer": "[0.5, 1]"},
        {"answer": 0.00001},
        {"answer": 1e20},
    ]
    write_lines(tmp_path / "train.jsonl", [{"question": "?", "answers": None, **row} for row in rows])
    found = [(row["answer"], row["answers"]) for row in read(vqa, tmp_path, columns="image=none")]
    both = ("red", ["red", "crimson"])
    assert found == [both, both, ("[0.5, 1]", None), ("0.00001", None), ("100000000000000000000", None)]


def test_contents_in_json_are_read_as_parts(tmp_path):
    write_image(tmp_path / "a.png")
    parts = json.dumps([{"type": "image"}, {"type": "text", "text": "Who?"}])
    row = {"image": "a.png", "messages": [{"role": "user", "content": parts}, ASSISTANT]}
    write_lines(tmp_path / "train.jsonl", [row])
    (found,) = chat.load("train", str(tmp_path))
    assert found["messages"][0]["content"] == "Who?"


def test_a_linked_folder_is_read_and_packed_or_renamed_files_are_named(tmp_path, capsys):
    data, others = tmp_path / "data", tmp_path / "others"
    data.mkdir(), others.mkdir()
    write_lines(others / "a.jsonl", [{"question": "?", "answer": "x"}])
    (others / "up").symlink_to(tmp_path)  # a circle
    (data / "train").symlink_to(others)
    (data / "train-1.jsonl.gz").touch()
    (data / "train-2.JSONL").touch()
    assert len(read(vqa, data, columns="image=none")) == 1
    check(str(data), columns="image=none")
    printed = capsys.readouterr().out
    for name in ("train-1.jsonl.gz", "train-2.JSONL"):
        assert f"{data / name} is not read, since it is compressed, or its suffix" in printed


def test_a_readme_of_another_encoding_is_no_obstacle(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"question": "?", "answer": "x"}])
    (tmp_path / "README.md").write_bytes("Données".encode("latin-1"))
    assert len(read(vqa, tmp_path, columns="image=none")) == 1


def test_lists_in_a_cell_of_csv_are_json(tmp_path):
    write_csv(tmp_path / "x.csv", [{"question": "Why?", "answer": "[1, 2]", "choices": '["[1, 2]", "[0]"]'}])
    (row,) = read(vqa, tmp_path, columns="image=none")
    assert (row["choices"], row["answer"]) == (["[1, 2]", "[0]"], "[1, 2]")


# --- chat ---


CONVERSATION = [("system", "Be brief."), ("user", "What is it?"), ("assistant", "A hen."), ("user", "And the cup?")]
CONVERSATION += [("assistant", "It is blue.")]
MESSAGES = [{"role": role, "content": text} for role, text in CONVERSATION]


def parts(text, *more):
    return [*more, {"type": "text", "text": text}]


def in_parts(*image):
    """The messages with contents that are lists of parts, and a place for an image in the first question."""
    messages = [{**message, "content": parts(message["content"])} for message in MESSAGES]
    messages[1]["content"] = parts("What is it?", *image)
    return messages


def in_llava(marker="<image>\n"):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[role], "value": text} for role, text in CONVERSATION]
    turns[1]["value"] = marker + turns[1]["value"]
    return turns


CHATS = {
    "messages": {"messages": MESSAGES, "images": ["a.png"]},
    "one image": {"messages": MESSAGES, "image": "a.png"},
    "parts": {"messages": in_parts({"type": "image"}), "images": ["a.png"]},
    "image in a part": {"messages": in_parts({"type": "image", "image": "a.png"})},
    "image of OpenAI": {"messages": in_parts({"type": "image_url", "image_url": {"url": "a.png"}})},
    "LLaVA": {"id": 7, "image": "a.png", "conversations": in_llava()},
    "LLaVA, at the end": {"image": "a.png", "conversations": in_llava("  <image> ")},
    "ShareGPT": {"id": "x", "conversations": in_llava("")},
    "messages without image": {"messages": MESSAGES, "images": []},
}


@pytest.mark.parametrize("layout", ["jsonl", "json", "parquet", "csv"])
def test_every_format_of_chats_gives_the_same_messages(layout, tmp_path, capsys):
    write_image(tmp_path / "a.png")
    expected = ["red"] * 7 + [None] * 2
    match layout:
        case "jsonl":  # formats may be mixed
            write_lines(tmp_path / "x.jsonl", CHATS.values())
        case "json":
            write_list(tmp_path / "x.json", list(CHATS.values()))
        case "parquet":  # a column has one type
            rows = [CHATS[name] for name in ("messages", "messages without image")]
            Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
            expected = ["red", None]
        case "csv":
            cells = [("messages", "images"), ("parts", "images")]
            rows = [{name: json.dumps(CHATS[kind][name]) for name in ("messages", key)} for kind, key in cells]
            weights = {"weight": "1.0", "train": "True", "loss_scale": "[1]", "loss": "", "training": "all"}
            rows = [{"messages": row["messages"], "image": "a.png", **weights} for row in rows]
            write_csv(tmp_path / "x.csv", rows)
            expected = ["red", "red"]
    rows = read(chat, tmp_path)
    assert [row["image"] for row in rows] == expected
    for row in rows:
        assert chat.messages(row) == MESSAGES
        assert (chat.answer(row), chat.context(row), chat.options(row)) == ("It is blue.", "", None)
    assert check(str(tmp_path)) and "read with --task chat" in capsys.readouterr().out


def test_parts_in_parquet_have_all_keys(tmp_path):
    """As Arrow saves them: what another part has is None."""
    write_image(tmp_path / "a.png")
    image = PILImage.open(tmp_path / "a.png")
    messages = [
        {"role": "user", "content": [{"index": 0, "text": None, "type": "image"}, *parts("What is it?")]},
        {"role": "assistant", "content": parts("A hen.")},
    ]
    rows = Dataset.from_list([{"messages": messages, "images": [image]}]).cast_column("images", List(Image()))
    rows.to_parquet(tmp_path / "train.parquet")
    (row,) = read(chat, tmp_path)
    assert (row["image"], [message["content"] for message in row["messages"]]) == ("red", ["What is it?", "A hen."])


USER, ASSISTANT = MESSAGES[1:3]
CHAT_FAULTS = [
    ({"messages": []}, "`messages` is []"),
    ({"messages": "Hello"}, "`messages` is 'Hello'"),
    ({"messages": str([{"role": "user", "content": "a"}])}, "As a text, as in CSV, it must be JSON, with double"),
    ({"messages": [USER]}, "the roles are ['user']. .*the last message must be the assistant's"),
    ({"messages": [USER, USER, ASSISTANT]}, "the roles are ['user', 'user', 'assistant']"),
    ({"messages": [ASSISTANT, USER]}, "the roles are ['assistant', 'user']"),
    ({"messages": [{"role": "tool", "content": "x"}, ASSISTANT]}, "message 1 has the role 'tool'"),
    ({"messages": [{"role": ["user"], "content": "x"}, ASSISTANT]}, "message 1 has the role \"['user']\""),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "text in message 2 (assistant) is ' '"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "there is no text in message 2 (assistant)"),
    ({"messages": [USER, {"role": "assistant", "content": "\ud83d"}]}, "half of a surrogate pair"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "audio"}]}]}, "has the part {'type': 'audio'}"),
    ({"messages": [{"role": "user", "content": parts("")}, ASSISTANT]}, "text in message 1 (user) is ''"),
    ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "message 2 (assistant) has the weight 0"),
    ({"messages": [USER, {**ASSISTANT, "loss": False}]}, "message 2 (assistant) has the loss False"),
    ({"messages": [{**USER, "train": True}, ASSISTANT]}, "message 1 (user) has the train True"),
    *(
        ({"messages": [USER, {**ASSISTANT, key: value}]}, f"message 2 (assistant) has the {key} {value}")
        for key, value in [
            ("loss_weight", 0.0),
            ("loss_mask", 0),
            ("loss_scale", 0),
            ("weights", 0),
            ("trainable", False),
        ]
        + [("training", False), ("mask", True), ("masked", 1)]
    ),
    ({"messages": [USER, {**ASSISTANT, "reasoning_content": "so"}]}, "(assistant) has `reasoning_content`, which"),
    ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"id": 1}]}]}, "(assistant) has `tool_calls`, which"),
    (
        {
            "messages": [{"role": "user", "content": [{"type": "image", "image": "b.png"}]}, ASSISTANT],
            "image": "a.png",
        },
        "there are images in the messages and in a column",
    ),
    ({"conversations": in_llava()}, "have 1 `<image>`"),
    ({"conversations": in_llava("<image><image>"), "image": "a.png"}, "have 2 `<image>`"),
    (
        {"messages": [USER, {"role": "assistant", "content": "<image> x"}], "image": "a.png"},
        "message 2 (assistant) has",
    ),
    ({"conversations": in_llava(), "images": ["a.png"] * 3}, "have 1 `<image>` .*the row has 3 images"),
    ({"messages": MESSAGES, "images": ["lost.png"]}, "lost.png cannot be read"),
    (
        {
            "messages": [{"role": "user", "content": [{"type": "image", "index": n} for n in (1, 0)] + parts("x")}]
            + [ASSISTANT],
            "images": ["a.png", "a.png"],
        },
        "the image parts have the `index` values [1, 0], but images are read in the order",
    ),
    (
        {"messages": [{**USER, "images": ["a.png"]}, ASSISTANT]},
        "message 1 (user) has `images`, which is not read. Give",
    ),
    ({"messages": [{**USER, "attachments": ["a.png"]}, ASSISTANT]}, "message 1 (user) has `attachments`"),
    ({"messages": [USER, {**ASSISTANT, "content": "<bbox>"}]}, "message 2 (assistant) has `<bbox>`, which would"),
    (
        {"messages": [USER, {**ASSISTANT, "value": "x"}]},
        "message 2 (assistant) has `content` and `value`, which differ",
    ),
    ({"messages": [{**USER, "content": "Where is <ref-object>?"}, ASSISTANT]}, "(user) has `<ref-object>`, which"),
    ([MESSAGES], "is not a row"),
]


def test_every_fault_of_a_chat_is_named_with_its_row(tmp_path, capsys):
    write_image(tmp_path / "a.png")
    rows = [fault for fault, _ in CHAT_FAULTS]
    write_list(tmp_path / "x.json", [{"messages": MESSAGES, "image": "a.png"}])
    (tmp_path / "x.json").write_text(json.dumps([{"messages": MESSAGES, "image": "a.png"}, *rows]))
    assert not check(str(tmp_path), task="chat")
    printed = capsys.readouterr().out.splitlines()
    for number, (row, message) in enumerate(CHAT_FAULTS, 1):
        faults = [line for line in printed if line.startswith(f"{tmp_path / 'x.json'}: row {number}: ")]
        text, _, more = message.partition(" .*")
        assert any(text in fault and more in fault for fault in faults), (row, faults)
        if "lost.png" not in message:  # which training skips
            (tmp_path / "x.json").write_text(json.dumps([{"messages": MESSAGES, "image": "a.png"}, row]))
            with pytest.raises(
                ValueError, match="x.json: row 1: .*\n`python -m tasks check .* --task chat` lists all"
            ):
                chat.load("train", str(tmp_path))


@pytest.mark.parametrize("layout", ["jsonl", "parquet", "text"])
def test_keys_of_messages_that_are_not_read_are_noted(layout, tmp_path, capsys):
    user = {**USER, "weight": 0, "mask": None, "name": "", "id": 7}
    messages = [user, {**ASSISTANT, "weight": 1, "mask": False, "name": None, "id": 8}]
    if layout == "jsonl":
        write_lines(tmp_path / "train.jsonl", [{"messages": messages}])
    else:
        rows = [{"messages": messages if layout == "parquet" else json.dumps(messages)}]
        Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    assert check(str(tmp_path), columns="image=none", task="chat")
    notes = [line for line in capsys.readouterr().out.splitlines() if "keys of messages" in line]
    assert notes == ["note: keys of messages that are not read: id, mask"]


def test_the_last_answers_of_chats_are_scored():
    records = [
        {"prediction": " the Hen", "expected": "A hen.", "has_image": True},
        {"prediction": " a cow", "expected": "A hen.", "has_image": False},
    ]
    assert chat.score(records, 2) == {"image": 100, "no image": 0, "average": 50, "count": 2}
    assert chat.CARD["score"] in chat.score(records, 2)


# --- images ---


def test_an_image_may_be_an_object_or_base64(tmp_path, capsys):
    write_image(tmp_path / "a.png")
    encoded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    url = f"data:image/png;base64,{encoded}"
    forms = [{key: "a.png"} for key in ("path", "url", "image_url", "file_name", "image")]
    forms += [{key: encoded} for key in ("bytes", "base64", "data")] + [{"image_url": {"url": url}}, url]
    forms += ["./a.png", {"bytes": None, "path": "a.png"}, ["a.png", None]]
    forms += [encoded + base64.b64encode(bytes(200)).decode()]  # longer than a name may be
    assert len(encoded) < 255, "as short as a file name"
    (tmp_path / "R0lGODlh").write_bytes((tmp_path / "a.png").read_bytes())  # a file name that is also base64
    forms += [encoded, [encoded], "R0lGODlh"]
    for kind in ("bmp", "gif", "tiff", "webp"):
        PILImage.new("RGB", (5, 5), "red").save(
            data := io.BytesIO(), kind, **{"lossless": True} if kind == "webp" else {}
        )
        forms += [base64.b64encode(data.getvalue()).decode()]
    forms += [(tmp_path / "a b.png").as_uri(), {"url": "file://a%20b.png"}]
    write_image(tmp_path / "a b.png")
    forms = [{"image": form} for form in forms] + [{"images": [None], "image": "a.png"}]
    write_lines(tmp_path / "train.jsonl", [{"question": "?", "answer": "x", **form} for form in forms])
    assert [row["image"] for row in read(vqa, tmp_path)] == ["red"] * len(forms)
    assert check(str(tmp_path))
    parts_of = [{"base64": encoded}, {"data": encoded}, {"source": {"type": "base64", "data": encoded}}]
    parts_of += [{"url": "a.png"}, {"type": "input_image", "image_url": url}]
    rows = [{"messages": in_parts({"type": "image", **part})} for part in parts_of]
    write_lines(tmp_path / "train.jsonl", rows)
    assert [row["image"] for row in read(chat, tmp_path)] == ["red"] * len(rows)
    assert [row["image"] for row in read(chat, tmp_path, columns="image=none")] == [None] * len(rows)
    write_lines(tmp_path / "train.jsonl", [{"question": "?", "answer": "x", "image": {"id": 3}}])
    assert not check(str(tmp_path)) and "an image is an object with 'id'. Give one of" in capsys.readouterr().out


def test_images_in_parquet_may_be_paths_nothing_or_in_messages(tmp_path):
    write_image(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    images = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}, None, {"bytes": data, "path": None}]
    features = Features({"question": Value("string"), "answer": Value("string"), "image": Image()})
    rows = [{"question": "?", "answer": "x", "image": image} for image in images]
    pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), tmp_path / "x.parquet")
    assert [row["image"] for row in read(vqa, tmp_path)] == ["red", None, None, "red"]
    (tmp_path / "x.parquet").unlink()

    part = {"type": Value("string"), "text": Value("string"), "image": Image()}
    features = {"messages": List({"role": Value("string"), "content": List(part)}), "image": Image()}
    messages = [{**turn, "content": parts(turn["content"])} for turn in MESSAGES]
    messages[1]["content"] = parts("What is it?", {"type": "image", "image": PILImage.open(tmp_path / "a.png")})
    rows = [{"messages": messages, "image": None}]
    rows += [{"messages": in_parts({"type": "image"}), "image": PILImage.open(tmp_path / "a.png")}]
    rows += [{"messages": in_parts(), "image": None}]
    Dataset.from_list(rows, Features(features)).to_parquet(tmp_path / "x.parquet")
    assert [row["image"] for row in read(chat, tmp_path)] == ["red", "red", None]


@pytest.mark.parametrize(
    "empty, filled, feature",
    [
        ({"images": []}, {"images": ["a.png"]}, None),
        ({"images": [None, None]}, {"images": ["a.png", None]}, None),
        ({"image": {"path": None}}, {"image": {"path": "a.png"}}, None),
        ({"images": "[]"}, {"images": '["a.png"]'}, None),
        ({"images": "[null]"}, {"images": '["a.png"]'}, None),
        ({"images": []}, {"images": ["a.png"]}, Json()),
        ({"image": {"path": None}}, {"image": {"path": "a.png"}}, Json()),
    ],
    ids=["list", "nulls", "object", "text of a list", "text of null", "list in Json", "object in Json"],
)
def test_an_empty_column_of_images_is_none_beside_images_in_messages(empty, filled, feature, tmp_path):
    def make_rows(rows):
        rows = Dataset.from_list(rows)
        return rows if feature is None else rows.cast_column(*empty, feature)

    write_image(tmp_path / "a.png")
    rows = [{"messages": in_parts({"type": "image", "image": "a.png"}), **empty}]
    make_rows(rows).save_to_disk(tmp_path / "one")
    write_image(tmp_path / "one" / "a.png")
    assert [row["image"] for row in read(chat, tmp_path / "one")] == ["red"]
    rows += [{"messages": in_parts({"type": "image", "image": None}), **filled}]
    make_rows(rows).to_parquet(tmp_path / "train.parquet")
    assert [row["image"] for row in read(chat, tmp_path)] == ["red", "red"]


@pytest.mark.parametrize("is_text", [False, True], ids=["parts", "parts as text"])
@pytest.mark.parametrize("colour", ["red", "blue"])
def test_images_in_messages_are_compared_with_the_column_in_whatever_way_rows_are_read(
    colour, is_text, tmp_path, capsys
):
    for name in ("red", "blue"):
        write_image(tmp_path / f"{name}.png", name)
    messages = in_parts({"type": "image", "image": "red.png", "text": None})
    if is_text:
        messages = [{**turn, "content": json.dumps(turn["content"])} for turn in messages]
    Dataset.from_list([{"messages": messages, "image": f"{colour}.png"}]).to_parquet(tmp_path / "train.parquet")
    if colour == "red":
        assert [row["image"] for row in read(chat, tmp_path)] == ["red"] and check(str(tmp_path))
        return
    message = "there are images in the messages and in a column"
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            list(chat.load("train", str(tmp_path), streaming=streaming))
    assert not check(str(tmp_path)) and message in capsys.readouterr().out


def test_images_belong_to_their_own_folder(tmp_path, capsys):
    """A folder's name is no pattern, and a file's name that two folders have is refused."""
    row = {"question": "?", "answer": "x", "file_name": "1.png"}
    for name, colour in (("run1", "blue"), ("run[1]", "red"), ("run*", "red")):
        write_image(tmp_path / name / "1.png", colour)
        Dataset.from_list([row] * (1 if colour == "red" else 2)).to_parquet(tmp_path / name / "train.parquet")
    for name in ("run[1]", "run*"):
        assert [row["image"] for row in read(vqa, tmp_path / name)] == ["red"]
    for name, colour in (("a", "red"), ("b", "blue")):
        write_image(tmp_path / "two" / "train" / name / "1.png", colour)
        Dataset.from_list([row]).to_parquet(tmp_path / "two" / "train" / name / "metadata.parquet")
    with pytest.raises(ValueError, match="'1.png', which may be .*a/1.png or .*b/1.png. Write its path relative"):
        vqa.load("train", str(tmp_path / "two"))
    assert not check(str(tmp_path / "two")) and "which may be" in capsys.readouterr().out
    names = [f"train/{name}/1.png" for name in "ab"]
    Dataset.from_list([{**row, "file_name": name} for name in names]).to_parquet(tmp_path / "two" / "train.parquet")
    assert [row["image"] for row in read(vqa, tmp_path / "two")] == ["red", "blue"]


def test_an_image_that_is_added_later_is_found(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    write_lines(tmp_path / "train.jsonl", [{"question": "?", "answer": "x", "image": "a/1.png"}])
    vqa.load("train", str(tmp_path))
    write_image(tmp_path / "images" / "a" / "1.png")
    assert read(vqa, tmp_path)[0]["image"] == "red"


def test_an_image_that_is_added_to_a_deep_folder_is_found(tmp_path):
    (tmp_path / "images" / "coco" / "train2017").mkdir(parents=True)
    rows = [{"question": "?", "answer": "x", "image": f"coco/train2017/{number}.png"} for number in (1, 2)]
    write_lines(tmp_path / "train.jsonl", rows)
    write_image(tmp_path / "images" / "coco" / "train2017" / "1.png")
    vqa.load("train", str(tmp_path))
    write_image(tmp_path / "images" / "coco" / "train2017" / "2.png")
    assert [row["image"] for row in read(vqa, tmp_path)] == ["red", "red"]


# --- what may be meant and is not read ---


AMBIGUOUS = [
    (vqa, {"choices": ["2", "3", "4"], "answer": 2}, "is the number 2, which may be the option '2' or .* '4'"),
    (vqa, {"answer": "red", "answers": ["blue"]}, r"'red', which is none of `answers`, \['blue'\]"),
    (vqa, {"answer": "x", "image": "a.png", "image_2": "a.png"}, "columns image_2 seem to have further images"),
    (
        chat,
        {"messages": [USER, ASSISTANT], "system_prompt": "x"},
        "no row has a `system`.*`--columns system=system_prompt`",
    ),
    (vqa, {"answer": "x", "video": "a.mp4"}, "it has `video`, which is not read"),
    (vqa, {"answer": "x", "images": ["b.png"]}, "`images` and `image` have different images"),
    *(
        (vqa, {"answer": "x", "image": images}, "there is no image .null. before another one of the row")
        for images in ([None, "a.png"], ["a.png", None, "a.png"], [{"path": None}, "a.png"])
    ),
    (vqa, {"answer": "red", "answers": "blue"}, r"'red', which is none of `answers`, \['blue'\]"),
    (vqa, {"answer": "red", "answers": {"text": ["red"]}}, "`answers` is .* Make it a list of texts"),
    (vqa, {"answer": "['red', 'blue']"}, "`answer` is .*, which is not JSON"),
    (vqa, {"answer": "red", "choices": "['red', 'blue']"}, "`choices` is .* with double quotes in CSV"),
    *(
        (vqa, {"answer": "x", column: value}, f"it has `{column}`, which is not read: give .*`--task chat`")
        for column, value in [("history", [["hi", "ho"]]), ("system", "be"), ("system_prompt", "be")]
    ),
    (vqa, {"answer": "x", "tools": [{"name": "f"}]}, "it has `tools`, which is not read"),
    *(
        (chat, {"messages": [USER, ASSISTANT], column: value}, f"it has the {column} .*Remove the row")
        for column, value in [("weight", 0.0), ("loss_mask", [1, 0]), ("loss_scale", 0), ("train", False)]
        + [("weight", 0.5), ("weights", [2, 1])]
        + [("weight", "0"), ("train", " False"), ("loss_mask", '["0"]'), ("loss_scale", "[True, False]")]  # as in CSV
    ),
    (chat, {"messages": [USER, ASSISTANT], "system": ["Be brief."]}, "`system` is .*Make it a text in quotes"),
    (
        chat,
        {"messages": [{"role": "system", "content": "b"}, USER, ASSISTANT], "system": "a"},
        "`system` and the system message differ",
    ),
    (
        chat,
        {"messages": [USER, ASSISTANT], "conversations": [USER, ASSISTANT]},
        "`messages` and `conversations` both have messages. Give `--columns messages=messages`",
    ),
    (vqa, {"choices": ["a", "b"], "answer": ["a", "c"]}, "`answer` is 'c', which is none of"),
    (
        vqa,
        {"choices": ["a", "b"], "answer": "a", "answers": [{"text": "a"}]},
        "`answers` is .* Make it a list of texts",
    ),
    (vqa, {"answer": "x", "images": ["a.png"], "image": ["a.png", "b.png"]}, "`images` and `image` have different"),
    (vqa, {"answer": "x", "image1": "a.png", "image2": "a.png"}, "columns image1, image2 seem to have further"),
    (vqa, {"answer": "B", "A": "cat", "B": "dog"}, "columns A, B seem to have the options.*one column `choices`"),
    (vqa, {"answer": "x", "choice_a": "x", "choice_b": "y"}, "columns choice_a, choice_b seem to have the options"),
    (vqa, {"answer": "x", "Option 1": "x", "Option 2": "y"}, "columns Option 1, Option 2 seem to have the options"),
]


def test_a_file_name_beside_an_image_is_not_read(tmp_path, capsys):
    write_image(tmp_path / "a.png")
    write_lines(tmp_path / "train.jsonl", [{"question": "?", "answer": "x", "image": "a.png", "file_name": "1.png"}])
    assert [row["image"] for row in read(vqa, tmp_path)] == ["red"]
    assert check(str(tmp_path)), capsys.readouterr().out


def test_a_system_message_under_another_name_is_a_fault(tmp_path, capsys):
    rows = [{"messages": MESSAGES, "images": ["a.png"], name: "Be brief."} for name in ("system", "system_prompt")]
    write_image(tmp_path / "a.png")
    message = "there is no `system`, but `system_prompt` has a value and is not read"
    for last in ({}, {"system": None}):
        write_lines(tmp_path / "train.jsonl", [rows[0], {**rows[1], **last}])
        with pytest.raises(ValueError, match=message):
            chat.load("train", str(tmp_path))
        assert not check(str(tmp_path)) and message in capsys.readouterr().out
    write_lines(tmp_path / "train.jsonl", [rows[0], {**rows[0], "system_prompt": None}])
    assert len(read(chat, tmp_path)) == 2


@pytest.mark.parametrize("layout", ["jsonl", "parquet", "save_to_disk"])
@pytest.mark.parametrize("column", ["video", "videos", "audio", "audios", "tools"])
def test_a_row_about_a_video_or_a_sound_is_refused(column, layout, tmp_path, capsys):
    write_image(tmp_path / "a.png")
    (tmp_path / "a.mp4").touch()
    file = str(tmp_path / "a.mp4")
    value = [{"name": "f"}] if column == "tools" else [file] if column.endswith("s") else file
    rows = [{"messages": MESSAGES, "images": ["a.png"], column: None}]
    rows += [{"messages": MESSAGES, "images": None, column: value}]
    if layout == "jsonl":
        write_lines(tmp_path / "train.jsonl", rows)
    elif layout == "parquet":
        Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    else:
        features = Features({column: Video()}) if column == "video" else {}
        rows = Dataset.from_list(rows)
        rows.cast(Features({**rows.features, **features})).save_to_disk(tmp_path / "train")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=rf"(:2|row 1): it has `{column}`, which is not read.*Remove the row"):
            list(chat.load("train", str(tmp_path), streaming=streaming))
    assert not check(str(tmp_path)) and f"it has `{column}`" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`tools`") if column == "tools" else nullcontext():
        assert len(chat.load("train", str(tmp_path), columns="image=images")) == 2


@pytest.mark.parametrize("task, values, message", AMBIGUOUS)
def test_what_may_be_meant_in_two_ways_is_refused(task, values, message, tmp_path, capsys):
    write_image(tmp_path / "a.png")
    write_lines(tmp_path / "train.jsonl", [{"question": "?", "image": "a.png", **values}])
    with pytest.raises(ValueError, match=message):
        task.load("train", str(tmp_path))
    name = task.__name__.rpartition(".")[2]
    assert not check(str(tmp_path), task=name) and re.search(message, capsys.readouterr().out)


def test_files_of_another_format_do_not_replace_the_train_file(tmp_path, capsys):
    row = {"question": "?", "answer": "x"}
    write_list(tmp_path / "train.json", [row])
    write_lines(tmp_path / "predictions.jsonl", [{**row, "answer": "y"}])
    assert [row["answer"] for row in read(vqa, tmp_path, columns="image=none")] == ["x"]
    write_csv(tmp_path / "train.csv", [row])
    with pytest.raises(ValueError, match=r"train.csv and .*train.json may both be the train split. Keep one"):
        vqa.load("train", str(tmp_path))
    assert read(vqa, tmp_path / "train.csv", columns="image=none")


@pytest.mark.parametrize("write, suffix", [(write_lines, "jsonl"), (write_csv, "csv")])
def test_the_files_that_a_readme_declares_are_read(write, suffix, tmp_path, capsys):
    """As in a clone of the Hub's repository."""

    def declare(**configs):
        configs = [{"config_name": name, "data_files": files} for name, files in configs.items()]
        (tmp_path / "README.md").write_text(f"---\nlicense: mit\nconfigs: {json.dumps(configs)}\n---\n# Data\n")

    for name in ("a", "b", "train", "easy/train"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.{suffix}", [{"question": name, "answer": "x"}])
    declare(default=[{"split": "train", "path": f"a.{suffix}"}, {"split": "test", "path": ["b.*"]}])
    for split, name in (("train", "a"), ("test", "b")):
        assert [row["question"] for row in read(vqa, tmp_path, split, columns="image=none")] == [name]
    assert check(str(tmp_path), columns="image=none")
    assert f"train.{suffix} is not read, since README.md declares other files" in capsys.readouterr().out
    declare(default=f"*/*.{suffix}", other="a.*")
    assert [row["question"] for row in read(vqa, tmp_path, columns="image=none")] == ["easy/train"]
    declare(easy="easy/*", hard="a.*")
    with pytest.raises(ValueError, match="README.md declares several configurations: easy, hard. Give the folder or"):
        vqa.load("train", str(tmp_path))
    assert len(read(vqa, tmp_path / "easy", columns="image=none")) == 1
    write_image(tmp_path / "a.png")
    for path in ("elsewhere/*", "*.png"):
        declare(default=path)
        assert [row["question"] for row in read(vqa, tmp_path, columns="image=none")] == ["train"]


def test_data_files_that_are_not_read_are_named(tmp_path, capsys, caplog):
    row = {"question": "?", "answer": "x"}
    for name in ("train.jsonl", "more.jsonl", "sub/train.jsonl", "test/test.jsonl", ".old/train.jsonl"):
        write_lines(tmp_path / name, [row])
    write_csv(tmp_path / "scores.csv", [row])
    for name in _formats.DESCRIPTIONS[1:3]:
        write_list(tmp_path / name, [row])
    for number in range(4):
        write_lines(tmp_path / "z" / f"{number}.json", [row])
    assert check(str(tmp_path), columns="image=none")
    assert len(vqa.load("train", str(tmp_path), columns="image=none")) == 1
    assert len(vqa.load("train", str(tmp_path), columns="image=none")) == 1 == caplog.text.count("more.jsonl")
    printed = capsys.readouterr().out
    for name, reason in (
        ("more.jsonl", "its name has no split, unlike those of others"),
        ("scores.csv", "other files are JSON Lines"),
        ("sub/train.jsonl", f"{tmp_path} itself contains data"),
        ("test/test.jsonl", f"{tmp_path} itself contains data"),
        ("", "3 more files are not read."),
    ):
        note = f"{tmp_path / name} is not read, since {reason}" if name else reason
        assert note in printed and note in caplog.text
    assert ".old" not in printed and "holdout" not in printed
    with pytest.raises(ValueError, match="no split `test`. It has: train. .*test/test.jsonl is not read") as error:
        vqa.load("test", str(tmp_path))
    assert "holdout" not in str(error.value)


def write_run(folder):
    """Files like those that `train.py` writes."""
    write_lines(folder / "predictions.jsonl", [{"question": "of a run", "answer": "y", "prediction": "y"}])
    for name in ("run", "results", "config", "tokenizer", "tokenizer_config", "checkpoint-2/trainer_state"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text('{"run": "1a2b",\n "scores": {}}')


def write_declared(file, rows):
    write_lines(file, rows)
    (file.parent / "README.md").write_text("---\nconfigs:\n- data_files: '**/*.jsonl'\n---\n")


def save_split(file, rows):
    Dataset.from_list(rows).save_to_disk(file)


INSIDE = "{} is not read, since a run of train.py wrote it. Move data of your own out of it."
BESIDE = "What a run of train.py wrote into {}, such as predictions.jsonl, is not read."


@pytest.mark.parametrize(
    "write, name, run, note",
    [
        (write_lines, "data/train.jsonl", "train-run", INSIDE),
        (write_lines, "data/train.jsonl", "outputs/digits", INSIDE),
        (write_list, "annotations/train.json", "run", INSIDE),
        (write_list, "annotations/train.json", ".", BESIDE),
        (write_list, "data.json", ".", BESIDE),
        (write_lines, "data.jsonl", ".", BESIDE),
        (write_declared, "data.jsonl", "run", INSIDE),
        (save_split, "train", ".", None),
    ],
    ids=["train-run", "deeper", "another format", "around it", "around one", "same folder", "declared", "saved"],
)
def test_what_a_run_wrote_among_the_data_is_not_read(write, name, run, note, tmp_path, capsys, caplog):
    """The predictions of a run would be trained on, which are the rows of its test split."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name, [{"question": "?", "answer": "x"}])
    write_run(tmp_path / run)
    assert [row["question"] for row in read(vqa, tmp_path, columns="image=none")] == ["?"]
    assert check(str(tmp_path), columns="image=none")
    printed, note = capsys.readouterr().out, note and note.format(tmp_path / run)
    assert not note or f"note: {note}" in printed and note in caplog.text
    assert "note: there is no test split" in printed
    assert printed.count("is not read") == bool(note), "one note for all files of a run"


def test_a_folder_with_nothing_but_a_run_has_no_data(tmp_path):
    write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="has no data that this task reads.*run is not read, since a run of train.py"):
        vqa.load("train", str(tmp_path))
    with pytest.raises(ValueError, match=r"has no data that this task reads.*Found: \['a.txt'\].$"):
        (tmp_path / "a.txt").touch()
        vqa.load("train", str(tmp_path / "a.txt"))
    (tmp_path / "run" / "run.json").unlink()
    assert [row["question"] for row in read(vqa, tmp_path, columns="image=none")] == ["of a run"], "a file as others"


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch, capsys, caplog):
    scandir, closed = os.scandir, tmp_path / "part2"
    for name in ("part1", "part2"):
        write_lines(tmp_path / name / "train.jsonl", [{"question": name, "answer": "x"}])

    def refuse(place="."):  # also for root, who may open every folder
        if str(place) == str(closed):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [row["question"] for row in read(vqa, tmp_path, columns="image=none")] == ["part1"]
    assert check(str(tmp_path), columns="image=none")
    note = f"{closed} is not read, since it cannot be opened: Permission denied."
    assert f"note: {note}" in capsys.readouterr().out and note in caplog.text


def test_only_the_main_process_warns(tmp_path, caplog):
    for name in ("train", "test", "more"):
        write_lines(tmp_path / f"{name}.jsonl", [{"question": "a" * 99, "answer": "x", "context": "b" * 99}])
    values = {"task": "vqa", "data_path": str(tmp_path), "columns": "image=none", "max_prompt_length": 150}
    for process in (0, 1):
        caplog.clear()
        training = DehvfTrainingArguments(str(tmp_path), use_cpu=True)
        own = types.SimpleNamespace(
            **{**vars(training), "process_index": process, "main_process_first": lambda desc: nullcontext()}
        )
        load_splits(vqa, tiny_processor(), DataArguments(**values), own)
        warned = [text in caplog.text for text in ("more.jsonl is not read", "1 of 1 prompts of the test split were")]
        assert warned == [process == 0] * 2


def test_a_stream_without_a_column_of_images_must_be_meant(tmp_path):
    write_image(tmp_path / "train" / "a.png")
    write_lines(tmp_path / "train" / "metadata.jsonl", [{"image_file_name": "a.png", "question": "?", "answer": "x"}])
    for streaming in (False, True):
        with pytest.raises(ValueError, match="no row has an `image`.*`--columns image=image_file_name`"):
            vqa.load("train", str(tmp_path), streaming=streaming)


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"all": ["?"]}, "has no split `train`. It has: all"),
        ({"test": []}, "has a split without rows"),
    ],
)
def test_a_data_set_without_rows_to_train_on_is_a_fault(splits, message, tmp_path):
    rows = {name: Dataset.from_dict({"question": texts, "answer": texts}) for name, texts in splits.items()}
    DatasetDict(rows).save_to_disk(tmp_path)
    for read_it in (check, lambda path, **values: vqa.load("train", path, **values)):
        with pytest.raises(ValueError, match=message):
            read_it(str(tmp_path), columns="image=none")
    if "all" in splits:
        with pytest.raises(ValueError, match="the folder of one split, is read as the train split: give its path"):
            vqa.load("train", str(tmp_path), columns="image=none")
        assert len(read(vqa, tmp_path / "all", columns="image=none")) == 1


def test_two_splits_that_may_be_the_test_split_are_named(tmp_path):
    rows = Dataset.from_list([{"question": "?", "answer": "x"}])
    DatasetDict(dict.fromkeys(("train", "test_a", "test_b"), rows)).save_to_disk(tmp_path)
    for arguments in ({}, {"holdout": 0.1}):
        with pytest.raises(ValueError, match="several that may be it: test_a, test_b. Choose one"):
            vqa.load("test", str(tmp_path), columns="image=none", **arguments)
    with pytest.raises(ValueError, match="several that may be it"):
        check(str(tmp_path), columns="image=none")


SEVERAL = "several that may be it: {}. Choose one: name it"
ANY_SPLIT = ("train", "test", "validation")
NAMED = [
    ("trainset testset devset", {"train": "trainset", "test": "testset", "validation": "devset"}),
    ("trainData testData", {"train": "trainData", "test": "testData"}),
    ("train eval test", {"train": "train", "test": "test"}),
    (
        "train_cats train_dogs val_seen val_unseen",
        {"train": "train_cats train_dogs", "validation": "val_seen val_unseen"},
    ),
    ("train train_old TRAIN-part2 train_3", {"train": "TRAIN-part2 train train_3 train_old"}),
    ("train val dev", {"train": "train", "validation": SEVERAL.format("dev.{0}, val.{0}")}),
    ("train-0 test_a-1 test_b", {"train": "train-0", "test": "test_a-1 test_b"}),
    ("train eval-1 eval-2 testing", {"train": "train", "test": SEVERAL.format("eval-1.{0}, eval-2.{0}, testing.{0}")}),
    ("vqatrain vqatest", dict.fromkeys(ANY_SPLIT, "vqatrain.{0} seems to be .*vqatest.{0} an")),
    ("cats dogs latest test", {"train": "cats dogs latest", "test": "test"}),
    ("train/cats_train train/dogs val/val_a val/val_b", {"train": "cats_train dogs", "validation": "val_a val_b"}),
    ("a/train b/train old_train/x", {"train": "train train x"}),
    (
        "train val_from_train test",
        dict.fromkeys(ANY_SPLIT, "val_from_train.{0} may be of .*'val', 'train'.*after one split"),
    ),
    ("train/a val/from_train", dict.fromkeys(ANY_SPLIT, "from_train.{0} may be of several splits")),
    ("test_dev test_std", dict.fromkeys(ANY_SPLIT, "test_dev.{0} may be of")),
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("names, splits", NAMED, ids=[names for names, _ in NAMED])
def test_files_with_the_same_word_for_their_split_are_read_together(names, splits, suffix, tmp_path):
    """A split is chosen from several names as in a data set of `save_to_disk`."""
    for name in names.split():
        rows, file = [{"question": name.rpartition("/")[2], "answer": "x"}], tmp_path / f"{name}.{suffix}"
        file.parent.mkdir(exist_ok=True)
        write_lines(file, rows) if suffix == "jsonl" else Dataset.from_list(rows).to_parquet(file)
    for split in ANY_SPLIT:
        expected = splits.get(split, f"has no split `{split}`")
        if " be " in expected or expected.startswith("has no"):
            with pytest.raises(ValueError, match=expected.format(suffix)):
                vqa.load(split, str(tmp_path), columns="image=none")
        else:
            rows = vqa.load(split, str(tmp_path), columns="image=none")
            assert " ".join(rows["question"]) == expected
    if any(" be " in expected for expected in splits.values()):
        with pytest.raises(ValueError, match=" be "):
            check(str(tmp_path), columns="image=none")


@pytest.mark.parametrize("layout", ["jsonl", "csv", "parquet", "labels"])
def test_a_column_that_names_several_splits_is_a_fault(layout, tmp_path, capsys):
    rows = [{"question": "?", "answer": "x", "split": name} for name in ("train", "restval", "test")]
    if layout in ("jsonl", "csv"):
        (write_lines if layout == "jsonl" else write_csv)(tmp_path / f"x.{layout}", rows)
    else:
        saved, labels = Dataset.from_list(rows), ClassLabel(names=["train", "restval", "test"])
        saved = saved if layout == "parquet" else saved.cast_column("split", labels)
        saved.to_parquet(tmp_path / "x.parquet")
    message = "the column `split` has the values test, train, but is not read.*Write a file for each split"
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            vqa.load("train", str(tmp_path), streaming=streaming, columns="image=none")
    assert not check(str(tmp_path), columns="image=none") and re.search(message, capsys.readouterr().out)
    assert len(read(vqa, tmp_path, columns="image=none,context=split")) == 3
    for file in tmp_path.iterdir():
        file.unlink()
    write_lines(tmp_path / "test.jsonl", [{**rows[0], "split": "val"}, rows[1]])
    assert len(read(vqa, tmp_path, "test", columns="image=none")) == 2, "the test split may be the validation split"


def test_a_system_message_may_be_in_a_column(tmp_path):
    rows = [{"system": "Be brief.", "conversations": in_llava("")[1:]}, {"system": "Be brief.", "messages": MESSAGES}]
    rows.append(
        {"system": "Be brief.", "messages": [{"role": "system", "content": parts("Be brief.")}, *MESSAGES[1:]]}
    )
    write_lines(tmp_path / "train.jsonl", rows)
    assert [chat.messages(row) for row in read(chat, tmp_path, columns="image=none")] == [MESSAGES] * 3


def test_numbers_and_class_labels_of_arrow_are_learned_as_written(tmp_path):
    labels = ClassLabel(names=["cat", "dog"])
    features = {"question": Value("string"), "answer": List(labels), "context": Value("string")}
    rows = {"question": ["?"], "answer": [[1, 0]], "context": ["c"]}
    Dataset.from_dict(rows, Features(features)).save_to_disk(tmp_path / "labels")
    (row,) = read(vqa, tmp_path / "labels", columns="image=none")
    assert (row["answer"], row["answers"]) == ("dog", ["dog", "cat"])
    rows, features = {"question": ["?"] * 3, "answer": [0.1, 3.7, 2]}, {**features, "answer": Value("float32")}
    features.pop("context")
    Dataset.from_dict(rows, Features(features)).to_parquet(tmp_path / "x.parquet")
    assert [row["answer"] for row in read(vqa, tmp_path / "x.parquet", columns="image=none")] == ["0.1", "3.7", "2"]


UNREAD = [
    (vqa, {"question": "?", "answer": "x", "img": "a.png"}, "image=img"),
    (vqa, {"question": "?", "answer": "x", "Picture": "a.png"}, "image=Picture"),
    (vqa, {"question": "?", "answer": "x", "imgae": "a.png"}, "image=imgae"),
    (vqa, {"question": "?", "answer": "x", "image": "a.png", "options": ["x", "y"]}, "choices=options"),
    (vqa, {"question": "?", "answer": "x", "image": "a.png", "CHOICES": ["x", "y"]}, "choices=CHOICES"),
    (vqa, {"question": "?", "answer": "x", "image": "a.png", "answer_choices": ["x", "y"]}, "choices=answer_choices"),
    (
        vqa,
        {"question": "?", "answer": "x", "image": "a.png", "multiple_choices": ["x", "y"]},
        "choices=multiple_choices",
    ),
    (vqa, {"question": "?", "answer": "x", "image": "a.png", "Context": "c"}, "context=Context"),
    (vqa, {"question": "?", "label": "x", "image": "a.png"}, "answer=label"),
    (vqa, {"question": "?", "caption": "x", "image": "a.png"}, "answer=caption"),
    (vqa, {"prompt": "?", "answer": "x", "image": "a.png"}, "question=prompt"),
    (vqa, {"question": "?", "answer": "x", "image": "a.png", "hint": "h"}, "context=hint"),
    (chat, {"messages": MESSAGES[1:3], "picture": "a.png"}, "image=picture"),
    (chat, {"dialog": MESSAGES[1:3], "image": "a.png"}, "messages=dialog"),
]


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
@pytest.mark.parametrize("task, row, columns", UNREAD, ids=[columns for *_, columns in UNREAD])
def test_a_column_that_is_probably_meant_is_named(task, row, columns, layout, tmp_path, capsys):
    write_image(tmp_path / "a.png")
    if layout == "jsonl":
        write_lines(tmp_path / "train.jsonl", [row])
    else:
        Dataset.from_list([row]).to_parquet(tmp_path / "train.parquet")
    name = task.__name__.partition(".")[2]
    for streaming in (False, True):
        with pytest.raises(ValueError, match=f"no row has an? `{columns.partition('=')[0]}`.*`--columns {columns}`"):
            task.load("train", str(tmp_path), streaming=streaming)
    assert not check(str(tmp_path), task=name)
    assert f"`--columns {columns}`" in capsys.readouterr().out
    assert read(task, tmp_path, columns=columns)[0]["image"] == "red" or "image" not in columns
    assert check(str(tmp_path), task=name, columns=columns)


MIXED = [
    ({"image": "a.png"}, {"img": "a.png"}, "image=image"),
    ({"images": ["a.png"]}, {"Picture": "a.png"}, "image=images"),
    ({"image": "a.png", "choices": ["x", "y"]}, {"image": "a.png", "options": ["x", "y"]}, "choices=choices"),
    ({"image": "a.png", "context": "c"}, {"image": "a.png", "hint": "h"}, "context=context"),
    ({"image": "a.png", "context": "c"}, {"image": "a.png", "CONTEXT": "h"}, "context=context"),
]


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
@pytest.mark.parametrize("row, other, columns", MIXED, ids=[columns for *_, columns in MIXED])
def test_a_column_of_some_rows_that_is_probably_meant_is_named(row, other, columns, layout, tmp_path, capsys):
    write_image(tmp_path / "a.png")
    rows = [{"question": "?", "answer": "x", **values} for values in (row, other)]
    if layout == "jsonl":
        write_lines(tmp_path / "train.jsonl", rows)
    else:
        Dataset.from_list([dict.fromkeys({**row, **other}) | values for values in rows]).to_parquet(
            tmp_path / "train.parquet"
        )
    name, message = columns.partition("=")[0], f"there is no `{columns.partition('=')[0]}`.*`--columns {columns}`"
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            list(vqa.load("train", str(tmp_path), streaming=streaming))
    assert not check(str(tmp_path)) and f"`--columns {columns}`" in capsys.readouterr().out
    assert [row[name] is None for row in read(vqa, tmp_path, columns=columns)] == [False, True]


def test_columns_may_first_appear_late_in_a_file(tmp_path):
    write_image(tmp_path / "a.png")
    text = {"question": "?", "answer": "x"}
    write_lines(tmp_path / "train.jsonl", [{**text, "image": "a.png"}] + [text] * 1000 + [{**text, "Photo": "a.png"}])
    for streaming in (False, True):
        with pytest.raises(ValueError, match="jsonl:1002: there is no `image`, but `Photo` has a value"):
            list(vqa.load("train", str(tmp_path), streaming=streaming))
    write_lines(tmp_path / "train.jsonl", [{**text, "image": "a.png"}] * 1001 + [{**text, "options": ["x", "y"]}])
    with pytest.raises(ValueError, match="no row has a `choices`.*`--columns choices=options`"):
        vqa.load("train", str(tmp_path))
    write_lines(tmp_path / "train.jsonl", [text] * 1001 + [{**text, "photo": "a.png"}])
    assert [row["image"] for row in read(vqa, tmp_path, columns="image=photo")] == [None] * 1001 + ["red"]
    with pytest.raises(ValueError, match="no row has an `image`.*`--columns image=photo`"):
        vqa.load("train", str(tmp_path))


def test_a_split_without_any_image_must_be_meant(tmp_path):
    text = {"question": "Why?", "answer": "so", "image": None}
    write_lines(tmp_path / "train.jsonl", [text])
    write_lines(tmp_path / "test.jsonl", [text])
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=rf"{split}.jsonl: no row has an `image`.*`--columns image=none`"):
            vqa.load(split, str(tmp_path))
        assert read(vqa, tmp_path, split, columns="image=none")[0]["image"] is None
    write_image(tmp_path / "a.png")
    write_lines(tmp_path / "train.jsonl", [text, {**text, "image": "a.png"}])
    assert len(vqa.load("test", str(tmp_path))) == 1, "the data set has images"
    write_lines(tmp_path / "test.jsonl", [{"question": "Why?", "answer": "so", "pic": "a.png"}])
    for streaming in (False, True):
        with pytest.raises(ValueError, match="test.jsonl: no row has an `image`.*Other splits have `image`. Rename"):
            vqa.load("test", str(tmp_path), streaming=streaming)
    assert read(vqa, tmp_path, "test", columns="image=none")[0]["image"] is None


@pytest.mark.parametrize(
    "columns, message",
    [
        ("answer=answer,answer=label", "gives `answer` twice"),
        ("question", "'question' is not of the form FIELD=COLUMN.*image, question"),
        ("qestion=prompt", "'qestion=prompt' is not of the form"),
        ("question=prompts", r"no row has a `question` \(`prompts`\). The columns are question, answer, image\."),
        ("choices=opts", r"no row has a `choices` \(`opts`\).*choices=none"),
    ],
)
def test_columns_that_are_not_there_are_named(columns, message, tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"question": "Why?", "answer": "so", "image": "a.png"}])
    with pytest.raises(ValueError, match=message):
        vqa.load("train", str(tmp_path), columns=columns)


# --- a test split from the train split ---


def test_a_split_that_is_missing_is_taken_from_the_train_split(tmp_path, caplog):
    write_lines(tmp_path / "x.jsonl", [{"question": str(n), "answer": "so", "image": f"{n}.png"} for n in range(40)])

    def load(split, **values):
        return load_rows(vqa, split, DataArguments(task="vqa", data_path=str(tmp_path), **values))

    splits = {split: load(split, holdout=0.1)["question"] for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 32, "validation": 4, "test": 4}
    assert caplog.text.count("of 40 train rows, 4 are the test split and 4 are the validation split") == 1
    assert sorted(sum(map(list, splits.values()), []), key=int) == [str(n) for n in range(40)]
    assert list(load("test", holdout=0.1)["question"]) == list(splits["test"]), "the same rows in every run"
    faults = [({}, "no split `test`.*--holdout")]
    faults += [({"holdout": 0.0}, "is not between"), ({"holdout": 5.0}, "is not between")]
    faults += [({"holdout": 0.1, "streaming": True}, "a stream does not have")]
    for values, message in faults:
        with pytest.raises(ValueError, match=message):
            load("test", **values)
    write_lines(tmp_path / "test.jsonl", [{"question": "?", "answer": "so", "image": "a.png"}])
    assert (len(load("train", holdout=0.1)), len(load("test", holdout=0.1))) == (36, 1)
    write_lines(tmp_path / "validation.jsonl", [{"question": "?", "answer": "so", "image": "a.png"}])
    with pytest.raises(ValueError, match="has a test and a validation split"):
        load("test", holdout=0.1)
    write_lines(tmp_path / "few" / "x.jsonl", [{"question": "?", "answer": "so", "image": "a.png"}] * 2)
    with pytest.raises(ValueError, match="has 2 rows, 1 of them different. .* takes 1 for test and validation each"):
        vqa.load("train", str(tmp_path / "few"), holdout=0.1)
    with pytest.raises(ValueError, match="`--task digits` does not read `--holdout`. Remove it, or use chat or"):
        load_rows(digits, "train", DataArguments(task="digits", holdout=0.1))


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_questions_about_the_same_image_and_equal_rows_stay_together(layout, tmp_path):
    rows = [{"question": str(n), "answer": "so", "image": f"{n // 4}.png"} for n in range(80)]
    rows += [{"question": str(n // 4), "answer": "so", "image": None} for n in range(80)]
    if layout == "jsonl":
        write_lines(tmp_path / "x.jsonl", rows)
    else:  # the path does not name the image
        for row in rows:
            PILImage.new("L", (4, 4), int(row["image"][:-4])).save(data := io.BytesIO(), "png") if row[
                "image"
            ] else None
            row["image"] = row["image"] and {"bytes": data.getvalue(), "path": "it.png"}
        features = Features({"question": Value("string"), "answer": Value("string"), "image": Image()})
        pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), tmp_path / "x.parquet")
    parts = [vqa.load(split, str(tmp_path), holdout=0.1) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [128, 16, 16]
    for is_image in (True, False):
        groups = [
            {
                int(row["question"]) // (4 if is_image else 1)
                for row in part.cast_column("image", Image(decode=False))
                if bool(row["image"]) == is_image
            }
            for part in parts
        ]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 20, "no group is in two splits"
    write_lines(tmp_path / "large.jsonl", [{**rows[0], "image": f"{n}.png"} for n in range(3) for _ in range(9)])
    sizes = [len(vqa.load(split, str(tmp_path / "large.jsonl"), holdout=0.1)) for split in ("train", "test")]
    assert sizes == [9, 9], "an image with more questions than the split should have"
    write_lines(
        tmp_path / "one.jsonl", [{"question": str(n % 5), "answer": "so", "image": "0.png"} for n in range(20)]
    )
    parts = [vqa.load(split, str(tmp_path / "one.jsonl"), holdout=0.2) for split in ("train", "validation", "test")]
    assert [len(set(part["question"])) for part in parts] == [3, 1, 1], "all rows are about one image"


def test_rows_that_share_an_image_through_other_rows_stay_together(tmp_path):
    pairs = [
        (4 * group + first, 4 * group + second) for group in range(10) for first, second in ((1, 2), (0, 1), (3, 2))
    ]
    rows = [{"question": str(n), "answer": "so", "images": [f"{i}.png" for i in pair]} for n, pair in enumerate(pairs)]
    write_lines(tmp_path / "x.jsonl", rows)
    parts = [vqa.load(split, str(tmp_path), holdout=0.1) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [24, 3, 3]
    groups = [{int(question) // 3 for question in part["question"]} for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 10
    ring = [{**row, "images": [f"{n}.png", f"{(n + 1) % 30}.png"]} for n, row in enumerate(rows)]
    write_lines(tmp_path / "ring.jsonl", ring)
    parts = [vqa.load(split, str(tmp_path / "ring.jsonl"), holdout=0.1) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [24, 3, 3], "all rows are connected, so only equal rows stay together"


def test_rows_that_name_an_image_differently_stay_together(tmp_path, monkeypatch):
    for number in range(4):
        write_image(tmp_path / "a" / f"{number}.png")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    folders = ("a", "./a", "b", tmp_path / "a")
    rows = [{"question": str(n), "answer": "so", "image": f"{folders[n // 4]}/{n % 4}.png"} for n in range(16)]
    write_lines(tmp_path / "x.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    for place in (".", str(tmp_path)):
        parts = [vqa.load(split, place, holdout=0.25)["question"] for split in ("train", "validation", "test")]
        assert [len(part) for part in parts] == [8, 4, 4]
        assert [len({int(question) % 4 for question in part}) for part in parts] == [2, 1, 1]


def test_a_run_records_what_it_took_from_the_train_split(tmp_path):
    turns = [{"from": "human", "value": "<image>ab?"}, {"from": "gpt", "value": "cd"}]
    for number in range(6):
        write_image(tmp_path / f"{number}.png")
    write_list(tmp_path / "x.json", [{"turns": turns, "image": f"{number}.png"} for number in range(6)])
    values = {"task": "chat", "columns": "messages=turns", "holdout": 0.3, "max_steps": 1}
    train.main(tiny_flags(tmp_path, tmp_path / "x.json", tmp_path / "output", **values))
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert (results["columns"], results["holdout"], results["size"]) == ("messages=turns", 0.3, 2)
    assert results["holdout_groups"].startswith("Rows that share an image")
    assert results["scores"].keys() == {"image", "no image", "average", "count"}


# --- the page and files ---


@pytest.mark.parametrize("name, number", [("vqa", 2), ("chat", 2)])
def test_the_rows_in_the_documentation_are_read(name, number, tmp_path):
    page = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8").partition(f"`--task {name}`\n")[2]
    (tmp_path / "x.jsonl").write_text(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    assert len(get_task(name).load("train", str(tmp_path))) == number


FILES = [
    ("train.jsonl", b'{"question": "?"', "train.jsonl:1: not JSON.*Write one whole object on each line"),
    ("train.json", b'{\n "rest": [\n 1\n]}', "train.json:1: not JSON.*Write one list of objects"),
    ("train.json", b'{\n "data": [\n 1\n]}', "train.json: row 0 of `data`: 1 is not a row"),
    ("train.json", b'[{"question": }]', "train.json: row 0: not JSON: Expecting value at line 1, column 15"),
    ("train.json", b'[{"question": "?", "answer": "x"}', "train.json: row 1: the list is not closed"),
    ("train.json", b'[{"question": "?", "answer": "x"}]\n[]', "train.json: row 1: something follows the end"),
    ("train.json", b'[{"question": "\xe4"}]', "train.json: not UTF-8 text"),
    ("train.json", b"[]", "train.json: no rows"),
    ("train.json", b'{"version": 1,\n "data": [{"question": "?", "answer": "x"}]}', None),
    ("train.json", b'{"question": "?", "answer": "x"}\n', None),
    ("train.jsonl", b'{"question": "?", "answer": "x", "answer": "y"}\n', "train.jsonl:1: `answer` is given twice"),
    ("train.json", b'[{"question": "?", "answer": "x", "answer": "y"}]', "train.json: row 0: `answer` is given twice"),
    ("train.jsonl", '{"question": "?", "answer": "x"}'.encode("utf-16"), "train.jsonl:1: not UTF-8 text"),
    ("train.jsonl", b'{"question": "?", "answer": Infinity}', "`answer` is inf. Give a finite number"),
    ("train.csv", b"question,answer\n?,x\n", None),
    ("train.csv", b"question , answer \n?,x\n", None),
    ("train.csv", b'question,answer\n"a\nb",x\n?,x,y\n', "train.csv:4: it does not have 2 cells"),
    ("train.csv", b"question,answer\n?\n", "train.csv:2: it does not have 2 cells"),
    ("train.csv", b"question,answer\n?,\n", "train.csv:2: there is no `answer`"),
    ("train.csv", b'question,answer\n?,x\n"?,x\n?,x\n', "train.csv:3: not CSV: .* Later rows were not read"),
    ("train.csv", b'question,answer\n?,x\n"an "x"?",y\n', 'train.csv:3: not CSV: .* Write "" for a quote'),
    ("train.csv", b'question,"answer\n?,x\n', "train.csv:1: not CSV"),
    ("train.json", b'{"0": {"question": "?", "answer": "x"}}', "train.json: it is one object with a row for each"),
    (
        "train.json",
        b'{"question": {"0": "?"}, "answer": {"0": "x"}}',
        r"train.json: it has columns, as pandas .* rows: `to_json\(file, orient=\"records\"\)`",
    ),
    *(
        ("train.json", rows, "no row has a `question`.* put them under exactly one of the keys data, rows, examples, ")
        for rows in (b'{"annotations": [{"question": "?", "answer": "x"}]}', b'{"data": [{"x": 1}], "examples": []}')
    ),
    ("train.json", b'{"train": [{"question": "?"}], "test": []}', "train.json: it has several splits. Write a file"),
    (
        "train.jsonl",
        json.dumps({f"k{number:02}": 1 for number in range(25)}).encode(),
        "no row has a `question`. The columns are k00, .*k19 and 5 more. Give",
    ),
    ("train.csv", b"question,answer\n\xe4,x\n", "train.csv: not UTF-8 text"),
    (
        "train.csv",
        b"answer,question,answer\n?,x,y\n",
        "train.csv:1: the header has a column name twice: answer,",
    ),
    ("train.csv", b"", "train.csv: no rows"),
    ("train.txt", b"question", "has no data that this task reads"),
    ("train.csv", b"question;answer\n?;x\n", "columns seem to be separated by ';'"),
]


@pytest.mark.parametrize("name, content, message", FILES, ids=[f"{name} {message}" for name, _, message in FILES])
def test_a_file_that_cannot_be_read_is_named_with_the_place(name, content, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    if message is None:
        assert len(read(vqa, tmp_path, columns="image=none")) == 1
        return
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            list(vqa.load("train", str(tmp_path), streaming=streaming, columns="image=none"))
    if name != "train.txt":
        assert not check(str(tmp_path), columns="image=none")
        assert re.search(message, capsys.readouterr().out)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({}, ""),
        (
            {"question": ["?"], "answer": ["x"], "more": [1]},
            "train-0.parquet and .*train-1.parquet has the columns more",
        ),
        ({"question": [["?"]], "answer": ["x"]}, ""),
    ],
    ids=["empty", "another column", "another type"],
)
def test_parquet_files_that_do_not_fit_are_named(columns, message, tmp_path):
    rows = {"question": ["?"], "answer": ["x"]} if columns else {"question": [], "answer": []}
    for number, own in enumerate((rows, columns or rows)):
        Dataset.from_dict(own).to_parquet(tmp_path / f"train-{number}.parquet")
    with pytest.raises(ValueError, match=f"(?s)cannot be read as Parquet: .*{message}.*the same types"):
        vqa.load("train", str(tmp_path))


PETS, OTHERS = ClassLabel(names=["cat", "dog", "hen"]), ClassLabel(names=["cat", "hen"])
NOTHING, NUMBER, TEXT = Value("null"), Value("int64"), Value("string")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "first, second, joined",
    [
        ((NUMBER, 101), (TEXT, "007"), None),
        ((TEXT, "007"), (NUMBER, 101), None),
        ((NUMBER, 101), (Value("bool"), True), None),
        ((List(NUMBER), [1]), (List(TEXT), ["01"]), None),
        ((PETS, 1), (OTHERS, 1), None),
        ((List(PETS), [1]), (List(OTHERS), [1]), None),
        ((PETS, 1), (NUMBER, 1), None),
        ((TEXT, "007"), (Value("binary"), b"007"), None),
        ((NOTHING, None), (PETS, 1), PETS),
        ((List(PETS), [1]), (List(NOTHING), []), List(PETS)),
        ((List({"a": NUMBER}), [{"a": 1}]), (List({"a": NOTHING}), [{"a": None}]), List({"a": NUMBER})),
        ((Value("int64"), 2**40), (Value("int32"), 1), NUMBER),
        ((NUMBER, 2), (Value("float64"), 0.1), Value("float64")),
        ((Value("float32"), 1.5), (Value("float64"), 16777217.0), Value("float64")),
        ((TEXT, "007"), (Value("large_string"), "42"), Value("large_string")),
        ((TEXT, "a.png"), (Image(decode=False), {"bytes": b"", "path": None}), Image(decode=False)),
    ],
)
def test_no_parquet_file_changes_the_values_of_another(first, second, joined, streaming, tmp_path):
    given = {"train": first, "test": second}
    for split, (feature, value) in given.items():
        rows = Dataset.from_dict({"answer": [value]}, Features({"answer": feature}))
        rows.to_parquet(tmp_path / f"{split}.parquet")
    if joined is None:
        places = " and ".join(f".* in .*{split}.parquet" for split in given)
        with pytest.raises(ValueError, match=f"`answer` has the type {places}.*All files need the same types"):
            _formats.open_dataset(str(tmp_path), streaming)
        return
    for split, rows in _formats.open_dataset(str(tmp_path), streaming).items():
        (row,) = rows
        value = given[split][1]
        assert rows.features["answer"] == joined
        assert row["answer"] == ({"bytes": None, "path": value} if value == "a.png" else value)


def test_a_split_whose_images_are_in_another_column_is_an_error(tmp_path):
    write_image(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    for split, column in (("train", "image"), ("test", "screenshot")):
        row = {"question": "?", "answer": "x", column: image}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match="no row has an `image`. The columns are question, answer, screenshot"):
        vqa.load("test", str(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_without_values_in_some_parquet_files_have_the_type_of_the_others(streaming, tmp_path):
    write_image(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    row = {"question": "Why?", "answer": "so", "image": image}
    files = {
        "train-0": {**row, "context": None, "choices": []},
        "train-1": {**row, "context": "A hen.", "choices": ["so", "no"]},
        "test": row,
    }
    for name, own in files.items():
        pq.write_table(pa.Table.from_pylist([own]), tmp_path / f"{name}.parquet")
    loaded = [list(vqa.load(split, str(tmp_path), streaming)) for split in ("train", "test")]
    found = [[(own["context"], own["choices"]) for own in rows] for rows in loaded]
    assert found == [[(None, None), ("A hen.", ["so", "no"])], [(None, None)]]


def test_data_that_were_changed_are_read_again_and_images_that_were_moved_are_found(tmp_path):
    file, row = tmp_path / "train.jsonl", {"question": "Why?", "answer": "so", "image": "a.png"}
    write_lines(file, [row])
    assert not os.path.exists(undecoded(vqa.load("train", str(tmp_path)))[0]["path"])
    write_image(tmp_path / "images" / "a.png")
    assert os.path.exists(undecoded(vqa.load("train", str(tmp_path)))[0]["path"])
    write_lines(file, [{**row, "answer": "no"}])
    assert vqa.load("train", str(tmp_path))["answer"][:] == ["no"]


def test_a_data_set_is_read_again_if_other_rows_were_saved_with_the_same_fingerprint(tmp_path):
    """As `Dataset.from_generator` saves them: it makes the fingerprint from the function alone."""
    for number, answer in enumerate(("no", "so")):
        row = {"question": ["Why?"], "choices": [["no", "so"]], "answer": [answer]}
        Dataset(pa.table(row), fingerprint="same").save_to_disk(tmp_path / "vqa" / "train")
        rows = vqa.load("train", str(tmp_path / "vqa"), columns="image=none")
        assert rows["answer"][:] == [answer]
        row |= {"answer": [number], "hint": [""]}
        Dataset(pa.table(row), fingerprint="same").save_to_disk(tmp_path / "scienceqa" / "train")
        task = get_task("scienceqa")  # it returns the rows as they were saved
        rows = task.load("train", str(tmp_path / "scienceqa"))
        (tokens,) = RowEncoder(task, "train", tiny_processor(), 200, training=True).encode(rows)["input_ids"]
        assert tiny_processor().tokenizer.decode(tokens).endswith(f"The answer is {'AB'[number]}.</s>")


def undecoded(rows):
    return [row["image"] for row in rows.cast_column("image", Image(decode=False))]


def test_images_inside_the_data_are_not_copied_into_the_cache(tmp_path, cache):
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8))
    rows = Dataset.from_dict({"question": ["Why?"] * 4, "answer": [1] * 4, "image": [noise] * 3 + [None]})
    rows.save_to_disk(tmp_path / "saved")
    loaded = vqa.load("train", str(tmp_path / "saved"))
    assert [image is None for image in undecoded(loaded)] == [False] * 3 + [True]
    assert undecoded(loaded) == undecoded(load_from_disk(tmp_path / "saved"))
    assert 0 < sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) < 10_000
    assert not list((tmp_path / "saved").rglob("cache-*")), "the data may be in a folder that cannot be written to"


@pytest.mark.parametrize("feature", [Image(), Value("binary")], ids=["image", "binary"])
def test_an_image_without_bytes_is_a_fault_of_its_row(feature, tmp_path, capsys):
    """As after a download that failed."""
    write_image(tmp_path / "a.png")
    contents = [(tmp_path / "a.png").read_bytes(), b""] * 4
    images = contents if feature != Image() else [{"bytes": content, "path": None} for content in contents]
    columns = {"question": [f"{number}?" for number in range(8)], "answer": ["x"] * 8, "image": images}
    features = Features({"question": Value("string"), "answer": Value("string"), "image": feature})
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "train.parquet")
    assert not check(str(tmp_path))
    printed = capsys.readouterr().out
    assert re.search(r"train.parquet, row 1: The image .* cannot be read", printed) and "4 faults" in printed
    assert len(vqa.load("test", str(tmp_path), holdout=0.2)) == 2


@pytest.mark.parametrize("feature", [Image(), List(Image())], ids=["one image", "several"])
def test_nothing_is_written_into_the_folder_of_the_data(feature, tmp_path):
    """It may be read-only, and is not the user's place for copies."""
    write_image(tmp_path / "a.png")
    images = [PILImage.open(tmp_path / "a.png") if feature == Image() else [PILImage.open(tmp_path / "a.png")] * 2]
    columns = {"question": ["?", "Why?"], "answer": ["x", "y"], "image": [*images, None]}
    features = Features({"question": Value("string"), "answer": Value("string"), "image": feature})
    rows = Dataset.from_dict(columns, features)
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    files = sorted((tmp_path / "saved").rglob("*"))
    for streaming in (False, True):
        arguments = DataArguments(
            task="vqa", data_path=str(tmp_path / "saved"), only_images=True, streaming=streaming, max_prompt_length=99
        )
        assert [row["question"] for row in load_rows(vqa, "train", arguments)] == ["?"]
    assert check(str(tmp_path / "saved"))
    assert sorted((tmp_path / "saved").rglob("*")) == files


def test_the_check_command_notes_what_may_be_a_mistake(tmp_path, capsys):
    write_image(tmp_path / "a.png")
    row = {"question": "<image>\nWhat?", "answer": "red</s>", "image": "a.png"}
    write_lines(tmp_path / "train.jsonl", [row, row, {**row, "answer": "Zoë"}])
    write_lines(tmp_path / "test.jsonl", [{**row, "question": "What?"}])
    for name in ("train_old", "training"):
        write_lines(tmp_path / f"{name}.jsonl", [{**row, "answer": "blue"}])
    (tmp_path / "validation.csv").write_text("question,answer\n")
    assert check(str(tmp_path))
    printed = capsys.readouterr().out
    unread = f"{tmp_path / 'validation.csv'} is not read, since other files are JSON Lines"
    with pytest.raises(ValueError, match=re.escape(unread)):
        vqa.load("validation", str(tmp_path))
    for note in (
        f"note: {unread}",
        f"read from 2 files, {tmp_path / 'train.jsonl'} to {tmp_path / 'train_old.jsonl'}",
        f"{tmp_path / 'training.jsonl'} is not read, since another file is named `train`. To read both, name it",
        f"note: 2 times `</s>` in `answer`, which is treated as ordinary text, the first at {tmp_path}",
        f"note: 1 times a row that is repeated, the first at {tmp_path / 'train.jsonl'}:2",
        f"note: 1 times a row that is also in the train split, the first at {tmp_path / 'test.jsonl'}:1",
        "longest texts in characters: question 5, answer 7",
    ):
        assert note in printed, printed


def test_the_check_command_prints_any_text_in_any_locale(tmp_path, monkeypatch):
    write_lines(tmp_path / "train.jsonl", [{"question": "Zoë \ud83d", "answer": "Zoë", "choices": ["ë", "é"]}])
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", ["tasks", "check", str(tmp_path), "--columns", "image=none"])
    with pytest.raises(SystemExit, match="1"):
        main()
    output.flush()
    assert b"`answer` is 'Zo\\xeb', which is none of" in output.buffer.getvalue()


def test_signs_of_answers_count_and_each_of_several_options_is_right():
    records = [
        {"prediction": text, "answer": "C#", "has_image": False, "answers": None, "choices": None}
        for text in ("C#", " c#.", "C", "3,000")
    ]
    records[3]["answer"] = "3000"
    assert vqa.score(records, 4)["average"] == 75
    chosen = {"choices": ["red", "blue", "green"], "answer": "red", "answers": ["red", "blue"], "has_image": False}
    assert vqa.score([{**chosen, "prediction": f" {letter}"} for letter in "ABC"], 3)["average"] == pytest.approx(
        200 / 3
    )


def test_data_sets_saved_with_tensors_are_read(tmp_path):
    rows = Dataset.from_list([{"question": "?", "answer": 1}]).with_format("torch")
    rows.save_to_disk(tmp_path)
    assert read(vqa, tmp_path, columns="image=none")[0]["answer"] == "1"

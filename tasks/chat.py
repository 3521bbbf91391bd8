"""
Conversations of one or more turns, with or without images and a system message. Read from JSON Lines, JSON, CSV or
Parquet, from a folder that `save_to_disk` wrote, or from the Hub, see docs/own-data.md:

    {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A hen."}],
     "images": ["hen.png"]}
    {"conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A hen."}],
     "image": "hen.png"}

The first is the format of TRL, where a content may also be a list of parts, {"type": "text", "text": "..."} and
{"type": "image"}, perhaps with the image itself as `image`; the second is the format of LLaVA and ShareGPT. Images may
be in any of the user's messages. Their placeholders (`<image>`, or a part of type "image") are removed from the text,
since there are no image tokens: the model is given all images of a row in order. A text in the column `system` becomes
the system message of a row that has none in its messages. Other columns are ignored. The command `python -m tasks
check FOLDER --task chat` lists invalid rows.
"""

import re
import reprlib
import sys
from functools import partial
from itertools import chain, pairwise

from datasets import Features, List, Value

from tasks import _sources, _values, no_context, no_options, vqa


COLUMNS = ("image", "messages")
ANSWER_PREFIX = ""
MAX_NEW_TOKENS = 128
CARD = {"task_type": "image-text-to-text", "metric_type": "accuracy", "score": "average"}

FEATURES = Features(
    {**_values.IMAGE_FEATURES, "messages": List({"role": Value("string"), "content": Value("string")})}
)
FIELDS = {"image": ("images", "image", "file_name"), "messages": ("messages", "conversations"), "system": ("system",)}
REQUIRED = ("messages",)
LOST = ("tools",)
KEYS = ("role", "from"), ("content", "value")
# Parts of a message in other formats that would be ignored
UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
# Keys of a message that may have its images, in the formats of Ollama and others
IMAGE_KEYS = ("images", "image", "videos", "video", "audios", "audio", "attachments", "files")
# Whether a message is trained on, in the formats of OpenAI, ms-swift, Axolotl and others
WEIGHTS = ("weight", "weights", "loss", "loss_weight", "loss_scale", "loss_mask", "train", "training", "trainable")
MASKS = ("mask", "masked")  # whether it is not
# Placeholders of ms-swift for what is in the column `objects`. A tag with an end has its content in the text.
PLACEHOLDER = re.compile(r"<(bbox|ref-object)>(?!.*</\1>)", re.DOTALL)
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


load = partial(_sources.load, sys.modules[__name__])


def find_images(record: dict) -> list | None:
    """The images in the parts of the messages, for a row without a column of images."""
    turns = _values.as_list(record["messages"])
    turns = turns if isinstance(turns, list) else []
    contents = [decode_parts(turn.get("content")) for turn in turns if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    keys = (*_values.PLACE_OF_IMAGE, "source")
    images = [
        {"base64": part[key]} if key in ("base64", "data") else part[key]
        for part in parts
        if (key := next((key for key in (*keys, "base64", "data") if part.get(key)), None))
    ]
    return images or None


def parse(record: dict, num_images: int | None) -> tuple[dict, list[str]]:
    """A row without its images, and the faults of its messages."""
    turns = _values.as_list(record["messages"])
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        form = " As a text, as in CSV, it must be JSON, with double quotes." if isinstance(turns, str) else ""
        return {}, [
            f'`messages` is {reprlib.repr(turns)}. Make it a list of {{"role": "user", "content": "..."}}, or, as '
            f'`conversations`, of {{"from": "human", "value": "..."}}.{form}'
        ]
    messages, faults, num_markers, indexes, system = [], [], 0, [], record["system"]
    if _values.is_text(system):
        role, content = read_turn(turns[0])
        if role != "system":
            turns = [{"role": "system", "content": system}, *turns]
        elif read_content(decode_parts(content))[0] != system:
            faults.append("`system` and the system message differ. Give one of them.")
    elif system is not None and not (isinstance(system, str) and not system.strip()):
        faults += _values.find_text_faults("`system`", system)
    for number, turn in enumerate(turns, 1):
        role, content = read_turn(turn)
        role, content = role if isinstance(role, str) else repr(role), decode_parts(content)
        text, markers = read_content(content)
        name = f"text in message {number} ({role})"
        unknown = [part for part in text if kind_of(part) is None] if isinstance(text, list) else []
        if role not in ROLES:
            faults.append(
                f"message {number} has the role {role!r}. Use system, user and assistant, or system, human and gpt."
            )
        contents = [turn[key] for key in KEYS[1] if turn.get(key) not in (None, "")]
        if contents[1:] and contents[0] != contents[1]:
            faults.append(f"message {number} ({role}) has `content` and `value`, which differ. Give one of them.")
        if ignored := [key for key in UNREAD if turn.get(key)]:
            faults.append(f"message {number} ({role}) has `{ignored[0]}`, which is not read. Remove it or the row.")
        if misplaced := [key for key in IMAGE_KEYS if turn.get(key)]:
            faults.append(
                f"message {number} ({role}) has `{misplaced[0]}`, which is not read. Give images in the column "
                "`images` of the row; video, audio and other files are not supported."
            )
        is_answer = ROLES.get(role) == "assistant"
        weights = [key for key in WEIGHTS if turn.get(key) not in (None, is_answer)]
        if key := next(iter(weights + [key for key in MASKS if is_answer and turn.get(key)]), None):
            faults.append(
                f"message {number} ({role}) has the {key} {turn[key]}, but the model is trained on all messages of "
                "the assistant and on no others. Remove the row, or split it."
            )
        if unknown:
            faults.append(
                f"message {number} ({role}) has the part {reprlib.repr(unknown[0])}. Give parts of type 'text', with "
                "`text`, and of type 'image'."
            )
        else:
            faults += _values.find_text_faults(name, text)
        if markers and ROLES.get(role) != "user":
            faults.append(f"message {number} ({role}) has `<image>`, which only a user's message may have. Remove it.")
        if isinstance(text, str) and (placeholder := PLACEHOLDER.search(text)):
            faults.append(
                f"message {number} ({role}) has `{placeholder[0]}`, which would be read as text, since the column "
                "`objects` is not read. Write the name or the box in its place."
            )
        num_markers += markers
        parts = content if isinstance(content, list) and not unknown else []
        indexes += [part["index"] for part in parts if kind_of(part) == "image" and part.get("index") is not None]
        if is_answer and isinstance(text, str):
            text = text.strip()  # the tokens of an answer begin after the generation prompt
        messages.append({"role": ROLES.get(role), "content": text})
    roles = [message["role"] for message in messages]
    spoken = roles[roles[0] == "system" :]
    if None not in roles and (len(spoken) < 2 or spoken != ["user", "assistant"] * (len(spoken) // 2)):
        faults.append(
            f"the roles are {reprlib.repr(roles)}. After at most one system message, user and assistant must "
            "alternate, and the last message must be the assistant's."
        )
    faults += _values.find_marker_faults("the messages have", num_markers, num_images, " (or parts of type 'image')")
    if any(index >= following for index, following in pairwise(indexes)):
        faults.append(
            f"the image parts have the `index` values {reprlib.repr(indexes)}, but images are read in the order of "
            "the row. Put its images into the order of the parts, and remove `index`."
        )
    return {"messages": messages}, faults


def find_unread_keys(record: dict) -> list[str]:
    """The keys of messages that have a value and are neither read nor a fault."""
    turns, known = _values.as_list(record["messages"]), {*chain(*KEYS), *UNREAD, *IMAGE_KEYS, *WEIGHTS}
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    filled = (key for turn in turns for key, value in turn.items() if value not in (None, "", [], {}))
    return [key for key in filled if key not in known]


def read_turn(turn: dict) -> tuple:
    """The role and the content of a message, `None` for one that is missing."""
    return tuple(next((turn[key] for key in keys if turn.get(key) is not None), None) for keys in KEYS)


def decode_parts(content):
    """Decodes a list of parts that is stored as JSON in a content. Other contents are returned unchanged."""
    parts = _values.as_list(content)
    is_decoded = isinstance(parts, list) and parts and all(kind_of(part) and "type" in part for part in parts)
    return parts if is_decoded else content


def read_content(content) -> tuple[str | None, int]:
    """The text of a content (a text or a list of parts), and the number of its image placeholders."""
    if not isinstance(content, list):
        return _values.remove_markers(content)
    texts, num_images = [], 0
    for part in content:
        if (kind := kind_of(part)) is None:
            return content, 0
        if kind == "text":
            text = part.get("text") or part.get("content") or ""
            if not isinstance(text, str):
                return content, 0
            text, markers = _values.remove_markers(text)
            texts.append(text)
            num_images += markers
        else:
            num_images += 1
    return "\n".join(text for text in texts if text.strip()), num_images


def kind_of(part) -> str | None:
    """The type of a part of a message, "text" or "image", also in the format of OpenAI's Responses; else `None`."""
    kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
    kinds = {"text": "text", "input_text": "text", "output_text": "text"}
    return (kinds | dict.fromkeys(("image", "image_url", "input_image"), "image")).get(kind)


def messages(row: dict) -> list[dict[str, str]]:
    """All messages. The last one is the assistant's, which evaluation predicts."""
    return row["messages"]


context, options = no_context, no_options


def prompt(row: dict, context: str) -> str:
    """The user's last message, which can be displayed. Training and evaluation use `messages`."""
    return row["messages"][-2]["content"]


def answer(row: dict) -> str:
    return row["messages"][-1]["content"]


def score(records: list[dict], size: int) -> dict[str, float | None]:
    """
    Accuracy in per cent of the last answers with and without an image, and of all (`average`). Answers are compared
    after `tasks.vqa.normalise`, so this is only useful for short answers.
    """
    scores = vqa.score([{**record, "answer": record["expected"]} for record in records], size)
    return {name: scores[name] for name in ("image", "no image", "average", "count")}

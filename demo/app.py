# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A web page that answers questions about images, and shows which patches the language model reads and which vision
layers are mixed into the visual memory. Needs `pip install -r requirements-app.txt`.

    python demo/app.py
    python demo/app.py --adapter org/dehvf-llama7b --revision <40 hex digits>

By default it uses an adapter in examples/ whose base models are on this machine, or else the adapter of the default
training run. The example images and questions are in the adapter's folder, or those of digits if it has this name.

Loading an adapter runs the code in its repository: read it and pass the commit that you read. A Gradio Space takes
both values from the variables DEHVF_ADAPTER and DEHVF_REVISION of its settings.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F
from transformers import TextIteratorStreamer
from transformers.utils import CONFIG_NAME, cached_file


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it during its import

import gradio as gr  # noqa: E402

from dehvf import processing  # noqa: E402
from demo.engine import MAX_CHARACTERS_PER_TOKEN  # noqa: E402
from demo.pictures import (  # noqa: E402
    draw_fusion_weights,
    draw_slot_activations,
    encoder_view,
    fusion_weights,
    load_adapter,
    slot_activations,
)
from demo.serve import remember_images  # noqa: E402
from tasks import get_task  # noqa: E402
from training.chats import ChatTokenizer, render  # noqa: E402
from training.data import read_image  # noqa: E402
from training.flags import check_has_commits, is_commit  # noqa: E402


MAX_NEW_TOKENS = 64
GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}  # one answer, which can be streamed
DEFAULT_POSITIONS = 4096
NUM_EXAMPLES = 6
NUM_ROWS_READ = 100  # rows of a task in which examples are searched for
ADAPTERS = Path(__file__).resolve().parents[1] / "examples"


def find_adapter() -> str:
    """The first adapter in `ADAPTERS` whose base models are on this machine, else that of the default training run."""
    for file in sorted(ADAPTERS.glob(f"*/{CONFIG_NAME}")):
        config = json.loads(file.read_text(encoding="utf-8"))
        if is_here(config["vision_model_id"]) and is_here(config["text_model_id"]):
            return str(file.parent)
    return "outputs/digits"


def is_here(base: str) -> bool:
    """Whether a base model is a folder or in the Hub's cache."""
    try:
        return cached_file(base, CONFIG_NAME, local_files_only=True) is not None
    except OSError:
        return False


def load(adapter: str, revision: str | None):
    """
    The model and its processor.

    Raises:
        OSError: if a base is missing.
        ValueError: if the adapter does not exist, has no visual memory, is on the Hub and `revision` is not a commit,
            or is a folder and has a `revision`.
    """
    check_has_commits(adapter, revision, "`--revision` or the variable DEHVF_REVISION")
    if not os.path.isdir(adapter) and not is_commit(revision):
        raise ValueError(
            f"There is no folder {adapter}. To train the default adapters into outputs/digits, run `accelerate launch "
            "train.py`, which takes minutes. If this is a Hub id, loading it runs its code: pass the commit that you "
            "have read, `--revision` and 40 hex digits."
        )
    model, processor = load_adapter(adapter, revision)
    return remember_images(model), processor


def read_upload(upload) -> Image.Image | None:
    """
    Reads the uploaded image of `gr.Image`, or returns `None`.

    Raises:
        gradio.Error: if the image cannot be read. Only messages of this class are shown on the page if it is launched
            without `show_error`.
    """
    if upload is None:
        return None
    is_data = bool(upload.url) and upload.url.startswith("data:")
    if not is_data and not upload.path:
        raise gr.Error("No image was uploaded. Upload a file.")
    try:
        return read_image(upload.url if is_data else Path(upload.path))  # a path is never taken for a URL
    except ValueError as error:
        fault = error.__cause__
        reason = "it is not an image file" if isinstance(fault, UnidentifiedImageError) else str(fault)
        name = f"image {upload.orig_name}" if upload.orig_name else "image"
        raise gr.Error(f"The {name} cannot be read: {reason}. Upload another file.") from error


def make_inputs(model, processor, image, message: str) -> dict[str, torch.Tensor]:
    """The model's inputs for a message about an image. Special tokens in the message are text, as in training."""
    text, _ = processing.remove_image_markers(message.strip())
    chats = ChatTokenizer(processor)
    tokens, _ = chats.encode(chats.render([{"role": "user", "content": text}], add_generation_prompt=True))
    inputs = processor(images=image, return_tensors="pt")
    input_ids = torch.tensor([tokens])
    inputs.update(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    return inputs.to(model.device)


def ask(model, processor, image, message: str | None):
    """
    Yields the answer so far and `None`, and finally the answer and `(image, message, tokens)`, where `tokens` are the
    ids of question and answer.

    Raises:
        gradio.Error: if there is no image or no question, or it is too long.
    """
    if image is None or not (message or "").strip():
        raise gr.Error("Upload an image or choose an example, and enter a question.")
    # Some models have no maximum
    limit = getattr(model.config.text_config, "max_position_embeddings", None) or DEFAULT_POSITIONS
    limit -= MAX_NEW_TOKENS
    if len(message) > MAX_CHARACTERS_PER_TOKEN * limit:  # before they are tokenized, which could take minutes
        raise gr.Error(f"The question has {len(message)} characters, but the model reads {limit} tokens. Shorten it.")
    try:
        inputs = make_inputs(model, processor, image, message)
    except TypeError as error:  # of the tokenizer
        raise gr.Error("The question contains half of a character (a surrogate). Remove it.") from error
    if (num_tokens := inputs["input_ids"].shape[1]) > limit:
        raise gr.Error(f"The question has {num_tokens} tokens, but the model reads {limit}. Shorten it.")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def generate():
        try:
            return model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, streamer=streamer, **GREEDY)
        finally:
            streamer.end()  # also after an error, or the loop below would wait forever

    with ThreadPoolExecutor(1) as thread:
        tokens, answer = thread.submit(generate), ""
        for piece in streamer:
            answer += piece
            yield answer.strip(), None
        yield answer.strip(), (image, message, tokens.result()[0].tolist())


def read_tokens(inputs, tokens: list[int], end: int) -> dict[str, torch.Tensor]:
    """The same inputs, with the first `end` tokens of question and answer as the text."""
    text = inputs["input_ids"].new_tensor([tokens[:end]])
    question = F.pad(inputs["attention_mask"], (0, end - inputs["input_ids"].shape[1]))
    return {**inputs, "input_ids": text, "attention_mask": torch.ones_like(text), "instruction_mask": question}


@torch.no_grad()
def offer_tokens(model, processor, asked):
    """The tokens of the answer as choices. The token whose likelihood the image increases most is selected."""
    image, message, tokens = asked
    inputs = make_inputs(model, processor, image, message)
    length = inputs["input_ids"].shape[1]
    with_image = read_tokens(inputs, tokens, len(tokens))
    without = {name: value for name, value in with_image.items() if name not in ("pixel_values", "image_mask")}
    seen, unseen = (
        model(**given).logits[0, length - 1 : -1].float().log_softmax(-1) for given in (with_image, without)
    )
    gains = (seen - unseen).gather(1, with_image["input_ids"][0, length:, None])
    words = [processor.tokenizer.decode(token) for token in tokens[length:]]
    choices = [(word.strip() or repr(word), index) for index, word in enumerate(words)]
    return gr.Radio(choices, value=gains.argmax().item(), visible=True)


def draw_patches(model, processor, asked, token: int):
    """Figure of how strongly each language layer read the memory of each patch when it predicted this token."""
    image, message, tokens = asked
    inputs = make_inputs(model, processor, image, message)
    length = inputs["input_ids"].shape[1]
    activations = slot_activations(model, read_tokens(inputs, tokens, length + token))[0]
    title = f"What the language model read to say [{processor.tokenizer.decode(tokens[length + token]).strip()}]"
    pixels = encoder_view(processor, image)
    return draw_slot_activations(activations, pixels, model.config.vision_config.patch_size, title)


def draw_mixture(model, processor, image, message: str):
    """Figure of the vision layers that are mixed into each language layer's memory, or `None` without an image."""
    if image is None:
        return None
    weights = fusion_weights(model, make_inputs(model, processor, image, message))
    return draw_fusion_weights(weights, model, "for this image")


def find_examples(adapter: str, processor) -> list[list]:
    """
    Images and messages for an adapter, without a data set, which may be large or missing: from the rows in its folder,
    from the task digits, which draws its rows, or the example that its run has written. The page does without them.
    """
    try:
        folder, name = Path(adapter), Path(adapter).name.replace("-", "_")
        if (folder / "test.jsonl").is_file():
            return choose_examples(get_task(name), get_task("vqa").load("test", str(folder)))
        if name == "digits":
            return choose_examples(get_task(name), get_task(name).load("test", max_samples=NUM_ROWS_READ))
        return [read_example(folder, processor)] if (folder / "example.png").is_file() else []
    except Exception as error:  # whatever it is, questions can be asked without examples
        print(f"The page has no examples: {error}", file=sys.stderr)
        return []


def choose_examples(task, rows) -> list[list]:
    """Images and messages of rows, each with another skill or else another answer."""
    examples, seen = [], set()
    for row in rows.select(range(min(NUM_ROWS_READ, len(rows)))):
        if (image := read_image(row["image"])) is None:
            continue
        kind = row.get("skill", row.get("answer"))
        if not seen & {image.tobytes(), kind}:
            seen |= {image.tobytes(), kind}
            examples.append([image, task.prompt(row, task.context(row))])
    return examples[:NUM_EXAMPLES]


def read_example(folder: Path, processor) -> list:
    """
    The image and the message of `train.py`, which has written the latter as the chat template renders it. Raises
    `ValueError` if the page, which asks one question without a system message, would give the model another text.
    """
    text = (folder / "example.txt").read_text(encoding="utf-8")
    before, after = render(processor, "{message}").split("{message}")
    message = text.removeprefix(before).removesuffix(after)
    asked = ChatTokenizer(processor).render([{"role": "user", "content": message}], add_generation_prompt=True)
    if asked != text or after.strip() and after in message:  # which comes before the answer of each turn
        raise ValueError(f"{folder}/example.txt is not a single question in the form in which the page asks it.")
    return [read_image(folder / "example.png"), message]


def build(model, processor, examples: list[list]) -> gr.Blocks:
    """The page, with examples: images and messages."""
    with gr.Blocks(title="DEHVF") as page:
        gr.Markdown("# DEHVF\nA frozen language model that reads images as visual memory in its FFNs.")
        message = gr.Textbox(label="Question, with its options if any", lines=4, render=False)
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Image", type="pil", height=300, elem_id="image")
                image.preprocess = read_upload  # reads images like training, and explains why one cannot be read
                if examples:
                    hint = "Examples from the test split"
                    gr.Examples(examples, [image, message], label=hint, visible_columns=[0])
            with gr.Column():
                message.render()
                button = gr.Button("Ask", variant="primary")
                answer = gr.Textbox(label="Answer", interactive=False)
                token = gr.Radio(label="Show what was read for this token of the answer", visible=False)
        part = " (of the whole image, without the tiles that are read too)" if model.config.image_tiles else ""
        gr.Markdown(f"## The patches that the language model read{part}")
        patches = gr.Plot(show_label=False)
        gr.Markdown(f"## The vision layers that the visual memory is mixed from{part}")
        mixture = gr.Plot(show_label=False)
        asked = gr.State()  # the inputs of the shown answer, even if the user has changed them since

        one_by_one = {"concurrency_id": "model", "concurrency_limit": 1}
        private = {**one_by_one, "api_visibility": "private"}
        given, asking = [image, message], [button.click, message.submit]
        steps = gr.on(asking, partial(ask, model, processor), given, [answer, asked], api_name="ask", **one_by_one)
        steps = steps.success(partial(offer_tokens, model, processor), asked, token, **private)
        steps.success(partial(draw_patches, model, processor), [asked, token], patches, **private)
        token.input(partial(draw_patches, model, processor), [asked, token], patches, **private)
        mixing = [image.change, *asking] if model.config.reads_instruction else [image.change]
        gr.on(mixing, partial(draw_mixture, model, processor), given, mixture, **private)
    return page


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    adapter, revision = os.environ.get("DEHVF_ADAPTER") or find_adapter(), os.environ.get("DEHVF_REVISION") or None
    parser.add_argument("--adapter", default=adapter, help="folder or Hub id of trained adapters")
    parser.add_argument("--revision", default=revision, help="commit of the adapters on the Hub")
    options = parser.parse_args(arguments)
    try:
        model, processor = load(options.adapter, options.revision)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    # System fonts, so that the page loads without a network
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    css = "#image img {width: 100%; height: 100%; object-fit: contain}"  # enlarges small images
    page = build(model, processor, find_examples(options.adapter, processor))
    return page.launch(theme=theme, css=css, show_error=True)


if __name__ == "__main__":
    main()

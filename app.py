# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A demo to look at: choose or upload an image, ask, and see the answer as it grows, what the image's memory is mixed
from, and the patches that the language model read. Needs `pip install -r requirements-app.txt`.

    python app.py
    python app.py --adapter org/dehvf-llama7b --revision <40 hex digits>

It runs the code of the adapter's repository: read that, and give the commit that you read. As a Gradio Space it takes
both from the variables DEHVF_ADAPTER and DEHVF_REVISION of its settings.
"""

import argparse
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

from pictures import check_config, draw_fusion_weights, draw_slot_activations, fusion_weights, slot_activations
from serve import remember_images
from tasks import digits
from training.data import read_image


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr  # noqa: E402


MAX_NEW_TOKENS = 64
NUM_EXAMPLES = 6


def load(adapter: str, revision: str | None):
    """
    The model and its processor.

    Raises:
        OSError: if a base is missing.
        ValueError: if there are no adapters, they have no visual memory to show, or are on the Hub and `revision` is
            no commit.
    """
    if not os.path.isdir(adapter) and not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise ValueError(
            f"There is no folder {adapter}. If there are no adapters yet, train the default ones into outputs/digits "
            "in minutes (`accelerate launch train.py`). If this is an id on the Hub, its code will run here: give "
            "the commit that you have read, --revision and 40 hex digits."
        )
    source = {"revision": revision, "trust_remote_code": True}
    check_config(AutoConfig.from_pretrained(adapter, **source))
    model = AutoModelForImageTextToText.from_pretrained(adapter, **source)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return remember_images(model), AutoProcessor.from_pretrained(adapter, **source)


def make_inputs(model, processor, image, message: str) -> dict[str, torch.Tensor]:
    """The model's inputs for one message about an image."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": message.strip()}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return inputs.to(model.device)


def ask(model, processor, image, message: str):
    """
    Yields the answer so far, and `None`; in the end with what was asked: image, message, ids of question and answer.

    Raises:
        gradio.Error: if there is no image or no question.
    """
    if image is None or not message.strip():
        raise gr.Error("An image and a question are needed. Upload an image or choose one of the examples, and ask.")
    inputs = make_inputs(model, processor, image, message)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def generate():
        try:
            return model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, streamer=streamer)
        finally:
            streamer.end()  # also after an error, which would leave the loop below waiting

    with ThreadPoolExecutor(1) as thread:
        tokens, answer = thread.submit(generate), ""
        for piece in streamer:
            answer += piece
            yield answer.strip(), None
        yield answer.strip(), (image, message, tokens.result()[0].tolist())


def read_tokens(inputs, tokens: list[int], end: int) -> dict[str, torch.Tensor]:
    """The same inputs, with the first `end` tokens of question and answer as their text."""
    text = inputs["input_ids"].new_tensor([tokens[:end]])
    question = functional.pad(inputs["attention_mask"], (0, end - inputs["input_ids"].shape[1]))
    return {**inputs, "input_ids": text, "attention_mask": torch.ones_like(text), "instruction_mask": question}


@torch.no_grad()
def offer_tokens(model, processor, asked):
    """The answer's tokens to choose from; first chosen is the one that the image made more likely than any other."""
    image, message, tokens = asked
    inputs = make_inputs(model, processor, image, message)
    length = inputs["input_ids"].shape[1]
    texts = read_tokens(inputs, tokens, len(tokens))
    blind = {name: value for name, value in texts.items() if name not in ("pixel_values", "image_mask")}
    seen, unseen = (model(**given).logits[0, length - 1 : -1].float().log_softmax(-1) for given in (texts, blind))
    gains = (seen - unseen).gather(1, texts["input_ids"][0, length:, None])
    words = [processor.tokenizer.decode(token) for token in tokens[length:]]
    choices = [(word.strip() or repr(word), index) for index, word in enumerate(words)]
    return gr.Radio(choices, value=gains.argmax().item(), visible=True)


def draw_patches(model, processor, asked, token: int):
    """Figure of how much each layer read the memory of each patch, to say this token of the answer."""
    image, message, tokens = asked
    inputs = make_inputs(model, processor, image, message)
    length = inputs["input_ids"].shape[1]
    activations = slot_activations(model, read_tokens(inputs, tokens, length + token))[0]
    # Cropped and scaled as the encoder gets it, but not normalised
    seen = processor.image_processor(image, do_normalize=False, return_tensors="np")["pixel_values"][0]
    title = f"Where the language model looked to say [{processor.tokenizer.decode(tokens[length + token]).strip()}]"
    patch_size = model.config.vision_config.patch_size
    return draw_slot_activations(activations, seen.transpose(1, 2, 0).clip(0, 1), patch_size, title)


def draw_mixture(model, processor, image, message: str):
    """Figure of the vision layers that the memory of each language layer is mixed from; `None` without an image."""
    if image is None:
        return None
    weights = fusion_weights(model, make_inputs(model, processor, image, message))
    return draw_fusion_weights(weights, model, "for this image")


def make_examples() -> list[list]:
    """Images and messages of the digits task, of scans that its training never saw, each of another skill."""
    rows = {row["skill"]: row for row in digits.load("test", max_samples=60) if row["image"] is not None}
    return [[read_image(row["image"]), digits.prompt(row, row["hint"])] for row in rows.values()][:NUM_EXAMPLES]


def build(model, processor) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="DEHVF") as page:
        gr.Markdown("# DEHVF\nA frozen language model sees by a visual memory in its FFNs. Choose an image and ask.")
        message = gr.Textbox(label="Question, with its options if it has any", lines=4, max_length=2000, render=False)
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Image", type="pil", height=300, elem_id="image")
                hint = "Images and questions of the digits task, of scans that it is not trained on"
                gr.Examples(make_examples(), [image, message], label=hint, visible_columns=[0])
            with gr.Column():
                message.render()
                button = gr.Button("Ask", variant="primary")
                answer = gr.Textbox(label="Answer", interactive=False)
                token = gr.Radio(label="Token of the answer to look at", visible=False)
        gr.Markdown("## The patches that the language model read")
        patches = gr.Plot(show_label=False)
        gr.Markdown("## The vision layers that the image's memory is mixed from")
        mixture = gr.Plot(show_label=False)
        asked = gr.State()  # what the answer belongs to, whatever is typed meanwhile

        # One after the other: pictures look into the model while it computes
        turn = {"concurrency_id": "model", "concurrency_limit": 1}
        own = {**turn, "api_visibility": "private"}
        given, asking = [image, message], [button.click, message.submit]
        steps = gr.on(asking, partial(ask, model, processor), given, [answer, asked], api_name="ask", **turn)
        steps = steps.success(partial(offer_tokens, model, processor), asked, token, **own)
        steps.success(partial(draw_patches, model, processor), [asked, token], patches, **own)
        token.input(partial(draw_patches, model, processor), [asked, token], patches, **own)
        mixing = [image.change, *asking] if model.config.reads_instruction else [image.change]
        gr.on(mixing, partial(draw_mixture, model, processor), given, mixture, **own)
    return page


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    adapter, revision = os.environ.get("DEHVF_ADAPTER", "outputs/digits"), os.environ.get("DEHVF_REVISION")
    parser.add_argument("--adapter", default=adapter, help="folder or Hub id of trained adapters")
    parser.add_argument("--revision", default=revision, help="commit of the adapters on the Hub")
    options = parser.parse_args(arguments)
    try:
        model, processor = load(options.adapter, options.revision)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    # Fonts of the machine, not of the net; a small image as large as its place
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    css = "#image img {width: 100%; height: 100%; object-fit: contain}"
    return build(model, processor).launch(theme=theme, css=css)


if __name__ == "__main__":
    main()

# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
DEHVF as a model for lmms-eval, registered by the entry point in `pyproject.toml`; see docs/lmms-eval.md.

    python -m lmms_eval --model dehvf --model_args pretrained=outputs/my-run --tasks scienceqa --batch_size 16
"""

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from dehvf import processing
from training.chats import ChatTokenizer


class Dehvf(lmms):
    """
    Answers requests of the type `generate_until`.

    Args:
        pretrained: folder or Hub id of an adapter.
        revision: revision of the adapter.
        batch_size: number of questions per batch.
        device: "cuda", "cpu", ...; by default a GPU if available. With several processes, each uses its own device.
        dtype, attn_implementation: for the base models, as in `from_pretrained`.

    Raises:
        ValueError: if a question has video, audio or more images than the adapter reads, or a task compares
            likelihoods.
    """

    is_simple = False  # requests are chat messages

    def __init__(
        self,
        pretrained: str,
        revision: str = "main",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        source = {"revision": revision, "trust_remote_code": True}
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        model = AutoModelForImageTextToText.from_pretrained(pretrained, **source, **options)
        target = device if device is not None and self._world_size == 1 else self.accelerator.device
        self.model = model.to(target).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained, **source)
        self.batch_size = int(batch_size)

    def generate_until(self, requests) -> list[str]:
        """The answers, in the order of the requests."""
        answers, groups = {}, {}
        for index, request in enumerate(requests):
            groups.setdefault(str(sorted(request.args[2].items())), []).append(index)  # by generation options
        batches = [
            indices[start : start + self.batch_size]
            for indices in groups.values()
            for start in range(0, len(indices), self.batch_size)
        ]
        for indices in tqdm(batches, desc="Answering", disable=self._rank != 0):
            chats = [self.messages(requests[index]) for index in indices]
            options = self.generation_options(dict(requests[indices[0]].args[2]))
            answers.update(zip(indices, self.answer(chats, *options)))
        return [answers[index] for index in range(len(requests))]

    def messages(self, request) -> list[dict]:
        """The chat messages of a request, in the format of `transformers`."""
        _, to_messages, _, document, task, split = request.args
        chat = ChatMessages(messages=to_messages(self.task_dict[task][split][document]))
        images, videos, sounds = chat.extract_media()
        max_images = self.processor.max_images
        if len(images) > max_images or videos or sounds:
            raise ValueError(
                f"Document {document} of {task} has {len(images)} images, {len(videos)} videos and {len(sounds)} "
                f"sounds, but this adapter only reads images, at most {max_images}. Remove the task."
            )
        return chat.to_hf_messages()

    @staticmethod
    def generation_options(options: dict) -> tuple[dict, list[str]]:
        """The arguments of `generate`, and the strings at which an answer ends."""
        until = options.pop("until", None) or []
        names = ("max_new_tokens", "temperature", "top_p", "num_beams")
        chosen = {name: options[name] for name in names if options.get(name) is not None}
        chosen["do_sample"] = chosen.get("temperature", 0) > 0
        if not chosen["do_sample"]:
            chosen.pop("temperature", None)
            chosen.pop("top_p", None)
        return {"max_new_tokens": 128, **chosen}, [until] if isinstance(until, str) else until

    def encode(self, chats: list[list[dict]]):
        """The model's inputs, padded on the left. Special tokens in a message are text, as in training."""
        tokenizer, tokens, images = ChatTokenizer(self.processor), [], []
        for chat in map(processing.remove_markers_of_chat, processing.read_chats(chats)):
            images.append([part["image"] for message in chat for part in message["content"] if "image" in part])
            texts = [[part["text"] for part in message["content"] if "text" in part] for message in chat]
            chat = [{**message, "content": "\n".join(own)} for message, own in zip(chat, texts)]
            tokens.append(tokenizer.encode(tokenizer.render(chat, add_generation_prompt=True))[0])
        inputs = self.processor.tokenizer.pad({"input_ids": tokens}, return_tensors="pt")
        inputs.update(self.processor(images=images, return_tensors="pt"))
        return inputs

    @torch.no_grad()
    def answer(self, chats: list[list[dict]], options: dict, until: list[str]) -> list[str]:
        inputs = self.encode(chats).to(self.model.device)
        tokens = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.batch_decode(tokens, skip_special_tokens=True)
        for end in filter(None, until):
            answers = [answer.split(end)[0] for answer in answers]
        return [answer.strip() for answer in answers]

    def loglikelihood(self, requests):
        raise ValueError("DEHVF supports tasks of the type `generate_until`, not those that compare likelihoods.")

    def generate_until_multi_round(self, requests):
        raise ValueError("DEHVF supports tasks of the type `generate_until`, not those with several rounds.")


MANIFEST = ModelManifest(model_id="dehvf", chat_class_path="integrations.lmms_eval.Dehvf")

# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Pushes adapters to the Hub: repositories, uploads and the model card."""

import hashlib
import json
import os
import re
import shutil
from inspect import signature
from tempfile import TemporaryDirectory

import torch
import transformers
from huggingface_hub import (
    CommitInfo,
    ModelCard,
    ModelCardData,
    create_branch,
    create_repo,
    file_exists,
    hf_hub_download,
    snapshot_download,
    upload_folder,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, SAFE_WEIGHTS_NAME


CARD_MARK = "<!-- Written for an adapter with the SHA-256 {}. Without this line the card is left as it is. -->"
CARD = """\
---
{metadata}
---
{mark}

# {name}

An adapter of the method `{method}`: {trained_parameters:,} trained parameters. {place_of_bases}:

| base model | commit |
|---|---|
{bases}

{use}{sections}## Versions

{versions}
"""
BASES_ELSEWHERE = "The frozen base models are loaded from\ntheir own repositories"
BASES_IN_FOLDERS = """\
The frozen base models are loaded from
these places; folders are those of the machine on which this card was written"""
BASES_HERE = """\
The frozen base models are
in this repository, in `text_model` and `vision_model`. They may have been changed after they were loaded from"""
USE = """\
## Use

`trust_remote_code=True` runs the `*_dehvf.py` files of this repository: read them first, and pin the commit that you
have read.

```python
{code}```

"""
EXAMPLE = """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name = {repo_id!r}
revision = "{revision}"  # better the commit whose code you have read, in 40 hex digits
model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
message = {{"role": "user", "content": "What is in the image?"}}
question = processor.apply_chat_template([message], add_generation_prompt=True)
inputs = processor(images=Image.open("image.png"), text=question, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False)
print(processor.batch_decode(tokens, skip_special_tokens=True)[0])
"""


def is_hub_id(location) -> bool:
    """Whether this is an id on the Hub (`org/name`), and not a folder or file."""
    try:
        validate_repo_id(location)
    except HFValidationError:
        return False
    return location is not None and not os.path.exists(location)


def check_hub_ids(**bases: str | None):
    """Raises `ValueError` if a base model (`vision=`, `text=`) has no Hub id."""
    for key, location in bases.items():
        if not is_hub_id(location):
            raise ValueError(
                f"An adapter on the Hub refers to its base models by Hub id, but `{key}_model_id` is {location!r}. "
                f"Name the repository that it is a copy of: `--{key}_model_id org/name` of train.py, or `model.config."
                f'{key}_model_id = "org/name"`, and its commit likewise as `{key}_model_revision`.'
            )


def check_upload(options: dict):
    """
    Checks the arguments of `push_to_hub`, before anything is on the Hub.

    Raises:
        TypeError: for one that `upload_folder` does not have.
        ValueError: for one with which nothing useful would be on the Hub.
    """
    signature(upload_folder).bind(repo_id="", folder_path="", **options)
    for name in ("allow_patterns", "ignore_patterns"):
        if (patterns := options.get(name)) is not None:
            raise ValueError(
                f"`{name}` is {patterns!r}, but the files of an adapter or processor belong together. Leave it out, "
                "or choose the files with `save_pretrained` and `huggingface_hub.upload_folder`."
            )
    if path := options.get("path_in_repo"):
        raise ValueError(
            f"`path_in_repo` is {path!r}, but adapters and processors are loaded from the root of a repository. Leave "
            "it out, or push to a repository or a branch (`revision=`) of its own."
        )
    if options.get("run_as_future"):
        raise ValueError(
            "`run_as_future` is not supported, since the files are written to a temporary folder. Run "
            "`push_to_hub` in a thread of your own, for example `ThreadPoolExecutor().submit(model.push_to_hub, ...)`."
        )


def open_repository(repo_id: str, private: bool | None, token: bool | str | None, revision: str | None) -> str:
    """Creates a repository on the Hub and a branch in it, if they do not exist. Returns the id with its owner."""
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):  # a pull request is not a branch
        create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    return repo_id


def example_code(repo_id: str, revision: str | None = None) -> str:
    """Lines of Python that load an adapter from a branch of a repository and ask it about an image."""
    is_branch = revision is not None and not revision.startswith("refs/")
    return EXAMPLE.format(repo_id=repo_id, revision=revision if is_branch else "main")


def make_card(
    name: str,
    method: str,
    bases: dict[str, str | None],
    trained_parameters: int,
    code: str | None,
    versions: dict[str, str],
    adapter_digest: str,
    sections: str = "",
    tags: list[str] | None = None,
    has_bases: bool = False,
    **metadata,
) -> ModelCard:
    """
    A model card with valid metadata.

    Args:
        bases: id or folder of language model and vision encoder -> commit. The metadata only contains those on the
            Hub.
        code: Python code that uses the adapter, if it can be loaded.
        versions: versions of the packages with which it was made.
        adapter_digest: SHA-256 of the adapter's file. A later push compares it to decide whether to replace the card.
        sections: Markdown that is inserted before the versions.
        has_bases: whether the repository has copies of the base models, of which `bases` are the originals.
        metadata: further fields of `huggingface_hub.ModelCardData`, such as `datasets` and `eval_results`.
    """
    known = [base for base in bases if is_hub_id(base)]
    place_of_bases = BASES_ELSEWHERE if len(known) == len(bases) else BASES_IN_FOLDERS
    data = ModelCardData(
        base_model=known or None,
        base_model_relation="adapter" if known else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys([method, "adapter", "vision-language", *(tags or [])])),
        **metadata,
    )
    return ModelCard(
        CARD.format(
            metadata=data.to_yaml(),
            mark=CARD_MARK.format(adapter_digest),
            name=name,
            method=method,
            trained_parameters=trained_parameters,
            place_of_bases=BASES_HERE if has_bases else place_of_bases,
            bases="\n".join(f"| `{base}` | {commit or 'not pinned'} |" for base, commit in bases.items()),
            use=USE.format(code=code) if code else "",
            sections=sections,
            versions="\n".join(f"- {package} {number}" for package, number in versions.items()),
        )
    )


def write_eval_results(folder, dataset_id: str, task_id: str, value: float, **fields):
    """
    Writes a score to `.eval_results/<task_id>.yaml` in a folder. If it is pushed with the adapter, the Hub shows it on
    the model's page and, if the data set is a benchmark on the Hub, on its leaderboard.

    Args:
        dataset_id: id of the data set on the Hub.
        task_id: task of the data set that was evaluated.
        fields: further fields of `huggingface_hub.EvalResultEntry`, such as `dataset_revision`, `date` and `notes`.

    Source: https://huggingface.co/docs/hub/eval-results
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml  # not in the oldest supported release

    entry = EvalResultEntry(dataset_id=dataset_id, task_id=task_id, value=value, **fields)
    file = os.path.join(folder, ".eval_results", f"{task_id}.yaml")
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "w", encoding="utf-8") as opened:
        opened.write(yaml_dump(eval_result_entries_to_yaml([entry])))


def find_card(repo_id: str, **source) -> tuple[ModelCard | None, str | None]:
    """
    The card of a repository, if there is one, and the SHA-256 of the adapter for which it was written; `None` if a
    person has written it.
    """
    if (place := _find_file(repo_id, "README.md", **source)) is None:
        return None, None
    card = ModelCard.load(place)
    mark = re.search(CARD_MARK.format("(.*)"), card.content)
    return card, mark and mark[1]


def find_old_scores(repo_id: str, adapter_digest: str, **source) -> list[str] | None:
    """
    Patterns of the files to delete if the scores of a run of train.py in a repository belong to another adapter, or
    `None`. A `results.json` that another program has written is not touched.
    """
    if (place := _find_file(repo_id, "results.json", **source)) is None:
        return None
    try:
        with open(place, encoding="utf-8") as file:
            digest = json.load(file)["adapter_sha256"][SAFE_WEIGHTS_NAME]
    except (KeyError, TypeError, ValueError):  # of another program, or not JSON
        return None
    return None if digest == adapter_digest else ["results.json", ".eval_results/*.yaml"]


def _update_card(card: ModelCard, has_bases: bool, tags: list[str]) -> bool:
    """
    Adds tags to a card that is kept, and corrects where it says that the base models are. Returns whether it changed.
    """
    before, sentences = str(card), (BASES_ELSEWHERE, BASES_HERE)
    card.content = card.content.replace(*(sentences if has_bases else sentences[::-1]))
    if missing := [tag for tag in tags if tag not in (card.data.tags or [])]:
        card.data.tags = [*(card.data.tags or []), *missing]
    return str(card) != before


def _find_file(repo_id: str, name: str, **source) -> str | None:
    """A file of a repository, downloaded; `None` if there is none of this name."""
    return hf_hub_download(repo_id, name, **source) if file_exists(repo_id, name, **source) else None


class HubMixin:
    """Uploading an adapter, for a class with the methods of `AdapterMixin`."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        merge_base: bool = False,
        tags: list[str] | None = None,
        **kwargs,
    ) -> CommitInfo:
        """
        Uploads the files of `save_pretrained` and a model card to a repository on the Hub, in one commit. An existing
        card is kept if a person has written it, and replaced if this method has written it for another adapter. The
        scores that a run of train.py has pushed for another adapter are removed.

        Args:
            repo_id: `org/name`. The repository is created if it does not exist.
            private: whether a new repository is private.
            token: token with write access; by default the token of `hf auth login`.
            merge_base: as in `save_pretrained`. Without it, copies of base models in the repository are downloaded, to
                compare them with those of this model.
            tags: additional tags of the card, also of one that is kept.
            kwargs: as in `huggingface_hub.upload_folder` (`commit_message`, `revision`, `create_pr`, ...).

        Raises:
            TypeError: if `upload_folder` does not have such an argument.
            ValueError: if the config has a local folder instead of a Hub id for a base model that is not merged,
                `run_as_future`, `path_in_repo`, `allow_patterns` or `ignore_patterns` is given, `tags` is a text, or
                the adapter cannot be saved. Then nothing is on the Hub.
        """
        config = self.config
        if not merge_base:
            check_hub_ids(vision=config.vision_model_id, text=config.text_model_id)
        if isinstance(tags, str):
            raise ValueError(f"`tags` is {tags!r}, but must be a list of texts. Give `tags=[{tags!r}]`.")
        check_upload(kwargs)
        self._check_before_saving(repo_id, merge_base=merge_base)
        repo_id = open_repository(repo_id, private, token, kwargs.get("revision"))
        with TemporaryDirectory() as folder:
            # From these files `save_pretrained` sees whether the repository has a processor or bases, which it keeps
            source = {"revision": kwargs.get("revision"), "token": token}
            for name in (CONFIG_NAME, PROCESSOR_NAME):
                if place := _find_file(repo_id, name, **source):
                    shutil.copy(place, folder)
            if self._config_in(folder).get("merged_base") and not merge_base:
                snapshot_download(repo_id, local_dir=folder, allow_patterns="*_model/*.safetensors", **source)
            self.save_pretrained(folder, merge_base=merge_base)
            with open(os.path.join(folder, SAFE_WEIGHTS_NAME), "rb") as adapter:
                adapter_digest = hashlib.file_digest(adapter, "sha256").hexdigest()
            has_bases = bool(self._config_in(folder).get("merged_base"))
            card, made_for = find_card(repo_id, **source)
            if card is None or made_for not in (None, adapter_digest):
                card = make_card(
                    repo_id.split("/")[-1],
                    method="dehvf",
                    bases={
                        config.text_model_id: config.text_model_revision,
                        config.vision_model_id: config.vision_model_revision,
                    },
                    trained_parameters=sum(tensor.numel() for tensor in self.adapter_state_dict().values()),
                    code=example_code(repo_id, kwargs.get("revision")),
                    versions={module.__name__: str(module.__version__) for module in (torch, transformers)},
                    adapter_digest=adapter_digest,
                    has_bases=has_bases,
                    tags=tags,
                )
                card.save(os.path.join(folder, "README.md"))
            elif _update_card(card, has_bases, tags or []):
                card.save(os.path.join(folder, "README.md"))
            given = kwargs.get("delete_patterns") or []
            given = [given] if isinstance(given, str) else given
            old_scores = find_old_scores(repo_id, adapter_digest, **source) or []
            options = {"commit_message": "Upload DEHVF adapter", "token": token, **kwargs}
            options["delete_patterns"] = [*given, *old_scores] or None
            return upload_folder(repo_id=repo_id, folder_path=folder, **options)

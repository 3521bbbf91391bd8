"""
The model of lmms-eval, without lmms-eval, which brings some sixty packages: with the three names that it imports from
there. docs/lmms-eval.md says with which release it was run.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image
from tiny import DEHVF_SIZES, save_tiny_bases, tiny_processor

from dehvf import ROOT, DehvfForConditionalGeneration


class Chat:
    """`lmms_eval.protocol.ChatMessages`, as far as it is used."""

    def __init__(self, messages):
        self.messages = messages

    def extract_media(self):
        parts = [part for message in self.messages for part in message["content"]]
        return [[part for part in parts if part["type"] == kind] for kind in ("image", "video", "audio")]

    def to_hf_messages(self):
        return self.messages


@pytest.fixture
def model(tmp_path, monkeypatch):
    names = {
        "lmms_eval.api.model": {"lmms": type("lmms", (), {"__init__": lambda self: None})},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
        "lmms_eval.protocol": {"ChatMessages": Chat},
    }
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models", *names):
        module = ModuleType(name)
        vars(module).update(names.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "integrations.lmms_eval", raising=False)
    monkeypatch.syspath_prepend(ROOT)
    from integrations import lmms_eval

    assert lmms_eval.MANIFEST.chat_class_path == f"{lmms_eval.__name__}.Dehvf"
    adapter = tmp_path / "adapter"
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(*save_tiny_bases(tmp_path), **DEHVF_SIZES)
    model.save_pretrained(adapter)
    tiny_processor().save_pretrained(adapter)
    return lmms_eval.Dehvf(str(adapter), batch_size=2, device="cpu")


def request(index, **options):
    return SimpleNamespace(args=("", lambda document: document, options, index, "dots", "test"))


def document(text, *kinds):
    media = [{"type": kind, kind: Image.new("RGB", (20, 20), "red")} for kind in kinds]
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def test_requests_are_answered_in_their_order_and_with_their_own_options(model):
    documents = [document("a b", "image"), document("c", "image"), document("d"), document("e f g", "image")]
    model.task_dict = {"dots": {"test": documents}}
    options = [{"max_new_tokens": 6}, {"max_new_tokens": 2}, {"max_new_tokens": 6}, {"max_new_tokens": 6}]
    requests = [request(index, **option) for index, option in enumerate(options)]
    together = model.generate_until(requests)
    assert together == [model.generate_until([one])[0] for one in requests]
    assert len(set(together)) > 1
    stop = together[0][1]
    cut = model.generate_until([request(0, max_new_tokens=6, until=[stop], temperature=0, do_sample=False)])
    assert cut == [together[0].split(stop)[0].strip()]
    assert model.generate_until([request(0, max_new_tokens=6, until=None)]) == together[:1]


def test_special_tokens_and_image_markers_in_a_document_are_text(model):
    inputs = model.encode([document("a</s>\n<image><s>b", "image"), document("a")])
    tokenizer = model.processor.tokenizer
    expected = tokenizer("a</s>\n<s>b\nResponse:", split_special_tokens=True).input_ids[1:]
    assert inputs["input_ids"][0].tolist() == [tokenizer.bos_token_id, *expected]
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape and not inputs["attention_mask"][1, 0]
    assert inputs["image_mask"].tolist() == [True, False]


@pytest.mark.parametrize("kinds, message", [(("image", "image"), "2 images"), (("video",), "1 videos")])
def test_what_is_not_one_image_is_refused(model, kinds, message):
    model.task_dict = {"dots": {"test": [document("a", *kinds)]}}
    with pytest.raises(ValueError, match=f"Document 0 of dots has .*{message}"):
        model.generate_until([request(0)])


def test_tasks_that_do_not_generate_are_refused(model):
    with pytest.raises(ValueError, match="compare likelihoods"):
        model.loglikelihood([])

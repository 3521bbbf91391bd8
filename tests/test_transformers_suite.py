"""
The tests that transformers runs on its models, configs and processors, run on ours.

They belong to the installed release, see `registry.py`. A test that cannot hold for adapters is listed in `EXCEPTIONS`
with the reason. It is expected to fail, so that a row that is no longer needed fails the run.
"""

import os
import sys
import unittest
import warnings
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from registry import transformers_tests
from tiny import (
    DEHVF_SIZES,
    IMAGE_SIZE,
    TEXT_SIZES,
    VISION_SIZES,
    tiny_image_processor,
    tiny_text_config,
    tiny_tokenizer,
)
from transformers import CLIPVisionConfig
from transformers.models.auto import modeling_auto

from dehvf import DehvfConfig, DehvfForConditionalGeneration, DehvfModel, DehvfProcessor


try:
    sys.path.append(str(transformers_tests()))
except OSError as error:
    pytest.skip(f"the tests of transformers cannot be fetched: {error}", allow_module_level=True)
with warnings.catch_warnings(action="ignore"):  # marks of pytest that are registered in transformers' repository
    from transformers_tests import test_processing_common
    from transformers_tests.test_configuration_common import ConfigTester
    from transformers_tests.test_modeling_common import (
        GenerationTesterMixin,
        ModelTesterMixin,
        floats_tensor,
        ids_tensor,
    )

pytestmark = pytest.mark.filterwarnings("default")  # deprecations inside the tests of transformers

INCOMPLETE = "adapters that are not complete are refused, since random ones would see nothing"
# Beginning of a test's name -> why it fails
EXCEPTIONS = {
    "test_correct_missing_keys": INCOMPLETE,
    "test_model_weights_reload_no_missing_tied_weights": INCOMPLETE,
    "test_get_image_features_pooler_output": "`generate` needs one matrix per image to repeat it for beams. Here each "
    "language layer has features of its own, and `_expand_inputs_for_generation` repeats them",
    "test_retain_grad_hidden_states_attentions": "the word embeddings are frozen, so they have no gradient",
    "test_training_gradient_checkpointing_use_reentrant_true": "re-entrant checkpointing is refused, since it drops "
    "the gradients of what the FFNs read",
    "test_processor_from_and_save_pretrained": "saving a processor with remote code sets `auto_map` on it",
}


def except_tests(test_class: type) -> type:
    """Class decorator: the tests in `EXCEPTIONS` have to fail."""
    for name in dir(test_class):
        if reason := next((EXCEPTIONS[start] for start in EXCEPTIONS if name.startswith(start)), None):
            test = getattr(test_class, name)

            def expected_to_fail(self, test=test):
                with patch.object(self, "subTest", nullcontext):  # whose failures would not count
                    test(self)

            setattr(test_class, name, pytest.mark.xfail(reason=reason, strict=True)(expected_to_fail))
    return test_class


class DehvfModelTester:
    """What the tests of transformers ask for a model."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers = num_attention_heads = 2
    hidden_size, vocab_size, image_size = TEXT_SIZES["hidden_size"], TEXT_SIZES["vocab_size"], IMAGE_SIZE

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        sizes = {"num_hidden_layers": self.num_hidden_layers, "num_attention_heads": self.num_attention_heads}
        return DehvfConfig(
            text_config=tiny_text_config(**sizes),
            vision_config=CLIPVisionConfig(**{**VISION_SIZES, **sizes}),
            **DEHVF_SIZES,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 3) + 3  # no special token
        return self.get_config(), {
            "pixel_values": floats_tensor([self.batch_size, 3, self.image_size, self.image_size]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }


SAVE_PRETRAINED = DehvfForConditionalGeneration.save_pretrained


def save_with_bases(model, folder, **kwargs):
    """`save_pretrained`, as these tests need it: the base models are random, and no other place has them."""
    whole = model if model.can_generate() else DehvfForConditionalGeneration(model.config)
    whole.model = model.base_model
    SAVE_PRETRAINED(whole, folder, merge_base=True, **kwargs)
    if whole is not model:
        os.remove(os.path.join(folder, "generation_config.json"))


@except_tests
class DehvfModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (DehvfModel, DehvfForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        self.model_tester = DehvfModelTester(self)
        self.config_tester = ConfigTester(
            self, config_class=DehvfConfig, has_text_modality=False, common_properties=["num_groups"]
        )
        # The tests ask these tables what a class computes
        for table, name in (
            ("MODEL", "DehvfModel"),
            ("MODEL_FOR_IMAGE_TEXT_TO_TEXT", "DehvfForConditionalGeneration"),
        ):
            self.enterContext(patch.dict(getattr(modeling_auto, f"{table}_MAPPING_NAMES"), dehvf=name))
        for model_class in self.all_model_classes:
            self.enterContext(patch.object(model_class, "save_pretrained", save_with_bases))

    def test_config(self):
        self.config_tester.run_common_tests()


@except_tests
class DehvfProcessorTest(test_processing_common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = DehvfProcessor
    _setup_image_processor = staticmethod(tiny_image_processor)
    _setup_tokenizer = staticmethod(tiny_tokenizer)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        file = f"{cls.tmpdirname}/image.png"  # in place of those from the Hub
        Image.new("RGB", (40, 30), "red").save(file)
        cls.enterClassContext(patch.object(test_processing_common, "url_to_local_path", lambda url: file))
        cls.enterClassContext(patch.dict(test_processing_common.MODALITY_INPUT_DATA, images=[file, file]))

"""The shipped files with the oldest and the newest release of transformers that they support."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from PIL import Image
from registry import OLDEST_TRANSFORMERS, oldest_release
from tiny import DEHVF_SIZES, ROOT, save_tiny_bases, tiny_inputs, tiny_processor
from transformers import AutoConfig, AutoModelForImageTextToText

from dehvf import DehvfForConditionalGeneration


def answers(folder) -> dict[str, torch.Tensor]:
    """What a saved adapter folder gives, by each way to use it, without a single deprecated call."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, config=config, trust_remote_code=True)
        inputs, options = tiny_inputs(), {"max_new_tokens": 5, "do_sample": False}
        image = Image.new("RGB", (20, 30), "red")
        with torch.no_grad():
            memory = model.get_image_features(inputs["pixel_values"])
            text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return {
                "logits": model(**inputs).logits,
                "logits from memory": model(**text, visual_memory=memory).logits,
                "greedy": model.generate(**inputs, **options),
                "beams": model.generate(**inputs, **options, num_beams=2, num_return_sequences=2),
                **tiny_processor()(images=[image, None], text=["abc", "a"], return_tensors="pt"),
            }


@pytest.mark.slow
def test_the_oldest_release_gives_the_same_answers(tmp_path):
    try:
        release = oldest_release()
    except OSError as error:
        pytest.skip(f"the oldest release cannot be fetched: {error}")
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(*save_tiny_bases(tmp_path), **DEHVF_SIZES)
    for parameter in model.parameters():
        if parameter.requires_grad:  # new ones are silent
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapters")
    code = (
        "import sys, torch, transformers; from test_releases import answers\n"
        "torch.save((transformers.__version__, answers(sys.argv[1])), sys.argv[2])"
    )
    path = os.pathsep.join(map(str, (release, ROOT, ROOT / "tests")))
    command = [sys.executable, "-c", code, tmp_path / "adapters", tmp_path / "answers.pt"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path)
    version, expected = torch.load(tmp_path / "answers.pt")
    assert version == OLDEST_TRANSFORMERS != transformers.__version__
    torch.testing.assert_close(answers(tmp_path / "adapters"), expected, rtol=0, atol=1e-6)

"""TRL's SFTTrainer and the pipelines of transformers take model and processor as they are."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import DEHVF_SIZES, DehvfForConditionalGeneration, save_tiny_bases, tiny_model, tiny_processor
from transformers import pipeline
from transformers.pipelines import any_to_any


IMAGE = Image.new("RGB", (20, 30), "red")


def messages(question: str, with_image: bool) -> list[dict]:
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    answer = [{"type": "text", "text": "me"}] if with_image else "me"
    return [
        {"role": "user", "content": parts if with_image else question},
        {"role": "assistant", "content": answer},
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own
@pytest.mark.parametrize("assistant_only", [False, True], ids=["all", "assistant only"])
@pytest.mark.parametrize("with_image", [False, True], ids=["text", "images"])
def test_trl_trains_on_chats(with_image, assistant_only, tmp_path):
    trl = pytest.importorskip("trl")
    rows = [{"messages": messages(question, with_image)} for question in ("abc", "de")]
    rows = [{**row, "images": [IMAGE]} for row in rows] if with_image else rows
    model, processor = tiny_model(), tiny_processor()
    arguments = trl.SFTConfig(
        str(tmp_path),
        assistant_only_loss=assistant_only,
        per_device_train_batch_size=2,
        max_steps=1,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    learned = ["".join(processor.tokenizer.convert_ids_to_tokens(row[row >= 0])) for row in batch["labels"]]
    whole = [f"<s>{question}\nResponse: me</s>\n" for question in ("abc", "de")]
    assert sorted(learned) == ([" me</s>"] * 2 if assistant_only else whole)
    assert ("pixel_values" in batch) == with_image
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer.train()
    changed = {name for name, value in before.items() if not torch.equal(model.get_parameter(name), value)}
    # Softmax takes no notice of a bias that all keys share, so its gradient is zero but for rounding
    expected = {name for name in before if not name.endswith("k_proj.bias")}
    if not with_image:  # the position embeddings of the memory slots are all there is to learn
        expected = {name for name in expected if "memory_slots" in name}
    assert expected <= changed <= (set(before) if with_image else expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_trl_trains_on_rewards_with_a_reference_model(name, tmp_path):
    trl = pytest.importorskip("trl")
    saved = str(tmp_path / "adapter")
    sizes = {**DEHVF_SIZES, "memory_dropout": 0.0, "vision_adapter_dropout": 0.0}
    new = DehvfForConditionalGeneration.from_vision_text_pretrained(*save_tiny_bases(tmp_path), **sizes)
    new.save_pretrained(saved)
    model = DehvfForConditionalGeneration.from_pretrained(saved)
    assert model.config.name_or_path == saved
    rows = [{"prompt": [{"role": "user", "content": question}], "image": IMAGE} for question in ("abc", "de")]
    arguments = getattr(trl, f"{name}Config")(
        str(tmp_path / "run"),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=3,
        max_steps=1,
        beta=0.1,
        model_init_kwargs={"trust_remote_code": True},
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model,
        reward_funcs=lambda completions, **_: [float(index) for index in range(len(completions))],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_processor(),
    )
    trainer.train()
    assert next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipelines_answer_chats_and_plain_questions(task, tmp_path, monkeypatch):
    monkeypatch.setattr(any_to_any, "requires_backends", lambda *_: None)  # torchvision, for videos
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(*save_tiny_bases(tmp_path), **DEHVF_SIZES)
    model.save_pretrained(tmp_path / "adapter")
    answer = pipeline(task, str(tmp_path / "adapter"), trust_remote_code=True)
    options = {"max_new_tokens": 3, "return_full_text": False}
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "abc"}]
    chat = [{"role": "user", "content": content}]
    inputs = answer.processor(images=IMAGE, text="abc\nResponse:", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=3)[0, inputs["input_ids"].shape[1] :]
    expected = answer.processor.decode(tokens, skip_special_tokens=True)
    assert answer(text=chat, **options)[0]["generated_text"] == expected
    assert answer(images=IMAGE, text="abc\nResponse:", **options)[0]["generated_text"] == expected
    assert [out[0]["generated_text"] for out in answer(text=[chat, chat], batch_size=2, **options)] == [expected] * 2

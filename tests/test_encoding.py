"""Texts as token ids, with tokenizers and chat templates of each kind."""

import types
from unittest.mock import MagicMock

import datasets
import numpy as np
import pytest
import torch
from tiny import ROOT, tiny_image_processor, tiny_inputs, tiny_model, tiny_processor, tiny_text_config
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, CTRLTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.trainer_utils import PredictionOutput

from dehvf import DehvfProcessor
from tasks import vqa
from training.arguments import DehvfTrainingArguments
from training.data import Collator
from training.encoding import RowEncoder
from training.models import check_tokenizer, end_at_turns
from training.results import make_records
from training.trainer import AnswerTrainer


TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
CHATML = (
    f"{{% for message in messages %}}{TURN}{{% endfor %}}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRICT = (  # as LLaMA-2: no end of a user's turn, and no role but these two
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no role but user and assistant') }}{% endif %}{% endfor %}"
)
# Earlier answers are left out, as reasoning is by some templates
FORGETFUL = (
    "{% for message in messages %}{% if message['role'] != 'assistant' or loop.last %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEXTS = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
IM_END = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}


def train(kind: str) -> Tokenizer:
    """A tokenizer with 400 tokens, split into words as GPT-2, Qwen or LLaMA do, or of the kind that XGLM has."""
    tokenizer, letters = Tokenizer(models.BPE()), ["\n", *map(chr, range(32, 127))]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
    if kind in ("llama", "unigram"):
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        digits = pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
        tokenizer.pre_tokenizer = words if kind == "gpt2" else pre_tokenizers.Sequence([digits, words])
        tokenizer.decoder, letters = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 400, "special_tokens": ["<s>", "</s>"], "initial_alphabet": letters}
    trainer = trainers.UnigramTrainer(**options) if kind == "unigram" else trainers.BpeTrainer(**options)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def make_processor(
    kind: str, bos=False, appends_eos=False, trims_offsets=False, template=None, **special
) -> DehvfProcessor:
    tokenizer, added = train(kind), [("<s>", 0), ("</s>", 1)]
    single = f"{'<s> ' if bos else ''}$A{' </s>' if appends_eos else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=added)
    if trims_offsets:  # the place of a token does not include its space
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    special = {"eos_token": "</s>", **({"bos_token": "<s>"} if bos else {}), **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokenizer.chat_template = template
    return DehvfProcessor(tiny_image_processor(), tokenizer)


KINDS = {
    "LLaMA, plain template": {"kind": "llama", "bos": True},
    "Unigram, plain template": {"kind": "unigram", "bos": True},  # control tokens are also pieces of its vocabulary
    "LLaMA-2 chat": {"kind": "llama", "bos": True, "template": STRICT},
    "GPT-2, without BOS and pad": {"kind": "gpt2"},
    "Qwen, ChatML": {"kind": "qwen", "template": CHATML, **IM_END},
    "GPT-2, trimmed offsets": {"kind": "gpt2", "trims_offsets": True, "template": STRICT.replace("bos_token", "''")},
    "appends EOS": {"kind": "llama", "bos": True, "appends_eos": True},
    "appends EOS, no BOS": {"kind": "gpt2", "appends_eos": True},
}


@pytest.fixture(params=KINDS)
def processor(request) -> DehvfProcessor:
    return make_processor(**KINDS[request.param])


def smollm2() -> DehvfProcessor:
    folder = ROOT / "assets" / "real" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip("`python -m assets.real_bases` makes SmolLM2")
    return DehvfProcessor(tiny_image_processor(), AutoTokenizer.from_pretrained(folder))


def make_task(**values):
    """A task in which a row is `(question, answer)`, or a list of messages."""
    task = types.SimpleNamespace(
        __name__="a task",
        ANSWER_PREFIX="",
        context=lambda row: "",
        prompt=lambda row, context: row["question"],
        answer=lambda row: row["answer"],
        options=lambda row: row.get("options"),
    )
    return types.SimpleNamespace(**{**vars(task), **values})


def encode(processor, row: dict, training: bool = True, **values) -> dict:
    class Encoder(RowEncoder):
        task = make_task(**values)

    return Encoder(make_task(), "test", processor, max_prompt_length=200, training=training)(row, 0)


def answers_of(processor, encoded: dict) -> list[str]:
    """The texts of the runs of tokens that are answers."""
    texts, run = [], []
    for token, is_answer in [*zip(encoded["input_ids"], encoded["is_answer"]), (None, False)]:
        if is_answer:
            run.append(token)
        elif run:
            texts.append(processor.tokenizer.decode(run))
            run = []
    return texts


# --- answers ---


def test_an_answer_follows_its_prompt_as_the_chat_template_renders_it(processor):
    row = {"question": "Which digit is it?", "answer": "a 7 or 12"}
    trained, evaluated = encode(processor, row), encode(processor, row, training=False)
    tokenizer, messages = processor.tokenizer, [{"role": "user", "content": row["question"]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    whole = processor.apply_chat_template([*messages, {"role": "assistant", "content": row["answer"]}])
    eos, decode = tokenizer.eos_token_id, tokenizer.decode
    assert decode(evaluated["input_ids"]).replace("<s>", "").strip() == prompt.replace("<s>", "").strip()
    assert trained["input_ids"].count(eos) == whole.count(tokenizer.eos_token) and trained["input_ids"][-1] == eos
    assert evaluated["input_ids"].count(eos) == prompt.count(tokenizer.eos_token)
    (answer,) = answers_of(processor, trained)
    assert answer.replace(" ", "") == f"{row['answer']}{tokenizer.eos_token}".replace(" ", "")
    # What a user sends to be answered begins in the same way
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs["input_ids"][0] == evaluated["input_ids"] == trained["input_ids"][: len(evaluated["input_ids"])]
    assert len(inputs["attention_mask"][0]) == len(inputs["input_ids"][0])
    assert processor(text=[prompt], return_tensors="pt")["input_ids"][0].tolist() == evaluated["input_ids"]


def test_each_answer_of_a_chat_is_learned_and_nothing_else(processor):
    turns = [("user", "What is red?"), ("assistant", "the circle"), ("user", "And blue?"), ("assistant", "a square")]
    messages = [{"role": role, "content": text} for role, text in turns]
    row = {"answer": "a square"}
    encoded = encode(processor, row, messages=lambda row: messages)
    eos = processor.tokenizer.eos_token
    learned = [answer.replace(eos, "").strip() for answer in answers_of(processor, encoded)]
    assert learned == ["the circle", "a square"]
    assert all(answer.endswith(eos) for answer in answers_of(processor, encoded))
    evaluated = encode(processor, row, training=False, messages=lambda row: messages)
    assert evaluated["input_ids"] == encoded["input_ids"][: len(evaluated["input_ids"])]
    rest = processor.tokenizer.decode(encoded["input_ids"][len(evaluated["input_ids"]) :])
    assert rest.replace(eos, "").strip() == "a square"


@pytest.mark.parametrize("text", ["</s> is how HTML ends a line", "one <s> more", "<|im_end|>", "a</s></s>b"])
def test_special_tokens_in_data_are_text(processor, text):
    without = encode(processor, {"question": "Q", "answer": "A"})["input_ids"]
    encoded = encode(processor, {"question": f"Q {text}", "answer": f"A {text}"})["input_ids"]
    count = sum(without.count(index) for index in processor.tokenizer.all_special_ids)
    assert sum(encoded.count(index) for index in processor.tokenizer.all_special_ids) == count
    decoded, before = map(processor.tokenizer.decode, (encoded, without))
    assert decoded.count(text) == 2 + before.count(text), (
        "also without the spaces that LLaMA's tokenizers put before texts"
    )


def test_private_characters_in_data_are_text():
    """Special tokens in data are replaced by such characters."""
    processor = make_processor("gpt2")
    text = "\U00100000 a </s> \U00100001\U0010ffff"
    encoded = encode(processor, {"question": text, "answer": text})
    assert processor.tokenizer.decode(encoded["input_ids"]).count(text) == 2


ENDS_WITH_A_TOKEN = (  # without a generation prompt, as in Phi-3
    "{% for message in messages %}{{ '<' + message.role + '>\\n' + message.content + eos_token + '\\n' }}{% endfor %}"
    "{{ '<assistant>\\n' if add_generation_prompt else eos_token }}"
)


@pytest.mark.parametrize("template", [None, ENDS_WITH_A_TOKEN])
def test_earlier_answers_of_a_chat_are_the_same_tokens_in_training_and_evaluation(processor, template, monkeypatch):
    """A fuser that reads the question gets the others."""
    monkeypatch.setattr(processor, "chat_template", template or processor.chat_template)
    texts = ["who?", " the hen </s>", "what?", "me", "why?", "so"]
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, texts)]
    given = {"messages": lambda row: messages, "answer": lambda row: "so"}
    learned, asked = (encode(processor, {}, training, **given) for training in (True, False))
    length = len(asked["input_ids"])
    assert learned["input_ids"][:length] == asked["input_ids"]
    assert learned["is_answer"][:length] == asked["is_answer"]
    assert len(answers_of(processor, asked)) == 2


@pytest.mark.parametrize("trims_offsets", [False, True])
def test_a_token_of_both_prompt_and_answer_is_refused(trims_offsets):
    """Its answer would begin with a token that is not learned, after a prompt that is not trained on."""
    template = CHATML.replace("assistant\\n", "assistant: ").replace("+ '\\n' + m", "+ ': ' + m")
    processor = make_processor("qwen", trims_offsets=trims_offsets, template=template, **IM_END)
    with pytest.raises(ValueError, match="Row 0 .* joins the end of the generation prompt with the beginning of the"):
        encode(processor, {"question": "?", "answer": "red"})


@pytest.mark.parametrize("name", ["bos_token", "unk_token", "sep_token"])
def test_rows_are_encoded_again_if_a_token_that_the_template_prints_has_changed(name, tmp_path, monkeypatch):
    """As in an edited tokenizer_config.json: the tokens of the vocabulary are the same."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    template = f"{{{{ {name} or 'none' }}}}: {CHATML}"
    rows, encoded = datasets.Dataset.from_list([{"question": "Why?", "answer": "so"}]), []
    for token in ("<s>", None, "</s>", "<s>"):
        processor = make_processor("gpt2", template=template, **({name: token} if token else {}))
        encoder = RowEncoder(vqa, "train", processor, 512, training=True)
        encoded.append(encoder.encode(rows)[0]["input_ids"])
        assert encoded[-1] == encoder(rows[0], 0)["input_ids"]
    assert encoded[0] == encoded[3] and len(set(map(tuple, encoded))) == 3


def test_generation_ends_where_the_chat_template_ends_an_answer(tmp_path):
    """Also if the base language model, whose tokenizer has a chat template, ends texts with another token."""
    processor, model = make_processor("qwen", template=CHATML, additional_special_tokens=["<|im_end|>"]), tiny_model()
    encoded = encode(processor, {"question": "?", "answer": "red"})
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded["input_ids"][-1] == end != processor.tokenizer.eos_token_id
    for eos, expected in ((1, [1, end]), ([1, 5], [1, 5, end]), (None, [end]), (end, end)):
        model.generation_config.eos_token_id = eos
        end_at_turns(model, processor)
        end_at_turns(model, processor)
        assert model.generation_config.eos_token_id == expected
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == end


def test_a_context_with_special_tokens_is_cut_where_it_is_too_long(processor):
    values = {"context": lambda row: "A</s> " * 100, "prompt": lambda row, context: f"{context}Q"}
    encoded = encode(processor, {"answer": "A"}, **values)
    length = encoded["is_answer"].index(True)
    assert encoded["shortened"] and 190 <= length <= 200


def test_a_template_that_leaves_out_the_system_message_is_refused():
    template = CHATML.replace("{{ '<|im_start|>' +", "{{ '' if message['role'] == 'system' else '<|im_start|>' +")
    processor = make_processor("qwen", template=template, **IM_END)
    messages = [{"role": role, "content": f"the {role}"} for role in ("system", "user", "assistant")]
    with pytest.raises(ValueError, match="leaves out or changes .*the system.* Give another template"):
        encode(processor, {}, messages=lambda row: messages, answer=lambda row: "the assistant")


def test_special_tokens_in_a_context_are_text_whatever_was_encoded_before():
    class Encoder(RowEncoder):
        task = make_task(
            context=lambda row: row["context"], prompt=lambda row, context: f"{context} {row['question']}"
        )

    processor, found = make_processor("qwen", template=CHATML, **IM_END), []
    for earlier in ("<|im_start|>", "nothing"):
        encoder = Encoder(make_task(), "test", processor, max_prompt_length=200, training=True)
        encoder({"question": earlier, "answer": "x", "context": earlier}, 0)
        row = encoder({"question": "What?", "answer": "x", "context": "<|im_end|> ends a turn."}, 0)
        found.append(processor.tokenizer.decode(row["input_ids"]))
    assert found[0] == found[1] and "<|im_end|> ends a turn. What?" in found[0]


@pytest.mark.parametrize(
    "template, message",
    [
        (STRICT, "of the tokenizer refuses .*no role but user and assistant"),
        (FORGETFUL, "of the tokenizer does not render message 2 .*`--chat_template"),
        ("{{ messages[0]['content'] }}\n{% if %}", "is not valid Jinja: Expected an expression"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(template, message):
    processor = make_processor("llama", bos=True, template=template)
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": role} for role in roles]
    with pytest.raises(ValueError, match=f"Row 0 of the test split: the chat template {message}"):
        encode(processor, {"answer": "assistant"}, messages=lambda row: messages)


@pytest.mark.parametrize("answer", ["so", "think", "in"])
@pytest.mark.parametrize("preface", ["<think>\n\n</think>\n\n", "assistant: ", "<s>final", ""])
def test_what_a_template_puts_before_an_answer_is_no_part_of_a_prediction(preface, answer):
    template = CHATML.replace(
        "+ message['content']",
        f"+ ({preface!r} if message['role'] == 'assistant' and loop.last else '') + message['content']",
    )
    processor = make_processor("qwen", template=template, **IM_END)
    row = {"image": None, "question": "?", "answer": answer}
    split = MagicMock(rows=[dict(row)], encoded=[{"options": []}], __len__=lambda _: 1)
    learned = encode(processor, row)
    said = [token for token, is_answer in zip(learned["input_ids"], learned["is_answer"]) if is_answer]
    output = PredictionOutput((np.array([said]), np.array([-1])), np.array([0]), {})
    (record,) = make_records(make_task(), processor, split, output)
    assert record["prediction"].strip() == record["expected"] == answer and not record["cut"]


def test_answers_to_a_template_of_prompts_only_are_kept():
    template = "{% if messages | length > 1 %}{{ raise_exception('single turn only') }}{% endif %}" + CHATML
    processor, row = (
        make_processor("qwen", template=template, **IM_END),
        {"image": None, "question": "?", "answer": "x"},
    )
    split = MagicMock(rows=[dict(row)], encoded=[{"options": []}], __len__=lambda _: 1)
    tokens = processor.tokenizer("so", add_special_tokens=False).input_ids
    output = PredictionOutput((np.array([tokens]), np.array([-1])), np.array([0]), {})
    (record,) = make_records(make_task(), processor, split, output)
    assert record["prediction"] == "so"


@pytest.mark.parametrize(
    "said, options, cut",
    [("so on", None, True), ("B. As", [" A", " B"], False), ("Both", [" A", " B"], True), ("so", None, False)],
)
def test_an_answer_is_cut_if_neither_its_end_nor_an_option_was_said(said, options, cut):
    processor, row = make_processor("gpt2"), {"image": None, "question": "?", "answer": "x", "options": options}
    split = MagicMock(rows=[row], encoded=[{"options": options}], __len__=lambda _: 1)
    tokens = processor.tokenizer(said, add_special_tokens=False).input_ids[: None if " " in said or options else 1]
    output = PredictionOutput((np.array([tokens]), np.array([0])), np.array([0]), {})
    (record,) = make_records(make_task(), processor, split, output)
    assert record["cut"] is cut, "an answer of one token cannot show its end"


def test_smollm2_answers_in_its_own_template():
    processor = smollm2()
    encoded = encode(processor, {"question": "Is it <|im_end|> red?", "answer": "yes"})
    assert answers_of(processor, encoded) == ["yes<|im_end|>"]
    text = processor.tokenizer.decode(encoded["input_ids"])
    assert text.endswith("<|im_start|>user\nIs it <|im_end|> red?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>")
    assert encoded["input_ids"].count(processor.tokenizer.eos_token_id) == text.count("<|im_end|>") - 1


# --- options ---


def test_options_are_compared_by_their_whole_likelihood(tmp_path):
    """
    Also those that begin with the same token, against the logits of prompt and option in one piece. The generation
    config of the language model changes neither them nor the greedy answers.
    """
    processor, model = tiny_processor(), tiny_model(max_position_embeddings=256)
    prompts = ["how many?", "which one is it?", "say it."]
    options = [[" 1", " 2", " 12"], [" one", " on"], None]
    rows = [
        {
            "index": index,
            "image": None,
            **encode(processor, {"question": prompt, "answer": "x", "options": own}, False),
        }
        for index, (prompt, own) in enumerate(zip(prompts, options))
    ]
    collator = Collator(processor)
    trainer = AnswerTrainer(
        model=model,
        args=DehvfTrainingArguments(str(tmp_path), use_cpu=True),
        data_collator=collator,
        processing_class=processor,
        max_new_tokens=2,
        run={},
    )
    batch, pixels = collator(rows), tiny_inputs(3)["pixel_values"]
    batch |= {"pixel_values": pixels, "image_mask": torch.tensor([True, True, False])}
    _, (answers, choices), index = trainer.prediction_step(model, dict(batch), False)
    model.generation_config.update(num_beams=2, repetition_penalty=5.0, max_time=0.0)
    _, again, _ = trainer.prediction_step(model, dict(batch), False)
    assert torch.equal(again[0], answers) and torch.equal(again[1], choices)
    assert model.generation_config.num_beams == 2
    for row, own, has_image, choice in zip(rows, options, (True, True, False), choices.tolist()):
        likelihoods = []
        for option in row["options"]:
            tokens = torch.tensor([row["input_ids"] + option])
            given = {"pixel_values": pixels[row["index"]][None]} if has_image else {}
            with torch.no_grad():
                logits = model(input_ids=tokens, **given).logits[0].log_softmax(-1)
            begin = len(row["input_ids"])
            likelihoods.append(sum(logits[begin - 1 + place, token] for place, token in enumerate(option)))
        assert choice == (torch.stack(likelihoods).argmax() if own else -1)
    assert index.tolist() == [0, 1, 2]


# --- a tokenizer and its model ---


def test_a_tokenizer_is_checked_against_its_model():
    tokenizer, size = make_processor("gpt2").tokenizer, 400
    check_tokenizer(tokenizer, tiny_text_config(vocab_size=size, max_position_embeddings=77))
    assert tokenizer.model_max_length == 77
    with pytest.raises(ValueError, match="it has .* tokens, more than the 77 that the language model reads"):
        encode(DehvfProcessor(tiny_image_processor(), tokenizer), {"question": "word " * 25, "answer": "A"})
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == size
    check_tokenizer(tokenizer, tiny_text_config(vocab_size=size))
    assert tokenizer.pad_token == tokenizer.eos_token, "padding is masked, so that any token does"
    with pytest.raises(ValueError, match="has 10 tokens, such as .* beyond the 390 embeddings"):
        check_tokenizer(tokenizer, tiny_text_config(vocab_size=size - 10))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token.*Set `eos_token`"):
        check_tokenizer(tokenizer, tiny_text_config(vocab_size=size))


def test_an_appended_eos_is_removed_from_all_that_a_tokenizer_returns():
    processor, texts = make_processor("llama", bos=True, appends_eos=True), ["ab", "ab cd ef"]
    options = {"return_special_tokens_mask": True, "return_offsets_mapping": True}
    inputs = processor(text=texts, **options)
    lengths = {name: [len(row) for row in inputs[name]] for name in inputs}
    assert len(lengths) > 3 and len({tuple(sizes) for sizes in lengths.values()}) == 1
    with pytest.raises(ValueError, match="appends 1 special tokens.*Leave out `padding_side`"):
        processor(text=texts, padding_side="right")


def test_a_tokenizer_without_a_fast_version_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    with pytest.raises(ValueError, match=r"\(CTRLTokenizer\) is not a fast one"):
        check_tokenizer(tokenizer, tiny_text_config())

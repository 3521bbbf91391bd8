"""Trains the two tiny frozen base models of the default recipe: `python -m assets.make_assets`, from the root.

- `assets/language_model`: a Llama of 8 layers and a byte-level BPE tokenizer, trained on text only: the facts that the
  text questions of `tasks/digits.py` require, and these questions in their prompt. Questions about a picture come
  either with word embeddings of the scene added to the hidden states (see `SceneInjector`), or with no information
  about it, so that the model learns to guess then.
- `assets/vision_model`: a CLIP vision transformer of 8 layers, trained contrastively on scenes of the train scans and
  their descriptions, as in CLIP. Two modules are only used in training: the text tower, and a linear head that
  predicts, from each patch after the third layer, what is in its corner of the picture.

Scans of the validation and test splits are only used for the figures at the end.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dehvf import bases
from tasks import digits
from tasks.scienceqa import letter


HERE = Path(__file__).parent
GRID = 4  # patches along the side of a picture
STEPS, BATCH_SIZE = 4500, 64  # of both models
FORMS = ((1, 0, 0, 0), (0.1, 0.9, 0, 0), (0.1, 0.2, 0.5, 0.2), (0.05, 0.05, 0.15, 0.75))
WORDS = [word for pool in digits.POOLS.values() for word in pool]
# Shares of the rows in % that differ from the task's: more questions that depend on the whole scene
SHARES = {"count": 3, "sum": 2, "digit by place": 4, "place by digit": 4}
NUM_INJECTED = 6  # hidden states to which a scene can be added: the embeddings and the outputs of five layers


def draw_rows(rng, size, shown):
    """
    Yields rows with the marks of their scenes. A fraction `shown` of the rows are about a scene that is added to the
    hidden states, see `SceneInjector`. Of the others, 15 % are about a picture without any information about it, and
    the rest are text questions. Some rows have an irrelevant hint.
    """
    for _ in range(size):
        is_shown, is_blind = rng.random(2) < (shown, 0.15)
        skills = digits.PICTURE_SKILLS if is_shown or is_blind else digits.TEXT_SKILLS
        shares = np.array([SHARES.get(name, share) for name, (_, share, *_) in skills.items()])
        row, marks = digits.make_row(rng, rng.choice(list(skills), p=shares / shares.sum()), rng.integers(4))
        if not row["hint"] and rng.random() < 0.3:
            row["hint"] = str(rng.choice([*digits.HINTS, *digits.LECTURES.values()]))
        yield row, marks if is_shown else []


def build_prompt(row):
    return f"{digits.prompt(row, digits.context(row))}\nResponse:"


def draw_facts(rng):
    """A context and its facts: a story and what it says; or an empty context and sums or general knowledge."""
    if rng.random() < 0.3:
        sums = [(a, b) for a in range(10) for b in range(10 - a)]
        return "", [f"{a} + {b} is {a + b}" for a, b in sums] + [f"{a + b} - {b} is {a}" for a, b in sums]
    if rng.random() < 0.3:
        *_, story = digits.ownership(rng)
        pairs = re.findall(r"(\w+) has (\d)", story)
        return story, [f"{a} is {b}" for who, number in pairs for a, b in ((who, number), (number, who))]
    tables = [things for things, *_ in digits.KNOWN.values()]
    return "", [f"{name} is {value}" for things in tables for value in things for name in things[value]]


def draw_text(rng, row, marks, progress=1.0):
    """
    The training text of a row. Training begins with the options of the letters, continues with facts and answers in
    words, and ends with letters as answers. `progress` is the fraction of training that is done.
    """
    *lines, options, response = build_prompt(row).split("\n")
    shares = FORMS[np.searchsorted((0.06, 0.2, 0.35), progress)]
    if marks:
        shares = (0, 0, 0.2, 0.8) if progress > 0.35 else (0, 0, 0.6, 0.4)
    form = rng.choice(["list", "facts", "words", "letter"], p=shares)
    if form == "list":
        listed = [f"{row['choices'][i]} is {letter(i)}" for i in rng.integers(4, size=8)]
        return f"{options}\n{response} {', '.join(listed)}."
    if form == "facts":
        story, facts = draw_facts(rng)
        return f"Context: {story or 'N/A'}\n{response} {', '.join(rng.choice(facts, 8))}."
    if form == "words" and (marks or row["skill"] in digits.TEXT_SKILLS):
        return "\n".join([*lines, response]) + f" The answer is {row['choices'][row['answer']]}. {row['solution']}"
    return f"{build_prompt(row)} {digits.answer(row)}"


def make_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    # A letter in parentheses, a word and a single digit are one piece, each with the preceding space
    pieces = pre_tokenizers.Split(Regex(r" ?\([A-Z]\)| ?\p{L}+| ?\p{N}|\s| ?[^\s\p{L}\p{N}]+"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    options = {"padding_side": "left", "model_max_length": 512, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)


def fit(parameters, rate, loss_of):
    """Trains `parameters` with AdamW, warm-up and cosine decay. `loss_of(step)` returns the loss of a batch."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, STEPS, pct_start=0.05)
    for step in range(STEPS):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step} of {STEPS}, loss {loss.item():.3f}", flush=True)


def attend_to_equals(model):
    """Initialises keys like queries, so that equal tokens attend to each other (arXiv 2305.09828)."""
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.k_proj.load_state_dict(module.q_proj.state_dict())


def attend_to_near(model):
    """
    Initialises some heads of each layer to attend by position: three heads to the token one, two and three places
    before, and one head to the last few tokens. Retrieval needs such heads, and with random initialisation they only
    develop after millions of tokens.
    """
    frequencies = model.model.rotary_emb.inv_freq
    size = 2 * len(frequencies)
    for layer in model.model.layers:
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            out.weight.data *= 0.2  # keeps the token embeddings dominant
        query, key = layer.self_attn.q_proj, layer.self_attn.k_proj
        for head, (back, strength) in enumerate(((1, 8.0), (2, 8.0), (3, 8.0), (0, 1.5))):
            rows = slice(head * size, (head + 1) * size)
            query.weight.data[rows] = key.weight.data[rows] = 0
            # The rotary embedding rotates both by an angle per position; they match at a distance of `back` tokens
            angles = back * frequencies
            query.bias.data[rows] = strength * torch.cat([angles.cos(), -angles.sin()])
            key.bias.data[rows] = strength * torch.cat([torch.ones_like(angles), torch.zeros_like(angles)])


class SceneInjector:
    """
    Adds word embeddings that describe a scene to the hidden states of a language model, without additional tokens.

    The methods that adapt a frozen model change its hidden states and rely on the model to use this information. A
    model of this size only does so if it is trained to. Only embeddings of words are added, so the model does not
    depend on pictures.
    """

    def __init__(self, model, tokenizer):
        self.embedding, self.scales = model.model.embed_tokens.weight, None
        self.words = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in WORDS]
        self.newline, self.is_ = (tokenizer.encode(text, add_special_tokens=False)[0] for text in ("\n", " is"))
        for index, module in enumerate([model.model.embed_tokens, *model.model.layers[: NUM_INJECTED - 1]]):
            module.register_forward_hook(lambda _, __, hidden, index=index: self.add(index, hidden))

    def add(self, index, hidden):
        if self.scales is None:
            return hidden
        rms = hidden.detach().pow(2).mean(-1, keepdim=True).sqrt()
        return hidden + self.scales[:, index, None, None] * rms * self.added

    def prepare(self, rng, inputs, rows):
        """Draws the vectors to add in the next forward passes, (rows, tokens, width), and their scales by layer."""
        amounts = np.zeros((*inputs.input_ids.shape, len(WORDS)), dtype=np.float32)  # of each word
        self.scales = torch.zeros(len(rows), NUM_INJECTED)
        for index, (row, marks) in enumerate(rows):
            if marks:
                start = int((inputs.attention_mask[index] == 0).sum())
                amounts[index, start:] = self.draw(rng, inputs.input_ids[index, start:].tolist(), row["skill"], marks)
                large, small = rng.uniform(0.3, 1.2), rng.uniform(0.1, 0.6, NUM_INJECTED)
                self.scales[index] = torch.tensor(small * (rng.random(NUM_INJECTED) < 0.3))
                self.scales[index, rng.integers(NUM_INJECTED)] += large
        embeddings = F.normalize(self.embedding[self.words].detach(), dim=-1) * self.embedding.shape[1] ** 0.5
        added = torch.from_numpy(amounts) @ embeddings
        self.added = added / added.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1)

    def draw(self, rng, tokens, skill, marks):
        """
        The amount of each word that is added to each token, (tokens, words): at the words that name the marks of the
        scene, in the question, or at the start of the answer.
        """
        shown = np.array([[word in mark.values() for word in WORDS] for mark in marks], dtype=np.float32)
        named = (np.array(tokens)[:, None] == self.words).astype(np.float32) @ shown.T  # tokens, marks
        amounts = np.zeros((len(tokens), len(WORDS)))
        lines = [index for index, token in enumerate(tokens) if token == self.newline]
        by_name = " by " in skill  # the question is about one mark; otherwise about all
        about, around = (shown[0] + (rng.uniform(0, most) if by_name else 1) * shown[1:].sum(0) for most in (0.6, 1))
        where = rng.choice(["names", "question", "answer"], p=(0.4, 0.3, 0.3))
        if where == "answer":
            end = tokens.index(self.is_, lines[-1]) + 1
            amounts[end - 1 if rng.random() < 0.5 else lines[-1] + 1 : end] = about
        else:
            if rng.random() < 0.5:
                amounts[: lines[0]] = around * rng.uniform(0.3, 1, (lines[0], 1))
            names = np.flatnonzero(named[: lines[-1]].any(1))
            if where == "names" and (by_name or skill.endswith("present")) and len(names):
                amounts[names] = named[names] @ shown
            else:
                amounts[np.flatnonzero(named[: lines[0], 0]) if by_name else rng.integers(2, lines[0])] = about
        if rng.random() < 0.3:
            amounts += rng.uniform(0, 0.3) * shown.sum(0)
        return amounts


def train_language_model(tokenizer):
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 8, "num_attention_heads": 8}
    options = {"max_position_embeddings": 512, "initializer_range": 0.08, "attention_bias": True}
    tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **options, **tokens))
    # The scale of the later layers' outputs, so that words remain visible in all hidden states
    model.model.embed_tokens.weight.data /= 0.08
    attend_to_equals(model)
    attend_to_near(model)
    injector = SceneInjector(model, tokenizer)
    response, is_ = tokenizer.encode("Response is", add_special_tokens=False)
    batches = []

    def loss_of(step):
        if not batches:  # sixteen batches at a time, sorted by length to reduce padding
            rows = draw_rows(rng, 16 * BATCH_SIZE, shown=0.4 if step > 0.06 * STEPS else 0)
            texts = [(draw_text(rng, *row, step / STEPS) + tokenizer.eos_token, row) for row in rows]
            texts.sort(key=lambda text: len(text[0].split()))
            batches.extend(texts[BATCH_SIZE * i : BATCH_SIZE * (i + 1)] for i in rng.permutation(16))
        texts, rows = zip(*batches.pop())
        inputs = tokenizer(list(texts), return_tensors="pt", padding=True, return_token_type_ids=False)
        injector.prepare(rng, inputs, rows)
        logits, targets = model(**inputs).logits[:, :-1], inputs.input_ids[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        # The token after "is" in the response is the answer, one token of fifty, so it has twenty times the weight
        answers = (targets == response).cumsum(1) * (inputs.input_ids[:, :-1] == is_)
        weights = (0.05 + answers) * (targets != tokenizer.pad_token_id)
        return (weights * losses).sum() / weights.sum()

    fit(model.parameters(), 2e-3, loss_of)
    return model.eval(), injector


@torch.no_grad()
def language_accuracy(model, injector, tokenizer, rows):
    """The fraction of rows whose correct letter the model gives. `rows` are pairs of a row and its marks."""
    rng, right = np.random.default_rng(3), 0
    for start in range(0, len(rows), 250):
        part = rows[start : start + 250]
        texts = [build_prompt(row) + digits.ANSWER_PREFIX for row, _ in part]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        injector.prepare(rng, inputs, part)
        letters = tokenizer.batch_decode(model(**inputs).logits[:, -1:].argmax(-1))
        right += sum(given == f" {letter(row['answer'])}" for given, (row, _) in zip(letters, part))
    return right / len(rows)


class TextTower(nn.Module):
    def __init__(self, vocabulary, width=128, out=64):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(128, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, out)

    def forward(self, input_ids, attention_mask):
        hidden = self.embed(input_ids) + self.position.weight[: input_ids.shape[1]]
        hidden = self.encoder(hidden, src_key_padding_mask=attention_mask == 0)
        return self.out((hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


NOTHING = {"digit": "", "colour": ""}


def draw_scenes(rng, size, scans):
    """`size` scenes: pictures (size, 3, 64, 64), descriptions, and digit and colour in each corner (size, 4, 2)."""
    scenes = [digits.draw_marks(rng, rng.permutation(10), rng.integers(1, 5)) for _ in range(size)]
    pictures = np.stack([digits.render(rng, marks, scans) for marks in scenes])
    corners = [{mark["place"]: mark for mark in marks} for marks in scenes]
    names = {name: ("", *digits.POOLS[name]) for name in NOTHING}
    labels = [
        [[names[name].index(marks.get(place, NOTHING)[name]) for name in NOTHING] for place in digits.PLACES]
        for marks in corners
    ]
    return torch.from_numpy(pictures).movedim(-1, 1), [digits.describe(rng, m) for m in scenes], torch.tensor(labels)


class VisionTrainer(nn.Module):
    """The vision model with the modules that are only used in its training."""

    def __init__(self, tokenizer, processor):
        super().__init__()
        self.tokenizer = tokenizer
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
        images = {"image_size": digits.SIDE, "patch_size": digits.SIDE // GRID}
        self.vision = CLIPVisionModel(CLIPVisionConfig(initializer_factor=2.0, **sizes, **images))
        attend_to_equals(self.vision)
        # Random Fourier features of row and column, so that close patches have similar embeddings
        row_column = torch.cartesian_prod(*[torch.arange(GRID) * 8 / GRID] * 2)
        features = torch.cos(row_column @ torch.randn(2, 128) / 2 + 2 * torch.pi * torch.rand(128))
        self.vision.embeddings.position_embedding.weight.data[1:] = features / 2
        self.picture_out = nn.Linear(128, 64)
        self.text_tower = TextTower(len(tokenizer))
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.head = nn.Linear(128, 11 + 9)
        # patch number -> corner number, both row-major
        side = torch.arange(GRID) // (GRID // 2)
        self.corner = (2 * side[:, None] + side).flatten()

    def forward(self, pictures, captions, labels):
        """Contrastive loss, loss of the head, and the accuracies of matched captions and of digits and colours."""
        pixels = (pictures / 255 - self.mean) / self.std
        outputs = self.vision(pixels, output_hidden_states=True)
        text = self.tokenizer(captions, return_tensors="pt", padding=True, padding_side="right")
        text = F.normalize(self.text_tower(text.input_ids, text.attention_mask), dim=-1)
        picture = F.normalize(self.picture_out(outputs.pooler_output), dim=-1)
        logits = self.scale.exp() * picture @ text.T
        same = torch.arange(len(logits))
        contrastive = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

        # One head for all layers from the third on, so that mixtures of layers encode the same information
        layers = [self.vision.post_layernorm(hidden[:, 1:]) for hidden in outputs.hidden_states[3:]]
        digit, colour = self.head(torch.stack(layers)).movedim(-1, 1).split([11, 9], dim=1)  # layers, classes, ...
        wanted = labels[:, self.corner].expand(len(layers), -1, -1, -1)
        head = 2 * F.cross_entropy(digit, wanted[..., 0]) + F.cross_entropy(colour, wanted[..., 1])
        # The accuracy is that of the penultimate layer, which all language layers read
        digit, colour, wanted = digit[-2].argmax(0), colour[-2].argmax(0), wanted[-2]
        accuracies = (logits.argmax(1) == same, digit == wanted[..., 0], colour == wanted[..., 1])
        return contrastive, head, [x.float().mean().item() for x in accuracies]


def train_vision_model(tokenizer, processor):
    torch.manual_seed(0)
    rng = np.random.default_rng(2)
    trainer = VisionTrainer(tokenizer, processor)

    def loss_of(step):
        contrastive, head, accuracies = trainer(*draw_scenes(rng, BATCH_SIZE, digits.scans("train")))
        if step % 50 == 0:
            print(contrastive.item(), head.item(), accuracies)
        return contrastive + head

    fit(trainer.parameters(), 1e-3, loss_of)
    return trainer.eval()


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    start = time.time()
    rng = np.random.default_rng(0)
    corpus = draw_rows(rng, 20000, shown=0.5)
    tokenizer = make_tokenizer(f"{build_prompt(row)} {digits.answer(row)}" for row, _ in corpus)
    language_model, injector = train_language_model(tokenizer)
    side = {"height": digits.SIDE, "width": digits.SIDE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": digits.SIDE}, crop_size=side)
    trainer = train_vision_model(tokenizer, processor)
    seconds = time.time() - start

    for model, parts in ((language_model, tokenizer), (trainer.vision, processor)):
        folder = HERE / ("language_model" if parts is tokenizer else "vision_model")
        bases.save_base(model, folder, is_main_process=True)
        parts.save_pretrained(folder)

    texts = list(draw_rows(rng, 1000, shown=0))
    scenes = list(draw_rows(rng, 1000, shown=1))
    with torch.no_grad():
        matched, digit, colour = trainer(*draw_scenes(rng, 256, digits.scans("test")))[2]
    figures = {
        "bytes": sum(file.stat().st_size for file in HERE.glob("*_model/*")),
        "parameters": language_model.num_parameters() + trainer.vision.num_parameters(),
        "seconds": round(seconds),
        "text questions": language_accuracy(language_model, injector, tokenizer, texts),
        "scenes shown": language_accuracy(language_model, injector, tokenizer, scenes),
        "scenes not shown": language_accuracy(language_model, injector, tokenizer, [(row, []) for row, _ in scenes]),
        "matched captions of 256": matched,
        "patches' digits": digit,
        "patches' colours": colour,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

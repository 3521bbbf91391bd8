"""Makes the two tiny frozen backbones of the default recipe: `python -m assets.make_assets`, from the root.

- `assets/language_model`: a Llama of 8 layers and a byte-level BPE tokenizer, trained on words alone: what is to be
  known for the text questions of `tasks/digits.py`, and those questions in their prompt. Questions about a picture it
  reads either with the scene told by words that are added to its hidden states (see `Teller`), or with nothing, and
  learns that then it cannot know.
- `assets/vision_model`: a CLIP vision transformer of 8 layers, trained on scenes of the train scans against their
  description in words, as in CLIP. Two parts help and are thrown away: the text tower, and a linear head by which each
  patch, from the third layer on, tells what stands in its corner of the picture.

Nothing here reads a scan of the validation or test split but for the figures at the end.
"""

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

from tasks import digits
from tasks.scienceqa import letter


HERE = Path(__file__).parent
GRID = 4  # patches along a side of a picture
FORMS = ((1, 0, 0, 0), (0.1, 0.9, 0, 0), (0.1, 0.2, 0.5, 0.2), (0.05, 0.05, 0.15, 0.75))
WORDS = [word for pool in digits.POOLS.values() for word in pool]
# Shares of the rows in % other than the task's: more of what takes a whole scene
SHARES = {"count": 3, "sum": 2, "digit by place": 4, "place by digit": 4}
TOLD_LAYERS = 6  # of the states before the layers, how many are told something: the embeddings and five more


def draw_rows(rng, size, shown):
    """
    Rows and the marks of their scenes. `shown` of the rows are about a scene that the model is told of, see `Teller`,
    others are text-only, some of them with a hint that does not matter, and 15 % of those ask about a picture that is
    not there: from them the model learns that it cannot know.
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
    """A context and what is true in it: of a story what it tells; with none, sums and what is known by heart."""
    if rng.random() < 0.3:
        sums = [(a, b) for a in range(10) for b in range(10 - a)]
        return "", [f"{a} + {b} is {a + b}" for a, b in sums] + [f"{a + b} - {b} is {a}" for a, b in sums]
    if rng.random() < 0.3:
        *_, told = digits.ownership(rng)
        pairs = re.findall(r"(\w+) has (\d)", told)
        return told, [f"{a} is {b}" for who, number in pairs for a, b in ((who, number), (number, who))]
    tables = [things for things, *_ in digits.KNOWN.values()]
    return "", [f"{name} is {value}" for things in tables for value in things for name in things[value]]


def draw_text(rng, row, marks, progress=1.0):
    """
    A row with its answer. Training begins with what the letters stand for, goes on to facts and to answers in words,
    and ends with the letter as the answer.
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
        told, facts = draw_facts(rng)
        return f"Context: {told or 'N/A'}\n{response} {', '.join(rng.choice(facts, 8))}."
    if form == "words" and (marks or row["skill"] in digits.TEXT_SKILLS):
        return "\n".join([*lines, response]) + f" The answer is {row['choices'][row['answer']]}. {row['solution']}"
    return f"{build_prompt(row)} {digits.answer(row)}"


def make_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    # A letter in brackets, a word or a single digit, each with the blank before it, is one piece.
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


def fit(parameters, steps, rate, loss_of):
    """AdamW with warm-up and cosine decay; `loss_of(step)` gives the loss of a batch."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} of {steps}, loss {loss.item():.3f}", flush=True)


def attend_to_equals(model):
    """Starts keys as queries, so that like attends to like: attention is learned much sooner (arXiv 2305.09828)."""
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.k_proj.load_state_dict(module.q_proj.state_dict())


def attend_to_near(model, backs=(1, 2, 3), sharp=8.0, wide=1.5):
    """
    Starts some heads of each layer by place: one head looks one token back, one two, one three, one at the last few.
    Looking a thing up takes such a step, which from a random start is found only after millions of tokens.
    """
    frequencies = model.model.rotary_emb.inv_freq
    size = 2 * len(frequencies)
    for layer in model.model.layers:
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            out.weight.data *= 0.2  # or the tokens themselves would drown
        query, key = layer.self_attn.q_proj, layer.self_attn.k_proj
        for head, (back, strength) in enumerate([*((back, sharp) for back in backs), (0, wide)]):
            rows = slice(head * size, (head + 1) * size)
            query.weight.data[rows] = key.weight.data[rows] = 0
            # The rotary embedding turns the two by one angle per token: these agree `back` tokens apart.
            angles = back * frequencies
            query.bias.data[rows] = strength * torch.cat([angles.cos(), -angles.sin()])
            key.bias.data[rows] = strength * torch.cat([torch.ones_like(angles), torch.zeros_like(angles)])


class Teller:
    """
    Tells a language model of scenes by adding words to its hidden states, not by giving it more to read.

    Whatever adapts a frozen model changes its hidden states and relies on the model to take what is added as said.
    A model this small does only what its training asked for, so this is asked for too. What is added are the
    embeddings of words: nothing here has seen a picture.
    """

    def __init__(self, model, tokenizer):
        self.embedding, self.amounts = model.model.embed_tokens.weight, None
        self.words = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in WORDS]
        self.newline, self.is_ = (tokenizer.encode(text, add_special_tokens=False)[0] for text in ("\n", " is"))
        for index, module in enumerate([model.model.embed_tokens, *model.model.layers[: TOLD_LAYERS - 1]]):
            module.register_forward_hook(lambda _, __, hidden, index=index: self.add(index, hidden))

    def add(self, index, hidden):
        if self.amounts is None:
            return hidden
        loudness = hidden.detach().pow(2).mean(-1, keepdim=True).sqrt()
        return hidden + self.amounts[:, index, None, None] * loudness * self.told

    def prepare(self, rng, inputs, rows):
        """For the next forward passes: what is told to each token, (rows, tokens, width), and how loud by layer."""
        told = np.zeros((*inputs.input_ids.shape, len(WORDS)), dtype=np.float32)
        self.amounts = torch.zeros(len(rows), TOLD_LAYERS)
        for index, (row, marks) in enumerate(rows):
            if marks:
                start = int((inputs.attention_mask[index] == 0).sum())
                told[index, start:] = self.draw(rng, inputs.input_ids[index, start:].tolist(), row["skill"], marks)
                loud, quiet = rng.uniform(0.3, 1.2), rng.uniform(0.1, 0.6, TOLD_LAYERS)
                self.amounts[index] = torch.tensor(quiet * (rng.random(TOLD_LAYERS) < 0.3))
                self.amounts[index, rng.integers(TOLD_LAYERS)] += loud
        embeddings = F.normalize(self.embedding[self.words].detach(), dim=-1) * self.embedding.shape[1] ** 0.5
        told = torch.from_numpy(told) @ embeddings
        self.told = told / told.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1)

    def draw(self, rng, tokens, skill, marks):
        """The scene, told at the words that name its marks, or in the question, or where the answer is begun."""
        shown = np.array([[word in mark.values() for word in WORDS] for mark in marks], dtype=np.float32)
        named = (np.array(tokens)[:, None] == self.words).astype(np.float32) @ shown.T  # tokens, marks
        told = np.zeros((len(tokens), len(WORDS)))
        lines = [index for index, token in enumerate(tokens) if token == self.newline]
        by_name = " by " in skill  # of one mark, or else of all
        about, around = (shown[0] + (rng.uniform(0, most) if by_name else 1) * shown[1:].sum(0) for most in (0.6, 1))
        where = rng.choice(["names", "question", "answer"], p=(0.4, 0.3, 0.3))
        if where == "answer":
            end = tokens.index(self.is_, lines[-1]) + 1
            told[end - 1 if rng.random() < 0.5 else lines[-1] + 1 : end] = about
        else:
            if rng.random() < 0.5:
                told[: lines[0]] = around * rng.uniform(0.3, 1, (lines[0], 1))
            names = np.flatnonzero(named[: lines[-1]].any(1))
            if where == "names" and (by_name or skill.endswith("present")) and len(names):
                told[names] = named[names] @ shown
            else:
                told[np.flatnonzero(named[: lines[0], 0]) if by_name else rng.integers(2, lines[0])] = about
        if rng.random() < 0.3:
            told += rng.uniform(0, 0.3) * shown.sum(0)
        return told


def train_language_model(tokenizer, steps=4500, batch=64):
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 8, "num_attention_heads": 8}
    options = {"max_position_embeddings": 512, "initializer_range": 0.08, "attention_bias": True}
    tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **options, **tokens))
    # As loud as what the layers add later, so that a word is still there to be seen in all of them
    model.model.embed_tokens.weight.data /= 0.08
    attend_to_equals(model)
    attend_to_near(model)
    teller = Teller(model, tokenizer)
    response, is_ = tokenizer.encode("Response is", add_special_tokens=False)
    batches = []

    def loss_of(step):
        if not batches:  # sixteen at a time, sorted by length, so that little is padding
            rows = draw_rows(rng, 16 * batch, shown=0.4 if step > 0.06 * steps else 0)
            texts = [(draw_text(rng, *row, step / steps) + tokenizer.eos_token, row) for row in rows]
            texts.sort(key=lambda text: len(text[0].split()))
            batches.extend(texts[batch * i : batch * (i + 1)] for i in rng.permutation(16))
        texts, rows = zip(*batches.pop())
        inputs = tokenizer(list(texts), return_tensors="pt", padding=True, return_token_type_ids=False)
        teller.prepare(rng, inputs, rows)
        logits, targets = model(**inputs).logits[:, :-1], inputs.input_ids[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        # What "is" is followed by in a response is what was asked for, and one token of fifty: it counts twenty times.
        answers = (targets == response).cumsum(1) * (inputs.input_ids[:, :-1] == is_)
        weights = (0.05 + answers) * (targets != tokenizer.pad_token_id)
        return (weights * losses).sum() / weights.sum()

    fit(model.parameters(), steps, 2e-3, loss_of)
    return model.eval(), teller


@torch.no_grad()
def language_accuracy(model, teller, tokenizer, rows):
    rng, right = np.random.default_rng(3), 0
    for start in range(0, len(rows), 250):
        part = rows[start : start + 250]
        texts = [build_prompt(row) + digits.ANSWER_PREFIX for row, _ in part]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        teller.prepare(rng, inputs, part)
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
    """`size` scenes as pictures (size, 3, 64, 64), descriptions, and what stands in each corner (size, 4, 2)."""
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
    """The vision model with what only its training needs."""

    def __init__(self, tokenizer, processor):
        super().__init__()
        self.tokenizer = tokenizer
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
        images = {"image_size": digits.SIDE, "patch_size": digits.SIDE // GRID}
        self.vision = CLIPVisionModel(CLIPVisionConfig(initializer_factor=2.0, **sizes, **images))
        attend_to_equals(self.vision)
        # Random Fourier features of row and column: the nearer two patches, the more alike their embeddings.
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
        """Contrastive and head losses, and the share of pictures and of corners that are told right."""
        pixels = (pictures / 255 - self.mean) / self.std
        outputs = self.vision(pixels, output_hidden_states=True)
        text = self.tokenizer(captions, return_tensors="pt", padding=True, padding_side="right")
        text = F.normalize(self.text_tower(text.input_ids, text.attention_mask), dim=-1)
        picture = F.normalize(self.picture_out(outputs.pooler_output), dim=-1)
        logits = self.scale.exp() * picture @ text.T
        same = torch.arange(len(logits))
        contrastive = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

        # The same head for all layers from the third on: what a patch tells stands in one place, whoever mixes them
        layers = [self.vision.post_layernorm(hidden[:, 1:]) for hidden in outputs.hidden_states[3:]]
        digit, colour = self.head(torch.stack(layers)).movedim(-1, 1).split([11, 9], dim=1)  # layers, classes, ...
        wanted = labels[:, self.corner].expand(len(layers), -1, -1, -1)
        told = 2 * F.cross_entropy(digit, wanted[..., 0]) + F.cross_entropy(colour, wanted[..., 1])
        # Of the penultimate layer, which all language layers read
        digit, colour, wanted = digit[-2].argmax(0), colour[-2].argmax(0), wanted[-2]
        accuracies = (logits.argmax(1) == same, digit == wanted[..., 0], colour == wanted[..., 1])
        return contrastive, told, [x.float().mean().item() for x in accuracies]


def train_vision_model(tokenizer, processor, steps=4500, batch=64):
    torch.manual_seed(0)
    rng = np.random.default_rng(2)
    trainer = VisionTrainer(tokenizer, processor)

    def loss_of(step):
        contrastive, told, accuracies = trainer(*draw_scenes(rng, batch, digits.scans("train")))
        if step % 50 == 0:
            print(contrastive.item(), told.item(), accuracies)
        return contrastive + told

    fit(trainer.parameters(), steps, 1e-3, loss_of)
    return trainer.eval()


def main():
    start = time.time()
    rng = np.random.default_rng(0)
    corpus = draw_rows(rng, 20000, shown=0.5)
    tokenizer = make_tokenizer(f"{build_prompt(row)} {digits.answer(row)}" for row, _ in corpus)
    language_model, teller = train_language_model(tokenizer)
    side = {"height": digits.SIDE, "width": digits.SIDE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": digits.SIDE}, crop_size=side)
    trainer = train_vision_model(tokenizer, processor)
    seconds = time.time() - start

    for model, parts in ((language_model, tokenizer), (trainer.vision, processor)):
        folder = HERE / ("language_model" if parts is tokenizer else "vision_model")
        model.save_pretrained(folder)
        parts.save_pretrained(folder)

    texts = list(draw_rows(rng, 1000, shown=0))
    scenes = list(draw_rows(rng, 1000, shown=1))
    with torch.no_grad():
        matched, digit, colour = trainer(*draw_scenes(rng, 256, digits.scans("test")))[2]
    figures = {
        "bytes": sum(file.stat().st_size for file in HERE.glob("*_model/*")),
        "parameters": language_model.num_parameters() + trainer.vision.num_parameters(),
        "seconds": round(seconds),
        "text questions": language_accuracy(language_model, teller, tokenizer, texts),
        "scenes told": language_accuracy(language_model, teller, tokenizer, scenes),
        "scenes not told": language_accuracy(language_model, teller, tokenizer, [(row, []) for row, _ in scenes]),
        "matched captions of 256": matched,
        "patches' digits": digit,
        "patches' colours": colour,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

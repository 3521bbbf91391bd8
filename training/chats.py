# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Renders chats with the chat template of the tokenizer and encodes them into token ids."""

import os
import re
import reprlib

from jinja2 import TemplateError, TemplateSyntaxError

from dehvf import processing


# One character replaces each special token that occurs in data, so that the tokenizer does not read it as a control
# token. It is from Supplementary Private Use Area-B, whose own characters in data are replaced in the same way.
STAND_INS = range(0x100000, 0x110000)
ANY_STAND_IN = f"[{chr(STAND_INS[0])}-{chr(STAND_INS[-1])}]"


def render(processor, prompt: str) -> str:
    """The chat text with `prompt` as the user's message, up to the beginning of the answer."""
    return processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)


def prints_date(processor) -> bool:
    """Whether the chat template prints the current date, so that prompts differ from day to day."""
    return "strftime_now" in str(processor.chat_template)  # which may be a dict of several


def find_left_out(messages: list[dict], text: str) -> int | None:
    """The index of the first message, other than the assistant's, whose content is not in the text of a chat."""
    contents = (None if message["role"] == "assistant" else message["content"].strip() for message in messages)
    return next((index for index, content in enumerate(contents) if content is not None and content not in text), None)


class ChatTokenizer:
    """
    Renders chats with the chat template and encodes them. Special tokens in a message are encoded as ordinary text,
    and end-of-sequence tokens that the tokenizer appends to every text are removed from prompts.
    """

    def __init__(self, processor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.special_tokens = sorted({*added, *self.tokenizer.all_special_tokens}, key=len, reverse=True)
        self.special_ids = {*self.tokenizer.convert_tokens_to_ids(self.special_tokens)}
        special = "|".join(map(re.escape, self.special_tokens)) or r"(?!)"
        self.pattern = re.compile(f"{special}|{ANY_STAND_IN}")
        self.end = re.compile(rf"\s*(?:{special})")  # of a turn
        self.num_appended = processing.num_appended_tokens(self.tokenizer)
        self.forget()

    def forget(self):
        """Forgets which texts stand-ins have replaced."""
        self.stand_ins, self.words = {}, {}  # text -> its stand-in, and the reverse

    def protect(self, text: str) -> str:
        """Replaces each special token with a stand-in character."""
        return self.pattern.sub(self._stand_in, text)

    def _stand_in(self, found: re.Match) -> str:
        if found[0] not in self.stand_ins:
            if len(self.stand_ins) == len(STAND_INS):
                raise ValueError(
                    f"the texts have more than {len(STAND_INS)} different special tokens and private-use characters. "
                    "Remove some."
                )
            stand_in = chr(STAND_INS[len(self.stand_ins)])
            self.stand_ins[found[0]], self.words[stand_in] = stand_in, found[0]
        return self.stand_ins[found[0]]

    def restore(self, text: str) -> str:
        """Reverses `protect`."""
        return re.sub(ANY_STAND_IN, lambda found: self.words[found[0]], text)

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        messages = [{**message, "content": self.protect(message["content"])} for message in messages]
        try:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error.message}") from error
        except TemplateError as error:  # for example because of an unknown role
            raise ValueError(
                f"the chat template of the tokenizer refuses {reprlib.repr(messages)}: {error}"
            ) from error
        if (index := find_left_out(messages, text)) is not None:
            raise ValueError(
                f"the chat template of the tokenizer leaves out or changes {reprlib.repr(messages[index])}. Give "
                "another template, `--chat_template plain`, or remove such messages."
            )
        return text

    def render_answers(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """
        The text of a chat up to the end of its last message, and the start and end of each of the assistant's
        messages: from the end of the generation prompt to the token that ends the turn, which is learned too.

        Raises:
            ValueError: if the chat template refuses the messages, changes the text of a message, or renders the
                messages before it differently than on their own.
        """
        text, spans, end = self.render(messages), [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], add_generation_prompt=True)
            through = text if index == len(messages) - 1 else self.render(messages[: index + 1])
            answer = self.protect(message["content"]).strip()
            place = self._find_answer(answer, messages[: index + 1], before, through)
            end = place + len(answer)
            if found := self.end.match(through, end):
                end = found.end()
            if place < 0 or not (text.startswith(through[:end]) and through.startswith(before)):
                raise ValueError(
                    f"the chat template of the tokenizer does not render message {index} ({message}) after the "
                    "messages before it, as training needs. Give another template: `--chat_template plain`."
                )
            spans.append((len(before), end))
        return text[:end], spans

    def find_answers(self, messages: list[dict], prompt: str) -> list[tuple[int, int]]:
        """
        The start and end of each of the assistant's messages in `prompt`, the text of a chat with a generation prompt
        at its end: from the end of the generation prompt before the message to the token that ends the turn.

        Raises:
            ValueError: if the chat template refuses the messages or changes the text of a message.
        """
        if all(message["role"] != "assistant" for message in messages):
            return []
        mark, marked = chr(STAND_INS[-1]), []
        for message in messages:
            if message["role"] == "assistant":
                answer = message["content"].strip()
                before, _, after = message["content"].partition(answer) if answer else ("", "", "")
                message = {**message, "content": f"{before}{mark}{answer}{mark}{after}"}
            marked.append(message)
        texts = self.render(marked, add_generation_prompt=True).split(self.protect(mark))
        if "".join(texts) != prompt:
            raise ValueError(
                "the chat template of the tokenizer changes messages of the assistant. Give another template: "
                "`--chat_template plain`."
            )
        # Without a generation prompt, some templates end with a token (Phi-3)
        without = os.path.commonprefix([prompt, self.render(messages)])
        generation_prompt, spans, place = prompt.removeprefix(without), [], 0
        for before, answer in zip(texts[:-1:2], texts[1::2]):
            place += len(before)
            # Some templates have no generation prompt
            is_found = generation_prompt and generation_prompt in before
            rest = before.rpartition(generation_prompt)[2] if is_found else before[len(before.rstrip()) :]
            begin, place = place - len(rest), place + len(answer)
            spans.append((begin, found.end() if (found := self.end.match(prompt, place)) else place))
        return spans

    def _find_answer(self, answer: str, messages: list[dict], before: str, through: str) -> int:
        """Where the last answer begins in `through`, even if the template puts the same text before it; else -1."""
        rest = through[len(before) :].lstrip()
        if rest.startswith(answer) and self.end.match(rest, len(answer)):  # there is no other text
            return len(through) - len(rest)
        mark = chr(STAND_INS[-1])
        marked = self.render([*messages[:-1], {**messages[-1], "content": mark}])
        place = marked.find(self.protect(mark), len(before))
        return place if place >= 0 and through.startswith(marked[:place] + answer) else -1

    def end_of_turn(self) -> int | None:
        """The id of the token with which the chat template ends an answer, or `None` if it is not a special token."""
        try:
            text, _ = self.render_answers([{"role": "user", "content": "?"}, {"role": "assistant", "content": "0"}])
        except ValueError:  # which is raised again for the first row, unless there is no training
            return None
        token = self.encode(text)[0][-1]
        return token if token in self.special_ids else None

    def answer_preface(self) -> str:
        """
        The decoded text that the chat template puts between the generation prompt and an answer, such as an empty
        `<think>` block. The model learns to generate it before each answer.
        """
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "0"}]
        try:
            text, before = self.render(messages), self.render(messages[:1], add_generation_prompt=True)
        except ValueError:  # a template for prompts only, with which an adapter can be evaluated but not trained
            return ""
        preface = text.removeprefix(before).partition("0")[0] if text.startswith(before) else ""
        return self.tokenizer.decode(self.tokenizer(preface, add_special_tokens=False).input_ids, True).strip()

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """
        Token ids of a rendered chat, and the start and end of each token in the text. There is one
        beginning-of-sequence token, even if the chat template contains it.
        """
        first, *others = re.split(f"({ANY_STAND_IN})", text)
        adds = not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
        encoded = self.tokenizer(first, add_special_tokens=adds, return_offsets_mapping=True)
        end = len(encoded.input_ids) - (self.num_appended if adds else 0)
        tokens, places, begin = encoded.input_ids[:end], encoded.offset_mapping[:end], len(first)
        words, pieces = [self.words[stand_in] for stand_in in others[::2]], others[1::2]
        encoded_words = self._encode_pieces(words, split_special_tokens=True)
        encoded_pieces = self._encode_pieces(pieces)
        for word, piece in zip(words, pieces):
            of_word, _ = encoded_words[word]
            if not begin:  # the text begins with it
                of_word = self.tokenizer(word, add_special_tokens=False, split_special_tokens=True).input_ids
            if {*of_word} & self.special_ids - {self.tokenizer.unk_token_id}:  # Unigram models have it as a piece
                of_letters = self._encode_pieces([*word])
                of_word = [token for letter in word for token in of_letters[letter][0]]
            of_piece, offsets = encoded_pieces[piece]
            tokens += of_word + of_piece
            places += [(begin, begin + 1)] * len(of_word)
            places += [(begin + 1 + start, begin + 1 + stop) for start, stop in offsets]
            begin += 1 + len(piece)
        return tokens, places

    def _encode_pieces(self, texts: list[str], **options) -> dict[str, tuple[list[int], list[tuple[int, int]]]]:
        """
        Token ids and offsets of pieces inside a text. SentencePiece tokenizers put a space before each text that they
        are given, so the pieces are encoded after a line break, whose tokens are removed again.
        """
        options = {"add_special_tokens": False, "return_offsets_mapping": True, **options}
        if not (texts := list(dict.fromkeys(texts))):
            return {}
        head = self.tokenizer("\n", add_special_tokens=False).input_ids
        encoded, found = self.tokenizer(["\n" + text for text in texts], **options), {}
        for text, tokens, offsets in zip(texts, encoded.input_ids, encoded.offset_mapping):
            if tokens[: len(head)] == head:
                places = [(max(0, start - 1), max(0, stop - 1)) for start, stop in offsets[len(head) :]]
                found[text] = tokens[len(head) :], places
            else:  # the line break was joined with the text
                alone = self.tokenizer(text, **options)
                found[text] = alone.input_ids, alone.offset_mapping
        return found

"""Tokenizer of a backbone: control tokens in user text stay plain text; chat templates are those of the backbone."""

import functools
import os
from collections.abc import Iterable, Sequence

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm2vec_gen_jax.common.errors import InputError, first_line
from llm2vec_gen_jax.common.files import fingerprint, has_lone_surrogate
from llm2vec_gen_jax.pretrained.chat_template import render

# Rendered in place of user text, to detect templates that truncate, strip, escape or change it. The private-use
# characters at both ends occur in no template.
_SENTINEL = '\ue000It\'s 1 < 2 & "A" {{ x }} {% y %} \\n\n  <b>Où?</b>\t\n' + 99 * "A long text. " + "\ue001"
_PROBE = "It's 3,000 m² away; don't go!\n\tdef f(x): return x**2  # Größe, déjà vu, 你好, مرحبا, Привет, 🙂"
_CHANGED_BY_CUT = 16  # largest number of tokens at the end of a cut text that the rest of the text can change
CHARS_PER_TOKEN = 64  # upper bound for ordinary text; `encode` handles longer tokens
_BATCH_CHARS = 1 << 22


def _refuses_panics(method):
    """Decorates a method of Tokenizer: raises InputError for a panic in tokenizers, which is not an Exception.

    A hostile regular expression panics when it exceeds the library's limit of steps.
    """

    @functools.wraps(method)
    def checked(self, *arguments):
        try:
            return method(self, *arguments)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise InputError(f"{self.source}: its tokenizer fails on a text ({first_line(error)})") from None

    return checked


class Tokenizer:
    """A backbone's tokenizer, without padding, truncation and compression tokens.

    hf: a transformers fast tokenizer. stop_ids: ids that end a turn, in addition to the tokenizer's end token.
    """

    def __init__(self, hf: PreTrainedTokenizerFast, stop_ids: Iterable[int] = ()) -> None:
        self.hf = hf
        self.parsing = _bare_copy(hf)
        # In user text, the literal of a control token is text, never the token.
        self.plain = _bare_copy(hf)
        self.plain.encode_special_tokens = True
        self.control = {token.content for token in hf.added_tokens_decoder.values() if token.special}
        self.eos_id = hf.eos_token_id
        self.source: str | os.PathLike[str] = hf.name_or_path  # for errors
        self.vocab_size: int | None = None  # rows of the embedding table
        self.stop_ids = sorted({*stop_ids, *([] if self.eos_id is None else [self.eos_id])})

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], stop_ids: Iterable[int] = ()) -> "Tokenizer":
        """Reads the tokenizer files of a local folder. Raises InputError if there are none."""
        try:
            # No prompt, and no code from the folder is executed.
            hf = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the libraries raise many types, bare Exception among them
            raise InputError(f"{folder}: no readable tokenizer ({first_line(error)})") from None
        if not hf.is_fast:
            raise InputError(f"{folder}: no tokenizer.json: only fast tokenizers are supported")
        return cls(hf, stop_ids)

    @functools.cached_property
    @_refuses_panics
    def identity(self) -> str:
        """16 hex digits, the same for tokenizers with the same ids for ordinary text and non-special added tokens.

        Ordinary text: words, numbers and many scripts. Added tokens: those that a text can contain, such as <think>.
        """
        ids = self.plain.encode(_PROBE).ids
        added = sorted(token.content for token in self.hf.added_tokens_decoder.values() if not token.special)
        return fingerprint([ids, [self.plain.encode(f"a {token} b").ids for token in added]] if added else ids)

    @functools.cached_property
    @_refuses_panics
    def pieces(self) -> list[str]:
        """The text of every id, with its leading space; the name of a control token; empty for an unused id."""
        ids = range(1 + max(self.parsing.get_vocab(with_added_tokens=True).values()))
        texts = self.parsing.decode_batch([[id_] for id_ in ids], skip_special_tokens=False)
        # SentencePiece decoders drop the leading space.
        spaced = [(self.parsing.id_to_token(id_) or "").startswith("▁") for id_ in ids]
        return [f" {text.removeprefix(' ')}" if space else text for space, text in zip(spaced, texts)]

    @_refuses_panics
    def check_fits(self, vocab_size: int, source: str | os.PathLike[str]) -> None:
        """Raises InputError if an id that `encode` can return has no row in the embedding table.

        Special tokens beyond the table are allowed; a chat template or a suffix that contains one is rejected later.
        """
        self.source, self.vocab_size = source, vocab_size
        vocabulary = self.parsing.get_vocab(with_added_tokens=True)
        special = {self.parsing.token_to_id(token) for token in self.control}
        always_used = {*self.plain.encode("").ids, self.eos_id if self.eos_id is not None else 0}
        largest = max({*vocabulary.values()} - special | always_used, default=0)
        if largest >= vocab_size:
            token = self.parsing.id_to_token(largest)
            raise InputError(
                f"{source}: the tokenizer has id {largest} ({token!r}), the embedding table only {vocab_size} rows: "
                "this tokenizer is not the backbone's"
            )

    def encode(self, texts: Sequence[str], max_length: int, first: int = 0, prefix: str = "") -> list[list[int]]:
        """Returns one list of ids per text, truncated to max_length, with BOS if the tokenizer adds one.

        first: index of texts[0] in error messages. prefix: prepended to every text, followed by a space.
        """
        longest = max_length * CHARS_PER_TOKEN
        # A long prefix is copied into every text: small batches limit the memory.
        step = max(1, _BATCH_CHARS // longest) if len(prefix) > CHARS_PER_TOKEN else len(texts)
        return [
            row[:max_length]
            for start in range(0, len(texts), max(step, 1))
            for row in self._encode(texts[start : start + step], max_length, longest, first + start, prefix)
        ]

    @_refuses_panics
    def _encode(self, texts, max_length, longest, first, prefix):
        def start_of(text, count):
            return (f"{prefix[:count]} {text[:count]}" if prefix else text)[:count]

        cut = [start_of(text, longest) for text in texts]
        try:
            ids = [encoding.ids for encoding in self.plain.encode_batch(cut)]
        except TypeError:  # raised by tokenizers for invalid Unicode
            bad = next(row for row, text in enumerate(cut) if has_lone_surrogate(text))
            raise InputError(f"input {first + bad} has an unpaired surrogate (not valid Unicode)") from None
        for row, text in enumerate(texts):
            total, count = len(text) + (len(prefix) + 1 if prefix else 0), longest
            # Very long tokens, such as runs of spaces. A cut inside a run changes its tokens, also before the cut.
            while count < total and len(ids[row]) < max_length + _CHANGED_BY_CUT:
                count *= 4
                ids[row] = self.plain.encode_batch([start_of(text, count)])[0].ids
        return ids

    def encode_answers(self, answers: Sequence[str], max_length: int, suffix: str) -> list[list[int]]:
        """Returns one list of ids per answer, which ends in the end token unless the answer is truncated.

        suffix: "auto" for the tokenizer's end token, otherwise a literal that is tokenized with the text, as in the
        published package: one id if it is a control token, otherwise plain text.
        """
        if suffix == "auto" and self.eos_id is None:
            raise InputError("the backbone's tokenizer has no end token: set data.answer_suffix to a literal")
        if suffix == "auto":
            end = [self.eos_id]
        elif suffix in self.control:
            end = self._in_table([self.parsing.token_to_id(suffix)], f"the suffix {suffix!r}")
        else:
            answers, end = [answer + suffix for answer in answers], []
        return [(ids + end)[:max_length] for ids in self.encode(answers, max_length)]

    @_refuses_panics
    def chat_prompt(self, question: str, max_length: int) -> list[int]:
        """Returns the ids of a user turn and the assistant header; a long question is truncated.

        The question occurs in the prompt exactly once and unchanged, even if the template strips it.
        """
        before, after = self._turn_affixes(True)
        if any(token in question for token in self.control):
            ids = self._parse(before) + self.plain.encode(question, add_special_tokens=False).ids + self._parse(after)
        else:
            ids = self._parse(before + question + after)
        if len(ids) <= max_length:
            return ids
        head, tail = self._parse(before), self._parse(after)
        budget = max_length - len(head) - len(tail)
        if budget < 1:
            raise InputError(f"max_prompt_length={max_length} leaves no tokens for the question. Increase it")
        return head + self.plain.encode(question, add_special_tokens=False).ids[:budget] + tail

    def user_turn(self) -> list[int]:
        """Returns the ids of a chat up to the user's text, so that the LLM generates a query."""
        return self._parse(self._turn_affixes(False)[0])

    @_refuses_panics
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids without control tokens."""
        return self.parsing.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer files."""
        self.hf.save_pretrained(folder)

    @_refuses_panics
    def _parse(self, text):
        return self._in_table(self.parsing.encode(text, add_special_tokens=False).ids, "the chat template")

    def _in_table(self, ids, what):
        if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
            token = self.parsing.id_to_token(max(ids))
            raise InputError(
                f"{self.source}: {what} has {token!r}, id {max(ids)}; the embedding table has {self.vocab_size} rows"
            )
        return ids

    def _turn_affixes(self, generation):
        """Returns the text that the chat template adds before and after a user turn."""
        if not self.hf.chat_template:
            raise InputError("the backbone has no chat template: synthesize and respond need an instruct model")
        before, after, reason = self._affixes[generation]
        if reason is not None:
            raise InputError(f"{self.source}: the chat template cannot be used ({reason})")
        return before, after

    @functools.cached_property
    def _affixes(self):
        """{add_generation_prompt: (before, after, None) or (None, None, reason why the template cannot be used)}."""
        try:
            template = self.hf.get_chat_template()
        except ValueError as error:  # named templates without a default
            return dict.fromkeys((False, True), (None, None, _one_line(error)))
        names = {
            name: list(map(str, token)) if isinstance(token, list) else str(token)
            for name, token in self.hf.special_tokens_map.items()
        }
        # Some templates expect a string, others a list of parts. Qwen3's has a switch for thinking.
        requests = [
            ([{"role": "user", "content": content}], {**names, "add_generation_prompt": flag, "enable_thinking": False})
            for flag in (False, True)
            for content in (_SENTINEL, [{"type": "text", "text": _SENTINEL}])
        ]
        results = render(template, requests)
        return {False: _affixes_of(results[:2]), True: _affixes_of(results[2:])}


def _affixes_of(results):
    """Returns (before, after, None) from the first result with the user's text once, otherwise (None, None, reason)."""
    reasons = []
    for text, error in results:
        count = 0 if text is None else text.count(_SENTINEL)
        if count == 1:
            before, _, after = text.partition(_SENTINEL)
            return before, after, None
        reasons.append(error or f"it {'repeats' if count else 'drops or changes'} the user's text")
    return None, None, _one_line(next((reason for reason in reasons if "repeats" in reason), reasons[0]))


def _one_line(error):
    return " ".join(str(error).split())[:300]


def _bare_copy(hf):
    """Copies the tokenizer's backend without its saved padding and truncation."""
    copy = tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy

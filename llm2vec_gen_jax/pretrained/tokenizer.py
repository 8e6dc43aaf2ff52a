"""Text to ids and back: user text is always plain text, chat templates come from the backbone."""

import functools
import json

import tokenizers
from transformers import AutoTokenizer

from llm2vec_gen_jax.common.errors import InputError, first_line
from llm2vec_gen_jax.common.files import fingerprint, has_lone_surrogate
from llm2vec_gen_jax.pretrained.chat_template import render

# What a user might write, between private-use characters, which no template contains: a template that cuts it, changes
# its letters, strips its lines or escapes it shows.
_SENTINEL = '\ue000It\'s 1 < 2 & "A" {{ x }} {% y %} \\n\n  <b>Où?</b>\t\n' + 99 * "A long text. " + "\ue001"
_PROBE = "It's 3,000 m² away; don't go!\n\tdef f(x): return x**2  # Größe, déjà vu, 你好, مرحبا, Привет, 🙂"
CHARS_PER_TOKEN = 64  # ordinary text has shorter tokens; `encode` checks
_CHARS_AT_A_TIME = 1 << 22


class Tokenizer:
    """A backbone's tokenizer. Padding, truncation and compression tokens are not its business.

    hf: a transformers fast tokenizer. stop_ids: ids that end a turn, besides the tokenizer's own end token.
    """

    def __init__(self, hf, stop_ids=()):
        self.hf = hf
        self.parsing = _bare_copy(hf)
        # Plain: the literal of a control token in a user's text is text, never the token.
        self.plain = _bare_copy(hf)
        self.plain.encode_special_tokens = True
        self.control = {token.content for token in hf.added_tokens_decoder.values() if token.special}
        self.eos_id = hf.eos_token_id
        self.source, self.vocab_size = hf.name_or_path, None  # where it is from; rows of the embedding table
        self.stop_ids = sorted({*stop_ids, *([] if self.eos_id is None else [self.eos_id])})

    @classmethod
    def from_folder(cls, folder, stop_ids=()):
        """Reads the tokenizer files of a local folder. Raises InputError when there are none."""
        try:
            # Never asks, never runs code that a folder brings along.
            hf = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the libraries raise many types, bare Exception among them
            reason = first_line(error)
            raise InputError(f"{folder}: no readable tokenizer ({reason})") from None
        if not hf.is_fast:
            raise InputError(f"{folder}: needs a tokenizer.json (a fast tokenizer)")
        return cls(hf, stop_ids)

    @functools.cached_property
    def identity(self):
        """16 hex digits: the same for tokenizers that give the same ids to ordinary text and to their added tokens.

        Ordinary: words, numbers and many scripts. Added tokens: those that a text can hold (<think>), not special ones.
        """
        ids = self.plain.encode(_PROBE).ids
        added = sorted(token.content for token in self.hf.added_tokens_decoder.values() if not token.special)
        return fingerprint([ids, [self.plain.encode(f"a {token} b").ids for token in added]] if added else ids)

    @functools.cached_property
    def pieces(self):
        """The text of every id alone, with its leading space; of a control token its name, of an unused id nothing."""
        ids = range(1 + max(self.parsing.get_vocab(with_added_tokens=True).values()))
        texts = self.parsing.decode_batch([[id_] for id_ in ids], skip_special_tokens=False)
        marked = [(self.parsing.id_to_token(id_) or "").startswith("▁") for id_ in ids]  # whose decoder drops the space
        return [f" {text.removeprefix(' ')}" if mark else text for mark, text in zip(marked, texts)]

    def check_fits(self, vocab_size, source):
        """Raises InputError if an id that a text can give, or the tokenizer itself, has no row in the embedding table.

        Special tokens beyond the table do no harm elsewhere; a chat template or a suffix that has one is refused.
        """
        self.source, self.vocab_size = source, vocab_size
        vocabulary = self.parsing.get_vocab(with_added_tokens=True)
        special = {self.parsing.token_to_id(token) for token in self.control}
        own = [*self.plain.encode("").ids, self.eos_id if self.eos_id is not None else 0]
        top = max({*vocabulary.values()} - special | {*own}, default=0)
        if top >= vocab_size:
            token = self.parsing.id_to_token(top)
            raise InputError(
                f"{source}: the tokenizer has id {top} ({token!r}), the embedding table only {vocab_size} rows: "
                "this tokenizer is not the backbone's"
            )

    def encode(self, texts, max_length, first=0, prefix=""):
        """Returns a list of id lists, each at most max_length long, with the tokenizer's own BOS if it has one.

        first: the number that errors give to texts[0]. prefix: put before every text, with one space.
        """
        longest = max_length * CHARS_PER_TOKEN
        # Only a few texts at a time are put together with a long prefix: it may be that of many texts.
        step = max(1, _CHARS_AT_A_TIME // longest) if len(prefix) > CHARS_PER_TOKEN else len(texts)
        return [
            row[:max_length]
            for start in range(0, len(texts), max(step, 1))
            for row in self._encode(texts[start : start + step], max_length, longest, first + start, prefix)
        ]

    def _encode(self, texts, max_length, longest, first, prefix):
        def start_of(text, count):
            return (f"{prefix[:count]} {text[:count]}" if prefix else text)[:count]

        cut = [start_of(text, longest) for text in texts]
        try:
            ids = [encoding.ids for encoding in self.plain.encode_batch(cut)]
        except TypeError:  # what tokenizers says of text that is not valid Unicode
            bad = next(row for row, text in enumerate(cut) if has_lone_surrogate(text))
            raise InputError(f"input {first + bad} holds half of a surrogate pair, which is no valid text") from None
        for row, text in enumerate(texts):
            whole, count = len(text) + (len(prefix) + 1 if prefix else 0), longest
            while count < whole and len(ids[row]) <= max_length:  # a text of very long tokens (runs of spaces)
                count *= 4
                ids[row] = self.plain.encode_batch([start_of(text, count)])[0].ids
        return ids

    def encode_answers(self, answers, max_length, suffix):
        """Returns id lists of answers that end in the end token; an over-long answer is cut, its end token too.

        suffix: "auto" for the tokenizer's end token, else a literal that is tokenised with the text, as the
        published package does: one id where it is a control token, plain text where it is not.
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

    def chat_prompt(self, question, max_length):
        """Returns the ids of a user turn up to where the assistant answers; a too long question is cut.

        The question is in the prompt once, unchanged, also where the template would strip it.
        """
        before, after = self._around(True)
        if any(token in question for token in self.control):
            ids = self._parse(before) + self.plain.encode(question, add_special_tokens=False).ids + self._parse(after)
        else:
            ids = self._parse(before + question + after)
        if len(ids) <= max_length:
            return ids
        head, tail = self._parse(before), self._parse(after)
        room = max_length - len(head) - len(tail)
        if room < 1:
            raise InputError(f"a prompt of {max_length} tokens has no room for a question: raise max_prompt_length")
        return head + self.plain.encode(question, add_special_tokens=False).ids[:room] + tail

    def user_turn(self):
        """Returns the ids of a chat up to where the user writes: what the LLM continues is a query."""
        return self._parse(self._around(False)[0])

    def decode(self, ids):
        """Returns the text of ids without control tokens."""
        return self.parsing.decode(list(ids), skip_special_tokens=True)

    def save(self, folder):
        """Writes the tokenizer files."""
        self.hf.save_pretrained(folder)

    def _parse(self, text):
        return self._in_table(self.parsing.encode(text, add_special_tokens=False).ids, "the chat template")

    def _in_table(self, ids, what):
        if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
            token = self.parsing.id_to_token(max(ids))
            raise InputError(
                f"{self.source}: {what} has {token!r}, id {max(ids)}; the embedding table has {self.vocab_size} rows"
            )
        return ids

    def _around(self, generation):
        """Returns what the chat template puts before and after the text of a user turn."""
        if not self.hf.chat_template:
            raise InputError("the backbone has no chat template: synthesize and respond need an instruct model")
        before, after, reason = self._turns[generation]
        if reason is not None:
            raise InputError(f"{self.source}: the chat template cannot be used ({reason})")
        return before, after

    @functools.cached_property
    def _turns(self):
        """{whether an answer follows: (before, after, None) or (None, None, why the template cannot be used)}."""
        try:
            template = self.hf.get_chat_template()
        except ValueError as error:  # named templates, none of which is the default
            return dict.fromkeys((False, True), (None, None, _one_line(error)))
        names = {
            name: list(map(str, token)) if isinstance(token, list) else str(token)
            for name, token in self.hf.special_tokens_map.items()
        }
        # Some templates take the text itself, some want it as a list of parts. Qwen3 has a switch for thinking.
        requests = [
            ([{"role": "user", "content": content}], {**names, "add_generation_prompt": flag, "enable_thinking": False})
            for flag in (False, True)
            for content in (_SENTINEL, [{"type": "text", "text": _SENTINEL}])
        ]
        results = render(template, requests)
        return {False: _around_text(results[:2]), True: _around_text(results[2:])}


def _around_text(results):
    """Returns (before, after, None) of the first result that holds the user's text once, else (None, None, reason)."""
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
    """Copies the tokenizer's backend without the padding and truncation that a folder may have saved."""
    state = json.loads(hf.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(state))

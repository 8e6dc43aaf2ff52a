"""Text to ids and back: user text is always plain text, chat templates come from the backbone."""

import functools
import json

import jinja2
import tokenizers
from transformers import AutoTokenizer

from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.files import fingerprint, is_broken

_SENTINEL = "\ue000user text\ue001"  # private-use characters: no template contains them
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
        self.stop_ids = sorted({*stop_ids, *([] if self.eos_id is None else [self.eos_id])})

    @classmethod
    def from_folder(cls, folder, stop_ids=()):
        """Reads the tokenizer files of a local folder. Raises InputError when there are none."""
        try:
            # Never asks, never runs code that a folder brings along.
            hf = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the libraries raise many types, bare Exception among them
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{folder}: no readable tokenizer ({reason})") from None
        if not hf.is_fast:
            raise InputError(f"{folder}: needs a tokenizer.json (a fast tokenizer)")
        return cls(hf, stop_ids)

    @functools.cached_property
    def identity(self):
        """16 hex digits: the same for tokenizers that give a text of words, numbers and many scripts the same ids."""
        return fingerprint(self.plain.encode(_PROBE).ids)

    @functools.cached_property
    def pieces(self):
        """The text of every id alone, with its leading space; of a control token its name, of an unused id nothing."""
        ids = range(1 + max(self.parsing.get_vocab(with_added_tokens=True).values()))
        texts = self.parsing.decode_batch([[id_] for id_ in ids], skip_special_tokens=False)
        marked = [(self.parsing.id_to_token(id_) or "").startswith("▁") for id_ in ids]  # whose decoder drops the space
        return [f" {text.removeprefix(' ')}" if mark else text for mark, text in zip(marked, texts)]

    def check_fits(self, vocab_size, source):
        """Raises InputError if an id that the tokenizer can give has no row in the embedding table."""
        top = max(self.parsing.get_vocab(with_added_tokens=True).values())
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
            bad = next(row for row, text in enumerate(cut) if is_broken(text))
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
            end = [self.parsing.token_to_id(suffix)]
        else:
            answers, end = [answer + suffix for answer in answers], []
        return [(ids + end)[:max_length] for ids in self.encode(answers, max_length)]

    def chat_prompt(self, question, max_length):
        """Returns the ids of a user turn up to where the assistant answers; a too long question is cut."""
        text = self._render(question, True)
        if any(token in question for token in self.control):
            before, after = self._around()
            ids = self._parse(before) + self.plain.encode(question, add_special_tokens=False).ids + self._parse(after)
        else:
            ids = self._parse(text)
        if len(ids) <= max_length:
            return ids
        before, after = (self._parse(part) for part in self._around())
        room = max_length - len(before) - len(after)
        if room < 1:
            raise InputError(f"a prompt of {max_length} tokens has no room for a question: raise max_prompt_length")
        return before + self.plain.encode(question, add_special_tokens=False).ids[:room] + after

    def user_turn(self):
        """Returns the ids of a chat up to where the user writes: what the LLM continues is a query."""
        return self._parse(self._render(_SENTINEL, False).partition(_SENTINEL)[0])

    def decode(self, ids):
        """Returns the text of ids without control tokens."""
        return self.parsing.decode(list(ids), skip_special_tokens=True)

    def save(self, folder):
        """Writes the tokenizer files."""
        self.hf.save_pretrained(folder)

    def _parse(self, text):
        return self.parsing.encode(text, add_special_tokens=False).ids

    def _around(self):
        before, _, after = self._render(_SENTINEL, True).partition(_SENTINEL)
        return before, after

    def _render(self, content, generation):
        if not self.hf.chat_template:
            raise InputError("the backbone has no chat template: synthesize and respond need an instruct model")
        try:
            return self.hf.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=generation,
                tokenize=False,
                enable_thinking=False,  # Qwen3; other templates have no such switch
            )
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: not even text
            raise InputError(f"{self.hf.name_or_path}: the chat template cannot be used ({error})") from None


def _bare_copy(hf):
    """Copies the tokenizer's backend without the padding and truncation that a folder may have saved."""
    state = json.loads(hf.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(state))

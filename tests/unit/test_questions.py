"""Guards questions on their way into tokens: what a user writes is text, never control; ordinary questions keep their
ids; the longest question is the longest in tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from launch.run.prompts import PromptMaker
from launch.run.samples import _longest
from perception.config import ModelConfig, TaskConfig
from perception.types import Sample
from runtime.cluster import ROOT
from tests import builders
from tests.tiny_families import ANSWERS, build

FORM = TaskConfig(
    system="You see.", template='Find "{question}" or {question}, now.', inline="Look <|{question}", again="Closer."
)
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision")
text = st.text(st.characters(codec="utf-8"), max_size=30) | st.text(" <|>/simageundk_pad", max_size=20)


@pytest.fixture(scope="module")
def makers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PromptMaker]:
    """The shipped policy's, whose tokenizer has merges, and of other families."""
    folders = {family: Path(build(family, tmp_path_factory.mktemp(family)).path) for family in FAMILIES}
    folders["shipped"] = ROOT / "assets/policy"
    return {
        name: PromptMaker(ModelConfig(path=str(path), segmenter=""), {"segment": FORM})
        for name, path in folders.items()
    }


def asked(question: str) -> Sample:
    return builders.sample(question=question)


def specials(maker: PromptMaker) -> dict[str, int]:
    return {added.content: token for token, added in maker.tokenizer.added_tokens_decoder.items() if added.special}


def chat(maker: PromptMaker, question: str, inline: bool) -> str:
    """The whole chat-formatted text; special tokens are recognised wherever they stand if it is encoded as it is."""
    words = (FORM.inline if inline else FORM.template).replace("{question}", question)
    system = {"role": "system", "content": [{"type": "text", "text": FORM.system}]}
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
    form = {"chat_template": maker.processor.chat_template or maker.tokenizer.chat_template, "tokenize": False}
    return str(maker.tokenizer.apply_chat_template([system, user], add_generation_prompt=True, **form))


@pytest.mark.parametrize("family", [*FAMILIES, "shipped"])
@settings(max_examples=40, deadline=None)
@given(question=text, inline=st.booleans())
@example(question=" ", inline=False)
@example(question=ANSWERS[0], inline=True)  # a token that was added, but is no special one
def test_ordinary_questions_keep_their_ids(
    makers: dict[str, PromptMaker], family: str, question: str, inline: bool
) -> None:
    maker = makers[family]
    if not any(mark in f"<|{question}" for mark in specials(maker)):
        assert list(maker.tokens(asked(question), inline)) == maker.tokenizer.encode(chat(maker, question, inline))


@pytest.mark.parametrize("family", [*FAMILIES, "shipped"])
@pytest.mark.parametrize("inline", [True, False])
def test_special_tokens_in_a_question_are_text(makers: dict[str, PromptMaker], family: str, inline: bool) -> None:
    maker, marks = makers[family], specials(makers[family])
    assert len(marks) >= 5
    plain = [token for token in maker.tokens(asked("x"), inline) if token in marks.values()]
    for mark in marks:
        cut = mark[: len(mark) // 2]
        for question in (mark, f"the {mark} cat", f"{mark}x", f"x {mark}", mark * 3, f"{cut}{mark}{mark[len(cut) :]}"):
            ids = maker.tokens(asked(question), inline)
            assert [token for token in ids if token in marks.values()] == plain, question
            said = maker.tokenizer.decode(ids)
            assert question.replace(" ", "") in said.replace(" ", ""), "it is still there, spelled"
            if family.startswith("qwen"):
                assert said == chat(maker, question, inline)


def test_a_special_token_across_the_seam_is_text(makers: dict[str, PromptMaker]) -> None:
    """The template ends with '<|' where the question goes on with 'image_pad|>'."""
    maker = makers["qwen3_vl"]
    ids = maker.tokens(asked("image_pad|>"), inline=True)
    assert ids.count(maker.image_token_id) == 1 and "Look <|image_pad|>" in maker.tokenizer.decode(ids)


@pytest.mark.parametrize("question", ["{question}", "{{ 1 + 1 }}", "{% raw %}", "an answer that stands nowhere else"])
def test_templates_in_a_question_are_text(makers: dict[str, PromptMaker], question: str) -> None:
    maker = makers["qwen3_vl"]
    assert f'Find "{question}" or {question}, now.' in maker.tokenizer.decode(maker.tokens(asked(question)))


# ---------------------------------------------------------------- the longest question


def _byte_level(normalizer: Any = None) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.normalizer = normalizer
    return made


def _byte_fallback(prefix: bool) -> Tokenizer:
    """Sentencepiece in kind, without a piece for the mark that spaces become: three tokens each."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "<unk>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    if prefix:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return made


def _trained() -> Tokenizer:
    made = _byte_level(normalizers.NFC())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(
        ["the red car on the left of the street", "how many people are there", "红色的汽车"] * 9, trainer
    )
    return made


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": _byte_level,
    "trained": _trained,
    "NFC": lambda: _byte_level(normalizers.NFC()),  # 3 times as long in UTF-8 at worst
    "NFKD": lambda: _byte_level(normalizers.NFKD()),  # 11 times
    "words that lengthen": lambda: _byte_level(normalizers.Replace("a", "abcdefgh")),
    "byte fallback": lambda: _byte_fallback(prefix=False),
    "byte fallback, prepended": lambda: _byte_fallback(prefix=True),
}
HARD = [
    "\u0958" * 9,
    "\U0001d160" * 8,
    "\ufdfa" * 4,
    "e\u0301" * 12,
    "漢字" * 9,
    "👩‍👩‍👧‍👦" * 3,
    "a" * 30,
    "a b " * 8,
    "x" * 60,
]


@cache
def fast(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[name]())


def longest(tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> str:
    prompts: Any = SimpleNamespace(
        tokenizer=tokenizer,
        spelled=lambda one: tokenizer.encode(one, add_special_tokens=False, split_special_tokens=True),
    )
    records = [SimpleNamespace(question=question) for question in questions]
    data: Any = SimpleNamespace(records=records, usable=lambda start: iter(questions[start:]))
    (found,) = _longest(data, prompts)
    return str(found)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=30, deadline=None)
@given(st.lists(text | st.sampled_from(HARD), min_size=1, max_size=12))
@example(HARD)
@example(["\u0958" * 9, "x" * 40])
def test_the_longest_question_is_the_longest_in_tokens(name: str, questions: list[str]) -> None:
    tokens = {one: len(fast(name).encode(one, add_special_tokens=False)) for one in questions}
    assert tokens[longest(fast(name), questions)] == max(tokens.values())


def test_a_special_token_counts_as_it_is_spelled() -> None:
    tokenizer = fast("bytes")
    tokenizer.add_tokens([AddedToken("<|image_pad|>", special=True)])
    assert longest(tokenizer, ["x" * 12, "<|image_pad|>", "y" * 11]) == "<|image_pad|>"
    assert longest(tokenizer, ["x\ud800" * 3, "y" * 8]) == "x\ud800" * 3

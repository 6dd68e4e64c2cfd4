"""Words of a vocabulary: tokenisation, vocabularies, ids."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from attrib.datasets import WordEncoder
from attrib.datasets.tokens import basic_english, build_vocabulary
from attrib.types import UserError

# basic_english as torchtext documents it: lower case, then these one after the other, then a split.
STEPS = [
    (r"\'", " '  "), (r"\"", ""), (r"\.", " . "), (r"<br \/>", " "), (r",", " , "), (r"\(", " ( "), (r"\)", " ) "),
    (r"\!", " ! "), (r"\?", " ? "), (r"\;", " "), (r"\:", " "), (r"\s+", " "),
]  # fmt: skip


def reference(text: str) -> list[str]:
    text = text.lower()
    for pattern, replacement in STEPS:
        text = re.sub(pattern, replacement, text)
    return text.split()


TEXTS = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            [*"'\".,()!?;:<>/ br\t\n\r\x0b\x1c\x85\xa0\u2028\u3000", "<br />", "<br/>", "<BR />", "Don't", "İ"]
        )
    ).map("".join),
)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ('You can\'t (really) say: "No!"', ["you", "can", "'", "t", "(", "really", ")", "say", "no", "!"]),
        ("Good.<br /><br />Bad; 9/10, why?", ["good", ".", "bad", "9/10", ",", "why", "?"]),
        ('<b"r />x', ["x"]),  # quotes go before breaks are looked for
        ("<br/>x<br / >", ["<br/>x<br", "/", ">"]),
        ("...", [".", ".", "."]),
        ("one\u3000two\x85three\u2028four", ["one", "two", "three", "four"]),
        (" \t\n", []),
        ("", []),
    ],
)
def test_basic_english_by_hand(text, tokens):
    assert basic_english(text) == tokens


@settings(max_examples=500, deadline=None)
@given(TEXTS)
def test_basic_english_equals_its_description(text):
    assert basic_english(text) == reference(text)


@pytest.mark.skipif(find_spec("torchtext") is None, reason="torchtext needs torch 2.3 (make test-torchtext)")
@settings(max_examples=500, deadline=None)
@given(TEXTS)
def test_basic_english_equals_torchtext(text):
    data = pytest.importorskip("torchtext.data.utils", exc_type=Exception)
    assert basic_english(text) == data.get_tokenizer("basic_english")(text)


def test_vocabulary_by_hand():
    texts = ["b b a", "c a. <unk> <unk> <unk>", "<pad> <pad> <pad> d"]
    assert build_vocabulary(texts) == ["<unk>", "<pad>", "a", "b", ".", "c", "d"]
    assert build_vocabulary(texts, size=3) == ["<unk>", "<pad>", "a", "b", "."]
    assert build_vocabulary(texts, min_count=2) == ["<unk>", "<pad>", "a", "b"]
    assert build_vocabulary(["A. a"], tokenizer="split") == ["<unk>", "<pad>", "A.", "a"]
    assert build_vocabulary([]) == ["<unk>", "<pad>"]
    with pytest.raises(UserError, match="at least 1, not 0 and 1"):
        build_vocabulary(texts, size=0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="abcde ' <>unkpad", max_size=12), max_size=8), st.integers(1, 6), st.randoms())
def test_vocabulary_does_not_depend_on_the_order(texts, size, random):
    found = build_vocabulary(texts, size)
    random.shuffle(texts)
    assert build_vocabulary(texts, size) == found
    assert len(found) == len(set(found)) <= size + 2
    counts = Counter(t for text in texts for t in reference(text) if t not in ("<unk>", "<pad>"))
    inside, outside = found[2:], set(counts) - set(found)
    assert all(counts[a] >= counts[b] for a in inside for b in outside)


VOCABULARY = ["<unk>", "<pad>", "good", "film", "."]


def test_words_to_ids():
    encoder = WordEncoder(VOCABULARY)
    assert (encoder.pad, encoder.unknown, encoder.mask, encoder.size) == (1, 0, 0, 5)
    encoded = encoder.encode("A Good film. <pad> <unk>")
    assert encoded.ids == [0, 2, 3, 4, 0, 0]  # what a text spells is never padding
    assert encoded.words == [0, 1, 2, 3, 4, 5]
    assert encoded.tokens == ["a", "good", "film", ".", "<pad>", "<unk>"]


def test_special_tokens_may_stand_anywhere():
    encoder = WordEncoder(["film", "<pad>", "good", "<unk>"])
    assert (encoder.pad, encoder.unknown) == (1, 3)
    assert encoder.encode("good bad film").ids == [2, 3, 0]


@pytest.mark.parametrize("text", ["", " \n", '""', "<br />;:"])
def test_a_text_without_words_is_one_unknown_word(text):
    assert WordEncoder(VOCABULARY).encode(text) == ([0], [0], ["<unk>"])


def test_long_texts_keep_their_first_words():
    encoder = WordEncoder(VOCABULARY, max_length=2)
    assert encoder.encode("good film . good") == ([2, 3], [0, 1], ["good", "film"])
    with pytest.raises(UserError, match="max_length must be at least 1, not 0"):
        WordEncoder(VOCABULARY, max_length=0)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_a_text_never_contains_padding(text):
    encoded = WordEncoder(VOCABULARY, max_length=5).encode(f"{text} <pad>")
    assert 1 not in encoded.ids
    assert 1 <= len(encoded.ids) == len(encoded.words) == len(encoded.tokens) <= 5


def test_key_is_what_decides_an_id():
    same = WordEncoder(VOCABULARY).key
    assert WordEncoder(tuple(VOCABULARY), None, "basic_english").key == same
    others = [WordEncoder(VOCABULARY, 9), WordEncoder(VOCABULARY, tokenizer="split"), WordEncoder(VOCABULARY[:-1])]
    assert len({same, *(other.key for other in others)}) == 4


def checkpoint(path, **metadata):
    save_file({"w": torch.zeros(1)}, path, {"attrib": json.dumps(metadata)})
    return str(path)


def test_vocabulary_from_files(tmp_path):
    (tmp_path / "words.txt").write_text("".join(f"{t}\n" for t in VOCABULARY))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.txt").write_text("\n".join(VOCABULARY))
    trained = checkpoint(tmp_path / "model.safetensors", vocabulary=VOCABULARY)
    files = [str(tmp_path / "words.txt"), str(tmp_path / "elsewhere" / "w.txt"), trained]
    assert {WordEncoder(f).key for f in files} == {WordEncoder(VOCABULARY).key}  # never of a path
    assert WordEncoder(trained).vocabulary == tuple(VOCABULARY)


def test_what_is_wrong_with_a_vocabulary_is_said(tmp_path):
    def refused(vocabulary, match, **fields):
        with pytest.raises(UserError, match=match):
            WordEncoder(vocabulary, **fields)

    refused(None, r"not trained yet.*attrib train train=.*model.checkpoint=")
    refused(str(tmp_path / "m.safetensors"), r"no such file: .*m.safetensors; train .*attrib train train=")
    refused(checkpoint(tmp_path / "a.safetensors"), r"a.safetensors carries no vocabulary")
    refused(checkpoint(tmp_path / "b.safetensors", vocabulary=[1]), r"b.safetensors carries no vocabulary")
    (tmp_path / "weights.pt").write_bytes(b"x")
    refused(str(tmp_path / "weights.pt"), r"weights.pt carries no vocabulary")
    (tmp_path / "c.safetensors").write_bytes(b"not one")
    refused(str(tmp_path / "c.safetensors"), r"c.safetensors cannot be read")
    (tmp_path / "latin.txt").write_bytes("<unk>\n<pad>\ncaf\xe9\n".encode("latin-1"))
    refused(str(tmp_path / "latin.txt"), r"latin.txt cannot be read: .*utf-8")
    (tmp_path / "twice.txt").write_text("<unk>\n<pad>\na\nb\na\n")
    refused(str(tmp_path / "twice.txt"), r"twice.txt has 'a' more than once")
    refused(["a", "<pad>"], "the list given has no <unk>$")
    refused([], "has no <unk> and no <pad>")
    refused(VOCABULARY, "tokenizer must be one of basic_english, split, not 'spacy'", tokenizer="spacy")

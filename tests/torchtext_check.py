"""Our tokenizer and vocabulary against the real torchtext, which needs torch 2.3: ``make test-torchtext``."""

from __future__ import annotations

import random
import string
import warnings
from collections import Counter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchtext
    from torchtext.data.utils import get_tokenizer
    from torchtext.vocab import build_vocab_from_iterator

from attrib.datasets.tokens import PAD, UNKNOWN, basic_english, build_vocabulary

PIECES = [*string.printable, "<br />", "<br/>", "''", '""', "...", "é", "ß", "İ", "\u2028", "\x85", "日本", "don't"]


def some_texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randint(0, 60))) for _ in range(count)]


def test_basic_english_is_torchtext_s():
    assert torchtext.__version__.startswith("0.18")
    theirs = get_tokenizer("basic_english")
    for text in some_texts(200_000):
        assert basic_english(text) == theirs(text), repr(text)


def test_the_vocabulary_is_torchtext_s():
    texts = [basic_english(text) for text in some_texts(3_000)]
    ours = build_vocabulary([" ".join(words) for words in texts], size=500, tokenizer="split")
    theirs = build_vocab_from_iterator(texts, specials=[UNKNOWN, PAD], max_tokens=502).get_itos()
    counts = Counter(word for words in texts for word in words)
    assert len(ours) == len(theirs) == 502
    # Where two words are equally frequent, both take the alphabet: torchtext's is that of UTF-8, as ours.
    assert [counts[w] for w in ours[2:]] == [counts[w] for w in theirs[2:]]
    assert ours == theirs

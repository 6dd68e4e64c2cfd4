"""From a text to the ids that a network reads: words of a vocabulary, or a Hugging Face tokenizer's pieces."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from attrib.keys import digest
from attrib.metadata import read_metadata, resolve
from attrib.types import UserError

UNKNOWN, PAD = "<unk>", "<pad>"

_PUNCTUATION = re.compile(r"['.,()!?]")
_BLANK = str.maketrans(";:", "  ")


def basic_english(text: str) -> list[str]:
    """Lower-case words and punctuation marks, exactly as torchtext's ``basic_english`` has them.

    Double quotes go; line breaks of HTML, semicolons and colons count as spaces; ' . , ( ) ! ? are words.
    """
    text = text.lower().replace('"', "").replace("<br />", " ").translate(_BLANK)
    return _PUNCTUATION.sub(r" \g<0> ", text).split()


TOKENIZERS: Mapping[str, Callable[[str], list[str]]] = {"basic_english": basic_english, "split": str.split}


def tokenizer_named(name: str) -> Callable[[str], list[str]]:
    """Raises UserError."""
    if name not in TOKENIZERS:
        raise UserError(f"model.input.tokenizer must be one of {', '.join(TOKENIZERS)}, not {name!r}")
    return TOKENIZERS[name]


class Encoded(NamedTuple):
    """A text of at least one token. Three lists of the same length, special tokens included.

    ids     what the network reads
    words   number 0, 1, 2 ... of the word that a token belongs to, -1 for special tokens
    tokens  what a person reads
    """

    ids: list[int]
    words: list[int]
    tokens: list[str]


class Encoder(Protocol):
    """Texts to token ids.

    key      digest of everything that an id depends on, never of a path
    pad      id of padding, which no text contains
    unknown  id of a word outside the vocabulary
    mask     id that stands for a hidden word; ``unknown`` where there is none
    size     number of ids
    """

    key: str
    pad: int
    unknown: int
    mask: int
    size: int

    def encode(self, text: str) -> Encoded: ...


def build_vocabulary(
    texts: Iterable[str], size: int = 25_000, min_count: int = 1, tokenizer: str = "basic_english"
) -> list[str]:
    """``<unk>`` (id 0), ``<pad>`` (id 1), then the ``size`` most frequent tokens; among equals the alphabet decides.

    Tokens seen less than ``min_count`` times are left out. The order of the texts does not matter.
    """
    if size < 1 or min_count < 1:
        raise UserError(f"a vocabulary needs size and min_count of at least 1, not {size} and {min_count}")
    tokenize, counts = tokenizer_named(tokenizer), Counter[str]()
    for text in texts:
        counts.update(tokenize(text))
    for special in (UNKNOWN, PAD):  # a text may spell them; there they are ordinary unknown words
        counts.pop(special, None)
    ranked = sorted((t for t, n in counts.items() if n >= min_count), key=lambda t: (-counts[t], t))
    return [UNKNOWN, PAD, *ranked[:size]]


def read_vocabulary(path: str) -> list[str]:
    """Tokens from a trained checkpoint (.safetensors, see ``attrib.metadata``) or a text file with one in each line.

    ``path`` as in ``attrib.metadata.resolve``. Raises UserError naming the file and how to make it.
    """
    where, file = "model.input.vocabulary", resolve(path)
    if not file.is_file():
        raise UserError(f"{where}: no such file: {file}; train the network first: attrib train train=...")
    if file.suffix == ".txt":
        try:
            lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would also split at rarer characters
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: {file} cannot be read: {error}") from error
        return lines[:-1] if lines[-1] == "" else lines
    tokens = read_metadata(path).get("vocabulary")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise UserError(
            f"{where}: {file} carries no vocabulary; attrib train writes checkpoints with one, "
            "else give a .txt file with a token in each line"
        )
    return tokens


class WordEncoder:
    """A token is a word of a vocabulary, which must contain ``<unk>`` and ``<pad>``.

    vocabulary  file (see ``read_vocabulary``), or the tokens themselves: the position is the id
    max_length  only that many first words of a text are read; None reads all
    tokenizer   "basic_english", or "split" for texts whose words are already set apart by spaces

    A text without any word becomes one ``<unk>``. ``<unk>`` and ``<pad>`` spelt in a text are unknown words.

    Raises UserError for a vocabulary that is missing, unreadable, ambiguous or without the two.
    """

    def __init__(
        self,
        vocabulary: str | Sequence[str] | None,
        max_length: int | None = None,
        tokenizer: str = "basic_english",
    ) -> None:
        where = "model.input.vocabulary"
        if vocabulary is None:
            raise UserError(
                f"{where}: this network is not trained yet, so it has no vocabulary; run "
                "attrib train train=... and give its file: model.checkpoint=..."
            )
        if max_length is not None and max_length < 1:
            raise UserError(f"model.input.max_length must be at least 1, not {max_length}")
        given = vocabulary if isinstance(vocabulary, str) else "the list given"
        tokens = read_vocabulary(vocabulary) if isinstance(vocabulary, str) else list(vocabulary)
        ids = {token: i for i, token in enumerate(tokens)}
        if len(ids) < len(tokens):
            twice = Counter(tokens).most_common(1)[0][0]
            raise UserError(f"{where}: {given} has {twice!r} more than once")
        missing = [special for special in (UNKNOWN, PAD) if special not in ids]
        if missing:
            raise UserError(f"{where}: {given} has no {' and no '.join(missing)}")
        self._tokenize = tokenizer_named(tokenizer)
        self.vocabulary, self.max_length, self.tokenizer = tuple(tokens), max_length, tokenizer
        self.pad, self.unknown, self.size = ids.pop(PAD), ids.pop(UNKNOWN), len(tokens)
        self.mask = self.unknown
        self._ids = ids
        self.key = digest("words", tokenizer, tokens, max_length)

    def encode(self, text: str) -> Encoded:
        """The words' numbers are their positions."""
        tokens = self._tokenize(text)[: self.max_length] or [UNKNOWN]
        return Encoded([self._ids.get(token, self.unknown) for token in tokens], list(range(len(tokens))), tokens)

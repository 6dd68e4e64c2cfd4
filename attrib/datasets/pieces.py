"""Hugging Face tokenizers: words in pieces."""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Self

from attrib.datasets.tokens import Encoded
from attrib.keys import digest
from attrib.metadata import resolve
from attrib.process.hub import hub_at_once
from attrib.types import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

_HUGE = 10**9  # transformers writes 1e30 for "no limit known"


def _load(path: str) -> PreTrainedTokenizerFast:
    where = "model.input.path"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(f"{where}: Hugging Face tokenizers need transformers: pip install transformers") from error
    place = str(resolve(path))
    if path.startswith(("package:", "/", ".", "~")) and not Path(place).is_dir():
        raise UserError(f"{where}: no such folder: {place}")
    try:
        with hub_at_once(place):
            tokenizer = AutoTokenizer.from_pretrained(place, use_fast=True, trust_remote_code=False)
    except Exception as error:  # OSError without a network, and anything for damaged files
        reason = str(error).strip().partition("\n")[0]
        what = (
            "not the folder of a tokenizer"
            if Path(place).is_dir()
            else "neither a folder nor a model that can be loaded"
        )
        raise UserError(f"{where}: {path} is {what} ({type(error).__name__}: {reason})") from error
    return _fast(tokenizer, path)


def _fast(tokenizer: object, path: str) -> PreTrainedTokenizerFast:
    """Raises UserError for one that cannot say which word a piece belongs to."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"model.input.path: {path} has a tokenizer ({type(tokenizer).__name__}) that cannot say which word a piece "
            "belongs to; convert it to a fast one (tokenizer.json)"
        )
    return tokenizer


def _runs_on(backend: Tokenizer) -> bool:
    """Whether a word of the tokenizer can go on behind white space."""
    for space in " \n\t":
        text = f"a{space}b" if backend.normalizer is None else backend.normalizer.normalize_str(f"a{space}b")
        if backend.pre_tokenizer is None or len(backend.pre_tokenizer.pre_tokenize_str(text)) < 2:
            return True
    return False


class HuggingFaceEncoder:
    """The fast tokenizer in a folder, in ``package:NAME/inner/path``, or of a model on the Hugging Face hub.

    max_length  longest row, special tokens included; None takes what the tokenizer says of its model. A longer text
                loses its end, so that its last word may lose pieces; the closing special token stays

    Words are the tokenizer's. If it has none that end at white space, as with SentencePiece models such as Llama's and
    Gemma's, for which a whole text is one word, they end there too. A piece that spans several words belongs to the
    first of them.

    A text without any word becomes one unknown token between the special ones. Special tokens spelt in a text are
    read as text. No code of the model's authors is run.

    Raises UserError for a tokenizer that is missing or slow, lacks a padding or an unknown token, or has no known
    longest text.
    """

    def __init__(self, path: str, max_length: int | None = None) -> None:
        self._prepare(_load(path), path, max_length)

    @classmethod
    def of(cls, tokenizer: object, max_length: int | None = None) -> Self:
        """The same of a tokenizer of transformers that is loaded already, which is left as it is. Raises UserError."""
        made, name = cls.__new__(cls), str(getattr(tokenizer, "name_or_path", "") or "the tokenizer")
        made._prepare(copy.deepcopy(_fast(tokenizer, name)), name, max_length)
        return made

    def _prepare(self, tokenizer: PreTrainedTokenizerFast, path: str, max_length: int | None) -> None:
        specials = {"padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id}
        for name, number in specials.items():
            if number is None:
                raise UserError(f"model.input.path: {path}: it has no {name} token; set one and save it again")
        limits = [n for n in (max_length, tokenizer.model_max_length) if n is not None and n < _HUGE]
        if not limits:
            raise UserError(
                f"model.input.max_length: {path} does not say how long a text its model takes; set it, for example 512"
            )
        room = tokenizer.num_special_tokens_to_add(pair=False)
        if min(limits) <= room:
            raise UserError(f"model.input.max_length must be more than the {room} special tokens, not {min(limits)}")
        self.pad, self.unknown = specials["padding"], specials["unknown"]
        self.mask = self.unknown if tokenizer.mask_token_id is None else tokenizer.mask_token_id
        self.size = len(tokenizer)
        # The backend itself: transformers sets its state at every call, which two threads must not do at once.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.enable_truncation(min(limits))
        self._cut = _runs_on(self._backend)
        more = ["words end at white space"] if self._cut else []
        self.key = digest("pieces", self._backend.to_str(), tokenizer.special_tokens_map, min(limits), *more)
        self._backend.encode_special_tokens = False
        self._empty = self._encoded(self._backend.encode(tokenizer.unk_token), "")
        self._backend.encode_special_tokens = True  # "[PAD]" in a text is text

    def _encoded(self, encoding: Encoding, text: str) -> Encoded:
        found = Encoded(list(encoding.ids), [], [])
        numbers: dict[tuple[int, int], int] = {}  # the backend's numbers may have gaps
        ends = [run.end() for run in re.finditer(r"\S+", text)] if self._cut else []
        before = None
        for word, token, span, special in zip(
            encoding.word_ids, encoding.tokens, encoding.offsets, encoding.special_tokens_mask
        ):
            if special or word is None:
                found.words.append(-1)
            else:
                # White space belongs to what follows it, at the end of a text to what stands before it.
                run = min(bisect_right(ends, span[0]), max(len(ends) - 1, 0))
                found.words.append(numbers.setdefault((word, run), len(numbers)))
            # Several byte pieces of one character have the same span: it is shown once.
            shown = text[slice(*span)].strip() if found.words[-1] >= 0 and span != before else ""
            found.tokens.append(shown or token)
            before = span
        return found

    def encode(self, text: str) -> Encoded:
        """Tokens are the pieces of the text as it was written; special and empty ones have their own names."""
        encoded = self._encoded(self._backend.encode(text), text)
        return encoded if max(encoded.words, default=-1) >= 0 else self._empty

"""Hugging Face nets over texts, by folder, package or name: sequence classifiers and decoders.

Weights are read from safetensors and nothing that comes with a model is run: no pickles, no remote code.
``huggingface_images`` has the nets over images.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from attrib.metadata import resolve
from attrib.models.device_memory import of_the_device
from attrib.models.text import real_tokens
from attrib.noise import Noise
from attrib.process.hub import hub_at_once
from attrib.types import SampleError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# The fields of a configuration that do not change what the net computes.
_WITHOUT_EFFECT = (
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id",
    "use_cache", "problem_type", "finetuning_task", "_num_labels",
)  # fmt: skip


class _TextNet(nn.Module):
    """Token ids (N, T), padded on the right, to logits.

    The attention mask ends with the last id that is not ``pad_id``; the first position is always on. Inside of a text
    the id of padding is a token as others are: some tokenizers pad with what ends a text or stands for unknown words.
    Layers are found under ``net.``: ``net.bert.encoder.layer.2``.

    net      of transformers
    pad_id   id of padding
    mask_id  id of the token that hides another one
    """

    def __init__(self, net: PreTrainedModel, pad_id: int, mask_id: int) -> None:
        super().__init__()
        self.net, self.pad_id, self.mask_id = net, pad_id, mask_id
        self.max_length = _max_length(net)

    @property
    def default_layers(self) -> dict[str, str]:
        """The paths of the roles of a net with a table of words. The bottleneck is there by default."""
        words = _words(self.net)
        if words is None:
            return {}
        path = next(path for path, module in self.named_modules() if module is words)
        return {"embedding": path, "bottleneck": path}

    @property
    def spec(self) -> dict[str, Any]:
        """What the net computes, as plain data: its configuration, without paths, versions and names of classes."""
        config: Any = self.net.config
        own: dict[str, Any] = {"num_labels": config.num_labels, "pad_id": self.pad_id, "mask_id": self.mask_id}
        if self.pad_id in (self.mask_id, config.eos_token_id, config.bos_token_id):
            own["padding"] = "at the end"  # where it once was wherever this id stands
        return described(config) | own

    def forward(self, x: Tensor) -> Tensor:
        """Raises SampleError for more tokens than the net has positions, or for a number that it cannot take."""
        if self.max_length is not None and x.shape[1] > self.max_length:
            raise SampleError(
                f"a text of {x.shape[1]} tokens; {type(self.net).__name__} takes {self.max_length} at most "
                "(model.input.max_length cuts longer ones)"
            )
        try:
            return self.net(input_ids=x, attention_mask=real_tokens(x, self.pad_id).long()).logits
        except RuntimeError as error:
            if of_the_device(error) or "shape" not in str(error):
                raise
            # Nystromformer cuts a text into segments, which works for some lengths only.
            raise SampleError(
                f"{type(self.net).__name__} does not take a text of {x.shape[1]} tokens: {str(error).splitlines()[0]}"
            ) from error


class HuggingFaceClassifier(_TextNet):
    """A transformers ``...ForSequenceClassification``: ids (N, T) to logits (N, K)."""

    @property
    def num_outputs(self) -> int:
        """Numbers that it returns for a text."""
        config: Any = self.net.config
        return int(config.num_labels)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return names_of(self.net.config)


class HuggingFaceDecoder(_TextNet):
    """A transformers ``...ForCausalLM``: ids (N, T) to the logits (N, T, V) of each next token.

    source   where its tokenizer is
    """

    def __init__(self, net: PreTrainedModel, pad_id: int, mask_id: int, source: str) -> None:
        super().__init__(net, pad_id, mask_id)
        self.source = source

    def token_ids(self, words: Sequence[str]) -> list[int]:
        """The token that each word is. Raises UserError for one that is several or none."""
        tokenizer, found = tokenizer_of(self.source), []
        for word in words:
            ids = tokenizer.encode(word, add_special_tokens=False)
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                parts = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
                hint = "" if word.startswith(" ") else f"; inside of a text it may be {' ' + word!r}"
                raise UserError(
                    f"model.output: candidates: {word!r} is not one token of {self.source} but {parts or 'none'}{hint}"
                )
            found.append(ids[0])
        return found


def described(config: Any) -> dict[str, Any]:
    """A configuration as plain data, without what does not change what the net computes."""
    plain = json.loads(json.dumps(config.to_diff_dict(), default=str))
    return {k: v for k, v in plain.items() if k not in _WITHOUT_EFFECT}


def names_of(config: Any) -> tuple[str, ...] | None:
    """The names of the classes, "" where there is only one that transformers makes up; None if all are."""
    given = {int(i): str(name) for i, name in (config.id2label or {}).items()}
    names = tuple("" if given.get(i, "") == f"LABEL_{i}" else given.get(i, "") for i in range(config.num_labels))
    return names if any(names) else None


def _words(net: PreTrainedModel) -> nn.Module | None:
    """The table of words; None for a net without one, such as CANINE, which hashes characters into several."""
    whole: Any = net
    if net.config.is_encoder_decoder:  # of BART and T5 the net's own table only lends its weights to others
        whole = net.base_model.get_encoder()
    try:
        found: nn.Module = whole.get_input_embeddings()
    except NotImplementedError:
        return None
    return found


def _max_length(net: PreTrainedModel) -> int | None:
    """The size of the table of positions, less those that RoBERTa keeps for padding; None without a table."""
    count, words = getattr(net.config, "max_position_embeddings", None), _words(net)
    for module in net.modules():
        if isinstance(module, nn.Embedding) and module is not words and module.num_embeddings == count:
            return count if module.padding_idx is None else count - module.padding_idx - 1
    return None


def hf_classifier(
    path: str, num_labels: int | None = None, pad_id: int | None = None, mask_id: int | None = None, **options: Any
) -> HuggingFaceClassifier:
    """A pretrained sequence classifier.

    path        a folder, ``package:NAME/inner/path`` for one that an installed package ships, or a name on the hub
    num_labels  number of classes. None: as many as the stored head has. A model without one (a sentence encoder,
                a language model) needs it; its head is then made of fixed random numbers, for training to fill
    pad_id      None: the tokenizer's padding token
    mask_id     None: the tokenizer's mask token, or else its unknown token
    options     fields of the model's configuration, ``attn_implementation`` among them

    Raises UserError that names the path for a model that is missing, damaged, incomplete, not a
    classifier, or cannot be loaded without running code that comes with it.
    """
    where = location(path)
    config = config_of(path, where, num_labels, options)
    pad_id, mask_id = _special(path, where, config, pad_id, mask_id)
    config.pad_token_id, config.use_cache = pad_id, False
    net, missing = loaded("AutoModelForSequenceClassification", path, where, config)
    fill_head(net, missing, path, num_labels)
    return HuggingFaceClassifier(net, pad_id, mask_id)


def hf_decoder(path: str, pad_id: int | None = None, mask_id: int | None = None, **options: Any) -> HuggingFaceDecoder:
    """A pretrained decoder, such as GPT-2 or Llama, for ``model.output={read: next_token}``.

    The arguments are those of ``hf_classifier``; ``pad_id`` may be any token, as padding is behind the text.

    Raises UserError as ``hf_classifier`` does, and for a net whose logits depend on what comes later in the text.
    """
    where = location(path)
    config = config_of(path, where, None, options)
    pad_id, mask_id = _special(path, where, config, pad_id, mask_id)
    config.pad_token_id, config.use_cache = pad_id, False
    net, missing = loaded("AutoModelForCausalLM", path, where, config)
    if missing:
        raise UserError(f"model.path: {path} is no decoder, its weights lack {', '.join(sorted(missing)[:6])}")
    _check_end(where)
    made = HuggingFaceDecoder(net, pad_id, mask_id, where).eval()
    a, b, c, d = [i for i in range(5) if i != pad_id][:4]
    with torch.no_grad():
        logits = made(torch.tensor([[a, b, c], [a, b, d]]))
    if not torch.allclose(logits[0, :2], logits[1, :2], rtol=1e-3, atol=1e-5):
        raise UserError(
            f"model.path: {path} ({type(net).__name__}) is no decoder: its logits depend on what comes later in a text"
        )
    return made


def _check_end(where: str) -> None:
    """Raises UserError for a tokenizer that ends every text, behind which no token comes."""
    try:
        tokenizer = tokenizer_of(where)
    except UserError:  # whoever reads texts will say so; the net itself needs none
        return
    ids: list[int] = tokenizer("a")["input_ids"]
    if ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        end = tokenizer.convert_ids_to_tokens(ids[-1])
        raise UserError(
            f"model.path: {where}: its tokenizer puts {end!r} behind every text, so that the next token is not the one "
            "that continues it; save the tokenizer without that"
        )


def loaded(auto: str, path: str, where: str, config: Any) -> tuple[PreTrainedModel, Collection[str]]:
    """The net that transformers' class ``auto`` makes of what is stored, and the parameters that are not stored.

    Raises UserError that names ``path``.
    """
    transformers = _transformers()
    with (
        _quiet(transformers),
        hub_at_once(where),
        torch.random.fork_rng(devices=[]),
    ):
        # building a net draws from the global state
        try:
            net, found = getattr(transformers, auto).from_pretrained(
                where, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"model.path: {path}: {_reason(error)}") from error
    if found["mismatched_keys"]:  # transformers' own error does not say which
        name, stored, wanted = sorted(found["mismatched_keys"])[0]
        raise UserError(
            f"model.path: {path} stores {name} as {tuple(stored)}, its configuration wants {tuple(wanted)}; "
            "leave model.num_labels null unless the head is yet to be trained"
        )
    return net, found["missing_keys"]


def tokenizer_of(where: str) -> Any:
    """Raises UserError for one that is missing or damaged."""
    return _part(where, "AutoTokenizer", "tokenizer")


def processor_of(where: str) -> Any:
    """What prepares images for a net. Raises UserError for one that is missing or damaged."""
    return _part(where, "AutoImageProcessor", "image processor")


def _part(where: str, auto: str, what: str) -> Any:
    transformers = _transformers()
    with _quiet(transformers), hub_at_once(where):
        try:
            return getattr(transformers, auto).from_pretrained(where, trust_remote_code=False)
        except Exception as error:  # what is damaged raises anything
            raise UserError(f"model.path: {where}: its {what} cannot be read: {_reason(error)}") from error


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"a Hugging Face model needs transformers ({error}); try: pip install transformers") from error
    return transformers


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without the progress bars and reports of transformers; attrib itself says what matters in them."""
    messages = transformers.utils.logging
    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()


def location(path: str) -> str:
    """What transformers is to load. Raises UserError for a folder that is missing or cannot be safe."""
    folder = resolve(path)
    if not folder.is_dir():
        if path.startswith(("package:", "/", ".", "~")):
            raise UserError(f"model.path: no such folder: {folder}")
        return path
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path: {folder} has no config.json; it is not a Hugging Face model")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model.path: {folder} has no .safetensors file, and weights in another form could run code when they "
            "are read; save it again with save_pretrained of a recent transformers"
        )
    return str(folder)


def _reason(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which attrib does not run"
    return " ".join(line.strip() for line in text[:3])


def config_of(path: str, where: str, num_labels: int | None, options: dict[str, Any]) -> Any:
    """The stored configuration with ``options``. Raises UserError that names ``path``."""
    transformers = _transformers()
    if num_labels is not None and num_labels < 2:
        raise UserError(f"model.path: {path} has one output; a classifier has a logit for each of its classes")
    given = options if num_labels is None else {**options, "num_labels": num_labels}
    try:
        with _quiet(transformers), hub_at_once(where):
            config, unused = transformers.AutoConfig.from_pretrained(
                where, trust_remote_code=False, return_unused_kwargs=True, **given
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.path: {path}: {_reason(error)}") from error
    if unused:
        raise UserError(f"model: {type(config).__name__} of {path} has no field {', '.join(map(repr, unused))}")
    return config


def _special(path: str, where: str, config: Any, pad_id: int | None, mask_id: int | None) -> tuple[int, int]:
    """The ids of padding and of what hides a token."""
    tokenizer, reason = None, ""
    if pad_id is None or mask_id is None:
        try:
            tokenizer = tokenizer_of(where)
            # Without files, transformers may make up a tokenizer that knows nothing but its own special tokens.
            if len(tokenizer) <= len(tokenizer.all_special_ids):
                tokenizer, reason = None, " (it has no tokenizer)"
        except UserError as error:
            reason = f" ({str(error).partition(f'{where}: ')[2]})"
    if tokenizer is not None:
        pad_id = tokenizer.pad_token_id if pad_id is None else pad_id
        if mask_id is None:
            mask_id = tokenizer.unk_token_id if tokenizer.mask_token_id is None else tokenizer.mask_token_id
    pad_id = config.pad_token_id if pad_id is None else pad_id
    if pad_id is None or mask_id is None:
        missing = "pad" if pad_id is None else "mask"
        raise UserError(f"model.path: {path} names no {missing} token{reason}; set model.{missing}_id")
    return pad_id, mask_id


def fill_head(net: PreTrainedModel, missing: Collection[str], path: str, num_labels: int | None) -> None:
    """Fixed random numbers for the parameters of the head that are not stored.

    Raises UserError if others are missing too.
    """
    inside = [name for name in sorted(missing) if name.startswith(f"{net.base_model_prefix}.") and "pooler" not in name]
    if inside:
        raise UserError(f"model.path: {path} is incomplete, its weights lack {', '.join(inside[:6])}")
    if not missing:
        return
    if num_labels is None:
        raise UserError(
            f"model.path: {path} stores no classification head ({', '.join(sorted(missing))}); train one, or set "
            "model.num_labels to take a random one"
        )
    log.warning("%s stores no classification head: %s are random", path, ", ".join(sorted(missing)))
    own, scale = net.state_dict(), getattr(net.config, "initializer_range", 0.02)
    for name in sorted(missing):
        value = own[name]
        if value.ndim > 1:
            value.copy_(scale * Noise([name]).normal(*value.shape)[0])
        else:
            value.fill_(1.0 if name.endswith("weight") else 0.0)  # the gain of a norm, or a bias

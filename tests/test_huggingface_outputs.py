"""Hugging Face nets over images, image-text models and decoders: tiny random ones, against transformers' own way in."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import command
from tiny import pictures as saved_pictures
from tiny_huggingface import DECODERS, IMAGES, VIT_LAYER, WORDS, bert, clip, llama, siglip, swin, tokenizer, vit
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from attrib.datasets import ImageTransform
from attrib.methods.baselines import Gradient
from attrib.methods.cam import GradCAM
from attrib.methods.iba import IBA
from attrib.methods.parts.losses import target_loss
from attrib.models import Classifier, hf_decoder, hf_image_classifier, hf_image_text, probabilities
from attrib.models.huggingface_images import hf_input
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError


def close(a: Tensor, b: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def images(n: int = 3, side: int = 16) -> Tensor:
    return Noise([f"image {i}" for i in range(n)]).normal(3, side, side)


# ---- image classifiers --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGES)
def test_logits_are_those_of_transformers(kind, tmp_path):
    folder = str(IMAGES[kind](tmp_path))
    side = 32 if kind in ("convnext", "resnet") else 16
    model = Classifier(hf_image_classifier(folder), dtype=torch.float32, input_shape=(3, side, side))
    plain = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = images(side=side)
    with torch.no_grad():
        expected = torch.cat([plain(pixel_values=one[None]).logits for one in x])
    close(model.logits(x), expected)
    assert expected.std(0).min() > 1e-3
    names = ("cat", "dog", "bird") if kind == "vit" else None
    assert model.class_names == names
    again = Classifier(hf_image_classifier(folder))
    assert again.key == model.key


def test_grad_cam_of_a_vit_and_a_swin(tmp_path):
    for kind, layer in (("vit", VIT_LAYER), ("swin", "net.swin.encoder.layers.0")):
        net = hf_image_classifier(str(IMAGES[kind](tmp_path / kind)))
        model = Classifier(net, {"cam": layer}, input_shape=(3, 16, 16))
        batch = Batch(("a", "b"), images(2), torch.tensor([0, 1]))
        map = GradCAM(relu=False).attribute(model, batch, {}, Noise(batch.uids))["map"]
        assert map.shape == (2, 16, 16)
        assert map.abs().max() > 0


def test_a_folder_without_safetensors_or_head(tmp_path):
    folder = vit(tmp_path / "vit")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        hf_image_classifier(str(folder))
    transformers.ViTModel(transformers.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    with pytest.raises(UserError, match=r"stores no classification head \(classifier"):
        hf_image_classifier(str(folder))
    with pytest.raises(UserError, match="has no field 'patches'"):
        hf_image_classifier(str(folder), patches=3)


PROCESSORS = {
    "ViT": dict(size={"height": 24, "width": 40}, resample=3),
    "CLIP": dict(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
    "ConvNext": dict(size={"shortest_edge": 40}, crop_pct=0.8),
    "Levit": dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    "Siglip": dict(size={"height": 48, "width": 48}),
    "Bit": dict(size={"shortest_edge": 44}, crop_size={"height": 40, "width": 40}),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_images_are_prepared_as_the_processor_does(kind, tmp_path):
    processor = getattr(transformers, f"{kind}ImageProcessor")(
        **PROCESSORS[kind], image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors").touch()
    known = hf_input(str(tmp_path))
    assert known["mean"] == [0.4, 0.5, 0.6]
    assert known["std"] == [0.2, 0.3, 0.4]
    pixels = np.random.RandomState(0).randint(0, 255, (9, 7, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize((98, 126), Image.Resampling.BICUBIC)
    size = known["size"] if isinstance(known["size"], int) else tuple(known["size"])
    ours = ImageTransform(**{**known, "size": size}).tensor(image)
    theirs = torch.tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"][0]))
    assert (ours - theirs).abs().max() < 0.06  # three of 255 levels


def test_what_a_transform_cannot_say_is_left_to_the_user(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors").touch()
    assert hf_input(str(tmp_path)) == {}
    transformers.DeiTImageProcessor().save_pretrained(tmp_path)  # squashed, then cropped
    assert hf_input(str(tmp_path)).keys() == {"size", "mean", "std", "interpolation"}
    transformers.MobileViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="BGR"):
        hf_input(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="image processor cannot be read"):
        hf_input(str(tmp_path))


def test_a_run_with_a_vit_from_a_folder(tmp_path, capfd, caplog):
    folder, attrib = vit(tmp_path / "vit"), command(capfd)
    common = [
        "dataset=image_folder", f"dataset.root={saved_pictures(tmp_path, 3)}", "dataset.target=predicted",
        "model=huggingface_image", f"model.path={folder}", "method=gradient", "metric=[]",
        f"run.root={tmp_path / 'out'}", "run.device=cpu", "run.progress=false",
    ]  # fmt: skip
    result = attrib(*common)
    assert result.status == 0, result.err
    (spec,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/spec.json"))
    assert spec["output"] == {"read": "classes", "probabilities": "softmax", "class_names": ["cat", "dog", "bird"]}
    assert spec["config"]["model"]["input"]["mean"] == [0.4, 0.5, 0.6]
    assert spec["config"]["dataset"]["transform"]["interpolation"] == "bicubic"
    result = attrib(*common, "dataset.transform.mean=[0.5,0.5,0.5]")
    assert result.status == 2
    assert "dataset.transform.mean is (0.5, 0.5, 0.5), but model.input.mean is [0.4, 0.5, 0.6]" in result.err.replace(
        "(0.4, 0.5, 0.6)", "[0.4, 0.5, 0.6]"
    )
    with caplog.at_level(logging.WARNING):
        assert attrib(*common, "model.input.mean=[0.5,0.5,0.5]").status == 0
    assert "image processor" in caplog.text


# ---- images and texts ---------------------------------------------------------------------------

PROMPTS = ["a photo of a cat", "dog", "the film was very bad"]


@pytest.mark.parametrize("kind", [clip, siglip])
def test_similarities_are_those_of_transformers(kind, tmp_path):
    folder = str(kind(tmp_path))
    net = hf_image_text(folder)
    model = Classifier(
        net, dtype=torch.float64, input_shape=(3, 16, 16), output={"read": "similarity", "prompts": PROMPTS}
    )
    plain = transformers.AutoModel.from_pretrained(folder).double().eval()
    x, expected = images().double(), torch.zeros(3, 3, dtype=torch.float64)
    with torch.no_grad():
        for i, one in enumerate(x):
            for k, prompt in enumerate(PROMPTS):
                found = transformers.AutoTokenizer.from_pretrained(folder)(
                    [prompt], return_tensors="pt", padding="max_length", max_length=8
                )
                ids = {name: found[name] for name in ("input_ids", "attention_mask")}
                expected[i, k] = plain(pixel_values=one[None], **ids).logits_per_image[0, 0]
    close(model.logits(x), expected, 1e-9)
    assert expected.std(1).min() > 1e-3
    assert model.link == ("softmax" if kind is clip else "sigmoid")
    assert model.class_names == tuple(PROMPTS)
    p = expected.softmax(1) if kind is clip else expected.sigmoid()
    close(probabilities(model.logits(x), link=model.link), p, 1e-9)
    close(target_loss(model.logits(x), torch.tensor([0, 1, 2]), model.link), -p.diagonal().log(), 1e-9)
    leaf = x.clone().requires_grad_()
    image = torch.nn.functional.normalize(net.double()(leaf), dim=1)
    text = torch.nn.functional.normalize(net.embed_prompts(PROMPTS), dim=1)
    (grad,) = torch.autograd.grad((net.scale * image @ text.T)[:, 1].sum(), leaf)
    batch = Batch(("a", "b", "c"), x, torch.tensor([1, 1, 1]))
    close(Gradient().attribute(model, batch, {}, Noise(batch.uids))["map"], grad.sum(1), 1e-9)


def test_iba_of_a_clip(tmp_path):
    """Its loss is the cross-entropy over the prompts."""
    net = hf_image_text(str(clip(tmp_path)))
    path = next(p for p, _ in net.named_modules() if p.endswith("vision_model.encoder.layers.0"))
    model = Classifier(
        net, {"bottleneck": path}, dtype=torch.float64, output={"read": "similarity", "prompts": PROMPTS}
    )
    batch = Batch(("a", "b", "c"), images().double(), torch.tensor([0, 1, 2]))
    z = model.until("bottleneck", batch.x).z
    state = {"mean": z.mean(0), "std": z.std(0), "active": torch.ones_like(z[0])}
    found = IBA(steps=2, batch=2).attribute(model, batch, state, Noise(batch.uids, dtype=torch.float64))
    assert found["map"].shape == (3, 16, 16)


def test_what_is_no_image_text_model(tmp_path):
    with pytest.raises(UserError, match="is no image-text model: it has no get_image_features"):
        hf_image_text(str(vit(tmp_path / "vit")))
    net = hf_image_text(str(clip(tmp_path / "clip")))
    with pytest.raises(UserError, match="has 9 tokens, the net takes 8"):
        Classifier(net, output={"read": "similarity", "prompts": ["a", "a b c d e f g h i"]})
    with pytest.raises(UserError, match="wants prompts"):
        Classifier(net, output={"read": "similarity"})


# ---- decoders -----------------------------------------------------------------------------------

LENGTHS = (6, 1, 4)


def sentences(pad: int) -> Tensor:
    x = torch.full((3, 6), pad)
    for i, n in enumerate(LENGTHS):
        x[i, :n] = torch.arange(n) * 3 % 12 + 3 + i
    return x


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("words", [None, ["good", "bad", "not"]])
def test_next_tokens_are_those_of_transformers(kind, words, tmp_path):
    folder = str(DECODERS[kind](tmp_path))
    net = hf_decoder(folder)
    output = {"read": "next_token", "candidates": words}
    model = Classifier(net, net.default_layers, dtype=torch.float64, output=output)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    x = sentences(net.pad_id)
    chosen = list(range(len(WORDS))) if words is None else [WORDS.index(word) for word in words]
    with torch.no_grad():
        expected = torch.stack([plain(input_ids=row[None, :n]).logits[0, -1, chosen] for row, n in zip(x, LENGTHS)])
    close(model.logits(x), expected, 1e-9)
    assert expected.std(0).min() > 1e-3
    z, rest = model.until("embedding", x)
    close(model.after("embedding", z, rest), expected, 1e-9)
    batch = Batch(
        ("a", "b", "c"), x, torch.tensor([0, 1, 2]), lengths=torch.tensor(LENGTHS),
        words=torch.where(torch.arange(6) < torch.tensor(LENGTHS)[:, None], torch.arange(6), -1),
    )  # fmt: skip
    map = Gradient(reduce="abs_sum").attribute(model, batch, {}, Noise(batch.uids))["map"]
    assert (map[1, 1:] == 0).all()
    assert map.abs().sum(1).min() > 0


def test_candidates_must_be_tokens(tmp_path):
    net = hf_decoder(str(llama(tmp_path)))
    with pytest.raises(UserError, match=r"'goodness' is not one token of .* but "):
        Classifier(net, output={"read": "next_token", "candidates": ["good", "goodness"]})
    with pytest.raises(UserError, match=r"'very good' is not one token of .* but 'very', 'good'"):
        Classifier(net, output={"read": "next_token", "candidates": ["good", "very good"]})


def test_what_sees_the_whole_text_is_no_decoder(tmp_path):
    with pytest.raises(UserError, match="depend on what comes later"):
        hf_decoder(str(bert(tmp_path / "bert")))
    with pytest.raises(UserError, match=r"swin"):
        hf_decoder(str(swin(tmp_path / "swin")), pad_id=0, mask_id=1)


def test_a_tokenizer_that_ends_its_texts(tmp_path):
    folder, made = llama(tmp_path), tokenizer(pad_token="[PAD]", mask_token="[MASK]", eos_token="it")
    end = ("it", WORDS.index("it"))
    made._tokenizer.post_processor = TemplateProcessing(single="$A it", special_tokens=[end])
    made.save_pretrained(folder)
    with pytest.raises(UserError, match="puts 'it' behind every text"):
        hf_decoder(str(folder))


def test_a_text_that_is_too_long(tmp_path):
    net = hf_decoder(str(DECODERS["gpt2"](tmp_path)))
    model = Classifier(net, output={"read": "next_token"})
    with pytest.raises(SampleError, match="13 tokens; GPT2LMHeadModel takes 12"):
        model.logits(torch.full((1, 13), 4))


def test_a_run_with_a_decoder(tmp_path, capfd):
    folder, attrib = llama(tmp_path / "llama"), command(capfd)
    (tmp_path / "texts.csv").write_text("text,label\nthe film was very,0\nit is not a good film it was,1\na cat is,0\n")
    common = [
        "dataset=text_csv", f"dataset.path={tmp_path / 'texts.csv'}", "model=huggingface_decoder",
        f"model.path={folder}", "model.input.max_length=10", "method=integrated_gradients",
        f"run.root={tmp_path / 'out'}", "run.device=cpu", "run.progress=false",
    ]  # fmt: skip
    result = attrib(*common, "model.output.candidates=[good,bad]", "metric=[eraser]")
    assert result.status == 0, result.err
    (spec,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/spec.json"))
    assert spec["output"] == {"read": "next_token", "probabilities": "softmax", "class_names": ["good", "bad"]}
    shutil.rmtree(tmp_path / "out")
    result = attrib(*common, f"dataset.target={WORDS.index('good')}", "metric=[]")
    assert result.status == 0, result.err

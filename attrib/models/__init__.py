"""Networks: how to get one (``zoo``, ``text``, ...), and ``Classifier``, the only form that methods see."""

from attrib.models.audio import ToneCNN
from attrib.models.checkpoint import load_weights, save_checkpoint
from attrib.models.classifier import Classifier
from attrib.models.exam import Exam
from attrib.models.huggingface import HuggingFaceClassifier, HuggingFaceDecoder, hf_classifier, hf_decoder
from attrib.models.huggingface_images import (
    HuggingFaceImageClassifier,
    HuggingFaceImageText,
    hf_image_classifier,
    hf_image_text,
)
from attrib.models.output import Output, ScoreScale, log_probabilities, probabilities
from attrib.models.small import AcdCNN, LeNet, resnet18_cifar
from attrib.models.split import Front
from attrib.models.text import AcdLSTM, BiLSTM, DeepLSTM, Recurrent
from attrib.models.variant import Randomise
from attrib.models.zoo import timm_net, torchvision_net

__all__ = [
    "AcdCNN",
    "AcdLSTM",
    "BiLSTM",
    "Classifier",
    "DeepLSTM",
    "Exam",
    "Front",
    "HuggingFaceClassifier",
    "HuggingFaceDecoder",
    "HuggingFaceImageClassifier",
    "HuggingFaceImageText",
    "LeNet",
    "Output",
    "Randomise",
    "Recurrent",
    "ScoreScale",
    "ToneCNN",
    "hf_classifier",
    "hf_decoder",
    "hf_image_classifier",
    "hf_image_text",
    "load_weights",
    "log_probabilities",
    "probabilities",
    "resnet18_cifar",
    "save_checkpoint",
    "timm_net",
    "torchvision_net",
]

"""Networks: how to get one (``zoo``, ``checkpoint``), and ``Classifier``, the only form that methods see."""

from attrib.models.checkpoint import load_weights
from attrib.models.classifier import Classifier
from attrib.models.split import Front
from attrib.models.zoo import timm_net, torchvision_net

__all__ = ["Classifier", "Front", "load_weights", "timm_net", "torchvision_net"]

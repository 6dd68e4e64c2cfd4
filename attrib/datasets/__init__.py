"""Datasets: named samples, as the model wants to see them.

A dataset knows files, labels, boxes and the model's input transform. It knows nothing of models,
methods or the store.
"""

from __future__ import annotations

from attrib.datasets.arrays import ArrayDataset, PixelDataset
from attrib.datasets.audio import AudioDataset, AudioFolder, Interval, WaveTransform, WavFolder
from attrib.datasets.cars import StanfordCars
from attrib.datasets.cifar import CIFAR10, CIFAR100
from attrib.datasets.coco import COCO
from attrib.datasets.cub import CUB200
from attrib.datasets.digits import Digits, DigitsCanvas
from attrib.datasets.folder import ImageFolder
from attrib.datasets.found import found_images
from attrib.datasets.idx import MNIST, FashionMNIST
from attrib.datasets.imagenet import ImageNet
from attrib.datasets.imagenet_s import ImageNetS
from attrib.datasets.images import ImageDataset
from attrib.datasets.kaggle import KaggleImageNet
from attrib.datasets.parquet import ArrowShards, ParquetShards
from attrib.datasets.photos import Photos, PhotoViews
from attrib.datasets.pieces import HuggingFaceEncoder
from attrib.datasets.protocols import Dataset, Images, Sounds, Texts, holds_images, holds_sounds, holds_texts
from attrib.datasets.select import Selection
from attrib.datasets.several import AllClasses
from attrib.datasets.shards import ShardedImages
from attrib.datasets.snippets import MovieSnippets
from attrib.datasets.sound import Sound
from attrib.datasets.stl import STL10
from attrib.datasets.table import TextTable
from attrib.datasets.tar import TarShards
from attrib.datasets.text import IMDb, TextDataset
from attrib.datasets.tokens import Encoder, WordEncoder
from attrib.datasets.tones import Tones
from attrib.datasets.transform import Box, ImageTransform
from attrib.datasets.vectors import WordVectors, word_vectors
from attrib.datasets.voc import PascalVOC

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "COCO",
    "CUB200",
    "MNIST",
    "STL10",
    "AllClasses",
    "ArrayDataset",
    "ArrowShards",
    "AudioDataset",
    "AudioFolder",
    "Box",
    "Dataset",
    "Digits",
    "DigitsCanvas",
    "Encoder",
    "FashionMNIST",
    "HuggingFaceEncoder",
    "IMDb",
    "ImageDataset",
    "ImageFolder",
    "ImageNet",
    "ImageNetS",
    "ImageTransform",
    "Images",
    "Interval",
    "KaggleImageNet",
    "MovieSnippets",
    "ParquetShards",
    "PascalVOC",
    "PhotoViews",
    "Photos",
    "PixelDataset",
    "Selection",
    "ShardedImages",
    "Sound",
    "Sounds",
    "StanfordCars",
    "TarShards",
    "TextDataset",
    "TextTable",
    "Texts",
    "Tones",
    "WavFolder",
    "WaveTransform",
    "WordEncoder",
    "WordVectors",
    "found_images",
    "holds_images",
    "holds_sounds",
    "holds_texts",
    "word_vectors",
]

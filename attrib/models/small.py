"""Small nets for small images: every layer is a module of its own, so that any of them can have a role."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


class LeNet(nn.Sequential):
    """(N, channels, 32, 32) -> (N, num_classes): LeNet-5 (LeCun et al., 1998) with ReLU and max-pooling.

    ``padding`` = 2 in the first layer makes room for images of 28 x 28, as LeCun's own border did.
    """

    def __init__(self, num_classes: int = 10, channels: int = 1, padding: int = 0) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(channels, 6, 5, padding=padding),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6, 16, 5),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(16 * 5 * 5, 120),
                relu3=nn.ReLU(),
                fc2=nn.Linear(120, 84),
                relu4=nn.ReLU(),
                fc3=nn.Linear(84, num_classes),
            )
        )


class AcdCNN(nn.Sequential):
    """(N, channels, 28, 28) -> (N, num_classes): the MNIST net that ACD is shown on.

    Singh, Murdoch & Yu, *Hierarchical interpretations for neural network predictions*, ICLR 2019. The
    authors' net ends with log-softmax; this one with the logits before it.
    """

    def __init__(self, num_classes: int = 10, channels: int = 1) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(channels, 10, 5),
                pool1=nn.MaxPool2d(2),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(10, 20, 5),
                drop2=nn.Dropout2d(),
                pool2=nn.MaxPool2d(2),
                relu2=nn.ReLU(),
                flatten=nn.Flatten(),
                fc1=nn.Linear(20 * 4 * 4, 50),
                relu3=nn.ReLU(),
                drop3=nn.Dropout(),
                fc2=nn.Linear(50, num_classes),
            )
        )


def resnet18_cifar(num_classes: int = 10, channels: int = 3) -> nn.Module:
    """(N, channels, 32, 32) -> (N, num_classes): torchvision's ResNet-18 with a stem for small images.

    As usual for CIFAR (He et al., 2016, section 4.2): a 3 x 3 convolution of stride 1 and no max-pooling.
    """
    from torchvision.models import resnet18

    net = resnet18(weights=None, num_classes=num_classes)
    net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return net

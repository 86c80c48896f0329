"""Networks of every form that loses channels, and of some that cannot."""

import torch
from torch import nn
from torch.nn import functional as F

from windfall import models, seeds
from windfall.evidence import Outset

CIFAR, SMALL = (3, 32, 32), (3, 6, 6)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=2, dilation=2, groups=4)
        self.norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, stride=2, groups=24, padding=1)
        self.last = nn.Conv2d(24, 8, 1)
        self.output = nn.Linear(8 * 9, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.grouped(self.first(x))))
        x = torch.sigmoid(self.last(F.relu(self.depthwise(x))))  # not 0 at 0
        return self.output(x.flatten(1))


class Gated(nn.Module):
    """An addition, and channels multiplied by what a linear layer makes of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.slopes = nn.Conv2d(8, 6, 3), nn.PReLU(6)
        self.gate, self.output = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = F.gelu(self.a(x))
        x = self.slopes(self.c(x + self.b(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return self.output(x.mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(9), nn.Conv2d(9, 6, 1)
        self.output = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(torch.cat([self.a(x), self.b(x)], 1))
        return self.output(F.relu(self.c(x)).mean((2, 3)))


class Shuffled(nn.Module):
    """Channels that change places, which the proposed groups do not follow."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.output = nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.output(F.relu(self.b(x)).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.output = nn.Linear(16, 5)

    def forward(self, x):
        return self.output(self.block(self.embed(x)).mean(1))


class Softmaxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.output = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.output(self.b(torch.softmax(self.a(x), -1)))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.output = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.output(torch.relu(self.b(self.a(x).data)))


class Graphless(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.output = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        with torch.no_grad():
            return self.output(self.a(x))


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.c.weight, self.d, self.output = self.b.weight, nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.output(self.d(torch.relu(self.c(torch.relu(self.b(self.a(x)))))))


class Tiny(nn.Module):
    """A convolution, normalized or not, and two linear layers, of stated shapes; biases if named.

    The convolution makes of an input just as many positions as the hidden layer reads.
    """

    def __init__(self, shapes):
        super().__init__()
        out, self.channels, *kernel = shapes["conv.weight"]
        features = shapes["hidden.weight"][1]
        self.height = features // out + kernel[0] - 1
        self.conv = nn.Conv2d(self.channels, out, kernel, bias="conv.bias" in shapes)
        self.norm = nn.BatchNorm2d(out) if "norm.weight" in shapes else nn.Identity()
        self.hidden = nn.Linear(features, shapes["hidden.weight"][0], bias="hidden.bias" in shapes)
        self.output = nn.Linear(*shapes["output.weight"][::-1], bias="output.bias" in shapes)

    @property
    def input_shape(self):
        return self.channels, self.height, self.conv.kernel_size[1]

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x))).flatten(1)
        return self.output(F.relu(self.hidden(x)))


def outset(build, params, input_shape, num_classes, num_examples=40):
    """The outset of a network with these parameters, and random examples of all classes."""
    stream = seeds.stream(0, "test-examples")
    inputs = torch.from_numpy(stream.standard_normal((num_examples, *input_shape)))
    labels = torch.arange(num_examples) % num_classes

    def network():
        with seeds.isolated(0, "build"):
            made = build().eval().to(next(iter(params.values())).dtype)
        made.load_state_dict(params, strict=False)
        return made

    return Outset(network, input_shape, labels, lambda places: inputs[places])


def zoo(member, width):
    return lambda: member(width=width).build(CIFAR, 10)


NETWORKS = {
    "lenet": (zoo(models.Lenet_300_100, 0.1), CIFAR),
    "conv-4": (zoo(models.Conv_4, 0.125), CIFAR),
    "vgg-16": (zoo(models.Vgg_16, 0.0625), CIFAR),
    "resnet-20": (zoo(models.Resnet_20, 0.5), CIFAR),
    "preresnet-164": (zoo(models.Preresnet_164, 0.25), CIFAR),
    "densenet-40": (zoo(models.Densenet_40, 0.34), CIFAR),
    "grouped": (Grouped, SMALL),
    "gated": (Gated, SMALL),
    "concatenated": (Concatenated, SMALL),
    "transformer": (Transformer, (3, 6)),
}

"""Networks as others write them: functional operations, flags, grouped and depthwise convolutions.

They are written here after torchvision's, not imported: a test of Windfall needs neither that nor
timm, which cannot be imported without it.
"""

import pytest
import small
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from windfall import flops, models, seeds, structure, tables, tracing
from windfall.graph import expand

SHAPE = (1, 8, 8)


class BasicBlock(nn.Module):
    """Source: torchvision/models/resnet.py, BasicBlock."""

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return F.relu(out, inplace=True)


class ResNet18(nn.Module):
    """Source: torchvision/models/resnet.py, narrow and for small images."""

    def __init__(self):
        super().__init__()
        self.inplanes = 8
        self.conv1 = nn.Conv2d(1, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = self._make_layer(8, 1)
        self.layer2 = self._make_layer(12, 2)
        self.layer3 = self._make_layer(16, 2)
        self.layer4 = self._make_layer(24, 2)
        self.fc = nn.Linear(24, 10)

    def _make_layer(self, planes, stride):
        downsample = None
        if stride != 1 or self.inplanes != planes:
            conv = nn.Conv2d(self.inplanes, planes, 1, stride, bias=False)
            downsample = nn.Sequential(conv, nn.BatchNorm2d(planes))
        first = BasicBlock(self.inplanes, planes, stride, downsample)
        self.inplanes = planes
        return nn.Sequential(first, BasicBlock(planes, planes))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class InvertedResidual(nn.Module):
    """Source: torchvision/models/mobilenetv2.py, InvertedResidual."""

    def __init__(self, inp, oup, stride, expand_ratio):
        super().__init__()
        hidden_dim = round(inp * expand_ratio)
        self.use_res_connect = stride == 1 and inp == oup
        layers = []
        if expand_ratio != 1:
            layers += [nn.Conv2d(inp, hidden_dim, 1, bias=False), nn.BatchNorm2d(hidden_dim)]
            layers += [nn.ReLU6(inplace=True)]
        depthwise = nn.Conv2d(hidden_dim, hidden_dim, 3, stride, 1, groups=hidden_dim, bias=False)
        layers += [depthwise, nn.BatchNorm2d(hidden_dim), nn.ReLU6(inplace=True)]
        layers += [nn.Conv2d(hidden_dim, oup, 1, bias=False), nn.BatchNorm2d(oup)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """Source: torchvision/models/mobilenetv2.py, narrow, short and for small images."""

    def __init__(self):
        super().__init__()
        stem = [nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)]
        blocks = [(8, 6, 1, 1), (6, 8, 2, 4), (8, 8, 1, 4), (8, 12, 2, 4), (12, 12, 1, 4)]
        head = [nn.Conv2d(12, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*stem, *(InvertedResidual(*b) for b in blocks), *head)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 10))

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


class ResNext(nn.Module):
    """Bottlenecks of grouped convolutions. Source: 1611.05431, Fig. 3(c)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.reduce = nn.ModuleList([nn.Conv2d(16, 8, 1) for _ in range(2)])
        self.grouped = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, groups=4) for _ in range(2)])
        self.widen = nn.ModuleList([nn.Conv2d(8, 16, 1) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(2)])
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for first, middle, last, norm in zip(
            self.reduce, self.grouped, self.widen, self.norms, strict=True
        ):
            x = torch.relu(x + last(F.relu(norm(middle(torch.relu(first(x)))))))
        return self.head(x.mean(dim=(-2, -1)))


NETWORKS = (ResNet18, MobileNetV2, ResNext)


def named(member):
    return member.__name__


@pytest.fixture(params=NETWORKS, ids=named)
def build(request):
    return request.param


def pruned(build):
    """The network, its tensors, half of its channels, and what is left of it."""
    with seeds.isolated(0, "test"), torch.no_grad():
        network = build().eval()
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                for value in (part.weight, part.bias, part.running_mean, part.running_var):
                    value.uniform_(0.5, 1.5)
    groups = tracing.trace(network, SHAPE)
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    channels = {g.name: torch.arange(g.size) % 2 == 0 for g in groups}
    kept = structure.shrunk(tensors, groups, channels)
    smaller = structure.resized(network, structure.shapes(kept))
    smaller.load_state_dict(kept)
    masked = structure.masks(groups, channels, tensors)
    return network, masked, smaller


def test_it_computes_without_channels_what_it_does_with_them_at_0(build):
    network, masks, smaller = pruned(build)
    masked = {n: p * masks.get(n, 1) for n, p in network.named_parameters()}
    with seeds.isolated(1, "test"), torch.no_grad():
        inputs = torch.randn(4, *SHAPE)
        expected = functional_call(network, masked, (inputs,))
        torch.testing.assert_close(smaller(inputs), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(network(inputs), expected, rtol=1e-2)


def test_every_layer_loses_channels_but_the_output(build):
    network, _, smaller = pruned(build)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert smaller.get_submodule(name).out_channels < layer.out_channels
        elif isinstance(layer, nn.Linear):
            assert smaller.get_submodule(name).out_features == 10


def test_it_costs_what_torch_counts(build):
    for network in pruned(build)[::2]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, *SHAPE))
        macs = flops.multiply_adds(network, SHAPE)
        assert counter.get_total_flops() == 2 * sum(macs.values())
        assert list(macs) == list(models.kinds(network, SHAPE))


@pytest.mark.slow
def test_it_is_pruned_and_trained_in_a_study(build, tmp_path):
    prune = {"criterion": "filter-norm", "structure": "channels",
             "selection": {"convolution": 0.5}}  # fmt: skip
    study = small.study({"steps": 6, "eval_every": 3}, model=build, prune=prune, num_seeds=1,
                        levels=1, arms=["dense", "ticket", "scratch-b", "finetune"])  # fmt: skip
    graph = expand(study)
    lab = small.trained(graph, tmp_path / "lab")
    document = tables.summary(tables.outline(graph), lab)
    assert document["pattern"] is None
    for node in graph.nodes:
        record = lab.record(node.address)
        assert record.status == "done"
        assert record.evaluations[-1].step == graph.clock(node.address)[1]
        if node.arm == "ticket":
            state = lab.weights(node.address)
            kept = sum(p.numel() for p in state.params.values() if p.dim() > 1)
            assert record.kept == kept == graph.weights(node) < graph.counts[0] / 2

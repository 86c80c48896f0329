"""What goes through networks, beside plain loops over samples and layers."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from windfall import activations, initialize, models, seeds, signals, structure
from windfall import masks as masking
from windfall.spec import SpecError


def stream(seed=0):
    return seeds.stream(seed, "test-signals")


def normal(*shape, seed=0):
    return torch.from_numpy(stream(seed).standard_normal(shape))


class Residual(nn.Module):
    """Two blocks, functional ReLUs in place, an addition in place, no normalization."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.output = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.first(x))
        for conv in (self.a, self.b):
            out = conv(F.relu(x))
            out += x
            x = out
        return self.output(self.relu(x).mean((2, 3)))


MLP = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
CNN = nn.Sequential(
    nn.Conv2d(2, 5, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 3)
)


def network(name):
    """A network in float64 all of whose weights and biases are random, and its inputs' shape."""
    made, shape = {
        "mlp": (MLP, (6,)),
        "cnn": (CNN, (2, 6, 6)),
        "residual": (Residual(), (2, 6, 6)),
        "resnet": (models.Resnet_20(width=0.25).build((2, 8, 8), 3), (2, 8, 8)),
    }[name]
    made, draws = copy.deepcopy(made).double(), stream(7)
    for param in made.parameters():
        fan = max(1, param[0].numel()) if param.dim() > 1 else 4
        values = torch.from_numpy(draws.normal(0, fan**-0.5, tuple(param.shape)))
        param.data = 1 + 0.1 * values if param.dim() == 1 and name == "resnet" else values
    return made, shape


NAMES = ["mlp", "cnn", "residual", "resnet"]
ROWS = {
    "mlp": ["0", "1", "2", "3", "4"],
    "cnn": ["0", "1", "4"],
    "residual": ["first", "relu", "relu[2]", "a", "relu[3]", "b", "relu[4]", "output"],
}


class Kept:
    """Every layer's and every ReLU's outputs of one sample, with gradients, by plain hooks."""

    def __init__(self, made, one):
        self.reads, self.outputs = {}, {}
        handles = []
        for path, part in made.named_modules():
            if isinstance(part, initialize.Layer | nn.ReLU | nn.Tanh):
                handles.append(part.register_forward_hook(self.keep(path)))
        self.made = made.eval()(one[None])
        for handle in handles:
            handle.remove()

    def keep(self, path):
        def ran(part, args, out):
            if not (isinstance(part, nn.ReLU) and path == "relu"):  # called twice, in place
                self.reads[path], self.outputs[path] = args[0].detach().clone(), out
                return out.clone()  # so that what follows in place leaves it as it was
            return None

        return ran


def walked(made, inputs, labels):
    """By layer, what `Signal` tells, one sample at a time."""
    rows = {}
    for one, label in zip(inputs, labels, strict=True):
        kept = Kept(made, one)
        loss = -kept.made.log_softmax(1)[0, label]
        slopes = torch.autograd.grad(loss, [*kept.outputs.values(), kept.made], allow_unused=True)
        for (path, out), slope in zip(kept.outputs.items(), slopes, strict=False):
            row = rows.setdefault(path, {"h": [], "g": [], "x": [], "g_l": [], "in": []})
            row["h"].append(out[0].detach().flatten())
            row["g"].append(float(slope.square().sum()) ** 0.5)
            row["x"].append(float(one.square().sum()) ** 0.5)
            row["g_l"].append(float(slopes[-1].square().sum()) ** 0.5)
            row["in"].append(float(kept.reads[path].square().sum()) ** 0.5)
    return rows


def calibrated(made, inputs):
    """The network with the statistics of the inputs, found by a pass in training mode."""
    other = copy.deepcopy(made).train()
    sizes = {}
    for path, part in other.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
            part.register_forward_hook(
                lambda p, args, out, path=path: sizes.__setitem__(path, args[0][:, 0].numel())
            )
    with torch.no_grad():
        other(inputs)
    for path, part in other.named_modules():
        if isinstance(part, nn.BatchNorm2d):  # torch keeps the variance of the unbiased kind
            part.running_var *= (sizes[path] - 1) / sizes[path]
    return other.eval()


@pytest.mark.parametrize("name", NAMES)
def test_norms_gradients_and_gains_are_those_of_a_loop_over_samples(name):
    made, shape = network(name)
    inputs, labels = normal(5, *shape), torch.tensor([0, 1, 2, 1, 0])
    found = signals.measured(made, inputs, labels)
    if name in ROWS:
        assert [layer.name for layer in found.layers] == ROWS[name]
    rows = walked(calibrated(made, inputs) if name == "resnet" else made, inputs, labels)
    layers = {layer.name: layer for layer in found.layers}
    assert set(rows) <= set(layers)
    for path, row in rows.items():
        layer, h = layers[path], torch.stack(row["h"])
        lengths = [sum(v * v for v in one.tolist()) ** 0.5 for one in h]
        expected = [a / b for a, b in zip(lengths, row["x"], strict=True)]
        assert found.forward(layer).tolist() == pytest.approx(expected)
        back = [a / b for a, b in zip(row["g"], row["g_l"], strict=True)]
        assert layer.gradients.tolist() == pytest.approx(row["g"])
        assert found.backward(layer).tolist() == pytest.approx(back)
        values = h.flatten().tolist()
        mean = sum(values) / len(values)
        assert layer.variance == pytest.approx(sum((v - mean) ** 2 for v in values) / len(values))
        assert layer.scale == pytest.approx((sum(v * v for v in values) / len(values)) ** 0.5)
        if layer.kind == "weights":
            assert layer.reads.tolist() == pytest.approx(row["in"])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_weights_are_those_of_the_mean_loss(name):
    made, shape = network(name)
    inputs, labels = normal(5, *shape), torch.tensor([0, 1, 2, 1, 0])
    found = signals.measured(made, inputs, labels)
    twin = calibrated(made, inputs) if name == "resnet" else copy.deepcopy(made).eval()
    loss = F.cross_entropy(twin(inputs), labels)
    loss.backward()
    assert found.loss == pytest.approx(loss.item())
    for layer in found.layers:
        if layer.kind == "weights":
            slope = twin.get_submodule(layer.name).weight.grad
            assert layer.weight_gradient == pytest.approx(float(slope.norm()))


def pairs(rows):
    found = []
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            if i != j:
                dot = sum(p * q for p, q in zip(a, b, strict=True))
                found.append(dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b)))
    return sum(found) / len(found)


def test_correlation_is_the_mean_over_pairs():
    rows = normal(4, 2, 3)
    assert activations.correlation(rows) == pytest.approx(pairs(rows.flatten(1).tolist()))
    assert activations.correlation(torch.ones(3, 2)) == pytest.approx(1)
    assert activations.correlation(torch.tensor([[1.0, 0], [0, 2], [0, 0]])) == 0
    assert activations.correlation(torch.tensor([[1.0, 2], [0, 0]])) is None


def test_ranks_are_those_of_torch_and_of_equal_directions():
    low = normal(6, 2) @ normal(2, 9, seed=1)
    rank, effective = activations.ranks(low)
    assert rank == int(torch.linalg.matrix_rank(low)) == 2
    values = torch.linalg.svdvals(low)[:2].tolist()
    shares = [v / sum(values) for v in values]
    assert effective == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert activations.ranks(torch.eye(4)) == (4, pytest.approx(4))
    assert activations.ranks(torch.ones(4, 3)) == (1, pytest.approx(1))
    assert activations.ranks(torch.zeros(4, 3)) == (0, 0)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 3)])
def test_dead_units_and_those_always_on_are_counted_over_samples_and_positions(shape):
    made = normal(*shape).relu()
    made[:, 0], made[:, 1] = 0, 1 + made[:, 1]
    dead = on = 0
    for channel in range(4):
        values = made[:, channel].flatten().tolist()
        dead += all(v <= 0 for v in values)
        on += all(v > 0 for v in values)
    assert activations.units(made) == (dead / 4, on / 4)
    assert dead >= 1 <= on
    assert activations.units(made.movedim(1, -1), axis=-1) == (dead / 4, on / 4)


def test_only_relus_have_dead_units():
    made, shape = network("mlp")
    made[0].bias.data[:3], made[0].bias.data[3:5] = -100, 100
    found = {layer.name: layer for layer in signals.measured(made, normal(9, *shape)).layers}
    assert found["1"].dead >= 3 / 8
    assert found["1"].always_on >= 2 / 8
    assert found["3"].kind == "activation"
    assert (found["0"].dead, found["3"].dead, found["3"].always_on) == (None, None, None)


def test_units_of_tokens_are_on_the_last_axis():
    made = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    made[0].bias.data[:3] = -100
    found = signals.measured(made, normal(5, 7, 4))
    assert found.layers[1].dead >= 0.5


def test_without_labels_the_gradient_is_of_a_named_streams_sum():
    made, shape = network("cnn")
    inputs = normal(4, *shape)
    found = signals.measured(made, inputs, seed=3)
    cotangent = seeds.stream(3, "cotangent").standard_normal((4, 3))
    for i, one in enumerate(inputs):
        hidden = made[0](one[None]).detach().requires_grad_()
        outputs = made[2:](hidden.relu())
        (slope,) = torch.autograd.grad(outputs @ torch.from_numpy(cotangent[i]), hidden)
        assert float(found.layers[0].gradients[i]) == pytest.approx(float(slope.norm()))
        assert float(found.gradients[i]) == pytest.approx(math.dist(cotangent[i], [0, 0, 0]))
    assert found.loss is None
    other = signals.measured(made, inputs, seed=4)
    assert not torch.equal(other.gradients, found.gradients)


@pytest.mark.parametrize("name", NAMES)
def test_the_jacobian_is_that_of_one_sample_at_a_time(name):
    made, shape = network(name)
    inputs = normal(3, *shape)
    found = signals.measured(made, inputs, num_jacobians=2).jacobian
    twin = (calibrated(made, inputs) if name == "resnet" else made).eval()
    for i in range(2):
        matrix = torch.autograd.functional.jacobian(lambda x: twin(x[None])[0], inputs[i])
        values = torch.linalg.svdvals(matrix.flatten(1))
        torch.testing.assert_close(found.top[i], values)
        assert float(found.mean_square[i]) == pytest.approx(float(values.square().mean()))
    assert len(found.top) == 2
    assert signals.measured(made, inputs, num_jacobians=0).jacobian is None


def test_masked_networks_are_measured_by_their_tensors():
    made, shape = network("mlp")
    inputs, labels = normal(4, *shape), torch.tensor([0, 1, 2, 0])
    params = {name: param.detach() for name, param in made.named_parameters()}
    masks = {"2.weight": normal(7, 8, seed=3) > 0}
    found = signals.measured(made, inputs, labels, tensors=masking.apply(masks, params))
    masked = structure.given(made, masking.apply(masks, params))
    expected = signals.measured(masked, inputs, labels)
    plain = signals.measured(made, inputs, labels)
    assert found.document() == expected.document()
    assert found.document() != plain.document()


def test_batchnorm_that_saw_nothing_takes_the_batchs_statistics_and_others_keep_theirs():
    made = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).double()
    inputs = 5 + normal(6, 4)
    found = signals.measured(made, inputs)
    expected = copy.deepcopy(made).train()[:3](inputs)
    assert found.layers[1].norms.tolist() == pytest.approx(expected.norm(dim=1).tolist())
    made[1].running_mean.fill_(0.5)
    kept = signals.measured(made, inputs)
    expected = copy.deepcopy(made).eval()[:3](inputs)
    assert kept.layers[1].norms.tolist() == pytest.approx(expected.norm(dim=1).tolist())
    assert (found.layers[0].norm, found.layers[0].has_bias) == ("1", True)
    assert found.layers[2].norm is None


def test_a_layer_whose_outputs_change_before_batchnorm_is_not_read_by_it():
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x):
            made = self.a(x)
            made += 1
            return self.b(self.norm(made))

    found = signals.measured(Changed(), normal(5, 4))
    assert [layer.norm for layer in found.layers] == [None, None]


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_left_exactly_as_it_was(name):
    made, shape = network(name)
    made.train()
    next(made.modules()).training = True
    frozen = next(made.parameters())
    frozen.requires_grad_(False)
    tensors = {n: t.clone() for n, t in structure.tensors(made).items()}
    modes = [part.training for part in made.modules()]
    inputs = normal(4, *shape)
    kept, before = inputs.clone(), seeds.generators()
    signals.measured(made, inputs, torch.tensor([0, 1, 2, 0]))
    assert seeds.generators() == before
    assert [part.training for part in made.modules()] == modes
    for each, tensor in structure.tensors(made).items():
        assert torch.equal(tensor, tensors[each])
    assert all(param.grad is None for param in made.parameters())
    assert not frozen.requires_grad
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in made.modules())
    assert torch.equal(inputs, kept)
    assert not inputs.requires_grad


def test_a_network_that_fails_is_left_as_it_was_too():
    made, _ = network("cnn")
    made.train()
    with pytest.raises(SpecError, match=r"must accept inputs of shape \[3, 7\]"):
        signals.measured(made, normal(3, 7))
    assert made.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in made.modules())


def test_dropout_does_not_drop():
    made = nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 2)).double().train()
    one, other = (signals.measured(made, normal(4, 4), seed=seed) for seed in (0, 1))
    assert torch.equal(one.layers[1].norms, other.layers[1].norms)


# -- overflow --------------------------------------------------------------------------------------


def deep(factor, depth=12, width=6):
    parts = []
    for index in range(depth):
        layer = nn.Linear(width, width)
        layer.weight.data = factor * normal(width, width, seed=index).float()
        layer.bias.data.zero_()
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(width, 3))


def test_a_signal_that_overflows_is_told_where_and_never_as_nan():
    made, inputs = deep(1e5), normal(4, 6).float()
    found = signals.measured(made, inputs, torch.tensor([0, 1, 2, 0]))
    x, first = inputs, None
    for index, part in enumerate(made):
        x = part(x)
        if first is None and not bool(x.isfinite().all()):
            first = str(index), "nan" if bool(x.isnan().any()) else "inf"
    rows = [(layer.name, layer.nonfinite) for layer in found.layers if layer.nonfinite]
    assert rows[0] == first
    assert found.output_nonfinite == "nan"
    assert found.jacobian is None
    assert found.loss is None
    document = found.document()
    text = json.dumps(document, allow_nan=False)
    row = next(row for row in document["layers"] if row["name"] == first[0])
    assert (row["nonfinite"], row["scale"], row["forward"]) == (first[1], None, None)
    assert "NaN" not in text


def test_a_gradient_that_overflows_is_told_where():
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope * math.inf

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.c(self.b(Steep.apply(self.a(x))))

    rows = signals.measured(Net(), normal(3, 4), num_jacobians=0).document()["layers"]
    assert [row["nonfinite"] for row in rows] == [None] * 3
    assert [row["gradient_nonfinite"] is None for row in rows] == [False, True, True]
    assert rows[0]["backward"] is None


def test_a_layer_that_no_gradient_reaches_has_none():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(x).detach() + x)

    found = signals.measured(Cut().double(), normal(3, 4))
    assert found.layers[0].gradients is None
    assert found.layers[0].weight_gradient is None
    assert found.layers[1].gradients is not None
    json.dumps(found.document(), allow_nan=False)


# -- the statistics of the paper -------------------------------------------------------------------


def paper(width, factor=2.0, depth=10, seed=0):
    """N(0, factor / m), m the layer's outputs; x ~ N(0, I) of 100; 20 outputs, unscaled."""
    parts, size = [], 100
    for index in range(depth):
        layer = nn.Linear(size, width, bias=False)
        draws = seeds.stream(seed, "paper", index).standard_normal((width, size))
        layer.weight.data = torch.from_numpy(draws * math.sqrt(factor / width))
        parts += [layer, nn.ReLU()]
        size = width
    head = nn.Linear(width, 20, bias=False)
    draws = seeds.stream(seed, "paper", depth).standard_normal((20, width))
    head.weight.data = torch.from_numpy(draws)
    return nn.Sequential(*parts, head)


def deviations(width, factor=2.0):
    found = [
        signals.measured(paper(width, factor, seed=s), normal(50, 100), num_jacobians=0)
        for s in range(3)
    ]
    return [
        sum(each) / len(found)
        for each in zip(
            *[(f.forward_deviation(), f.backward_deviation()) for f in found], strict=True
        )
    ]


def test_wide_networks_of_the_paper_keep_norms_both_ways():
    (narrow_up, narrow_down), (wide_up, wide_down) = deviations(100), deviations(800)
    assert wide_up < 0.12 < narrow_up < 0.35
    assert wide_down < 0.2 < narrow_down


def test_backward_deviation_is_that_of_the_formula():
    made, inputs = paper(40, depth=3), normal(4, 100)
    found = signals.measured(made, inputs)
    total = []
    cotangent = torch.from_numpy(seeds.stream(0, "cotangent").standard_normal((4, 20)))
    for i, one in enumerate(inputs):
        h, before = one, []
        for layer in made[:-1]:
            if isinstance(layer, nn.Linear):
                below = h
                h = layer(h)
                h.retain_grad()
                before.append((below, h))
            else:
                h = layer(h)
        (made[-1](h) @ cotangent[i]).backward()
        for below, pre in before:
            length = float(below.detach().norm() * pre.grad.norm())
            total.append(abs(1 - length / float(one.norm() * before[-1][1].grad.norm())))
    assert found.backward_deviation() == pytest.approx(sum(total) / len(total))


def test_glorot_halves_the_square_in_every_layer():
    found = signals.measured(paper(600, 1.0), normal(20, 100), num_jacobians=0)
    ratios = [float(found.forward(e).mean()) for e in found.layers if e.kind == "activation"]
    assert ratios[0] == pytest.approx(2**-0.5, rel=0.1)
    assert ratios[-1] == pytest.approx(2**-5, rel=0.4)


# -- inputs and refusals ---------------------------------------------------------------------------


def test_offset_and_spread_are_of_the_worst_channel():
    inputs = torch.from_numpy(stream().standard_normal((50, 3, 8, 8)))
    inputs[:, 1] = 4 * inputs[:, 1] + 8
    found = signals.measured(network_of_three(), inputs, num_jacobians=0)
    channel = inputs[:, 1].flatten()
    deviation = float(channel.std(correction=0))
    assert found.spread == pytest.approx(deviation)
    assert found.offset == pytest.approx(float(channel.mean()) / deviation)
    flat = signals.measured(nn.Linear(5, 2), 3 + 0.1 * normal(40, 5), num_jacobians=0)
    assert flat.offset == pytest.approx(30, rel=0.1)
    assert flat.spread == pytest.approx(0.1, rel=0.1)


def network_of_three():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 2)).double()


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x), x


class Fixed(Tuple):
    def forward(self, x):
        with torch.no_grad():
            return self.a(x)


class Summed(Tuple):
    def forward(self, x):
        return self.a(x).sum()


@pytest.mark.parametrize(
    ("made", "inputs", "labels", "more", "message"),
    [
        (MLP, torch.zeros(0, 6), None, {}, "at least one"),
        (MLP, torch.zeros(6), None, {}, r"\[sample, ...\]; got shape \[6\]"),
        (MLP, torch.full((2, 6), math.nan), None, {}, "`inputs` must be finite"),
        (MLP, torch.ones(2, 6), torch.zeros(3).long(), {}, "`labels` must be 2"),
        (MLP, torch.ones(2, 6), torch.tensor([0, 9]), {}, "at least 10 classes"),
        (MLP, torch.ones(2, 6), None, {"tensors": {"9.weight": torch.ones(1)}}, "no `9.weight`"),
        (MLP, torch.ones(2, 5), None, {}, r"must accept inputs of shape \[2, 5\]"),
        (Tuple(), torch.ones(2, 6), None, {}, "must return outputs of shape .* got tuple"),
        (Summed(), torch.ones(2, 6), None, {}, r"must return outputs of shape .* got \[\]"),
        (Fixed(), torch.ones(2, 6), None, {}, "gradient path"),
    ],
)
def test_what_cannot_be_measured_is_refused(made, inputs, labels, more, message):
    with pytest.raises(SpecError, match=message):
        signals.measured(made, inputs, labels, **more)


def test_a_jacobian_that_overflows_where_outputs_do_not_is_none():
    made = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    for part, scale in zip(made, (1e-30, 1e30, 1e30), strict=True):
        part.weight.data = scale * torch.eye(3, dtype=torch.float32)
    found = signals.measured(made, normal(4, 3).float())
    assert found.output_nonfinite is None
    assert found.jacobian is None


def test_integer_inputs_are_tokens_and_have_no_jacobian():
    made = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 8), nn.ReLU(),
                         nn.Linear(8, 3))  # fmt: skip
    found = signals.measured(made, torch.arange(30).reshape(6, 5) % 9)
    assert [layer.name for layer in found.layers] == ["2", "3", "4"]
    assert found.jacobian is None


def test_attention_is_told_by_its_output_layer():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.output = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)  # fmt: skip  # noqa: E501

        def forward(self, x):
            return self.output(self.attention(x, x, x)[0].mean(1))

    found = signals.measured(Attends(), normal(3, 5, 4))
    assert [layer.name for layer in found.layers] == ["attention.out_proj", "output"]

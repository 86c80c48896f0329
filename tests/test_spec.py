"""Specs: immutable, checked when made, written as JSON, named by what they say."""

import hashlib
import itertools
import json
import math
import random
from typing import Annotated

import pytest
from pydantic import Field, ValidationError, model_validator

from windfall import (
    adjust,
    arms,
    criteria,
    initialize,
    models,
    prune,
    runs,
    selection,
    sparsity,
    spec,
    train,
    units,
)
from windfall import data as datasets
from windfall.spec import FAMILY, Spec, SpecError

FAMILIES = {
    "Initialization": initialize.Initialization,
    "Model": models.Model,
    "Data": datasets.Data,
    "Optimizer": train.Optimizer,
    "Schedule": train.Schedule,
    "Criterion": criteria.Criterion,
    "Selection": selection.Selection,
    "Structure": units.Structure,
    "Penalty": sparsity.Penalty,
    "Rhythm": sparsity.Rhythm,
    "Adjust": adjust.Adjust,
    "Rewind": prune.Rewind,
    "Start": runs.Start,
    "Arm": arms.Arm,
}
REQUIRED = {
    "learning-rate": {"steps": 3},
    "continue": {"steps": 3},
    "ratios": {"removed": (0.5, 0.25)},
    "published": {"target": "vgg-16-a"},
    "pruned": {"parent": "0" * 64, "level": 1},
    "tensors": {"sha256": "1" * 64, "num_classes": 2},
    "user-data": {"callable": "package.module:load"},
    "guided": {"stages": (0.5, 0.25, 1.0)},
    "transferred": {"stages": (0.5, 0.25, 1.0)},
    "user-model": {"callable": "package:make", "source": "s", "parameters": {"w": (2, 3)}},
}
MEMBERS = [
    pytest.param(family, name, id=f"{label}-{name}")
    for label, family in FAMILIES.items()
    for name in spec.members(family)
]


def made(family, name):
    return spec.members(family)[name](**REQUIRED.get(name, {}))


class Circle(Spec):
    radius: float = Field(default=1.0, gt=0)


class Right_Square(Spec):
    side: float = Field(default=1.0, gt=0)
    corners: tuple[int, ...] = (4,)


class Twice(Spec):
    """A member whose field is of its own family's kind."""

    of: Annotated[Circle | Right_Square, FAMILY] = Circle(radius=2)


Plain = Circle | Right_Square
Shape = Annotated[Annotated[Plain, FAMILY] | Twice, FAMILY]


class Drawing(Spec):
    shape: Shape = Circle(radius=3)
    others: tuple[Shape, ...] = ()
    first: Circle = Circle(radius=5)
    is_filled: bool = False
    name: str = "drawing"
    place: str = spec.unaddressed("here")

    @model_validator(mode="after")
    def _is_named(self) -> "Drawing":
        if self.name == "nameless":
            raise ValueError("`name` must be a name; got nameless")
        return self


@pytest.mark.parametrize(("family", "name"), MEMBERS)
class TestEveryMemberOfEveryFamily:
    def test_its_tag_is_its_class_name_in_kebab_case(self, family, name):
        assert name == name.lower()
        assert "_" not in name
        assert name.replace("-", "") == type(made(family, name)).__name__.replace("_", "").lower()

    def test_it_is_what_its_json_says(self, family, name):
        member = made(family, name)
        document = json.loads(spec.canonical(member.to_json(addressed=False)))
        assert document["kind"] == name
        assert spec.decode(family, document) == member
        assert type(member).from_json(document) == member

    def test_its_address_survives_being_stored(self, family, name):
        member = made(family, name)
        stored = type(member).from_json(json.loads(spec.canonical(member.to_json())))
        assert stored.address == member.address
        assert len(member.address) == 64

    def test_its_bare_name_is_the_member_with_its_defaults(self, family, name):
        if name in REQUIRED:
            with pytest.raises(SpecError, match="must be given"):
                spec.decode(family, name)
        else:
            assert spec.decode(family, name) == spec.members(family)[name]()

    def test_an_instance_passes_through(self, family, name):
        member = made(family, name)
        assert spec.decode(family, member) == member

    def test_it_cannot_change(self, family, name):
        member = made(family, name)
        for field in type(member).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(member, field, getattr(member, field))

    def test_it_is_a_key_of_dictionaries(self, family, name):
        assert {made(family, name): 1}[made(family, name)] == 1

    def test_an_unknown_field_is_refused_with_the_known_ones(self, family, name):
        document = made(family, name).to_json(addressed=False)
        with pytest.raises(SpecError, match=r"[Hh]as no field `no_such_field`\.") as caught:
            spec.decode(family, document | {"no_such_field": 1})
        assert all(field in str(caught.value) for field in document if field != "kind")

    def test_a_nan_is_no_number(self, family, name):
        document = made(family, name).to_json(addressed=False)
        for field, value in document.items():
            if isinstance(value, float):
                for wrong in (math.nan, math.inf):
                    with pytest.raises(SpecError, match=f"`{field}` must be a finite number"):
                        spec.decode(family, document | {field: wrong})


@pytest.mark.parametrize("label", FAMILIES)
def test_every_unknown_name_lists_the_known_ones(label):
    with pytest.raises(
        SpecError, match=r"^Must be one of the known names; got 'nonesuch'"
    ) as caught:
        spec.decode(FAMILIES[label], "nonesuch")
    assert str(caught.value).endswith(f"Known: {', '.join(spec.members(FAMILIES[label]))}.")


# -- names and addresses ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "name"),
    [
        (Circle, "circle"),
        (Right_Square, "right-square"),
        (models.Lenet_300_100, "lenet-300-100"),
        (models.Conv_2, "conv-2"),
        (datasets.Cifar10, "cifar10"),
        (prune.ToStep, "to-step"),
    ],
)
def test_tags_are_kebab_case(member, name):
    assert spec.tag(member) == name


def test_members_are_in_the_order_of_the_union_those_of_inner_families_included():
    assert spec.members(Shape) == {"circle": Circle, "right-square": Right_Square, "twice": Twice}


def test_an_address_is_the_sha256_of_sorted_compact_json():
    text = '{"kind":"right-square","corners":[4,5],"side":2.0}'
    parsed = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    square = Right_Square(side=2, corners=(4, 5))
    assert square.address == hashlib.sha256(parsed.encode()).hexdigest()


DENSE = runs.Run(
    model=models.Lenet_300_100(),
    data=datasets.Digits(),
    data_sha256="0" * 64,
    recipe=train.Recipe(
        optimizer=train.Adam(), learning_rate=1.2e-3, steps=400, batch_size=60, eval_every=10
    ),
    seed=0,
)
THETA = runs.Fresh(stream="reinit")


def child(**how):
    start = runs.Pruned(parent=DENSE.address, **how)
    return DENSE.model_copy(update={"start": start})


GOLDEN = {
    "2908922af30091a66a82abfecfa98cfa92ae8534e6f8cd6415d7affe113e864b": DENSE,
    "d760616a00950597927d6a18e8fa4d3292dc2ea05a5b807048f7528ad825a67a": DENSE.model_copy(
        update={"seed": 1}
    ),
    "da62a3ddd92e6eb8b6a5a49fc155a49a5068fb204bc40ee3a2cd3848b4d59905": child(level=1),
    "27142a6b6f3c6cb62266831092cd0b64490d9785514a0fee684823f5b551aef3": child(
        level=1, weights=prune.ToStep(step=100)
    ),
    "1c2d04bbadfa8f73423b7e1f5146dcf34b6a05e23126b72365a4951e708067a6": child(
        level=2, weights=prune.LearningRate(steps=100)
    ),
    "b8c5b98989ed4f87f4b0437c6f20b61caa62f3f3e643c6b32e7fa0f3489399cc": child(
        level=1, weights=THETA
    ),
    "3d3b217500591be6fef2c4eadcee5226430b69f0c974c00aad38c82d12458ff5": child(
        level=1, weights=THETA, arrange="shuffled"
    ),
    "7516d5dea9d2ff9eae48fa6edffba2fc567a1b3634642b21d56f333a34c39f55": child(
        level=1, weights=THETA, arrange="uniform"
    ),
    "7cc9a747d84a608a518ede3acebf741bb7751b9e5115b264071d5858196ba85e": child(
        level=1, prune=prune.Prune(selection=selection.Global(density=0.1), criterion="random")
    ),
    "a8bf4de94f0902be70eef1f5f5cf805b5cd764926512f745c9aae77d0b3ebfb1": DENSE.model_copy(
        update={
            "recipe": train.Recipe(
                optimizer=train.Sgd(momentum=0.9, weight_decay=1e-4),
                schedule=train.Cosine(warmup=5),
                augment=datasets.CropFlip(),
            )
        }
    ),
    "4e7dbcecd9835d076a40e141576272e83ab399f2de458a09608bc99eee565fe1": runs.Run(
        model=models.Conv_4(width=0.5),
        data="cifar10",
        data_sha256="1" * 64,
        recipe=train.Recipe(),
        seed=7,
    ),
    "bff49b95aeedca88c4362b9de92152438aa69c02e26d678a9a7540de3754a1df": child(
        level=1, weights=runs.Fresh(stream="reinit", budget=runs.Budget())
    ),
    "981655d8d6a33340a8f520bff430809406501a5588cac1af69f2ad271a107273": child(
        level=1, weights=prune.Continue(steps=100, learning_rate=1e-5)
    ),
    "7db67918ce50e403110f60728c77a0e5fdbb6180f29bebeb414df99fc17d012e": child(
        level=1,
        prune=prune.Prune(criterion="thinet", structure="channels", adjust="rescale"),
    ),
    "fccb329dd312a7d67d7daff01d767002fa7537db84f30f5bd4f8731a48c509be": child(
        level=1,
        prune=prune.Prune(
            criterion="filter-norm",
            structure="channels",
            selection=selection.Published(target="resnet-56-b"),
        ),
    ),
    "b2b6523e6366544a2423a6b30fe4ede270c539662090eadd3424205c3f9b4c28": DENSE.model_copy(
        update={"recipe": train.Recipe(penalty=sparsity.ScalePenalty())}
    ),
    "fee1c1161268c0c6df23828eb9f3978b927e376f7e64d9c8147b127fdaec38d2": DENSE.model_copy(
        update={
            "model": models.Resnet_20(gates=True),
            "recipe": train.Recipe(penalty=sparsity.GatePenalty()),
        }
    ),
    "ebe8692f7df1877078a87afc6dde4ca2be8ea5ffb6a3d33cd6900318e47df4c3": child(
        level=1,
        prune=prune.Prune(criterion="gate", selection="positive", structure="blocks"),
    ),
    "26201ec026cb35755d3503b593d47a304d0886963d5dbfd7a5209e92439353f7": DENSE.model_copy(
        update={"recipe": train.Recipe(rhythm=sparsity.SoftPruning(every=100))}
    ),
    "2383a548036f6bc987c07dd815e00c5eb7e790d1591def735235024094cc73fa": DENSE.model_copy(
        update={"model": models.Vgg_16(stages=(1, 0.5, 0.25, 0.75, 0.125)), "start": THETA}
    ),
    "29560e529a9b88ec52ded45badcc8ce31a10ce826a19fe3e183c7accfa9a51b6": DENSE.model_copy(
        update={"model": models.Resnet_56(stages=(1, 0.5, 0.25), shared=(0.5, 1, 1))}
    ),
}


@pytest.mark.parametrize(("address", "run"), GOLDEN.items(), ids=lambda value: str(value)[:8])
def test_golden_addresses_of_runs_stay_what_they_are(address, run):
    """If not, every stored run loses its name; a new field needs an `absent` (see `spec.later`)."""
    assert run.address == address


def test_changing_any_field_of_a_run_changes_its_address():
    changes = {
        "model": models.Lenet_300_100(width=2),
        "data": datasets.Digits(split_seed=1),
        "data_sha256": "1" * 64,
        "recipe": train.Recipe(),
        "start": THETA,
        "seed": 1,
    }
    assert changes.keys() == runs.Run.model_fields.keys()
    changed = {DENSE.model_copy(update={name: value}).address for name, value in changes.items()}
    assert len(changed | {DENSE.address}) == len(changes) + 1


def test_where_files_lie_and_how_they_are_checked_is_not_in_an_address():
    here = datasets.Cifar10()
    there = datasets.Cifar10(root="/elsewhere", verify=False, note="not the official files")
    assert here.address == there.address
    assert here != there
    assert there.to_json(addressed=False)["root"] == "/elsewhere"
    assert "root" not in there.to_json()


def test_a_field_out_of_the_address_is_read_back_from_the_whole_json():
    drawing = Drawing(place="there")
    assert Drawing.from_json(drawing.to_json(addressed=False)) == drawing
    assert Drawing.from_json(drawing.to_json()) == Drawing(place="here")


# -- canonical JSON ---------------------------------------------------------------------------

TEXTS = [
    "",
    "a",
    '"',
    "\\",
    '","b":"',
    "a,b",
    "[1]",
    "null",
    "\n",
    "\u2028",
    "é",
    "e\u0301",
    "\x00",
]
DOCUMENTS = [
    None,
    True,
    False,
    0,
    1,
    0.1,
    0.1 + 0.2,
    0.3,
    1e-300,
    10**30,
    [],
    {},
    [[]],
    [None],
    "1",
    "true",
    ["a", "b"],
    ["a,b"],
    ['a","b'],
    {"a": "b", "c": "d"},
    {"a": 'b","c":"d'},
    {"a": {"b": 1}},
    {"a": [{"b": 1}]},
    {"a.b": 1},
    *TEXTS,
    *({"name": text} for text in TEXTS),
    *({text: "name"} for text in TEXTS),
]


def test_two_different_documents_never_share_a_text():
    for one, other in itertools.combinations(DOCUMENTS, 2):
        assert spec.canonical(one) != spec.canonical(other)
        assert spec.digest(one) != spec.digest(other)


def drawn_document(draw, depth=3):
    kind = draw.choice("sfinbld" if depth else "sfinb")
    if kind in "ld":
        size = draw.randrange(4)
        items = [drawn_document(draw, depth - 1) for _ in range(size)]
        if kind == "l":
            return items
        return {draw.choice(TEXTS) + str(index): item for index, item in enumerate(items)}
    values = {
        "s": draw.choice(TEXTS),
        "f": draw.uniform(-1, 1) * 10 ** draw.randint(-320, 300),
        "i": draw.randint(-(10**20), 10**20),
        "n": None,
        "b": draw.random() < 0.5,
    }
    return values[kind]


def test_a_document_can_be_read_back_from_its_text():
    draw = random.Random(0)
    for _ in range(500):
        document = drawn_document(draw)
        assert json.loads(spec.canonical(document)) == document


def test_the_order_of_keys_and_the_type_of_sequences_do_not_matter():
    one, other = {"b": [1, {"y": 2, "x": 3}], "a": None}, {"a": None, "b": (1, {"x": 3, "y": 2})}
    assert spec.canonical(one) == spec.canonical(other) == '{"a":null,"b":[1,{"x":3,"y":2}]}'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_no_json(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        spec.canonical({"value": value})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (train.Recipe(learning_rate=1), train.Recipe(learning_rate=1.0)),
        (train.Recipe(learning_rate=1e-3), train.Recipe(learning_rate=0.001)),
        (train.Sgd(weight_decay=-0.0), train.Sgd(weight_decay=0.0)),
        (models.Mlp(hidden=[5]), models.Mlp(hidden=(5,))),
        (train.Recipe(steps=1000), train.Recipe(steps=1e3)),
        (train.Recipe(optimizer="adam"), train.Recipe(optimizer={"kind": "adam", "beta1": 0.9})),
    ],
)
def test_two_spellings_of_one_value_have_one_address(one, other):
    assert one == other
    assert one.address == other.address


def test_close_floats_have_different_addresses():
    values = [0.1 + 0.2, 0.3, math.nextafter(0.3, 0)]
    assert len({train.Recipe(learning_rate=value).address for value in values}) == 3


# -- fields that are added later --------------------------------------------------------------


def before():
    class Recipe(Spec):
        rate: float = 0.1

    return Recipe


def after(default, absent):
    class Recipe(Spec):
        rate: float = 0.1
        momentum: float = spec.later(default, absent=absent, ge=0)

    return Recipe


def test_a_later_field_leaves_old_addresses_alone():
    old, new = before()(rate=0.5), after(0.0, absent=0.0)
    assert new(rate=0.5).address == old.address
    assert new(rate=0.5, momentum=0.9).address != old.address
    assert "momentum" not in new(rate=0.5).to_json(addressed=False)


def test_an_old_record_means_what_it_meant_whatever_the_default_is_now():
    old, new = before()(rate=0.5), after(0.9, absent=0.0)
    read = new.from_json(old.to_json())
    assert read.momentum == 0.0
    assert read.address == old.address
    assert new(rate=0.5).momentum == 0.9
    assert new(rate=0.5).address != old.address


def test_a_record_written_with_the_field_is_read_with_it():
    new = after(0.9, absent=0.0)
    for momentum in (0.0, 0.5, 0.9):
        assert new.from_json(new(momentum=momentum).to_json()).momentum == momentum


def test_later_fields_inside_a_stored_spec_are_absent_too():
    class Holder(Spec):
        recipe: after(0.9, absent=0.0)

    document = {"kind": "holder", "recipe": before()().to_json()}
    assert Holder.from_json(document).recipe.momentum == 0.0
    assert Holder.model_validate(document).recipe.momentum == 0.9


def test_a_later_field_keeps_its_constraints():
    with pytest.raises(SpecError, match="`momentum` must be greater than or equal to 0; got -1"):
        spec.checked(lambda: after(0.0, absent=0.0)(momentum=-1))


# -- names, tables, defaults ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ("circle", Circle()),
        ({"kind": "circle"}, Circle()),
        ({"kind": "right-square", "side": 2}, Right_Square(side=2)),
        ("twice", Twice(of=Circle(radius=2))),
        ({"kind": "twice", "of": "right-square"}, Twice(of=Right_Square())),
        ({"kind": "twice", "of": {"kind": "circle", "radius": 7}}, Twice(of=Circle(radius=7))),
    ],
)
def test_names_tables_and_instances_mean_the_same(given, shape):
    assert spec.decode(Shape, given) == spec.decode(Shape, shape) == shape
    assert Drawing(shape=given).shape == shape
    assert Drawing(others=[given, shape]).others == (shape, shape)


def test_a_table_without_a_kind_changes_fields_of_the_default():
    class Page(Spec):
        drawing: Drawing = Drawing(name="one", place="there")
        square: Shape = Right_Square(side=7)

    assert Page(square={"corners": [1]}).square == Right_Square(side=7, corners=(1,))
    assert Page(square={"kind": "right-square", "corners": [1]}).square.side == 1
    assert Drawing(first={}).first == Circle(radius=5)
    assert Page(drawing={"is_filled": True}).drawing == Drawing(
        name="one", place="there", is_filled=True
    )
    assert train.Recipe(optimizer={"momentum": 0.9}) == train.Recipe(
        optimizer=train.Sgd(momentum=0.9)
    )
    assert arms.Rewind(to={"optimizer": "restored"}).to == prune.ToStep(
        step=100, optimizer="restored"
    )


def test_a_spec_that_is_no_family_has_a_bare_name_too():
    assert train.Recipe(augment="crop-flip").augment == datasets.CropFlip()
    assert Drawing(first="circle").first == Circle()


def test_a_namesake_of_another_family_is_no_member():
    with pytest.raises(SpecError, match=r"^Must be one of the known names; got Random\(\)"):
        spec.decode(criteria.Criterion, arms.Random())


def test_a_document_of_another_kind_is_refused():
    with pytest.raises(SpecError, match=r"^Must be of kind circle; got 'right-square'"):
        spec.checked(lambda: Circle.from_json({"kind": "right-square"}))


# -- messages ---------------------------------------------------------------------------------

KNOWN = "Known: circle, right-square, twice."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shape": {"kind": "circle", "radius": 0}},
            "`shape.radius` must be greater than 0; got 0.",
        ),
        (
            {"shape": {"kind": "twice", "of": {"kind": "circle", "radius": "x"}}},
            "`shape.of.radius` must be a valid number, unable to parse string as a number;"
            " got 'x'.",
        ),
        (
            {"others": ["circle", {"kind": "right-square", "side": -1}]},
            "`others.right-square.side` must be greater than 0; got -1.",
        ),
        (
            {"others": [{"kind": "twice", "of": {"kind": "circle", "radius": 0}}]},
            "`others.twice.of.radius` must be greater than 0; got 0.",
        ),
        (
            {"shape": {"kind": "right-square", "corners": [1, "b"]}},
            "`shape.corners.1` must be a valid integer, unable to parse string as an integer;"
            " got 'b'.",
        ),
        (
            {"shape": "cirle"},
            "`shape` must be one of the known names; got 'cirle'. Did you mean `circle`? " + KNOWN,
        ),
        ({"shape": "zzz"}, "`shape` must be one of the known names; got 'zzz'. " + KNOWN),
        ({"shape": 5}, "`shape` must be one of the known names; got 5. " + KNOWN),
        ({"shape": None}, "`shape` must be one of the known names; got None. " + KNOWN),
        ({"shape": ["circle"]}, "`shape` must be one of the known names; got ['circle']. " + KNOWN),
        ({"shape": {"kind": []}}, "`shape` must be one of the known names; got []. " + KNOWN),
        ({"shape": {"kind": 3}}, "`shape` must be one of the known names; got 3. " + KNOWN),
        (
            {"others": [{"radius": 2}]},
            "`others.0` must be one of the known names; got {'radius': 2}. " + KNOWN,
        ),
        (
            {"shape": {"kind": "circle", "radios": 2}},
            "`shape` has no field `radios`. Did you mean `radius`? Known: radius.",
        ),
        (
            {"colour": 1},
            "Has no field `colour`. Known: shape, others, first, is_filled, name, place.",
        ),
        ({"first": 3}, "`first` must be a valid dictionary or instance of Circle; got 3."),
        (
            {"first": "square"},
            "`first` must be a valid dictionary or instance of Circle; got 'square'.",
        ),
        ({"first": True}, "`first` must be neither true nor false; got True."),
        ({"first": {"radius": True}}, "`first.radius` must be neither true nor false; got True."),
        ({"name": 3}, "`name` must be a valid string; got 3."),
        ({"name": "nameless"}, "`name` must be a name; got nameless."),
        ({"others": 3}, "`others` must be a list; got 3."),
    ],
)
def test_a_message_names_the_field_what_it_must_be_and_what_it_got(settings, message):
    with pytest.raises(SpecError) as caught:
        spec.checked(lambda: Drawing.model_validate(settings))
    assert str(caught.value) == message


def test_a_message_from_a_nested_validator_names_the_whole_path():
    class Page(Spec):
        drawing: Drawing

    with pytest.raises(SpecError) as caught:
        spec.checked(lambda: Page(drawing={"name": "nameless"}))
    assert str(caught.value) == "`drawing.name` must be a name; got nameless."
    with pytest.raises(SpecError, match=r"^`drawing` must be given\.$"):
        spec.checked(lambda: Page())


def test_a_field_named_like_a_member_of_a_family_is_named_in_full():
    """`recipe` and `prune` are names of classes too."""
    with pytest.raises(SpecError, match=r"^`recipe\.steps` must be greater than or equal to 1"):
        spec.checked(lambda: runs.Run(**dict(DENSE) | {"recipe": {"steps": 0}}))
    with pytest.raises(SpecError, match=r"^`start\.prune\.selection\.rate` must be less than 1"):
        start = {"kind": "pruned", "parent": "0" * 64, "level": 1}
        start |= {"prune": {"selection": {"kind": "global", "rate": 1}}}
        spec.checked(lambda: runs.Run(**dict(DENSE) | {"start": start}))


def test_what_has_no_path_is_told_without_one():
    with pytest.raises(SpecError, match=r"^Must be a valid dictionary .*; got 5\.$"):
        spec.decode(train.Recipe, 5)


def test_every_problem_is_told_at_once():
    with pytest.raises(SpecError) as caught:
        spec.checked(lambda: train.Recipe(steps=0, batch_size=0))
    assert str(caught.value) == (
        "`steps` must be greater than or equal to 1; got 0."
        " `batch_size` must be greater than or equal to 1; got 0."
    )


def test_the_nearest_name_is_offered_only_when_it_is_near():
    assert spec.nearest("tickit", ["ticket", "dense"]).startswith(" Did you mean `ticket`?")
    assert spec.nearest("xyz", ["ticket", "dense"]) == " Known: ticket, dense."


def test_what_is_not_a_settings_problem_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        spec.checked(lambda: 1 / 0)

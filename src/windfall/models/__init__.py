"""The networks: the family `Model` and what is asked of any network.

Each member builds an `nn.Module` that maps inputs [batch, *input_shape] to logits
[batch, num_classes]. A user's own network is a callable without arguments that returns one:

    Conv_4(width=0.5).build((3, 32, 32), num_classes=10)
    decode(ModelField, make_network) == decode(ModelField, "package.module:make_network")
    kinds(module, (3, 32, 32)) == {"conv1.weight": "convolution", ..., "output.weight": "output"}

In the order of reading, each importing only from those before it: `sizes`, `gates`, `norms`;
`plain`, `vgg`, `residual`, `preactivated`, `dense` (the zoo); `stages`; `user`; `inspection`.
"""

from typing import Annotated

from pydantic import BeforeValidator

from windfall.models.dense import Densenet_40, Densenet_BC_100
from windfall.models.gates import Gate
from windfall.models.inspection import (
    Kind,
    Watch,
    check_gradients,
    check_outputs,
    kinds,
    observe,
)
from windfall.models.plain import Conv_2, Conv_4, Conv_6, Lenet_300_100, Mlp
from windfall.models.preactivated import Preresnet_110, Preresnet_164
from windfall.models.residual import Resnet_20, Resnet_56, Resnet_110
from windfall.models.user import UserModel, as_model, is_importable, resolve, user_model
from windfall.models.vgg import Vgg_11, Vgg_13, Vgg_16, Vgg_19
from windfall.spec import FAMILY

Model = Annotated[
    Mlp
    | Lenet_300_100
    | Conv_2
    | Conv_4
    | Conv_6
    | Vgg_11
    | Vgg_13
    | Vgg_16
    | Vgg_19
    | Resnet_20
    | Resnet_56
    | Resnet_110
    | Preresnet_110
    | Preresnet_164
    | Densenet_40
    | Densenet_BC_100
    | UserModel,
    FAMILY,
]
ModelField = Annotated[Model, BeforeValidator(as_model)]

__all__ = [
    "Conv_2",
    "Conv_4",
    "Conv_6",
    "Densenet_40",
    "Densenet_BC_100",
    "Gate",
    "Kind",
    "Lenet_300_100",
    "Mlp",
    "Model",
    "ModelField",
    "Preresnet_110",
    "Preresnet_164",
    "Resnet_20",
    "Resnet_56",
    "Resnet_110",
    "UserModel",
    "Vgg_11",
    "Vgg_13",
    "Vgg_16",
    "Vgg_19",
    "Watch",
    "check_gradients",
    "check_outputs",
    "is_importable",
    "kinds",
    "observe",
    "resolve",
    "user_model",
]

"""The network: shapes for every backbone, split and set of lengths, attention, maps, and fresh weights."""

from __future__ import annotations

import pytest
import torch

from admth_runtime.errors import CheckpointError, InputError
from admth_training.config import DataConfig, FitConfig, NetworkConfig, ObjectiveConfig, from_dict, to_dict
from admth_training.network import ChannelAttention, MultiLengthHashNetwork, build_network


def pixels(size, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("lengths", [(64,), (8, 16), (16, 32, 48, 64), (24, 40, 128)])
@pytest.mark.parametrize(
    ("backbone", "split", "size"),
    [
        ("efficientnet_lite0", "conv", 32),
        ("efficientnet_lite0", "conv", 45),
        ("cnnf", "conv", 67),
        ("cnnf", "fc6", 67),
        ("cnnf", "fc7", 99),
    ],
)
def test_logits_have_the_shapes_of_the_lengths(backbone, split, size, lengths):
    config = NetworkConfig(backbone=backbone, split=split, input_size=size, hidden=16, code_lengths=lengths)
    network = build_network(config, seed=0).eval()
    with torch.inference_mode():
        logits = network(pixels(size))
        features = network.features(pixels(size))
    assert [tuple(z.shape) for z in logits] == [(2, length) for length in lengths]
    assert all(z.dtype == torch.float32 for z in logits)
    assert tuple(features.shape) == (2, network.trunk.channels, network.trunk.grid, network.trunk.grid)
    assert len(network.maps) == len(lengths) - 1


@pytest.mark.parametrize(("split", "depths"), [("conv", (0, 3)), ("fc6", (1, 2)), ("fc7", (2, 1))])
def test_splits_of_cnnf_share_as_many_layers_as_they_say(split, depths):
    network = build_network(NetworkConfig(backbone="cnnf", split=split, input_size=67, hidden=16), seed=0)

    def linears(module):
        return sum(isinstance(layer, torch.nn.Linear) for layer in module.modules())

    assert linears(network.shared) == depths[0]
    assert [linears(branch) for branch in network.branches] == [depths[1]] * 4


def test_cnnf_at_224_is_the_size_of_the_paper():
    with torch.device("meta"):
        network = MultiLengthHashNetwork(NetworkConfig(backbone="cnnf"))
    assert network.trunk.grid == 6
    branch = 9216 * 4096 + 4096 + 4096 * 4096 + 4096
    codes = sum(4096 * length + length for length in (16, 32, 48, 64))
    maps = 16 * 32 + 32 * 48 + 48 * 64
    attention = 2 * 256 * 16
    trunk = (3 * 121 + 1) * 64 + (64 * 25 + 1) * 256 + 3 * (256 * 9 + 1) * 256
    total = sum(parameter.numel() for parameter in network.parameters())
    assert total == 4 * branch + codes + maps + attention + trunk
    assert round(total / 1e6) == 221


def test_attention_is_the_paper_s_equations():
    attention = ChannelAttention(32, reduction=8)
    features = torch.randn(3, 32, 5, 5, generator=torch.Generator().manual_seed(0))
    average = features.sum(dim=(2, 3)) / 25
    hidden = torch.clamp(average @ attention.squeeze.weight.T, min=0)
    scale = 1 / (1 + torch.exp(-hidden @ attention.excite.weight.T))
    torch.testing.assert_close(attention(features), features * scale[..., None, None])
    assert attention.squeeze.weight.shape == (4, 32)
    assert attention.squeeze.bias is None
    assert attention.excite.bias is None


def test_attention_can_be_left_out():
    network = build_network(NetworkConfig(input_size=32, hidden=16, attention=False), seed=0)
    assert not any(isinstance(module, ChannelAttention) for module in network.modules())


@pytest.mark.parametrize(
    ("direction", "shapes"), [("short-to-long", [(16, 32), (32, 48)]), ("long-to-short", [(32, 16), (48, 32)])]
)
def test_maps_start_as_partial_identities(direction, shapes):
    config = NetworkConfig(input_size=32, hidden=16, code_lengths=(16, 32, 48), map_direction=direction)
    network = build_network(config, seed=0)
    assert [tuple(matrix.shape) for matrix in network.maps] == shapes
    for matrix in network.maps:
        assert torch.equal(matrix.detach(), torch.eye(*matrix.shape))


def test_normalisation_takes_uint8_rgb_in_rows():
    network = build_network(NetworkConfig(input_size=32, hidden=16), seed=0)
    images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    images[0, 3, 7] = torch.tensor([0, 127, 255], dtype=torch.uint8)
    planes = network.normalize(images)
    assert planes.shape == (1, 3, 32, 32)
    assert planes[0, :, 3, 7].tolist() == [-127 / 128, 0.0, 1.0]


def test_the_seed_gives_the_weights_and_leaves_the_global_generator_alone():
    config = NetworkConfig(input_size=32, hidden=16)
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one, two, other = (build_network(config, seed=seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_normalisation_constants_are_no_weights():
    names = build_network(NetworkConfig(input_size=32, hidden=16), seed=0).state_dict()
    assert "mean" not in names
    assert "scale" not in names


def test_trainable_parts_are_everything_but_the_trunk():
    network = build_network(NetworkConfig(backbone="cnnf", split="fc6", input_size=67, hidden=16), seed=0)
    parts = {id(p) for part in network.trainable_parts() for p in part.parameters()}
    trunk = {id(p) for p in network.trunk.parameters()}
    assert parts | trunk == {id(p) for p in network.parameters()}
    assert not parts & trunk


def test_there_are_no_imagenet_weights_for_cnnf():
    with pytest.raises(InputError, match="no ImageNet weights for backbone 'cnnf'"):
        build_network(NetworkConfig(backbone="cnnf", input_size=67, hidden=16), pretrained=True)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (NetworkConfig, {"backbone": "cnn-f"}, "backbone 'cnn-f' is unknown.*cnnf"),
        (NetworkConfig, {"code_lengths": (12,)}, "code length 12 is not a positive multiple of 8"),
        (NetworkConfig, {"code_lengths": (32, 16)}, "do not increase"),
        (NetworkConfig, {"code_lengths": ()}, "no code length"),
        (NetworkConfig, {"split": "fc6"}, "split 'fc6' needs .* backbone 'cnnf'"),
        (NetworkConfig, {"input_size": 16}, "input_size 16 is not an integer from 32"),
        (NetworkConfig, {"backbone": "cnnf", "input_size": 66}, "input_size 66"),
        (NetworkConfig, {"dropout": 1.0}, "dropout 1.0"),
        (NetworkConfig, {"hidden": True}, "hidden True"),
        (NetworkConfig, {"map_direction": "sideways"}, "map_direction 'sideways' is unknown"),
        (ObjectiveConfig, {"alpha": float("nan")}, "alpha nan"),
        (ObjectiveConfig, {"inner_product_scale": 0}, "inner_product_scale 0"),
        (FitConfig, {"optimizer": "adam"}, "optimizer 'adam' is unknown.*adamw"),
        (FitConfig, {"batch_size": 1}, "batch_size 1"),
        (FitConfig, {"learning_rate": -0.1}, "learning_rate -0.1"),
        (FitConfig, {"epochs": 0}, "epochs 0"),
        (FitConfig, {"precision": "fp16"}, "precision 'fp16' is unknown"),
    ],
)
def test_configurations_refuse_what_cannot_be(kind, values, message):
    with pytest.raises(InputError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    "config",
    [
        NetworkConfig(backbone="cnnf", split="fc7", code_lengths=(8, 24)),
        ObjectiveConfig(alpha=1.0),
        FitConfig(optimizer="sgd"),
        DataConfig("folder:/data", query_size=3),
    ],
)
def test_configurations_come_back_from_json(config):
    assert from_dict(type(config), to_dict(config), source="config.json") == config


def test_the_paper_s_rate_is_the_default_of_sgd():
    assert FitConfig(optimizer="sgd").base_rate == 0.15
    assert FitConfig(optimizer="adamw").base_rate == 1e-3


def test_unknown_and_wrong_fields_name_the_file():
    with pytest.raises(CheckpointError, match=r"config\.json: fields \['width'\] are unknown"):
        from_dict(NetworkConfig, {"width": 3}, source="config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: backbone 'vgg'"):
        from_dict(NetworkConfig, {"backbone": "vgg"}, source="config.json")

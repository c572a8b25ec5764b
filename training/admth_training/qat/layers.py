"""The layers of a fake-quantised network: activations, convolutions and fully connected layers on the integer grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from admth_training.qat.ranges import ChannelObserver, Observer, QuantizedRange
from admth_training.qat.rounding import (
    fake_quantize,
    quantize_weight,
    round_scale,
    round_scale_down,
    straight_through,
)

__all__ = ["ActivationQuantizer", "QuantizedConv2d", "QuantizedLayer", "QuantizedLinear", "quantized_layer"]

# An int32 bias reaches 2^31; a bit less leaves room for the sum that it is added to.
_LARGEST_BIAS = 2.0**30
# Beyond this a whole number of steps is no longer found again after a rounding to float32.
_LARGEST_EXACT_BIAS = 2.0**22
_CPU_BITS, _TENSORRT_WEIGHT_BITS = 16, 7
_FACTORS = (0.05, 20.0)


class ActivationQuantizer(nn.Module):
    """Rounds one tensor to 8 bits, with a learned scale; while it observes, it lets everything through.

    The scale is ``start * factor``, rounded to 16 significant bits for the CPU and to a power of two for TensorRT,
    where ``start`` came from observation and ``factor`` is learned from 1: one learning rate fits tensors of all sizes.

    Attributes:
        signed: symmetric int8 (TensorRT), else uint8 with a zero point (ONNX Runtime's CPU kernels).
        start: scalar float32.
        factor: scalar float32, learned unless the range is exact.
        zero_point: scalar int32.
        upper: largest value that may be represented, 6 after a ReLU6, which the range then replaces; None for any.
        observer: what observes at the moment, or None.

    """

    start: Tensor
    zero_point: Tensor

    def __init__(self, *, signed: bool, exact: QuantizedRange | None = None) -> None:
        super().__init__()
        self.signed = signed
        self.exact = exact
        self.upper: float | None = None
        self.observer: Observer | None = None
        self.register_buffer("start", torch.tensor(1.0 if exact is None else exact.scale))
        self.register_buffer("zero_point", torch.tensor(0 if exact is None else exact.zero_point, dtype=torch.int32))
        if exact is None:
            self.factor = nn.Parameter(torch.tensor(1.0))
        else:
            self.register_buffer("factor", torch.tensor(1.0))

    def scale(self) -> Tensor:
        """Return the scale in use, scalar float32; its gradient goes to the factor."""
        scale = self.start * self.factor
        value = scale.detach()
        if self.upper is not None and not self.signed:
            value = value.clamp_max(round_scale_down(self.upper / 255, _CPU_BITS))
        return straight_through(scale, round_scale(value, 1 if self.signed else _CPU_BITS))

    def bounds(self) -> tuple[int, int]:
        """Return the smallest and the largest integer, less the zero point."""
        zero_point = int(self.zero_point)
        return (-128, 127) if self.signed else (-zero_point, 255 - zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return the values on the grid, float32 of the same shape."""
        if self.observer is not None:
            self.observer.update(x)
            return x
        if self.training:
            self._bound_factor()
        return fake_quantize(x, self.scale(), *self.bounds())

    def set_range(self, found: QuantizedRange) -> None:
        """Start from an observed range, unless it is known exactly."""
        if self.exact is None:
            self.start.fill_(found.scale)
            self.zero_point.fill_(found.zero_point)
            self.factor.data.fill_(1.0)

    def _bound_factor(self) -> None:
        """Keep the factor where it has an effect, so that it can turn back at once."""
        least, most = _FACTORS
        if self.upper is not None and not self.signed:
            most = min(most, self.upper / 255 / float(self.start))
        self.factor.data.clamp_(least, most)

    def freeze(self) -> None:
        """Make the scale in use the start, so that it is what a file holds."""
        self.start.copy_(self.scale().detach())
        self.factor.data.fill_(1.0)


class QuantizedLayer(nn.Module):
    """What quantised convolutions and fully connected layers share.

    In training the layer computes with ``x'`` and ``w'``. In evaluation it computes with their integers and scales the
    sum, as an INT8 engine does: sums below 2^24 are exact in float32, in any order of adding up. A CPU layer whose
    output is rounded next does it with one factor, ``sx sw / sy``, as ONNX Runtime's fused kernels do: a product and a
    division instead would round about one value in a million to another integer, and a network passes that on.

    Attributes:
        signed: the target's activations; a TensorRT layer has a float bias and scales that FP16 has, a CPU layer an
            int32 bias.
        input_quantizer: of the input tensor. Layers that take one tensor share its quantiser; it is registered with
            the first of them.
        output_quantizer: of the output tensor after its activation, where no layer takes it as input; applied by the
            trunk's graph, not here.
        observed: what observes the input's channels at the moment, or None.

    """

    weight: Tensor
    bias: Tensor | None
    signed: bool
    observed: ChannelObserver | None = None

    def quantize_input_with(self, quantizer: ActivationQuantizer, *, owner: bool) -> None:
        """Set the input's quantiser, registered here as a module or only referred to."""
        self.__dict__["_input"] = quantizer
        if owner:
            self.input_quantizer = quantizer
        elif "input_quantizer" in self._modules:
            del self.input_quantizer

    def round_output_for(self, quantizer: ActivationQuantizer) -> None:
        """Tell a CPU layer what rounds its output after its activation, which no activation but a ReLU comes before."""
        self.__dict__["_output"] = quantizer

    @property
    def input(self) -> ActivationQuantizer:
        """The input tensor's quantiser, whoever owns it."""
        quantizer = self.__dict__["_input"]
        assert isinstance(quantizer, ActivationQuantizer)
        return quantizer

    def integer_weight(self) -> tuple[Tensor, Tensor]:
        """Return the weight's whole numbers, float32 of its shape, and scales ``[out]``; without gradients."""
        least = None
        if self.bias is not None and not self.signed:
            # Weights that vanish beside their bias would need an int32 bias beyond its range.
            least = self.bias.detach().abs() / (self.input.scale().detach() * _LARGEST_BIAS)
        return quantize_weight(self.weight, least, bits=_TENSORRT_WEIGHT_BITS if self.signed else _CPU_BITS)

    def correct_bias(self, mean: Tensor) -> None:
        """Shift the bias so that rounding the weight changes no output's mean.

        Activations after a ReLU are positive, so the rounding errors of a channel's weights add up instead of
        cancelling (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019).

        Args:
            mean: of the input's channels, float32 ``[c]``.

        """
        if self.bias is not None:
            integers, scales = self.integer_weight()
            error = integers * _by_channel(scales, integers.ndim, 0) - self.weight.detach()
            self.bias.data.sub_(self._mean_product(mean, error))

    def snap(self) -> None:
        """Put the weight on its grid, in place, and for TensorRT the bias, which stays a float there."""
        integers, scales = self.integer_weight()
        if self.signed and self.bias is not None:
            self.bias.data.copy_(self._rounded_bias(self.input.scale() * scales))
        self.weight.data.copy_(integers * _by_channel(scales, integers.ndim, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's float32 output."""
        quantizer = self.input
        x = quantizer(x)
        if self.observed is not None:
            self.observed.update(x)
            return self._product(x, self.weight, self.bias)
        integers, scales = self.integer_weight()
        if not self.training:
            scale = quantizer.scale()
            products = self._product((x / scale).round_(), integers, None)
            return self._scaled(products, (scale * scales).detach())
        weight = straight_through(self.weight, integers * _by_channel(scales, integers.ndim, 0))
        bias = self.bias
        if bias is not None:
            bias = straight_through(bias, self._rounded_bias(quantizer.scale() * scales))
        return self._product(x, weight, bias)

    def _scaled(self, sums: Tensor, scales: Tensor) -> Tensor:
        """Return the output of sums of integers, with ``scales = sx sw``, float32 ``[out]``."""
        channels = _by_channel(scales, sums.ndim, 1)
        if self.signed:
            products = sums * channels
            return products if self.bias is None else products + _by_channel(self._rounded_bias(scales), sums.ndim, 1)
        if self.bias is not None:
            sums = sums + _by_channel((self.bias / scales).round_(), sums.ndim, 1)
        following: ActivationQuantizer | None = self.__dict__.get("_output")
        if following is None:
            return sums * channels
        step = following.scale()
        return (sums * _by_channel(scales / step, sums.ndim, 1)).round_() * step

    def _rounded_bias(self, scales: Tensor) -> Tensor:
        """Return the bias on the grid of the sums: int32 on the CPU, and as far as it helps exactness on TensorRT."""
        assert self.bias is not None
        bias, steps = self.bias.detach(), scales.detach()
        rounded = (bias / steps).round_()
        if not self.signed:
            return rounded * steps
        return torch.where(rounded.abs() < _LARGEST_EXACT_BIAS, rounded * steps, bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's float output for given inputs, weights and biases."""
        raise TypeError(f"{type(self).__name__} does not define its product")

    def _mean_product(self, mean: Tensor, weight: Tensor) -> Tensor:
        """Return the outputs ``[out]`` of an input that has its channel's mean everywhere."""
        raise TypeError(f"{type(self).__name__} does not define its product")


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution with int8 weights, one scale an output channel, of an 8-bit input."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = self._conv_forward(x, weight, bias)
        return output

    def _mean_product(self, mean: Tensor, weight: Tensor) -> Tensor:
        window = mean.view(1, -1, 1, 1).expand(1, len(mean), *weight.shape[2:])
        return F.conv2d(window, weight, groups=self.groups).flatten()


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """A fully connected layer with int8 weights, one scale an output, of an 8-bit input."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _mean_product(self, mean: Tensor, weight: Tensor) -> Tensor:
        return F.linear(mean, weight)


def quantized_layer(layer: nn.Conv2d | nn.Linear, quantizer: ActivationQuantizer) -> QuantizedLayer:
    """Make the quantised form of a layer, with the layer's own parameters, for the target of its input's quantiser."""
    new: Any
    if isinstance(layer, nn.Conv2d):
        new = QuantizedConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            device="meta",
        )
    else:
        new = QuantizedLinear(layer.in_features, layer.out_features, device="meta")
    new.weight, new.bias = layer.weight, layer.bias
    if new.bias is not None:
        new.bias.requires_grad_(new.weight.requires_grad)  # Folding leaves it without.
    new.signed = quantizer.signed
    new.quantize_input_with(quantizer, owner=True)
    new.train(layer.training)
    return new  # type: ignore[no-any-return]


def _by_channel(values: Tensor, ndim: int, axis: int) -> Tensor:
    shape = [1] * ndim
    shape[axis] = -1
    return values.view(shape)

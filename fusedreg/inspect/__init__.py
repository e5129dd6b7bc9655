"""Seeing inside an LSTM: gradients on their way back, gates, states, weights, and where a NaN comes from.

Everything comes as data (``rows()``, ``to_pandas()``), as a matplotlib figure (``figure()``) and as scalars and
histograms of a TensorBoard writer (``write(writer, step)``); matplotlib and pandas are imported when they are asked
for. What has to watch calls is a context manager, which changes nothing in what the model computes.

- :class:`GradientFlow`: ``dL/dh_t`` and ``dL/dc_t`` of every step, layer, row and unit; not of an ``nn.LSTM``.
- :class:`States`: gates and states of every step; :func:`saturation`: saturated gates and dead units among them.
- :func:`weight_histograms`, :func:`weight_maps`: weights and their gradients, by gate and channel.
- :class:`WeightTracker`: norms and update-to-weight ratios over a training, by component and gate.
- :func:`spectra`: singular values and spectral radius of each gate's ``W_hh``.
- :class:`NonFinite`: the first NaN or Inf, by layer, gate and step; of an ``nn.LSTM`` in the forward alone.

Example:
    >>> import torch, fusedreg
    >>> lstm = fusedreg.LSTM(3, 4)
    >>> with fusedreg.inspect.GradientFlow(lstm) as flow:
    ...     lstm(torch.randn(50, 2, 3))[0][-1].sum().backward()
    >>> flow.layers[0].marks("hidden", vanishing=1e-3).exploding
    ()
"""

from __future__ import annotations

from fusedreg.inspect.distributions import HeatMap, Histogram, weight_histograms, weight_maps
from fusedreg.inspect.gate_saturation import LayerSaturation, Saturation, saturation
from fusedreg.inspect.gate_spectra import GateSpectrum, Spectra, spectra
from fusedreg.inspect.gradient_flow import FlowCall, GradientFlow, LayerFlow, Marks
from fusedreg.inspect.nonfinite import Finding, NonFinite, not_finite_gradients
from fusedreg.inspect.places import GATES, Place
from fusedreg.inspect.states import LayerStates, States
from fusedreg.inspect.weights import Key, WeightStep, WeightTracker

__all__ = [
    "GATES",
    "FlowCall",
    "Finding",
    "GateSpectrum",
    "GradientFlow",
    "HeatMap",
    "Histogram",
    "Key",
    "LayerFlow",
    "LayerSaturation",
    "LayerStates",
    "Marks",
    "NonFinite",
    "Place",
    "Saturation",
    "Spectra",
    "States",
    "WeightStep",
    "WeightTracker",
    "not_finite_gradients",
    "saturation",
    "spectra",
    "weight_histograms",
    "weight_maps",
]

"""Figures, tables and TensorBoard: drawn, labelled, marked where something was planted; nothing imported before."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eager_layers import H, T, batch, module

from fusedreg import inspect
from fusedreg.inspect import GradientFlow, NonFinite, States, WeightTracker


def seen() -> dict[str, Any]:
    """One of each kind, of a module with a gate that is stuck and a loss on the last step."""
    lstm = module(num_layers=2, bidirectional=True)
    with torch.no_grad():
        lstm.bias_ih_l0[H : 2 * H] = -30.0
        lstm.weight_hh_l0.zero_()
    optimizer = torch.optim.SGD(lstm.parameters(), lr=1e-3)
    with GradientFlow(lstm) as flow, States(lstm) as states, WeightTracker(lstm, optimizer) as tracker:
        for _ in range(2):
            lstm(batch(), lengths=[4, T, 4])[1][0][:2].sum().backward()
            optimizer.step()
    x = batch()
    x[2, 0] = float("nan")
    with NonFinite(lstm, backward=False) as found:
        lstm(x)
    maps, histograms = inspect.weight_maps(lstm), inspect.weight_histograms(lstm, gradients=True)
    return {
        "flow": flow,
        "flow_map": flow.maps()[0],
        "flow_histogram": flow.histograms()[1],
        "gates_map": states.maps()[0],
        "state_map": states.maps()[2],
        "gates_histogram": states.histograms()[0],
        "saturation": inspect.saturation(states),
        "weights": tracker,
        "spectra": inspect.spectra(lstm),
        "weight_map": maps[0],
        "gradient_histogram": histograms[0],
        "nonfinite": found,
    }


SEEN = seen()


def axes_of(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_visible()]


@pytest.mark.parametrize(("name", "width"), [*((name, 3.4) for name in SEEN), ("flow", 7.0)])
def test_every_figure_is_drawn_and_labelled(name: str, width: float) -> None:
    figure = SEEN[name].figure(width=width)
    assert (
        figure.get_size_inches()[0] == width
        and figure.get_layout_engine().__class__.__name__ == "ConstrainedLayoutEngine"
    )
    figure.savefig(file := io.BytesIO(), format="svg")
    assert b"<svg" in file.getvalue()
    axes = axes_of(figure)
    outer = [own for own in axes if own.get_subplotspec() is not None]
    assert outer
    for own in outer:  # what shares an axis is labelled once, at the edge
        place = own.get_subplotspec()
        assert own.get_xlabel() or not place.is_last_row(), name
        assert own.get_ylabel() or not place.is_first_col(), name
    for own in set(axes) - set(outer):  # colour bars
        assert own.get_ylabel(), name


def test_no_window_system_is_touched() -> None:
    """No pyplot, and the settings are the caller's again."""
    import matplotlib

    before = dict(matplotlib.rcParams)
    SEEN["flow"].figure()
    assert dict(matplotlib.rcParams) == before


def test_the_steps_where_it_vanishes_are_marked() -> None:
    figure, flow = SEEN["flow"].figure(), SEEN["flow"]
    layer = flow.layers[0]  # its forget gates are shut
    assert layer.marks("cell").vanishing
    colour = figure.axes[1].lines[0].get_color()
    marked = set()
    for scatter in figure.axes[1].collections:
        if matplotlib_colour(scatter) == matplotlib_colour(colour):
            marked |= {int(step) for step, _ in scatter.get_offsets()}
    assert marked == set(layer.marks("cell").vanishing)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "vanishing" in labels and "l1_reverse" in labels


def matplotlib_colour(value: Any) -> tuple[float, ...]:
    from matplotlib import colors

    return tuple(colors.to_rgb(value if isinstance(value, str) else value.get_facecolor()[0]))


def test_heat_maps_show_the_values() -> None:
    own = SEEN["weight_map"]
    figure = own.figure()
    for axes, values in zip(figure.axes, own.values, strict=False):
        np.testing.assert_array_equal(axes.images[0].get_array(), values.detach().numpy())


def test_the_first_that_is_not_finite_is_marked() -> None:
    (axes,) = SEEN["nonfinite"].figure().axes
    points = [tuple(point) for scatter in axes.collections for point in scatter.get_offsets().tolist()]
    assert points == [(2.0, 0.0)] and "l0, call 0" in axes.get_yticklabels()[0].get_text()


def test_widths_are_inches() -> None:
    with pytest.raises(ValueError, match="width: expected inches above 0, got 0"):
        SEEN["flow"].figure(width=0)
    with pytest.raises(ValueError, match="label: expected one of 'l0'"):
        SEEN["weights"].figure("l9")


@pytest.mark.parametrize("name", SEEN)
def test_tables_hold_the_rows(name: str) -> None:
    table, rows = SEEN[name].to_pandas(), list(SEEN[name].rows())
    assert len(table) == len(rows) > 0
    assert list(table.columns) == list(rows[0])
    first = table.iloc[0].to_dict()
    assert {key: str(value) for key, value in first.items()} == {key: str(value) for key, value in rows[0].items()}


def test_the_flow_table_is_the_flow() -> None:
    table = SEEN["flow"].to_pandas(vanishing=1e-3)
    own = table[(table.call == 1) & (table.layer == 1) & (table.direction == 0) & (table.state == "cell")]
    torch.testing.assert_close(torch.tensor(own.norm.to_numpy()), SEEN["flow"].layers[2].norm_over_time("cell"))


class FakeWriter:
    """Records what a writer is given."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}
        self.histograms: dict[str, Any] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert tag not in self.scalars and isinstance(value, (int, float)) and step == 7
        self.scalars[tag] = value

    def add_histogram(self, tag: str, values: Any, step: int) -> None:
        assert step == 7 and len(values)
        self.histograms[tag] = values

    def add_histogram_raw(self, tag: str, *, bucket_counts: list[float], global_step: int, **rest: Any) -> None:
        assert global_step == 7 and len(rest["bucket_limits"]) == len(bucket_counts)
        self.histograms[tag] = bucket_counts


@pytest.mark.parametrize("name", SEEN)
def test_a_writer_is_given_scalars_or_histograms(name: str) -> None:
    writer = FakeWriter()
    SEEN[name].write(writer, 7)
    assert writer.scalars or writer.histograms
    with pytest.raises(TypeError, match=r"writer: expected a torch\.utils\.tensorboard\.SummaryWriter, got str"):
        SEEN[name].write("runs", 7)


def test_what_the_writer_is_given() -> None:
    writer, layer = FakeWriter(), SEEN["flow"].layers[0]
    SEEN["flow"].write(writer, 7, prefix="flow")
    norms = layer.norm_over_time("hidden")
    assert writer.scalars["flow/l0/hidden/first_step"] == norms[0].item()
    assert writer.scalars["flow/l0/hidden/largest"] == norms.max().item()
    assert writer.scalars["flow/l0/cell/vanishing_steps"] == len(layer.marks("cell").vanishing)
    SEEN["weights"].write(writer, 7)
    key = inspect.Key("l0", "recurrent", "f")
    assert writer.scalars["weights/l0/recurrent/f/update_ratio"] == SEEN["weights"].steps[-1].ratio[key]
    SEEN["spectra"].write(writer, 7)
    assert writer.scalars["spectrum/l0/f/spectral_radius"] == SEEN["spectra"].gates[1].spectral_radius
    SEEN["saturation"].write(writer, 7)
    assert writer.scalars["saturation/l0/f/left"] == 1.0


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="not run: tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        for own in SEEN.values():
            own.write(writer, 7)
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("saturation/l0/f/left")
    assert event.step == 7 and event.value == 1.0
    assert {"gradient_flow/l0/cell", "histogram/l0/gates/f"} <= set(events.Tags()["histograms"])
    counts = events.Histograms("histogram/l0/gates/f")[0].histogram_value
    assert counts.num == sum(SEEN["gates_histogram"].counts[1].tolist())


@pytest.mark.parametrize(("package", "call"), [("matplotlib", "figure"), ("pandas", "to_pandas")])
def test_what_is_missing_is_named(package: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for own in SEEN.values():
        with pytest.raises(ImportError, match=f"pip install {package}"):
            getattr(own, call)()


def test_the_package_stays_light() -> None:
    program = "import sys, fusedreg; print({'matplotlib', 'pandas', 'tensorboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

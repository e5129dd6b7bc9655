"""neuralforecast's models with an LSTM: the passengers of the last year, from those of eleven."""

from __future__ import annotations

import logging
import warnings

from neuralforecast import NeuralForecast
from neuralforecast.models import LSTM, TFT, DeepAR
from neuralforecast.utils import AirPassengersPanel

from benchmarks.programs import swap
from benchmarks.programs.measured import Clock, report

HORIZON = 12


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    last = AirPassengersPanel.ds < AirPassengersPanel["ds"].values[-HORIZON]
    known, future = AirPassengersPanel[last], AirPassengersPanel[~last].reset_index(drop=True)
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    common = {"h": HORIZON, "input_size": 24, "max_steps": 20, "scaler_type": "robust", "random_seed": 1, **quiet}
    models = {
        "LSTM": LSTM(**common),
        "LSTM, recurrent": LSTM(**common, recurrent=True),
        "DeepAR": DeepAR(**common, lstm_dropout=0.0),
        "TFT": TFT(**common, hidden_size=32),
    }
    figures, clock = {}, Clock()
    for name, model in models.items():
        swap.replace(model)
        forecast = NeuralForecast([model], freq="ME")
        with clock:
            forecast.fit(known)
        predicted = forecast.predict(futr_df=future)
        column = next(one for one in predicted.columns if one not in ("unique_id", "ds"))
        merged = predicted.merge(future[["unique_id", "ds", "y"]], on=["unique_id", "ds"])
        figures[f"mean absolute error, {name}"] = float((merged[column] - merged["y"]).abs().mean())
    report(figures, clock)


if __name__ == "__main__":
    main()

"""pytorch-forecasting's temporal fusion transformer, fitted to noisy sine waves."""

from __future__ import annotations

import torch
from pytorch_forecasting.models.temporal_fusion_transformer._tft_v2 import TFT
from torch import Tensor, nn

from benchmarks.programs import swap
from benchmarks.programs.measured import Clock, report

ENCODER, DECODER, ROWS = 60, 12, 32


def batch(generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Waves of random phase: the past with noise, what is to be predicted without."""
    time = torch.arange(ENCODER + DECODER).float()
    clean = torch.sin(0.3 * time + 6.3 * torch.rand(ROWS, 1, generator=generator)).unsqueeze(2)
    past = clean[:, :ENCODER] + 0.1 * torch.randn(ROWS, ENCODER, 1, generator=generator)
    known = (time / 72).expand(ROWS, -1).unsqueeze(2)
    none = torch.zeros(ROWS, 1, 0)
    input = {
        "encoder_cont": torch.cat([past, known[:, :ENCODER]], 2),
        "encoder_cat": torch.zeros(ROWS, ENCODER, 0),
        "decoder_cont": known[:, ENCODER:],
        "decoder_cat": torch.zeros(ROWS, DECODER, 0),
        "static_categorical_features": none,
        "static_continuous_features": none,
    }
    return input, clean[:, ENCODER:]


def main() -> None:
    torch.manual_seed(1)
    metadata = {
        "max_encoder_length": ENCODER,
        "max_prediction_length": DECODER,
        "encoder_cont": 2,
        "encoder_cat": 0,
        "decoder_cont": 1,
        "decoder_cat": 0,
        "static_categorical_features": 0,
        "static_continuous_features": 0,
        "target": 1,
    }
    model = TFT(nn.MSELoss(), hidden_size=64, num_layers=2, dropout=0.0, metadata=metadata, output_size=1)
    swap.replace(model)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(2)
    losses = []
    with Clock() as clock:
        for _ in range(120):
            input, target = batch(generator)
            loss = nn.functional.mse_loss(model(input)["prediction"], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    report(
        {"squared error, step 1": losses[0], "squared error, mean of steps 111 to 120": sum(losses[-10:]) / 10}, clock
    )


if __name__ == "__main__":
    main()

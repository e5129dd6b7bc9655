"""stanza's part-of-speech tagger, trained on the sentences of its own tests: its loss."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from pathlib import Path

from stanza.models import tagger

from benchmarks.programs import swap  # noqa: F401
from benchmarks.programs.measured import Clock, report


def main() -> None:
    sys.path.insert(0, os.environ["PROGRAMS_SOURCE"])
    from stanza.tests.pos.test_tagger import DEV_DATA, TRAIN_DATA

    losses: list[float] = []

    class Losses(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            losses.extend(float(found) for found in re.findall(r"STEP.* loss = ([\d.]+)", record.getMessage()))

    logging.getLogger("stanza").addHandler(Losses())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.conllu").write_text(TRAIN_DATA * 20, encoding="utf-8")
        (folder / "dev.conllu").write_text(DEV_DATA, encoding="utf-8")
        arguments = f"""--no_char --no_pretrain --word_emb_dim 100 --hidden_dim 60 --train_file {folder}/train.conllu
            --eval_file {folder}/dev.conllu --output_file {folder}/out.conllu --shorthand en_test --lang en
            --save_dir {folder} --save_name tagger.pt --max_steps 20 --eval_interval 20 --log_step 5 --cpu"""
        with Clock() as clock:
            tagger.main(arguments.split())
    report({"loss, step 5": losses[0], "loss, step 20": losses[-1]}, clock)


if __name__ == "__main__":
    main()

"""Where each process stands in a stream, as a checkpoint holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from unmask.data.hub import first_line
from unmask.errors import UnmaskError

if TYPE_CHECKING:
    from unmask.training.trainer import DiffusionTrainer

POSITION = "data_position_{}.json"  # of a process


class StreamPosition:
    """Saves and restores the position of the trainer's stream, if it has one; see `AlsoSaved`."""

    def __init__(self, trainer: DiffusionTrainer):
        self.trainer = trainer

    def save(self, folder: Path) -> None:
        loader = self.trainer.loader
        if loader is not None:
            file = folder / POSITION.format(self.trainer.args.process_index)
            file.write_text(json.dumps(loader.state()), encoding="utf-8")

    def load(self, folder: Path) -> None:
        loader = self.trainer.loader
        if loader is None:
            return
        saved = len(list(folder.glob(POSITION.format("*"))))
        processes = self.trainer.args.world_size
        if saved != processes:
            raise UnmaskError(
                f"resume_from_checkpoint: {folder} holds positions in the stream of {saved} processes;"
                f" this run has {processes}: start as many."
            )
        file = folder / POSITION.format(self.trainer.args.process_index)
        try:
            loader.load(json.loads(file.read_text(encoding="utf-8")), str(file))
        except UnmaskError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnmaskError(
                f"resume_from_checkpoint: {file} cannot be read: {first_line(error)}; name an earlier"
                " checkpoint."
            ) from error

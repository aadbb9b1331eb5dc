"""Stage one as a Lightning script: `python -m training.retrieval fit|validate|test --data.directory DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.numpy import save_file

from training.data.modules import RetrievalData
from training.retrieval_module import RETRIEVAL_EPOCHS, RetrievalModule
from training.stages import StageCLI, default_precision, load_best


class RetrievalCLI(StageCLI):
    """Leaves the vectors of the best epoch beside the logs: what `python -m training.ranking` starts from."""

    def after_fit(self) -> None:
        """Write embeddings.safetensors and print its path."""
        module: RetrievalModule = self.model
        load_best(module, self.trainer)
        path = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "embeddings.safetensors"
        save_file(module.vectors(), path)
        print(path)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    try:
        defaults = {"max_epochs": RETRIEVAL_EPOCHS, "precision": default_precision()}
        RetrievalCLI("retrieval", RetrievalModule, RetrievalData, argv, defaults)
    except ValueError as error:
        sys.exit(f"training.retrieval: {error}")


if __name__ == "__main__":
    main()

"""Stage two as a Lightning script: `python -m training.ranking fit|validate|test --data.directory DIR`.

With `--model.embeddings FILE` the ranker stands on the vectors of stage one; without it, it is the sequence
model alone.
"""

from __future__ import annotations

import sys

from training.data.modules import RankingData
from training.ranking_module import RANKING_EPOCHS, RankingModule
from training.stages import StageCLI, default_precision


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    try:
        defaults = {"max_epochs": RANKING_EPOCHS, "precision": default_precision()}
        StageCLI("ranking", RankingModule, RankingData, argv, defaults)
    except ValueError as error:
        sys.exit(f"training.ranking: {error}")


if __name__ == "__main__":
    main()

"""Running one training stage: callbacks, loggers, resume and the best weights, the same for both."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import logging
import pkgutil
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from engine.arguments import CONFIG_HELP, HelpfulParser, nearest

MONITOR = {"retrieval": "val_ndcg@20", "ranking": "val_ndcg@10"}  # what each stage keeps the best of


class EpochReport(Callback):
    """One line on stderr per epoch: loss, validation metrics, seconds, and which epoch is the best."""

    def __init__(self, stage: str, monitor: str) -> None:
        self.stage, self.monitor = stage, monitor
        self.best = float("-inf")
        self.started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know: the best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best value of the run that was cut short."""
        self.best = state_dict["best"]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line."""
        metrics = trainer.callback_metrics
        value = float(metrics.get(self.monitor, float("nan")))
        mark = "  best" if value > self.best else ""
        self.best = max(self.best, value)
        figures = "  ".join(
            f"{name} {float(metrics[name]):.4f}" for name in sorted(metrics) if "epoch" not in name
        )
        seconds = time.perf_counter() - self.started
        print(
            f"{self.stage} epoch {trainer.current_epoch}  {figures}  {seconds:.1f} s{mark}",
            file=sys.stderr,
        )


class StageParser(HelpfulParser, LightningArgumentParser):
    """Lightning's parser, with the nearest key in its errors, and a class that is named has its own defaults.

    jsonargparse would keep the settings of the class that it replaces, wherever the new one takes them too.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.add_argument("--config", action="config", help=CONFIG_HELP)
        for stage in MONITOR:  # those that are loaded can be named without their path
            _encoder_modules(stage)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **options: Any
    ) -> Any:
        """Parse the arguments; twice where they name another class than the default."""
        words = list(sys.argv[1:] if args is None else args)
        defaults = _class_paths(self.get_defaults(skip_validation=True))
        printed = [word for word in words if word.partition("=")[0] == "--print_config"]
        # What is missing is for the second time to say: a recipe is printed without a data set, too.
        unsaid = {"_skip_validation": True} if printed else {}
        named = super().parse_args(
            [word for word in words if word not in printed], *others, **options | unsaid
        )
        others_named = {
            key: {"class_path": name}
            for key, name in _class_paths(named).items()
            if key in defaults and name != defaults[key]
        }
        if not (others_named or printed):
            return named
        self.set_defaults(others_named)
        return super().parse_args(words, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message, where an encoder is not found with those that there are, and exit with 2."""
        if wrong := re.search(r'key "([\w.]*\bmodel\.encoder)"', message):
            stage = next(name for name in MONITOR if name in f"{wrong[1]} {self.prog}")
            message += _encoder_hint(stage, message)
        super().error(message, ex)

    def format_help(self, *formatter: Any) -> str:
        """Return the help, without the names of all modules of torch where an encoder is expected."""
        return re.sub(r",\s+known\s+subclasses:[^()]*\)", ")", str(super().format_help(*formatter)))

    def format_usage(self) -> str:
        """Return a line: all options of two stages and a trainer would be some hundred."""
        return str(super().format_usage()) if self.usage else f"usage: {self.prog} [options]\n"


def _encoder_hint(stage: str, message: str) -> str:
    """Return which encoders a stage has, and which of them is nearest to a word of the message."""
    known = [
        f"{module.__name__}.{value.__name__}"
        for module in _encoder_modules(stage)
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and _has_default_dim(value)
    ]
    close = nearest([message.split()[-1]], known)
    return f"\nexpected a class by its import path, or one of {', '.join(known)} by its name{close}"


def _encoder_modules(stage: str) -> list[ModuleType]:
    package = importlib.import_module(f"{stage}.encoders")
    return [
        importlib.import_module(f"{stage}.encoders.{entry.name}")
        for entry in pkgutil.iter_modules(package.__path__)
    ]


def _has_default_dim(encoder: type) -> bool:
    dim = inspect.signature(encoder).parameters.get("dim")
    return dim is not None and dim.default is not inspect.Parameter.empty


def _class_paths(settings: Any) -> dict[str, str]:
    """Return which class each setting that is one names."""
    found = {}
    for key, value in settings.items(branches=True):
        class_path = getattr(value, "class_path", None)
        if class_path is not None:
            found[key] = str(class_path)
    return found


class StageCLI(LightningCLI):
    """LightningCLI with our defaults: devices, strategy, precision, callbacks and loggers are the user's."""

    def __init__(
        self,
        stage: str,
        module: type[L.LightningModule],
        data: type[L.LightningDataModule],
        argv: list[str] | None,
        trainer_defaults: dict[str, Any],
    ) -> None:
        quiet_lightning()
        keep_freed_memory()
        callbacks = default_callbacks(stage, MONITOR[stage], patience=trainer_defaults["max_epochs"])
        super().__init__(
            module,
            data,
            args=argv,
            trainer_defaults={
                "enable_model_summary": False,
                "enable_progress_bar": sys.stderr.isatty(),
                "callbacks": callbacks,
                **trainer_defaults,
            },
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": f"python -m training.{stage}",
                "description": f"Fit, validate or test the {stage} stage alone, with any Lightning trainer.",
            },
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return the parser of one subcommand."""
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={L.__version__}"])
        return StageParser(**kwargs, allow_abbrev=False)


def check_numbers(
    prefix: str,
    least: float,
    values: Mapping[str, float | None],
    *,
    above: bool = False,
    below: float | None = None,
) -> None:
    """Raise ValueError unless settings are in their range; one of None is left to the data.

    Args:
        prefix: what stands before a setting's name in the recipe, such as "ranking.model.".
        least: no value may be less.
        values: by the settings' names.
        above: nor equal to it.
        below: if given, a value must be less than this.
    """
    for name, value in values.items():
        if value is None:
            continue
        if not value >= least or (above and value == least) or (below is not None and not value < below):
            expected = f"above {least:g}" if above else f"{least:g} or more"
            upper = "" if below is None else f" and below {below:g}"
            raise ValueError(f"{prefix}{name} is {value:g}; expected {expected}{upper}")


def check_vectors(stage: str, vectors: torch.Tensor, learning_rate: float) -> None:
    """Raise ValueError where a training has diverged: its vectors are not finite."""
    if not vectors.isfinite().all():
        raise ValueError(
            f"the {stage} has diverged: its vectors are not finite; expected a {stage}.model.learning_rate "
            f"below {learning_rate:g}, or {stage}.trainer.gradient_clip_val"
        )


class PatientEarlyStopping(EarlyStopping):
    """Early stopping that counts a validation only when enough steps lie between it and the last one counted.

    An epoch of small data is a dozen steps: too few to tell anything. A graph encoder stands still for about
    a hundred steps before it finds the structure, and a patience of some such epochs would end the training
    before it has begun.
    """

    def __init__(self, min_steps: int = 50, **options: Any) -> None:
        super().__init__(check_on_train_epoch_end=True, **options)
        self.min_steps = min_steps
        self.counted_at = 0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count this epoch's validation, if enough steps have passed."""
        if trainer.global_step - self.counted_at >= self.min_steps:
            self.counted_at = trainer.global_step
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End at once what is resumed where this had ended it."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know."""
        return {**super().state_dict(), "counted_at": self.counted_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run was cut short."""
        self.counted_at = state_dict.pop("counted_at")
        super().load_state_dict(state_dict)


class StopAfter(Callback):
    """Ends a fit after a number of epochs, and leaves max_epochs alone, which says how fast the rate falls.

    A run that validation stopped early had walked only part of its learning-rate schedule; whoever repeats it
    must walk the same part.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs, self.done = epochs, 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know: how many epochs are done."""
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the epochs of the run that was cut short."""
        self.done = state_dict["done"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train no further where a resumed fit had reached its end."""
        trainer.should_stop |= self.done >= self.epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop at the end of the last epoch."""
        self.done = trainer.current_epoch + 1
        trainer.should_stop |= self.done >= self.epochs


class RunCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that knows its checkpoints again where the run's directory has been moved or copied.

    Lightning's own would forget the best score, and look for the best weights at the old place. Where a run
    goes on in a directory of its own, they are at the old place.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run was cut short."""
        here = self.dirpath
        if here is not None and state_dict["dirpath"] != here:

            def moved(path: str) -> str:
                there = Path(here) / Path(path).name
                return str(there) if path and there.is_file() else path

            paths = ("best_model_path", "kth_best_model_path", "last_model_path")
            state_dict = {
                **state_dict,
                "dirpath": here,
                "best_k_models": {moved(path): score for path, score in state_dict["best_k_models"].items()},
                **{name: moved(state_dict[name]) for name in paths},
            }
        super().load_state_dict(state_dict)


def default_callbacks(
    stage: str, monitor: str, patience: int, directory: Path | None = None
) -> list[Callback]:
    """Return early stopping, checkpoints of the best and the last epoch, and progress on stderr."""
    callbacks: list[Callback] = [
        PatientEarlyStopping(monitor=monitor, mode="max", patience=patience),
        RunCheckpoint(
            dirpath=directory,
            filename="best",
            monitor=monitor,
            mode="max",
            enable_version_counter=False,
        ),
        # Of its own: Lightning's save_last saves when there is a new best alone.
        _last_checkpoint(directory),
        EpochReport(stage, monitor),
    ]
    if sys.stderr.isatty():
        callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
    return callbacks


def _last_checkpoint(directory: Path | None) -> RunCheckpoint:
    return RunCheckpoint(
        dirpath=directory, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
    )


def default_precision() -> str:
    """Return bf16-mixed where the hardware multiplies bfloat16 faster than float32, else 32-true."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return "bf16-mixed" if fast else "32-true"


@dataclass(frozen=True)
class Chosen:
    """What validation chose."""

    epochs: int  # after which the weights were best, 1 for the first
    metric: float  # MONITOR's, there
    context_strength: float = 1.0  # how much the context counts, of a ranker that has one


def fit_stage(
    stage: str,
    module: L.LightningModule,
    data: L.LightningDataModule,
    directory: Path,
    trainer_options: Mapping[str, Any],
    *,
    patience: int,
    resume: bool,
) -> Chosen:
    """Fit a module, load its best weights into it and return which epoch was the best on validation.

    Args:
        stage: name on the progress lines.
        module: the Lightning module; holds the best weights afterwards.
        data: its data module.
        directory: gets `last.ckpt`, `best.ckpt` and the logs (CSV and TensorBoard).
        trainer_options: keywords of lightning.Trainer; callbacks are added to ours, a logger replaces ours.
        patience: validations without a better one before training stops.
        resume: go on from `last.ckpt` where there is one.
    """
    callbacks = default_callbacks(stage, MONITOR[stage], patience, directory)
    trainer = _fit(module, data, directory, trainer_options, callbacks, resume)
    epochs = load_best(module, trainer)
    return Chosen(epochs, float(trainer.checkpoint_callback.best_model_score))  # type: ignore[union-attr]


def refit_stage(
    stage: str,
    module: L.LightningModule,
    data: L.LightningDataModule,
    directory: Path,
    trainer_options: Mapping[str, Any],
    *,
    epochs: int,
    resume: bool,
) -> None:
    """Fit a module for a number of epochs without validation; it holds the last weights afterwards.

    A learning-rate schedule over max_epochs falls as it did when the epochs were chosen: it depends on
    max_epochs and on the steps of an epoch, and only the latter follow the data.

    Args:
        stage: name on the progress lines.
        module: a fresh Lightning module.
        data: its data module.
        directory: gets `last.ckpt` and the logs.
        trainer_options: as fit_stage takes them; what would end the fit otherwise, or asks for validation
            (limits of time and steps, early stopping, other checkpoints), plays no part.
        epochs: how many.
        resume: go on from `last.ckpt` where there is one.
    """
    unlimited = {"min_epochs": None, "min_steps": None, "max_time": None, "limit_val_batches": 0}
    others = [
        callback
        for callback in trainer_options["callbacks"] or []
        if not isinstance(callback, (EarlyStopping, Checkpoint))
    ]
    callbacks: list[Callback] = [
        StopAfter(epochs),
        _last_checkpoint(directory),
        EpochReport(f"{stage} refit", MONITOR[stage]),
    ]
    if sys.stderr.isatty():
        callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
    _fit(module, data, directory, {**trainer_options, **unlimited, "callbacks": others}, callbacks, resume)
    module.cpu().eval()


def _fit(
    module: L.LightningModule,
    data: L.LightningDataModule,
    directory: Path,
    trainer_options: Mapping[str, Any],
    callbacks: Sequence[Callback],
    resume: bool,
) -> L.Trainer:
    """Run a trainer with these callbacks and the recipe's; see fit_stage."""
    directory.mkdir(parents=True, exist_ok=True)
    options = dict(trainer_options)
    callbacks = [*callbacks, *(options.pop("callbacks") or [])]
    loggers = options.pop("logger")
    if loggers is None or loggers is True:
        loggers = [CSVLogger(directory, name="csv"), TensorBoardLogger(directory, name="tensorboard")]
    if options.get("enable_progress_bar") is None:
        options["enable_progress_bar"] = sys.stderr.isatty()
    trainer = L.Trainer(**options, callbacks=callbacks, logger=loggers)
    last = directory / "last.ckpt"
    checkpoint = last if resume and last.is_file() else None
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:  # how Lightning ends on Ctrl-C, to which it then turns a deaf ear
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from stop
    return trainer


def load_best(module: L.LightningModule, trainer: L.Trainer) -> int:
    """Put the weights of a run's best checkpoint into its module, on the CPU and in evaluation mode.

    Returns after how many epochs they were the best.
    """
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint) or not checkpoint.best_model_path:
        raise ValueError(
            "the run never reached a validation; expected a trainer with max_epochs of at least 1, and no "
            "max_steps or max_time that end the first epoch"
        )
    state = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["state_dict"])
    module.cpu().eval()
    return int(state["epoch"]) + 1


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed for the next step; elsewhere do nothing.

    It would hand blocks of some megabytes back to the system and have each page cleared anew at every step:
    on Amazon Beauty that was a fifth of a ranking step on two CPU cores.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        # An older glibc refuses the first, and would stop moving the threshold by itself all the same.
        libc.mallopt(mmap_threshold, 1 << 30) or libc.mallopt(mmap_threshold, 1 << 25)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def quiet_lightning() -> None:
    """Keep the trainer's notices off the screen: EpochReport tells what matters."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*IterableDataset. has `__len__`.*",
        ".*smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*LeafSpec.*",
        ".*Sparse invariant checks.*",
    ):
        warnings.filterwarnings("ignore", text)

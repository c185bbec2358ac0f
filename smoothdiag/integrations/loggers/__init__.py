"""Loggers: write a probe's rows, AutoClip's state and the verdict so far to an experiment tracker during a run."""

from smoothdiag.integrations.loggers.callback import CallbackWriter
from smoothdiag.integrations.loggers.mlflow import MlflowWriter
from smoothdiag.integrations.loggers.sink import Pixels, Sink
from smoothdiag.integrations.loggers.tensorboard import TensorBoardWriter
from smoothdiag.integrations.loggers.wandb import TrackioWriter, WandbWriter
from smoothdiag.integrations.loggers.writer import TraceWriter

__all__ = [
    "CallbackWriter",
    "MlflowWriter",
    "Pixels",
    "Sink",
    "TensorBoardWriter",
    "TraceWriter",
    "TrackioWriter",
    "WandbWriter",
]

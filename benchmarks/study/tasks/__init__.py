"""The tasks of the study: a pretrained model, its data, a loss and an exact metric."""

from collections.abc import Callable

import torch

from .base import Task
from .code import Code
from .digits import Digits
from .sentiment import Sentiment

TASKS: dict[str, Callable[[torch.device], Task]] = {
    "code": Code,
    "sentiment": Sentiment,
    "digits": Digits,
}

__all__ = ["TASKS", "Task"]

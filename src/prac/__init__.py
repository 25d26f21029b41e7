"""Train transformers with a fraction of the activation memory.

import prac

handle = prac.compress(model)  # in place; any optimizer, any trainer, same state_dict
print(handle.summary())
"""

from prac import optim
from prac.allocation import Allocation, allocate
from prac.config import Bits, Config, Factors, Rank
from prac.convert import compress
from prac.factored import FactoredGradient
from prac.handle import Handle
from prac.loss import ChunkedLoss
from prac.memory import Breakdown, fit, measure, predict
from prac.monitor import Monitor
from prac.oneshot import calibrate
from prac.presets import PRESETS

__all__ = [
    "PRESETS",
    "Allocation",
    "Bits",
    "Breakdown",
    "ChunkedLoss",
    "Config",
    "FactoredGradient",
    "Factors",
    "Handle",
    "Monitor",
    "Rank",
    "allocate",
    "calibrate",
    "compress",
    "fit",
    "measure",
    "optim",
    "predict",
]
__version__ = "0.1.0"

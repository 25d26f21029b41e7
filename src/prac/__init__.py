"""Train transformers with a fraction of the activation memory.

import prac

handle = prac.compress(model)  # in place; any optimizer, any trainer, same state_dict
print(handle.summary())
"""

from prac.allocate import Allocation, allocate
from prac.config import PRESETS, Bits, Config, Rank
from prac.convert import compress
from prac.handle import Handle
from prac.loss import ChunkedLoss
from prac.memory import Breakdown, fit, measure, predict
from prac.monitor import Monitor

__all__ = [
    "PRESETS",
    "Allocation",
    "Bits",
    "Breakdown",
    "ChunkedLoss",
    "Config",
    "Handle",
    "Monitor",
    "Rank",
    "allocate",
    "compress",
    "fit",
    "measure",
    "predict",
]
__version__ = "0.1.0"

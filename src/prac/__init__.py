"""Train transformers with a fraction of the activation memory.

import prac

handle = prac.compress(model)  # in place; any optimizer, any trainer, same state_dict
print(handle.summary())
"""

from prac import optim
from prac.allocation import Allocation, allocate
from prac.config import Bits, Config, Factors, Rank
from prac.convert.calibrate import calibrate
from prac.convert.chunked_loss import ChunkedLoss
from prac.convert.compress import compress
from prac.convert.handle import Handle
from prac.memory import Breakdown, fit, measure, predict
from prac.monitoring.monitor import Monitor
from prac.optim.factored import FactoredGradient
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

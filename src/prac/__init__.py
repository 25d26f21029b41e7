"""Train transformers with a fraction of the activation memory.

import prac

handle = prac.compress(model)  # in place; any optimizer, any trainer, same state_dict
print(handle.summary())

Beside these names there are ``prac.memory`` (the largest batch, what is kept), ``prac.allocation`` (ranks and bits by a
budget), ``prac.optim`` (gradients in factors), ``prac.integrations`` (callbacks for Trainers) and ``prac.config``.
"""

from prac.config import Bits, Config, Rank
from prac.convert.chunked_loss import ChunkedLoss
from prac.convert.compress import compress
from prac.convert.handle import Handle
from prac.memory import measure, predict
from prac.monitoring.monitor import Monitor
from prac.presets import PRESETS

__all__ = ["PRESETS", "Bits", "ChunkedLoss", "Config", "Handle", "Monitor", "Rank", "compress", "measure", "predict"]
__version__ = "0.1.0"

"""Weight gradients that stay in factors, and AdamW in their subspace."""

from prac.optim.adamw import SubspaceAdamW
from prac.optim.factored import FactoredGradient

__all__ = ["FactoredGradient", "SubspaceAdamW"]

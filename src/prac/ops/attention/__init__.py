"""Scaled dot-product attention in few bits: one op, and the kernels of torch that it can stand in for."""

from prac.ops.attention.backends import choose
from prac.ops.attention.bits import enough
from prac.ops.attention.call import Backend, Call
from prac.ops.attention.op import attention

__all__ = ["Backend", "Call", "attention", "choose", "enough"]

"""How one tensor is kept between forward and backward: rounded, in a subspace, or in factors."""

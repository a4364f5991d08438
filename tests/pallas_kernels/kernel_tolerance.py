"""How far a kernel may be from the reference it computes."""

# The same float32 products in another order, sums of up to 300 slots and 256 channels, and exp, which doubles the
# logits' error.
FLOAT32 = dict(rtol=3e-5, atol=3e-5)
# Probabilities are rounded to 8 bits against the maximum of another part of the slots: half a unit in the last place,
# 2**-9, of values up to 4, on both sides.
BFLOAT16 = dict(rtol=2e-2, atol=2e-2)


def tolerance(dtype: str) -> dict[str, float]:
    """For `np.testing.assert_allclose`, by the dtype of the queries."""
    return {"float32": FLOAT32, "bfloat16": BFLOAT16}[dtype]

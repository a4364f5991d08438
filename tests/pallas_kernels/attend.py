"""`decode_attention` of what the shapes of `pallas_kernels.shapes` draw."""

from pallas_kernels.decode_attention import Pages, Rotation, decode_attention


def attend(q, k, v, q_pos, k_pos, more=None, **how):
    """Takes the pages or the rotation that a shape draws last by its name."""
    name = {Pages: "pages", Rotation: "rotation"}.get(type(more))
    return decode_attention(q, k, v, q_pos, k_pos, **({} if name is None else {name: more}), **how)

"""Any part of a leaf is what the whole leaf has there, and reads no more of the tensors than it needs."""

import functools

import jax
import numpy as np
import pytest

from models.families import read_config
from models.params import declare
from tests.golden.tiny_weights import weights
from tests.models.test_families import CHECKPOINTS

# One for each way to make a leaf: plain, rows in another order, one tensor for several leaves, gains, offsets, experts,
# skipped positions, up-projections of latents.
FAMILIES = ("qwen2", "gpt_neox", "phi4_mini", "gemma3", "mixtral", "opt", "deepseek_v2")


class Counted:
    """A tensor that remembers how many numbers were read of it."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, 0

    def __getitem__(self, index):
        part = self.array[index]
        self.read += part.size
        return part


@functools.cache
def tensors(name: str) -> dict[str, np.ndarray]:
    return weights(CHECKPOINTS[name]["shapes"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_part_is_that_of_the_whole(name):
    rng = np.random.default_rng(0)
    for leaf in jax.tree.leaves(declare(read_config(name, CHECKPOINTS[name]["config"]))):
        of_leaf = [tensors(name)[key] for key in leaf.names]
        whole = leaf.read(of_leaf, tuple(slice(0, size) for size in leaf.shape))
        assert whole.shape == leaf.shape
        part = tuple(slice(*np.sort(rng.choice(size + 1, 2, replace=False)).tolist()) for size in leaf.shape)
        np.testing.assert_array_equal(leaf.read(of_leaf, part), whole[part])


def test_pieces_make_up_a_part():
    leaf = declare(read_config("tiny", CHECKPOINTS["mixtral"]["config"])).layers[0].w_down
    index = (slice(1, 4), slice(5, 40), slice(0, 30))
    of_leaf = [tensors("mixtral")[key] for key in leaf.names]
    whole, found = leaf.read(of_leaf, index), np.full((3, 35, 30), np.nan, np.float32)
    pieces = list(leaf.pieces(index, itemsize=8 << 10))  # 8 MB are a thousand numbers then: an expert a piece
    assert len(pieces) == 3
    for of_part, inside in pieces:
        found[inside] = leaf.read(of_leaf, of_part)
    np.testing.assert_array_equal(found, whole)


def test_a_kv_head_reads_only_its_rows():
    config = read_config("tiny", CHECKPOINTS["qwen2"]["config"])
    leaf = declare(config).layers[0].wqkv
    counted = [Counted(tensors("qwen2")[key]) for key in leaf.names]
    columns = leaf.shape[1] // config.num_kv_heads
    leaf.read(counted, (slice(0, config.width), slice(columns, 2 * columns)))
    assert sum(tensor.read for tensor in counted) == config.width * columns
    leaf.read(counted, (slice(4, 6), slice(0, columns)))  # some of the inputs
    assert sum(tensor.read for tensor in counted) == config.width * columns + 2 * columns

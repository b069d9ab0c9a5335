"""Random weights that every engine gets the same, without torch: slices of one random buffer, scaled."""

import zlib

import numpy as np

# A prime, so that the rows of a matrix do not repeat.
BUFFER_LENGTH = 4_194_301


def random_buffer(seed: int) -> np.ndarray:
    """Normal values, float32, rounded to 8 significant bits: bfloat16 and float16 both hold them exactly."""
    values = np.random.default_rng(seed).standard_normal(BUFFER_LENGTH, dtype=np.float32)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def make_weight(buffer: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter of that name, float32: 1 for a vector (a norm), else variance about 1 / columns.

    The scale is a power of two, which keeps the values exact.
    """
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    weight = take(buffer, int(np.prod(shape)), zlib.crc32(name.encode()))
    weight *= 2.0 ** -round(np.log2(shape[-1]) / 2)
    return weight.reshape(shape)


def take(buffer: np.ndarray, count: int, offset: int) -> np.ndarray:
    """A new array of `count` values from the buffer, which is read round and round from `offset` on."""
    out = np.empty(count, dtype=buffer.dtype)
    start, done = offset % len(buffer), 0
    while done < count:
        part = buffer[start : start + count - done]
        out[done : done + len(part)] = part
        done, start = done + len(part), 0
    return out


def random_ids(count: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids for a prompt."""
    return np.random.default_rng(seed).integers(vocab_size, size=count).tolist()

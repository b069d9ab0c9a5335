"""Rotating a model by Hadamard matrices folded into its weights, so that outliers are spread before rounding.

The residual stream is multiplied by one orthogonal matrix and the values of each head by another. Both cancel in the
weights around them: outputs stay what they were, and nothing is added at run time. RMSNorm commutes with a rotation
once its own weights have gone into the linears after it, so the norms' weights become 1; embeddings and head are then
different matrices, and a head that was tied to the embeddings is stored for itself.

Source: QuaRot (arXiv:2404.00456), its offline rotations. The ones that need work at run time (before `down_proj`, and
of keys and queries after RoPE) are left out.
"""

import re

import torch

# Rows rotated at a time, so that the float32 copy of the embeddings stays small.
_CHUNK_ROWS = 8192
SEED = 0

# Which norm's weights a linear layer takes in.
_NORMS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"
_LAYER_WEIGHT = re.compile(r"(model\.layers\.\d+\.)([\w.]+)\.weight")


def hadamard_matrix(size: int) -> torch.Tensor:
    """A Hadamard matrix `[size, size]` of 1 and -1, float64: `H @ H.T` is `size` times the identity.

    Powers of two times 1 or an order that Paley's constructions give (12, 20, 28, 36, 44, 60 and so on).

    Raises:
        ValueError: none of these fits.

    Source: Sylvester 1867 and Paley 1933.
    """
    core = size
    while core >= 1:
        matrix = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core)
        if matrix is not None:
            break
        if core % 2:
            raise ValueError(
                f"A size of {size} has no Hadamard matrix that can be built here (a power of two times 1, 12, 20, 28, "
                "36 ...); quantize without `--rotate`."
            )
        core //= 2
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.kron(pair, matrix)
    return matrix


def _paley(order: int) -> torch.Tensor | None:
    """Hadamard matrix of order q + 1 or 2 (q + 1), q a prime of the right kind; None where there is none."""
    first, second = order - 1, order // 2 - 1
    if order % 4 == 0 and _is_prime(first):  # so first % 4 == 3
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0] = 1.0, -1.0
        skew[1:, 1:] = _residues(first)
        return skew + torch.eye(order, dtype=torch.float64)
    if order % 2 == 0 and second % 4 == 1 and _is_prime(second):
        conference = torch.zeros(second + 1, second + 1, dtype=torch.float64)
        conference[0, 1:] = conference[1:, 0] = 1.0
        conference[1:, 1:] = _residues(second)
        signs, diagonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        identity = torch.eye(second + 1, dtype=torch.float64)
        return torch.kron(conference, signs.double()) + torch.kron(identity, diagonal.double())
    return None


def _is_prime(number: int) -> bool:
    return number > 2 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _residues(prime: int) -> torch.Tensor:
    """Quadratic character of i - j modulo a prime, `[q, q]`."""
    squares = {i * i % prime for i in range(1, prime)}
    row = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)], dtype=torch.float64)
    places = torch.arange(prime)
    return row[(places[:, None] - places[None]) % prime]


def random_hadamard(size: int, seed: int = SEED) -> torch.Tensor:
    """An orthogonal matrix `[size, size]`, float64: a Hadamard matrix, its rows given random signs, over its norm.

    The signs keep a vector of equal entries from going into one coordinate.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2.0 - 1.0
    return hadamard_matrix(size) * signs.double() / size**0.5


class Rotation:
    """Both rotations of a model, applied to one weight at a time.

    Args:
        config: of the model, Llama-like: `hidden_size`, `head_dim`.
        norms: weights of every RMSNorm by their names in the checkpoint.
        device: where to compute.
    """

    def __init__(self, config, norms: dict[str, torch.Tensor], device: torch.device | str = "cpu"):
        self.residual = random_hadamard(config.hidden_size).float().to(device)
        self.values = random_hadamard(config.head_dim, SEED + 1).float().to(device)
        self.norms = norms
        self.device = torch.device(device)

    def rotate(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of that name in the rotated model, float32, on the CPU.

        With x the residual stream as a row, Q its rotation and R that of a head's values: the stream becomes x Q; what
        writes to it is W -> Q^T W, what reads from it W -> W diag(norm) Q; `v_proj` becomes R^T W head by head, and
        `o_proj` W R.
        """
        if name in self.norms:
            return torch.ones(weight.shape)
        if name in (EMBEDDINGS, HEAD):
            scale = self.norms[FINAL_NORM] if name == HEAD else torch.ones(weight.shape[1])
            return torch.cat([self._read(rows, scale) for rows in weight.split(_CHUNK_ROWS)])
        layer, linear = _LAYER_WEIGHT.fullmatch(name).groups()
        if linear in _NORMS:
            weight = self._read(weight, self.norms[f"{layer}{_NORMS[linear]}.weight"])
            return self._by_heads(weight.t()).t().contiguous() if linear == "self_attn.v_proj" else weight
        if linear == "self_attn.o_proj":
            weight = self._by_heads(weight)
        return (self.residual.t() @ weight.to(self.device, torch.float32)).cpu()

    def _read(self, weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        scaled = weight.to(self.device, torch.float32) * norm.to(self.device, torch.float32)
        return (scaled @ self.residual).cpu()

    def _by_heads(self, weight: torch.Tensor) -> torch.Tensor:
        """The columns of each head times R."""
        heads = weight.to(self.device, torch.float32).reshape(weight.shape[0], -1, self.values.shape[0])
        return (heads @ self.values).reshape(weight.shape).cpu()


__all__ = ["EMBEDDINGS", "HEAD", "Rotation", "hadamard_matrix", "random_hadamard"]

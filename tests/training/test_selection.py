"""The loss of the selection: against its definition, what it may not touch, and that blocks are found by it."""

import math

import pytest
import torch

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM
from minicpm4_hf.sparse_attention import pool_keys, score_blocks
from minicpm4_hf.training.packing import IGNORED
from minicpm4_hf.training.selection import SelectionObserver, SelectionSettings, selection_loss

SPARSE = {"kernel_size": 8, "kernel_stride": 4, "init_blocks": 1, "block_size": 16, "window_size": 16, "topk": 2}
SPARSE |= {"dense_len": 32, "use_nope": False}


def by_definition(query, key, positions, settings, scale):
    """One head, one query, one block at a time, in float64."""
    heads, group = key.shape[0], query.shape[0] // key.shape[0]
    block, kernel, stride = settings["block_size"], settings["kernel_size"], settings["kernel_stride"]
    total = 0.0
    for head in range(heads):
        for number, position in enumerate(positions.tolist()):
            keys = key[head, : position + 1].double()
            own = position // block
            far = range(settings["init_blocks"], max(settings["init_blocks"], own - settings["window_size"] // block))
            target, scores = dict.fromkeys(far, 0.0), dict.fromkeys(far, 0.0)
            windows = [range(i, i + kernel) for i in range(0, position + 2 - kernel, stride)]
            pooled_weights = torch.zeros(len(windows), dtype=torch.float64)
            for member in range(group):
                q = query[head * group + member, number].double() * scale
                weights = (keys @ q).softmax(0)
                for b in far:
                    target[b] += weights[b * block : (b + 1) * block].sum().item() / group
                pooled_weights += torch.stack([keys[list(w)].mean(0) @ q for w in windows]).softmax(0)
            for b in far:
                touching = [i for i, w in enumerate(windows) if w[0] < (b + 1) * block and w[-1] >= b * block]
                scores[b] = max(pooled_weights[i].item() for i in touching)
            for b in far:
                share, predicted = target[b] / sum(target.values()), scores[b] / sum(scores.values())
                total += target[b] * math.log(share / predicted)
    return total / heads / len(positions)


def inputs(heads=2, group=3, length=100, count=4, dim=8, seed=0):
    torch.manual_seed(seed)
    query, key = torch.randn(heads * group, count, dim), torch.randn(heads, length, dim)
    return query, key, torch.tensor([70, 79, 96, 99])[:count]


@pytest.mark.parametrize("group", (1, 3))
@pytest.mark.parametrize("length", (100, 112))
def test_the_loss_is_its_definition(group, length):
    query, key, positions = inputs(group=group, length=length)
    loss = selection_loss(query, key, positions, SPARSE, scale=0.4)
    assert loss.item() == pytest.approx(by_definition(query, key, positions, SPARSE, 0.4), rel=1e-4)
    assert loss.item() > 0


def test_the_scores_are_those_of_the_selection():
    """In proportion, for each query: a model trained for one is trained for the other."""
    query, key, positions = inputs(group=1)
    pooled = pool_keys(key[None], 8, 4)
    for number, position in enumerate(positions.tolist()):
        options = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "scale": 0.4, "lse_approx": False}
        where = positions[number : number + 1]
        scores = score_blocks(query[None, :, number : number + 1], pooled, pooled, where, 7, **options)[0, :, 0]
        far = slice(1, position // 16 - 1)
        expected = scores[:, far] / scores[:, far].sum(-1, keepdim=True)
        keys = key[:, : position + 1].double()
        weights = (keys @ query[:, number, :, None].double() * 0.4).softmax(1).squeeze(-1)
        target = torch.stack([weights[:, b * 16 : b * 16 + 16].sum(-1) for b in range(1, position // 16 - 1)], -1)
        share = target / target.sum(-1, keepdim=True)
        wanted = (target * (share / expected).log()).sum(-1).mean()
        loss = selection_loss(query[:, number : number + 1], key, where, SPARSE, scale=0.4)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)


def test_what_is_later_or_near_does_not_count():
    query, key, positions = inputs()
    loss = selection_loss(query, key, positions[:1].expand(4), SPARSE, scale=0.4)
    changed = key.clone()
    changed[:, 71:] = 100.0
    assert torch.equal(selection_loss(query, changed, positions[:1].expand(4), SPARSE, scale=0.4), loss)
    near = torch.tensor([20, 30, 40, 47])  # no block between the first and the window
    assert selection_loss(query, key, near, SPARSE, scale=0.4) == 0


def test_training_by_it_finds_the_block():
    """A key that the queries want is lost in the mean of its window, until the keys around it learn to help."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 8), 0.3 * torch.randn(1, 96, 8)
    key[0, 37] = 4 * query[0, 0] / query.norm()
    key[0, [36, 38]] = -2.2 * query[0, 0] / query.norm()
    key.requires_grad_()
    position = torch.tensor([95])

    def best() -> int:
        pooled = pool_keys(key[None], 8, 4)
        options = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "scale": 1.0, "lse_approx": False}
        scores = score_blocks(query[None], pooled, pooled, position, 6, **options)[0, 0, 0]
        return int(scores[1:4].argmax()) + 1

    assert best() != 2
    optimizer = torch.optim.Adam([key], lr=0.02)
    losses = []
    for _ in range(60):
        loss = selection_loss(query, key, position, SPARSE, scale=1.0)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert best() == 2 and losses[-1] < 0.2 * losses[0]


def small_model(sparse=None, **options):
    config = MiniCPM4Config(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, sparse_config=sparse, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return MiniCPM4ForCausalLM(config)


def packed(lengths=(110, 40, 90)):
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = torch.full_like(ids, IGNORED)
    labels[0, [100, 105, 109, 145, 230, 239]] = ids[0, [100, 105, 109, 145, 230, 239]]
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


@pytest.mark.parametrize("sparse", (None, SPARSE, {**SPARSE, "use_nope": True}))
def test_an_observed_model_gives_what_it_gave(sparse):
    model, batch = small_model(sparse).train(), packed()
    names, plain = list(model.state_dict()), model(**batch, use_cache=False)
    observer = SelectionObserver(model, SelectionSettings(num_queries=4), sparse or SPARSE)
    observer.prepare(batch["position_ids"], batch["labels"])
    watched = model(**batch, use_cache=False)
    assert torch.equal(plain.logits, watched.logits) and list(model.state_dict()) == names
    loss = observer.take()
    assert loss.item() > 0 and observer.take() == 0
    loss.backward()
    layers = model.model.layers
    assert all(layer.self_attn.k_proj.weight.grad.abs().max() > 0 for layer in layers)
    assert layers[0].self_attn.v_proj.weight.grad.abs().max() > 0  # by the second layer's queries and keys
    assert layers[1].self_attn.v_proj.weight.grad is None


def test_the_queries_are_those_before_labelled_tokens_with_blocks_to_choose():
    model, batch = small_model(), packed()
    observer = SelectionObserver(model, SelectionSettings(num_queries=4), SPARSE)
    observer.prepare(batch["position_ids"], batch["labels"])
    found = [(row, begin, own.tolist(), positions.tolist()) for row, begin, own, positions in observer._samples]
    # of 99, 104, 108, 229 and 238 four, evenly; 144 stands too early in its sequence
    assert found == [(0, 0, [99, 104, 108], [99, 104, 108]), (0, 150, [238], [88])]


def test_the_loss_is_float32_under_autocast():
    """As the 0 of a batch without such queries is: processes that add theirs up need the same type."""
    model, batch = small_model(), packed()
    observer = SelectionObserver(model, SelectionSettings(), SPARSE)
    found = []
    for labels in (batch["labels"], torch.full_like(batch["labels"], IGNORED)):
        observer.prepare(batch["position_ids"], labels)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch, use_cache=False)
        found.append(observer.take())
    assert found[0] > 0 and found[1] == 0
    assert [loss.dtype for loss in found] == [torch.float32] * 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"weight": 0.0}, "above 0"), ({"num_queries": 0}, "at least 1"), ({"sparse_config": {"topk": 0}}, "topk")],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        SelectionSettings(**settings)

"""The model against a plain float64 rendering of its equations, and what a transformers user expects of it."""

import pytest
import torch
import torch.nn.functional as F
from small_models import SMALL_SPARSE, build_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, StaticCache

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM, MiniCPM4ForSequenceClassification, longrope_factors


def plain_logits(model, ids):
    """MiniCPM4's equations written out in float64: dense attention, one row at a time."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    rope = config.rope_parameters
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    inv_freq = 1 / rope["rope_theta"] ** exponents
    if rope["rope_type"] == "longrope":
        inv_freq = inv_freq / torch.tensor(rope["short_factor"], dtype=torch.float64)
    angles = torch.arange(ids.shape[1], dtype=torch.float64)[:, None] * inv_freq
    cos, sin = angles.cos(), angles.sin()

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weights[name]

    def rotate(x):  # [T, heads, D]
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]), -1)

    rows = []
    scale = config.scale_depth / config.num_hidden_layers**0.5
    for row in ids:
        h = weights["model.embed_tokens.weight"][row] * config.scale_emb
        for i in range(config.num_hidden_layers):
            at = f"model.layers.{i}."
            x = norm(h, at + "input_layernorm.weight")
            q, k, v = (
                (x @ weights[f"{at}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, config.head_dim)) for n in "qkv"
            )
            q, k = rotate(q), rotate(k)
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            scores = torch.einsum("ihd,jhd->hij", q, k) / config.head_dim**0.5
            scores += torch.full(scores.shape[1:], -torch.inf, dtype=torch.float64).triu(1)
            mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
            h = h + scale * mixed @ weights[at + "self_attn.o_proj.weight"].T
            x = norm(h, at + "post_attention_layernorm.weight")
            gate, up = (x @ weights[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            h = h + scale * (F.silu(gate) * up) @ weights[at + "mlp.down_proj.weight"].T
        h = norm(h, "model.norm.weight") / (config.hidden_size / config.dim_model_base)
        rows.append(h @ weights["lm_head.weight"].T)
    return torch.stack(rows)


def longrope_model(**settings):
    factors = longrope_factors("MiniCPM4-0.5B")[:8]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors}
    return build_model(rope_parameters={**rope, "original_max_position_embeddings": 4096}, **settings)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_dense_parity_with_the_equations(tie, tokens):
    ids = tokens(2, 61)
    model = longrope_model(sparse=None, tie_word_embeddings=tie).double()
    with torch.no_grad():
        # what is left is the float32 rounding of rotation and logits, about 1e-6 of the largest logit
        expected = plain_logits(model, ids)
        torch.testing.assert_close(
            model(ids).logits.double(), expected, rtol=0, atol=3e-6 * expected.abs().max().item()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_logits_are_float32_and_the_rotation_too(dtype, tokens, tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    exact = torch.cos(100_001 * (1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)))
    for cast in (model.to(dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)):
        assert cast.dtype == dtype
        assert cast(tokens(1, 20)).logits.dtype == torch.float32
        cos, _ = cast.model.rotary_emb(torch.zeros(1, dtype=dtype), torch.tensor([[100_001]]))
        assert cos.dtype == torch.float32
        torch.testing.assert_close(cos[0, 0, :8], exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention", "infllm_v2"])
def test_attention_implementations_agree(implementation, tokens):
    ids = tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :19] = 0
    model = build_model(sparse=None)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation(implementation)
        got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


def test_flash_attention_is_declared():
    assert MiniCPM4ForCausalLM._supports_flash_attn
    assert MiniCPM4ForCausalLM._supports_flex_attn
    assert MiniCPM4ForCausalLM._supports_sdpa


def test_sparse_with_every_block_equals_dense(tokens):
    ids = tokens(2, 120)
    with torch.no_grad():
        sparse = build_model(sparse={**SMALL_SPARSE, "topk": 40})(ids).logits
        torch.testing.assert_close(sparse, build_model(sparse=None)(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sparse", [None, SMALL_SPARSE], ids=["dense", "sparse"])
def test_gradient_checkpointing_gives_the_same_gradients(sparse, tokens):
    ids = tokens(2, 100)
    grads = []
    for checkpointing in (False, True):
        model = build_model(sparse=sparse).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_logits_to_keep(tokens):
    ids = tokens(2, 40)
    model = build_model()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


def test_output_attentions_and_hidden_states(tokens):
    ids = tokens(1, 80)
    model = build_model(sparse=None)
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in out.attentions] == [(1, 8, 80, 80)] * 2
    assert len(out.hidden_states) == 3
    sparse = build_model()
    with pytest.raises(ValueError, match="output_attentions"):
        sparse(ids, output_attentions=True)


def test_inputs_embeds_come_scaled(tokens):
    ids = tokens(1, 30)
    model = build_model()
    embeds = model.get_input_embeddings()(ids) * model.config.scale_emb
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embeds)


def test_sequence_classification_uses_the_undivided_state(tokens, tmp_path):
    config = build_model().config
    config.num_labels = 3
    model = MiniCPM4ForSequenceClassification(config).eval()
    ids = tokens(2, 25)
    with torch.no_grad():
        state = model.model(ids).last_hidden_state[:, -1]
        torch.testing.assert_close(model(ids).logits, model.score(state))
    model.save_pretrained(tmp_path)
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is MiniCPM4ForSequenceClassification


def test_save_and_load_keep_the_logits(tokens, tmp_path):
    ids = tokens(2, 110)
    model = longrope_model(sparse=SMALL_SPARSE, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MiniCPM4ForCausalLM
    assert loaded.config.sparse_config == model.config.sparse_config
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids)[0], model.model(ids)[0])


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=["auto", "explicit"])
def test_device_map(device_map, tokens, tmp_path):
    pytest.importorskip("accelerate")
    ids = tokens(1, 110)
    model = build_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_tensor_parallel_plan_names_real_modules():
    model = build_model()
    names = {name.replace("layers.0", "layers.*") for name, _ in model.named_modules()}
    for pattern in model.config.base_model_tp_plan:
        assert f"model.{pattern}" in names
    assert "lm_head" in MiniCPM4ForCausalLM._tp_plan


@pytest.mark.parametrize("sparse", [None, {**SMALL_SPARSE, "dense_len": 64}], ids=["dense", "below-dense-len"])
def test_dense_decode_step_compiles_into_one_graph(sparse, tokens):
    model = build_model(sparse=sparse)
    ids = tokens(1, 20)
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(ids[:, :19], past_key_values=cache)
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = step(ids[:, 19:], past_key_values=cache, position_ids=torch.tensor([[19]])).logits
        torch.testing.assert_close(got, model(ids).logits[:, 19:], rtol=0, atol=1e-4)


def test_lora_trains(tokens):
    peft = pytest.importorskip("peft")
    model = build_model().train()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    ids = tokens(2, 100)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("use_nope", [False, True])
def test_a_packed_row_is_its_sequences_one_by_one(tokens, use_nope):
    model = build_model(sparse={**SMALL_SPARSE, "use_nope": use_nope, "dense_len": 64}).double()
    ids, lengths = tokens(2, 200), ((130, 20, 50), (7, 193))  # shorter and longer than `dense_len`
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    packed.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    alone = [
        torch.cat([model(part, use_cache=False).logits for part in row[None].split(list(sizes), 1)], 1)
        for row, sizes in zip(ids, lengths)
    ]
    torch.testing.assert_close(packed, torch.cat(alone))
    torch.cat(alone).sum().backward()
    for gradient, parameter in zip(gradients, model.parameters()):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("sparse", (False, True))
def test_positions_that_skip_begin_no_sequence(tokens, sparse):
    """As with a mask of ones, which says that the row is one sequence; at its end a second one begins."""
    model = build_model() if sparse else build_model(sparse=None)
    ids = tokens(1, 150)
    positions = torch.cat([torch.arange(40), torch.arange(300, 390), torch.arange(1000, 1020)])[None]
    wanted = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits
    torch.testing.assert_close(model(ids, position_ids=positions, use_cache=False).logits, wanted)
    alone = model(ids[:, :60], use_cache=False).logits
    twice = torch.cat([ids, ids[:, :60]], 1), torch.cat([positions, torch.arange(60)[None]], 1)
    both = model(twice[0], position_ids=twice[1], use_cache=False).logits
    torch.testing.assert_close(both, torch.cat([wanted, alone], 1))


def test_packed_sequences_with_a_cache_and_masks_with_gaps_are_refused(tokens):
    model = build_model()
    ids = tokens(1, 60)
    with pytest.raises(ValueError, match="packed"):
        model(ids, position_ids=torch.arange(60)[None] % 30, use_cache=True)
    mask = torch.ones_like(ids)
    mask[0, 30] = 0
    with pytest.raises(ValueError, match="gap"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(1, 1, 60, 60))


def test_right_padding_leaves_the_real_tokens_alone(tokens):
    model = build_model()
    ids = tokens(2, 120)
    mask = torch.ones_like(ids)
    mask[1, 90:] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(padded[1, :90], model(ids[1:, :90]).logits[0], rtol=0, atol=1e-4)


def test_attention_dropout_is_refused_on_the_sparse_path(tokens):
    model = build_model(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="attention_dropout"):
        model(tokens(1, 60))


def test_long_factors_are_used_for_every_length_of_an_extended_model():
    short, long = [1.0] * 8, [4.0] * 8
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    for original, factor in ((64, 4.0), (4096, 1.0)):
        model = build_model(rope_parameters={**rope, "original_max_position_embeddings": original})
        exponents = torch.arange(0, 16, 2) / 16
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, 1 / (factor * 10000.0**exponents))


def test_meta_initialisation_fills_the_rotary_table(tmp_path):
    model = longrope_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_config_defaults_are_those_of_8b():
    config = MiniCPM4Config()
    assert (config.hidden_size, config.num_hidden_layers, config.logits_scaling) == (4096, 32, 16)
    assert config.residual_scale == pytest.approx(0.2474874, abs=1e-7)

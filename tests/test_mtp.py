"""Multi-token prediction: the head's equations, its loss on packed and padded rows, drafting, and saving."""

import copy
import json
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from small_models import SMALL_SPARSE, build_model
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM

SPARSE = pytest.mark.parametrize("sparse", [None, SMALL_SPARSE], ids=["dense", "sparse"])


def build_mtp_model(sparse=None, **settings):
    """A small random model with a random head whose norms are not all ones."""
    model = build_model(sparse=sparse, **settings).add_mtp_head_()
    with torch.no_grad():
        for name, parameter in model.mtp.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(got, expected):
    """Equal up to the float32 of rotation and logits, relative to the largest gradient of each parameter."""
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=2e-5 * gradient.abs().max().item(), msg=name)


def plain_mtp_loss(model, row):
    """The head's equations in float64 for one sequence of token ids: concat, projection, one layer, shared head."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        states = copy.deepcopy(model).double().model(row[None]).last_hidden_state[0]

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weights[f"mtp.layers.0.{name}"]

    positions = torch.arange(1, len(row), dtype=torch.float64)  # of the tokens i + 1
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = positions[:, None] / config.rope_parameters["rope_theta"] ** exponents
    turns = torch.polar(torch.ones_like(angles), angles)

    def rotate(x):  # [T, heads, D]
        a, b = x.chunk(2, -1)
        turned = torch.complex(a, b) * turns[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    at = "mtp.layers.0.mtp_block."
    embeds = weights["model.embed_tokens.weight"][row[1:]]
    joined = torch.cat((norm(states[:-1], "hnorm.weight"), norm(embeds, "enorm.weight")), -1)
    h = joined @ weights["mtp.layers.0.eh_proj.weight"].T
    x = norm(h, "mtp_block.input_layernorm.weight")
    q, k, v = ((x @ weights[f"{at}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, config.head_dim)) for n in "qkv")
    q, k = rotate(q), rotate(k)
    k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / config.head_dim**0.5
    scores += torch.full(scores.shape[1:], -torch.inf, dtype=torch.float64).triu(1)
    mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
    h = h + config.scale_depth * mixed @ weights[at + "self_attn.o_proj.weight"].T
    x = norm(h, "mtp_block.post_attention_layernorm.weight")
    gate, up = (x @ weights[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    h = h + config.scale_depth * (F.silu(gate) * up) @ weights[at + "mlp.down_proj.weight"].T
    h = norm(h, "post_norm.weight") / (config.hidden_size / config.dim_model_base)
    chosen = (h @ weights["lm_head.weight"].T).log_softmax(-1)[:-1].gather(1, row[2:, None])
    return -chosen.mean()


@SPARSE
def test_loss_is_that_of_the_equations(sparse, tokens):
    model = build_mtp_model(sparse)
    rows = tokens(2, 75)
    with torch.no_grad():
        got = model(rows, labels=rows).mtp_loss
    expected = torch.stack([plain_mtp_loss(model, row) for row in rows]).mean()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_loss_is_that_of_the_logits_that_transformers_drafts_from(tokens, tmp_path):
    # a large eps, so that the scale of the embeddings shows
    build_mtp_model(tie_word_embeddings=True, rms_norm_eps=0.05).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, with_mtp_head=True)
    drafter = MtpModel.from_pretrained(model)
    head = {name.removeprefix("mtp."): p for name, p in model.named_parameters() if name.startswith("mtp.")}
    own = {name: p for name, p in drafter.named_parameters() if name.startswith("layers.")}
    assert head.keys() == own.keys() and all(torch.equal(head[name], own[name]) for name in own)
    rows = tokens(2, 40)
    with torch.no_grad():
        states = model.model(rows).last_hidden_state[:, :-1]
        positions = torch.arange(1, 40)[None]
        logits = drafter._project_to_logits(drafter.forward_layer(0, states, positions, None, input_ids=rows[:, 1:]))
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 2:].flatten())
        torch.testing.assert_close(model(rows, labels=rows).mtp_loss, expected, rtol=1e-6, atol=0)


def test_parts_of_the_loss(tokens):
    model = build_mtp_model(mtp_loss_weight=0.25)
    ids = tokens(2, 30)
    evaluated = model(ids, labels=ids)
    assert torch.equal(evaluated.loss, evaluated.ntp_loss)
    trained = model.train()(ids, labels=ids)
    torch.testing.assert_close(trained.loss, evaluated.ntp_loss + 0.25 * evaluated.mtp_loss)
    torch.testing.assert_close(trained.mtp_loss, evaluated.mtp_loss)
    assert trained.loss.requires_grad and not trained.ntp_loss.requires_grad and not trained.mtp_loss.requires_grad
    assert all((gradient != 0).any() for gradient in gradients(model, trained.loss).values())
    assert model(ids).mtp_loss is None and model(ids).loss is None
    bare = build_model(sparse=None)(ids, labels=ids)
    assert bare.ntp_loss is None and bare.mtp_loss is None
    torch.testing.assert_close(bare.loss, evaluated.ntp_loss)


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_both_parts_are_divided_by_num_items_in_batch(kind, tokens):
    """Rows of different numbers of targets, each a step of an accumulation, give the batch's gradients."""
    model = build_mtp_model().train()
    ids = tokens(3, 30)
    labels = ids.clone()
    labels[1, :20] = -100
    num_items = kind(int((labels[:, 1:] != -100).sum()))
    whole = gradients(model, model(ids, labels=labels, num_items_in_batch=num_items).loss)
    outputs = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=num_items) for i in range(3)]
    assert_same_gradients(gradients(model, sum(out.loss for out in outputs)), whole)
    mean = model(ids, labels=labels).mtp_loss * (labels[:, 2:] != -100).sum()
    torch.testing.assert_close(sum(out.mtp_loss for out in outputs) * num_items, mean)


@SPARSE
def test_packed_row_equals_its_documents_one_by_one(sparse, tokens):
    model = build_mtp_model(sparse).double().train()
    lengths = [1, 9, 2, 40, 1, 1, 3, 70]
    documents = [tokens(1, length) for length in lengths]
    labels = [torch.cat((torch.full((1, 1), -100), document[:, 1:]), 1) for document in documents]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    num_items = sum(lengths) - len(lengths)
    settings = {"use_cache": False, "num_items_in_batch": num_items}
    packed = model(torch.cat(documents, 1), labels=torch.cat(labels, 1), position_ids=positions, **settings)
    alone = [model(document, labels=label, **settings) for document, label in zip(documents, labels)]
    for part in ("loss", "ntp_loss", "mtp_loss"):
        torch.testing.assert_close(packed[part], sum(out[part] for out in alone), rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, packed.loss), gradients(model, sum(out.loss for out in alone)))
    # Without a count the mean is over the targets: two fewer than tokens in each document that has so many.
    mean = model(torch.cat(documents, 1), labels=torch.cat(labels, 1), position_ids=positions, use_cache=False)
    num_targets = sum(max(length - 2, 0) for length in lengths)
    torch.testing.assert_close(mean.mtp_loss * num_targets, packed.mtp_loss * num_items, rtol=1e-6, atol=0)


@SPARSE
@pytest.mark.parametrize("implementation", ["infllm_v2", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_alone(side, implementation, sparse, tokens):
    model = build_mtp_model(sparse).train()
    model.set_attn_implementation(implementation)
    lengths = [60, 37, 1, 2]
    ids, mask, labels = torch.full((4, 60), 96), torch.zeros(4, 60, dtype=torch.long), torch.full((4, 60), -100)
    rows = [tokens(1, length) for length in lengths]
    for i, row in enumerate(rows):
        begin = 60 - lengths[i] if side == "left" else 0
        real = slice(begin, begin + lengths[i])
        ids[i, real], mask[i, real] = row[0], 1
        labels[i, real.start + 1 : real.stop] = row[0, 1:]
    settings = {"num_items_in_batch": 96}
    padded = model(ids, attention_mask=mask, labels=labels, **settings)
    alone = [model(row, labels=row, **settings) for row in rows]
    for part in ("ntp_loss", "mtp_loss"):
        torch.testing.assert_close(padded[part], sum(out[part] for out in alone), rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, padded.loss), gradients(model, sum(out.loss for out in alone)))
    # A label on the first real token has a target in next-token prediction only, as everywhere in transformers.
    labels = torch.where(mask == 1, ids, -100)
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels, **settings).mtp_loss, padded.mtp_loss)


def test_positions_and_masks_as_collators_make_them_change_nothing(tokens):
    model = build_mtp_model()
    ids, mask = tokens(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[1, :20] = 0
    labels = torch.where(mask == 1, ids, -100)
    plain = model(ids, attention_mask=mask, labels=labels).mtp_loss
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for settings in ({"position_ids": positions}, {"attention_mask": mask.bool()}):
        got = model(ids, labels=labels, **{"attention_mask": mask, **settings}).mtp_loss
        torch.testing.assert_close(got, plain)
    torch.testing.assert_close(
        model(ids, labels=ids, attention_mask=torch.ones_like(mask)).mtp_loss, model(ids, labels=ids).mtp_loss
    )


def test_masked_tokens_inside_a_row_change_nothing(tokens):
    model, ids = build_mtp_model(), tokens(1, 30)
    mask = torch.ones_like(ids)
    mask[0, 10:13] = 0
    labels = torch.where(mask == 1, ids, -100)
    others = torch.where(mask == 1, ids, 95 - ids)
    losses = [model(row, attention_mask=mask, labels=labels).mtp_loss for row in (ids, others)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", [1, 2])
def test_rows_too_short_for_a_target_add_nothing(length, tokens):
    model = build_mtp_model().train()
    ids = tokens(1, length)
    out = model(ids, labels=ids, num_items_in_batch=1)
    assert out.mtp_loss == 0 and torch.equal(out.loss.detach(), out.ntp_loss)
    assert all(gradient.isfinite().all() for gradient in gradients(model, out.loss).values())
    if length == 2:  # with one token the next-token loss has no target either
        assert model(ids, labels=ids).loss.isfinite()


def test_inputs_embeds_give_the_same_loss(tokens):
    model = build_mtp_model().train()
    ids = tokens(2, 30)
    embeds = model.get_input_embeddings()(ids) * model.config.scale_emb
    torch.testing.assert_close(model(inputs_embeds=embeds, labels=ids).mtp_loss, model(ids, labels=ids).mtp_loss)


def test_gradient_checkpointing_gives_the_same_gradients(tokens):
    model = build_mtp_model().train()
    ids = tokens(2, 40)
    expected = gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable()
    calls = []
    model.mtp.layers[0].mtp_block.self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert_same_gradients(gradients(model, model(ids, labels=ids).loss), expected)
    assert len(calls) == 2  # forward, and again in backward


def test_attention_implementation_set_later_reaches_the_head(tokens):
    model = build_mtp_model()
    ids = tokens(1, 30)
    expected = model(ids, labels=ids).mtp_loss
    model.set_attn_implementation("eager")
    seen = []
    attention = model.mtp.layers[0].mtp_block.self_attn
    attention.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    torch.testing.assert_close(model(ids, labels=ids).mtp_loss, expected)
    assert seen[0].shape == (1, 8, 30, 30)  # only eager attention has weights to return


@pytest.mark.parametrize("whole_head", [False, True], ids=["adapters", "modules_to_save"])
def test_lora_trains_the_head(whole_head, tokens):
    peft = pytest.importorskip("peft")
    model = build_mtp_model().train()
    extra = {"modules_to_save": ["mtp"]} if whole_head else {}
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **extra)
    adapted = peft.get_peft_model(model, lora)
    learning = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("eh_proj" in name for name in learning) == whole_head
    assert any(".mtp." in name for name in learning)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = tokens(2, 50), []
    for _ in range(8):
        out = adapted(input_ids=ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.mtp_loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_trainer_trains_and_evaluates(tokens, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, seen = build_mtp_model(), []
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 20)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    before = model.mtp.layers[0].eh_proj.weight.clone()
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows,
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {},
    )  # fmt: skip
    trainer.train()
    assert not torch.equal(model.mtp.layers[0].eh_proj.weight, before)
    metrics = trainer.evaluate()
    assert seen[-1].shape == (4, 20, 97)  # logits alone, not a tuple with the parts of the loss
    ids = torch.stack([row["input_ids"] for row in rows])
    assert metrics["eval_loss"] == pytest.approx(model(ids, labels=ids).ntp_loss.item(), rel=1e-5)


@SPARSE
@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
def test_drafting_gives_the_greedy_text(trained, sparse, tokens, tmp_path):
    model = build_model(sparse=sparse, initializer_range=0.1).add_mtp_head_().train()
    ids = tokens(1, 11).repeat(1, 8)
    if trained:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
        for _ in range(25):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    greedy = model.generate(ids, **settings)
    assert len(calls) == 24
    calls.clear()
    assert torch.equal(model.generate(ids, use_mtp=True, **settings), greedy)
    if trained:
        assert torch.equal(greedy[0, 88:], ids[0, :24])
        assert len(calls) <= 14  # one reads the prompt, and each of the others gives two tokens


def test_drafting_with_an_attached_head_is_refused(tokens):
    with pytest.raises(ValueError, match="save the model, load it without `with_mtp_head`"):
        build_mtp_model().generate(tokens(1, 10), use_mtp=True, max_new_tokens=3)


@pytest.mark.parametrize("shards", ["50GB", "40KB"], ids=["one-file", "shards"])
def test_head_is_saved_and_loaded_on_request(shards, tokens, tmp_path):
    model = build_mtp_model()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shards == "40KB"
    assert json.loads((tmp_path / "config.json").read_text())["num_mtp_layers"] == 1
    ids = tokens(1, 30)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert plain.mtp is None and not any(name.startswith("mtp.") for name in plain.state_dict())
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert not AutoModel.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"]
    for load in (AutoModelForCausalLM.from_pretrained, MiniCPM4ForCausalLM.from_pretrained):
        loaded, report = load(tmp_path, with_mtp_head=True, output_loading_info=True)
        assert not report["missing_keys"]
        assert loaded.state_dict().keys() == model.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(loaded(ids, labels=ids).mtp_loss, model(ids, labels=ids).mtp_loss)
            assert torch.equal(plain(ids, labels=ids).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
def test_model_saved_without_its_head_does_not_claim_one(auto_class, tmp_path, caplog):
    build_mtp_model().save_pretrained(tmp_path / "with")
    assert not caplog.records
    plain = auto_class.from_pretrained(tmp_path / "with")
    logging.Logger.warning_once.cache_clear()
    plain.save_pretrained(tmp_path / "without")
    assert "saved without it" in caplog.text and "with_mtp_head=True" in caplog.text
    assert "num_mtp_layers" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert plain.config.num_mtp_layers == 1  # this model can go on drafting with the head in its own folder
    with pytest.raises(ValueError, match=r"has none.*`model.add_mtp_head_\(\)`"):
        MiniCPM4ForCausalLM.from_pretrained(tmp_path / "without", with_mtp_head=True)


REMOTE = """
import sys
sys.modules["minicpm4_hf"] = None  # importing the package fails
from transformers import AutoModelForCausalLM
folder, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, with_mtp_head=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
ids = model.config.eos_token_id - 1 - __import__("torch").arange(40)[None]
print(model(ids, labels=ids).mtp_loss.item())
model.save_pretrained(again)
plain = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
settings = {"attention_mask": ids.ne(0), "max_new_tokens": 5, "do_sample": False}
assert plain.generate(ids, use_mtp=True, **settings).equal(plain.generate(ids, **settings))
"""


def test_head_travels_with_the_remote_code(tmp_path):
    model = build_mtp_model(SMALL_SPARSE)
    model.save_pretrained(tmp_path / "model")
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", REMOTE, str(tmp_path / "model"), str(tmp_path / "again")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ids = 95 - torch.arange(40)[None]
    assert float(result.stdout) == pytest.approx(model(ids, labels=ids).mtp_loss.item(), rel=1e-5)


def test_new_head_is_the_models_own_kind():
    model = build_model(sparse=None, initializer_range=0.05, hidden_size=256).to(torch.bfloat16).train()
    assert model.add_mtp_head_() is model and model.config.num_mtp_layers == 1
    assert {p.dtype for p in model.mtp.parameters()} == {torch.bfloat16} and model.mtp.training
    weights = dict(model.mtp.named_parameters())
    assert all((weight == 1).all() for name, weight in weights.items() if "norm" in name)
    for name in ("eh_proj", "mtp_block.mlp.up_proj", "mtp_block.self_attn.q_proj"):
        assert weights[f"layers.0.{name}.weight"].float().std().item() == pytest.approx(0.05, rel=0.1)
    with pytest.raises(ValueError, match="has an MTP head already"):
        model.add_mtp_head_()


@pytest.mark.parametrize("unfit", ["past_key_values", "shift_labels", "attention_mask"])
def test_what_the_loss_cannot_take(unfit, tokens):
    model, ids = build_mtp_model(), tokens(1, 20)
    value = {
        "past_key_values": lambda: model(ids, use_cache=True).past_key_values,
        "shift_labels": lambda: F.pad(ids[:, 1:], (0, 1), value=-100),
        "attention_mask": lambda: torch.ones(1, 1, 20, 20, dtype=torch.bool).tril(),
    }[unfit]
    out = model(ids, labels=ids, **{unfit: value()})
    assert out.loss.isfinite() and out.mtp_loss is None  # evaluation goes on without this part
    with pytest.raises(ValueError, match=f"needs whole rows: .*`{unfit}`"):
        model.train()(ids, labels=ids, **{unfit: value()})


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"num_mtp_layers": 2}, "`num_mtp_layers` must be 1, or None for no MTP head, got 2."),
        ({"num_mtp_layers": 0}, "`num_mtp_layers` must be 1, or None for no MTP head, got 0."),
        ({"mtp_loss_weight": -0.1}, "`mtp_loss_weight` must be a number of at least 0, got -0.1."),
        ({"mtp_loss_weight": float("nan")}, "`mtp_loss_weight` must be a number of at least 0, got nan."),
    ],
)
def test_wrong_settings(wrong, sentence):
    with pytest.raises(ValueError) as error:
        MiniCPM4Config(**wrong)
    assert str(error.value) == sentence

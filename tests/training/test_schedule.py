"""WSD: factors against closed forms, the same across save, resume and branch, in a Trainer too, and wrong settings."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import Trainer, TrainingArguments

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM
from minicpm4_hf.training.mup import mup_parameter_groups
from minicpm4_hf.training.schedule import DECAY_TYPES, WSDSettings, build_scheduler, decay_branch, load_moments_

PEAKS = (0.5, 0.25)  # powers of two: products with a factor are exact


def new_optimizer(peaks=PEAKS):
    return torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(2))], "lr": peak} for peak in peaks])


def start(settings, num_training_steps, peaks=PEAKS):
    optimizer = new_optimizer(peaks)
    return optimizer, build_scheduler(optimizer, settings, num_training_steps)


def take_step(optimizer, scheduler):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()


def run(optimizer, scheduler, num_steps):
    """The factor that each of so many steps is taken with; the groups' rates keep their ratio."""
    factors = []
    for _ in range(num_steps):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[1] == rates[0] / 2
        factors.append(rates[0] / PEAKS[0])
        take_step(optimizer, scheduler)
    return factors


def closed_form(settings, num_training_steps, step):
    """The definition in the module's docstring, for one step."""
    warmup, decay, floor = settings.num_warmup_steps, settings.num_decay_steps, settings.floor_share
    if step < warmup:
        return floor + (1 - floor) * step / warmup
    if decay == 0 or step < num_training_steps - decay:
        return 1.0
    done = min(step, num_training_steps) - (num_training_steps - decay)
    if settings.half_life_steps:
        return 0.5 ** (done / settings.half_life_steps)
    share = done / decay
    if settings.decay_type == "exponential":
        return floor**share
    shape = {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "1-sqrt": 1 - math.sqrt(share)}
    return floor + (1 - floor) * shape[settings.decay_type]


@pytest.mark.parametrize(
    "settings",
    [
        *({"decay_type": name, "floor_share": 0.04} for name in DECAY_TYPES),
        *({"decay_type": name} for name in DECAY_TYPES if name != "exponential"),
        {"half_life_steps": 2.5},
        {"half_life_steps": 2, "num_warmup_steps": 0},
        {"num_decay_steps": 0, "floor_share": 0.1},
        {"num_decay_steps": 0, "decay_type": "linear", "floor_share": 0.1},
        {"num_decay_steps": 15, "floor_share": 0.5},  # nothing stable
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_factors(settings):
    settings = WSDSettings(**{"num_warmup_steps": 5, "num_decay_steps": 8, **settings})
    factors = run(*start(settings, 20), 24)
    assert factors == pytest.approx([closed_form(settings, 20, step) for step in range(24)], abs=1e-12)


def test_numbers_by_hand():
    """A half-life of 10 steps, from step 100 of 130; the published decay from 7.5e-3 to 3e-4."""
    _, scheduler = start(WSDSettings(num_warmup_steps=10, num_decay_steps=30, half_life_steps=10), 130)
    factor = scheduler.lr_lambdas[0]
    expected = {0: 0, 5: 0.5, 10: 1, 99: 1, 100: 1, 110: 0.5, 120: 0.25, 130: 0.125, 1000: 0.125}
    assert {step: factor(step) for step in expected} == expected
    _, scheduler = start(WSDSettings(num_warmup_steps=0, num_decay_steps=100, floor_share=0.04), 100)
    assert [7.5e-3 * scheduler.lr_lambdas[0](step) for step in (0, 50, 100)] == pytest.approx([7.5e-3, 1.5e-3, 3e-4])


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
def test_resuming_changes_nothing(decay_type, tmp_path):
    settings = WSDSettings(num_warmup_steps=4, num_decay_steps=6, decay_type=decay_type, floor_share=0.1)
    whole = run(*start(settings, 16), 16)
    for stop in (0, 2, 4, 7, 10, 13, 16):
        optimizer, scheduler = start(settings, 16)
        first = run(optimizer, scheduler, stop)
        torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        optimizer, scheduler = start(settings, 16)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        assert first + run(optimizer, scheduler, 16 - stop) == whole


def stable_checkpoint(settings, step, num_training_steps=None):
    """State of a run of `settings` after `step` steps, which by default are all of it."""
    optimizer, scheduler = start(settings, num_training_steps or step)
    run(optimizer, scheduler, step)
    return {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}


def go_on(state, settings, num_training_steps):
    optimizer, scheduler = start(settings, num_training_steps)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return run(optimizer, scheduler, num_training_steps - state["scheduler"]["last_epoch"])


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
@pytest.mark.parametrize("num_decay_steps", [1, 5, 12])
def test_branches_of_a_stable_checkpoint(decay_type, num_decay_steps):
    """The checkpoint is the last of its run, of which another schedule would have brought the rate to the floor."""
    stable = WSDSettings(num_warmup_steps=3, decay_type=decay_type, floor_share=0.1)
    state = stable_checkpoint(stable, 9)
    assert go_on(state, stable, 30) == [1.0] * 21

    branch, total = decay_branch(stable, scheduler_state=state["scheduler"], num_decay_steps=num_decay_steps)
    assert total == 9 + num_decay_steps
    factors = go_on(state, branch, total)
    assert factors == run(*start(branch, total), total)[9:]  # as a run that was to decay from the beginning
    assert factors[0] == 1.0 and all(a > b for a, b in pairwise(factors))
    assert stable.num_decay_steps == 0


def test_a_branch_of_a_longer_run_with_a_decay_of_its_own():
    settings = WSDSettings(num_warmup_steps=3, num_decay_steps=10, half_life_steps=2)
    state = stable_checkpoint(settings, 8, num_training_steps=40)
    branch, total = decay_branch(settings, scheduler_state=state["scheduler"], num_decay_steps=4)
    assert go_on(state, branch, total) == [0.5 ** (step / 2) for step in range(4)]


@pytest.mark.parametrize("step", [0, 2, 35])
def test_no_branch_from_elsewhere(step):
    settings = WSDSettings(num_warmup_steps=3, num_decay_steps=10, floor_share=0.1)
    state = stable_checkpoint(settings, step, num_training_steps=40)
    with pytest.raises(ValueError, match=f"must begin at a checkpoint of the stable phase, and at step {step} "):
        decay_branch(settings, scheduler_state=state["scheduler"], num_decay_steps=4)


def test_a_branch_without_an_end_is_refused():
    stable = WSDSettings(num_warmup_steps=0)
    state = stable_checkpoint(stable, 4)
    with pytest.raises(ValueError, match="does not reach 0: give `floor_share`"):
        decay_branch(stable, scheduler_state=state["scheduler"], num_decay_steps=4)
    with pytest.raises(ValueError, match=r"must be the `state_dict\(\)` of what .* lacks '_last_lr'"):
        decay_branch(stable, scheduler_state={"state": {}}, num_decay_steps=4)
    with pytest.raises(ValueError, match="`num_decay_steps` must be an integer of at least 1, got 0"):
        decay_branch(stable, scheduler_state=state["scheduler"], num_decay_steps=0)


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_warming_up_again(scheduler_first):
    """A second stage with another peak, weight decay and the first one's moments rises from where a decay ended."""
    settings = WSDSettings(num_warmup_steps=2, num_decay_steps=4, floor_share=0.25)
    first, scheduler = start(settings, 8)
    run(first, scheduler, 8)
    assert first.param_groups[0]["lr"] == pytest.approx(0.25 * PEAKS[0])

    second = new_optimizer()
    for group in second.param_groups:
        group.update(lr=group["lr"] / 2, weight_decay=0.03, name="mine")
    if scheduler_first:
        scheduler = build_scheduler(second, settings, 8)
    load_moments_(second, first.state_dict())
    if not scheduler_first:
        scheduler = build_scheduler(second, settings, 8)
    for old, new in zip(first.param_groups, second.param_groups):
        assert new["weight_decay"] == 0.03 and new["name"] == "mine"
        for a, b in zip(old["params"], new["params"]):
            assert a is not b and torch.equal(first.state[a]["exp_avg_sq"], second.state[b]["exp_avg_sq"])
    again = [factor * 2 for factor in run(second, scheduler, 8)]
    assert again == run(*start(settings, 8), 8)


def test_moments_of_another_model_are_refused():
    with pytest.raises(ValueError):
        load_moments_(new_optimizer(), new_optimizer(PEAKS[:1]).state_dict())


def test_in_a_trainer(tmp_path):
    """Groups of muP under a Trainer: a stable run, then a branch that decays from its checkpoint."""

    def trainer(settings, num_training_steps):
        torch.manual_seed(0)
        model = MiniCPM4ForCausalLM(
            MiniCPM4Config(
                vocab_size=32,
                hidden_size=512,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=4,
                max_position_embeddings=16,
                eos_token_id=2,
            )
        )
        groups = mup_parameter_groups(model, learning_rate=0.01, weight_decay=0.1)
        optimizer = torch.optim.AdamW(groups)
        arguments = TrainingArguments(
            tmp_path / "run",
            max_steps=num_training_steps,
            per_device_train_batch_size=1,
            save_strategy="steps",
            save_steps=4,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
        scheduler = build_scheduler(optimizer, settings, num_training_steps)
        return Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler))

    stable = WSDSettings(num_warmup_steps=2, floor_share=0.25)
    trainer(stable, 4).train()
    folder = tmp_path / "run" / "checkpoint-4"
    state = torch.load(folder / "scheduler.pt", weights_only=True)
    branch, total = decay_branch(stable, scheduler_state=state, num_decay_steps=2)
    decaying = trainer(branch, total)
    decaying.train(resume_from_checkpoint=str(folder))
    rates = {line["step"]: line["learning_rate"] for line in decaying.state.log_history if "learning_rate" in line}
    assert decaying.state.global_step == 6
    assert rates == {step + 1: pytest.approx(0.01 * factor) for step, factor in enumerate((0.25, 0.625, 1, 1, 1, 0.5))}
    assert [group["name"] for group in decaying.optimizer.param_groups] == ["embedding", "vector", "matrix"]
    assert [group["lr"] for group in decaying.optimizer.param_groups] == pytest.approx([0.0025, 0.0025, 0.00125])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_warmup_steps": -1}, "`num_warmup_steps` must be an integer of at least 0, got -1."),
        ({"num_warmup_steps": 1.5}, "`num_warmup_steps` must be an integer of at least 0, got 1.5."),
        ({"num_decay_steps": True}, "`num_decay_steps` must be an integer of at least 0, got True."),
        ({"decay_type": "sqrt"}, "`decay_type` must be one of exponential, linear, cosine, 1-sqrt, got 'sqrt'."),
        ({"floor_share": 1.0}, "`floor_share` must be at least 0 and less than 1, got 1.0."),
        ({"floor_share": math.nan}, "`floor_share` must be at least 0 and less than 1, got nan."),
        ({"half_life_steps": 3.0}, "takes the place of `floor_share`"),
        ({"half_life_steps": 3.0, "decay_type": "linear", "floor_share": 0.0}, "is for an exponential decay"),
        ({"half_life_steps": 0.0, "floor_share": 0.0}, "`half_life_steps` must be a number greater than 0, got 0.0."),
        ({"floor_share": 0.0}, "does not reach 0: give `floor_share`"),
    ],
)
def test_wrong_settings(settings, sentence):
    with pytest.raises(ValueError) as error:
        WSDSettings(**{"num_warmup_steps": 1, "num_decay_steps": 1, "floor_share": 0.1, **settings})
    assert sentence in str(error.value)


def test_too_few_training_steps():
    settings = WSDSettings(num_warmup_steps=5, num_decay_steps=6, floor_share=0.1)
    with pytest.raises(ValueError, match="at least the 5 steps of warm-up and the 6 of decay together, got 10"):
        start(settings, 10)
    start(settings, 11)
    with pytest.raises(ValueError, match="`num_training_steps` must be an integer of at least 1, got 0"):
        start(WSDSettings(num_warmup_steps=0), 0)

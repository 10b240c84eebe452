"""`fastpeft.plan` on a small configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LEDConfig, LlamaConfig, ViTConfig

import fastpeft
from fastpeft.errors import UserError
from fastpeft.memory.plan.choosing import CONTEXT, KEEP, OFFLOAD, RECOMPUTE, RESERVE, STEPS, TILE, Need, need, tiled
from fastpeft.memory.plan.largest import EXTREMES, largest, largest_of, most_of
from fastpeft.memory.plan.planning import Plan, model_of, plan_on
from fastpeft.memory.plan.predicting import Model
from fastpeft.memory.plan.timing import Rates
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of(CONFIG, 64, 1, 4, "lora", "all-linear", "bfloat16", "adamw_torch", "auto")[1]


def on(model: Model, capacity: int, policy: MemoryPolicy | None = None) -> Plan:
    return plan_on("llama", model, capacity, None, policy, False, Rates())


@pytest.fixture(scope="module")
def roomy(model: Model) -> Plan:
    return on(model, 2 << 30)


def test_static_bytes_are_exact(roomy: Plan) -> None:
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128
    dense = 2 * 512 * 64 + 6 * (layer + 2 * 64) + 64
    ranks = 6 * 4 * (7 * 64 + 2 * 64 + 2 * 32 + 3 * 128)
    assert abs(roomy.bytes["base, dense"] - 2 * dense) <= 512 * 6 * 9  # whole blocks of the allocator
    assert abs(roomy.bytes["adapters"] - 4 * ranks) <= 512 * 6 * 14
    assert roomy.bytes["optimizer"] == 2 * roomy.bytes["adapters"]


def test_what_fits_is_kept(roomy: Plan) -> None:
    assert roomy.fits and set(roomy.policy.of(6)) == {LayerPolicy()} and roomy.need.slowdown == 1.0
    assert str(roomy).endswith("it fits") and not roomy.changes


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_what_does_not_fit_is_computed_again_where_that_takes_least(model: Model, roomy: Plan, share: float) -> None:
    least = on(model, 2 << 30, MemoryPolicy(LayerPolicy("recompute")))
    assert least.need.total < roomy.need.total
    used = roomy.need.total - int(share * (roomy.need.total - least.need.total)) - int(RESERVE * (2 << 30))
    tight = on(model, int(used / (1 - RESERVE)))
    mixes = [
        MemoryPolicy((first,) * some + (others,) * (6 - some)) for first, others in STEPS[0] for some in range(1, 7)
    ]
    tried = [need(model, each, 1, 64, tight.gpu_memory, Rates()) for each in mixes]
    assert tight.fits and tight.need.slowdown == min(each.slowdown for each in tried if each.total <= tight.gpu_memory)
    assert 1.0 < tight.need.slowdown < 1.6


def test_little_is_saved_by_selective_layers(model: Model, roomy: Plan) -> None:
    used = roomy.need.total - int(RESERVE * (2 << 30)) - 1024
    tight = on(model, int(used / (1 - RESERVE)))
    assert [layer.activations for layer in tight.policy.of(6)] == ["selective"] + ["keep"] * 5


LONG = 4 * TILE


def needed(model: Model, policy: MemoryPolicy, capacity: int = 0) -> Need:
    return need(model, policy, 1, LONG, capacity, Rates())


@pytest.fixture(scope="module")
def wide() -> Model:
    """Most of a layer's working memory is its MLP's."""
    given = LlamaConfig(**CONFIG.to_dict() | {"intermediate_size": 512, "max_position_embeddings": LONG})
    return model_of(given, LONG, 1, 4, "lora", "all-linear", "bfloat16", "adamw_torch", "auto")[1]


@pytest.mark.parametrize("share", [0.5, *(pytest.param(share, marks=pytest.mark.full) for share in (0.0, 1.0))])
def test_tiles_where_nothing_else_fits_on_the_gpu(wide: Model, share: float) -> None:
    """With all inputs on the host, down to none of them: the cheapest mix of layers, all in tiles, none streamed."""
    high, low = (needed(wide, MemoryPolicy(each)).total for each in (OFFLOAD, tiled(OFFLOAD)))
    assert low < high
    tight = on(wide, int((high - 1 - share * (high - 1 - low)) / (1 - RESERVE)))
    policies = set(tight.policy.of(6))
    assert tight.fits and all(each.tile == TILE and not each.streamed for each in policies)
    some = [(first, others) for step in STEPS for first, others in step if first.tile and not first.streamed]
    mixes = [MemoryPolicy((first,) * n + (others,) * (6 - n)) for first, others in some for n in range(7)]
    tried = [needed(wide, each, tight.gpu_memory) for each in mixes]
    assert tight.need.slowdown == min(each.slowdown for each in tried if each.total <= tight.gpu_memory)
    assert "MLPs in tiles of 4096 tokens" in str(tight) and "equal to rounding, not to the bit" in str(tight)


def test_what_rounds_alike_comes_first_and_streamed_weights_last(wide: Model) -> None:
    enough, least = (needed(wide, MemoryPolicy(each)).total for each in (OFFLOAD, tiled(OFFLOAD)))
    untiled = on(wide, int(enough / (1 - RESERVE)) + 1)
    assert untiled.fits and not any(each.tile or each.streamed for each in untiled.policy.of(6))
    assert "tiles" not in str(untiled)
    less = on(wide, int((least - 4096) / (1 - RESERVE)))
    assert less.fits and any(each.streamed for each in less.policy.of(6))


def test_tiles_take_the_time_that_was_measured(wide: Model) -> None:
    """1 % of an MLP's at 4096 tokens, 8 at 1024; a tile that holds all tokens is nothing to choose."""
    whole, at_4096, at_1024 = (
        needed(wide, MemoryPolicy(LayerPolicy("recompute", tile=tile))).slowdown for tile in (0, 4096, 1024)
    )
    assert whole < at_4096 < 1.01 * whole and (at_1024 - whole) / (at_4096 - whole) == pytest.approx(8)
    small = plan_on("llama", wide, 1 << 29, None, None, False, Rates())
    assert not small.fits and needed(wide, small.policy).total <= needed(wide, MemoryPolicy(EXTREMES[0])).total


def test_the_longest_context_of_all_is_in_tiles(wide: Model) -> None:
    capacity = int(needed(wide, MemoryPolicy(EXTREMES[0])).total / (1 - RESERVE))
    tokens, rows = most_of(wide, capacity, None)
    assert tokens == LONG and rows > 1  # as many as it has positions for
    assert largest_of(wide, EXTREMES[:1], capacity, None)[1] < rows


@pytest.mark.full
@pytest.mark.parametrize("policies", [(RECOMPUTE,), EXTREMES[:1]])
def test_the_longest_context(model: Model, policies: tuple[LayerPolicy, ...]) -> None:
    """Fits, and more does not; with the host's memory as a limit too."""
    whole = MemoryPolicy(policies[0])

    def at(tokens: int) -> Need:
        return need(model, whole, 1, tokens, capacity, Rates())

    capacity = CONTEXT + (20 << 20)
    longest, rows = largest_of(model, policies, capacity, None)
    assert longest % 64 == 0 and 64 < longest < 2048 and rows == longest // 64
    assert at(longest).total <= capacity < at(longest + 128).total
    if policies == EXTREMES[:1]:
        half = at(longest // 2).host
        assert largest_of(model, (policies[0],), capacity, half)[0] <= longest // 2 + 64


def test_the_most_rows_of_a_model_whose_positions_end_first(model: Model) -> None:
    """They are not told from the two short rows that the search for the longest one ended at."""

    def wide(rows: int) -> int:
        return need(model, MemoryPolicy(RECOMPUTE), rows, 64, capacity, Rates()).total

    capacity = CONTEXT + (400 << 20)
    longest, rows = largest_of(model, (RECOMPUTE,), capacity, None)
    assert longest == 2048
    assert wide(rows) <= capacity < wide(rows + rows // 50 + 1)


def test_parts_add_up(model: Model) -> None:
    """Whatever is streamed, and offloaded."""
    for policy in (LayerPolicy(), LayerPolicy("recompute", streamed=True), LayerPolicy("offload")):
        found = on(model, 2 << 30, MemoryPolicy(policy)).bytes
        parts = [size for name, size in found.items() if name not in ("total", "host") and "of it" not in name]
        assert sum(parts) == found["total"] and min(parts) >= 0


def test_working_memory_by_purpose() -> None:
    """Of heads that are wide beside all else attention's: sums of q's gradient in fp32, those of k and v by query head.
    Of many words the loss's; of large weights the one that is decoded last. And what each layer keeps."""
    wide = {"hidden_size": 32, "intermediate_size": 16, "head_dim": 128, "vocab_size": 16}
    wordy = {"vocab_size": 4096, "num_hidden_layers": 2}

    def found(changes: dict[str, Any], method: Any, layer: LayerPolicy) -> tuple[Plan, dict[str, int]]:
        config, policy = LlamaConfig(**CONFIG.to_dict() | changes), MemoryPolicy(layer)
        plan = fastpeft.plan(config, gpu_memory="2GiB", seq=2048, method=method, policy=policy, largest=False)
        return plan, {name[7:]: size for name, size in plan.bytes.items() if name.startswith("of it, ")}

    plan, purposes = found(wide, "lora", RECOMPUTE)
    assert (
        purposes["attention"] == 2048 * 2 * 128 * (4 + 2 + 2) and purposes["decoded weights"] == purposes["loss"] == 0
    )
    assert plan.to_dict()["saved"] == [2048 * 32 * 2] * 6
    plan, purposes = found(wordy, "qlora", LayerPolicy())
    assert purposes["loss"] == plan.bytes["working memory"] > 0 == purposes["attention"]
    large = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 16}
    plan, purposes = found(large, "qlora", RECOMPUTE)
    assert purposes["decoded weights"] in (512 * 2048 * 2, 2 * 512 * 2048 * 2) and purposes["loss"] == 0


def test_a_straight_line_is_followed_to_where_it_ends() -> None:
    asked = []

    def total(tokens: int) -> int:
        asked.append(tokens)
        return 1000 + 10 * tokens

    assert largest(total, 100, 3000, 1, most=150) == 200 and max(asked) <= 150
    assert largest(total, 100, 999, 1) == 0
    assert largest(lambda tokens: 7 * max(tokens, 500), 100, 7000, 1) == 1000


def test_streamed_layers_say_from_where_copies_hide(model: Model) -> None:
    streamed = on(model, 2 << 30, MemoryPolicy(LayerPolicy("recompute", streamed=True)))
    assert streamed.need.hidden_from is not None and streamed.need.hidden_from > 64
    assert "copies of streamed weights do not hide behind computing: 64 tokens a step" in str(streamed)


def test_too_little(model: Model) -> None:
    small = on(model, 256 << 20)
    assert not small.fits and small.changes and "it does not fit" in str(small)
    found = json.loads(json.dumps(small.to_dict()))
    assert found["schema"] == 1 and found["fits"] is False and len(found["policy"]) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu_memory": "24G"}, "gpu_memory: expected a size"),
        ({"host_memory": "much"}, "host_memory: expected a size"),
        ({"seq": 0}, "seq: expected 1 to"),
        ({"batch": -1}, "batch: expected 1 to"),
        ({"accumulation": 0}, "accumulation: expected 1 to"),
        ({"method": "magic"}, "method: expected one of"),
        ({"optimizer": "adam"}, "optimizer: expected one of"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"task": "chess"}, "task: expected one of"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fastpeft.plan(CONFIG, **({"gpu_memory": "2GiB", "seq": 64} | options))


def test_beyond_the_last_position(roomy: Plan) -> None:
    """A note where positions go on, which the longest contexts then do, too; an error where they are a table."""
    short = LlamaConfig(**CONFIG.to_dict() | {"max_position_embeddings": 64, "num_hidden_layers": 1})
    note = "beyond the model's last position, 64: extend its rope first"
    options: dict[str, Any] = {"gpu_memory": "2GiB", "method": "lora", "rank": 4}
    past = fastpeft.plan(short, seq=65, **options)
    assert "beyond" not in str(roomy)
    assert past.fits and past.notes[1] == note and f"note: {note}" in str(past)
    assert past.largest_sequence is not None and past.largest_sequence > 1000
    assert past.most_sequence is not None and past.most_sequence >= past.largest_sequence
    learned = GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=2, vocab_size=64)
    said = "seq: expected at most 64, the model's last position, got 65"
    with pytest.raises(UserError, match=said):
        fastpeft.plan(learned, seq=65, **options)
    loaded = get_peft_model(AutoModelForCausalLM.from_config(learned), LoraConfig())
    with pytest.raises(UserError, match=said):
        fastpeft.plan(loaded, seq=65, gpu_memory="2GiB")


def test_without_accumulation_gradients_come_with_backward(model: Model) -> None:
    """Where layers keep all, the most is there before any gradient is; the optimizer then needs all of them."""
    alone = Model(replace(model.setting, accumulated=False))
    kept, once = (on(each, 2 << 30, MemoryPolicy(KEEP)) for each in (model, alone))
    adapters = kept.bytes["adapters"]
    assert kept.bytes["gradients"] == adapters and once.bytes["gradients"] < adapters / 2
    assert once.need.total + adapters * 3 // 4 < kept.need.total <= once.need.total + adapters
    assert "accumulation 1" in str(once) and "accumulation" not in str(kept)
    few = Model(replace(alone.setting, tokens=1, optimizer="adamw_torch"))
    found = on(few, 2 << 30, MemoryPolicy(RECOMPUTE))
    assert found.need.when == "optimizer" and found.bytes["gradients"] == found.bytes["working memory"] == adapters
    for each in (once, found):
        parts = [size for name, size in each.bytes.items() if name not in ("total", "host") and "of it" not in name]
        assert sum(parts) == each.bytes["total"] and min(parts) >= 0


def test_a_policy_for_another_number_of_layers(model: Model) -> None:
    with pytest.raises(ValueError, match="layers: expected 6 policies"):
        on(model, 2 << 30, MemoryPolicy((LayerPolicy(),) * 5))


def test_packed_weights_that_have_no_adapter_are_followed() -> None:
    """PEFT's default for Llama adapts q and v; the others' products are bitsandbytes' own."""
    some = fastpeft.plan(CONFIG, gpu_memory="2GiB", seq=64, targets=["q_proj", "v_proj"], largest=False)
    every = fastpeft.plan(CONFIG, gpu_memory="2GiB", seq=64, largest=False)
    assert some.fits and some.bytes["adapters"] < every.bytes["adapters"]
    assert some.bytes["base, packed"] == every.bytes["base, packed"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ViTConfig(), "MODEL: AutoModelForSequenceClassification makes none of ViTConfig, and plans are for models of"),
        (
            LEDConfig(
                vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
                encoder_attention_heads=2, decoder_attention_heads=2, attention_window=4,
            ),
            "MODEL: its step cannot be followed without values, so no plan is made: NotImplementedError",
        ),
    ],
    ids=["pictures", "shapes that depend on values"],
)  # fmt: skip
def test_models_that_cannot_be_planned(config: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        fastpeft.plan(config, gpu_memory="1GiB", seq=16, largest=False)

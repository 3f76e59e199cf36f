"""Parameters, parts and phases of a plan, against real models and against what is known of every strategy."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measured import CASES, config_of
from transformers.modeling_layers import GradientCheckpointingLayer

from observe_r1.loading import LoraOptions, PolicyOptions, load_policy, load_reference
from observe_r1.planning import memory
from observe_r1.planning.devices import DEVICES, find_device
from observe_r1.planning.live_memory import LiveMemory
from observe_r1.planning.memory import MASTER, REFERENCE, MemoryPlan, Phase
from observe_r1.planning.model_shapes import PUBLISHED, config_directory
from observe_r1.planning.options import PlanOptions
from observe_r1.planning.plan import Plan, make_plan
from observe_r1.planning.prompts import planned_prompt
from observe_r1.planning.rehearsal import GRADIENTS, OPTIMIZER, WEIGHTS, Counts, Rehearsal, count
from observe_r1.planning.setup import Setup, Spread
from observe_r1.rollout import HFRollout, SamplingOptions, VLLMLocalRollout, VLLMServerRollout

H100 = find_device("h100")
ADAM = partial(torch.optim.AdamW, lr=1e-6)
SMALL = dataclasses.replace(
    CASES["tiny"].setup, sampling=SamplingOptions(2, max_new_tokens=16), prompts_per_rollout=2, optimizer=ADAM
)
MIXED: dict[str, Any] = {"compute_dtype": torch.bfloat16, "precision": "bf16-mixed"}
HALF: dict[str, Any] = {**MIXED, "dtype": torch.bfloat16, "precision": "bf16-true"}


def small_plan(options: PlanOptions | None = None, **changes: Any) -> Plan:
    setup = dataclasses.replace(SMALL, **changes)
    return make_plan(setup, H100, options or PlanOptions(text_tokens=32, image_pixels=56**2))


@pytest.mark.parametrize(
    "options",
    [
        PolicyOptions("quickstart"),
        PolicyOptions("quickstart", freeze=["*visual*", "*embed_tokens*"]),
        PolicyOptions("quickstart", lora=LoraOptions(8, 16, ["all-linear"])),
    ],
    ids=["all", "frozen parts", "adapters"],
)
def test_parameters_are_those_of_the_real_model(options: PolicyOptions) -> None:
    planned = Rehearsal(dataclasses.replace(SMALL, policy=options), on_gpu=True)
    real = load_policy(options)
    assert planned.counts == count(real)
    assert planned.counts.total == sum(parameter.numel() for parameter in real.parameters())
    bytes_of_weights = sum(parameter.numel() * 4 for parameter in real.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in real.model.buffers())
    assert planned.memory.live[WEIGHTS] == bytes_of_weights + buffers


@pytest.mark.parametrize(
    ("name", "parameters", "apart"), [("3B", 3_754_622_976, 0), ("7B", 8_292_166_656, 2 * 152_064 * 3584)]
)
def test_published_shapes_have_the_published_number_of_parameters(
    name: str, parameters: int, apart: int, tmp_path: Any
) -> None:
    """And an embedding and an output layer where both are one, and where they are two."""
    (hub_name,) = (known for known in PUBLISHED if f"-{name}-" in known)
    directory = config_directory(hub_name, tmp_path)
    counts = count(load_policy(PolicyOptions(directory), torch.bfloat16, empty=True))
    assert (counts.total, counts.vocabulary, counts.trained_vocabulary) == (parameters, apart, apart)


def test_a_config_that_is_nowhere_gets_a_remedy(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"nobody/nothing.*config\.json alone.*Qwen/Qwen2\.5-VL-3B-Instruct"):
        config_directory("nobody/nothing", tmp_path)


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=8), kept=st.integers(0, 7))
def test_live_memory_is_what_tensors_have(sizes: list[int], kept: int) -> None:
    """Products, views, copies and freeing, against the sizes by hand; and nothing is left at the end."""
    live = LiveMemory()
    with live:
        tensors = [live.empty(size, 8, dtype=torch.bfloat16) for size in sizes]
        views = [tensor[1:].T for tensor in tensors]
        assert sum(live.live.values()) == 16 * sum(sizes)
        wide = tensors[0].float()
        assert sum(live.live.values()) == 16 * sum(sizes) + 32 * sizes[0]
        with live.part("product"):
            product = wide @ wide.T
        assert live.live["product"] == 4 * sizes[0] ** 2
        survivor = tensors[kept % len(tensors)]
        expected = survivor.numel() * 2
        del tensors, views, wide, product
        assert sum(live.live.values()) == expected
        del survivor
    assert sum(live.live.values()) == 0
    assert sum(live.at_peak.values()) == 16 * sum(sizes) + 32 * sizes[0] + 4 * sizes[0] ** 2


# ---- strategies ------------------------------------------------------------------------------------------------------

COUNTS = st.builds(
    lambda blocks, block, rest, share: Counts(
        blocks * block + rest, int(share * (blocks * block + rest)), block, rest, int(share * rest), int(share * block)
    ),
    st.integers(1, 80),
    st.integers(1, 10**9),
    st.integers(0, 10**9),
    st.floats(0.01, 1.0),
)


def held(counts: Counts, spread: Spread, **changes: Any) -> tuple[dict[str, int], int]:
    setup = dataclasses.replace(SMALL, spread=spread, **changes)
    shared = spread.kind not in ("single", "ddp")
    adam = 8 * -(-counts.trained // (spread.parts if shared else 1))
    return memory._resident(setup, counts, adam)


@given(counts=COUNTS, kind=st.sampled_from(["fsdp2", "zero3"]), reference=st.booleans())
def test_more_ranks_never_need_more(counts: Counts, kind: Any, reference: bool) -> None:
    totals = []
    for ranks in (1, 2, 4, 8, 16):
        setup = {"spread": Spread(kind, ranks), "has_reference": reference, **MIXED}
        parts, _ = held(counts, **setup)  # type: ignore[arg-type]
        gathered = memory._gathered_in_backward(dataclasses.replace(SMALL, **setup), counts)
        totals.append(sum(parts.values()) + sum(gathered.values()))
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_bytes_for_a_parameter_are_those_of_the_literature(ranks: int) -> None:
    """ZeRO (https://arxiv.org/abs/1910.02054), figure 1: 16, 4 + 12 / n, 2 + 14 / n and 16 / n with Adam."""
    size = 64 * 10**8
    counts = Counts(size, size, 10**8, 10**8, 10**8, 10**8)

    def bytes_of(kind: Any, **changes: Any) -> float:
        spread = Spread(kind.removesuffix(" twice"), ranks, copies_gradients="twice" in kind)  # type: ignore[arg-type]
        return sum(held(counts, spread, **{"has_reference": False, **changes})[0].values()) / size

    assert bytes_of("single", **MIXED) == 16
    assert bytes_of("ddp", **MIXED) == 16
    assert bytes_of("ddp twice", **MIXED) == 20  # with buckets of its own
    assert bytes_of("fsdp2", **MIXED) == pytest.approx(16 / ranks)
    assert bytes_of("zero1", **HALF) == pytest.approx(4 + 12 / ranks)
    assert bytes_of("zero2", **HALF) == pytest.approx(2 + 14 / ranks)
    assert bytes_of("zero3", **HALF) == pytest.approx(16 / ranks)
    reference = {**HALF, "has_reference": True}
    assert bytes_of("zero2", **reference) == pytest.approx(4 + 14 / ranks)
    assert bytes_of("zero3", **reference) == pytest.approx(18 / ranks)


def test_offload_moves_parts_to_the_host() -> None:
    counts = Counts(10**9, 10**9, 10**8, 10**8, 10**8, 10**8)
    near, none = held(counts, Spread("zero3", 8), **HALF)
    far, host = held(counts, Spread("zero3", 8, offload_optimizer=True, offload_parameters=True), **HALF)
    assert none == 0
    assert sum(far.values()) == 0
    assert host == sum(near.values())
    optimizer_only, _ = held(counts, Spread("zero2", 8, offload_optimizer=True), **HALF)
    assert {name for name, size in optimizer_only.items() if size} == {WEIGHTS, REFERENCE}


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_an_offloaded_reference_is_on_the_device_for_its_passes_alone(kind: Any) -> None:
    counts, setup = Counts(10**9, 10**9, 10**8, 10**8, 10**8, 10**8), {**HALF, "has_reference": True}
    near, none = held(counts, Spread(kind, 2), **setup)
    for choice, fetched in (("model", 2 * 10**9), ("blocks", 4 * 10**8)):
        far, host = held(counts, Spread(kind, 2), **setup, reference_offload=choice)
        assert (none, host, sum(near.values()) - sum(far.values())) == (0, 2 * 10**9, 2 * 10**9)
        passes = memory._fetched_reference(dataclasses.replace(SMALL, **setup, reference_offload=choice), counts)
        assert passes == {REFERENCE: fetched}


def test_a_reference_model_has_the_bytes_of_a_real_one() -> None:
    """Autocast leaves embeddings and norms in float32; DeepSpeed, which has none, leaves nothing."""
    counts = count(load_policy(SMALL.policy))
    for kind, real in (
        ("ddp", load_reference(SMALL.policy, autocast_dtype=torch.bfloat16)),
        ("zero2", load_reference(SMALL.policy, torch.bfloat16)),
    ):
        taken = [(p, p.numel() * p.element_size()) for p in real.parameters()]
        planned, _ = held(counts, Spread(kind, 2), has_reference=True, **MIXED)
        assert planned[REFERENCE] == sum(size for _, size in taken)
        setup = dataclasses.replace(SMALL, spread=Spread(kind, 2), reference_offload="blocks", **MIXED)
        blocks = [{id(p) for p in b.parameters()} for b in real.modules() if isinstance(b, GradientCheckpointingLayer)]
        outside = sum(size for p, size in taken if not any(id(p) in block for block in blocks))
        largest = max(sum(size for p, size in taken if id(p) in block) for block in blocks)
        assert memory._fetched_reference(setup, counts) == {REFERENCE: outside + largest}


def test_weights_in_four_bits_take_what_bitsandbytes_makes_of_them() -> None:
    pytest.importorskip("bitsandbytes")
    options = PolicyOptions("quickstart", lora=LoraOptions(8, 16, ["all-linear"]), quantization="nf4")
    taken = 0
    for parameter in load_policy(options).parameters():
        taken += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            taken += state.absmax.numel() + 4 * state.state2.absmax.numel()
    planned, _ = held(count(load_policy(options, empty=True)), Spread(), policy=options)
    assert planned[WEIGHTS] == pytest.approx(taken, rel=1e-3)


# ---- whole plans -----------------------------------------------------------------------------------------------------


def of(plan: Plan, name: str) -> Phase:
    return next(phase for phase in plan.memory.phases if phase.name == name)


def test_parts_add_up_and_what_is_resident_is_in_every_phase() -> None:
    plan = small_plan()
    total = plan.memory.counts.total
    for phase in plan.memory.phases:
        assert phase.total == sum(phase.parts.values())
        assert phase.parts[WEIGHTS] == phase.parts[GRADIENTS] == phase.parts[REFERENCE] == 4 * total
        assert phase.parts[OPTIMIZER] == 8 * total
    assert [phase.name for phase in plan.memory.phases] == [
        "sampling",
        "reference log-probs",
        "forward and backward",
        "optimizer step",
    ]
    assert plan.memory.peak.total == max(phase.total for phase in plan.memory.phases)
    written = plan.as_json()
    assert written["peak_bytes"] == plan.memory.peak.total
    assert written["fits"] is True
    assert written["seconds"]["rollout"] == pytest.approx(sum(written["seconds"]["phases"].values()))


def test_the_optimizer_is_the_configured_one() -> None:
    plain = small_plan(optimizer=partial(torch.optim.SGD, lr=0.1))
    momentum = small_plan(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    total = plain.memory.counts.total
    assert OPTIMIZER not in of(plain, "sampling").parts
    assert of(momentum, "sampling").parts[OPTIMIZER] == 4 * total
    zero = small_plan(spread=Spread("zero2", 2), **HALF)
    assert of(zero, "sampling").parts[MASTER] == of(zero, "sampling").parts[OPTIMIZER] / 2 == -(-total // 2) * 4


def test_what_takes_less_memory_takes_less_here() -> None:
    """Checkpointing, smaller micro-batches, shorter completions, shared prompts, a frozen tower, adapters."""

    def training(options: PlanOptions, **changes: Any) -> int:
        rehearsal = Rehearsal(dataclasses.replace(SMALL, **changes), on_gpu=True)
        config = rehearsal.policy.model.config
        prompt = planned_prompt(config, options, SMALL.prompt, (28**2, 448**2), rehearsal.memory.empty)
        _, parts = rehearsal.training(prompt, options.completion_tokens or 16)
        return sum(parts.values())

    options = PlanOptions(text_tokens=32, image_pixels=112**2)
    policy, plain = SMALL.policy, training(options)
    assert training(options, policy=dataclasses.replace(policy, gradient_checkpointing=True)) < plain
    assert training(options, micro_batches=2) < plain
    assert training(dataclasses.replace(options, completion_tokens=8)) < plain
    assert training(options, policy=dataclasses.replace(policy, forward="padded")) > plain
    assert training(options, policy=dataclasses.replace(policy, freeze=["*visual*"])) < plain
    assert training(options, policy=dataclasses.replace(policy, lora=LoraOptions(4, 8))) < plain


def test_engines_take_what_is_theirs() -> None:
    beside = of(small_plan(engine=VLLMLocalRollout(gpu_memory_utilization=0.4)), "sampling")
    assert beside.parts["vLLM"] == int(0.4 * H100.memory)
    assert "key-value cache" not in beside.parts
    elsewhere = small_plan(engine=VLLMServerRollout(["http://127.0.0.1:1"], async_steps=1))
    assert of(elsewhere, "sampling").total < of(small_plan(), "sampling").total
    seconds = elsewhere.seconds
    assert seconds.total == pytest.approx(
        max(seconds.phases["sampling"], sum(seconds.phases.values()) - seconds.phases["sampling"])
    )
    whole = of(small_plan(spread=Spread("fsdp2", 2), **MIXED), "sampling")
    assert whole.parts["gathered weights"] == 2 * small_plan().memory.counts.total
    in_parts = of(
        small_plan(spread=Spread("fsdp2", 2), engine=HFRollout(keep_weights_whole=False), **MIXED), "sampling"
    )
    assert in_parts.total <= whole.total


def test_a_plan_that_does_not_fit_says_what_helps_in_order() -> None:
    device = dataclasses.replace(H100, memory=2**20)
    plan = make_plan(SMALL, device, PlanOptions(text_tokens=32, image_pixels=56**2))
    assert plan.exit_code == 1
    text = " ".join(plan.advice)
    remedies = ("fsdp2.yaml", "sequences_per_batch (now 128)", "grad_batches (now 1)", "max_new_tokens (now 16)")
    places = [text.index(remedy) for remedy in remedies]
    assert places == sorted(places)


def test_times_follow_the_work() -> None:
    """Twice the bandwidth and arithmetic, half the time; more completions, more time."""
    options = PlanOptions(text_tokens=32, image_pixels=56**2)
    options = dataclasses.replace(
        options, assumptions=dataclasses.replace(options.assumptions, seconds_per_layer_and_step=0.0)
    )
    once = make_plan(SMALL, H100, options).seconds
    fast = dataclasses.replace(
        H100, half_flops=2 * H100.half_flops, full_flops=2 * H100.full_flops, bandwidth=2 * H100.bandwidth
    )
    twice = make_plan(SMALL, fast, options).seconds
    assert twice.phases == pytest.approx({name: seconds / 2 for name, seconds in once.phases.items()})
    more = make_plan(dataclasses.replace(SMALL, prompts_per_rollout=4), H100, options).seconds
    assert all(more.phases[name] > seconds for name, seconds in once.phases.items())


def test_devices_are_found_by_name_and_memory() -> None:
    assert find_device("A100 80GB") == DEVICES["a100-80gb"]
    assert find_device("h100", 24).memory < 24 * 2**30
    with pytest.raises(ValueError, match=r"'h1000'.*a100-40gb"):
        find_device("h1000")
    with pytest.raises(ValueError, match="must be positive"):
        find_device("h100", 0)


@pytest.mark.parametrize("field", [{"devices": 0}, {"images": -1}, {"text_tokens": 0}, {"completion_tokens": 0}])
def test_options_are_checked(field: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(field)))):
        PlanOptions(**field)  # type: ignore[arg-type]


def test_samples_that_would_be_skipped_and_ranks_that_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match=r"would be skipped.*plan\.image_pixels"):
        small_plan(PlanOptions(images=60, image_pixels=448**2))
    with pytest.raises(ValueError, match="3 ranks cannot share evenly"):
        small_plan(spread=Spread("ddp", 3))


def test_a_plan_of_a_random_model_reads_its_directory() -> None:
    with config_of(CASES["0.4 billion, adapters"]) as setup:
        counts = Rehearsal(setup, on_gpu=True).counts
    assert 3.9e8 < counts.total < 4.1e8
    assert counts.trained < 0.02 * counts.total


def test_a_memory_plan_fits_where_its_largest_phase_does() -> None:
    counts = Counts(1, 1, 1, 0, 0, 1)
    phases = [Phase("a", {"x": 3}), Phase("b", {"x": 1, "y": 4})]
    batch: Any = None
    assert MemoryPlan(phases, counts, batch, 5, 0).fits
    assert not MemoryPlan(phases, counts, batch, 4, 0).fits


def test_setup_knows_its_reference() -> None:
    adapters = dataclasses.replace(SMALL, policy=PolicyOptions("quickstart", lora=LoraOptions()))
    assert SMALL.reference_model
    assert not adapters.reference_model
    assert isinstance(SMALL, Setup)

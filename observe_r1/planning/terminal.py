"""A plan as a table in the terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from observe_r1.planning.devices import GIB, MIB
from observe_r1.planning.live_memory import CAST
from observe_r1.planning.memory import (
    BUCKETS,
    ENGINE,
    FRAGMENTED,
    GATHERED,
    MASTER,
    REFERENCE,
    RESERVED,
    UNPACKED,
    MemoryPlan,
    Phase,
)
from observe_r1.planning.plan import Plan
from observe_r1.planning.rehearsal import CACHE, GRADIENTS, OPTIMIZER, WEIGHTS
from observe_r1.readable import duration, gigabytes, short
from observe_r1.rollout import HFRollout

BAR = 44
COLOURS = {
    WEIGHTS: "blue",
    GRADIENTS: "cyan",
    BUCKETS: "cyan",
    OPTIMIZER: "magenta",
    MASTER: "magenta",
    REFERENCE: "green",
    GATHERED: "bright_blue",
    CAST: "bright_blue",
    UNPACKED: "bright_blue",
    CACHE: "yellow",
    ENGINE: "yellow",
    RESERVED: "bright_black",
    FRAGMENTED: "bright_black",
}
ACTIVATIONS = "bright_red"


def show(plan: Plan, console: Console) -> None:
    """Prints a plan; without colours and bars where nobody looks at a terminal."""
    console.print(Padding(_subject(plan), (1, 0, 0, 0)))
    if console.is_terminal:
        console.print(Padding(_bars(plan.memory), (1, 0, 0, 0)))
    console.print(Padding(_parts(plan.memory), (1, 0, 0, 0)))
    console.print(Padding(_seconds(plan), (1, 0, 0, 0)))
    console.print(Padding(_verdict(plan, console.is_terminal), (1, 0, 0, 0)))


def _subject(plan: Plan) -> Table:
    setup, counts, batch = plan.setup, plan.memory.counts, plan.memory.batch
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    trained = "all trained" if counts.trained == counts.total else f"{short(counts.trained)} of them trained"
    table.add_row("model", f"{setup.policy.pretrained}, {short(counts.total)} parameters, {trained}")
    ranks, spread = setup.spread.ranks, setup.spread
    offload = " with offload" if spread.offload_optimizer or spread.offload_parameters else ""
    table.add_row(
        "devices",
        f"{ranks} × {plan.device.name} of {gigabytes(plan.device.memory)}, {spread.kind}{offload}, {setup.precision}",
    )
    engine = "the model itself" if isinstance(setup.engine, HFRollout) else type(setup.engine).__name__
    table.add_row(
        "rollout",
        f"{setup.prompts_per_rollout:,} prompts of {plan.prompt_tokens:,} tokens ({plan.image_tokens:,} of images) × "
        f"{setup.sampling.group_size} completions of up to {plan.completion_tokens:,}, sampled by {engine}",
    )
    groups = len(batch.slices)
    table.add_row(
        "micro-batch",
        f"{groups} prompt{'s' * (groups > 1)} with {len(batch.lengths)} completion{'s' * (len(batch.lengths) > 1)}: "
        f"the dearest of {setup.updates.steps_per_rollout} × {setup.micro_batches} on each rank",
    )
    return table


def _bars(memory: MemoryPlan) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column()
    table.add_column(justify="right")
    widest = max(memory.available, memory.peak.total)
    for phase in memory.phases:
        fits = phase.total <= memory.available
        share = f"{phase.total / memory.available:.0%}"
        table.add_row(phase.name, _bar(phase, memory.available, widest), Text(share, "green" if fits else "bold red"))
    return table


def _bar(phase: Phase, available: int, widest: int) -> Text:
    """The parts of a phase, and where the device's memory ends."""
    bar, drawn, reached = Text(), 0, 0
    for name, size in phase.parts.items():
        reached += size
        cells = round(BAR * reached / widest) - drawn
        bar.append("█" * cells, COLOURS.get(name, ACTIVATIONS))
        drawn += cells
    bar.append("·" * (BAR - drawn), "bright_black")
    end = min(round(BAR * available / widest), BAR)
    plain = bar.plain
    if end < BAR:
        marked = Text(plain[:end] + "┃" + plain[end + 1 :])
        for span in bar.spans:
            marked.spans.append(span)
        marked.stylize("bold white", end, end + 1)
        return marked
    return bar


def _parts(memory: MemoryPlan) -> Table:
    unit, name = (GIB, "GiB") if memory.peak.total >= GIB else (MIB, "MiB")
    table = Table(
        title=f"{name} on one device, at the peak of each phase", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("")
    for phase in memory.phases:
        table.add_column(phase.name, justify="right", max_width=12)
    names = dict.fromkeys(name for phase in memory.phases for name in phase.parts)
    first = [name for name in COLOURS if name in names]
    order = [name for name in first if name not in (RESERVED, FRAGMENTED)]
    order += [name for name in names if name not in COLOURS]
    order += [name for name in (RESERVED, FRAGMENTED) if name in names]
    for name in order:
        label = Text(name)
        label.stylize(COLOURS.get(name, ACTIVATIONS))
        table.add_row(label, *(_amount(phase.parts.get(name, 0), unit) for phase in memory.phases))
    table.add_section()
    totals = [
        Text(_amount(phase.total, unit), "bold" if phase.total <= memory.available else "bold red")
        for phase in memory.phases
    ]
    table.add_row(Text("together", "bold"), *totals)
    return table


def _seconds(plan: Plan) -> Group:
    seconds = plan.seconds
    steps = plan.setup.updates.steps_per_rollout * plan.setup.updates.epochs_per_rollout
    heading = (
        f"Time of a rollout with its {steps} optimizer step{'s' * (steps > 1)}, completions of {seconds.mean_tokens:,} "
        "tokens on average. An estimate: nobody has measured it on a GPU."
    )
    table = Table(box=None, pad_edge=False)
    for name in (*seconds.phases, "together"):
        table.add_column(name, justify="right")
    table.add_row(*map(duration, (*seconds.phases.values(), seconds.total)))
    return Group(Text(heading, "italic"), table)


def _verdict(plan: Plan, framed: bool) -> RenderableType:
    memory, peak = plan.memory, plan.memory.peak
    left = memory.available - peak.total
    found: list[RenderableType] = []
    if memory.fits:
        head = f"Fits: {gigabytes(peak.total)} of {gigabytes(memory.available)} in its largest phase, {peak.name}."
        tight = left < 0.05 * memory.available
        found.append(Text(head + (" That is close: try DryRun on the device first." if tight else ""), "bold green"))
    else:
        head = f"Does not fit: {peak.name} needs {gigabytes(peak.total)}, and there are {gigabytes(memory.available)}."
        found.append(Text(head, "bold red"))
    found += [Text(line) for line in plan.advice]
    if memory.host:
        found.append(Text(f"Offloaded to the CPU: {gigabytes(memory.host)} for each rank."))
    if plan.seconds.warnings:
        found.append(Text(f"Not in the times: {'; '.join(plan.seconds.warnings)}.", "dim" if framed else ""))
    found.append(Text("What is counted and assumed: docs/planning.md, plan.assumptions.", "dim" if framed else ""))
    together = Group(*found)
    return Panel(together, border_style="green" if memory.fits else "red") if framed else together


def _amount(size: int, unit: int) -> str:
    if not size:
        return ""
    return f"{size / unit:,.1f}" if size >= unit / 10 else f"{size / unit:.2f}" if size >= unit / 100 else "<0.01"

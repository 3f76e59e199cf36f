"""A rollout that was saved by some number of ranks, dealt out to another number of them.

Works on the plain state of `experience_state`, so that only the samples a rank goes on with are read again. Every
optimizer step keeps its completions and its denominators; its gradient is therefore the same, up to the rounding of a
sum in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from observe_r1.balancing import balance
from observe_r1.token_cost import GroupCost

State = dict[str, Any]
Item = tuple[int, int]  # (group, completion) by number, over all ranks


def redistribute(saved: Sequence[State], world_size: int) -> list[State]:
    """The state of every new rank, from those of the old ones.

    Args:
        saved: What `experience_state.to_state` gave on each rank.
        world_size: The new number of ranks.
    """
    groups = [group for state in saved for group in state["groups"]]
    first_group = [sum(len(state["groups"]) for state in saved[:rank]) for rank in range(len(saved))]
    steps: list[list[State]] = [[] for _ in range(world_size)]  # of each rank, with groups numbered over all ranks
    for number, step in enumerate(saved[0]["steps"]):
        items = [
            (first_group[rank] + g, c)
            for rank, state in enumerate(saved)
            for index, assignment in enumerate(state["steps"][number]["micro_batches"])
            if index not in state["steps"][number]["fillers"]
            for g, completions in assignment
            for c in completions
        ]
        size = len(step["micro_batches"])
        dealt = _deal(groups, sorted(items), size * world_size)
        for rank, of_rank in enumerate(steps):
            mine = dealt[rank::world_size]
            filler = [(min(_items_of(mine) or [(rank * len(groups) // world_size, 0)]))]
            batches = [*mine, *[filler] * (size - len(mine))]
            of_rank.append({**step, "micro_batches": batches, "fillers": list(range(len(mine), size))})
    return [_state_of(of_rank, groups, saved) for of_rank in steps]


def redistribute_started(saved: Sequence[State], world_size: int) -> list[State]:
    """The same for a rollout that was sampled and not yet scored: its prompts are dealt in the order they were drawn.

    Args:
        saved: What `experience_state.started_to_state` gave on each rank.
        world_size: The new number of ranks.

    Raises:
        ValueError: It has fewer prompts than there are new ranks.
    """
    prompts = [
        (state["positions"][place], state["completions"][place])
        for place in range(max(len(state["positions"]) for state in saved))
        for state in saved
        if place < len(state["positions"])
    ]
    if len(prompts) < world_size:
        raise ValueError(
            f"The checkpoint holds a rollout of {len(prompts)} prompts, too few for {world_size} ranks: resume on at "
            f"most {len(prompts)}."
        )
    return [
        {
            **saved[0],
            "positions": [position for position, _ in prompts[rank::world_size]],
            "completions": [completions for _, completions in prompts[rank::world_size]],
        }
        for rank in range(world_size)
    ]


def _deal(groups: Sequence[State], items: Sequence[Item], parts: int) -> list[list[Item]]:
    """`items` in at most `parts` micro-batches of about equal cost, the dearest first.

    The lengths of prompts are not in the state: each counts as much as the longest completion of its group.
    """
    if not items:
        return []
    present = sorted({g for g, _ in items})
    chosen = [[c for g, c in items if g == group] for group in present]
    lengths = [
        [len(groups[g]["completions"][c]["token_ids"]) for c in of] for g, of in zip(present, chosen, strict=True)
    ]
    costs = [GroupCost(max(of_group), [float(length) for length in of_group]) for of_group in lengths]
    balanced = balance(costs, min(parts, len(items)))
    return [[(present[g], chosen[g][c]) for g, c in part] for part in balanced]


def _state_of(steps: Sequence[State], groups: Sequence[State], saved: Sequence[State]) -> State:
    used = sorted({g for step in steps for g, _ in _items_of(step["micro_batches"])})
    number = {g: place for place, g in enumerate(used)}
    return {
        "groups": [groups[g] for g in used],
        "steps": [
            {**step, "micro_batches": [_assignment(batch, number) for batch in step["micro_batches"]]} for step in steps
        ],
        "metrics": saved[0]["metrics"],
        "verdicts": saved[0]["verdicts"],
    }


def _items_of(batches: Sequence[Sequence[Item]]) -> list[Item]:
    return [item for batch in batches for item in batch]


def _assignment(batch: Sequence[Item], number: dict[int, int]) -> list[tuple[int, list[int]]]:
    present = sorted({g for g, _ in batch})
    return [(number[g], [c for group, c in batch if group == g]) for g in present]

"""Distillation inside the trainers of other frameworks. Each module needs its framework and none of the others."""

from typing import Any

import torch

from rakd.distill.distiller import Distiller
from rakd.distill.optim import add_parameters

_KEY = "rakd"


def keep_in_optimizer(distiller: Distiller, optimizer: torch.optim.Optimizer, group: int = 0) -> None:
    """Have an optimizer train a distiller, and carry its state in ``optimizer.state_dict()``.

    For trainers that save and load the optimizer by themselves: a checkpoint then holds adapters and measured scales in
    one file with everything else, and a finished model's file, which holds no optimizer, nothing of them.

    Args:
        distiller: Its parameters may be made later.
        optimizer: The trainer's.
        group: Index of the parameter group that they join.
    """
    distiller.add_to(optimizer, group)

    # Of several distillers in one group each takes its own, since hooks run in the order they came in.
    def save(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state["param_groups"][group].setdefault(_KEY, []).append(dict(distiller.state_dict()))

    def load(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [dict(saved) for saved in state["param_groups"]]
        every = groups[group].pop(_KEY, []) if group < len(groups) else []
        if every:
            kept, *others = every
            if others:
                groups[group][_KEY] = others
            # Makes the parameters if they are not there yet; the optimizer's state then has a place for each.
            distiller.load_state_dict(kept)
            # Where the optimizer's own parameters are, so that the state that is loaded next goes there too.
            first = next((p for each in optimizer.param_groups for p in each["params"]), None)
            if first is not None:
                distiller.to(first.device)
            add_parameters(optimizer, list(distiller.parameters()), group)
        return {**state, "param_groups": groups}

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)

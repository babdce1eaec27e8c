"""Distillation inside the trainers of other frameworks. Each module needs its framework and none of the others."""

from typing import Any

import torch

from rakd.distill.distiller import Distiller

_KEY = "rakd"


def keep_in_optimizer(
    distiller: Distiller, optimizer: torch.optim.Optimizer, group: int = 0, *, limit: float | None = None
) -> None:
    """Have an optimizer train a distiller, and carry its state in ``optimizer.state_dict()``.

    For trainers that save and load the optimizer by themselves: a checkpoint then holds adapters and measured scales in
    one file with everything else, and a finished model's file, which holds no optimizer, nothing of them.

    Args:
        distiller: Its parameters may be made later.
        optimizer: The trainer's.
        group: Index of the parameter group that they join.
        limit: Norm that the gradients of its parameters are clipped at before each step, for trainers that clip those
            of the model alone; None: as they are.
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
        return {**state, "param_groups": groups}

    if limit is not None:

        def clip(*_: Any) -> None:
            parameters = list(distiller.parameters())
            if parameters:  # made in the first step
                torch.nn.utils.clip_grad_norm_(parameters, limit)

        optimizer.register_step_pre_hook(clip)
    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)

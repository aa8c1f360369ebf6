"""Two steps under FSDP2 on gloo, as accelerate sets it up on GPUs; torchrun starts it in test_processes.py.

Usage: sharded.py RECIPE FOLDER. Writes losses.json and full.safetensors into FOLDER, and shards/ after the
first step; where that is there already, it continues from it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dynamic_llava.training import stages
from dynamic_llava.training.feeding import feed
from dynamic_llava.training.recipe import Recipe


def main(recipe_path: Path, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    recipe = Recipe.read(recipe_path)
    stage = stages.build(recipe)
    objective = stage.objective.train()
    mesh = init_device_mesh("cpu", (world,))
    for layer in stage.model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    data = feed(recipe, stage.model, stage.processor)
    resumed = (folder / "shards").is_dir()
    if resumed:
        model_state, optimizer_state = get_state_dict(objective, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=folder / "shards")
        set_state_dict(
            objective, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
    losses = []
    for step in range(1 if resumed else 0, 2):
        objective.begin_step(step, 2)
        whole = data.collate([data.train[i] for i in range(4 * step, 4 * step + 4)])
        share = 4 // world
        first = 4 * step + rank * share
        batch = data.collate([data.train[i] for i in range(first, first + share)])
        loss, _ = objective(batch["groups"], objective.counts(whole["groups"]))
        optimizer.zero_grad()
        (loss * world).backward()  # FSDP averages the gradients
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
        if step == 0:
            model_state, optimizer_state = get_state_dict(objective, optimizer)
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "shards")
    full = get_model_state_dict(objective, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
        save_file({name: tensor.contiguous() for name, tensor in full.items()}, folder / "full.safetensors")
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]), Path(sys.argv[2]))

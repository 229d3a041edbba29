"""What a training run carries from step to step, and its checkpoint: one safetensors file."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from openvsa.errors import OpenVSAError
from openvsa.models.shots import ShotTokens
from openvsa.train.recipe import TrainConfig

__all__ = ["TrainState"]


class TrainState:
    """Weights, averaged weights, optimizers, random generators and their seed, steps done and seconds spent.

    Weights are fp32. What runs is `worker`, a copy in the precision of the device (bf16 on a GPU) that `lend` fills.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.seed = config.seed or 0
        torch.manual_seed(self.seed)
        self.model = _new_model(config).to(config.device)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)).requires_grad_(False)
        self.dtype = torch.bfloat16 if torch.device(config.device).type == "cuda" else torch.float32
        self.worker = copy.deepcopy(self.model).to(self.dtype)
        self.optimizers = _new_optimizers(self.model, config)
        # Small draws are made on the CPU and never wait for the device; noise is drawn where it is used.
        self.draws = torch.Generator().manual_seed(self.seed)
        self.noise = torch.Generator(config.device).manual_seed(self.seed + 1)
        self.step = 0
        self.seconds = 0.0

    def set_lr(self, factor: float) -> None:
        """Sets every learning rate to `factor` times its peak."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]

    def lend(self, source: nn.Module) -> nn.ModuleDict:
        """The worker with the weights of `source`, `model` or `ema.module`."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.worker.parameters()), list(source.parameters()))
        return self.worker

    def update(self, clip_norm: float) -> None:
        """One optimizer step on the gradients of the worker, which are cleared."""
        for parameter, lent in zip(self.model.parameters(), self.worker.parameters(), strict=True):
            parameter.grad = None if lent.grad is None else lent.grad.float()
            lent.grad = None
        nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.update_parameters(self.model)
        self.step += 1

    def save(self, path: Path) -> None:
        """Writes the checkpoint, whole or not at all. Raises `OpenVSAError` when it cannot."""
        temporary = path.with_name(f".{path.name}.part")
        metadata = {"state": json.dumps({"step": self.step, "seconds": self.seconds, "seed": self.seed})}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: t.contiguous() for name, t in self._tensors().items()}, temporary, metadata)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise OpenVSAError(
                f"cannot write the checkpoint {str(path)!r} after {self.step} steps: {error}. Make room there, or name "
                "another file; an older checkpoint is as it was"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path, seed_asked: int | None = None) -> None:
        """Goes on where the run that wrote the checkpoint stopped, with its seed. Raises `OpenVSAError` when it cannot,
        or another seed is asked for."""
        try:
            with safe_open(path, framework="pt") as file:
                counters = json.loads(file.metadata()["state"])
                step, seconds, seed = (counters[name] for name in ("step", "seconds", "seed"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise OpenVSAError(f"cannot read the checkpoint {str(path)!r}: {error}") from None
        if seed_asked not in (None, seed):
            raise OpenVSAError(
                f"the checkpoint {str(path)!r} is of a run with seed {seed}, which it goes on with; got {seed_asked}: "
                "leave the seed out, or begin another run"
            )
        try:
            self.model.load_state_dict(_below("model.", tensors))
            self.ema.load_state_dict(_below("ema.", tensors))
        except RuntimeError:
            raise OpenVSAError(
                f"the checkpoint {str(path)!r} is of another model than this recipe makes ({self._differs(tensors)}): "
                "resume it with the preset that it was begun with"
            ) from None
        for index, optimizer in enumerate(self.optimizers):
            content = optimizer.state_dict()
            for name, tensor in _below(f"optimizer.{index}.", tensors).items():
                parameter, key = name.split(".")
                content["state"].setdefault(int(parameter), {})[key] = tensor
            optimizer.load_state_dict(content)
        self.draws.set_state(tensors["generator.draws"])
        self.noise.set_state(tensors["generator.noise"])
        self.step, self.seconds, self.seed = step, seconds, seed

    def _differs(self, tensors: dict[str, Tensor]) -> str:
        ours, theirs = self.model.state_dict(), _below("model.", tensors)
        for name in [*ours, *theirs]:
            found, wanted = (list(of[name].shape) if name in of else "absent" for of in (theirs, ours))
            if found != wanted:
                return f"{name} is {found}, not {wanted}"
        return "its averaged weights"

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": t for name, t in self.ema.state_dict().items()}
        for index, optimizer in enumerate(self.optimizers):
            for parameter, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{parameter}.{key}": t for key, t in values.items()}
        return tensors | {"generator.draws": self.draws.get_state(), "generator.noise": self.noise.get_state()}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _new_model(config: TrainConfig) -> nn.ModuleDict:
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=2 * config.num_components,
        out_channels=config.num_components,
        text_dim=64,
        freq_dim=256,
        ffn_dim=4 * config.num_heads * config.head_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    # The prediction starts as the linear estimate alone.
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return nn.ModuleDict({"transformer": transformer, "shot_tokens": ShotTokens(num_rows=config.shots.num_rows)})


def _new_optimizers(model: nn.ModuleDict, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks; AdamW for everything else, without weight decay on vectors."""
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if ".blocks." in name and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            (tables if parameter.ndim > 1 else vectors).append(parameter)

    def group(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> dict:
        return {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": weight_decay}

    muon = torch.optim.Muon([group(matrices, config.matrix_lr, config.weight_decay)], adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [group(tables, config.other_lr, config.weight_decay), group(vectors, config.other_lr, 0.0)],
        betas=(0.9, 0.98),
    )
    return [muon, adamw]

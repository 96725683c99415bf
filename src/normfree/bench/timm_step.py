"""timm's networks by name, and a training step of theirs as its users write it."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normfree.bench.task import CLASSES, RATE, SAM, TIMM, Task, images, is_finite
from normfree.config import IMAGENET_MEAN, IMAGENET_STD, UserError, is_out_of_memory, suggestion
from normfree.distributed import Group
from normfree.models import MODELS
from normfree.train.step import PRECISIONS


def library() -> Any:
    """The package timm. Raises UserError where it does not import."""
    try:
        import_module("timm.utils")
        return import_module("timm")
    except (ImportError, RuntimeError, OSError) as e:
        raise UserError(f"networks of timm need timm and the torchvision that belongs to torch: {e}") from e


def timms_network(model: str) -> nn.Module:
    """A new network of timm's, by "timm:NAME"; its NFNets with the stochastic depth and dropout that ours have.

    Raises:
        UserError: timm does not import, or has no such network.
    """
    name, rates = known_name(model), {}
    if (twin := MODELS.get(name.removeprefix("dm_"))) is not None and name.startswith("dm_"):
        rates = {"drop_path_rate": twin.stochastic_depth, "drop_rate": twin.drop_rate}
    found: nn.Module = library().create_model(name, num_classes=CLASSES, **rates)
    return found


def known_name(model: str) -> str:
    """NAME of "timm:NAME". Raises UserError if timm has no such network."""
    name, timm = model.removeprefix(TIMM), library()
    if not timm.is_model(name):
        raise UserError(f"timm has no network {name!r}{suggestion(name, timm.list_models())}")
    return name


class TimmStep:
    """As its users train: autocast, torch's SGD and, for normalizer-free networks, timm's AGC; timm's average.

    Several processes share the work by torch's DistributedDataParallel.
    """

    def __init__(self, task: Task, group: Group) -> None:
        if task.model.endswith(SAM):
            raise UserError(f"{SAM} is for our networks: timm has no step of that kind")
        self._timm, self.micro_batch, self._n = library(), task.micro_batch, task.batch
        model = timms_network(task.model)
        if task.remat != "none":
            _remat(task.model, model)
        self._model: Any = model.to(task.device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self._synced = _in_parallel(model, group) if group.world > 1 else None
        forward: Any = model if self._synced is None else self._synced
        self._forward: Any = torch.compile(forward, dynamic=False) if task.compiled else forward
        self._average = self._timm.utils.ModelEmaV3(model, decay=0.9999)
        settings: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 2e-5}
        self._optimizer = torch.optim.SGD(model.parameters(), lr=RATE, fused=task.fused or None, **settings)
        self._kind, self._dtype = torch.device(task.device).type, PRECISIONS[task.precision]
        self._scaler = torch.amp.GradScaler(self._kind) if task.precision == "fp16" else None
        self._clips = "nfnet" in task.model or "nf_" in task.model
        mean, std = (torch.tensor(v, device=task.device).mul(255)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        self._x = images(task).float().sub(mean).div(std).contiguous(memory_format=torch.channels_last)
        self._labels = torch.arange(task.batch, device=task.device) % CLASSES
        if group.world > 1:  # what fits is found while nobody waits for a sum, and is the same for all
            self._fit(alone=True)
            self.micro_batch = -group.agree(-(self.micro_batch or self._n))

    def __call__(self) -> None:
        self._fit(alone=self._synced is None)
        self._update()

    def _fit(self, alone: bool) -> None:
        """`_backward`, from now on of half as many images at once, as long as memory runs out and nobody waits."""
        while True:
            self._optimizer.zero_grad(set_to_none=True)
            try:
                return self._backward(alone)
            except (RuntimeError, MemoryError) as e:
                if not alone or not is_out_of_memory(e) or (self.micro_batch or self._n) == 1:
                    raise
            # behind the handler, which keeps the maps of the failed step alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.micro_batch = min(self.micro_batch or self._n, self._n) // 2

    def _backward(self, alone: bool) -> None:
        """Leave the mean gradient over the batch in the parameters; of the batches of all processes, if not `alone`."""
        at_once = self.micro_batch or self._n
        parts = list(zip(self._x.split(at_once), self._labels.split(at_once), strict=True))
        for i, (x, labels) in enumerate(parts):
            apart = self._synced is not None and (alone or i < len(parts) - 1)
            with self._synced.no_sync() if self._synced is not None and apart else nullcontext():
                with torch.autocast(self._kind, self._dtype, enabled=self._dtype != torch.float32):
                    logits = self._forward(x)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1) * (len(labels) / self._n)
                (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def _update(self) -> None:
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        if self._clips:
            body = self._timm.models.model_parameters(self._model, exclude_head=True)
            self._timm.utils.agc.adaptive_clip_grad(body, 0.01)
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._average.update(self._model)

    def is_finite(self) -> bool:
        return is_finite(self._model)


def _in_parallel(model: nn.Module, group: Group) -> Any:
    from torch.nn.parallel import DistributedDataParallel  # noqa: PLC0415 (it takes seconds)

    over = group._of(next(model.parameters()))
    return DistributedDataParallel(model, process_group=over, gradient_as_bucket_view=True)


def _remat(name: str, model: Any) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as e:
        raise UserError(f"{name} cannot compute its maps again: leave --remat out") from e

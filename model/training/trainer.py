"""transformers' Trainer for LLaVA-ST: losses equal however a step is dealt out, and runs that can be killed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer

from ..data.collator import Collator
from ..data.order import EpochSampler
from ..modeling_llava_st import LlavaStForConditionalGeneration
from .arguments import training_arguments
from .checkpoints import optimizer_state, optimizer_tensors, read_tensors, write_checkpoint
from .errors import NonFiniteLossError
from .losses import StepLoss, count_items, counts_samples, merge_totals
from .progress import Meter, combine, plot
from .settings import StageSettings
from .sharding import like, set_parameter, whole_tensor
from .trainable import Trainable, optimizer_groups


class StageTrainer(Trainer):
    """Trains a model that `prepare` (and perhaps `shard`) was called with.

    Args:
        model: to train.
        settings: of the stage.
        trainables: what `prepare` gave.
        data: samples by index.
        collator: makes batches of them.
        out: folder of checkpoints and reports.
        evaluate: called every `settings.eval_steps` steps with model and step, on all processes; gives numbers.
    """

    def __init__(
        self,
        model: LlavaStForConditionalGeneration,
        settings: StageSettings,
        trainables: list[Trainable],
        data: Dataset,
        collator: Collator,
        out: Path,
        evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    ) -> None:
        self.settings, self.trainables, self.evaluator = settings, trainables, evaluate
        self._step_loss, self._per_sample = StepLoss(model, settings.loss_samples), counts_samples(model)
        self._meter, self._micro, self._evaluated = Meter(), 0, 0
        self._places: list[str] = []
        super().__init__(model, training_arguments(settings, out), collator, data)
        self._sampler = EpochSampler(len(data), settings.seed, multiple=settings.batch_size * self.args.world_size)
        self.model_accepts_loss_kwargs = True  # StepLoss does, whatever the model's own loss is
        # Sharded by `shard`, whose parameters accelerate must neither shard again nor give to DDP.
        self.is_distributed_loading_by_transformers = isinstance(model, FSDPModule)

    # Order and randomness: of seed, epoch and index alone.

    def get_train_dataloader(self) -> DataLoader:
        # accelerate would fill the last batches up with the epoch's first samples, which were trained on already.
        return self._get_dataloader(
            _Filled(self.train_dataset), "Training", self._train_batch_size, self._get_train_sampler, is_training=True
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self._sampler

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        found = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # a checkpoint has those of the run before
        return found

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # goes on from the last step
            self.control.should_training_stop = True
            return
        self._sampler.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        start = time.perf_counter()
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._meter.waited(time.perf_counter() - start)
        self._micro, self._places = 0, []
        return found

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        count = sum(count_items(batch, self._per_sample) for batch in batch_samples).to(device)
        return self.accelerator.gather(count).sum()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
        names = getattr(inputs, "samples", [])
        self._places += [f"{name.place} (sample {name.index})" for name in names]
        seed_everything(self.settings.seed, self.state.global_step, self._micro, self.args.process_index)
        self._micro += 1
        self._meter.add(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        sums = self._step_loss.sums.cpu()
        if not torch.isfinite(loss):
            bad = [name for name, total in zip(names, sums.tolist(), strict=False) if not math.isfinite(total)] or names
            which = ", ".join(f"{name.place} (sample {name.index})" for name in bad)
            raise NonFiniteLossError(f"the loss of step {self.state.global_step + 1} is {float(loss)}: {which}")
        self._meter.tasks.add([name.task for name in names], sums, self._step_loss.targets)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._checked(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        return self._checked(super()._get_grad_norm(model, grad_norm))

    def _checked(self, norm: Tensor) -> Tensor:
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not math.isfinite(norm):
            raise NonFiniteLossError(
                f"the gradient of step {self.state.global_step + 1} is {float(norm)}: {', '.join(self._places)}"
            )
        return norm

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                optimizer_groups(self.model, self.trainables, self.settings),
                betas=(self.settings.beta1, self.settings.beta2),
                eps=self.settings.epsilon,
            )
        return self.optimizer

    # Reports.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            reports = gather_object([self._meter.drain()])
            logs.update(combine(reports))
            logs.update({f"loss/{task}": loss for task, loss in merge_totals([r["tasks"] for r in reports]).items()})
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        every, step = self.settings.eval_steps, self.state.global_step
        due = (step == self.state.max_steps or (every and step % every == 0)) and step != self._evaluated
        if self.evaluator is not None and due:  # the end of an epoch comes here again
            self._evaluated = step
            self.model.eval()
            with torch.random.fork_rng(), torch.no_grad(), self.accelerator.autocast():
                found = self.evaluator(self.model, step)
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # a forward pass without a backward one leaves gathered parameters
            should_log = self.control.should_log
            self.log({f"eval/{name}": float(value) for name, value in found.items()})
            self.control.should_log = should_log  # which reporting resets: losses have still to be
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def plot(self) -> None:
        if self.args.should_save:
            plot(self.state.log_history, Path(self.args.output_dir) / "training.png")

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        main = self.args.should_save
        trained = {name: self.model.get_parameter(name) for each in self.trainables for name in each.names}
        weights = {name: whole_tensor(parameter, main) for name, parameter in trained.items()}
        names = {id(parameter): name for name, parameter in trained.items()}
        moments = optimizer_tensors(self.optimizer, names, lambda tensor: whole_tensor(tensor, main))
        failures = getattr(self.data_collator, "failures", None)
        counts = gather_object([failures.state_dict()]) if failures else None
        if main:
            self.state.stateful_callbacks = {}
            scheduler = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
            state = {"scheduler": scheduler, "failures": counts, "order": self._order()}
            write_checkpoint(
                Path(self.args.output_dir),
                self.state.global_step,
                {"weights.safetensors": weights, "moments.safetensors": moments},
                {"trainer_state.json": trainer_state(self.state), "training.json": json.dumps(state)},
                self.settings.keep,
            )
        if dist.is_initialized():
            dist.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        tensors = read_tensors(Path(resume_from_checkpoint) / "weights.safetensors")
        expected = {name for each in self.trainables for name in each.names}
        if tensors.keys() != expected:
            raise ValueError(f"{resume_from_checkpoint}: is of a stage that trains other parameters")
        order = json.loads((Path(resume_from_checkpoint) / "training.json").read_text()).get("order", {})
        for name, number in order.items():  # or samples would be left out, and others come twice
            if (got := self._order()[name]) != number:
                raise ValueError(f"{resume_from_checkpoint}: expected {number} {name}, got {got}")
        for name, tensor in tensors.items():
            set_parameter(self.model.get_parameter(name), tensor)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        for name, state in optimizer_state(read_tensors(Path(checkpoint) / "moments.safetensors")).items():
            parameter = self.model.get_parameter(name)
            optimizer.state[parameter] = {
                key: like(value, parameter) if value.dim() else value for key, value in state.items()
            }
        state = json.loads((Path(checkpoint) / "training.json").read_text())
        self.lr_scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None] * len(optimizer.param_groups)})
        for group, rate in zip(optimizer.param_groups, state["scheduler"]["_last_lr"], strict=True):
            group["lr"] = rate
        if state["failures"]:  # of each process, then more or fewer of them
            mine = state["failures"][self.args.process_index :: self.args.world_size]
            self.data_collator.failures.load_state_dict(*mine)

    def _order(self) -> dict[str, int]:
        """What says, with seed and epoch, which samples a step has."""
        step = self.settings.batch_size * self.settings.accumulation * self.args.world_size
        return {"samples in a step (batch_size x accumulation x processes)": step, "samples": len(self.train_dataset)}

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """There is none: `training_step` seeds every micro-batch."""

    def _load_callback_state(self) -> None:
        """There is none."""


class _Filled(Dataset):
    """Samples by index, and nothing by None, which `EpochSampler` has where there are no more."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | None) -> Any:
        return None if index is None else self.data[index]


def trainer_state(state: Any) -> str:
    """transformers' state of training as JSON."""
    return json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True)


def seed_everything(*key: int) -> None:
    """Seeds torch for what follows, with numbers that belong to a place in training and not to its history."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)

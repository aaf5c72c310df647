"""The settings of a stage as transformers' Trainer takes them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments

from .settings import StageSettings


def training_arguments(settings: StageSettings, out: Path) -> TrainingArguments:
    """Arguments of `StageTrainer`, which writes its own checkpoints and reports."""
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_ratio,  # a number below 1 is a share of all steps
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.clip,
        average_tokens_across_devices=True,
        bf16=settings.bf16,
        tf32=settings.tf32 if cuda and torch.cuda.get_device_capability()[0] >= 8 else None,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,  # all are used, see StepLoss
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        use_cpu=not cuda,
        seed=settings.seed,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,  # they stop training
        logging_first_step=True,
        save_strategy="steps",
        save_steps=settings.save_steps,
        eval_strategy="no",
        report_to=["tensorboard"] if find_spec("tensorboard") else "none",
        disable_tqdm=True,
    )
    # One process drives one GPU: DataParallel would cut frames and places as if they were samples.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments

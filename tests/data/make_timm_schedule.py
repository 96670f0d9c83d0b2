"""Records timm 1.0.31's learning rates of 100 epochs in timm_schedule.json (make_timm_fixtures.py says how)."""

import json
from pathlib import Path

import torch

library = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from timm.scheduler.cosine_lr import CosineLRScheduler

optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
schedule = CosineLRScheduler(optimizer, t_initial=100, lr_min=1e-5, warmup_lr_init=1e-6, warmup_t=5, cycle_limit=1)
rates = []
for epoch in range(100):
    schedule.step(epoch)
    rates.append(optimizer.param_groups[0]["lr"])
(Path(__file__).parent / "timm_schedule.json").write_text(json.dumps(rates) + "\n")

"""User scripts that goes wrong on one rank of two, in the way that `--fault` names."""

import argparse
import os
import signal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apt_jobs.gradient_monitor.monitor import GradientMonitor


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", choices=["other_layers", "no_layers", "killed", "raised"])
    fault = parser.parse_args().fault
    dist.init_process_group("gloo")
    is_broken = dist.get_rank() == 1
    if fault in ("other_layers", "no_layers"):
        model = nn.Linear(3, 3, bias=not is_broken)
        GradientMonitor(model.requires_grad_(fault == "other_layers" or not is_broken))
    ddp = DistributedDataParallel(nn.Linear(3, 3))
    monitor = GradientMonitor(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1))
    for step in range(1, 6):
        loss = ddp(torch.ones(2, 3)).square().mean()
        if is_broken and step == 3:  # the other rank waits for this one's gradients
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("a bad batch")
        torch.autograd.backward(loss)
        monitor.step(loss=loss)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

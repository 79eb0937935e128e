"""One rank that trains without end under the monitor, and says after each step how far it is. To be killed."""

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apt_jobs.events.spool import SpoolWriter
from apt_jobs.gradient_monitor.monitor import GradientMonitor
from apt_jobs.training.ddp import process_group


def main(folder: Path) -> None:
    with process_group("cpu") as rank:
        (folder / f"pid-{rank.rank}").write_text(str(os.getpid()))
        done = os.open(folder / f"done-{rank.rank}", os.O_WRONLY | os.O_CREAT)
        ddp = DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)))
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
        monitor = GradientMonitor(ddp, spool=SpoolWriter(folder / f"rank-{rank.rank}.spool"))
        step = 0
        while True:
            step += 1
            loss = ddp(torch.randn(4, 8)).square().mean()
            torch.autograd.backward(loss)
            monitor.step(step, loss=loss)
            os.pwrite(done, b"%08d" % step, 0)
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

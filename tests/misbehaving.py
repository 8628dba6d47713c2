"""Networks that fail as networks and machines do, for the tests of sweeps."""

import os
import signal
import time
import weakref
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """A small network without faults: images B 3 32 32 -> logit map B K 8 8."""

    instances = 0

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        Tiny.instances += 1
        body = [nn.Conv2d(3, width, 3, stride=4, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*body, nn.Conv2d(width, num_classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        logit_map: Tensor = self.body(images)
        if self.training and images.device.type != "meta":
            self.misbehave()
        return logit_map

    def misbehave(self) -> None:
        """Do what is wrong with this network; called in each training step."""


class Burst(torch.optim.SGD):
    """An optimizer whose first step makes the weights so large that the next loss is NaN."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(1e30)


class Raises(Tiny):
    """A network that raises in its first training step."""

    def misbehave(self) -> None:
        raise RuntimeError("this network does not like its images")


class Kills(Tiny):
    """A network that kills its process, `times` times in all; files in `folder` count the kills."""

    def __init__(self, num_classes: int, folder: str, times: int, after: int = 0) -> None:
        super().__init__(num_classes)
        self.folder, self.times, self.after, self.steps = Path(folder), times, after, 0

    def misbehave(self) -> None:
        self.steps += 1
        done = len(list(self.folder.glob("killed-*")))
        if done < self.times and self.steps > self.after:
            (self.folder / f"killed-{done}").touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Large(Tiny):
    """A network that runs out of memory if more than two others were made in this process."""

    def misbehave(self) -> None:
        if Tiny.instances > 3:  # a teacher and two students
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class Slow(Tiny):
    """A network whose training steps take `seconds` longer and give the same numbers."""

    def __init__(self, num_classes: int, seconds: float) -> None:
        super().__init__(num_classes)
        self.seconds = seconds

    def misbehave(self) -> None:
        time.sleep(self.seconds)


class Heavy(Tiny):
    """A network that runs out of memory beside more than one other that is still in memory."""

    here: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        if torch.empty(0).device.type != "meta":
            Heavy.here.add(self)

    def misbehave(self) -> None:
        if len(Heavy.here) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class Waits(Tiny):
    """Takes its time to be built."""

    def __init__(self, num_classes: int, seconds: float) -> None:
        super().__init__(num_classes)
        time.sleep(seconds)

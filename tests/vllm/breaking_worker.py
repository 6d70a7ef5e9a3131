"""Workers of vLLM in which something goes wrong, half-way through the weights."""

import os
import signal

from vllm.v1.worker.cpu_worker import CPUWorker

from shardstate.torch.recorder import Recorder


def at_tenth_weight(act):
    """Do something when the tenth weight is offered to the model's loading code."""
    offer, offered = Recorder.offer, []

    def acting(recorder, row):
        offered.append(row)
        if len(offered) == 10:
            act()
        return offer(recorder, row)

    Recorder.offer = acting


def fail():
    raise RuntimeError("broken on purpose")


class BreakingWorker(CPUWorker):
    """Recording fails."""

    def load_model(self, *args, **kwargs):
        at_tenth_weight(fail)
        super().load_model(*args, **kwargs)


class DyingWorker(CPUWorker):
    """The worker of rank 1 is killed."""

    def load_model(self, *args, **kwargs):
        if self.rank == 1:
            at_tenth_weight(lambda: os.kill(os.getpid(), signal.SIGKILL))
        super().load_model(*args, **kwargs)

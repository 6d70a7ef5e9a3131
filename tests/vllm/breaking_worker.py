"""A worker of vLLM in which recording fails, half-way through the weights."""

from vllm.v1.worker.cpu_worker import CPUWorker

from shardstate.torch.recorder import Recorder


class BreakingWorker(CPUWorker):
    """Fails at the tenth weight that is offered."""

    def load_model(self, *args, **kwargs):
        offer, offered = Recorder.offer, []

        def breaking(recorder, row):
            offered.append(row)
            if len(offered) == 10:
                raise RuntimeError("broken on purpose")
            return offer(recorder, row)

        Recorder.offer = breaking
        super().load_model(*args, **kwargs)

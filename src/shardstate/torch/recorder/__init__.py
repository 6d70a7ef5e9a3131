"""The recorder: watches loading code, and turns what it does with weights into a plan."""

from shardstate.torch.recorder.mode import LITERAL_BYTES, Recorder
from shardstate.torch.recorder.standins import RecordingError, Standin

__all__ = ["LITERAL_BYTES", "Recorder", "RecordingError", "Standin"]

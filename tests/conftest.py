"""What all tests share."""

from hypothesis import settings

# Two busy cores make any deadline a coin toss.
settings.register_profile("shardstate", deadline=None)
settings.load_profile("shardstate")

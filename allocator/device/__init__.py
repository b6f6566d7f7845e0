"""When a device's work has ended: events, streams, completions, and the handle of a transfer."""

"""What the process tells of itself: logs, traces and metrics. It knows nothing of the engine."""

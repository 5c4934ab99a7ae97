"""Events -> windows -> records, labels and behaviour pairs. ``complete_journey`` adapts the real data."""

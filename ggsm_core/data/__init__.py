"""Events -> windows -> records, labels and behaviour pairs. ``complete_journey`` is the one adapter to real data."""

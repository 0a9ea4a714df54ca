"""A limit to waiting that no load of the machine reaches: only what hangs takes longer."""

HANG = 1200.0  # seconds; less than the 30 minutes after which gloo gives up by itself

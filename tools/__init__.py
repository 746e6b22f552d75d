"""The commands beside the three processes: launch, watch, replay, report, compare, benchmark."""
